"""llmlab: what the book explains and the labs call. Import the modules you need; this file imports none of them."""

__version__ = "0.1.0"

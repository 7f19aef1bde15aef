"""Building labs from their sources, and proving that their graders grade."""

"""Text in and out: prompts to token ids, tokens to text, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmlab.batching import Request

Prompt = str | Sequence[int]


class Text:
    """What the engine asks a tokenizer; without one, prompts are token ids and there is no text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Raises ValueError for text without a tokenizer, TypeError for what is neither text nor whole numbers."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt: text needs the engine's tokenizer; give token ids")
            return list(self.tokenizer(prompt)["input_ids"])
        if not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
            raise TypeError("prompt: expected text or a sequence of whole numbers")
        return list(prompt)

    def of(self, request: Request) -> str | None:
        """What a request has generated, cut before its stop string."""
        if self.tokenizer is None:
            return None
        text: str = self.tokenizer.decode(list(request.output), skip_special_tokens=True)
        at = self.stop_at(request)
        return text[:at] if at >= 0 else text

    def stop_at(self, request: Request) -> int:
        """Where the first of a request's stop strings begins in its text; -1: nowhere."""
        if not request.sampling.stop:
            return -1
        text: str = self.tokenizer.decode(list(request.output), skip_special_tokens=True)
        return min((at for s in request.sampling.stop if (at := text.find(s)) >= 0), default=-1)

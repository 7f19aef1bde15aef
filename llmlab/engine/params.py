"""What is asked for beside a prompt: how tokens are chosen, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.arguments import checked, integer, number


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    max_new_tokens: at most. temperature: 0 for the largest logit, else a draw from softmax(logits / temperature).
    top_k: among the k largest (0: all). top_p: among the fewest whose probabilities reach p. seed: of the draws; the
    same seed draws the same tokens in any batch. stop: strings that end the output, which is cut before them.
    stop_token_ids: tokens that end it, beside the model's own end of sequence unless ignore_eos.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop: expected a tuple of strings that are not empty, got {self.stop!r}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@checked(
    max_new_tokens=integer(at_least=1), temperature=number(at_least=0), top_k=integer(), top_p=number(above=0, at_most=1), seed=integer()
)  # fmt: skip
def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """The arguments' bounds."""

"""Choosing the next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmlab.engine.params import SamplingParams


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], ops: Any) -> Tensor:
    """One token a row of [N, V]; -1 for a row with a NaN in it. positions: which token of its sequence each one is."""
    if all(p.is_greedy for p in params):
        chosen: Tensor = ops.argmax(logits)
        return chosen
    device = logits.device
    logits = logits.float()
    if any(p.top_k or p.top_p < 1 for p in params):
        logits = keep_likely(logits, params)
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)
    seeds = torch.tensor([p.seed for p in params], dtype=torch.int64, device=device)
    at = torch.tensor(positions, dtype=torch.int64, device=device)
    drawn: Tensor = ops.gumbel_argmax(logits, temperature, seeds, at)
    return drawn


def keep_likely(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits [N, V] with all but each row's top-k and top-p tokens at minus infinity.

    The nucleus is the shortest list of most likely tokens whose probabilities, at the row's temperature and among its
    top k, reach p (Holtzman et al. 2020).
    """
    device, V = logits.device, logits.shape[1]
    heat = torch.tensor([p.temperature or 1.0 for p in params], device=device)[:, None]
    most = torch.tensor([p.top_k or V for p in params], device=device)[:, None]
    share = torch.tensor([p.top_p for p in params], device=device)[:, None]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(V, device=device) >= most, float("-inf"))
    likely = (ordered / heat).softmax(dim=-1)
    ordered = ordered.masked_fill(likely.cumsum(dim=-1) - likely >= share, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)

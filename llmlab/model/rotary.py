"""Rotary positions: the angles by which each position turns each pair of channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmlab.config import ModelConfig


def rotary_table(config: ModelConfig) -> Tensor:
    """cos and sin of m theta^(-2i/d) for positions m and pairs i, [max_positions, 2, d/2] in fp32.

    Source: Su et al. 2021, arXiv:2104.09864; the stretching of Llama 3.1's frequencies: its model card's code.
    Raises ValueError for another way of stretching.
    """
    d = config.rotary_size
    frequencies = config.rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float32, device="cpu") / d)
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        frequencies /= scaling["factor"]
    elif kind == "llama3":
        frequencies = _stretch_llama3(frequencies, **{k: v for k, v in scaling.items() if k != "rope_type"})
    elif kind != "default":
        raise ValueError(f"rope_scaling of {config.name!r}: expected 'default', 'linear' or 'llama3', got {kind!r}")
    angles = torch.arange(config.max_positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def _stretch_llama3(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """Slow turns are stretched by the factor, fast ones stay, those between go smoothly from one to the other."""
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (share + (1 - share) / factor)

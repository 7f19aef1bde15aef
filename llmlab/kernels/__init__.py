"""Kernels of an inference step: Triton ones for a GPU, and twins in torch with the same names and signatures."""

from __future__ import annotations

import importlib
from types import ModuleType


def kernels_for(device: str) -> ModuleType:
    """The module of kernels for a device's type: Triton's for "cuda", torch's for any other."""
    return importlib.import_module(f"llmlab.kernels.{'fused' if device == 'cuda' else 'reference'}")

"""Starting a kernel before the one in front of it has ended (programmatic dependent launch, from Hopper on).

A kernel that is bound by memory loses the time in which the last programs of the one before drain and its own first
loads are on their way. Here a kernel's programs may come in as soon as the one before has started all of its own; what
others write is read, and anything written, only after ``gdc_wait``, which lasts until the kernel before has ended.
Matrices, which nobody writes, may be loaded before.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

ENABLED = True


@functools.cache
def _supported() -> bool:
    return bool(torch.cuda.get_device_capability()[0] >= 9)


def early(wanted: bool = True) -> dict[str, bool]:
    """The arguments of a launch: whether the kernel waits itself, and may therefore be started early."""
    on = wanted and ENABLED and _supported()
    return {"EARLY": on, "launch_pdl": on}


@triton.jit
def wait(EARLY: tl.constexpr):
    """Let the next kernel come in, and wait for the one before."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

"""The same checks on ranks of a CPU, in fp64 over gloo, and on ranks with a GPU each, in fp32 over NCCL."""

import pytest
import torch


def on_devices(cases, ranks=lambda case: case):
    """Each case on the CPU; and, where it has several ranks, on as many GPUs. ranks: how many a case has."""
    on_gpus = [
        pytest.param(("cuda", case), marks=pytest.mark.multi_gpu(ranks(case))) for case in cases if ranks(case) > 1
    ]
    return [("cpu", case) for case in cases] + on_gpus


def named(param):
    """The id of a case: its device, and what it has."""
    device, case = param
    return f"{device}, {case}"


def place(mesh):
    """The device and the dtype of a rank: products in fp32 keep all their bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return mesh.device_type, torch.float32 if mesh.device_type == "cuda" else torch.float64


def far(ours, wanted):
    """How far two tensors are apart: at most in fp64, and in fp32 relative to their size."""
    if wanted.dtype == torch.float64:
        return (ours - wanted).abs().max().item() if wanted.numel() else 0.0
    return ((ours - wanted).norm() / (wanted.norm() + 1e-6)).item()


def close(device, fp64=1e-12):
    """How far two results may be apart that are equal in exact arithmetic."""
    return 1e-4 if device == "cuda" else fp64

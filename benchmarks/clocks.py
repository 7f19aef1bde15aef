"""What a call takes on a rank: on a GPU the clock is read when the device has done it."""

import time

import torch
import torch.distributed as dist


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device, call):
    """When a call began, with all ranks ready, and ended."""
    dist.barrier()
    synchronize(device)
    began = time.monotonic()
    call()
    synchronize(device)
    return {"began": began, "ended": time.monotonic()}


def spent(device, call, times):
    """Seconds of a call, over so many."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / times

"""What this machine has of what the course uses, and how to get the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing the course uses: whether it is here, and the command that brings it."""

    what: str
    present: bool
    needed: bool
    found: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look for Python, torch, a GPU, the model, the browser, the sandbox, and the labs' tools."""
    return [_python(), _torch(), _gpu(), _model(), *_tools(), _browser(), _sandbox(), _disk()]


def _python() -> Finding:
    present = sys.version_info >= (3, 11)
    mend = "" if present else "make PYTHON=python3.12 course"
    return Finding("Python 3.11+", present, True, platform.python_version(), mend)


def _torch() -> Finding:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", False, True, "", "make setup, or pip install -e '.[all]'")
    return Finding("torch", True, True, version)


def _gpu() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("GPU", False, False, f"torch does not import: {error}", "make setup")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Finding(
            "GPU", True, False, f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    has_card = shutil.which("nvidia-smi") is not None
    mend = (
        "install a CUDA build of torch: make setup TORCH_INDEX=…"
        if has_card
        else "none needed: everything runs on the CPU"
    )
    return Finding("GPU", False, False, "no CUDA device", mend)


def _model() -> Finding:
    from llmlab.checkpoint import PACKAGED_MODELS, CheckpointError, find_gguf, is_cached

    name = "smollm2-135m"
    if is_cached(name):
        return Finding("model", True, True, f"{name}, in the cache")
    try:
        find_gguf(PACKAGED_MODELS[name])
    except CheckpointError as error:
        return Finding("model", False, True, error.trouble, error.mend)
    return Finding("model", True, True, f"{name}, in its package; the first load converts it (half a minute)")


def _tools() -> list[Finding]:
    findings = []
    for package, use in (
        ("nbgrader", "labs"),
        ("jupytext", "labs"),
        ("jupyter-book", "book"),
        ("jupyterlab", "notebooks"),
    ):
        try:
            findings.append(Finding(package, True, False, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, False, False, f"needed for: {use}", "pip install -e '.[all]'"))
    return findings


def _browser() -> Finding:
    path = shutil.which("chromium")
    return Finding("browser", path is not None, False, path or "the book's browser tests are skipped",
                   "" if path else "sudo apt-get install chromium")  # fmt: skip


def _sandbox() -> Finding:
    from llmlab.grading.probe import probe

    found = probe()
    level = found.level.value if found.is_sandbox else "none, so others' work is not graded"
    return Finding("sandbox", found.is_sandbox, False, level, "; ".join(found.weaknesses))


def _disk() -> Finding:
    from llmlab.cache import cache_folder

    folder = cache_folder()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    enough = free > 1e9 and writable
    found = f"{free / 1e9:,.0f} GB free in {folder}" if writable else f"{folder} cannot be written"
    return Finding("cache", enough, True, found, "" if enough else "point $LLMLAB_CACHE at a folder with 1 GB free")

"""Result files: what was measured, on what, with what, so that a figure in the book can be traced and run again."""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "triton")


def device_name(device: str) -> str:
    """The device as its users would call it: "NVIDIA H100 80GB HBM3", or the processor's architecture."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"


def result_file(topic: str, device: str, count: int = 1) -> Path:
    """benchmarks/results/<topic>/<device>.json, or <device>-x<count>.json for several GPUs; LLMLAB_RESULTS stands for its first two folders."""
    name = "cpu" if device == "cpu" else device_name(device).replace(" ", "-") + (f"-x{count}" if count > 1 else "")
    return Path(os.environ.get("LLMLAB_RESULTS", RESULTS)) / topic / f"{name}.json"


def write_result(topic: str, device: str, seeds: list[int], measurements: dict[str, Any], count: int = 1) -> Path:
    """Write the result file of a topic and return its path.

    measurements: tables by name, each a list of rows with every raw sample in them. count: of GPUs that were used.
    """
    result = {
        "device": device_name(device),
        "device_count": count,
        "driver": _driver() if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in PACKAGES},
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": commit(),
        "command": " ".join(
            ["python", *[Path(sys.argv[0]).resolve().relative_to(RESULTS.parent.parent).as_posix(), *sys.argv[1:]]]
        ),
        "date": today(),
        "seeds": seeds,
        **measurements,
    }
    file = result_file(topic, device, count)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return file


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows as a plain table; floats with four significant digits."""
    cells = [columns] + [[_text(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


@functools.cache
def commit() -> str:
    """What is measured: $LLMLAB_COMMIT where there is no repository, else git's word for the tree before results are in it."""
    command = ["git", "describe", "--always", "--dirty"]
    if told := os.environ.get("LLMLAB_COMMIT"):
        return told
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent).stdout.strip()


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()

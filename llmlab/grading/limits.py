"""What a submission may take, as the environment sets it and as the instructor's guide shows it."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from llmlab.grading.checks import SECONDS_VARIABLE
from llmlab.grading.notebooks import MOST_BYTES
from llmlab.grading.sandbox import Limits
from llmlab.grading.session import MOST_KEPT, MOST_RESTARTS
from llmlab.grading.worker import MOST_TEXT

# The environment variable that sets each limit.
VARIABLES = {field.name: f"LLMLAB_{field.name.upper()}" for field in dataclasses.fields(Limits)} | {
    "property_seconds": SECONDS_VARIABLE
}
LIMITED = {
    "seconds": "wall time of a submission",
    "cell_seconds": "wall time of a cell",
    "property_seconds": "wall time of a property",
    "cpu_seconds": "CPU time of a process",
    "memory_bytes": "memory",
    "processes": "processes and threads",
    "disk_bytes": "disk: the home and /tmp, each",
    "open_files": "open files of a process",
}
TABLE_HEADER = ("what is limited", "to", "set by")


def limits_from_environment() -> Limits:
    """The usual limits, with those that ``VARIABLES`` set. Raises ValueError for one that is no number above 0."""
    told: dict[str, Any] = {}
    for field in dataclasses.fields(Limits):
        text = os.environ.get(VARIABLES[field.name])
        if text is not None:
            try:
                told[field.name] = type(getattr(Limits(), field.name))(text)
            except ValueError:
                told[field.name] = math.nan
            if not 0 < told[field.name] < math.inf:
                kind = "number" if isinstance(getattr(Limits(), field.name), float) else "whole number"
                raise ValueError(f"${VARIABLES[field.name]}: expected a {kind} above 0, got {text!r}")
    return dataclasses.replace(Limits(), **told)


def table_rows(limits: Limits) -> list[tuple[str, str, str]]:
    """What is limited, to how much, and the variable that sets it ("" where none does)."""
    rows = [(words, _shown(name, getattr(limits, name)), VARIABLES[name]) for name, words in LIMITED.items()]
    return [
        *rows,
        ("output of a cell", f"{MOST_TEXT:,} characters", ""),
        ("output of a submission", f"{MOST_KEPT:,} characters", ""),
        ("the notebook's file", _shown("_bytes", MOST_BYTES), ""),
        ("times that an ended process is started again", str(MOST_RESTARTS), ""),
    ]


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**30:g} GiB" if value >= 2**30 else f"{value / 2**20:g} MiB"
    return f"{value:g} s" if name.endswith("seconds") else f"{value:,}"

"""Which tests can run here: markers name what they need, and CI may skip none but the GPU ones."""

import ctypes
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# nbgrader starts alembic by name, and the tests start nbgrader: both live beside this Python.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
PROGRAMS = {"browser": "chromium", "sandbox": "bwrap", "postgres": "pg_ctlcluster"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-mutants", action="store_true", help="try every mutant of every lab, not a sample")


def missing_requirement(marker: str, count: int = 2) -> str | None:
    """Why tests with this marker cannot run here; None where they can. count: of GPUs, for ``multi_gpu``."""
    if marker in PROGRAMS:
        return None if shutil.which(PROGRAMS[marker]) else f"{PROGRAMS[marker]} is not installed"
    import torch

    wanted = count if marker == "multi_gpu" else 1
    return None if torch.cuda.device_count() >= wanted else f"needs {wanted} CUDA device(s)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in (*PROGRAMS, "gpu", "multi_gpu"):
        for item, marker in [(item, marker) for item in items if (marker := item.get_closest_marker(name))]:
            reason = missing_requirement(name, *marker.args)
            if reason is None:
                continue
            if name in PROGRAMS and os.environ.get("CI") == "true":
                raise pytest.UsageError(f"CI must run the {name} tests, and {reason}")
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def give_memory_back() -> Iterator[None]:
    """Models are freed when their module is done: sandboxes are forked from here, and a large process forks slowly."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """The browser on PATH; tests that take it are marked ``browser``."""
    path = shutil.which(PROGRAMS["browser"])
    assert path is not None, missing_requirement("browser")
    return path

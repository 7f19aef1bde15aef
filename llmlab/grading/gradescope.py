"""A lab's autograder for Gradescope: a zip that sets up its container and grades the submission that lies there.

The zip holds the instructor's notebook, hidden tests and all, and the course's secret. It goes to Gradescope and to
nobody else. In the container, see https://gradescope-autograders.readthedocs.io, it lies in ``/autograder/source``;
Gradescope puts the submission beside it, and reads ``/autograder/results/results.json``.

Where the container allows no namespaces, each submission runs as a user of its own. Where it allows no sandbox at all,
work is not run unless the zip was made to run it without one. Then every result says so: a submission that means to can
read the hidden tests, and write its own result.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
import traceback
import zipfile
from dataclasses import replace
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any

from llmlab.cache import write_atomically
from llmlab.grading.batch import Failure, Local
from llmlab.grading.classroom import Plan, model_cache
from llmlab.grading.formats import gradescope_refusal, gradescope_results
from llmlab.grading.grade import Bundle
from llmlab.grading.limits import limits_from_environment
from llmlab.grading.notebooks import MOST_BYTES
from llmlab.grading.probe import refusal
from llmlab.grading.sandbox import PACKAGE, Level
from llmlab.grading.secret import course_secret

AUTOGRADER = Path("/autograder")
BUNDLE = "bundle.json"
CONSTRAINTS = "constraints.txt"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
SETUP = f"""#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the image.
set -euo pipefail
cd "${{1:-{AUTOGRADER}}}/source"
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y bubblewrap software-properties-common
if [ "$(readlink -f "$(command -v python3)" | xargs -r basename)" != {PYTHON} ]; then  # not the system's own
  add-apt-repository -y ppa:deadsnakes/ppa
  apt-get update
fi
apt-get install -y {PYTHON} {PYTHON}-venv
{PYTHON} -m venv ../environment
for wheel in ./*.whl; do
  ../environment/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \\
    --constraint {CONSTRAINTS} "$wheel[grading]"
done
"""
RUN = f"""#!/usr/bin/env bash
# Gradescope runs this for each submission.
autograder="${{1:-{AUTOGRADER}}}"
exec "${{2:-$autograder/environment/bin/python}}" -I -m llmlab.grading.gradescope "$autograder"
"""
LEFT_ASIDE = ("__MACOSX", ".ipynb_checkpoints")


class NoAnswer(Exception):
    """A submission that cannot be graded; the message is for the student."""


def autograder_zip(plan: Plan) -> bytes:
    """The zip of a lab; made with ``Level.NONE`` it grades without a sandbox, else it refuses to."""
    bundle = Bundle(
        plan.assignment, "", plan.instructor(), None, course_secret(plan.course.root), limits_from_environment(), plan.level,
    )  # fmt: skip
    wheel_name, wheel = _wheel()
    return _zip({
        "setup.sh": SETUP.encode(), "run_autograder": RUN.encode(), BUNDLE: bundle.to_json().encode(),
        CONSTRAINTS: _constraints().encode(), wheel_name: wheel,
    })  # fmt: skip


def write_zip(plan: Plan, file: Path) -> None:
    """Write the zip; only its owner may read it."""
    write_atomically(file, autograder_zip(plan))


def run(autograder: Path) -> int:
    """Grade the submission in Gradescope's folder and write results.json; 1 where it could not be graded."""
    try:
        told = _result(autograder)
        code = 0
    except NoAnswer as error:
        told, code = gradescope_refusal(str(error)), 0
    except Exception:  # noqa: BLE001  what went wrong is for the instructor, who alone sees what is printed
        traceback.print_exc()
        told, code = gradescope_refusal("the autograder failed; tell your instructor"), 1
    write_atomically(autograder / "results" / "results.json", json.dumps(told))
    (autograder / "results" / "results.json").chmod(0o644)
    return code


def student_id(metadata: dict[str, Any]) -> str:
    """Whose submission it is: the email address of the first that Gradescope names."""
    try:
        found = metadata["users"][0]["email"]
    except (KeyError, IndexError, TypeError):
        found = ""
    if not isinstance(found, str) or not found.strip():
        raise ValueError("submission_metadata.json names no student")
    return found.strip()


def _result(autograder: Path) -> dict[str, Any]:
    bundle = Bundle.from_json((autograder / "source" / BUNDLE).read_text(encoding="utf-8"))
    metadata = json.loads((autograder / "submission_metadata.json").read_text(encoding="utf-8"))
    # Where the sandbox is but another user, the hidden tests are open to it, unless their folder is closed.
    (autograder / "source").chmod(0o700)
    level, reason = refusal(bundle.level is Level.NONE, autograder / "source")
    if reason:
        raise RuntimeError(f"{reason}\nTo run it all the same, make the zip with --unsandboxed.")
    submission, notes = _submission(autograder / "submission", bundle.assignment)
    told = replace(
        bundle, student=student_id(metadata), submission=submission, notes=notes, level=level, readable=model_cache(),
    )  # fmt: skip
    outcome = next(Local(1).run([told]))
    if isinstance(outcome, Failure):
        raise RuntimeError(outcome.reason)
    return gradescope_results(outcome)


def _submission(folder: Path, assignment: str) -> tuple[str | None, tuple[str, ...]]:
    """The text of the one notebook that was handed in, of several the one with the lab's name; and what is to be said of it."""
    found = [
        Path(home, name)
        for home, folders, names in os.walk(folder)
        for name in names
        if name.endswith(".ipynb") and not set(LEFT_ASIDE) & set(Path(home).relative_to(folder).parts)
        if Path(home, name).is_file() and not Path(home, name).is_symlink()
    ]
    named = [file for file in found if file.name == f"{assignment}.ipynb"]
    if len(found) > 1 and len(named) != 1:
        raise NoAnswer(f"there are {len(found)} notebooks; hand in one, or name one of them {assignment}.ipynb")
    if not found:
        return None, ()
    taken = (named or found)[0]
    notes = () if named else (f"there was no {assignment}.ipynb; {taken.name!r} was taken",)
    with taken.open("rb") as handle:
        return handle.read(MOST_BYTES + 1).decode("utf-8", "surrogateescape"), notes


def _wheel() -> tuple[str, bytes]:
    """This package as a wheel, so that the container has just the code that made the zip."""
    known = distribution("llmlab")
    folder = f"llmlab-{known.version}.dist-info"
    files = {
        f"llmlab/{file.relative_to(PACKAGE).as_posix()}": file.read_bytes()
        for file in sorted(PACKAGE.rglob("*"))
        if file.is_file() and file.suffix != ".pyc"
    }
    files[f"{folder}/METADATA"] = (known.read_text("METADATA") or "").encode()
    files[f"{folder}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: llmlab\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = [f"{name},sha256={_record_hash(content)},{len(content)}" for name, content in files.items()]
    files[f"{folder}/RECORD"] = "".join(f"{line}\n" for line in [*lines, f"{folder}/RECORD,,"]).encode()
    return f"llmlab-{known.version}-py3-none-any.whl", _zip(files)


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _constraints() -> str:
    """The versions that are installed here, without the labels of local builds."""
    pins = {d.metadata["Name"].lower().replace("_", "-"): d.version.partition("+")[0] for d in distributions()}
    return "".join(f"{name}=={pin}\n" for name, pin in sorted(pins.items()) if name not in ("llmlab", "pip"))


def _zip(files: dict[str, bytes]) -> bytes:
    """The same files give the same bytes; scripts may be run."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = (0o755 if content.startswith(b"#!") else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return made.getvalue()


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))

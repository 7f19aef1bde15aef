"""Build the course: model, labs, release, book, example class. What is done and unchanged is not done again.

Each step leaves a stamp with a hash of what it depends on, written when it has finished; an interrupted step has none.
"""

import argparse
import contextlib
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import nbformat

from llmlab.authoring.example_class import example_class, write_class
from llmlab.authoring.lab import find_labs
from llmlab.authoring.proof import stored_proof
from llmlab.cache import write_atomically
from llmlab.checkpoint import cached_folder
from llmlab.grading.probe import refusal

ROOT = Path(__file__).resolve().parent.parent
LABS = ROOT / "labs"
BUILD = LABS / "build"
STAMPS = BUILD / "stamps"
CLASS = BUILD / "example-class"
HTML = ROOT / "_build" / "html"
LOGS = BUILD / "logs"


# One of the whole class hands in an endless loop; short limits keep its wait short.
LIMITS = {"LLMLAB_CHECK_SECONDS": "2", "LLMLAB_CELL_SECONDS": "10"}
WHOLE_CLASS = "memory"  # in the other labs those students hand in who show something of the lab itself


def digest(*patterns: str) -> str:
    """A hash of the files that match, names and contents, in order."""
    total = hashlib.sha256(sys.version.encode())
    for pattern in patterns:
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return total.hexdigest()


PACKAGE = ("llmlab/**/*.py", "llmlab/data/**/*", "requirements.lock")
LAB_SOURCES = (*PACKAGE, "labs/*.py", "labs/answers/*.py")
BOOK_SOURCES = (
    *LAB_SOURCES,
    "chapters/*",
    "_config.yml",
    "_toc.yml",
    "_static/*",
    "references.bib",
    "benchmarks/results/**/*",
)


def run(name: str, *command: str, **environment: str) -> None:
    """Run a program quietly; its output goes to a log, whose end is shown where it fails."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("w", encoding="utf-8") as file:
        result = subprocess.run(
            command,
            cwd=LABS,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, **environment},
            check=False,
        )
    if result.returncode:
        print(log.read_text(encoding="utf-8")[-6000:])
        sys.exit(f"{' '.join(command[:2])} failed; all it said is in {log.relative_to(ROOT)}")


@contextlib.contextmanager
def step(title: str, name: str, key: str, products: Iterable[Path]) -> Iterator[bool]:
    """Yield whether there is something to do; stamp the step when the block has ended well."""
    stamp = STAMPS / name
    done = stamp.exists() and stamp.read_text(encoding="utf-8") == key and all(p.exists() for p in products)
    print(f"{title} … ", end="", flush=True)
    start = time.monotonic()
    if not done:
        stamp.unlink(missing_ok=True)
    yield not done
    if not done:
        write_atomically(stamp, key)
    print("unchanged" if done else f"{time.monotonic() - start:.0f} s", flush=True)


def model() -> None:
    with step("model     SmolLM2-135M, converted and checked", "model", "always", [Path("/nonexistent")]) as _:
        cached_folder("smollm2-135m")


def labs() -> None:
    names = [lab.name for lab in find_labs(LABS)]
    with step("labs      sources to notebooks", "labs", digest(*LAB_SOURCES), _notebooks("source", names)) as needed:
        if needed:
            for lab in find_labs(LABS):
                lab.build(BUILD / "source")


def release() -> None:
    names = [lab.name for lab in find_labs(LABS)]
    if not all(file.exists() for file in _notebooks("source", names)):
        labs()
    with step("release   students' notebooks", "release", digest(*LAB_SOURCES), _notebooks("release", names)) as needed:
        if needed:
            for name in names:
                run("release", "nbgrader", "generate_assignment", name, "--create", "--force")


def book() -> None:
    """Render the book; its pages link to the released labs, so those come first."""
    if not all(file.exists() for file in _notebooks("release", [lab.name for lab in find_labs(LABS)])):
        release()
    # The instructor's page shows the full proof of a lab where it has been made.
    proved = [lab.name for lab in find_labs(LABS) if stored_proof(lab)]
    key = f"{digest(*BOOK_SOURCES)} {' '.join(proved)}"
    with step("book      chapters executed and rendered", "book", key, [HTML / "index.html"]) as needed:
        if needed:
            # Outputs depend on the package and the result files too, which the execution cache does not know of.
            for stale in (ROOT / "_build" / ".jupyter_cache", HTML, ROOT / "_build" / ".doctrees"):
                shutil.rmtree(stale, ignore_errors=True)
            run("book", "jupyter-book", "build", str(ROOT), "-W", "-n", "--keep-going", "--all")


def grade_class() -> None:
    graded = CLASS / "grades.csv"
    found = find_labs(LABS)
    with step("class     example submissions, graded", "class", digest(*LAB_SOURCES), [graded]) as needed:
        if needed:
            shutil.rmtree(CLASS, ignore_errors=True)
            for lab in found:
                lab.build(CLASS / "build" / "source")
                limits = LIMITS if lab.name == WHOLE_CLASS else {}
                environment = {"LLMLAB_COURSE_ROOT": str(CLASS), **limits}
                run("class", "nbgrader", "generate_assignment", lab.name, "--create", "--force", **environment)
                released = nbformat.read(CLASS / "build" / "release" / lab.name / f"{lab.name}.ipynb", as_version=4)
                submissions = example_class(lab, released, whole=lab.name == WHOLE_CLASS)
                write_class(submissions, lab, CLASS)
                print(f"{lab.name} ({len(submissions)}) ", end="", flush=True)
                run("class", "llmlab", "grade", lab.name, "--course", str(LABS), *sandbox_option(), **environment)
                kinds = "".join(f"{lab.name},{s.student},{s.kind},{s.score}\n" for s in submissions)
                write_atomically(CLASS / f"{lab.name}-expected.csv", kinds)
            run("class", "nbgrader", "export", f"--to={graded}", **environment)
            print("graded in ", end="", flush=True)
    _print_scores(graded, [lab.name for lab in found])


def sandbox_option() -> list[str]:
    """The example class is this course's own work: where there is no sandbox it is graded without, and that is said."""
    if refusal(unsandboxed=False, course=LABS)[1] == "":
        return []
    print("(no sandbox here; llmlab doctor says more) ", end="", flush=True)
    return ["--unsandboxed"]


def _print_scores(graded: Path, labs: list[str]) -> None:
    expected = {
        tuple(line.split(",")[:2]): line.split(",")[2:]
        for lab in labs for line in (CLASS / f"{lab}-expected.csv").read_text(encoding="utf-8").splitlines()
    }  # fmt: skip
    wrong = 0
    with graded.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kind, score = expected[row["assignment"], row["student_id"]]
            right = row["score"] != "" and float(row["score"]) == float(score)
            wrong += not right
            mark = "as expected" if right else f"EXPECTED {float(score):g}"
            print(
                f"          {row['student_id']}  {kind:32} {row['score'] or row['status']:>5} of {row['max_score']}  {mark}"
            )
    if wrong:
        sys.exit(f"{wrong} scores of the example class are not what they must be")


def _notebooks(stage: str, names: list[str]) -> list[Path]:
    return [BUILD / stage / name / f"{name}.ipynb" for name in names]


# In this order; a step that needs another calls it.
STEPS: dict[str, Callable[[], None]] = {
    "model": model, "labs": labs, "release": release, "book": book, "class": grade_class,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", nargs="*", help=f"of {', '.join(STEPS)}; all of them, in this order, unless told")
    names = parser.parse_args(arguments).step
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"no step {unknown[0]!r}; there are {', '.join(STEPS)}")
    start = time.monotonic()
    for name in names or list(STEPS):
        STEPS[name]()
    if not names:
        print(f"\nDone in {time.monotonic() - start:.0f} s. Open the book: {HTML / 'index.html'}")
        print("Work on a lab: cd labs/build/release && ../../../.venv/bin/jupyter lab")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Submissions a minute: this course's grader against plain nbgrader, on one machine, for one lab and one class.

Both grade the same submissions with feedback and database included; plain nbgrader runs them in its kernels without a
sandbox, with its own configuration. Run: python benchmarks/grading.py [--plain 12] [--ours 48] [--many 1000]
"""

import argparse
import contextlib
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from record import write_result

from llmlab.authoring.example_class import example_class
from llmlab.authoring.lab import Lab

ROOT = Path(__file__).resolve().parent.parent
# A lab that imports torch in a given cell and in its tests, and does nothing else that takes time.
TORCH_LAB = '''
# %%
student_id = "student-00"  # your id

# %% nbgrader={"grade_id": "given", "locked": true}
import torch

from llmlab.grading.checks import Checks, close

# %% nbgrader={"grade_id": "norm", "solution": true}
def norm(x):
    """The Euclidean norm of a tensor, as a plain number."""
    ### BEGIN SOLUTION
    return float((x * x).sum().sqrt())
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_norm", "grade": true}
check = Checks("norm")


@check("of 3 and 4 it is 5", points=1)
def _(rng):
    close(norm(torch.tensor([3.0, 4.0])), 5.0)


### BEGIN HIDDEN TESTS
@check.hidden("of any tensor", points=2)
def _(rng):
    x = torch.tensor([rng.random() for _ in range(100)])
    close(norm(x), float(torch.linalg.vector_norm(x)), relative=1e-5)


### END HIDDEN TESTS
check.report()
'''


class Class:
    """A course in a folder of its own, with this course's configuration or nbgrader's own, and a class of students."""

    def __init__(self, folder: Path, lab: Lab, plain: bool, students: int) -> None:
        self.folder, self.lab, self.plain = folder, lab, plain
        lab.build(folder / ("source" if plain else "build/source"))
        if plain:
            (folder / "nbgrader_config.py").write_text("c = get_config()\nc.CourseDirectory.course_id = 'plain'\n")
        self.run("nbgrader", "generate_assignment", lab.name, "--create")
        release = folder / ("release" if plain else "build/release") / lab.name / f"{lab.name}.ipynb"
        right = self._right(nbformat.read(release, as_version=4))
        for number in range(students):
            student = f"student-{number:04d}"
            home = folder / "submitted" / student / lab.name
            home.mkdir(parents=True)
            (home / f"{lab.name}.ipynb").write_text(right.replace("student-01", student))

    def _right(self, released: nbformat.NotebookNode) -> str:
        answers = {e.name: e.answer for e in self.lab.exercises}
        if self.lab.name == "memory":
            return nbformat.writes(example_class(self.lab, released)[0].notebook)
        for cell in released.cells:
            cell.source = answers.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
        return nbformat.writes(released).replace("student-00", "student-01")

    def run(self, *command: str) -> None:
        environment = {**os.environ, "LLMLAB_COURSE_ROOT": str(self.folder)}
        where = self.folder if self.plain else ROOT / "labs"
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{command}: {done.stderr[-3000:]}")

    def grade(self) -> float:
        """Seconds for the class, feedback and database included."""
        start = time.perf_counter()
        if self.plain:
            self.run("nbgrader", "autograde", self.lab.name)
            self.run("nbgrader", "generate_feedback", self.lab.name)
        else:
            self.run(sys.executable, "-m", "llmlab", "grade", self.lab.name, "--course", ".", "--force")
        return time.perf_counter() - start


def compare(lab: Lab, scratch: Path, plain: int, ours: int) -> dict:
    """Submissions a minute of both graders. Ours is run twice: the first run rehearses the lab, the second does not."""
    theirs = Class(scratch / f"{lab.name}-plain", lab, True, plain)
    mine = Class(scratch / f"{lab.name}-ours", lab, False, ours)
    seconds = {"ours, first run": mine.grade(), "plain nbgrader": theirs.grade(), "ours": mine.grade()}
    counts = {"ours, first run": ours, "plain nbgrader": plain, "ours": ours}
    rates = {name: 60 * counts[name] / seconds[name] for name in seconds}
    return {
        "lab": lab.name, "submissions": counts, "seconds": seconds, "per_minute": rates,
        "ratio": rates["ours"] / rates["plain nbgrader"], "ratio_first_run": rates["ours, first run"] / rates["plain nbgrader"],
    }  # fmt: skip


def sandbox_starts(count: int = 40) -> dict:
    """Milliseconds to start a sandbox: bubblewrap alone running nothing, and a worker in it that answers."""
    from llmlab.grading.probe import probe
    from llmlab.grading.sandbox import Limits, Sandbox
    from llmlab.grading.session import Worker
    from llmlab.grading.worker import main as serve
    from llmlab.grading.zygote import Zygote

    found = probe()
    sandbox, zygote = Sandbox(Limits(), found.level), Zygote(serve)
    samples: dict[str, list[float]] = {"bubblewrap": [], "worker, forked": [], "worker, as a program": []}
    for _ in range(count):
        start = time.perf_counter()
        with sandbox.running(["true"]) as started:
            started.process.wait()
            samples["bubblewrap"].append(1000 * (time.perf_counter() - start))
        for name, parent in (("worker, forked", zygote), ("worker, as a program", None)):
            start = time.perf_counter()
            worker = Worker(sandbox, parent)
            samples[name].append(1000 * (time.perf_counter() - start))
            worker.end()
    zygote.end()
    return {
        "level": found.level.value, "probe_seconds": found.seconds, "samples_ms": samples,
        "median_ms": {name: statistics.median(values) for name, values in samples.items()},
    }  # fmt: skip


def memory_of(process: int) -> int:
    """Bytes of a process and its descendants, what they share counted once (the proportional set size)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family, total = {process}, 0
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for member in family:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def many(lab: Lab, scratch: Path, count: int) -> dict:
    """Memory of the grader with all its processes, looked at twice a second, for a tenth of a class and for all of it."""
    found = {}
    for students in (count // 10, count):
        course = Class(scratch / f"many-{students}", lab, False, students)
        command = [sys.executable, "-m", "llmlab", "grade", lab.name, "--course", "."]
        environment = {**os.environ, "LLMLAB_COURSE_ROOT": str(course.folder)}
        start, samples = time.perf_counter(), []
        with subprocess.Popen(command, cwd=ROOT / "labs", env=environment, stdout=subprocess.DEVNULL) as grading:
            while grading.poll() is None:
                samples.append(memory_of(grading.pid))
                time.sleep(0.5)
        assert grading.returncode == 0
        found[str(students)] = {
            "seconds": time.perf_counter() - start, "peak_bytes": max(samples), "median_bytes": statistics.median(samples),
            "bytes": samples[:: max(1, len(samples) // 100)],
        }  # fmt: skip
        shutil.rmtree(course.folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", type=int, default=12, help="submissions for plain nbgrader")
    parser.add_argument("--ours", type=int, default=48, help="submissions for this grader")
    parser.add_argument("--many", type=int, default=1000, help="submissions of the run for memory")
    options = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as scratch:
        torch_lab = Path(scratch, "torchlab.py")
        torch_lab.write_text(TORCH_LAB)
        found = {"sandbox": sandbox_starts(), "comparisons": []}
        for lab in (Lab(ROOT / "labs" / "memory.py"), Lab(torch_lab)):
            row = compare(lab, Path(scratch), options.plain, options.ours)
            found["comparisons"].append(row)
            rates = row["per_minute"]
            print(
                f"{lab.name:10} plain {rates['plain nbgrader']:6.1f} a minute, ours {rates['ours']:7.1f}, ratio {row['ratio']:5.1f}"
            )
        found["many"] = many(Lab(torch_lab), Path(scratch), options.many)
    print(f"sandbox start, ms: {found['sandbox']['median_ms']}")
    print(f"many: {found['many']}")
    machine = {"cores": os.cpu_count(), "nbgrader": importlib.metadata.version("nbgrader")}
    print(write_result("grading", "cpu", [], machine | found))


if __name__ == "__main__":
    main()

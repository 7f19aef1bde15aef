"""Every attack is contained, and each one bites where nothing stops it; honest work beside them keeps its score."""

import contextlib
import importlib
import itertools
import sqlite3
import time
from pathlib import Path

import pytest
from attacks.harness import FULL, HIDDEN_CANARY, KINDS, Attack, Ground, graded, instructor, submission

from llmlab.grading.cgroup import parents

MODULES = (
    "integrity",
    "secrecy",
    "other_students",
    "resources",
    "escape",
    "persistence",
    "malformed_input",
    "feedback",
)
ATTACKS: list[Attack] = [a for name in MODULES for a in importlib.import_module(f"attacks.{name}").ATTACKS]
pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("attacks")]


@pytest.fixture(scope="module")
def grounds(tmp_path_factory):
    """A ground for each attack."""
    lab = instructor(tmp_path_factory.mktemp("lab"))
    grounds = {a.name: Ground(tmp_path_factory.mktemp("ground"), lab, a.limits) for a in ATTACKS}
    yield grounds
    for ground in grounds.values():
        ground.open.close()


@pytest.fixture(scope="module")
def results(grounds):
    """All attacks, graded in one run; each result with its wall time."""
    bundles = [
        grounds[a.name].bundle(a.text(grounds[a.name]), student=f"attacker-{n:02d}") for n, a in enumerate(ATTACKS)
    ]
    return {a.name: result for a, result in zip(ATTACKS, graded(bundles), strict=True)}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name.replace(" ", "-"))
def test_attack_is_contained(attack, results, grounds):
    attack.contained(results[attack.name], grounds[attack.name])
    assert results[attack.name]["seconds"] <= attack.limits.seconds + 2


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name.replace(" ", "-"))
def test_attack_bites_where_nothing_stops_it(attack, tmp_path, grounds):
    ground = Ground(tmp_path, next(iter(grounds.values())).instructor, attack.limits)
    start = time.monotonic()
    with ground.open:
        attack.bites(ground)
    assert time.monotonic() - start < 60


def test_the_corpus_has_enough_attacks_of_each_kind():
    counts = {kind: sum(a.kind == kind for a in ATTACKS) for kind in KINDS}
    assert min(counts.values()) >= 4, counts
    assert sum(counts.values()) >= 60, counts
    assert len({a.name for a in ATTACKS}) == len(ATTACKS)


HONEST = 60
HONEST_CANARY = "canary-of-an-honest-answer-6631"


@pytest.fixture(scope="module")
def mixed_class(request, tmp_path_factory, grounds):
    """Sixty attackers of all kinds and as many honest students, graded by one run of the command: course, state before."""
    from test_grading import Course

    course = Course(tmp_path_factory.mktemp("mixed") / "course", request.config.rootpath).build()
    rows = itertools.zip_longest(*([a for a in ATTACKS if a.kind == kind] for kind in KINDS))
    by_turns = [attack for row in rows for attack in row if attack][:HONEST]
    own = [Ground(tmp_path_factory.mktemp("own"), grounds[a.name].instructor, a.limits) for a in by_turns]
    for number, (attack, ground) in enumerate(zip(by_turns, own, strict=True)):
        text = attack.text(ground)
        if text is not None:
            data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
            course.submit(f"attacker-{number:02d}", data)
    for number in range(HONEST):
        honest = f"def double(n):\n    # {HONEST_CANARY}\n    return n + n"
        course.submit(f"honest-{number:02d}", submission(honest))
    before = state_of_host(course)
    course.environment["LLMLAB_CELL_SECONDS"] = "4"
    said = course.grade(check=False)
    yield course, before, said
    for ground in own:
        ground.open.close()


def state_of_host(course):
    """What an attack might leave changed: files, mounts, control groups, processes that belong to nobody."""
    handed_in = [p for p in sorted(course.folder.rglob("*")) if "submitted" in p.parts or "build" in p.parts]
    groups = [str(g) for parent in parents() or () for g in sorted(parent.glob("llmlab-*")) if not is_in_use(g)]
    programs = ("llmlab.grading", "bwrap", "sleep 7")
    return {
        "files": {str(p): p.read_bytes() for p in handed_in if p.is_file()},
        "mounts": Path("/proc/self/mounts").read_text(),
        "groups": groups,
        "processes": [line for line in orphans() if any(program in line for program in programs)],
    }


def is_in_use(group):
    """Whether the grader that made a control group still runs: another test's, for those of this one have ended."""
    return Path(f"/proc/{group.name.split('-')[1]}").exists()


def orphans():
    """The command lines of processes whose parent is process 1."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == "1":
                yield (folder / "cmdline").read_text().replace("\0", " ")


def test_attack_class_leaves_the_honest_scores_right(mixed_class):
    course, _, said = mixed_class
    assert "0 failed" in said.stdout, said.stdout[-3000:] + said.stderr[-3000:]
    rows = course.export()
    honest = {student: row for student, row in rows.items() if student.startswith("honest")}
    assert honest == {f"honest-{number:02d}": ("ok", str(FULL)) for number in range(HONEST)}
    attackers = [row for student, row in rows.items() if student.startswith("attacker")]
    assert len(attackers) >= 50
    assert {status for status, _ in attackers} <= {
        "ok",
        "timeout",
        "out of memory",
        "crashed",
        "unreadable",
        "wrong structure",
    }


def test_attack_class_leaves_the_host_as_it_was(mixed_class):
    course, before, _ = mixed_class
    after = state_of_host(course)
    deadline = time.monotonic() + 60  # what another test has running ends by itself; what an attack left does not
    while after["processes"] != before["processes"] and time.monotonic() < deadline:
        time.sleep(1)
        after = state_of_host(course)
    assert after["files"] == before["files"]
    assert after["mounts"] == before["mounts"]
    assert (after["groups"], after["processes"]) == (before["groups"], before["processes"])
    with sqlite3.connect(course.folder / "gradebook.db") as gradebook:
        assert gradebook.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        empty = "SELECT count(*) FROM grade WHERE auto_score IS NULL AND needs_manual_grade = 0"
        assert gradebook.execute(empty).fetchone() == (0,)


def test_attack_class_gets_to_see_no_canary(mixed_class):
    """In all that students get: the released lab, and their own feedback."""
    course, _, _ = mixed_class
    secret = (course.folder / ".grading-secret").read_text().strip()
    for page in [*course.folder.glob("feedback/*/toy/*"), *course.folder.glob("build/release/**/*.ipynb")]:
        text = page.read_text()
        assert HIDDEN_CANARY not in text, page
        assert secret not in text, page
        assert (HONEST_CANARY in text) == ("honest" in str(page)), page

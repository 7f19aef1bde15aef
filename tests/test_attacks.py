"""Every attack is contained, and each one bites where nothing stops it; honest work beside them keeps its score."""

import contextlib
import importlib
import itertools
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from attacks.harness import (
    FULL,
    HIDDEN_CANARY,
    KINDS,
    Attack,
    Fault,
    Ground,
    Own,
    Plain,
    Unsandboxed,
    graded,
    instructor,
    outcomes,
    submission,
)
from attacks.plain import graded_plainly

from llmlab.grading.cgroup import parents
from llmlab.grading.grade import UNGRADED
from llmlab.grading.sandbox import PACKAGE, Level

MODULES = [
    importlib.import_module(f"attacks.{name}")
    for name in (
        "integrity", "secrecy", "other_students", "resources", "escape", "persistence", "malformed_input", "feedback",
    )
]  # fmt: skip
ATTACKS: list[Attack] = [attack for module in MODULES for attack in module.ATTACKS]
FAULTS: list[Fault] = [fault for module in MODULES for fault in getattr(module, "FAULTS", ())]
pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("attacks")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return instructor(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def make_grounds(lab, tmp_path_factory):
    """A ground for each case; what is open on them is closed at the end."""
    made = []

    def make(cases):
        grounds = {case.name: Ground(tmp_path_factory.mktemp("ground"), lab, case.limits) for case in cases}
        made.extend(grounds.values())
        return grounds

    yield make
    for ground in made:
        ground.open.close()


def chosen(request, cases, test):
    """The cases of which a test is to run: all of them, or as many as were asked for."""
    ids = {item.name for item in request.session.items}
    return [case for case in cases if f"{test}[{name_of(case)}]" in {name.partition("@")[0] for name in ids}]


def name_of(case):
    return case.name.replace(" ", "-")


@pytest.fixture(scope="module")
def results(request, make_grounds):
    """All that is handed in, graded in one run: each result with its ground."""
    cases = chosen(request, ATTACKS, "test_attack_is_contained") + chosen(request, FAULTS, "test_fault_is_contained")
    grounds = make_grounds(cases)
    bundles = [
        grounds[case.name].bundle(case.text(grounds[case.name]), student=f"attacker-{n:03d}")
        for n, case in enumerate(cases)
    ]
    return {
        case.name: (result, grounds[case.name]) for case, result in zip(cases, graded(bundles, jobs=3), strict=True)
    }


@pytest.mark.parametrize("attack", ATTACKS, ids=name_of)
def test_attack_is_contained(attack, results):
    result, ground = results[attack.name]
    attack.contained(result, ground)
    assert result["seconds"] <= attack.limits.seconds + 2


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
def test_fault_is_contained(fault, results):
    """What only our grader would notice; see `Fault`."""
    result, ground = results[fault.name]
    fault.contained(result, ground)
    assert result["seconds"] <= fault.limits.seconds + 2


@pytest.fixture(scope="module")
def controls(request, make_grounds, tmp_path_factory):
    """What comes of the attacks where nothing stops them: graded by plain nbgrader, or by our grader without a sandbox."""
    attacks = chosen(request, ATTACKS, "test_attack_bites_where_nothing_stops_it")
    grounds = make_grounds(attacks)
    found = graded_plainly(tmp_path_factory.mktemp("plain") / "courses", attacks, lambda attack: grounds[attack.name])
    bare = [attack for attack in attacks if isinstance(attack.control, Unsandboxed)]
    bundles = [
        grounds[attack.name].bundle(attack.text(grounds[attack.name]), Level.NONE, f"attacker-{n:03d}")
        for n, attack in enumerate(bare)
    ]
    found |= {attack.name: outcome for attack, outcome in zip(bare, outcomes(bundles), strict=True)}
    return found, grounds


@pytest.mark.parametrize("attack", ATTACKS, ids=name_of)
def test_attack_bites_where_nothing_stops_it(attack, controls):
    found, grounds = controls
    if isinstance(attack.control, Own):
        attack.control.bites(grounds[attack.name])
    else:
        attack.control.bites(found[attack.name], grounds[attack.name])


def test_the_corpus_has_enough_attacks_of_each_kind():
    counts = {kind: sum(a.kind == kind for a in ATTACKS) for kind in KINDS}
    assert min(counts.values()) >= 4, counts
    assert sum(counts.values()) >= 60, counts
    names = [case.name for case in [*ATTACKS, *FAULTS]]
    assert len(set(names)) == len(names)
    assert {type(attack.control) for attack in ATTACKS} == {Plain, Unsandboxed, Own}


HONEST = 60
HONEST_CANARY = "canary-of-an-honest-answer-6631"


ATTACKERS = 64


@pytest.fixture(scope="module")
def mixed_class(request, tmp_path_factory, lab):
    """Attackers of all kinds and honest students, graded by one run of the command: course, grounds, state before."""
    from test_grading import Course

    course = Course(tmp_path_factory.mktemp("mixed") / "course", request.config.rootpath).build()
    rows = itertools.zip_longest(*([a for a in ATTACKS if a.kind == kind] for kind in KINDS))
    by_turns = [attack for row in rows for attack in row if attack and not attack.lay_out][:ATTACKERS]
    grounds = [Ground(tmp_path_factory.mktemp("own"), lab, attack.limits) for attack in by_turns]
    for number, (attack, ground) in enumerate(zip(by_turns, grounds, strict=True)):
        text = attack.text(ground)
        course.submit(
            f"attacker-{number:02d}", text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        )
    for number in range(HONEST):
        honest = f"def double(n):\n    # {HONEST_CANARY}\n    return n + n"
        course.submit(f"honest-{number:02d}", submission(honest))
    before = state_of_host(course, grounds)
    course.environment["LLMLAB_CELL_SECONDS"] = "4"
    said = course.grade(check=False)
    yield course, grounds, before, said
    for ground in grounds:
        ground.open.close()


HOME_FILES = (".bashrc", ".bash_profile", ".profile", ".config/cron", ".ipython/profile_default/startup", ".local/lib")
PLANTED = ("llmlab-attack-", "llmlab-device-")


def state_of_host(course, grounds):
    """What an attack might leave changed: files, the gradebook, mounts, control groups, processes that belong to nobody."""
    folders = [course.folder / "submitted", course.folder / "build", PACKAGE / "grading", *(g.folder for g in grounds)]
    files = [p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    shared = [Path(name) for name in ("/tmp", "/dev/shm", "/var/tmp", *filter(None, sys.path))]
    groups = [str(g) for parent in parents() or () for g in sorted(parent.glob("llmlab-*")) if not is_in_use(g)]
    programs = ("llmlab.grading", "bwrap", *PLANTED)
    return {
        "files": {str(p): p.read_bytes() for p in files},
        "planted": sorted(str(p) for f in shared if f.is_dir() for p in f.iterdir() if p.name.startswith(PLANTED)),
        "home": [
            (name, file.exists() and file.stat().st_mtime_ns) for name in HOME_FILES if (file := Path.home() / name)
        ],
        "gradebook": rows_of_the_lab(course.folder / "gradebook.db"),
        "mounts": Path("/proc/self/mounts").read_text(),
        "groups": groups,
        "processes": [line for line in orphans() if any(program in line for program in programs)],
    }


def left_since(before, after):
    """What differs; of processes and control groups, what is new, for other tests' may have ended since."""
    new = {what: [it for it in after[what] if it not in before[what]] for what in ("groups", "processes")}
    changed = {what: after[what] for what in before if what not in new and after[what] != before[what]}
    return changed | {what: its for what, its in new.items() if its}


def rows_of_the_lab(file):
    """What of the gradebook is the instructor's: all tables but those that submissions write."""
    with contextlib.closing(sqlite3.connect(file)) as gradebook:
        tables = [name for (name,) in gradebook.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        own = [
            t for t in tables if not t.startswith(("submitted", "grade", "comment", "student")) or t == "grade_cells"
        ]
        assert {"assignment", "notebook", "grade_cells"} <= set(own), tables
        return {table: gradebook.execute(f"SELECT * FROM {table}").fetchall() for table in own}


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
    course, *_, said = mixed_class
    assert "0 failed" in said.stdout, said.stdout[-3000:] + said.stderr[-3000:]
    rows = course.export()
    honest = {student: row for student, row in rows.items() if student.startswith("honest")}
    assert honest == {f"honest-{number:02d}": ("ok", str(FULL)) for number in range(HONEST)}
    attackers = [row for student, row in rows.items() if student.startswith("attacker")]
    assert len(attackers) == ATTACKERS >= 60 <= HONEST
    named = {"ok", "timeout", "out of memory", "crashed", "unreadable", "wrong structure"}
    assert {status for status, _ in attackers} <= named
    assert all((score == "") == (status in UNGRADED) and 0 <= float(score or 0) <= FULL for status, score in attackers)


def test_attack_class_leaves_the_host_as_it_was(mixed_class):
    course, grounds, before, _ = mixed_class
    deadline = time.monotonic() + 60  # what another test has running ends by itself; what an attack left does not
    while (left := left_since(before, state_of_host(course, grounds))) and time.monotonic() < deadline:
        time.sleep(1)
    assert left == {}
    with contextlib.closing(sqlite3.connect(course.folder / "gradebook.db")) as gradebook:
        assert gradebook.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        empty = "SELECT count(*) FROM grade WHERE auto_score IS NULL AND needs_manual_grade = 0"
        assert gradebook.execute(empty).fetchone() == (0,)
        assert gradebook.execute("SELECT count(*) FROM submitted_assignment").fetchone() == (ATTACKERS + HONEST,)


def test_attack_class_gets_to_see_no_canary(mixed_class):
    """In all that students get: the released lab, and their own feedback."""
    course, *_ = mixed_class
    secret = (course.folder / ".grading-secret").read_text().strip()
    for page in [*course.folder.glob("feedback/*/toy/*"), *course.folder.glob("build/release/**/*.ipynb")]:
        text = page.read_text()
        assert HIDDEN_CANARY not in text, page
        assert secret not in text, page
        assert (HONEST_CANARY in text) == ("honest" in str(page)), page

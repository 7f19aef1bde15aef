"""What ``nbgrader autograde`` and ``nbgrader validate`` run through nbgrader's own plug-in points.

``labs/nbgrader_config.py`` names these classes. The grading is that of ``llmlab grade``, one submission at a time.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import shutil
import stat
import warnings
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nbconvert.exporters import NotebookExporter
from nbformat.notebooknode import NotebookNode
from nbformat.v4 import new_notebook
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.converters.base import NbGraderException
from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, Execute, NbGraderPreprocessor
from nbgrader.validator import Validator
from sqlalchemy.exc import SAWarning
from traitlets import Bool

from llmlab.grading.batch import Failure, Local
from llmlab.grading.classroom import Plan, grade_class, model_cache, rehearse
from llmlab.grading.grade import UNGRADED
from llmlab.grading.gradebook import Course
from llmlab.grading.graded import graded_notebook
from llmlab.grading.late import read_timestamp
from llmlab.grading.limits import limits_from_environment
from llmlab.grading.notebooks import read_cells
from llmlab.grading.probe import refusal
from llmlab.grading.report import table_rows
from llmlab.grading.results import GradingError, ResultLog
from llmlab.grading.sandbox import Level
from llmlab.grading.selfcheck import check_notebook
from llmlab.grading.submissions import read_stamp

Result = tuple[NotebookNode, Any]


class GradingExporter(NotebookExporter):
    """What ``nbgrader autograde`` makes before it looks for work.

    It refuses without a sandbox, and forgets what a killed run left half done (nbgrader takes any folder in
    ``autograded`` for a finished one, and exports the missing scores as 0). Submissions that nbgrader would refuse, skip
    or follow links in are graded here and now, as ``llmlab grade`` does it. The lock says whether the run that marked a
    folder is still at work; the system releases it when that run ends, however it ends.
    """

    unsandboxed = Bool(False, help="Grade without a sandbox; every result says so.").tag(config=True)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        directory = self.parent.coursedir
        # From nbgrader's own code, which reads the gradebook while a submission is half made; nothing is lost by it.
        half_made = r"Object of type <Submitted(Assignment|Notebook)> not in session"
        warnings.filterwarnings("ignore", half_made, SAWarning)
        self.course = Course(Path(directory.root), directory)
        self.level, reason = refusal(self.unsandboxed, self.course.root)
        if reason:
            self.log.error(reason)
            raise NbGraderException(reason)
        if self.level not in (Level.FULL, Level.NONE):
            self.log.warning("A weaker sandbox than usual (%s)", self.level.value)
        self._lock = Path(directory.root, f".autograde-{directory.assignment_id}.lock").open("w")  # noqa: SIM115  held while this lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.log.warning("Another run is grading %r; what it has begun is left to it", directory.assignment_id)
        else:
            for forgotten in forget_unfinished(Path(directory.root), directory.assignment_id):
                self.log.warning("%s was begun by a run that was killed; it is graded again", forgotten)
        self._local: Local | None = None
        self._grade_what_nbgrader_would_not(self.plan(directory.assignment_id))

    def plan(self, assignment: str) -> Plan:
        return Plan(self.course, assignment, self.level, limits_from_environment(), model_cache())

    def grader(self, plan: Plan) -> Local:
        """Grades one submission at a time, as nbgrader asks; what the instructor's answers import is imported once."""
        if self._local is None:
            self._local = Local(1, rehearse(plan).modules)
            atexit.register(self._local.__enter__().__exit__)
        return self._local

    def from_filename(self, filename: str, resources: Any = None, **options: Any) -> tuple[NotebookNode, Any]:
        """nbgrader reads no submission, so none can end its run; `SplitExecute` reads it in its own way."""
        if Path(filename).is_relative_to(self.course.submitted):
            return self.from_notebook_node(new_notebook(), resources=resources, **options)  # type: ignore[no-any-return]
        return super().from_filename(filename, resources=resources, **options)  # type: ignore[no-any-return]

    def _grade_what_nbgrader_would_not(self, every: Plan) -> None:
        """Leave nbgrader's way to the submissions that it takes as they are; log what becomes of the others."""
        directory, left = self.course.directory, self.parent.assignments
        excluded = directory.student_id_exclude.split(",")
        asked = [s for s in every.students() if fnmatchcase(s, directory.student_id) and s not in excluded]
        with Gradebook(directory.db_url, directory.course_id) as gradebook:
            odd = frozenset(student for student in asked if _is_odd(every, student, gradebook))
        for folder in [f for f in left if Path(f).parent.name not in {*asked} - odd]:
            del left[folder]
        failures = [Failure(name, where) for name, where in every.misplaced().items()]
        if odd:
            plan = replace(every, chosen=odd, force=self.parent.force)
            try:
                tally = grade_class(plan, self.grader(plan))
            except (GradingError, FileNotFoundError) as error:
                self.log.error("%s", error)
                raise NbGraderException(str(error)) from error
            failures = tally.failures
            for student, status, _, _, notes in table_rows(plan, tally):
                self.log.warning("%s: %s; %s", student, status, notes)
        for failure in failures:
            if fnmatchcase(failure.student, directory.student_id):
                self.log.error("%s is not graded: %s", failure.student, failure.reason)


class BeginGrading(NbGraderPreprocessor):
    """Forget the scores of an earlier run: should this one be killed, they must not pass for its own, nor for a 0."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> Result:
        names = resources["nbgrader"]
        with Gradebook(names["db_url"]) as gradebook:
            for grade in gradebook.find_submission_notebook(
                names["notebook"], names["assignment"], names["student"]
            ).grades:
                grade.auto_score, grade.needs_manual_grade = None, True
            gradebook.db.commit()
        nb.metadata = NotebookNode(llmlab={"status": "running"})
        return nb, resources


class SplitExecute(NbGraderPreprocessor):
    """Grade the submission as it was handed in: its cells in a sandbox, the instructor's tests outside."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> Result:
        names, exporter = resources["nbgrader"], self.parent
        student, plan = names["student"], exporter.plan(names["assignment"])
        instructor = plan.instructor()
        submitted = plan.submission(student)
        bundle = plan.bundle(student, instructor, submitted.text, submitted.notes)
        outcome = next(exporter.grader(plan).run([bundle]))
        if isinstance(outcome, Failure):
            raise RuntimeError(f"not graded: {outcome.reason}")
        with ResultLog(plan.log_file) as log:
            log.append(outcome)
        if outcome["status"] in UNGRADED:
            self.log.warning("%s: %s; %s", student, outcome["status"], outcome["message"])
        for mended in outcome["mended"]:
            self.log.warning("%s: %s", student, mended)
        with Gradebook(names["db_url"]) as gradebook:  # the time that lateness goes by, in place of nbgrader's reading
            stamp = read_stamp(plan.course.submitted, plan.assignment, student)
            gradebook.find_submission(plan.assignment, student).timestamp, _ = read_timestamp(stamp)
            gradebook.db.commit()
        return graded_notebook(outcome, read_cells(instructor.encode())), resources


class ValidateSplit(Execute):
    """What the Validate button runs in place of nbgrader's own execution: the visible tests, as when grading."""

    def preprocess(self, nb: NotebookNode, resources: Any, km: Any = None) -> Result:
        return check_notebook(nb), resources


def use_split_validation() -> None:
    """Make nbgrader's validator run the tests split; its list of preprocessors is no setting, only a default."""
    Validator.preprocessors.default_args = ([CheckCellMetadata, ClearOutput, ValidateSplit],)


def forget_unfinished(course: Path, assignment: str) -> list[str]:
    """Remove the autograded folders of an assignment that a killed run left unfinished; says which."""
    forgotten = []
    for folder in sorted(course.glob(f"autograded/*/{assignment}/")):
        notebooks = list(folder.glob("*.ipynb"))
        if not notebooks or any(_is_unfinished(notebook) for notebook in notebooks):
            shutil.rmtree(folder)
            forgotten.append(str(folder.relative_to(course)))
    return forgotten


def _is_unfinished(notebook: Path) -> bool:
    try:
        state = json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get("llmlab", {})
    except (ValueError, KeyError):
        return True
    return bool(state.get("status") == "running")


def _is_odd(plan: Plan, student: str, gradebook: Gradebook) -> bool:
    """Whether nbgrader would refuse a submission, take less than all of it, or keep a time that it no longer has."""
    home = plan.course.submitted / student / plan.assignment
    stamp = read_stamp(plan.course.submitted, plan.assignment, student)
    _, problem = read_timestamp(stamp)
    try:
        kept = gradebook.find_submission(plan.assignment, student).timestamp
    except MissingEntry:
        kept = None
    taken_away = stamp is None and kept is not None
    return bool(problem) or taken_away or _has_link(home) or not (home / f"{plan.assignment}.ipynb").is_file()


def _has_link(folder: Path) -> bool:
    """Whether something in a folder is neither a folder nor a plain file."""
    kinds = (path.lstat().st_mode for path in folder.rglob("*"))
    return folder.is_symlink() or any(not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)) for kind in kinds)

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
from pathlib import Path
from typing import Any

from nbconvert.exporters import NotebookExporter
from nbformat.notebooknode import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.converters.base import NbGraderException
from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, Execute, NbGraderPreprocessor
from nbgrader.validator import Validator
from sqlalchemy.exc import SAWarning
from traitlets import Bool

from llmlab.grading.batch import Failure, Local
from llmlab.grading.classroom import Plan, model_cache, rehearse
from llmlab.grading.grade import UNGRADED
from llmlab.grading.gradebook import Course
from llmlab.grading.graded import graded_notebook
from llmlab.grading.limits import limits_from_environment
from llmlab.grading.notebooks import read_cells
from llmlab.grading.probe import refusal
from llmlab.grading.results import ResultLog
from llmlab.grading.sandbox import Level
from llmlab.grading.selfcheck import check_notebook

Result = tuple[NotebookNode, Any]


class GradingExporter(NotebookExporter):
    """What ``nbgrader autograde`` makes before it looks for work.

    It refuses without a sandbox, forgets what a killed run left half done (nbgrader takes any folder in ``autograded``
    for a finished one, and exports the missing scores as 0), and leaves aside submissions with links in them (nbgrader
    copies what they point to). The lock says whether the run that marked a folder is still at work; the system
    releases it when that run ends, however it ends.
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
        self._leave_links_aside(directory)

    def grader(self, plan: Plan) -> Local:
        """Grades one submission at a time, as nbgrader asks; what the instructor's answers import is imported once."""
        if self._local is None:
            self._local = Local(1, rehearse(plan).modules)
            atexit.register(self._local.__enter__().__exit__)
        return self._local

    def _leave_links_aside(self, directory: Any) -> None:
        linked = [folder for folder in self.parent.assignments if _has_link(Path(folder))]
        for folder in linked:
            self.log.error("%s has links in it and is not graded here; llmlab grade reads its notebook alone", folder)
            del self.parent.assignments[folder]


class BeginGrading(NbGraderPreprocessor):
    """Forget the scores of an earlier run: should this one be killed, they must not pass for its own."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> Result:
        names = resources["nbgrader"]
        with Gradebook(names["db_url"]) as gradebook:
            for grade in gradebook.find_submission_notebook(
                names["notebook"], names["assignment"], names["student"]
            ).grades:
                grade.auto_score = None
            gradebook.db.commit()
        nb.cells = []
        nb.metadata = NotebookNode(llmlab={"status": "running"})
        return nb, resources


class SplitExecute(NbGraderPreprocessor):
    """Grade the submission as it was handed in: its cells in a sandbox, the instructor's tests outside."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> Result:
        names, exporter = resources["nbgrader"], self.parent
        plan = Plan(exporter.course, names["assignment"], exporter.level, limits_from_environment(), model_cache())
        instructor = plan.instructor()
        submitted = plan.submission(names["student"])
        bundle = plan.bundle(names["student"], instructor, submitted.text, submitted.notes)
        outcome = next(exporter.grader(plan).run([bundle]))
        if isinstance(outcome, Failure):
            raise RuntimeError(f"not graded: {outcome.reason}")
        with ResultLog(plan.log_file) as log:
            log.append(outcome)
        if outcome["status"] in UNGRADED:
            raise RuntimeError(f"not graded: {outcome['status']}; {outcome['message']}")
        for mended in outcome["mended"]:
            self.log.warning("%s: %s", names["student"], mended)
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


def _has_link(folder: Path) -> bool:
    """Whether something in a folder is neither a folder nor a plain file."""
    kinds = (path.lstat().st_mode for path in folder.rglob("*"))
    return folder.is_symlink() or any(not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)) for kind in kinds)

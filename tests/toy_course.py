"""A course of one toy lab in a folder of its own, with nbgrader's gradebook, for tests of what comes after grading."""

import json
import os
from datetime import datetime, timedelta

import forked
import nbformat
from nbgrader.api import Gradebook
from toy_lab import doubling, toy_lab

from llmlab.authoring.lab import Lab
from llmlab.grading.batch import Local
from llmlab.grading.classroom import grade_class
from llmlab.grading.command import plan
from llmlab.grading.sandbox import Level

SECRET_INPUT = 8_675_309
LAB = toy_lab(
    doubling("a large number", f"equal(double({SECRET_INPUT}), 2 * {SECRET_INPUT})"),
    given="""from llmlab.grading.withhold import withhold

withhold(["llmlab.memory.kv_cache_bytes"])
""",
)
GOOD, HALF = "def double(n):\n    return n * 2", "def double(n):\n    return 2"
DUE = datetime(2026, 1, 15, 12, 0, 0)


class ToyCourse:
    """The course; ``settings`` are lines at the end of its nbgrader_config.py."""

    def __init__(self, folder, root, settings=""):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        config = (root / "labs" / "nbgrader_config.py").read_text(encoding="utf-8")
        (folder / "nbgrader_config.py").write_text(f"{config}\n{settings}\n", encoding="utf-8")
        (folder / "toy.py").write_text(LAB, encoding="utf-8")
        Lab(folder / "toy.py").build(folder / "build" / "source")
        environment = {k: v for k, v in os.environ.items() if k != "LLMLAB_COURSE_ROOT"}
        made = forked.run("nbgrader", "generate_assignment", "toy", "--create", cwd=folder, env=environment)
        assert made.returncode == 0, made.stderr
        self.released = nbformat.read(folder / "build" / "release" / "toy" / "toy.ipynb", as_version=4)

    @property
    def plan(self):
        return plan(self.folder, "toy", Level.NONE, force=False)

    def gradebook(self):
        directory = self.plan.course.directory
        return Gradebook(directory.db_url, directory.course_id)

    def notebook(self, answer, *more):
        notebook = nbformat.from_dict(self.released)
        for cell in notebook.cells:
            if cell.metadata.get("nbgrader", {}).get("grade_id") == "double":
                cell.source = answer
        notebook.cells += [nbformat.v4.new_code_cell(source) for source in more]
        return nbformat.writes(notebook)

    def submit(self, student, text, late=timedelta(0)):
        folder = self.folder / "submitted" / student / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (folder / "toy.ipynb").write_text(text, encoding="utf-8")
        (folder / "timestamp.txt").write_text(f"{DUE + late} UTC")

    def grade(self):
        return grade_class(self.plan, Local(2))


def nothing():
    """A notebook in which there is no cell of the lab."""
    return json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})

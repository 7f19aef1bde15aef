"""The commands that hand results on, and the one that compares answers: ``export``, ``gradescope``, ``similar``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

LabName = Annotated[str, typer.Argument(help="the lab's name")]
CourseFolder = Annotated[Path, typer.Option("--course", help="the folder with nbgrader_config.py")]


def export(
    lab: LabName,
    to: Annotated[Path, typer.Option(help="the file to write")],
    form: Annotated[str, typer.Option("--format", help="csv, canvas or moodle")] = "csv",
    canvas_id: Annotated[int | None, typer.Option(help="canvas: the assignment's number, from its address")] = None,
    course: CourseFolder = Path("labs"),
) -> None:
    """Write the grades of LAB for another system. What was not graded has a blank there, never a zero."""
    from llmlab.cache import write_atomically
    from llmlab.grading.command import plan
    from llmlab.grading.formats import FORMATS, canvas_csv, lab_grades
    from llmlab.grading.sandbox import Level

    if form not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if canvas_id is not None and form != "canvas":
        raise ValueError("canvas-id: only Canvas takes one")
    grades = lab_grades(plan(course, lab, Level.NONE, force=False).course, lab)
    write = partial(canvas_csv, canvas_id=canvas_id) if form == "canvas" else FORMATS[form]
    write_atomically(to, write(grades, lab))
    blank = sum(not grade.score for grade in grades)
    print(f"{to}: {len(grades)} students, {blank} of them without a grade")
    if unsafe := sum(grade.is_unsafe for grade in grades):
        print(f"llmlab: warning: {unsafe} of them were graded without a sandbox", file=sys.stderr)


def gradescope(
    lab: LabName,
    to: Annotated[Path, typer.Option(help="the zip to write")],
    course: CourseFolder = Path("labs"),
    unsandboxed: Annotated[
        bool,
        typer.Option("--unsandboxed", help="grade even where the container allows no sandbox; every result says so"),
    ] = False,
) -> None:
    """Write LAB's autograder for Gradescope. It holds the hidden tests and your secret: upload it, give it to nobody."""
    from llmlab.grading.command import plan
    from llmlab.grading.gradescope import write_zip
    from llmlab.grading.sandbox import Level

    write_zip(plan(course, lab, Level.NONE if unsandboxed else Level.FULL, force=False), to)
    print(f"{to}: for Gradescope only; it holds the hidden tests of {lab!r} and this course's secret")


def similar(
    lab: LabName,
    course: CourseFolder = Path("labs"),
    alike: Annotated[
        float | None, typer.Option(help="the share from which on a pair is listed; 0.7 unless told")
    ] = None,
) -> None:
    """List answers to LAB that resemble each other or the package, or reach for it, for a person to look at.

    It decides nothing.
    """
    from llmlab.grading.command import plan
    from llmlab.grading.notebooks import Unreadable, WrongStructure, read_cells
    from llmlab.grading.sandbox import Level
    from llmlab.grading.similar import (
        ALIKE,
        copies_of_package,
        reaches_for,
        released_sources,
        similar_pairs,
        withheld_names,
        written_cells,
    )

    if alike is not None and not 0 < alike <= 1:
        raise ValueError(f"alike: expected a share above 0 and at most 1, got {alike:g}")
    chosen = plan(course, lab, Level.NONE, force=False)
    instructor = read_cells(chosen.instructor().encode())
    written, unread = {}, []
    for student in chosen.students():
        text = chosen.submission(student).text
        try:
            cells = read_cells((text or "").encode("utf-8", "surrogatepass"))
            written[student] = written_cells(instructor, cells)
        except (Unreadable, WrongStructure) as error:
            unread.append(f"{student} ({error if text is not None else 'missing'})")
    released, least = released_sources(instructor), ALIKE if alike is None else alike
    pairs = similar_pairs(written, released, least)
    withheld = withheld_names(instructor)
    pairs += copies_of_package(written, _sources(withheld), released, least) + reaches_for(written, withheld)
    table = Table(
        "student", "other", "exercise", "share", title=f"{lab}: alike", title_justify="left", box=box.SIMPLE_HEAD
    )
    for pair in pairs:
        table.add_row(escape(pair.student), escape(pair.other), escape(pair.exercise), f"{pair.share:.0%}")
    Console(soft_wrap=True).print(table)
    print(f"{len(written)} submissions compared, {len(pairs)} pairs to look at")
    if unread:
        print(f"not compared: {', '.join(unread)}", file=sys.stderr)


def _sources(names: list[str]) -> dict[str, str]:
    """The source of each dotted name that is a function or a class, read from its file: what is loaded may be withheld."""
    import ast
    import importlib.util

    found = {}
    for dotted in names:
        module, _, name = dotted.rpartition(".")
        spec = importlib.util.find_spec(module)
        text = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                found[dotted] = ast.get_source_segment(text, node) or ""
    return found

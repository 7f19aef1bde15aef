"""The page that a student gets back: outcomes, and the student's own code with what it said. Nothing in it is active."""

from __future__ import annotations

from typing import Any

from llmlab.grading.graded import UNSAFE, is_unsafe, record_of
from llmlab.grading.markup import png_address, shown

# The policy holds even if something slipped through: no script, nothing loaded from anywhere.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --good: light-dark(#1a6b34, #6fd08c); --bad: light-dark(#a12622, #ff8f87); }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ overflow-x: auto; padding: .75rem 1rem; border: 1px solid var(--line); border-radius: .4rem; font-size: .875rem; }}
pre.said {{ border-style: dashed; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
td.points, th.points {{ text-align: right; white-space: nowrap; }}
.passed {{ color: var(--good); }} .failed {{ color: var(--bad); }}
.message {{ margin: 0; font-size: .875rem; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{notes}
{exercises}
<h2>Your notebook</h2>
{cells}
</body>
</html>
"""


def feedback_page(result: dict[str, Any], late: str = "") -> str:
    """The page of one result; hidden tests are named, their inputs and values are not in the result at all.

    late: what is to be said of the time at which it was handed in.
    """
    if result["score"] is None:
        summary = f"Not graded: {shown(result['status'])}. {shown(result['message'])}"
    else:
        summary = f"{result['score']:g} of {result['max_score']:g} points."
        if result["status"] != "ok":
            what = f"{result['status']}: {result['message']}" if result["message"] else result["status"]
            summary += f" One thing went wrong on the way: {shown(what)}."
    notes = [
        *([late] if late else []),
        *result["mended"],
        *([UNSAFE] if is_unsafe(result) else []),
    ]
    return PAGE.format(
        title=shown(f"{result['assignment']}: {result['student']}"),
        summary=summary,
        notes="".join(f"<p>Note: {shown(note)}.</p>" for note in notes),
        exercises="\n".join(_exercise(cell) for cell in result["cells"] if cell["outcomes"] is not None),
        cells="\n".join(_cell(cell) for cell in result["cells"] if cell["outcomes"] is None),
    )


def _exercise(cell: dict[str, Any]) -> str:
    record = record_of(cell)
    name = str(cell["grade_id"]).removeprefix("test_")
    rows = []
    for outcome in record.outcomes:
        mark, word = ("passed", "✓") if outcome.passed else ("failed", "✗")
        message = f'<p class="message">{shown(outcome.message)}</p>' if outcome.message else ""
        points = f"{outcome.points if outcome.passed else 0:g} of {outcome.points:g}" if outcome.points else ""
        rows.append(
            f'<tr><td class="{mark}">{word}</td><td>{shown(outcome.property)}{message}</td><td class="points">{points}</td></tr>'
        )
    head = f'<tr><th></th><th>property</th><th class="points">{record.score:g} of {record.points:g}</th></tr>'
    return f"<h2>{shown(name)}</h2>\n<table>\n{head}\n" + "\n".join(rows) + "\n</table>"


def _cell(cell: dict[str, Any]) -> str:
    if cell["kind"] != "code":
        return "" if cell["role"] != "student" else f"<pre>{shown(cell['source'])}</pre>"
    parts = [f"<pre><code>{shown(cell['source'])}</code></pre>"]
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            parts.append(f'<pre class="said">{shown(output["text"])}</pre>')
        elif address := png_address(output["data"].get("image/png")):
            parts.append(f'<img alt="a picture that this cell drew" src="{address}">')
        elif "text/plain" in output["data"]:
            parts.append(f'<pre class="said">{shown(output["data"]["text/plain"])}</pre>')
    if cell["error"] is not None:
        error = f"{cell['error']['name']}: {cell['error']['message']}"
        parts.append(f'<pre class="said failed">{shown(error)}</pre>')
    return "\n".join(parts)

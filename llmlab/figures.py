"""Figures, tables and numbers for the book's pages. Figures are drawn twice, on light and on dark ground, small enough to be read on a phone."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """Colours of one ground. Neighbours in ``colors`` differ in lightness too, so that greyscale keeps them apart."""

    name: str
    ink: str
    grid: str
    ground: str
    colors: tuple[str, ...]
    hatches: tuple[str, ...] = ("", "///", "...", "\\\\\\", "xx", "++")


LIGHT = Theme(
    "light", "#1c1f24", "#d5d9df", "#ffffff", ("#1b4f72", "#e59b3a", "#2e8571", "#f3d9b1", "#a23b3b", "#9aa5b1")
)
DARK = Theme(
    "dark", "#e6e8eb", "#3d444d", "#121212", ("#8ec5f4", "#c27a1a", "#2c776a", "#f6dfb5", "#e88888", "#76818d")
)

Draw = Callable[[Any, Theme], None]


def show(draw: Draw, alt: str, caption: str = "", width: float = 4.7, height: float = 3.1) -> None:
    """Draw one axes on each ground and display both; the page shows the one that fits its theme.

    draw: called with a matplotlib axes and a Theme; alt: the picture in words, for those who cannot see it;
    width, height: inches at 10 points, which a phone's screen shows at about the size of the text.
    Raises ValueError for an empty alt text.
    """
    if not alt.strip():
        raise ValueError("alt: expected the picture in words, got an empty text")
    from IPython.display import HTML, display

    images = "".join(
        f'<img class="only-{theme.name}" alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{_svg(draw, theme, width, height)}">'
        for theme in (LIGHT, DARK)
    )
    note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    # The theme hides what follows the hidden image; the caption stands apart from the pair.
    display(HTML(f'<figure class="llmlab-figure"><div>{images}</div>{note}</figure>'))


WORDS = 24  # characters of text from which on a column is words that wrap, not numbers


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Display a table: the first column is text, the others are numbers with thousands separated, or words where they are long."""
    from IPython.display import HTML, display

    shown = [[_cell(cell) for cell in row] for row in rows]
    words = {column for row in shown for column, cell in enumerate(row) if column and len(cell) > WORDS}
    marks = ["<{} class=words>" if column in words else "<{}>" for column in range(len(header))]

    def line(kind: str, cells: Sequence[str]) -> str:
        first, *others = map(html.escape, cells)
        broken = [re.sub(r"(?<=[/_])(?=\w)", "<wbr>", first), *others]  # where a long name may break
        marked = zip(marks, broken, strict=True)
        return f"<tr>{''.join(f'{mark.format(kind)}{cell}</{kind}>' for mark, cell in marked)}</tr>"

    body = "".join(line("td", row) for row in shown)
    display(HTML(f'<table class="llmlab-table"><thead>{line("th", header)}</thead><tbody>{body}</tbody></table>'))


def say(name: str, text: str) -> None:
    """Make a text that was computed available to the prose of its page, where {glue:md}`name` puts it.

    text: inline Markdown, most often a number with its unit. Raises ValueError for an empty text.
    """
    if not text.strip():
        raise ValueError(f"text of {name!r}: expected something to say, got an empty text")
    from IPython.display import Markdown
    from myst_nb import glue  # type: ignore[import-untyped]

    glue(name, Markdown(text), display=False)


def percent(share: float, digits: int = 0) -> str:
    """``share`` of 1 in percent; the space before the sign does not break."""
    return f"{100 * share:,.{digits}f}\N{NO-BREAK SPACE}%"


def _cell(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _svg(draw: Draw, theme: Theme, width: float, height: float) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.grid, "xtick.color": theme.ink,
        "ytick.color": theme.ink, "grid.color": theme.grid, "axes.facecolor": "none", "figure.facecolor": "none",
        "legend.facecolor": theme.ground, "legend.edgecolor": "none", "legend.framealpha": 1, "legend.labelcolor": theme.ink, "font.size": 10, "axes.titlesize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.6,
        "axes.axisbelow": True, "hatch.linewidth": 0.6, "hatch.color": theme.ground, "svg.hashsalt": theme.name,
        "patch.edgecolor": theme.ground,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots(), theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return base64.b64encode(buffer.getvalue()).decode()

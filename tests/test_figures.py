"""Figures in pairs with alt text, and tables."""

import base64
import itertools
import re

import pytest

from llmlab import figures


def draw(ax, theme):
    ax.plot([1, 2], [3, 4], color=theme.colors[0])


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", lambda html: found.append(html.data))
    return found


def test_a_figure_is_drawn_for_both_grounds(shown):
    figures.show(draw, alt='a "rising" line', caption="Up <1>")
    images = re.findall(r'<img class="only-(\w+)" alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]+)">', shown[0])
    assert [(name, alt) for name, alt, _ in images] == [
        ("light", "a &quot;rising&quot; line"),
        ("dark", "a &quot;rising&quot; line"),
    ]
    light, dark = (base64.b64decode(data).decode() for _, _, data in images)
    assert figures.LIGHT.colors[0] in light
    assert figures.DARK.colors[0] in dark
    assert "<figcaption>Up &lt;1&gt;</figcaption>" in shown[0]


def test_a_figure_is_the_same_each_time(shown):
    figures.show(draw, alt="a line")
    figures.show(draw, alt="a line")
    assert shown[0] == shown[1]


def test_a_figure_without_alt_text_is_refused():
    with pytest.raises(ValueError, match="alt: expected the picture in words"):
        figures.show(draw, alt=" ")


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK])
def test_neighbouring_colours_differ_in_lightness(theme):
    """So that greyscale keeps them apart: at least a tenth of the scale between neighbours."""

    def lightness(colour):
        r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    values = [lightness(colour) for colour in theme.colors[:4]]
    assert all(abs(a - b) > 0.1 for a, b in itertools.pairwise(values))


def test_a_table_escapes_and_separates_thousands(shown):
    figures.table(["a<b", "n"], [("x&y", 1234567)])
    assert "<th>a&lt;b</th>" in shown[0]
    assert "<td>x&amp;y</td><td>1,234,567</td>" in shown[0]

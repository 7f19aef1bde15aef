"""Figures in pairs with alt text, and tables."""

import ast
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


def test_long_text_in_a_table_wraps_as_words_and_a_name_at_its_joints(shown):
    figures.table(["exercise", "n", "what it is"], [("lab/one_name", 1, "words that would make the table wide")])
    assert "<td>lab/<wbr>one_<wbr>name</td><td>1</td><td class=words>words that" in shown[0]
    assert "<th>n</th><th class=words>what it is</th>" in shown[0]


def test_text_that_was_computed_is_glued_for_the_prose(monkeypatch):
    glued = {}
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: glued.update({name: (value.data, display)}))
    figures.say("peak", figures.percent(0.12345, 1))
    assert glued == {"peak": ("12.3\N{NO-BREAK SPACE}%", False)}
    with pytest.raises(ValueError, match="text of 'peak': expected something to say"):
        figures.say("peak", " ")


# "one" is left out: it is a pronoun more often than a number. "H100" and "Llama-2-70B" are names.
NUMBER = re.compile(
    r"(?<![\w.,-])\d"
    r"|\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    r"|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|millions?"
    r"|billions?|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?|tenths?|twice|dozens?)\b",
    re.IGNORECASE,
)


def typed_text(node):
    """The pieces of a text that stand in the code as such: joined with +, put together by join, or within an f-string's braces."""
    match node:
        case ast.Constant(value=str() as text):
            yield text
        case ast.BinOp(op=ast.Add()):
            yield from itertools.chain(typed_text(node.left), typed_text(node.right))
        case ast.JoinedStr():
            yield from itertools.chain(*map(typed_text, node.values))
        case ast.FormattedValue():
            yield from typed_text(node.value)
        case ast.IfExp():
            yield from itertools.chain(typed_text(node.body), typed_text(node.orelse))
        case ast.GeneratorExp() | ast.ListComp():
            yield from typed_text(node.elt)
        case ast.Call(func=ast.Attribute(attr="join")):
            yield from itertools.chain(*map(typed_text, node.args))


def typed_numbers(code):
    """The numbers typed by hand into the alternative texts and captions of a cell's figures."""
    for call in ast.walk(ast.parse(code)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("show"):
            texts = call.args[1:3] + [k.value for k in call.keywords if k.arg in ("alt", "caption")]
            for text in itertools.chain(*map(typed_text, texts)):
                yield from (text[m.start() : m.start() + 20] for m in NUMBER.finditer(text))


def code_cells(page):
    """A page's cells, without the lines of options at their heads."""
    for cell in re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield re.sub(r"\A(:[^\n]*\n)+", "", cell)


def test_no_figure_is_described_by_a_number_typed_by_hand(root):
    """What a picture shows was computed, so the numbers in its description must be, too."""
    cells = [cell for page in sorted(root.glob("chapters/*.md")) for cell in code_cells(page.read_text("utf-8"))]
    assert sum("figures.show(" in cell for cell in cells) >= 5
    assert [number for cell in cells for number in typed_numbers(cell)] == []


@pytest.mark.parametrize(
    ("alt", "found"),
    [
        ('"up to forty times"', ["forty times"]),
        ('"below " "100,000 tokens"', ["100,000 tokens"]),
        ('f"{count} runs, a factor of 8 apart"', ["8 apart"]),
        ('f"{count} runs on one H100 with Llama-2-70B"', []),
        ('f"passes {size(80 * GB)}"', []),
        ('"over " + "four seconds" + f", {count}"', ["four seconds"]),
        ('f"{count} runs, " + "; ".join(f"budget {b}, with 704" for b in budgets)', ["704"]),
        ("""f"a line, {f'{n} of 16' if n else 'half'}\"""", ["16", "half"]),
        ('"its 99th percentile"', ["99th percentile"]),
    ],
)
def test_a_number_typed_into_a_description_is_found(alt, found):
    assert list(typed_numbers(f"figures.show(draw, alt={alt})")) == found
    assert list(typed_numbers(f"figures.show(draw, {alt})")) == found

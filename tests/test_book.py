"""The built book as a reader meets it, in a real browser; and what its sources promise."""

import functools
import http.server
import re
import subprocess
import threading
import urllib.parse

import pytest
import yaml

HTML = "_build/html"


def pages(root):
    """Every page of the table of contents, in its order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"]] + [c["file"] for part in toc["parts"] for c in part["chapters"]]


PAGES = pages(__import__("pathlib").Path(__file__).parent.parent)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site(request):
    root = request.config.rootpath
    if not (root / HTML / "index.html").exists():
        subprocess.run(["make", "labs", "release", "book"], cwd=root, check=True)
    handler = functools.partial(_Handler, directory=str(root / HTML))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(chromium_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=chromium_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page that remembers what went wrong on it."""
    context = browser.new_context()
    opened = context.new_page()
    opened.problems = []
    opened.on("console", lambda m: opened.problems.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda e: opened.problems.append(str(e)))
    opened.on("requestfailed", lambda r: opened.problems.append(f"failed: {r.url}"))
    opened.on("response", lambda r: opened.problems.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    yield opened
    context.close()


pytestmark = pytest.mark.xdist_group("book")


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_opens_and_shows_its_figures(site, page, name, width, scheme):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{site}/{name}.html", wait_until="load")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.locator("article h1").first.is_visible()
    other = {"light": "dark", "dark": "light"}[scheme]
    for figure in page.locator("figure.llmlab-figure").all():
        shown, hidden = figure.locator(f"img.only-{scheme}"), figure.locator(f"img.only-{other}")
        shown.scroll_into_view_if_needed()
        box = shown.bounding_box()
        assert box is not None
        assert 200 < box["width"] <= width
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert shown.evaluate("image => image.complete && image.naturalWidth > 0")
        assert not hidden.is_visible()
        assert figure.locator("figcaption").is_visible()
    for image in page.locator("article img").all():
        assert len(image.get_attribute("alt") or "") > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    assert page.problems == []


CUT_OFF = "there => there.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.trim().slice(0, 60))"
TABLES = "div.cell_output .text_html:has(table.llmlab-table)"


@pytest.mark.browser
def test_the_instructors_page_cuts_nothing_off_and_a_table_that_scrolls_shows_it(site, page):
    """At 1280 everything fits; on a phone comments and commands do, and a table that does not has a shadow at its edge."""
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(f"{site}/chapters/instructor.html", wait_until="load")
    assert page.locator(f"{TABLES}, div.highlight-bash pre, div.highlight-python pre").evaluate_all(CUT_OFF) == []
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.locator("div.highlight-bash pre").evaluate_all(CUT_OFF) == []
    tables = page.locator(TABLES)
    assert tables.evaluate_all(CUT_OFF)
    shadows = tables.evaluate_all("there => there.map(e => getComputedStyle(e).backgroundImage)")
    assert all("gradient" in shadow for shadow in shadows)


@pytest.mark.browser
def test_formulas_are_rendered_without_a_network(site, page):
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(site) else route.abort())
    page.goto(f"{site}/chapters/memory.html", wait_until="networkidle")
    assert page.locator("mjx-container").count() > 20
    assert page.problems == []


@pytest.mark.browser
def test_the_search_finds_adam(site, page):
    page.goto(f"{site}/search.html?q=Adam", wait_until="networkidle")
    page.wait_for_selector("#search-results li")
    assert "Memory" in page.locator("#search-results").inner_text()
    assert page.problems == []


@pytest.mark.browser
def test_quiz_answers_fold_out(site, page):
    page.goto(f"{site}/chapters/memory.html")
    quiz = page.locator("details.sd-dropdown")
    assert quiz.count() >= 5
    answer = quiz.first.locator(".sd-summary-content")
    assert not answer.is_visible()
    quiz.first.locator("summary").click()
    assert answer.is_visible()


@pytest.mark.browser
def test_the_lab_can_be_downloaded(site, page):
    page.goto(f"{site}/chapters/memory.html")
    link = page.locator("a.reference.download").first
    with page.expect_download() as download:
        link.click()
    text = download.value.path().read_text(encoding="utf-8")
    assert "raise NotImplementedError" in text
    assert "HIDDEN TESTS" not in text


@pytest.mark.browser
def test_links_inside_the_book_hold(site, page):
    """Every link to a page of the book, and every anchor on it."""
    wanted = set()
    for name in PAGES:
        page.goto(f"{site}/{name}.html")
        links = page.locator("a[href]").evaluate_all("all => all.map(a => a.href)")
        wanted |= {link for link in links if link.startswith(site)}
    anchors = {}
    for link in sorted(wanted):
        address, _, anchor = link.partition("#")
        if address not in anchors:
            response = page.request.get(address)
            assert response.ok, link
            is_page = "text/html" in response.headers.get("content-type", "")
            anchors[address] = set(re.findall(r'id="([^"]+)"', response.text())) if is_page else set()
        if anchor and not anchor.startswith("search"):
            assert urllib.parse.unquote(anchor) in anchors[address], link


def test_a_chapter_has_what_a_chapter_must_have(root):
    """Takeaways, where it loses, a quiz, references, the lab; of every page that teaches a topic."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    topics = [
        c["file"]
        for part in toc["parts"]
        for c in part["chapters"]
        if (root / "labs" / f"{c['file'].split('/')[-1]}.py").exists()
    ]
    assert topics
    for name in topics:
        text = (root / f"{name}.md").read_text(encoding="utf-8")
        for part in (
            "Takeaway",
            "## Where it loses",
            "## Quiz",
            "{dropdown}",
            "{cite:p}",
            "{download}",
            "figures.show",
        ):
            assert part in text, f"{name} has no {part}"


def test_every_cited_paper_is_in_the_bibliography(root):
    keys = set(re.findall(r"^@\w+\{([^,]+),", (root / "references.bib").read_text(encoding="utf-8"), re.MULTILINE))
    cited = set()
    for name in PAGES:
        for group in re.findall(r"\{cite:p\}`([^`]+)`", (root / f"{name}.md").read_text(encoding="utf-8")):
            cited |= {key.strip() for key in group.split(",")}
    assert cited == keys


def test_the_result_files_name_what_they_must(root):
    import json

    files = list((root / "benchmarks" / "results").rglob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert {"device", "driver", "versions", "commit", "command", "date", "seeds"} <= set(result), file


def test_code_that_is_shown_fits_beside_the_contents(root):
    """At 1280 px a page is 80 columns wide; what is longer is cut off until the reader scrolls in the box."""
    cells = [
        (page.name, options, code)
        for page in sorted(root.glob("chapters/*.md"))
        for options, code in re.findall(
            r"^```\{code-cell\}[^\n]*\n((?::[^\n]*\n)*)(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
        )
    ]
    shown = [
        (name, line)
        for name, options, code in cells
        if not re.search("hide|remove", options)
        for line in code.splitlines()
    ]
    assert len(shown) > 100
    assert [(name, line) for name, line in shown if len(line) > 80] == []

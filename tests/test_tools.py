"""What `make` calls: interrupted installs and steps are done again, finished ones are not; CI skips nothing it must run."""

import importlib.util
import os
import subprocess
import sys

import pytest


def load(root, name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", root / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bootstrap(root, tmp_path, monkeypatch):
    """bootstrap.py on an environment in a folder of its own, with pip and venv replaced by a record of calls."""
    module = load(root, "bootstrap")
    monkeypatch.setattr(module, "VENV", tmp_path / "venv")
    monkeypatch.setattr(module, "UNFINISHED", tmp_path / "venv" / "install-unfinished")
    monkeypatch.setattr(module, "FINISHED", tmp_path / "venv" / "install-finished")
    monkeypatch.setattr(module, "TORCH_FROM", tmp_path / "venv" / "torch-index")
    monkeypatch.setattr(module, "install_system_packages", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py"])
    module.calls = []

    def make_venv(command, **options):
        module.calls.append("venv")
        (tmp_path / "venv" / "bin").mkdir()
        (tmp_path / "venv" / "bin" / "python").touch()

    monkeypatch.setattr(module.subprocess, "run", make_venv)
    monkeypatch.setattr(module, "pip", lambda *arguments: module.calls.append(arguments))
    return module


def test_a_finished_install_is_not_repeated(bootstrap):
    bootstrap.main()
    made = list(bootstrap.calls)
    assert made[0] == "venv"
    assert len(made) == 4
    bootstrap.main()
    assert bootstrap.calls == made


def test_an_interrupted_install_starts_over(bootstrap, monkeypatch):
    def interrupted(*arguments):
        (bootstrap.VENV / "half-copied").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "pip", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bootstrap.main()
    assert bootstrap.UNFINISHED.exists()
    bootstrap.main()
    assert bootstrap.calls.count("venv") == 2
    assert not (bootstrap.VENV / "half-copied").exists()
    assert bootstrap.FINISHED.exists()
    assert not bootstrap.UNFINISHED.exists()


def test_an_environment_whose_making_was_interrupted_starts_over(bootstrap, monkeypatch):
    def interrupted(command, **options):
        (bootstrap.VENV / "bin").mkdir()
        (bootstrap.VENV / "bin" / "python").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bootstrap.main()
    bootstrap.main()
    assert bootstrap.calls[0] == "venv"
    assert bootstrap.FINISHED.exists()


def test_a_changed_lock_installs_again(bootstrap, monkeypatch):
    bootstrap.main()
    monkeypatch.setattr(bootstrap, "fingerprint", lambda: "another")
    bootstrap.main()
    assert len(bootstrap.calls) == 7


def test_a_chosen_index_decides_which_torch_is_installed(bootstrap, monkeypatch):
    """On a new machine and in a finished environment alike; the same index again has nothing to do."""
    of_torch = ("--index-url", "https://example.org/cpu", "--no-deps", "--force-reinstall", "torch==2.13.0")
    bootstrap.main()
    assert of_torch not in bootstrap.calls
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--torch-index", "https://example.org/cpu"])
    bootstrap.main()
    assert bootstrap.calls.count(of_torch) == 1
    assert bootstrap.calls[5][:2] == ("--extra-index-url", "https://example.org/cpu")
    made = list(bootstrap.calls)
    bootstrap.main()
    assert bootstrap.calls == made
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--torch-index", ""])
    bootstrap.main()
    assert bootstrap.calls == made


def test_the_environments_own_python_gives_way_to_the_one_outside(bootstrap, monkeypatch):
    """A half-made environment comes first on make's path, and its Python must not throw itself away."""

    class Left(Exception):
        pass

    def leave(program, arguments):
        raise Left(program, arguments)

    monkeypatch.setattr(bootstrap.os, "execv", leave)
    bootstrap.leave_the_environment()
    monkeypatch.setattr(bootstrap.sys, "prefix", str(bootstrap.VENV))
    with pytest.raises(Left) as left:
        bootstrap.main()
    program, arguments = left.value.args
    assert arguments == [program, "bootstrap.py"]
    question = [program, "-c", "import sys; print(sys.prefix == sys.base_prefix)"]
    with subprocess.Popen(question, stdout=subprocess.PIPE) as outside:
        assert outside.communicate()[0] == b"True\n"


def test_an_old_python_is_told_so(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 10, 0))
    with pytest.raises(SystemExit, match=r"Python 3.11 or newer is needed"):
        bootstrap.main()


@pytest.mark.parametrize(
    ("programs", "root_user", "said"),
    [
        ({"apt-get"}, False, "run: sudo apt-get install chromium bubblewrap"),
        (set(), True, "not installed: chromium bubblewrap"),
        ({"apt-get", "chromium", "bwrap", "pg_ctlcluster"}, False, ""),
    ],
)
def test_system_packages_that_may_not_be_installed_are_named(root, monkeypatch, capsys, programs, root_user, said):
    module = load(root, "bootstrap")
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}" if name in programs else None)
    monkeypatch.setattr(module.os, "geteuid", lambda: 0 if root_user else 1000)
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: pytest.fail("nothing may be installed here"))
    module.install_system_packages()
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(said) == bool(printed)


def test_system_packages_are_installed_where_they_may(root, monkeypatch):
    module = load(root, "bootstrap")
    ran = []
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    result = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(module.subprocess, "run", lambda command, **k: ran.append(command) or result)
    module.install_system_packages()
    assert ran[-1][:2] == ["apt-get", "install"]
    assert {"chromium", "bubblewrap"} <= set(ran[-1])


def test_a_step_that_fails_is_done_again_and_one_that_ended_is_not(root, tmp_path, monkeypatch):
    course = load(root, "course")
    monkeypatch.setattr(course, "STAMPS", tmp_path / "stamps")
    product = tmp_path / "product"

    def run(key, fail=False):
        done = []
        with course.step("title", "name", key, [product]) as needed:
            if needed:
                done.append(key)
                product.touch()
                if fail:
                    raise KeyboardInterrupt
        return done

    with pytest.raises(KeyboardInterrupt):
        run("a", fail=True)
    assert run("a") == ["a"]
    assert run("a") == []
    assert run("b") == ["b"]
    product.unlink()
    assert run("b") == ["b"]


@pytest.mark.parametrize("marker", ["browser", "sandbox", "postgres"])
def test_in_ci_a_missing_program_is_an_error_and_no_skip(marker, tmp_path, root):
    """A test run with CI=true and nothing on the path stops; without CI it skips and counts."""
    (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers =\n  {marker}: x\n")
    (tmp_path / "test_it.py").write_text(f"import pytest\n\n\n@pytest.mark.{marker}\ndef test_it():\n    pass\n")
    outcomes = {}
    for ci in ("true", ""):
        environment = {"CI": ci, "PATH": str(tmp_path), "HOME": os.environ.get("HOME", "/")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
        outcomes[ci] = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert outcomes["true"].returncode != 0
    assert f"CI must run the {marker} tests" in outcomes["true"].stderr
    assert outcomes[""].returncode == 0
    assert "1 skipped" in outcomes[""].stdout


def test_the_lock_tool_cuts_local_labels(root):
    lock = load(root, "lock")
    report = [
        {"metadata": {"name": "torch", "version": "2.13.0+cpu"}},
        {"metadata": {"name": "Jupyter_Core", "version": "5.9.1"}},
        {"metadata": {"name": "llmlab", "version": "0.1.0"}},
    ]
    assert lock.pins(report) == ["jupyter-core==5.9.1", "torch==2.13.0"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "of model, labs, release, book, class"),
        (["boook"], 2, "no step 'boook'; there are model, labs, "),
    ],
)
def test_the_course_tool_has_a_help_and_names_its_steps(root, capsys, arguments, code, said):
    with pytest.raises(SystemExit) as ended:
        load(root, "course").main(arguments)
    assert ended.value.code == code
    assert said in " ".join("".join(capsys.readouterr()).split())

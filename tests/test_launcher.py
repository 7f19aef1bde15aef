"""Ranks as processes: what they return and print, and what is said when one raises, dies or hangs."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from on_devices import named, on_devices

from llmlab.parallel import RankError, joined, launch


def summed(mesh, factor):
    x = torch.tensor([float(mesh.get_rank() * factor)])
    dist.all_reduce(x)
    print("half\nof", end=" ")
    print("it")
    return mesh.get_rank(), x


def running(folder):
    """The ranks that wrote their numbers into a folder and still run."""
    found = [Path("/proc", file.read_text(), "status") for file in folder.glob("pid-*")]
    assert found
    return [status for status in found if status.exists() and "zombie" not in status.read_text()]


def test_results_come_by_rank_and_prints_behind_their_number(capsys):
    assert launch(summed, 3, 2) == [(rank, torch.tensor([6.0])) for rank in range(3)]
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"[rank {rank}] {line}" for rank in range(3) for line in ("half", "of it"))


def test_a_function_of_a_notebook_travels_by_value():
    namespace = {"__name__": "__main__"}
    exec("import torch\nbase = 7\ndef fn(mesh):\n    return base + mesh.get_rank()\n", namespace)
    assert launch(namespace["fn"], 2) == [7, 8]


def test_runs_at_the_same_time_do_not_meet():
    results = {}

    def run(factor):
        results[factor] = launch(summed, 2, factor)[0][1].item()

    threads = [threading.Thread(target=run, args=(factor,)) for factor in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: 1.0, 2: 2.0, 3: 3.0}


def fail(mesh, how, folder):
    Path(folder, f"pid-{mesh.get_rank()}").write_text(str(os.getpid()))
    dist.barrier()
    if mesh.get_rank() == 1:
        how()
    dist.all_reduce(torch.zeros(1, device=mesh.device_type))


def raises():
    raise KeyError("what is not there")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def leaves():
    os._exit(3)


def hangs():
    time.sleep(1000)


@pytest.mark.parametrize(
    ("how", "said", "details"),
    [
        (raises, "rank 1 raised KeyError: 'what is not there'", "in raises"),
        (is_killed, "rank 1 was ended by signal 9", ""),
        (leaves, "rank 1 ended with exit code 3 and no result", ""),
    ],
    ids=["raises", "is killed", "leaves"],
)
@pytest.mark.parametrize("where", [("cpu", 3), *on_devices([2])[1:]], ids=named)
def test_a_rank_that_fails_takes_the_others_down(where, how, said, details, tmp_path):
    """Long before the time is up, and the one that failed is named, not one that noticed."""
    device, ranks = where
    start = time.monotonic()
    with pytest.raises(RankError, match=said) as caught:
        launch(fail, ranks, how, tmp_path, device=device, timeout=120)
    assert time.monotonic() - start < 60  # half of the time, for a busy machine
    assert caught.value.rank == 1
    assert details in str(caught.value)
    assert not running(tmp_path)


@pytest.mark.parametrize("where", on_devices([2]), ids=named)
def test_a_rank_that_hangs_is_shown_where_it_hangs(where, tmp_path):
    device, ranks = where
    with pytest.raises(RankError, match="rank 1 hangs") as caught:
        launch(fail, ranks, hangs, tmp_path, device=device, timeout=60 if device == "cuda" else 10)
    assert "in hangs" in str(caught.value)
    assert "rank 0" not in str(caught.value)  # it only waits
    assert not running(tmp_path)


def test_ranks_that_all_hang_are_ended_too():
    def spin(mesh):
        while True:
            pass

    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 hangs, and so does rank 1") as caught:
        launch(spin, 2, timeout=10)
    assert str(caught.value).count("in spin") == 2
    assert time.monotonic() - start < 60


def test_a_result_that_cannot_travel_is_an_error_of_its_rank():
    with pytest.raises(RankError, match="rank 0 raised TypeError: cannot pickle"):
        launch(lambda mesh: threading.Lock(), 1)


def test_the_last_words_of_a_rank_that_fails_are_printed(capsys):
    def speak(mesh):
        print("before")
        raise ValueError("after")

    with pytest.raises(RankError, match="after"):
        launch(speak, 1)
    assert capsys.readouterr().out == "[rank 0] before\n"


def test_ranks_end_with_whoever_launched_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, time, pathlib
        from llmlab.parallel import launch

        def fn(mesh, folder):
            pathlib.Path(folder, f"pid-{mesh.get_rank()}").write_text(str(os.getpid()))
            time.sleep(1000)

        if __name__ == "__main__":
            launch(fn, 2, os.path.dirname(os.path.abspath(__file__)))
        """)
    )
    process = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while running(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((summed, 0), ValueError, "world_size: expected a whole number of at least 1, got 0"),
        ((summed, 1.5), TypeError, "world_size: expected a whole number"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, said):
    with pytest.raises(error, match=said):
        launch(*arguments)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="device: expected one of"):
        launch(summed, 1, 1, device="tpu")
    with pytest.raises(ValueError, match="timeout: expected a number above 0"):
        launch(summed, 1, 1, timeout=0)
    many = torch.cuda.device_count() + 1
    with pytest.raises(ValueError, match=f"world_size: {many} ranks need {many} GPUs"):
        launch(summed, many, 1, device="cuda")


def test_torchrun_starts_the_same_function(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import pathlib, torch, torch.distributed as dist
        from llmlab.parallel import joined

        def fn(mesh):
            x = torch.ones(1)
            dist.all_reduce(x)
            return x.item()

        with joined(device="cpu") as mesh:
            said = f"rank {mesh.get_rank()} of {mesh.size()} has {fn(mesh)}"
            pathlib.Path(__file__).with_name(f"said-{mesh.get_rank()}").write_text(said)
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said == ["rank 0 of 2 has 2.0", "rank 1 of 2 has 2.0"]


def test_without_torchrun_joined_says_so(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ValueError, match="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set: start this with torchrun"),
        joined(),
    ):
        pass

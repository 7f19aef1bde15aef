"""The sandbox: what it keeps in, found by trying; weaker levels by name; the limits and the filter."""

import contextlib
import os
import platform
import re
import resource
import subprocess
import time
from pathlib import Path

import pytest

from llmlab.grading import probe as probing
from llmlab.grading.cgroup import ROOT, group, parents, sweep
from llmlab.grading.probe import ATTEMPTS, probe, refusal, try_level
from llmlab.grading.sandbox import Level, Limits, Sandbox, SandboxError
from llmlab.grading.seccomp import ARCHITECTURE, DENIED, FAMILIES, SOCKET, seccomp_filter
from llmlab.grading.session import Worker
from llmlab.grading.worker import main as serve
from llmlab.grading.zygote import Zygote

pytestmark = pytest.mark.sandbox
SMALL = Limits(seconds=20, cell_seconds=5, memory_bytes=256 * 2**20, processes=16, disk_bytes=4 * 2**20)


def test_the_probe_finds_the_strongest_level_in_under_a_second():
    start = time.monotonic()
    found = probe()
    assert found.level is (Level.FULL if parents() else Level.NO_CGROUP)
    assert found.is_sandbox
    assert time.monotonic() - start < 1.5  # a second on an idle machine; this one runs other tests beside


@pytest.mark.parametrize("name", ATTEMPTS)
def test_the_probe_notices_what_gets_through(name, monkeypatch):
    """Each attempt is looked at: one that is made to work lowers the level."""
    monkeypatch.setitem(ATTEMPTS, name, lambda *_: True)
    assert name in try_level(Level.FULL) if parents() else True


def test_a_weaker_level_is_named_and_says_why(monkeypatch):
    monkeypatch.setattr(probing, "parents", lambda: None)
    found = probe()
    assert found.level is Level.NO_CGROUP
    assert "no control group" in found.weaknesses[0]
    assert try_level(Level.NO_CGROUP) == []


def test_without_bubblewrap_others_work_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setattr(probing, "has_bubblewrap", lambda: False)
    level, reason = refusal(unsandboxed=False)
    assert level is Level.NONE
    assert "sudo apt-get install bubblewrap" in reason
    assert refusal(unsandboxed=True) == (Level.NONE, "")


@pytest.mark.parametrize("said", list(probing.BLAMED))
def test_a_refusal_of_the_system_is_translated_into_its_mend(said, monkeypatch):
    def refuse(self, descriptor, zygote=None):
        raise SandboxError(f"bwrap: {said}: Permission denied")

    monkeypatch.setattr(Sandbox, "worker", refuse)
    found = probe()
    assert found.level is Level.NONE
    assert probing.BLAMED[said] in " ".join(found.weaknesses)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write a host's mount by a remount")
def test_attack_a_remount_writes_the_host_without_a_user_namespace_and_not_with_it(tmp_path):
    """--unshare-all alone, as root, is no sandbox; this is why the user namespace and the capabilities are named."""
    remount = "mount -o remount,rw,bind /readable; echo changed > /readable/canary"
    base = [
        "bwrap", "--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib",
        "--symlink", "usr/lib64", "/lib64", "--ro-bind", str(tmp_path), "/readable",
    ]  # fmt: skip
    ours = ["--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    canary = tmp_path / "canary"
    for more, expected in ((ours, "untouched"), ([], "changed")):
        canary.write_text("untouched")
        subprocess.run([*base, *more, "sh", "-c", remount], capture_output=True, check=False)
        assert canary.read_text().strip() == expected


def started(level, zygote):
    return Worker(Sandbox(SMALL, level), zygote)


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "as a program"])
def test_a_worker_has_no_rights_no_files_and_no_environment(forked):
    zygote = Zygote(serve) if forked else None
    worker = started(probe().level, zygote)
    look = (
        "import os, re\nstatus = open('/proc/self/status').read()\n"
        "print(re.findall(r'CapEff:\\s*(\\w+)|NoNewPrivs:\\s*(\\d)|Seccomp:\\s*(\\d)', status), sorted(os.environ))\n"
        "print(sorted(os.listdir('/etc')), os.listdir(os.path.expanduser('~')), sorted(os.listdir('/dev')))"
    )
    said = "".join(o["text"] for o in worker.run(look)["outputs"])
    worker.end()
    if zygote:
        zygote.end()
    assert "('0000000000000000', '', ''), ('', '1', ''), ('', '', '2')" in said
    assert "LLMLAB" not in said
    assert "['ld.so.cache'] ['.ipython']" in said
    assert "sda" not in said


def test_a_gpu_sandbox_binds_the_devices_and_does_not_limit_addresses(monkeypatch):
    """Seen in bubblewrap's command: CUDA reserves more addresses than any limit, so the control group limits memory."""
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/nvidia0"), Path("/dev/nvidiactl")])
    with contextlib.ExitStack() as stack:
        command = " ".join(Sandbox(SMALL, Level.FULL, gpu=True)._bubblewrap(stack, None))
        assert "--dev-bind /dev/nvidia0 /dev/nvidia0 --dev-bind /dev/nvidiactl /dev/nvidiactl" in command
        assert "nvidia" not in " ".join(Sandbox(SMALL, Level.FULL)._bubblewrap(stack, None))
    for gpu in (True, False):
        limited = dict(Sandbox(SMALL, Level.NO_CGROUP, gpu=gpu)._tops(None))
        assert (resource.RLIMIT_AS in limited) != gpu


def test_what_a_cell_prints_is_kept_up_to_a_limit():
    worker = started(probe().level, None)
    result = worker.run("for i in range(100):\n    print('x' * 100_000)")
    worker.end()
    assert result["ok"]
    assert sum(len(o["text"]) for o in result["outputs"]) < 500_000
    assert "more output than is kept" in result["outputs"][-1]["text"]


def test_a_worker_that_dies_starts_over_with_the_cells_before():
    worker = started(probe().level, None)
    assert worker.run("a = 5")["ok"]
    assert worker.run("import os\nos._exit(1)")["error"]["name"] == "ProcessEnded"
    assert worker.run("print(a + 1)")["outputs"][0]["text"] == "6\n"
    assert worker.troubles == {"crashed"}
    for _ in range(4):
        worker.run("import os\nos.kill(os.getpid(), 9)")
    assert worker.run("print(a)")["error"]["name"] == "NotRun"
    worker.end()


def test_ending_a_sandbox_leaves_no_process_and_no_group():
    zygote = Zygote(serve)
    worker = started(probe().level, zygote)
    worker.run("import subprocess\nfor _ in range(5): subprocess.Popen(['sleep', '77123'])")
    worker.end()
    zygote.end()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if "77123" in _text(p)]
    for parent in parents() or ():
        assert not list(parent.glob(f"llmlab-{os.getpid()}-*"))


def _text(file):
    try:
        return file.read_text()
    except OSError:
        return ""


@pytest.mark.skipif(parents() is None, reason="no control group may be made here")
def test_groups_of_killed_graders_are_swept_away():
    gone = subprocess.Popen(["true"])
    gone.wait()
    folders = [parent / f"llmlab-{gone.pid}-dead" for parent in parents()]
    for folder in folders:
        folder.mkdir()
    with group(f"{os.getpid()}-live", 2**28, 8) as live:
        sweep()
        assert all(folder.exists() for folder in live.folders)
    assert not [folder for folder in (*folders, *live.folders) if folder.exists()]
    assert str(live.folders[0]).startswith(str(ROOT))


def test_the_filter_refuses_what_it_lists_on_both_architectures():
    for machine, numbers in DENIED.items():
        program = seccomp_filter(machine)
        assert len(program) == 8 * (len(numbers) + 16)
        assert ARCHITECTURE[machine].to_bytes(4, "little") in program
        assert _run(program, ARCHITECTURE[machine], 0) == 0x7FFF0000
        assert _run(program, 0x1234, 0) == 0x80000000
        for number in numbers.values():
            assert _run(program, ARCHITECTURE[machine], number) == 0x00050001
        for family in range(64):
            allowed = _run(program, ARCHITECTURE[machine], SOCKET[machine], family) == 0x7FFF0000
            assert allowed == (family in FAMILIES.values())
    with pytest.raises(ValueError, match="no list of system calls for sparc"):
        seccomp_filter("sparc")


def _run(program, architecture, number, argument=0):
    """What a BPF machine returns for a call."""
    position, accumulator = 0, 0
    while True:
        code = int.from_bytes(program[8 * position : 8 * position + 2], "little")
        yes, no = program[8 * position + 2], program[8 * position + 3]
        k = int.from_bytes(program[8 * position + 4 : 8 * position + 8], "little")
        position += 1
        if code == 0x20:
            accumulator = {0: number, 4: architecture, 16: argument}[k]
        elif code == 0x15:
            position += yes if accumulator == k else no
        elif code == 0x35:
            position += yes if accumulator >= k else no
        else:
            return k


HEADERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.skipif(not HEADERS.exists() or platform.machine() != "x86_64", reason="the kernel's headers are not here")
def test_the_numbers_are_the_kernels():
    numbers = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", HEADERS.read_text()))
    assert {name: int(numbers[name]) for name in DENIED["x86_64"]} == DENIED["x86_64"]

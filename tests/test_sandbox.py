"""The sandbox: what it keeps in, found by trying; weaker levels by name; the limits and the filter."""

import contextlib
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llmlab.grading import probe as probing
from llmlab.grading.attempts import ATTEMPTS
from llmlab.grading.cgroup import ROOT, group, parents, sweep
from llmlab.grading.probe import probe, refusal, try_level
from llmlab.grading.sandbox import Level, Limits, Sandbox, SandboxError
from llmlab.grading.seccomp import (
    ALONE,
    ARCHITECTURE,
    DENIED,
    FAMILIES,
    NEWEST,
    SAME_USER,
    UNDONE,
    WEIGHED,
    seccomp_filter,
)
from llmlab.grading.session import Worker
from llmlab.grading.worker import main as serve
from llmlab.grading.zygote import Zygote

pytestmark = pytest.mark.sandbox
SMALL = Limits(seconds=20, cell_seconds=5, memory_bytes=256 * 2**20, processes=16, disk_bytes=4 * 2**20)


def test_the_probe_finds_the_strongest_level_in_under_a_second():
    """The best of three tries, as this machine runs other tests beside."""
    found = [probe() for _ in range(3)]
    assert {one.level for one in found} == {Level.FULL if parents() else Level.NO_CGROUP}
    assert found[0].is_sandbox
    assert min(one.seconds for one in found) < 1


@pytest.mark.parametrize("name", ATTEMPTS)
def test_the_probe_notices_what_gets_through(name, monkeypatch):
    """Each attempt is looked at: one that is made to work lowers the level."""
    monkeypatch.setitem(ATTEMPTS, name, lambda *_: True)
    assert name in try_level(Level.FULL) if parents() else True


def test_a_weaker_level_is_named_and_says_why():
    """In a process of its own: a fork may fill what is mapped already, and the tests' own process is large."""
    code = (
        "from llmlab.grading import probe as p\np.parents = lambda: None\nfound = p.probe()\n"
        "print(found.level.name, found.weaknesses[0], p.try_level(p.Level.NO_CGROUP), sep='|')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    level, why, got_through = said.strip().split("|")
    assert level == "NO_CGROUP"
    assert "no control group" in why
    assert got_through == "[]"
    assert "memory that a large grader had mapped and freed can be filled" in Level.NO_CGROUP.value


def test_without_bubblewrap_others_work_is_refused_with_the_mend(monkeypatch):
    for weaker in ("has_bubblewrap", "in_container"):
        monkeypatch.setattr(probing, weaker, lambda: False)
    monkeypatch.setattr(probing, "landlock_abi", lambda: 0)
    level, reason = refusal(unsandboxed=False)
    assert level is Level.NONE
    assert "sudo apt-get install bubblewrap" in reason
    assert refusal(unsandboxed=True) == (Level.NONE, "")


@pytest.mark.parametrize("said", list(probing.BLAMED))
def test_a_refusal_of_the_system_is_translated_into_its_mend(said, monkeypatch):
    def refuse(self, descriptor, zygote=None, start=""):
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


ALLOWED, KILLED, SKIPPED, REFUSED, ABSENT = 0x7FFF0000, 0x80000000, 0x00050000, 0x00050001, 0x00050026
KINDS_OF_FILTER = {
    "in namespaces": {},
    "alone": {"alone": True},
    "alone as the same user": {"alone": True, "own": 4711},
}


@pytest.mark.parametrize("kind", KINDS_OF_FILTER)
@pytest.mark.parametrize("machine", DENIED)
def test_the_filter_refuses_what_it_lists_on_both_architectures(machine, kind):
    def answer(number, *arguments):
        return _run(seccomp_filter(machine, **KINDS_OF_FILTER[kind]), ARCHITECTURE[machine], number, *arguments)

    listed = {"in namespaces": DENIED[machine], "alone": DENIED[machine] | ALONE[machine]}
    listed["alone as the same user"] = listed["alone"] | SAME_USER[machine]
    assert len(set(listed[kind].values())) == len(listed[kind])
    weighed = WEIGHED[machine]
    assert _run(seccomp_filter(machine, **KINDS_OF_FILTER[kind]), 0x1234, 0) == KILLED
    for number in range(NEWEST + 1):
        if number in UNDONE[machine].values():
            assert answer(number) == (SKIPPED if kind == "alone as the same user" else ALLOWED), number
        elif number not in weighed.values():
            assert answer(number) == (REFUSED if number in listed[kind].values() else ALLOWED), number
    assert answer(NEWEST + 1) == (ALLOWED if kind == "in namespaces" else ABSENT)
    assert answer(0x40000000) == REFUSED
    for family in range(64):
        among = kind == "in namespaces" and family in FAMILIES.values()
        assert (answer(weighed["socket"], family) == ALLOWED) == among


def test_without_namespaces_the_filter_leaves_pairs_of_sockets_and_threads():
    for machine, weighed in WEIGHED.items():
        for kind in ("alone", "alone as the same user"):
            program = seccomp_filter(machine, **KINDS_OF_FILTER[kind])

            def answer(name, *arguments, program=program, machine=machine, weighed=weighed):
                return _run(program, ARCHITECTURE[machine], weighed[name], *arguments)

            stream, datagram, raw, packets, flags = 1, 2, 3, 5, 0o2000000 | 0o4000
            assert {answer("socketpair", 1, of | flags) for of in (stream, packets)} == {ALLOWED}
            assert {answer("socketpair", 1, of | flags) for of in (datagram, raw, 4, 6, 0)} == {REFUSED}
            assert answer("socketpair", 30, stream) == REFUSED
            assert answer("clone", 0x01200011) == ALLOWED  # fork
            assert answer("clone", 0x003D0F00) == ALLOWED  # a thread
            for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
                assert answer("clone", namespace | 17) == REFUSED
            assert answer("clone3") == ABSENT


def test_as_the_same_user_the_filter_leaves_signals_to_itself_only():
    for machine, weighed in WEIGHED.items():
        for own, expected in ((4711, REFUSED), (0, ALLOWED)):
            program = seccomp_filter(machine, alone=True, own=own)

            def answer(name, *arguments, program=program, machine=machine, weighed=weighed):
                return _run(program, ARCHITECTURE[machine], weighed[name], *arguments)

            for name in ("kill", "tgkill", "prlimit64", "sched_setaffinity"):
                assert {answer(name, who) for who in (0, 4711)} == {ALLOWED}
                assert {answer(name, who) for who in (1, 4710, 4712, 0xFFFFFFFF, 0xFFFFFFFF - 4710)} == {expected}
            assert {answer("fcntl", 3, do) for do in (8, 10, 15)} == {expected}
            assert {answer("fcntl", 3, do) for do in (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 16, 1030)} == {ALLOWED}
            assert {answer("ioctl", 3, do) for do in (0x8901, 0x8902)} == {expected}
            assert {answer("ioctl", 3, do) for do in (0x5401, 0x8900, 0x8903)} == {ALLOWED}


def test_there_is_no_filter_for_an_architecture_that_is_not_known():
    with pytest.raises(ValueError, match="no list of system calls for sparc"):
        seccomp_filter("sparc")


def _run(program, architecture, number, *arguments):
    """What a BPF machine returns for a call."""
    told = {0: number, 4: architecture, **{16 + 8 * place: value for place, value in enumerate(arguments)}}
    position, accumulator = 0, 0
    while True:
        code = int.from_bytes(program[8 * position : 8 * position + 2], "little")
        yes, no = program[8 * position + 2], program[8 * position + 3]
        k = int.from_bytes(program[8 * position + 4 : 8 * position + 8], "little")
        position += 1
        if code == 0x20:
            accumulator = told.get(k, 0)
        elif code == 0x54:
            accumulator &= k
        elif code == 0x15:
            position += yes if accumulator == k else no
        elif code == 0x35:
            position += yes if accumulator >= k else no
        else:
            assert code == 0x06
            return k


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),  # the table that aarch64 has
}
TOO_NEW = {"fchmodat2"}  # of Linux 6.6: not in the headers of Debian 12


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_the_kernels(machine):
    if not HEADERS[machine].exists():
        pytest.skip("the kernel's headers are not here")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text()))
    ours = DENIED[machine] | ALONE[machine] | SAME_USER[machine] | UNDONE[machine] | WEIGHED[machine]
    assert ours.keys() - numbers.keys() <= TOO_NEW
    assert {name: int(numbers[name]) for name in ours if name in numbers} == {
        n: v for n, v in ours.items() if n in numbers
    }

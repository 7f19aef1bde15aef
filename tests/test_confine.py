"""The sandboxes without namespaces: Landlock, and another user in a container; what they keep in, and what they say."""

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from llmlab import diagnosis
from llmlab.grading import confine, landlock, sandbox
from llmlab.grading import probe as probing
from llmlab.grading.attempts import ATTEMPTS
from llmlab.grading.checks import _time_limit as time_limit
from llmlab.grading.command import NoSandbox, sandbox_level
from llmlab.grading.landlock import FILE_RIGHTS, LEAST_ABI, READ, WRITE, landlock_abi, rights
from llmlab.grading.probe import KNOWN_TO_WORK, Probe, probe, refusal, try_level
from llmlab.grading.proxies import StudentError
from llmlab.grading.sandbox import HOME, PACKAGE, Level, Limits, Sandbox
from llmlab.grading.session import Worker

pytestmark = pytest.mark.sandbox
SMALL = Limits(seconds=30, cell_seconds=15, memory_bytes=2**30, processes=32, disk_bytes=4 * 2**20)
ROOT = os.geteuid() == 0
AS_ROOT = pytest.mark.skipif(not ROOT, reason="only root can become another user")
WITH_LANDLOCK = pytest.mark.skipif(landlock_abi() < LEAST_ABI, reason="the kernel has no Landlock")


@pytest.fixture(scope="session")
def open_python():
    """A Python that another user can run, and what it reads: this one, or the system's with this one's packages."""
    packages = Path(importlib.util.find_spec("IPython").origin).parent.parent
    if confine.is_reachable(Path(sys.base_prefix)) and confine.is_reachable(Path(sys.prefix)):
        yield sys.executable, {**sandbox.python_binds(), packages: str(packages)}
        return
    system = Path(f"/usr/bin/python3.{sys.version_info.minor}")
    if not (system.exists() and confine.is_reachable(packages)):
        pytest.skip("no Python here that another user can run")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        subprocess.run([system, "-m", "venv", "--without-pip", name], check=True)
        beside = Path(name, "lib", f"python3.{sys.version_info.minor}", "site-packages", "beside.pth")
        beside.write_text(f"{packages}\n{PACKAGE.parent}\n")
        yield str(Path(name, "bin", "python")), {path: str(path) for path in (Path(name), packages, PACKAGE)}


@pytest.fixture
def supervised(monkeypatch):
    """Change what the supervisor finds, in its own process."""

    def change(*lines):
        told = "; ".join(("import sys", "import llmlab.grading.confine as c", *lines, "c.main(int(sys.argv[1]))"))
        monkeypatch.setattr(confine, "START", told)

    return change


NO_LANDLOCK, OLD_LANDLOCK = "c.landlock_abi = lambda: 0", "c.landlock_abi = lambda: 4"  # of Ubuntu 24.04
SAME_USER = "c._may_be_another = lambda told: False"
KINDS = [
    pytest.param((Level.LANDLOCK, SAME_USER), id="Landlock", marks=WITH_LANDLOCK),
    pytest.param((Level.LANDLOCK, SAME_USER, OLD_LANDLOCK), id="an older Landlock", marks=WITH_LANDLOCK),
    pytest.param((Level.LANDLOCK,), id="Landlock and another user", marks=(WITH_LANDLOCK, AS_ROOT)),
    pytest.param((Level.CONTAINER, NO_LANDLOCK), id="another user", marks=AS_ROOT),
]


@pytest.fixture(params=KINDS)
def kind(request, supervised, open_python, monkeypatch):
    """A level, and how it comes about; workers of it run in a Python that they can read."""
    level, *lines = request.param
    supervised(*lines)
    monkeypatch.setattr(sys, "executable", open_python[0])
    monkeypatch.setattr(sandbox, "python_binds", lambda: dict(open_python[1]))
    return level


@pytest.fixture
def worker(kind):
    with started(kind) as worker:
        yield worker


@contextlib.contextmanager
def started(level, **more):
    worker = Worker(Sandbox(SMALL, level, **more))
    try:
        yield worker
    finally:
        worker.end()


def said(result):
    assert result["ok"], result["error"]
    return "".join(output["text"] for output in result["outputs"])


@pytest.fixture
def host_folder():
    """A folder of the grader's where every user gets."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def wait_for(holds, seconds=10):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert holds()


def marked(mark):
    """Processes with a mark among their arguments; what a cell starts is told apart by it."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def test_what_gets_through_is_what_the_level_says(kind):
    assert try_level(kind) == []


@pytest.mark.parametrize("level", [Level.LANDLOCK, Level.CONTAINER])
def test_every_attempt_is_looked_at(level, monkeypatch, open_python):
    if level is Level.CONTAINER and not ROOT:
        pytest.skip("only root can become another user")
    monkeypatch.setattr(sys, "executable", open_python[0])
    monkeypatch.setattr(sandbox, "python_binds", lambda: dict(open_python[1]))
    start = "import sys; import llmlab.grading.attempts as a; a.ATTEMPTS = {n: lambda host: True for n in a.ATTEMPTS}; "
    monkeypatch.setattr(probing, "START", start + "a.main(int(sys.argv[1]))")
    assert try_level(level) == [name for name in ATTEMPTS if name not in KNOWN_TO_WORK[level]]


@pytest.mark.parametrize(
    ("level", "change", "expected"),
    [
        pytest.param(
            Level.LANDLOCK, "c.restrict = lambda *_: None", "read what is open to all users", marks=WITH_LANDLOCK
        ),
        pytest.param(Level.CONTAINER, "c.take_user = lambda user: None", "read the host", marks=AS_ROOT),
        pytest.param(Level.CONTAINER, "c._end = lambda *_: None", "outlive the parent", marks=AS_ROOT),
        pytest.param(
            Level.CONTAINER, "c.seccomp_filter = lambda **_: c.FREE", "reach a port of the host", marks=AS_ROOT
        ),
        pytest.param(
            Level.CONTAINER, "c.seccomp_filter = lambda **_: c.FREE", "reach a socket of the host", marks=AS_ROOT
        ),
    ],
)
def test_a_sandbox_that_lacks_a_part_is_found_out(level, change, expected, supervised, open_python, monkeypatch):
    monkeypatch.setattr(sandbox, "group", lambda *_: contextlib.nullcontext())  # ends what the supervisor does not
    # Where the first two work the process is not itself any more; the last takes long.
    left_out = ["trace processes", "make a user namespace", *({"outlive the parent"} - {expected})]
    free = struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)
    supervised(NO_LANDLOCK if level is Level.CONTAINER else "pass", f"c.FREE = {free!r}", change)
    monkeypatch.setattr(sys, "executable", open_python[0])
    monkeypatch.setattr(sandbox, "python_binds", lambda: dict(open_python[1]))
    monkeypatch.setattr(
        probing,
        "START",
        f"import sys; import llmlab.grading.attempts as a; [a.ATTEMPTS.pop(n) for n in {left_out}]; a.main(int(sys.argv[1]))",
    )
    assert expected in try_level(level)


def test_a_worker_has_no_rights_and_a_fresh_home_that_is_gone_afterwards(kind):
    with started(kind) as worker:
        look = (
            "import os, re, sys\nstatus = open('/proc/self/status').read()\n"
            "print(re.findall(r'CapEff:\\s*(\\w+)|NoNewPrivs:\\s*(\\d)|Seccomp:\\s*(\\d)', status), sorted(os.environ))\n"
            "print(os.listdir(os.path.expanduser('~')), 'files', len(os.listdir('/proc/self/fd')))\n"
            "import llmlab.config, subprocess\n"
            "print(subprocess.run(['sh', '-c', 'echo from a shell'], capture_output=True, text=True).stdout)\n"
            "print('home', os.getcwd(), os.getuid())"
        )
        told = said(worker.run(look))
        assert "('0000000000000000', '', ''), ('', '1', ''), ('', '', '2')" in told
        assert "LLMLAB" not in told
        assert "'.ipython'" in told
        assert "from a shell" in told
        assert "files 5\n" in told  # the standard ones, the grader's socket, and the list itself
        home, user = re.search(r"home (\S+) (\d+)", told).groups()
        assert Path(home).stat().st_mode & 0o077 == 0
        if kind is Level.CONTAINER:
            assert int(user) > 2**30
            assert confine.threads_of(int(user))
    assert not Path(home).exists()
    assert int(user) == os.geteuid() or not confine.threads_of(int(user))


def test_torch_and_its_threads_work(worker):
    assert (
        said(worker.run("import torch\nprint(float(torch.ones(300, 300).matmul(torch.ones(300, 300)).sum()))"))
        == "27000000.0\n"
    )
    assert (
        said(worker.run("import threading\nt = threading.Thread(target=print, args=['x'])\nt.start()\nt.join()"))
        == "x\n"
    )


def test_the_hosts_files_are_not_read_nor_changed(worker, host_folder):
    secret = host_folder / "closed" / "secret"
    secret.parent.mkdir(mode=0o700)
    secret.write_text("untouched")
    plain = host_folder / "open"
    plain.write_text("untouched")
    plain.chmod(0o644)
    before = plain.stat()
    attempts = f"""
import os
got = []
for what in (
    lambda: open({str(secret)!r}).read(), lambda: os.listdir({str(secret.parent)!r}),
    lambda: open({str(plain)!r}, "a"), lambda: os.truncate({str(plain)!r}, 0), lambda: os.chown({str(plain)!r}, os.getuid(), -1),
    lambda: os.unlink({str(plain)!r}), lambda: os.rename({str(plain)!r}, {str(plain)!r} + "-moved"),
    lambda: os.symlink("x", {str(host_folder / "link")!r}), lambda: os.link({str(secret)!r}, "linked"),
    lambda: os.setxattr({str(plain)!r}, "user.x", b"x"), lambda: open("/etc/shadow").read(),
    lambda: open("/proc/{os.getpid()}/environ").read(), lambda: open("/proc/sys/kernel/core_pattern", "w"),
):
    try:
        got.append(what())
    except OSError:
        pass
for what in (lambda: os.chmod({str(plain)!r}, 0o600), lambda: os.utime({str(plain)!r}, (1, 1))):
    try:
        what()
    except OSError:  # of Landlock's worker it says that it is done
        pass
print(got)
"""
    assert said(worker.run(attempts)) == "[]\n"
    assert (secret.read_text(), plain.read_text()) == ("untouched", "untouched")
    after = plain.stat()
    assert (before.st_mode, before.st_uid, before.st_mtime) == (after.st_mode, after.st_uid, after.st_mtime)
    assert {path.name for path in host_folder.iterdir()} == {"closed", "open"}


def test_the_grader_gets_no_signal_and_no_limit(worker):
    victim = subprocess.Popen(["sleep", "60"])
    attempts = f"""
import ctypes, fcntl, os, resource, signal
libc = ctypes.CDLL(None, use_errno=True)
got = []
def by_file(number):
    near, far = os.pipe()
    fcntl.fcntl(near, fcntl.F_SETOWN, number)
    fcntl.fcntl(near, 10, signal.SIGKILL)  # F_SETSIG
    fcntl.fcntl(near, fcntl.F_SETFL, os.O_ASYNC)
    os.write(far, b"x")
def by_call(result):
    if result < 0:
        raise OSError
for number in ({victim.pid}, {os.getpid()}, os.getppid()):
    for what in (
        lambda: os.kill(number, 0), lambda: os.kill(number, signal.SIGCONT), lambda: os.killpg(number, signal.SIGCONT),
        lambda: resource.prlimit(number, resource.RLIMIT_CPU, (0, 0)), lambda: os.sched_setaffinity(number, [0]),
        lambda: os.setpriority(os.PRIO_PROCESS, number, 19), lambda: os.pidfd_open(number),
        lambda: by_call(libc.tgkill(number, number, 0)), lambda: by_call(libc.syscall(200, number, 0)),
        lambda: by_call(libc.syscall(129, number, 0, ctypes.create_string_buffer(128))),
    ):
        try:
            what()
            got.append(number)
        except OSError:
            pass
    try:
        by_file(number)
    except OSError:  # another user may say so, and nothing is sent
        pass
print(got)
"""
    try:
        assert said(worker.run(attempts)) == "[]\n"
        assert victim.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        victim.kill()
        victim.wait()


def test_nobody_is_talked_to(worker):
    attempts = """
import ctypes, socket
got = []
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            got.append(socket.socket(family, kind))
        except OSError:
            pass
try:
    got.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
except OSError:
    pass
libc = ctypes.CDLL(None)
got += [number for number in (libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600), libc.semget(0, 1, 0o1600)) if number >= 0]
near, far = socket.socketpair()
near.sendall(b"among themselves")
print(got, far.recv(100))
"""
    assert said(worker.run(attempts)) == "[] b'among themselves'\n"


def test_what_leaves_its_session_is_dead_afterwards(kind):
    mark = f"llmlab-{os.urandom(4).hex()}"
    with started(kind) as worker:
        start = f"""
import os, subprocess, sys
for own_session in (True, False):
    try:
        subprocess.Popen(["sh", "-c", "(sleep 60; true) & (sleep 60; true)", {mark!r}], start_new_session=own_session)
    except OSError as error:
        print(error)
"""
        said(worker.run(start))
        wait_for(lambda: marked(mark))
    assert not marked(mark)


def test_what_is_left_in_shared_folders_is_removed(kind):
    mark = f"llmlab-{os.urandom(4).hex()}"
    folders = [folder for folder in ("/tmp", "/var/tmp", "/dev/shm") if Path(folder).is_dir()]
    with tempfile.TemporaryDirectory(dir="/tmp") as name, started(kind) as worker:
        Path(name).chmod(0o1777)
        leave = f"""
import os
left = []
for folder in {[*folders, name]!r}:
    try:
        os.makedirs(os.path.join(folder, {mark!r}, *"deeper" * 60))
        open(os.path.join(folder, {mark!r}, "file"), "w").close()
        os.chmod(os.path.join(folder, {mark!r}), 0)
        os.symlink("/etc", os.path.join(folder, {mark!r} + "-link"))
        left.append(folder)
    except OSError:
        pass
for _ in range(1500):
    os.mkdir("deep", 0o700)
    os.chdir("deep")
print(len(left))
"""
        assert said(worker.run(leave)) == ("5\n" if kind is Level.CONTAINER else "0\n").replace(
            "5", str(len(folders) + 1)
        )
        worker.end()
        assert not [place for folder in (*folders, name) for place in Path(folder).glob(f"{mark}*")]


def test_a_property_that_never_ends_is_ended_and_the_next_one_runs(worker):
    assert worker.run("import time\nstate = 1\ndef hang():\n    time.sleep(60)\ndef f():\n    return state")["ok"]
    values = worker.values(["hang", "f"])
    worker.checkpoint()
    for turn in range(3):
        if turn == 2:
            worker.go_to(0)
        with worker.property(), pytest.raises(TimeoutError), time_limit(0.5):
            values["hang"]()
        with worker.property():
            assert values["f"]() == 1
    assert not worker.troubles
    worker._control = worker._end_of_notebook
    assert said(worker.run("import threading\nprint(state, threading.active_count())")) == "1 1\n"


def test_a_crash_within_a_property_is_told_from_its_end(worker):
    assert worker.run("import ctypes\ndef crash():\n    ctypes.string_at(0)")["ok"]
    crash = worker.values(["crash"])["crash"]
    with worker.property(), pytest.raises(StudentError, match="the process of your code ended"):
        crash()
    assert worker.troubles == {"crashed"}


def test_the_models_are_found_in_the_home(kind, host_folder):
    near = host_folder / "models"
    far = host_folder / "closed" / "texts"
    for folder in (near, far):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    (far / "own").write_text("own")
    (far / "own").chmod(0o600)
    far.parent.chmod(0o700)
    readable = {folder: f"{HOME}/.cache/llmlab/{folder.name}" for folder in (near, far)}
    with started(kind, readable=readable) as worker:
        read = """
from pathlib import Path
cache = Path.home() / ".cache" / "llmlab"
print([(cache / name).read_text() for name in ("models/file", "texts/file", "texts/own")], (cache / "models").is_symlink())
for name in ("models/file", "texts/file", "texts/own"):
    try:
        (cache / name).write_text("changed")
    except OSError:
        pass
"""
        assert said(worker.run(read)) == "['models', 'texts', 'own'] True\n"
    assert ((near / "file").read_text(), (far / "file").read_text(), (far / "own").read_text()) == (
        "models",
        "texts",
        "own",
    )


@AS_ROOT
def test_two_workers_are_two_users(supervised, open_python, monkeypatch):
    supervised(NO_LANDLOCK)
    monkeypatch.setattr(sys, "executable", open_python[0])
    monkeypatch.setattr(sandbox, "python_binds", lambda: dict(open_python[1]))
    with started(Level.CONTAINER) as first, started(Level.CONTAINER) as second:
        about = "import os\nprint(os.getuid(), os.getgid(), os.getgroups(), os.getpid(), os.getcwd())"
        one, other = said(first.run(about)).split(), said(second.run(about)).split()
        assert one[0] == one[1] != other[0]
        assert one[2] == "[]"
        pry = f"""
import os
got = []
for what in (lambda: os.kill({one[3]}, 0), lambda: os.listdir({one[4]!r}), lambda: open("/proc/{one[3]}/environ").read()):
    try:
        got.append(what())
    except OSError:
        pass
print(got)
"""
        assert said(second.run(pry)) == "[]\n"
        second.end()
        assert first.run("pass")["ok"]


@AS_ROOT
def test_a_user_that_is_taken_is_not_taken_again(monkeypatch):
    drawn = [b"\1" * 8, b"\1" * 8, b"\2" * 8]
    monkeypatch.setattr(confine.os, "urandom", lambda count: drawn.pop(0))
    (first, lock), (second, other) = confine._own_user(), confine._own_user()
    lock.close()
    other.close()
    assert first != second
    assert abs(first - second) >= 2
    assert not drawn


@pytest.mark.parametrize("signalled", ["grader", "supervisor"])
def test_a_grader_or_supervisor_that_is_killed_leaves_nothing_running(kind, signalled):
    mark = f"llmlab-{os.urandom(4).hex()}"
    program = """
import json, sys, time
from pathlib import Path
from llmlab.grading import confine, sandbox
from llmlab.grading.sandbox import Level, Limits, Sandbox
from llmlab.grading.session import Worker
confine.START, sys.executable, binds, level, mark, memory = json.loads(sys.argv[1])
sandbox.python_binds = lambda: {Path(path): path for path in binds}
worker = Worker(Sandbox(Limits(seconds=60, memory_bytes=memory), Level[level]))
result = worker.run(f"import os, subprocess\\nsubprocess.Popen(['sh', '-c', 'sleep 60; true', {mark!r}])\\nprint(os.getcwd())")
print(result["outputs"][0]["text"].strip(), worker._sandbox.process.pid, flush=True)
time.sleep(60)
"""
    binds = [str(path) for path in sandbox.python_binds()]
    told = json.dumps([confine.START, sys.executable, binds, kind.name, mark, SMALL.memory_bytes])
    # As a program of this test's own Python, whatever the worker's is.
    grader = subprocess.Popen([sys._base_executable, "-c", program, told], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    try:
        home, supervisor = grader.stdout.readline().split()
        wait_for(lambda: marked(mark))
        assert Path(home).is_dir()
        if signalled == "grader":
            grader.kill()
            wait_for(lambda: not marked(mark) and not Path(home).exists())
            wait_for(
                lambda: not Path(f"/proc/{supervisor}").exists() or "Z" in Path(f"/proc/{supervisor}/stat").read_text()
            )
        else:
            worker = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])
            os.kill(int(supervisor), signal.SIGKILL)
            wait_for(lambda: not Path(f"/proc/{worker}/cwd").exists())
    finally:
        grader.kill()
        grader.wait()
        grader.stdout.close()
        for process in marked(mark):
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def test_a_process_without_end_does_not_outrun_its_end(kind):
    """Each is gone before it is looked at: a child that goes on is all that is left of it."""
    with started(kind) as worker:
        chain = """
import os
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass
    while True:
        if os.fork():
            os._exit(0)
print(os.getcwd())
"""
        home = said(worker.run(chain)).strip()
        began = time.monotonic()
    assert time.monotonic() - began < 8
    assert not [p for p in Path("/proc").glob("[0-9]*/cwd") if _link(p) == home]


def _link(path):
    try:
        return str(path.readlink()).removesuffix(" (deleted)")
    except OSError:
        return ""


# What the probe and the commands make of it.


def test_levels_are_tried_from_the_strongest_and_what_is_not_here_is_not_started(monkeypatch):
    tried = []
    monkeypatch.setattr(probing, "try_level", lambda level: tried.append(level) or ["it does not hold"])
    for name, value in (("has_bubblewrap", True), ("in_container", True), ("parents", ()), ("landlock_abi", LEAST_ABI)):
        monkeypatch.setattr(probing, name, lambda value=value: value)
    monkeypatch.setattr(probing.os, "geteuid", lambda: 0)
    assert probe().level is Level.NONE
    assert tried == [Level.FULL, Level.NO_CGROUP, Level.LANDLOCK, Level.CONTAINER]
    tried.clear()
    monkeypatch.setattr(probing, "has_bubblewrap", lambda: False)
    monkeypatch.setattr(probing, "landlock_abi", lambda: 2)
    monkeypatch.setattr(probing.os, "geteuid", lambda: 1000)
    assert probe().weaknesses == (
        "bubblewrap is not installed: sudo apt-get install bubblewrap",
        "the kernel's Landlock is too old (ABI 2; Linux 6.2 has 3)",
        "this is no container with root as the grader",
    )
    monkeypatch.setattr(probing, "landlock_abi", lambda: 0)
    assert "no Landlock in the kernel" in probe().weaknesses
    assert tried == []


@WITH_LANDLOCK
def test_without_bubblewrap_landlock_is_found_in_under_a_second(monkeypatch):
    monkeypatch.setattr(probing, "has_bubblewrap", lambda: False)
    found = probe()
    assert found.level is Level.LANDLOCK
    assert found.seconds < 1.5  # a second on an idle machine; this one runs other tests beside
    finding = diagnosis._sandbox()
    assert finding.present
    assert finding.found == Level.LANDLOCK.value
    assert "bubblewrap is not installed" in finding.mend


@pytest.mark.parametrize("level", [Level.NO_CGROUP, Level.LANDLOCK, Level.CONTAINER])
def test_every_weaker_level_is_warned_of(level, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(probing, "probe", lambda: Probe(level, ("why",), 0.1))
    tmp_path.chmod(0o700)
    assert sandbox_level(False, tmp_path) is level
    assert f"a weaker sandbox than usual ({level.value})" in capsys.readouterr().err
    monkeypatch.setattr(probing, "probe", lambda: Probe(Level.FULL, (), 0.1))
    assert sandbox_level(False, tmp_path) is Level.FULL
    assert capsys.readouterr().err == ""


def test_a_course_that_others_can_open_is_not_graded_by_another_user_alone(monkeypatch, host_folder, capsys):
    course = host_folder / "course"
    course.mkdir()
    monkeypatch.setattr(probing, "probe", lambda: Probe(Level.CONTAINER, ("no bubblewrap",), 0.1))
    for mode in (0o755, 0o751, 0o704):
        course.chmod(mode)
        assert f"chmod o-rwx {course}" in refusal(False, course)[1]
        with pytest.raises(NoSandbox) as refused:
            sandbox_level(False, course)
        assert refused.value.code == 3
        assert "no bubblewrap" in capsys.readouterr().err
    for mode, above in ((0o750, 0o755), (0o755, 0o750)):
        course.chmod(mode)
        host_folder.chmod(above)
        assert refusal(False, course) == (Level.CONTAINER, "")
    host_folder.chmod(0o755)
    monkeypatch.setattr(probing, "probe", lambda: Probe(Level.LANDLOCK, (), 0.1))
    assert refusal(False, course) == (Level.LANDLOCK, "")


@AS_ROOT
def test_a_python_that_others_cannot_read_is_named(host_folder, monkeypatch):
    host_folder.chmod(0o700)
    monkeypatch.setattr(sandbox, "python_binds", lambda: {host_folder: str(host_folder), PACKAGE: str(PACKAGE)})
    (reason,) = try_level(Level.CONTAINER)
    assert f"another user cannot read {host_folder}" in reason
    assert "Traceback" not in reason


# Landlock's numbers and calls.

HEADER = Path("/usr/include/linux/landlock.h")


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not here")
def test_the_rights_are_the_kernels():
    text = HEADER.read_text()
    theirs = {
        name: 1 << int(bit) for name, bit in re.findall(r"#define LANDLOCK_ACCESS_FS_(\w+)\s+\(1ULL << (\d+)\)", text)
    }
    assert len(theirs) >= 14
    assert {name: FILE_RIGHTS[name] for name in theirs} == theirs
    assert re.search(r"LANDLOCK_CREATE_RULESET_VERSION\s+\(1U << 0\)", text)
    assert re.search(r"LANDLOCK_RULE_PATH_BENEATH = 1", text)


def test_each_version_is_asked_for_what_it_knows():
    assert [rights(FILE_RIGHTS, abi) for abi in range(1, 8)] == [0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF, 0xFFFF, 0xFFFF]


class Kernel:
    """Landlock's system calls, written down."""

    def __init__(self, abi, refused=None):
        self.calls, self.abi, self.refused = [], abi, refused

    def syscall(self, number, *arguments):
        self.calls.append((number, *(a.value if isinstance(a, ctypes.c_long) else a for a in arguments)))
        if number == self.refused:
            ctypes.set_errno(1)
            return -1
        if number == 444:
            return self.abi if arguments[0] is None else os.open(os.devnull, os.O_RDONLY)
        return 0


@pytest.mark.parametrize(
    ("abi", "handled"),
    [(3, (0x7FFF, 0, 0)), (4, (0x7FFF, 3, 0)), (5, (0xFFFF, 3, 0)), (6, (0xFFFF, 3, 3)), (9, (0xFFFF, 3, 3))],
)
def test_the_calls_of_landlock(abi, handled, monkeypatch, tmp_path):
    kernel = Kernel(abi)
    monkeypatch.setattr(landlock, "_libc", kernel)
    file = tmp_path / "file"
    file.touch()
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert landlock_abi() == abi
    landlock.restrict(abi, [(tmp_path, WRITE), (file, READ), (tmp_path / "missing", READ)])
    asked, made, folder, plain, closed = kernel.calls
    assert asked == (444, None, 0, 1)
    assert made == (444, struct.pack("=QQQ", *handled), 24, 0)
    assert folder[2:3] == (1,)
    assert len(folder[3]) == 12
    assert struct.unpack("=Qi", folder[3])[0] == 0x7FFF & ~(1 << 6 | 1 << 11)  # no devices are made
    assert struct.unpack("=Qi", plain[3])[0] == 1 << 0 | 1 << 2  # to run and to read: what a file can have
    assert closed == (446, folder[1], 0)
    assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208


@pytest.mark.parametrize("refused", [444, 445, 446])
def test_a_refusal_of_landlock_is_an_error(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(landlock, "_libc", Kernel(6, refused))
    with pytest.raises(OSError, match=f"Landlock \\(system call {refused}\\): Operation not permitted"):
        landlock.restrict(6, [(tmp_path, READ)])
    monkeypatch.setattr(landlock, "_libc", Kernel(6, 444))
    assert landlock_abi() == 0


def test_a_container_is_known_by_its_marks(monkeypatch, tmp_path):
    mark = tmp_path / "mark"
    monkeypatch.setattr(confine, "CONTAINER_MARKS", (str(mark),))
    real, told = Path.read_bytes, {"environ": b"PATH=/bin\0"}
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: told["environ"] if str(self) == "/proc/1/environ" else real(self)
    )
    assert not confine.in_container()
    told["environ"] = b"PATH=/bin\0not_container=x\0"
    assert not confine.in_container()
    told["environ"] = b"PATH=/bin\0container=podman\0"
    assert confine.in_container()
    told["environ"] = b""
    mark.touch()
    assert confine.in_container()


def test_threads_are_counted_by_user():
    mine = os.geteuid()
    before = confine.threads_of(mine)
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert before > 0
        assert confine.threads_of(2**31 - 5) == 0
        assert any(confine.threads_of(mine) > 0 for _ in range(3))
    finally:
        over.set()
        thread.join()

"""Attacks that want to be there later: processes that stay, files and memory that the next submission meets."""

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from unittest.mock import patch

import pytest

from attacks.harness import TRIPLE_ONLY, Attack, code, graded, notebook, said, submission

UNTOUCHED = "student-01: 0 points"


def gradebook(ground):
    return ground.canary("gradebook.csv", UNTOUCHED)


def mark(ground):
    """What tells an attack's processes and files from all others."""
    return f"llmlab-attack-{zlib.crc32(str(ground.folder).encode()):08x}"


def processes(ground):
    """Those of this machine, sandboxed or not, that carry the attack's mark as an argument or as their name."""
    wanted, found = mark(ground).encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "cmdline").read_bytes() or wanted[-15:] == (folder / "comm").read_bytes().strip():
                found.append(int(folder.name))
    return found


def kill(ground):
    for process in processes(ground):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def wait_for(holds, seconds=8):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds()


def named(ground):
    """Code that gives a process the attack's name; without it a fork looks like its parent."""
    return f"import ctypes; ctypes.CDLL(None).prctl(15, {mark(ground)[-15:].encode()!r}, 0, 0, 0)"


def leaves_nothing_running(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert not processes(ground)
    time.sleep(1.5)
    assert gradebook(ground).read_text() == UNTOUCHED


def what_the_next_sees(ground, text, spy):
    """The output of ``spy``, run as another student's cell right after the attack, in the same run of the grader."""
    bundles = [ground.bundle(text), ground.bundle(submission(before=spy), student="student-02")]
    return said(graded(bundles, jobs=1)[1])


def forked_twice(ground):
    return submission(before=f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 3)
        {named(ground)}
        time.sleep(1)
        open({str(gradebook(ground))!r}, "w").write("student-01: 100 points")
        time.sleep(20)
    os._exit(0)
os.wait()
""")  # fmt: skip


def forked_twice_bites(ground):
    try:
        ground.plain(forked_twice(ground))
        assert gradebook(ground).read_text() == UNTOUCHED
        wait_for(lambda: gradebook(ground).read_text() != UNTOUCHED)
    finally:
        kill(ground)


def daemon(ground):
    program = f"""
import signal, time
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
time.sleep(20)
"{mark(ground)}"
"""
    return submission(before=f"""
import subprocess, sys
quiet = subprocess.DEVNULL
subprocess.Popen([sys.executable, "-I", "-c", {program!r}], start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
""")  # fmt: skip


def daemon_bites(ground):
    try:
        ground.plain(daemon(ground))
        (process,) = processes(ground)
        time.sleep(0.5)
        os.kill(process, signal.SIGTERM)
        time.sleep(0.2)
        assert processes(ground) == [process]
    finally:
        kill(ground)


# The notebook's own process ends; a child keeps its sockets and pipes open, so that whoever reads them waits.
def held_socket(ground):
    return submission(before=f"""
import os, time
if os.fork() == 0:
    {named(ground)}
    time.sleep(30)
os._exit(0)
""")  # fmt: skip


def held_socket_contained(result, ground):
    assert result["status"] in ("timeout", "crashed")
    assert result["score"] == TRIPLE_ONLY
    assert not processes(ground)


def held_socket_bites(ground):
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            ground.plain(held_socket(ground), seconds=4)
        assert processes(ground)
    finally:
        kill(ground)


# A child that no test waits for changes the answer of a later property, from outside of its process.
def watcher(ground):
    return submission(
        before=f"""
import os, time
from pathlib import Path
if os.fork() == 0:
    os.closerange(0, 3)
    {named(ground)}
    for _ in range(1000):
        Path("answer").write_text("planted")
        time.sleep(0.02)
    os._exit(0)
time.sleep(0.2)
""",
        after="print(open('answer').read())",
    )


def watcher_contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert not processes(ground)
    spy = "from pathlib import Path\nprint('sees', Path('answer').exists())"
    assert "sees False" in what_the_next_sees(ground, watcher(ground), spy)


def watcher_bites(ground):
    folder = ground.folder / "plain"
    try:
        ground.plain(watcher(ground))
        (folder / "answer").unlink()
        wait_for((folder / "answer").exists)
    finally:
        kill(ground)


# Files that a shell, IPython or Python reads when it starts.
def planted_in_home(ground, *files, content):
    return submission(before=f"""
import os
from pathlib import Path
for name in {files!r}:
    file = Path(os.environ["HOME"], name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text({content!r})
""")  # fmt: skip


def shell_files(ground):
    files = (".bashrc", ".bash_profile", ".profile", ".config/cron/crontab")
    return planted_in_home(ground, *files, content=f"echo '100 points' > '{gradebook(ground)}'\n")


def ipython_files(ground):
    content = f"open({str(gradebook(ground))!r}, 'w').write('100 points')\n"
    name = f".local/lib/python3.{sys.version_info.minor}/site-packages/usercustomize.py"
    return planted_in_home(ground, ".ipython/profile_default/startup/00-first.py", name, content=content)


def home_is_fresh(attack):
    def contained(result, ground):
        assert result["score"] == TRIPLE_ONLY
        spy = "import os\nfrom pathlib import Path\nfiles = [f for f in Path(os.environ['HOME']).rglob('*') if f.is_file()]\n"
        spy += "print('sees', [str(f) for f in files if b'100 ' + b'points' in f.read_bytes()])"
        assert "sees []" in what_the_next_sees(ground, attack(ground), spy)
        assert gradebook(ground).read_text() == UNTOUCHED

    return contained


def starts_later(attack, *command):
    """In a home of its own, the attack and then, a while later, an innocent program."""

    def bites(ground):
        home = ground.folder / "home"
        home.mkdir()
        with patch.dict(os.environ, {"HOME": str(home)}):
            ground.plain(attack(ground))
            assert gradebook(ground).read_text() == UNTOUCHED
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, cwd=home)
        assert gradebook(ground).read_text() != UNTOUCHED

    return bites


# The first folder of Python's path that can be written; where packages are, everybody would import it.
def planted_package(ground):
    return submission(before=f"""
import sys
from pathlib import Path
planted = "nowhere"
for folder in filter(None, sys.path):
    try:
        Path(folder, "{mark(ground)}.pth").write_text("# planted")
    except OSError:
        continue
    planted = folder
    break
print("planted", planted)
""")  # fmt: skip


def planted_package_contained(result, ground):
    # A checkout below /tmp has its folders in the sandbox's own, which vanishes; the packages are read-only wherever it is.
    planted = said(result).rpartition("planted ")[2].strip()
    assert planted == "nowhere" or (planted.startswith("/tmp/") and "site-packages" not in planted)
    assert not [f for f in map(Path, filter(None, sys.path)) if (f / f"{mark(ground)}.pth").exists()]


def planted_package_bites(ground):
    site = ground.folder / "site"
    site.mkdir()
    with patch.dict(os.environ, {"PYTHONPATH": str(site)}):
        assert f"planted {site}" in ground.plain(planted_package(ground))["outputs"]
    assert (site / f"{mark(ground)}.pth").exists()


# The package that the next submission's tests import, changed where it lies.
def patched_package(ground):
    return submission(before="""
import llmlab.grading.checks as checks
from pathlib import Path
try:
    file = Path(checks.__file__)
    file.chmod(0o644)
    with file.open("a") as handle:
        handle.write("\\nplanted = True\\n")
    print("patched")
except OSError as error:
    print("refused", error)
""")  # fmt: skip


def patched_package_contained(result, ground):
    assert "refused" in said(result)
    assert result["score"] == TRIPLE_ONLY
    source = Path(importlib.util.find_spec("llmlab.grading.checks").origin).read_text(encoding="utf-8")
    assert "planted" not in source


def patched_package_bites(ground):
    copy = ground.folder / "site" / "llmlab"
    package = Path(importlib.util.find_spec("llmlab").origin).parent
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "data"))
    with patch.dict(os.environ, {"PYTHONPATH": str(copy.parent)}):
        assert "patched" in ground.plain(patched_package(ground))["outputs"]
        honest = "import llmlab.grading.checks as checks\nprint('planted', checks.planted)"
        assert "planted True" in ground.plain(submission(before=honest))["outputs"]


# The same in memory: whoever is graded in this process later meets it.
PATCHED_MEMORY = """
import builtins, random, sys
import llmlab.grading.checks as checks
checks.equal = lambda got, expected: None
random.Random.randrange = lambda self, *bounds: 1
builtins.planted = sys.modules["planted"] = "planted"
"""
MEMORY_SPY = """
import builtins, random, sys
import llmlab.grading.checks as checks
marks = [checks.equal.__name__ != "equal", random.Random(1).randrange(10**9) == 1, hasattr(builtins, "planted")]
print("sees", *marks, "planted" in sys.modules)
"""


def patched_memory_contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert "sees False False False False" in what_the_next_sees(ground, submission(before=PATCHED_MEMORY), MEMORY_SPY)


def patched_memory_bites(ground):
    both = notebook([code(PATCHED_MEMORY), code(MEMORY_SPY)])
    assert "sees True True True True" in ground.plain(both)["outputs"]


def leftovers(ground):
    return submission(before=f"""
from pathlib import Path
for folder in ("/tmp", "/dev/shm", "/var/tmp"):
    try:
        Path(folder, "{mark(ground)}").write_text("def double(n): return n * 2")
    except OSError:
        pass
""")  # fmt: skip


LEFTOVER_FOLDERS = ("/tmp", "/dev/shm", "/var/tmp")


def leftovers_spy(ground):
    return f"from pathlib import Path\nprint('sees', [f for f in {LEFTOVER_FOLDERS} if Path(f, '{mark(ground)}').exists()])"


def leftovers_contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert not [f for f in LEFTOVER_FOLDERS if Path(f, mark(ground)).exists()]
    assert "sees []" in what_the_next_sees(ground, leftovers(ground), leftovers_spy(ground))


def leftovers_bite(ground):
    try:
        ground.plain(leftovers(ground))
        outputs = ground.plain(submission(before=leftovers_spy(ground)))["outputs"]
        assert f"sees {list(LEFTOVER_FOLDERS)}" in outputs
    finally:
        for folder in LEFTOVER_FOLDERS:
            Path(folder, mark(ground)).unlink(missing_ok=True)


# System V shared memory has a number in place of a name, and stays when its last process ends.
def key(ground):
    return 0x4C000000 | zlib.crc32(str(ground.folder).encode()) & 0xFFFFFF


def shared_memory(ground):
    return submission(before=f"""
import ctypes
print("segment", ctypes.CDLL(None).shmget({key(ground)}, 4096, 0o1600))
""")  # fmt: skip


def segment(ground):
    return ctypes.CDLL(None).shmget(key(ground), 0, 0)


def shared_memory_contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert segment(ground) == -1
    spy = f"import ctypes\nprint('sees', ctypes.CDLL(None).shmget({key(ground)}, 0, 0))"
    assert "sees -1" in what_the_next_sees(ground, shared_memory(ground), spy)


def shared_memory_bites(ground):
    try:
        ground.plain(shared_memory(ground))
        assert segment(ground) >= 0
    finally:
        ctypes.CDLL(None).shmctl(segment(ground), 0, None)


# A name in no file system: who listens on it is found by every process of the machine.
def abstract_socket(ground):
    return submission(before=f"""
import os, socket, time
server = socket.socket(socket.AF_UNIX)
server.bind("\\0{mark(ground)}")
server.listen()
if os.fork() == 0:
    os.closerange(0, 3)
    {named(ground)}
    time.sleep(20)
    os._exit(0)
""")  # fmt: skip


def reaches(ground):
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(f"\0{mark(ground)}")
        except OSError:
            return False
    return True


def abstract_socket_contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert not processes(ground)
    assert not reaches(ground)


def abstract_socket_bites(ground):
    try:
        ground.plain(abstract_socket(ground))
        assert reaches(ground)
    finally:
        kill(ground)


# Code that waits for the process to end, or to be ended.
def last_words(ground):
    return submission(before=f"""
import atexit, signal, threading, weakref

def write(*_):
    with open({str(gradebook(ground))!r}, "a") as file:
        file.write(" no, 100")

class Left: pass

left = Left()
atexit.register(write)
weakref.finalize(left, write)
threading._register_atexit(write)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
    signal.signal(number, write)
""")  # fmt: skip


def last_words_bite(ground):
    ground.plain(last_words(ground))
    assert gradebook(ground).read_text().count("no, 100") == 3


# The grader imports what lies beside it; compiled files are believed by their time alone.
def compiled_files(ground):
    return submission(before=f"""
import importlib.util, sys
from pathlib import Path
planted = 0
for folder in [f for f in sys.path if f] + [str(Path(m.__file__).parent) for m in list(sys.modules.values()) if getattr(m, "__file__", None)]:
    try:
        cache = Path(folder, "__pycache__")
        cache.mkdir(exist_ok=True)
        Path(cache, "{mark(ground)}.cpython-311.pyc").write_bytes(b"")
    except OSError:
        continue
    planted += 1
    break
print("planted", planted)
""")  # fmt: skip


def compiled_files_contained(result, ground):
    places = [
        *filter(None, sys.path),
        *(str(Path(m.__file__).parent) for m in list(sys.modules.values()) if getattr(m, "__file__", None)),
    ]
    assert not [place for place in places if Path(place, "__pycache__", f"{mark(ground)}.cpython-311.pyc").exists()]
    assert result["score"] == TRIPLE_ONLY


def compiled_files_bite(ground):
    site = ground.folder / "site"
    site.mkdir()
    with patch.dict(os.environ, {"PYTHONPATH": str(site)}):
        assert "planted 1" in ground.plain(compiled_files(ground))["outputs"]
    assert list(site.glob(f"__pycache__/{mark(ground)}*"))


ATTACKS = [
    Attack(
        "persistence", "a process forked twice that later edits the gradebook", forked_twice, leaves_nothing_running,
        forked_twice_bites,
    ),
    Attack("persistence", "a daemon in a session of its own", daemon, leaves_nothing_running, daemon_bites),
    Attack(
        "persistence", "a child that holds the socket of an ended process", held_socket, held_socket_contained,
        held_socket_bites,
    ),
    Attack("persistence", "a process that writes an answer again and again", watcher, watcher_contained, watcher_bites),
    Attack(
        "persistence", "files that a shell reads when it starts", shell_files, home_is_fresh(shell_files),
        starts_later(shell_files, "bash", "-l", "-c", "true"),
    ),
    Attack(
        "persistence", "files that IPython reads when it starts", ipython_files, home_is_fresh(ipython_files),
        starts_later(ipython_files, sys.executable, "-m", "IPython", "-c", "pass"),
    ),
    Attack(
        "persistence", "a .pth file among the packages", planted_package, planted_package_contained,
        planted_package_bites,
    ),
    Attack(
        "persistence", "the checks changed where they lie", patched_package, patched_package_contained,
        patched_package_bites,
    ),
    Attack(
        "persistence", "compiled files beside the modules", compiled_files, compiled_files_contained,
        compiled_files_bite,
    ),
    Attack(
        "persistence", "modules changed in memory", lambda g: submission(before=PATCHED_MEMORY),
        patched_memory_contained, patched_memory_bites,
    ),
    Attack("persistence", "files left in the shared folders", leftovers, leftovers_contained, leftovers_bite),
    Attack(
        "persistence", "shared memory that stays without a process", shared_memory, shared_memory_contained,
        shared_memory_bites,
    ),
    Attack(
        "persistence", "a listener on an abstract socket", abstract_socket, abstract_socket_contained,
        abstract_socket_bites,
    ),
    Attack(
        "persistence", "handlers that run when the process ends", last_words, leaves_nothing_running, last_words_bite
    ),
]  # fmt: skip

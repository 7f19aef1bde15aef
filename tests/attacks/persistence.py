"""Attacks that want to be there later: processes that stay, files and memory that the next submission meets."""

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

from attacks.harness import ON_GROUND, TRIPLE_ONLY, Attack, Fault, Plain, graded, said, submission

UNTOUCHED = "student-01: 0 points"
STAYS = 200  # seconds that a process stays where nothing ends it; what tries it ends it


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


def ended_at_last(make):
    """The attack's text, of which no process stays when it has been tried."""

    def text(ground):
        ground.open.callback(kill, ground)
        return make(ground)

    return text


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
        time.sleep({STAYS})
    os._exit(0)
os.wait()
""")  # fmt: skip


def gradebook_is_edited(graded, ground):
    wait_for(lambda: gradebook(ground).read_text() != UNTOUCHED)
    assert processes(ground)


def daemon(ground):
    program = f"""
import signal, time
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
time.sleep({STAYS})
"{mark(ground)}"
"""
    return submission(before=f"""
import subprocess, sys
quiet = subprocess.DEVNULL
subprocess.Popen([sys.executable, "-I", "-c", {program!r}], start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
""")  # fmt: skip


def daemon_stays(graded, ground):
    (process,) = processes(ground)
    os.kill(process, signal.SIGTERM)
    time.sleep(0.2)
    assert processes(ground) == [process]


# The notebook's own process ends; a child keeps its sockets and pipes open, so that whoever reads them waits.
def held_socket(ground):
    return submission(before=f"""
import os, time
if os.fork() == 0:
    {named(ground)}
    time.sleep({STAYS})
os._exit(0)
""")  # fmt: skip


def held_socket_contained(result, ground):
    assert result["status"] in ("timeout", "crashed")
    assert result["score"] == TRIPLE_ONLY
    assert not processes(ground)


def child_stays_and_nothing_is_graded(graded, ground):
    assert graded.score is None
    assert processes(ground)


# A child that no test waits for changes the answer of a later property, from outside of its process.
def watcher(ground):
    return submission(
        before=f"""
import os, time
from pathlib import Path
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 3)
    {named(ground)}
    for _ in range({50 * STAYS}):
        try:
            Path("answer").write_text("planted")
        except OSError:
            pass
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


def answer_comes_back(graded, ground):
    (graded.folder / "answer").unlink()
    wait_for((graded.folder / "answer").exists)


# Files that a shell, IPython or Python reads when it starts.
def planted_in_home(ground, *files, content):
    return submission(before=f"""{ON_GROUND}
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


def starts_later(*command):
    """In the instructor's home: an innocent program, a while later."""

    def bites(graded, ground):
        home = graded.folder.parents[2] / "home"
        gradebook(ground).write_text(UNTOUCHED)
        environment = {**os.environ, "HOME": str(home)}
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, cwd=home, env=environment)
        assert gradebook(ground).read_text() != UNTOUCHED

    return Plain(bites)


def site(graded):
    """Where the instructor's packages lie."""
    return graded.folder.parents[2] / "site"


# The first folder of Python's path that can be written; where packages are, everybody would import it.
def planted_package(ground):
    return submission(before=f"""{ON_GROUND}
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


def package_is_planted(graded, ground):
    assert f"planted {site(graded)}" in graded.said
    assert (site(graded) / f"{mark(ground)}.pth").exists()


# The package that the next submission's tests import, changed where it lies.
def patched_package(ground):
    return submission(before=ON_GROUND + """
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


def package_is_patched(graded, ground):
    assert "patched" in graded.said
    assert "planted" in (site(graded) / "llmlab" / "grading" / "checks.py").read_text(encoding="utf-8")


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


def leftovers(ground):
    ground.open.callback(clear_folders, ground)
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


def clear_folders(ground):
    for folder in LEFTOVER_FOLDERS:
        Path(folder, mark(ground)).unlink(missing_ok=True)


def leftovers_stay(graded, ground):
    assert [folder for folder in LEFTOVER_FOLDERS if Path(folder, mark(ground)).exists()] == list(LEFTOVER_FOLDERS)


# System V shared memory has a number in place of a name, and stays when its last process ends.
def key(ground):
    return 0x4C000000 | zlib.crc32(str(ground.folder).encode()) & 0xFFFFFF


def shared_memory(ground):
    ground.open.callback(lambda: ctypes.CDLL(None).shmctl(segment(ground), 0, None))
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


def segment_stays(graded, ground):
    assert segment(ground) >= 0


# A name in no file system: who listens on it is found by every process of the machine.
def abstract_socket(ground):
    return submission(before=f"""
import os, socket, time
server = socket.socket(socket.AF_UNIX)
server.bind("\\0{mark(ground)}")
server.listen()
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 3)
    {named(ground)}
    time.sleep({STAYS})
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


def listens_on(graded, ground):
    assert reaches(ground)


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


def last_words_are_written(graded, ground):
    assert "no, 100" in gradebook(ground).read_text()


# The grader imports what lies beside it; compiled files are believed by their time alone.
def compiled_files(ground):
    return submission(before=f"""{ON_GROUND}
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


def compiled_files_stay(graded, ground):
    assert list(site(graded).glob(f"**/__pycache__/{mark(ground)}*"))


ATTACKS = [
    Attack(
        "persistence", "a process forked twice that later edits the gradebook", ended_at_last(forked_twice),
        leaves_nothing_running, Plain(gradebook_is_edited),
    ),
    Attack(
        "persistence", "a daemon in a session of its own", ended_at_last(daemon), leaves_nothing_running,
        Plain(daemon_stays),
    ),
    Attack(
        "persistence", "a child that holds the socket of an ended process", ended_at_last(held_socket),
        held_socket_contained, Plain(child_stays_and_nothing_is_graded),
    ),
    Attack(
        "persistence", "a process that writes an answer again and again", ended_at_last(watcher), watcher_contained,
        Plain(answer_comes_back),
    ),
    Attack(
        "persistence", "files that a shell reads when it starts", shell_files, home_is_fresh(shell_files),
        starts_later("bash", "-l", "-c", "true"),
    ),
    Attack(
        "persistence", "files that IPython reads when it starts", ipython_files, home_is_fresh(ipython_files),
        starts_later(sys.executable, "-m", "IPython", "-c", "pass"),
    ),
    Attack(
        "persistence", "a .pth file among the packages", planted_package, planted_package_contained,
        Plain(package_is_planted),
    ),
    Attack(
        "persistence", "the checks changed where they lie", patched_package, patched_package_contained,
        Plain(package_is_patched),
    ),
    Attack(
        "persistence", "compiled files beside the modules", compiled_files, compiled_files_contained,
        Plain(compiled_files_stay),
    ),
    Attack("persistence", "files left in the shared folders", leftovers, leftovers_contained, Plain(leftovers_stay)),
    Attack(
        "persistence", "shared memory that stays without a process", shared_memory, shared_memory_contained,
        Plain(segment_stays),
    ),
    Attack(
        "persistence", "a listener on an abstract socket", ended_at_last(abstract_socket), abstract_socket_contained,
        Plain(listens_on),
    ),
    Attack(
        "persistence", "handlers that run when the process ends", last_words, leaves_nothing_running,
        Plain(last_words_are_written),
    ),
]  # fmt: skip
FAULTS = [Fault("modules changed in memory", lambda g: submission(before=PATCHED_MEMORY), patched_memory_contained)]

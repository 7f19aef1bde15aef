"""Attacks on what a submission may take: time, memory, disk, processes, and room in what it says."""

import json
import re
from dataclasses import replace
from pathlib import Path

from attacks.harness import (
    FULL,
    LIMITS,
    TRIPLE_ONLY,
    Attack,
    Fault,
    Plain,
    code,
    error_names,
    notebook,
    said,
    submission,
)
from llmlab.grading.wire import MOST_BYTES

PATIENT = replace(LIMITS, seconds=60, property_seconds=20)  # for what is stopped by size, on a busy machine too
QUICK = replace(LIMITS, seconds=15, cell_seconds=3, property_seconds=1)  # for what is stopped by time alone
MOST_TEXT = 250_000  # characters that one cell may leave in a result, give or take
CONTROL = """
import gc, struct, time
from llmlab.grading.wire import Channel
control = next(c for c in gc.get_objects() if type(c) is Channel)
"""


def cells_of(text):
    return json.loads(text)["cells"]


def number(text, name):
    """The number that an attack printed behind a name."""
    return int(re.search(rf"{name} (\d+)", text)[1])


def keeps_triple(*statuses):
    def contained(result, ground):
        assert result["score"] == TRIPLE_ONLY
        assert result["status"] in statuses

    return contained


def says(name, count):
    """The attack got as much as it wanted."""

    def bites(graded, ground):
        assert number(graded.said, name) == count

    return Plain(bites)


def fills(size):
    """The file that is kept of it is as large."""

    def bites(graded, ground):
        assert sum(file.stat().st_size for file in graded.folder.glob("*.ipynb")) >= size

    return Plain(bites)


def loses_the_rest(graded, ground):
    """What stands behind it is never reached, for all that nbgrader interrupts a cell that takes too long."""
    assert graded.score is None or graded.score < TRIPLE_ONLY


STOPS_ALL = Plain(loses_the_rest, alone=True, options=("--Execute.timeout=3",))


# Processes that sleep; the cell catches what refuses it more, and says how many it has.
FORKS = """
import os, time
from pathlib import Path
children = []
try:
    for _ in range(300):
        child = os.fork()
        if child == 0:
            os.closerange(0, 3)
            time.sleep(20)
            os._exit(0)
        children.append(child)
except OSError:
    pass
Path("children").write_text(" ".join(map(str, children)))
print("children", len(children))
"""


def forks_contained(result, ground):
    assert result["status"] in ("ok", "crashed", "timeout")
    assert result["score"] <= TRIPLE_ONLY  # its own later properties find no room for a process
    assert all(int(n) < LIMITS.processes for n in re.findall(r"children (\d+)", said(result)))


MEMORY = """
def double(n):
    held = []
    for _ in range(700):
        held.append(b"x" * 2**20)
    print("megabytes", len(held))
    return 7
"""
MEMORY_AT_LAST = "print('megabytes', 700 if double(1) == 7 else 0)"

# The pages belong to a file without a name, in no file system and in no process's address space.
NAMELESS_FILE = """
import os
handles = []
for _ in range(70):
    handles.append(os.memfd_create("held"))
    for _ in range(10):
        os.write(handles[-1], bytes(2**20))
print("megabytes", 700)
"""


def memory_contained(result, ground):
    assert result["status"] == "out of memory"
    assert "megabytes 700" not in said(result)
    assert result["score"] == TRIPLE_ONLY


def nameless_file_contained(result, ground):
    assert result["status"] in ("out of memory", "ok")
    assert "megabytes 700" not in said(result)


# Small files, so that no limit on one file's size helps.
DISK = """
import os, tempfile
from pathlib import Path
for name, folder in (("tmp", "/tmp"), ("shm", "/dev/shm"), ("home", os.getcwd())):
    written = 0
    try:
        for n in range(16):
            Path(folder, f"llmlab-attack-flood-{n}").write_bytes(bytes(4 * 2**20))
            written += 4
    except OSError:
        pass
    print(name, written)
"""


def disk_contained(result, ground):
    assert (result["status"], result["score"]) == ("ok", TRIPLE_ONLY)
    assert all(number(said(result), name) <= LIMITS.disk_bytes / 2**20 for name in ("tmp", "shm", "home"))


def fill_disks(ground):
    ground.open.callback(clear_disks)
    return submission(before=DISK)


def clear_disks():
    for folder in ("/tmp", "/dev/shm"):
        for file in Path(folder).glob("llmlab-attack-flood-*"):
            file.unlink()


def disks_are_full(graded, ground):
    assert [number(graded.said, name) for name in ("tmp", "shm", "home")] == [64, 64, 64]


FLOOD = "for _ in range(40):\n    print('x' * 2**20)"
HUGE_REPR = "class Huge:\n    def __repr__(self):\n        return 'x' * 40 * 2**20\n\nHuge()"
MANY_OUTPUTS = "for n in range(2000):\n    display(n)"


def text_contained(result, ground):
    assert (result["status"], result["score"]) == ("ok", TRIPLE_ONLY)
    assert len(json.dumps(result)) < 2 * MOST_TEXT


def many_outputs_contained(result, ground):
    assert (result["status"], result["score"]) == ("ok", TRIPLE_ONLY)
    assert max(len(cell["outputs"]) for cell in result["cells"]) <= 1000


def all_outputs_are_kept(graded, ground):
    assert "\n1999\n" in graded.said


# Each cell keeps to what a cell may say; a control character takes six bytes of JSON.
CHATTER = notebook([*cells_of(submission()), *(code("print('\\x01' * 199_000)") for _ in range(80))])


def chatter_contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert len(json.dumps(result)) <= MOST_BYTES


LONG_NAME = "raise type('\\x01' * 10**7, (Exception,), {})()"


def long_name_contained(result, ground):
    assert result["score"] == TRIPLE_ONLY
    assert len(json.dumps(result)) < 2 * MOST_TEXT


LONG_MESSAGE = "def double(n):\n    raise ValueError('x' * 30 * 2**20)"
# Within the size of a message, but each part of it is an object to whoever reads it.
MANY_PARTS = "def double(n):\n    return [None] * 7_000_000"
TOO_LARGE = "def double(n):\n    return 'x' * 100 * 2**20"
DEEP = "def double(n):\n    deep = []\n    for _ in range(100_000):\n        deep = [deep]\n    return deep"

LOOP = "while True:\n    pass"
DEAF_LOOP = """
import signal

def double(n):
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            while True: pass
        except BaseException: pass
"""
WAITING = "import os\n\nread, write = os.pipe()\nos.read(read, 1)"
# Hashing lets go of Python's lock: every core is busy, and no handler of Python's runs before it ends.
HASHING = """
import hashlib, threading

def double(n):
    threads = [
        threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"x", b"y", 10**9), daemon=True) for _ in range(2)
    ]
    for thread in threads: thread.start()
    return hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
"""
STOPPED = "import os, signal\n\ndef double(n):\n    os.kill(os.getpid(), signal.SIGSTOP)\n    return 7"
ENDLESS_MESSAGE = """
class Endless(Exception):
    def __str__(self):
        while True: pass

def double(n):
    raise Endless
"""
# A pattern that tries every way of splitting the text, in C.
BACKTRACKING = "import re\n\ndef double(n):\n    return re.match('(a|a)*b', 'a' * 60)"

DESCRIPTORS = """
import os
held = []
try:
    for _ in range(600):
        held += os.pipe()
except OSError:
    pass
print("descriptors", len(held))
for handle in held:
    os.close(handle)
"""


def descriptors_contained(result, ground):
    assert (result["status"], result["score"]) == ("ok", TRIPLE_ONLY)
    assert number(said(result), "descriptors") < LIMITS.open_files


DRIP = f"""{CONTROL}
control.connection.sendall(struct.pack(">II", 1000, 0))
while True:
    control.connection.sendall(b" ")
    time.sleep(0.3)
"""


# The cell answers by itself and never comes back; the next cell is larger than a socket's buffer.
DEAF = notebook([
    code(CONTROL + 'control.send({"ok": True, "error": None, "outputs": []})\nwhile True:\n    time.sleep(1)'),
    code("#" + "x" * 2_000_000),
    *cells_of(submission()),
])  # fmt: skip


# What the worker itself would never send: a cell's result of seven million small parts.
HEAD, PART = b'["dict",[[["str","error"],["none"]],[["str","outputs"],["list",[', b'["none"],'
TAIL = b'["none"]]]]]]'
MADE_UP = f"""{CONTROL}
time.sleep(3)
part = {PART!r} * 100_000
control.connection.sendall(struct.pack(">II", {len(HEAD) + len(TAIL)} + 70 * len(part), 0) + {HEAD!r})
for _ in range(70):
    control.connection.sendall(part)
control.connection.sendall({TAIL!r})
"""


def made_up_contained(result, ground):
    assert result["status"] in ("ok", "timeout", "crashed")
    assert result["score"] <= TRIPLE_ONLY


def loses_nothing_more(result, ground):
    assert result["status"] == "timeout"
    assert error_names(result)[0] == "Timeout"
    assert result["score"] == TRIPLE_ONLY


# Every cell takes a little less than a cell may: only the time of all of them together stops it.
SLOW_CELLS = notebook([*(code("import time\ntime.sleep(2)") for _ in range(9)), *cells_of(submission())])


def slow_cells_contained(result, ground):
    assert result["status"] == "timeout"
    assert result["score"] < FULL


def takes_long(graded, ground):
    assert graded.seconds > 2.5 * ground.limits.seconds


ATTACKS = [
    Attack("resources", "many processes", lambda g: submission(before=FORKS), forks_contained, replace(says("children", 300), alone=True)),
    Attack(
        "resources", "memory taken in a property", lambda g: submission(MEMORY, after=MEMORY_AT_LAST), memory_contained,
        says("megabytes", 700), PATIENT,
    ),
    Attack(
        "resources", "memory in files without a name", lambda g: submission(before=NAMELESS_FILE),
        nameless_file_contained, says("megabytes", 700),
    ),
    Attack("resources", "disks filled with small files", fill_disks, disk_contained, Plain(disks_are_full)),
    Attack("resources", "a flood of output", lambda g: submission(before=FLOOD), text_contained, fills(40 * 2**20)),
    Attack("resources", "a value whose repr is huge", lambda g: submission(before=HUGE_REPR), text_contained, fills(40 * 2**20)),
    Attack(
        "resources", "a great many small outputs", lambda g: submission(before=MANY_OUTPUTS), many_outputs_contained,
        Plain(all_outputs_are_kept),
    ),
    Attack("resources", "many cells that say as much as a cell may", lambda g: CHATTER, chatter_contained, fills(MOST_BYTES)),
    Attack(
        "resources", "an error whose message is huge", lambda g: submission(LONG_MESSAGE), text_contained, fills(30 * 2**20),
    ),
    Attack("resources", "file descriptors", lambda g: submission(before=DESCRIPTORS), descriptors_contained, says("descriptors", 1200)),
    Attack(
        "resources", "an endless loop that ignores signals and catches everything", lambda g: submission(DEAF_LOOP),
        keeps_triple("timeout"), STOPS_ALL, QUICK,
    ),
    Attack(
        "resources", "threads that hash on every core", lambda g: submission(HASHING), keeps_triple("timeout"), STOPS_ALL,
        QUICK,
    ),
    Attack(
        "resources", "a property that stops its own process", lambda g: submission(STOPPED), keeps_triple("timeout"),
        STOPS_ALL, QUICK,
    ),
    Attack(
        "resources", "many cells that are each just quick enough", lambda g: SLOW_CELLS, slow_cells_contained,
        Plain(takes_long, alone=True), replace(QUICK, seconds=6),
    ),
]  # fmt: skip
FAULTS = [
    Fault("an error whose type's name is huge", lambda g: submission(before=LONG_NAME), long_name_contained),
    Fault(
        "a returned list of seven million parts", lambda g: submission(MANY_PARTS),
        keeps_triple("timeout", "crashed", "out of memory"), QUICK,
    ),
    Fault("a returned text larger than may cross", lambda g: submission(TOO_LARGE), text_contained, PATIENT),
    Fault("a returned list nested deeply", lambda g: submission(DEEP), text_contained, PATIENT),
    Fault("an endless loop in a cell", lambda g: submission(before=LOOP), loses_nothing_more, QUICK),
    Fault("a cell that waits for what never comes", lambda g: submission(before=WAITING), loses_nothing_more, QUICK),
    Fault("an error whose message never ends", lambda g: submission(ENDLESS_MESSAGE), keeps_triple("timeout"), QUICK),
    Fault("a regular expression that backtracks for ever", lambda g: submission(BACKTRACKING), keeps_triple("timeout"), QUICK),
    Fault("an answer that drips byte by byte", lambda g: submission(before=DRIP), loses_nothing_more, QUICK),
    Fault("a worker that reads no more", lambda g: DEAF, made_up_contained, QUICK),
    Fault(
        "a made-up answer of seven million parts", lambda g: submission(before=MADE_UP), made_up_contained,
        replace(LIMITS, seconds=7),
    ),
]  # fmt: skip

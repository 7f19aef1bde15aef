"""Attacks on other students: reading or changing what they handed in, or what runs for them."""

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys

import pytest

from attacks.harness import Attack, Unsandboxed, everything_shown, said, submission

THEIRS = "the answer of student-02 is 6841"
THEIR_PROGRAM = (
    "import sys; mine = sys.stdin.readline(); sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()"
)
_libc = ctypes.CDLL(None, use_errno=True)


def their_file(ground):
    return ground.canary("submitted/student-02/toy/toy.ipynb", THEIRS)


def their_process(ground):
    """A process that runs for another student, in that student's folder, with the answer in its memory."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", THEIR_PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=their_file(ground).parent,
    )  # fmt: skip
    process.stdin.write(THEIRS + "\n")
    process.stdin.flush()
    process.stdout.readline()
    ground.notes["process"] = process
    atexit.register(end, process)  # where the attack is tried and nobody looks at what came of it
    return process.pid


def end(process):
    if process.poll() is None:
        process.kill()
    for pipe in (process.stdin, process.stdout):
        pipe.close()
    process.wait()


@contextlib.contextmanager
def ending(ground):
    """End the other student's process behind the block."""
    try:
        yield ground.notes.get("process")
    finally:
        if process := ground.notes.pop("process", None):
            end(process)


def is_unread(result, ground):
    with ending(ground):
        assert THEIRS not in everything_shown(result)


def is_unchanged(result, ground):
    assert their_file(ground).read_text() == THEIRS
    assert sorted(path.name for path in their_file(ground).parent.iterdir()) == ["toy.ipynb"]
    is_unread(result, ground)


def lives(result, ground):
    with ending(ground) as process:
        assert process.poll() is None


def is_read(result, ground):
    with ending(ground):
        assert THEIRS in said(result)


def reads(name, make):
    return Attack("other students", name, make, is_unread, Unsandboxed(is_read))


def by_path(ground):
    return submission(f"""
import glob, os
for name in [{str(their_file(ground))!r}, *glob.glob("../*/submitted/*/*/*.ipynb"), *glob.glob("../*/*.ipynb")]:
    if os.path.exists(name):
        print(open(name).read())
""")


def by_link(ground):
    """A link in one's own folder, followed by whoever reads the folder: here by a display of a file."""
    return submission(
        before=f"""
import os
from IPython.display import Markdown, TextDisplayObject
os.path.lexists("notes.md") or os.symlink({str(their_file(ground))!r}, "notes.md")
try:
    print(TextDisplayObject(filename="notes.md").data)
except OSError as error:
    print(error.strerror)
"""
    )


def by_overwriting(ground):
    return submission(
        before=f"""
import os, pathlib, shutil
file = pathlib.Path({str(their_file(ground))!r})
try:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("an empty notebook")
    file.with_name("late.txt").write_text("handed in late")
except OSError as error:
    print(error.strerror)
"""
    )


def is_overwritten(result, ground):
    assert their_file(ground).read_text() == "an empty notebook"


def by_working_folder(ground):
    """The folder in which another's process works, whatever its name is here."""
    return submission(
        before=f"""
import os
inside = filter(str.isdigit, os.listdir("/proc")) if os.getppid() == 0 else ()
for process in ["{their_process(ground)}", *inside]:
    for name in ("cwd/toy.ipynb", "root{their_file(ground)}"):
        try:
            print(open(f"/proc/{{process}}/{{name}}").read())
        except OSError as error:
            print(error.strerror)
"""
    )


def by_memory(ground):
    return submission(
        before=f"""
import re
needle = b"-".join([b"the answer of student", b"02"])
try:
    maps = open("/proc/{their_process(ground)}/maps").read()
    memory = open("/proc/{ground.notes["process"].pid}/mem", "rb", 0)
    for low, high in re.findall(r"^(\\w+)-(\\w+) rw", maps, re.M):
        memory.seek(int(low, 16))
        content = memory.read(min(int(high, 16) - int(low, 16), 2**25))
        if content and needle in content:
            print(content[content.index(needle):][:32].decode())
except OSError as error:
    print(error.strerror)
"""
    )


def by_signal(ground):
    return submission(
        before=f"""
import os, signal
try:
    os.kill({their_process(ground)}, signal.SIGKILL)
except OSError as error:
    print(error.strerror)
"""
    )


def is_killed(result, ground):
    with ending(ground) as process:
        assert process.wait(5) == -signal.SIGKILL


def by_shared_memory(ground):
    """A segment of shared memory (System V) that another's process works in; it goes with the last process in it."""
    number = _libc.shmget(0, 4096, 0o600)  # IPC_PRIVATE: a new one
    _libc.shmat.restype = ctypes.c_void_p
    address = _libc.shmat(number, None, 0)
    ctypes.memmove(address, THEIRS.encode(), len(THEIRS))
    ground.notes["segment"] = address
    _libc.shmctl(number, 0, None)  # IPC_RMID
    return submission(
        before=f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
address = libc.shmat({number}, None, 0)
if address not in (None, ctypes.c_void_p(-1).value):
    print(ctypes.string_at(address, {len(THEIRS)}).decode())
"""
    )


def without_segment(check):
    """Leave the segment behind the check."""

    def checked(*arguments):
        try:
            check(*arguments)
        finally:
            _libc.shmdt(ctypes.c_void_p(arguments[-1].notes.pop("segment", None)))

    return checked


def by_handle(ground):
    """The file by its handle, with any folder of the same file system: no path leads out, and none is needed."""
    handle = ctypes.create_string_buffer(8 + 128)
    ctypes.cast(handle, ctypes.POINTER(ctypes.c_uint32))[0] = 128
    mount = ctypes.c_int()
    name = os.fsencode(their_file(ground))
    if _libc.name_to_handle_at(-100, name, handle, ctypes.byref(mount), 0) != 0:
        return submission(before='print("file systems here have no handles")')
    return submission(
        before=f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
handle = ctypes.create_string_buffer({handle.raw!r})
for folder in ({str(ground.folder)!r}, "/usr", os.path.dirname(os.__file__), "/student"):
    try:
        within = os.open(folder, os.O_RDONLY)
    except OSError:
        continue
    file = libc.open_by_handle_at(within, handle, os.O_RDONLY)
    if file >= 0:
        print(os.read(file, 100).decode())
        break
    print(os.strerror(ctypes.get_errno()))
"""
    )


def is_read_by_handle(result, ground):
    if os.getuid() != 0 or "have no handles" in said(result) or "Operation not permitted" in said(result):
        pytest.skip("handles are for root, where it may open them, on file systems that have them")
    assert THEIRS in said(result)


ATTACKS = [
    reads("another's notebook by its path", by_path),
    reads("another's notebook behind a link in the own folder", by_link),
    Attack("other students", "another's notebook overwritten", by_overwriting, is_unchanged, Unsandboxed(is_overwritten)),
    reads("another's folder behind that student's process", by_working_folder),
    reads("the memory of another's process", by_memory),
    Attack("other students", "another's process killed", by_signal, lives, Unsandboxed(is_killed)),
    Attack(
        "other students", "another's shared memory", by_shared_memory, without_segment(is_unread),
        Unsandboxed(without_segment(is_read)),
    ),
    Attack("other students", "another's notebook by its file handle", by_handle, is_unread, Unsandboxed(is_read_by_handle)),
]  # fmt: skip

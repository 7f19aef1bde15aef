"""Attacks on the walls: namespaces, mounts, the kernel's calls, what is inherited, who is outside."""

import contextlib
import os
import platform
import socket
import subprocess
import sys

import pytest

from attacks.harness import Attack, Fault, Own, Unsandboxed, everything_shown, said, submission
from llmlab.grading.batch import Failure

WORD = "got-through-7731"  # attacks say it by its two parts, since their source is shown
SAY = 'print("got-through", 7731, sep="-")'
LIBC = """
import ctypes, os, signal, socket, stat, struct
libc = ctypes.CDLL(None, use_errno=True)
def tried(what):
    print(what, os.strerror(ctypes.get_errno()))
"""


def snippet(code):
    return submission(before=LIBC + code)


def stays_inside(result, ground):
    ground.open.close()
    assert WORD not in everything_shown(result)


def gets_through(root):
    def bites(result, ground):
        ground.open.close()
        if root and os.getuid() != 0:
            pytest.skip("only root may do this without a sandbox")
        assert WORD in said(result)

    return bites


def through(name, make, root=False):
    made = make if callable(make) else lambda ground: snippet(make)
    return Attack("escape", name, made, stays_inside, Unsandboxed(gets_through(root)))


# Makes what is bound read-only writable, and writes nothing.
REMOUNT = f"""
places = [line.split()[4] for line in open("/proc/self/mountinfo") if "ro" in line.split()[5].split(",")]
for place in places:
    if libc.mount(None, place.encode(), None, 32 | 4096, None) == 0 and not os.statvfs(place).f_flag & os.ST_RDONLY:
        {SAY}
        break
else:
    tried(len(places))
"""


def remounts_without_the_user_namespace(ground):
    """bubblewrap as root, without what takes its rights away: what is bound read-only is written."""
    if os.getuid() != 0:
        pytest.skip("only root has rights that could be left")
    bound = ground.canary("bound/file").parent
    program = (
        LIBC + REMOUNT.replace("places = [", "places = ['/bound'] or [") + "\nopen('/bound/file', 'w').write('changed')"
    )
    places = ("--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib",
              "--symlink", "usr/lib64", "/lib64", "--ro-bind", sys.base_prefix, sys.base_prefix)  # fmt: skip
    command = ["bwrap", "--unshare-all", *places, "--proc", "/proc", "--dev", "/dev", "--ro-bind", str(bound), "/bound"]
    python = os.path.realpath(sys.executable)
    done = subprocess.run([*command, python, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert WORD in done.stdout, done.stderr
    assert (bound / "file").read_text() == "changed"


NEW_NAMESPACES = f"""
child = os.fork()
if child == 0:
    ok = libc.unshare(0x10000000 | 0x00020000) == 0 and libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
    os._exit(7 if ok else 1)
if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7:
    {SAY}
"""

# clone(2) is not among the denied calls, since threads need it: its flag for a user namespace is another matter.
CLONE = f"""
number = {{"x86_64": 56, "aarch64": 220}}[os.uname().machine]
held = ctypes.PyDLL(None, use_errno=True)  # keeps Python's lock: the child has one thread, and another may hold it
child = held.syscall(number, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
if child == 0:
    os._exit(7)
if child > 0 and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7:
    {SAY}
else:
    tried("clone")
"""


def join_namespaces(ground):
    """The namespaces of the test's process; inside also those of every process that is seen."""
    return snippet(f"""
for process in ("{os.getpid()}", "1", "2", "self"):
    child = os.fork()
    if child == 0:
        try:
            places = [os.open(f"/proc/{{process}}/ns/{{name}}", os.O_RDONLY) for name in ("net", "mnt", "pid", "user")]
        except OSError:
            os._exit(1)
        os._exit(7 if any(libc.setns(place, 0) == 0 for place in places) else 1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7:
        {SAY}
""")


TRACE = f"""
child = os.fork()
if child == 0:
    if libc.ptrace(0, 0, 0, 0) == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(1)
if os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]):
    {SAY}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""

READ_ANOTHER = f"""
parent = os.getppid() or 1
try:
    place = next(line for line in open(f"/proc/{{parent}}/maps") if " r" in line)
    start = int(place.split("-")[0], 16)
    into = ctypes.create_string_buffer(16)
    here = (ctypes.c_void_p * 2)(ctypes.addressof(into), 16)
    there = (ctypes.c_void_p * 2)(start, 16)
    if libc.process_vm_readv(parent, here, ctypes.c_ulong(1), there, ctypes.c_ulong(1), ctypes.c_ulong(0)) == 16:
        {SAY}
    else:
        tried("process_vm_readv")
except (OSError, StopIteration) as error:
    print(type(error).__name__)
"""

RING = f"""
ring = libc.syscall(425, 4, ctypes.create_string_buffer(120))
if ring >= 0:
    {SAY}
    os.close(ring)
else:
    tried("io_uring_setup")
"""

# The filter knows the calls by their 64-bit numbers; a 32-bit call has others.
OTHER_NUMBERS = f"""
import mmap
child = os.fork()
if child == 0:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    os._exit(7 if call() == os.getpid() else 1)
if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7:
    {SAY}
"""

RAW_SOCKETS = f"""
for family, kind, protocol in ((socket.AF_PACKET, socket.SOCK_RAW, 3), (socket.AF_INET, socket.SOCK_RAW, 1)):
    try:
        socket.socket(family, kind, protocol).close()
        {SAY}
    except OSError as error:
        print(error.strerror)
"""

# Written as it is read: nothing changes, but whoever may write this may say what the kernel starts when a process dies.
KERNEL_SETTINGS = f"""
for name in ("kernel/core_pattern", "vm/overcommit_memory", "kernel/printk_ratelimit_burst"):
    try:
        with open(f"/proc/sys/{{name}}") as file:
            value = file.read()
        with open(f"/proc/sys/{{name}}", "w") as file:
            file.write(value)
        {SAY}
    except OSError as error:
        print(error.strerror)
"""


def root_of_first_process(ground):
    file = ground.canary("outside", WORD)
    return snippet(f"""
for process in ("1", str(os.getppid())):
    try:
        print(open(f"/proc/{{process}}/root{file}").read())
    except OSError as error:
        print(error.strerror)
""")


DEVICE = f"""
for folder in (".", "/tmp", "/dev", "/dev/shm"):
    place = os.path.join(folder, f"llmlab-device-{{os.getpid()}}")
    try:
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # zeros; any disk is made the same way
        with open(place, "rb") as device:
            device.read(1) == bytes(1) and {SAY}
        break
    except OSError as error:
        print(error.strerror)
    finally:
        os.path.lexists(place) and os.unlink(place)
"""


# A file of the host that is open in a process of the sandbox can be opened anew, for writing. Nothing is written.
FILES_OF_OTHERS = f"""
own = {{os.stat(place).st_dev for place in (".", "/dev/shm") if place != "/dev/shm" or os.getppid() == 0}}
for process in ("1", "2", str(os.getppid() or "self"), "self"):
    for number in (0, 1, 2, 3, 4):
        place = f"/proc/{{process}}/fd/{{number}}"
        try:
            about = os.stat(place)
            if stat.S_ISREG(about.st_mode) and about.st_dev not in own:
                os.close(os.open(place, os.O_WRONLY))
                {SAY}
        except OSError:
            pass
"""


OPEN_FOLDERS = """
for name in os.listdir("/proc/self/fd"):
    try:
        print(os.read(os.open("outside", os.O_RDONLY, dir_fd=int(name)), 100).decode())
    except OSError:
        pass
"""


def inherited(ground):
    """A folder that the grader has open, and lets its children inherit."""
    ground.canary("outside", WORD)
    folder = os.open(ground.folder, os.O_RDONLY)
    os.set_inheritable(folder, True)
    ground.open.callback(os.close, folder)
    return snippet(OPEN_FOLDERS)


SIGNAL_PARENT = """
parent = os.getppid()
for process in {parent, 1} if parent == 0 else {parent}:
    try:
        process and os.kill(process, signal.SIGUSR1)
    except OSError as error:
        print(error.strerror)
"""


def grader_is_ended(result, ground):
    """Without a sandbox the parent is the process that grades this submission; its end is a failure of the grading."""
    assert isinstance(result, Failure)


def is_graded(result, ground):
    assert result["status"] == "ok"
    assert result["score"] == 3


def answering(ground, address, family):
    """A server of the test's that greets whoever comes; the kernel keeps the greeting's connection waiting."""
    server = socket.socket(family)
    server.bind(address)
    server.listen()
    ground.open.callback(server.close)
    return server.getsockname()


def connecting(family, address):
    return snippet(f"""
link = socket.socket(socket.{family})
link.settimeout(2)
try:
    link.connect({address!r})
    {SAY}
except OSError as error:
    print(error.strerror)
finally:
    link.close()
""")


def port(ground):
    return connecting("AF_INET", answering(ground, ("127.0.0.1", 0), socket.AF_INET))


def socket_file(ground):
    with contextlib.chdir(ground.folder):  # a socket's path may have 107 characters
        answering(ground, "s", socket.AF_UNIX)
    return snippet(f"""
link = socket.socket(socket.AF_UNIX)
try:
    os.chdir({str(ground.folder)!r})
    link.connect("s")
    {SAY}
except OSError as error:
    print(error.strerror)
finally:
    link.close()
""")


def abstract_socket(ground):
    name = f"\0llmlab-test-{os.urandom(8).hex()}"
    answering(ground, name, socket.AF_UNIX)
    return connecting("AF_UNIX", name)


ATTACKS = [
    Attack(
        "escape", "what is bound read-only remounted", lambda ground: snippet(REMOUNT), stays_inside,
        Own(remounts_without_the_user_namespace),
    ),
    through("a user namespace and a mount in it", NEW_NAMESPACES),
    through("a user namespace by clone", CLONE),
    through("namespaces of other processes joined", join_namespaces, root=True),
    through("a process traced", TRACE),
    through("the memory of the parent by process_vm_readv", READ_ANOTHER),
    through("a ring for calls that no filter sees", RING),
    through("raw sockets", RAW_SOCKETS, root=True),
    through("settings of the kernel written", KERNEL_SETTINGS, root=True),
    through("the root of the first process", root_of_first_process, root=True),
    through("a device made", DEVICE, root=True),
    Attack(
        "escape", "signals to the parent", lambda ground: snippet(SIGNAL_PARENT), is_graded, Unsandboxed(grader_is_ended),
    ),
    through("a port of the host", port),
    through("a socket's file on the host", socket_file),
    through("an abstract socket of the host", abstract_socket),
    *([through("system calls by their 32-bit numbers", OTHER_NUMBERS)] if platform.machine() == "x86_64" else []),
]  # fmt: skip
FAULTS = [
    Fault("files of the host open in the sandbox's processes", lambda ground: snippet(FILES_OF_OTHERS), stays_inside),
    Fault("an inherited folder", inherited, stays_inside),
]

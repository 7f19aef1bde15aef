"""The system calls that a student's process may not make, as the filter that bubblewrap loads.

A filter is classic BPF (kernel: Documentation/userspace-api/seccomp_filter.rst): it reads the architecture and the
number of each call. Everything is allowed but what is listed, which no lab needs and kernels have had holes in, and
sockets of unusual families.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Collection

# Numbers by architecture: x86-64's own table, and the generic one that aarch64 uses (asm-generic/unistd.h).
DENIED = {
    "x86_64": {
        "ptrace": 101, "syslog": 103, "personality": 135, "ustat": 136, "pivot_root": 155, "acct": 163, "settimeofday": 164,
        "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "iopl": 172, "ioperm": 173,
        "init_module": 175, "delete_module": 176, "quotactl": 179, "add_key": 248, "request_key": 249, "keyctl": 250,
        "unshare": 272, "move_pages": 279, "perf_event_open": 298, "name_to_handle_at": 303, "open_by_handle_at": 304,
        "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313,
        "kexec_load": 246, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "clock_settime": 227,
        "clock_adjtime": 305, "adjtimex": 159, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
        "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
        "mount_setattr": 442, "chroot": 161, "modify_ldt": 154, "lookup_dcookie": 212, "vhangup": 153, "mbind": 237,
        "set_mempolicy": 238, "migrate_pages": 256,
    },
    "aarch64": {
        "ptrace": 117, "syslog": 116, "personality": 92, "pivot_root": 41, "acct": 89, "settimeofday": 170, "mount": 40,
        "umount2": 39, "swapon": 224, "swapoff": 225, "reboot": 142, "init_module": 105, "delete_module": 106,
        "quotactl": 60, "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97, "move_pages": 239,
        "perf_event_open": 241, "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "kexec_load": 104,
        "kexec_file_load": 294, "bpf": 280, "userfaultfd": 282, "clock_settime": 112, "clock_adjtime": 266,
        "adjtimex": 171, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
        "chroot": 51, "lookup_dcookie": 18, "vhangup": 58, "mbind": 235, "set_mempolicy": 237, "migrate_pages": 238,
    },
}  # fmt: skip
# Where no namespaces keep a process alone: ways to others that are no files.
ALONE = {
    "x86_64": {
        "socket": 41, "connect": 42, "bind": 49, "listen": 50, "shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64,
        "semop": 65, "semctl": 66, "semtimedop": 220, "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240,
        "pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438,
    },
    "aarch64": {
        "socket": 198, "connect": 203, "bind": 200, "listen": 201, "shmget": 194, "shmat": 196, "shmctl": 195, "semget": 190,
        "semop": 193, "semctl": 191, "semtimedop": 192, "msgget": 186, "msgsnd": 189, "msgrcv": 188, "msgctl": 187,
        "mq_open": 180, "pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438,
    },
}  # fmt: skip
# Where it has no user of its own either: what the grader's user may do to its processes, and to files without opening them.
SAME_USER = {
    "x86_64": {
        "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "setsid": 112, "setpgid": 109, "setpriority": 141,
        "ioprio_set": 251, "sched_setparam": 142, "sched_setscheduler": 144, "sched_setattr": 314, "chown": 92, "fchown": 93,
        "lchown": 94, "fchownat": 260, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197,
        "lremovexattr": 198, "fremovexattr": 199, "inotify_add_watch": 254, "fanotify_init": 300,
    },
    "aarch64": {
        "tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "setsid": 157, "setpgid": 154, "setpriority": 140,
        "ioprio_set": 30, "sched_setparam": 118, "sched_setscheduler": 119, "sched_setattr": 274, "fchown": 55,
        "fchownat": 54, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15,
        "fremovexattr": 16, "inotify_add_watch": 27, "fanotify_init": 262,
    },
}  # fmt: skip
# The same, but left undone without an error: IPython and others copy files with their modes and times.
UNDONE = {
    "x86_64": {
        "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "utime": 132, "utimes": 235, "futimesat": 261,
        "utimensat": 280,
    },
    "aarch64": {"fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "utimensat": 88},
}  # fmt: skip
# Calls of which an argument decides.
WEIGHED = {
    "x86_64": {
        "socket": 41, "socketpair": 53, "clone": 56, "clone3": 435, "kill": 62, "tgkill": 234, "prlimit64": 302,
        "sched_setaffinity": 203, "fcntl": 72, "ioctl": 16,
    },
    "aarch64": {
        "socket": 198, "socketpair": 199, "clone": 220, "clone3": 435, "kill": 129, "tgkill": 131, "prlimit64": 261,
        "sched_setaffinity": 122, "fcntl": 25, "ioctl": 29,
    },
}  # fmt: skip
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
FAMILIES = {
    "AF_UNIX": 1,
    "AF_INET": 2,
    "AF_INET6": 10,
    "AF_NETLINK": 16,
}  # the others pass by the network namespace, or are odd
CONNECTED = (1, 5)  # SOCK_STREAM, SOCK_SEQPACKET: a pair of these sends to its other end only
KIND = 0xF  # of a socket's type; the rest are flags
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*
TO_PROCESS = ("kill", "tgkill", "prlimit64", "sched_setaffinity")  # their first argument: who
SEND_SIGNALS = (8, 10, 15)  # fcntl's F_SETOWN, F_SETSIG, F_SETOWN_EX
SEND_SIGNALS_BY_IOCTL = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP
NEWEST = 462  # the last call that these lists have considered: mseal, of Linux 6.10
X32_BIT = 0x40000000  # x86-64's other numbering of the same calls

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # LD|W|ABS, ALU|AND|K, JMP|JEQ|K, JMP|JGE|K, RET|K
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16  # offsets in struct seccomp_data; an argument has 8 bytes
ALLOW, KILL, SKIP = 0x7FFF0000, 0x80000000, 0x00050000  # the last: success, and nothing is done
REFUSE, ABSENT = SKIP | 1, SKIP | 38  # EPERM, ENOSYS

Program = list[tuple[int, int, int, int]]


def seccomp_filter(machine: str | None = None, alone: bool = False, own: int = 0) -> bytes:
    """The filter's program for this machine's architecture; ValueError for one that is not known.

    alone: for a process without namespaces. own: its number, where it runs as the grader's user: it may then send
    signals to no other process, not even to its children.
    """
    machine = machine or platform.machine()
    if machine not in DENIED:
        raise ValueError(f"no list of system calls for {machine}; known: {', '.join(DENIED)}")
    weighed, denied = WEIGHED[machine], DENIED[machine]
    if alone:
        denied = denied | ALONE[machine]
    program: Program = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, ARCHITECTURE[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, REFUSE),
    ]
    if alone:
        # glibc turns to clone where clone3, whose flags a filter cannot see, is not there.
        program += [(AT_LEAST, 1, 0, NEWEST + 1), (EQUAL, 0, 1, weighed["clone3"]), (RETURN, 0, 0, ABSENT)]
        program += _only(weighed["socketpair"], 0, (FAMILIES["AF_UNIX"],))
        program += _only(weighed["socketpair"], 1, CONNECTED, KIND)
        program += _only(weighed["clone"], 0, (0,), NEW_NAMESPACES)
    else:
        program += _only(weighed["socket"], 0, tuple(FAMILIES.values()))
    if own:
        for name in TO_PROCESS:
            program += _only(weighed[name], 0, (0, own))
        program += _never(weighed["fcntl"], 1, SEND_SIGNALS) + _never(weighed["ioctl"], 1, SEND_SIGNALS_BY_IOCTL)
        program += [(LOAD, 0, 0, NUMBER_AT), *_answer(SAME_USER[machine].values(), REFUSE)]
        program += _answer(UNDONE[machine].values(), SKIP)
    program += [(LOAD, 0, 0, NUMBER_AT), *_answer(denied.values(), REFUSE), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _only(number: int, argument: int, values: tuple[int, ...], mask: int = 0xFFFFFFFF) -> Program:
    """Refuse a call unless what the mask leaves of the argument's lower half is one of the values; else go on behind."""
    found = [(EQUAL, len(values) - position, 0, value) for position, value in enumerate(values)]
    return _weigh(number, argument, mask, [*found, (RETURN, 0, 0, REFUSE)])


def _never(number: int, argument: int, values: tuple[int, ...]) -> Program:
    """Refuse a call if the argument's lower half is one of the values; else go on behind."""
    return _weigh(number, argument, 0xFFFFFFFF, _answer(values, REFUSE))


def _weigh(number: int, argument: int, mask: int, deciding: Program) -> Program:
    weighing = [(LOAD, 0, 0, ARGUMENTS_AT + 8 * argument), (AND, 0, 0, mask), *deciding]
    return [(LOAD, 0, 0, NUMBER_AT), (EQUAL, 0, len(weighing), number), *weighing]


def _answer(values: Collection[int], answer: int) -> Program:
    """Give an answer where what is loaded is one of the values; else go on behind."""
    last = len(values) - 1
    found = [(EQUAL, last - position, int(position == last), value) for position, value in enumerate(values)]
    return [*found, (RETURN, 0, 0, answer)]

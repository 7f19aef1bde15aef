"""Landlock: by the kernel's word, this process and its children reach no files but those that are named.

The numbers are those of the kernel's include/uapi/linux/landlock.h; what they do is in userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
ASK_VERSION, PATH_BENEATH = 1, 1  # LANDLOCK_CREATE_RULESET_VERSION, LANDLOCK_RULE_PATH_BENEATH
LEAST_ABI = 3  # Linux 6.2: before it whoever may read nothing of a file could still cut it off

FILE_RIGHTS = {
    "EXECUTE": 1 << 0, "WRITE_FILE": 1 << 1, "READ_FILE": 1 << 2, "READ_DIR": 1 << 3, "REMOVE_DIR": 1 << 4,
    "REMOVE_FILE": 1 << 5, "MAKE_CHAR": 1 << 6, "MAKE_DIR": 1 << 7, "MAKE_REG": 1 << 8, "MAKE_SOCK": 1 << 9,
    "MAKE_FIFO": 1 << 10, "MAKE_BLOCK": 1 << 11, "MAKE_SYM": 1 << 12, "REFER": 1 << 13, "TRUNCATE": 1 << 14,
    "IOCTL_DEV": 1 << 15,
}  # fmt: skip
SINCE = {"REFER": 2, "TRUNCATE": 3, "IOCTL_DEV": 5}  # the ABI that brought it; the others came with the first
NET_RIGHTS, NET_SINCE = 0b11, 4  # bind and connect by TCP
SCOPES, SCOPES_SINCE = 0b11, 6  # abstract sockets, signals
OF_A_FILE = ("EXECUTE", "WRITE_FILE", "READ_FILE", "TRUNCATE", "IOCTL_DEV")  # what a rule for a plain file may name
READ = ("EXECUTE", "READ_FILE", "READ_DIR")
WRITE = tuple(name for name in FILE_RIGHTS if name not in ("MAKE_CHAR", "MAKE_BLOCK", "IOCTL_DEV"))
USE = OF_A_FILE[1:]  # a device
_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """The version of this kernel's Landlock; 0 where there is none."""
    return max(0, int(_libc.syscall(CREATE_RULESET, None, ctypes.c_long(0), ctypes.c_long(ASK_VERSION))))


def rights(names: Iterable[str], abi: int) -> int:
    """The bits of these rights, of those that the version knows."""
    return sum(FILE_RIGHTS[name] for name in names if SINCE.get(name, 1) <= abi)


def restrict(abi: int, allowed: Iterable[tuple[Path, tuple[str, ...]]]) -> None:
    """Keep this process to these paths, each with what may be done with it and below it; no port, no signal outwards.

    What does not exist is left out. The process must have given up new privileges. Raises OSError where it fails.
    """
    attributes = struct.pack(
        "=QQQ", rights(FILE_RIGHTS, abi), NET_RIGHTS if abi >= NET_SINCE else 0, SCOPES if abi >= SCOPES_SINCE else 0
    )  # a kernel that knows fewer fields takes zeros for the others
    ruleset = _call(CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path, names in allowed:
            if not path.exists():
                continue
            fitting = names if path.is_dir() else tuple(name for name in names if name in OF_A_FILE)
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", rights(fitting, abi), place)  # packed, as the kernel's
                _call(ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
            finally:
                os.close(place)
        _call(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _call(number: int, *arguments: int | bytes) -> int:
    words = (ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments)
    result = int(_libc.syscall(number, *words))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"Landlock (system call {number}): {os.strerror(error)}")
    return result

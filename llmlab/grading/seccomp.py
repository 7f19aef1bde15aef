"""The system calls that a student's process may not make, as the filter that bubblewrap loads.

A filter is classic BPF (kernel: Documentation/userspace-api/seccomp_filter.rst): it reads the architecture and the
number of each call. Everything is allowed but what is listed, which no lab needs and kernels have had holes in, and
sockets of unusual families.
"""

from __future__ import annotations

import platform
import struct

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
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
SOCKET = {"x86_64": 41, "aarch64": 198}
FAMILIES = {
    "AF_UNIX": 1,
    "AF_INET": 2,
    "AF_INET6": 10,
    "AF_NETLINK": 16,
}  # the others pass by the network namespace, or are odd
X32_BIT = 0x40000000  # x86-64's other numbering of the same calls

LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, RET|K
NUMBER_AT, ARCHITECTURE_AT, ARGUMENT_AT = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # the last: EPERM


def seccomp_filter(machine: str | None = None) -> bytes:
    """The filter's program for this machine's architecture; ValueError for one that is not known."""
    machine = machine or platform.machine()
    if machine not in DENIED:
        raise ValueError(f"no list of system calls for {machine}; known: {', '.join(DENIED)}")
    denied = sorted(DENIED[machine].values())
    program = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, ARCHITECTURE[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, REFUSE),
    ]
    families = sorted(FAMILIES.values())
    program += [(EQUAL, 0, len(families) + 3, SOCKET[machine]), (LOAD, 0, 0, ARGUMENT_AT)]
    program += [(EQUAL, len(families) - position, 0, family) for position, family in enumerate(families)]
    program += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    for position, number in enumerate(denied):
        program.append((EQUAL, len(denied) - position, 0, number))
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)

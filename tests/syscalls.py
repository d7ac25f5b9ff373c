"""The system calls of a child, as the kernel sees them, and a fault at one of them: a small strace, by ptrace(2).

Nothing of the program is patched, so no call escapes: what is in neither `CALLS` nor `NEUTRAL` is an error. Linux on
x86-64 and arm64.
"""

import ctypes
import errno
import os
import platform
import signal
from collections.abc import Callable

# What can touch a file or its name, with the numbers on x86-64 and arm64; None where there is no such call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    "openat": (257, 56), "open": (2, None), "close": (3, 57), "read": (0, 63), "pread64": (17, 67), "write": (1, 64),
    "pwrite64": (18, 68), "fstat": (5, 80), "newfstatat": (262, 79), "stat": (4, None), "statx": (332, 291),
    "lseek": (8, 62), "ioctl": (16, 29), "fcntl": (72, 25), "fsync": (74, 82), "fdatasync": (75, 83),
    "flock": (73, 32), "fallocate": (285, 47), "ftruncate": (77, 46), "mkdir": (83, None), "mkdirat": (258, 34),
    "link": (86, None), "linkat": (265, 37), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "getdents64": (217, 61), "umask": (95, 166), "chmod": (90, None),
    "fchmod": (91, 52), "fchmodat": (268, 53), "getcwd": (79, 17), "readlink": (89, None), "readlinkat": (267, 78),
    "access": (21, None), "faccessat": (269, 48),
}  # fmt: skip
# Memory, time, locks within the process, random bytes, its own signals and its end: no file is in them.
NEUTRAL = {
    "x86_64": {9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 39, 60, 62, 96, 102, 186, 202, 228, 230, 231, 318},
    "aarch64": {222, 226, 215, 214, 134, 135, 139, 124, 216, 233, 172, 93, 129, 169, 174, 178, 98, 113, 115, 94, 278},
}
# Each changes a file, a name, or what of them is on the disk; `openat` does where it creates.
WRITERS = {
    "write", "pwrite64", "fsync", "fdatasync", "fallocate", "ftruncate", "mkdir", "mkdirat", "link", "linkat",
    "unlink", "unlinkat", "rename", "renameat", "renameat2",
}  # fmt: skip
KINDS = ("kill before", "kill after", "refuse", "fail after", "tear", "short")

_TRACEME, _SYSCALL, _SETOPTIONS, _GETREGSET, _SETREGSET, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x4204, 0x4205, 0x420E
_EXITKILL_AND_SYSGOOD = 0x100000 | 1
_PRSTATUS, _ARM_SYSTEM_CALL = 1, 0x404  # register sets
_MACHINE = platform.machine()
_NUMBERS = {pair[_MACHINE == "aarch64"]: name for name, pair in CALLS.items()}
_RESULT, _NUMBER, _THIRD = (10, 15, 12) if _MACHINE == "x86_64" else (0, None, 2)  # indices among the registers

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def kinds(call: str) -> tuple[str, ...]:
    """The faults that can befall it: only a transfer can be cut short."""
    if call in ("write", "pwrite64"):
        return KINDS
    return (*KINDS[:4], "short") if call in ("read", "pread64") else KINDS[:4]


def trace(life: Callable[[], None], *, ignore: int, kind: str = "", at: int = 0) -> list[str]:
    """Forks a child that runs `life` and ends. Returns its calls, those with the descriptor `ignore` left out.

    The `at`-th call, from 1, suffers `kind`. Call this only in a process with one thread.

    Raises:
        LookupError: a call that is neither known to touch files nor known not to.
    """
    child = os.fork()
    if child == 0:
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        life()
        os._exit(0)
    os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, data=_EXITKILL_AND_SYSGOOD)
    names: list[str] = []
    try:
        while True:
            if not (stop := _next(child)):
                return names
            number, arguments = stop
            name = _name(number)
            if name is None or (name == "write" and arguments[0] == ignore):
                fault = ""
            else:
                names.append(name)
                fault = kind if len(names) == at else ""
            if not _suffer(child, fault, arguments):
                return names
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def _name(number: int) -> str | None:
    if number in NEUTRAL[_MACHINE]:
        return None
    if number not in _NUMBERS:
        raise LookupError(f"system call {number} of {_MACHINE}: not known, so not walked")
    return _NUMBERS[number]


def _suffer(child: int, fault: str, arguments: list[int]) -> bool:
    """Takes the child from the entry of a call to its exit; False when it is dead."""
    if fault == "kill before":
        return _kill(child)
    if fault == "refuse":
        _skip(child)
    if fault in ("tear", "short"):
        _set_register(child, _THIRD, arguments[2] // 2)
    if not _next(child):
        return False
    if fault in ("kill after", "tear"):
        return _kill(child)
    if fault in ("refuse", "fail after"):
        number = errno.ENOSPC if fault == "refuse" else errno.EIO
        _set_register(child, _RESULT, 2**64 - number)
    return True


def _next(child: int) -> tuple[int, list[int]] | None:
    """Lets it run to its next entry or exit of a call: number and arguments, true at an entry. None at its end."""
    signal_number = 0
    while True:
        _ptrace(_SYSCALL, child, data=signal_number)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            return None
        if (signal_number := os.WSTOPSIG(status)) == signal.SIGTRAP | 0x80:
            break
    info = (ctypes.c_uint64 * 11)()
    _ptrace(_GET_SYSCALL_INFO, child, address=ctypes.sizeof(info), data=ctypes.addressof(info))
    return int(info[3]), [int(argument) for argument in info[4:10]]


def _kill(child: int) -> bool:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _skip(child: int) -> None:
    """The call that it stands before is not made."""
    if _NUMBER is not None:
        _set_register(child, _NUMBER, 2**64 - 1)
        return
    number = ctypes.c_int(-1)
    vector = _Vector(ctypes.addressof(number), ctypes.sizeof(number))
    _ptrace(_SETREGSET, child, address=_ARM_SYSTEM_CALL, data=ctypes.addressof(vector))


def _set_register(child: int, index: int, value: int) -> None:
    registers = (ctypes.c_uint64 * 34)()
    vector = _Vector(ctypes.addressof(registers), ctypes.sizeof(registers))
    _ptrace(_GETREGSET, child, address=_PRSTATUS, data=ctypes.addressof(vector))  # which sets the true length
    registers[index] = value
    _ptrace(_SETREGSET, child, address=_PRSTATUS, data=ctypes.addressof(vector))


def _ptrace(request: int, child: int, *, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, child, address, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace request {request:#x}: {os.strerror(number)}")

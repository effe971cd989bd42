"""What runs inside the sandbox: it gives up all rights, then runs the program it was sent.

`sandbox.py` starts this file's text with the interpreter's `-c`, in namespaces and a file system
made for it. Nothing of the repository is there, so this needs the standard library alone. The job
is JSON on stdin, and what follows it on stdin is the program's.

Once the rights are gone they cannot be had back: the kernel refuses the calls that would be needed.
"""

import builtins
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys

NOBODY = 65534
OPEN_FILES = 16
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x2008_0522
RET_KILL, RET_ERRNO, RET_ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
LOAD_WORD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF
INSTRUCTION = struct.Struct("HBBI")  # what, jump if true, jump if false, operand

# AUDIT_ARCH_* and the place of its numbers in DENIED; from the kernel's unistd headers.
MACHINES = {"x86_64": (0xC000_003E, 0), "aarch64": (0xC000_00B7, 1)}
# Calls since Linux 5.1 are numbered alike everywhere: pidfd_send_signal, io_uring_setup, clone3 ...
FIRST_NEW_CALL = 424
DENIED = {
    # processes and threads
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220),
    "execve": (59, 221), "execveat": (322, 281),
    "setsid": (112, 157), "setpgid": (109, 154), "prctl": (157, 167),
    # the network
    "socket": (41, 198), "socketpair": (53, 199),
    # memory that RLIMIT_AS does not count
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "io_setup": (206, 0),
    # namespaces and file systems
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_by_handle_at": (304, 265),
    # other processes, and parts of the kernel with a long record of holes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "seccomp": (317, 277), "modify_ldt": (154, None), "personality": (135, 92),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
}  # fmt: skip


def limit(job: dict) -> None:
    """Set the limits that the kernel holds this process to."""
    for name, value in (
        ("AS", job["memory_bytes"]),
        ("CPU", job["cpu_s"]),
        ("NOFILE", OPEN_FILES),
        ("FSIZE", 0),
        ("CORE", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def give_up_rights(libc: ctypes.CDLL, drop_user: bool) -> None:
    """Leave root for an unprivileged user, give up every capability, die with the parent.

    The user comes first: leaving root clears what is set to happen at the parent's death.
    """
    if drop_user:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, bytes(24)))
    _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def filter_calls(libc: ctypes.CDLL) -> None:
    """Have the kernel refuse the calls in DENIED and all that are newer than they are."""
    program = ctypes.create_string_buffer(call_filter(platform.machine()))
    length = (len(program) - 1) // INSTRUCTION.size
    descriptor = struct.pack("HP", length, ctypes.addressof(program))
    _check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, descriptor, 0, 0))


def call_filter(machine: str) -> bytes:
    """The seccomp filter in classic BPF; it sees {int nr; u32 arch; ...} of a call.

    A call of another architecture (32-bit ones have other numbers) ends the process; a denied call
    fails with EPERM; a new one with ENOSYS, at which libraries fall back to an old one.
    """
    architecture, place = MACHINES[machine]
    instructions = [
        (LOAD_WORD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, RET_KILL),
        (LOAD_WORD, 0, 0, 0),
        (JUMP_AT_LEAST, 0, 1, FIRST_NEW_CALL),
        (RETURN, 0, 0, RET_ERRNO | errno.ENOSYS),
    ]
    for numbers in DENIED.values():
        if numbers[place] is not None:
            instructions.append((JUMP_EQUAL, 0, 1, numbers[place]))
            instructions.append((RETURN, 0, 0, RET_ERRNO | errno.EPERM))
    instructions.append((RETURN, 0, 0, RET_ALLOW))
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in instructions)


def _check(status: int) -> None:
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def main() -> None:
    """Run a job's program, then its tests; at their end write its token, which nothing else does.

    A program that leaves early, by whatever way, is so told from one that came to its end.
    """
    size, text = int(sys.argv[1]), b""
    while len(text) < size:
        if not (piece := os.read(0, size - len(text))):
            sys.exit("the caller is gone")
        text += piece
    job = json.loads(text)
    libc = ctypes.CDLL(None, use_errno=True)
    limit(job)
    give_up_rights(libc, job["drop_user"])
    filter_calls(libc)

    sys.argv = ["program"]
    builtins.exit = builtins.quit = sys.exit  # as usual; here `site`, which adds them, is left out
    sys.modules["__main__"] = module = type(sys)("__main__")
    for name in ("program", "tests"):
        exec(compile(job[name], name, "exec"), module.__dict__)
    sys.stdout.flush()
    os.write(1, job["token"].encode())


if __name__ == "__main__":
    main()

"""Runs untrusted Python: what a language model wrote is run here, or not at all.

The kernel enforces everything; nothing depends on what the program does or leaves undone.

    file system   its own, read-only: the interpreter, its library and shared libraries, nothing
                  else; no /proc, no /dev, no place to write, no file of the caller, no environment
    user          root's runs belong to `nobody`, others' to the caller in a user namespace of their
                  own. Every capability is dropped for good (no_new_privs), and with them root's
                  power to pass limits
    processes     one, without threads: fork, clone and exec are refused (seccomp), so a limit on
                  the process is a limit on the run. It has a PID namespace of its own: it sees no
                  other process and can signal none. It dies with the caller
    network       a namespace without devices; and no sockets (seccomp)
    IPC           a namespace of its own; and no shared memory, queues, semaphores (seccomp)
    system calls  refused besides: mounts, namespaces, ptrace, keys, bpf, perf, userfaultfd, kernel
                  modules, all that came with Linux 5.1 and later (io_uring, pidfd, landlock ...);
                  the list is in sandbox_inside.py
    memory        address space, which with one process is all it can have
    CPU           seconds, after which the kernel kills it
    wall time     seconds, after which the caller kills it
    files         16 open at most; none can be written or made
    output        what may be written to stdout, and to stderr; more ends the run

Namespaces and the file system are made by bubblewrap where it is installed, else by util-linux'
`unshare`; the rest the process does to itself before it runs the program. `unavailable` tries an
installed tool with a program that attempts what must fail. Where none passes (in most containers
without privileges, outside Linux) no program is run.

Left out: other languages, packages besides the standard library, a share of the CPU (cgroups), and
protection against a hole in the kernel itself: for that one takes a virtual machine. The verdict
on a program with tests is formed in the process that runs it, so one that searches the frames of
the interpreter could forge it. Comparing what it prints outside (`stdin`, `Result.stdout`) trusts
it with nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train import sandbox_inside

CHUNK_BYTES = 1 << 16
PROBE_S = 60.0  # the machine may be busy, and a sandbox found unavailable ends a training
INSIDE = Path(sandbox_inside.__file__).read_text()
TOOL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": TOOL_PATH, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
INSTALL_HINT = "install bubblewrap (`apt-get install bubblewrap`)"

PROBE = """
import os

def refused(attempt):
    try:
        attempt()
    except OSError:
        return True

assert refused(lambda: os.listdir("/etc")), "it sees files outside"
assert refused(lambda: open("/file", "w")), "it can write files"
assert refused(os.fork), "it can make processes"
assert os.getpid() < 10, "it is among other processes"
import socket
assert refused(socket.socket), "it has a network"
"""

# Arguments: an empty directory, the directories to show, "--", the command.
UNSHARE_SETUP = """
set -e
root=$1
shift
mount -t tmpfs -o mode=755,size=1m,nosuid,nodev none "$root"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --rbind "$1" "$root$1"
    mount -o remount,bind,ro,nosuid,nodev "$root$1"
    shift
done
shift
mount -o remount,bind,ro,nosuid,nodev "$root"
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    wall_s: float = 5.0
    cpu_s: int = 3
    memory_mib: int = 512
    output_kib: int = 64


LIMITS = Limits()  # of a run that is given none


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Attributes:
        finished: program and tests came to their ends; false also after `exit()`.
        exit_code: 0 also after `exit()`; another number after an error or a signal.
        stopped: the limit that the caller stopped it for, '' if it ended by itself.
    """

    finished: bool
    exit_code: int
    stdout: str
    stderr: str
    stopped: str


def unavailable() -> str | None:
    """Why no program can be run here; None if it can."""
    return _tool()[1]


def run(program: str, tests: str = "", stdin: str = "", limits: Limits | None = None) -> Result:
    """Run a program, then tests in its namespace; whatever it does, a `Result` comes back.

    Raises:
        RuntimeError: the sandbox is unavailable.
    """
    command, reason = _tool()
    if command is None:
        raise RuntimeError(f"the sandbox is unavailable: {reason}")
    return _run(command, program, tests, stdin, limits or LIMITS)


def start(program: str, packages: list[str], limits: Limits, root: Path) -> subprocess.Popen:
    """Start a trusted program that handles untrusted text and lives on: talk to it by its pipes.

    Everything holds as for `run` but wall time and output, which are the caller's to watch, and
    `kill` ends it. It dies with the thread that starts it. What one text does to the process the
    next ones may feel.

    Args:
        packages: directories that it may read, besides the standard library.
        root: an empty directory, to stay as long as the process lives.

    Raises:
        RuntimeError: the sandbox is unavailable.
    """
    command, reason = _tool()
    if command is None:
        raise RuntimeError(f"the sandbox is unavailable: {reason}")
    job = _job(program, "", "", limits)
    process = _start(command, root, len(job), packages, subprocess.DEVNULL)
    with contextlib.suppress(BrokenPipeError):  # the caller will see that it is dead
        process.stdin.write(job)
        process.stdin.flush()
    return process


# ---------------------------------------------------------------------------------------------
# The tools that make namespaces and a file system

# (an empty directory, the directories to show, command) -> command
Command = Callable[[Path, list[str], list[str]], list[str]]


def _bubblewrap(root: Path, shown: list[str], command: list[str]) -> list[str]:
    own_user = [] if os.getuid() == 0 else ["--unshare-user"]
    namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", *own_user]
    parents = sorted({str(parent) for path in shown for parent in Path(path).parents} - {"/"})
    made = [word for path in parents for word in ("--perms", "0755", "--dir", path)]
    bound = [word for path in shown for word in ("--ro-bind", path, path)]
    options = ["--die-with-parent", "--remount-ro", "/", "--chdir", "/", "--"]
    return ["bwrap", *namespaces, *made, *bound, *options, *command]


def _unshare(root: Path, shown: list[str], command: list[str]) -> list[str]:
    own_user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts", *own_user]
    with_caller = ["setpriv", "--pdeathsig", "KILL"]
    with_tool = ["unshare", *namespaces, "--fork", "--kill-child"]
    setup = ["sh", "-c", UNSHARE_SETUP, "sh", str(root), *shown, "--"]
    return [*with_caller, *with_tool, *setup, *command]


def _shown() -> list[str]:
    """The directories that the interpreter needs."""
    base = Path(sys.base_prefix).resolve()
    needed = [base / "bin", base / "lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    return [str(path) for path in dict.fromkeys(map(Path, needed)) if path.is_dir()]


TOOLS: dict[str, Command] = {"bwrap": _bubblewrap, "unshare": _unshare}


@functools.cache
def _tool() -> tuple[Command | None, str | None]:
    """The first tool that holds what it must; or none, and why."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in sandbox_inside.MACHINES:
        known = ", ".join(sandbox_inside.MACHINES)
        return None, f"it needs Linux on {known}, and this is {sys.platform} on {machine}"
    reasons = []
    for name, command in TOOLS.items():
        reason = _refusal(name, command)
        if reason is None:
            return command, None
        reasons.append(reason)
    return None, "; ".join(reasons) + f". On a machine that allows namespaces {INSTALL_HINT}"


def _refusal(name: str, command: Command) -> str | None:
    """Why a tool is not to be trusted here; None if it is."""
    if shutil.which(name, path=TOOL_PATH) is None:
        return f"{name} is not installed"
    result = _run(command, PROBE, "", "", Limits(wall_s=PROBE_S))
    if result.finished:
        return None
    said = result.stderr.strip().splitlines() or [result.stopped or "no message"]
    return f"{name} fails here: {said[-1]}"


# ---------------------------------------------------------------------------------------------
# One run


def _run(command: Command, program: str, tests: str, stdin: str, limits: Limits) -> Result:
    token = secrets.token_hex(16)
    job = _job(program, tests, token, limits)
    with (
        tempfile.TemporaryDirectory() as root,
        _start(command, Path(root), len(job), [], subprocess.PIPE) as process,
    ):
        try:
            sent = job + stdin.encode(errors="replace")
            stopped, *output = _exchange(process, sent, limits)
        finally:
            kill(process)
    stdout, stderr = (part.decode(errors="replace") for part in output)
    finished = not stopped and process.returncode == 0 and stdout.endswith(token)
    return Result(finished, process.returncode, stdout.removesuffix(token), stderr, stopped)


def _job(program: str, tests: str, token: str, limits: Limits) -> bytes:
    """What `sandbox_inside.main` reads."""
    job = {
        "program": program,
        "tests": tests,
        "token": token,
        "drop_user": os.getuid() == 0,
        "memory_bytes": limits.memory_mib << 20,
        "cpu_s": limits.cpu_s,
    }
    return json.dumps(job).encode()


def _start(
    command: Command, root: Path, job_bytes: int, packages: list[str], stderr: int
) -> subprocess.Popen:
    """Start the interpreter, which then waits for its job; `packages`: more directories to show."""
    python = [str(Path(sys.executable).resolve()), "-I", "-S", "-B", "-c", INSIDE, str(job_bytes)]
    return subprocess.Popen(
        command(root, _shown() + packages, python),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )


def _exchange(process: subprocess.Popen, sent: bytes, limits: Limits) -> tuple[str, bytes, bytes]:
    """Feed stdin and collect stdout and stderr until the end or a limit, which is named."""
    deadline = time.monotonic() + limits.wall_s
    most = limits.output_kib << 10
    collected = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as ready:
        for stream in collected:
            ready.register(stream, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        ready.register(process.stdin, selectors.EVENT_WRITE)
        stopped = ""
        while not stopped and len(ready.get_map()) > 0:
            for key, _ in ready.select(max(0.0, deadline - time.monotonic())):
                if key.fileobj is process.stdin:
                    sent = _feed(process, sent, ready)
                elif chunk := os.read(key.fd, CHUNK_BYTES):
                    collected[key.fileobj] += chunk
                else:
                    ready.unregister(key.fileobj)
            if max(map(len, collected.values())) > most:
                stopped = "output"
            elif time.monotonic() >= deadline:
                stopped = "wall time"
    if not stopped:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stopped = "wall time"
    return stopped, *(bytes(part[:most]) for part in collected.values())


def _feed(process: subprocess.Popen, sent: bytes, ready: selectors.BaseSelector) -> bytes:
    """Write what the pipe takes of `sent`; returns the rest, the pipe closed if there is none."""
    try:
        sent = sent[os.write(process.stdin.fileno(), sent[:CHUNK_BYTES]) :]
    except BrokenPipeError:
        sent = b""
    if not sent:
        ready.unregister(process.stdin)
        process.stdin.close()
    return sent


def kill(process: subprocess.Popen) -> None:
    """Kill the tool and all that it started: the program cannot leave its process group, and in a
    PID namespace nothing outlives the first process."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

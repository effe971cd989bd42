"""Real attacks on the sandbox, through each tool that is installed: none gets out, all end soon.

The wall limit bounds every test: an attack that is not contained shows as a result that says so.
It is long, since machines are slow at times; what is to run into it has a short one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from train import sandbox, sandbox_inside
from train.sandbox import Limits, Result

LIMITS = Limits(wall_s=300.0, cpu_s=30, memory_mib=128, output_kib=16)
SHORT = replace(LIMITS, wall_s=1.0)
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=list(sandbox.TOOLS), autouse=True)
def tool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each test runs with each tool alone."""
    monkeypatch.setattr(sandbox, "TOOLS", {request.param: sandbox.TOOLS[request.param]})
    sandbox._tool.cache_clear()
    if reason := sandbox.unavailable():
        pytest.skip(reason)
    yield request.param
    sandbox._tool.cache_clear()


def run(program: str, limits: Limits = LIMITS, **others: str) -> Result:
    return sandbox.run(textwrap.dedent(program), limits=limits, **others)


# ---------------------------------------------------------------------------------------------
# What an honest program can do


def test_honest_program_passes_its_tests() -> None:
    program = "import math, dataclasses, collections\ndef f(x): return math.sqrt(x)\nprint('hi')"
    result = run(program, tests="assert f(9) == 3")
    assert result == Result(finished=True, exit_code=0, stdout="hi\n", stderr="", stopped="")


def test_stdin_is_the_programs() -> None:
    long = "é" * 100_000  # more than a pipe holds
    result = run("print(input(), len(input()))", stdin=f"first\n{long}\n")
    assert result.stdout == "first 100000\n"


def test_runs_at_the_same_time_are_apart() -> None:
    results: list[Result | None] = [None] * 4

    def one(i: int) -> None:
        results[i] = run(f"print({i})")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.stdout for r in results] == ["0\n", "1\n", "2\n", "3\n"]


WRONG = {
    "wrong answer": ("def f(x): return x", "assert f(1) == 2"),
    "syntax error": ("def f(:", ""),
    "leaves before its tests": ("import sys\nsys.exit(0)", "assert False"),
    "leaves by force": ("import os\nos._exit(0)", "assert False"),
    "leaves in a test": ("import os\ndef f(x): os._exit(0)", "assert f(1) == 2"),
    "aborts": ("import os\nos.abort()", ""),
    "null byte": ("\0", ""),
    "lone surrogate": ("print('\ud800')", ""),
    "deep recursion": ("def f(): f()\nf()", ""),
    "deep nesting": ("(" * 100_000, ""),
    "segmentation fault": ("import ctypes\nctypes.string_at(1)", ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_program_that_does_not_come_to_its_end(name: str) -> None:
    program, tests = WRONG[name]
    assert not run(program, tests=tests).finished


# ---------------------------------------------------------------------------------------------
# Attacks on time, memory, processes, output


def test_endless_loop_is_ended_by_the_kernel() -> None:
    result = run("while True: pass", limits=replace(LIMITS, cpu_s=1))
    assert not result.finished
    assert result.exit_code != 0
    assert result.stopped == ""  # not by the caller


@pytest.mark.parametrize("how", ["", "for i in range(3): os.close(i)"])
def test_program_that_sleeps_is_ended(how: str) -> None:
    result = run(f"import os, time\n{how}\ntime.sleep(1000)", limits=SHORT)
    assert result.stopped == "wall time"
    assert not result.finished


def test_program_that_catches_everything_is_ended() -> None:
    result = run(
        """
        import signal, time
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True:
            try: time.sleep(1000)
            except BaseException: pass
        """,
        limits=SHORT,
    )
    assert result.stopped == "wall time"


@pytest.mark.parametrize(
    "how", ["os.fork()", "os.posix_spawn('/bin/sh', ['sh'], {})", "subprocess.run(['/bin/sh'])",
            "os.execv(sys.executable, ['python'])", "_thread.start_new_thread(print, ())"],
)  # fmt: skip
def test_fork_bomb_has_no_fuse(how: str) -> None:
    result = run(f"""
        import os, subprocess, sys, _thread
        refused = 0
        for _ in range(100):
            try: {how}
            except (OSError, RuntimeError): refused += 1
        print(refused)
    """)
    assert result.stdout == "100\n"


def test_memory_bomb_is_refused() -> None:
    result = run("blocks = []\nwhile True: blocks.append(bytearray(1 << 20))")
    assert "MemoryError" in result.stderr
    assert not result.finished


def test_limits_cannot_be_raised() -> None:
    result = run("""
        import resource
        for name in ("AS", "CPU", "NOFILE", "FSIZE"):
            limit = getattr(resource, "RLIMIT_" + name)
            hard = resource.getrlimit(limit)[1]
            try: resource.setrlimit(limit, (hard + 1, hard + 1))
            except (OSError, ValueError): print(name, hard)
    """)
    assert result.stdout.split() == ["AS", "134217728", "CPU", "30", "NOFILE", "16", "FSIZE", "0"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_flood_of_output_is_cut(stream: str) -> None:
    result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 10_000)")
    assert result.stopped == "output"
    assert len(getattr(result, stream)) == LIMITS.output_kib << 10


# ---------------------------------------------------------------------------------------------
# Attacks on what is outside


def test_files_outside_are_neither_seen_nor_deleted(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("do not read")
    result = run(f"""
        import os, shutil
        for attempt in (os.remove, open, os.listdir, lambda p: open(p, "w")):
            for path in ({str(secret)!r}, {str(ROOT)!r}, "/etc/passwd", "/root/.ssh", "/proc/1"):
                try: attempt(path)
                except OSError: continue
                print(attempt, path)
        shutil.rmtree(os.path.dirname(os.__file__) + "/json", ignore_errors=True)
        import json.tool
    """)
    assert result.finished, result.stderr
    assert result.stdout == ""
    assert secret.read_text() == "do not read"
    assert Path(sys.executable).exists()


def test_nothing_can_be_written_anywhere() -> None:
    result = run("""
        import os
        written = 0
        for folder, _, files in os.walk("/"):
            for attempt in (lambda: open(folder + "/new", "w"), lambda: os.mkdir(folder + "/new"),
                            lambda: os.chmod(folder, 0o777), lambda: os.rmdir(folder)):
                try: attempt(); print(folder)
                except OSError: pass
            if folder.count("/") > 3: break
    """)
    assert result.finished
    assert result.stdout == ""


def test_environment_and_arguments_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    result = run("import os, sys\nprint(dict(os.environ), sys.argv)")
    assert result.finished
    assert "hunter2" not in result.stdout


def test_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        result = run(f"""
            import _socket
            for family, kind in ((2, 1), (2, 2), (1, 1), (16, 3), (10, 1)):
                try: _socket.socket(family, kind).connect(("127.0.0.1", {port}))
                except OSError as error: print(error.errno)
        """)
        with pytest.raises(TimeoutError):
            server.accept()
    assert result.stdout.split() == ["1"] * 5  # EPERM


def test_signals_do_not_reach_the_caller() -> None:
    reached = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, frame: reached.append(number)) for n in numbers}
    try:
        result = run(f"""
            import os
            for pid in (os.getppid(), {os.getpid()}, {os.getppid()}, -{os.getpgid(0)}):
                for number in (10, 1, 15):
                    try: os.kill(pid, number)
                    except OSError: pass
            print("sent")
            try: os.kill(-1, 9)
            except OSError: pass
        """)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert result.stdout in ("", "sent\n")  # it may have signalled itself
    assert reached == []


ESCAPES = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = {numbers}
    for name, number in numbers.items():
        ctypes.set_errno(0)
        if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (1, 38):
            print(name)
    for attempt in (os.setuid, os.setgid, os.setegid, os.seteuid):
        try: attempt(0)
        except OSError: continue
        if os.geteuid() != 0: print(attempt)
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, rights) == 0
    print(any(rights))
"""


def test_escape_through_ctypes_is_refused() -> None:
    """Every denied call made raw; and no capability is left."""
    place = sandbox_inside.MACHINES[sandbox_inside.platform.machine()][1]
    numbers = {n: pair[place] for n, pair in sandbox_inside.DENIED.items() if pair[place]}
    numbers |= {"io_uring_setup": 425, "clone3": 435, "pidfd_open": 434, "to come": 900}
    result = run(ESCAPES.format(numbers=numbers))
    assert result.stdout == "False\n", result.stderr


@pytest.mark.skipif(sandbox_inside.platform.machine() != "x86_64", reason="32-bit calls are of x86")
def test_calls_of_another_architecture_end_the_program() -> None:
    """`int 0x80` is fork under its 32-bit number, which the filter's table does not hold."""
    result = run("""
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes.fromhex("b802000000cd80c3"))  # mov eax, 2; int 0x80; ret
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        print("forked", ctypes.CFUNCTYPE(ctypes.c_int)(address)())
    """)
    assert result.stdout == ""
    assert result.exit_code != 0


def test_run_dies_with_a_killed_caller(tmp_path: Path) -> None:
    """SIGKILL to the caller leaves nothing behind that sleeps for ever."""
    marker = "import time; time.sleep(1000)  # " + tmp_path.name
    tools = json.dumps(list(sandbox.TOOLS))
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from train import sandbox
sandbox.TOOLS = {{name: sandbox.TOOLS[name] for name in {tools}}}
assert sandbox.unavailable() is None
print("begins", flush=True)
sandbox.run({marker!r}, limits=sandbox.Limits(wall_s=500.0))
"""
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    with caller:
        assert caller.stdout.readline() == b"begins\n"
        deadline = time.monotonic() + 300
        while not any(map(_confined, children := _descendants(caller.pid))):
            assert time.monotonic() < deadline, "the program does not run"
            time.sleep(0.01)
        caller.kill()
    while any(map(_alive, children)):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [d for child in map(int, children) for d in [child, *_descendants(child)]]


def _confined(pid: int) -> bool:
    """Whether the process has its seccomp filter, the last thing before it runs the program."""
    try:
        return "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------
# Refusal


def test_tool_that_enforces_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe finds a tool out that runs its command without a namespace."""
    monkeypatch.setattr(sandbox, "TOOLS", {"sh": lambda root, shown, command: command})
    sandbox._tool.cache_clear()
    assert "sees files outside" in sandbox.unavailable()
    with pytest.raises(RuntimeError, match="sees files outside"):
        sandbox.run("print(1)")


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TOOLS", {"no-such-tool": sandbox.TOOLS.popitem()[1]})
    sandbox._tool.cache_clear()
    assert "no-such-tool is not installed" in sandbox.unavailable()
    assert "apt-get install bubblewrap" in sandbox.unavailable()

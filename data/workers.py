"""Processes that tokenize, so that training and tokenizing share no interpreter.

Each worker is a Python process of its own that knows the tokenizer, gets one `ShardJob` at a time
through a pipe and answers with the `ShardInfo` of a shard that is on the disk and recorded. It
imports no torch, so it starts in a fraction of a second. When the pipe closes, because the training
process has ended in whatever way, it exits in the middle of its work.

A worker that dies (killed, out of memory) is replaced and its job given to the replacement; shards
and records appear whole or not at all, so there is nothing to mend.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from data.shards import ShardInfo, ShardJob, make_shard, sweep
from data.tokenizer import Tokenizer
from utils.config import ConfigError
from utils.logging import get_logger

ROOT = Path(__file__).resolve().parents[1]
LIVES = 5  # workers that one shard may cost


class WorkerPool:
    """Makes shards in `workers` processes; at most as many more wait for one."""

    def __init__(self, workers: int, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer.state_dict()
        self._jobs: queue.Queue[tuple[ShardJob, Future] | None] = queue.Queue(workers)
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for (
            thread
        ) in self._threads:  # a thread with a process each: it waits where the process works
            thread.start()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes when they have made what was submitted."""
        for _thread in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, job: ShardJob) -> Future[ShardInfo]:
        """The shard to come; waits while all workers have enough to do."""
        future: Future[ShardInfo] = Future()
        self._jobs.put((job, future))
        return future

    def _serve(self) -> None:
        worker = None
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                for _ in range(LIVES):
                    worker = worker or _Worker(self._tokenizer)
                    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
                        future.set_result(worker.make(job))
                        break
                    worker = worker.bury()
                    sweep(job.directory)
                else:
                    raise ConfigError(
                        f"{LIVES} worker processes died over the same shard in {job.directory} "
                        "(out of memory?); lower data.workers or data.shard_megabytes"
                    )
            except BaseException as error:
                future.set_exception(error)
        if worker:
            worker.end()


class _Worker:
    """A worker process, seen from outside."""

    def __init__(self, tokenizer: dict) -> None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        single = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the training process, which then ends the pipe
            env=os.environ | single | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        with contextlib.suppress(OSError):  # dead already: `make` will notice
            self._send(tokenizer)

    def _send(self, value: Any) -> None:
        pickle.dump(value, self.process.stdin, pickle.HIGHEST_PROTOCOL)
        self.process.stdin.flush()

    def make(self, job: ShardJob) -> ShardInfo:
        """Have a shard made; EOFError or OSError when the process is dead."""
        self._send(job)
        answer = pickle.load(self.process.stdout)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        """Make sure that it is dead."""
        self.process.kill()
        with contextlib.suppress(OSError):
            self.process.communicate()

    def bury(self) -> None:
        """The same for one that died, and say so."""
        self.end()
        get_logger().warning(
            f"a tokenizing process ended ({signal_name(self.process.returncode)}); "
            "another one takes over"
        )


def signal_name(code: int) -> str:
    """How a process ended, from its return code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve() -> None:
    """The life of a worker: jobs from stdin, answers to stdout, until stdin is closed."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints does not garble answers
    tokenizer = Tokenizer.from_state(pickle.load(requests))
    jobs: queue.Queue[ShardJob] = queue.Queue()
    threading.Thread(target=_receive, args=(requests, jobs), daemon=True).start()
    while True:
        try:
            answer: ShardInfo | Exception = make_shard(jobs.get(), tokenizer)
        except ConfigError as error:
            answer = error
        except Exception:
            answer = RuntimeError(f"in a tokenizing process:\n{traceback.format_exc()}")
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _receive(requests: Any, jobs: queue.Queue) -> None:
    try:
        while True:
            jobs.put(pickle.load(requests))
    finally:  # the training process is gone
        os._exit(0)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        serve()
    os._exit(0)  # the training process is gone, and nobody reads what is left to be written

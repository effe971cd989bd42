"""Self-contained checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is one `torch.save` file of plain values and tensors, read with `weights_only=True`,
and beside it its sha256 in the format of `sha256sum`. It is written under a temporary name, hashed
on the way, fsynced and renamed, so a name never holds half a file. Saving costs the training loop
the copy to host memory; one thread writes.

Left out: sharded checkpoints, and what the payload means (the stage and the loop know).
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from utils.config import ConfigError
from utils.logging import get_logger

if TYPE_CHECKING:
    from utils.mirror import Mirror

FORMAT_VERSION = 1
_PLAIN = (type(None), bool, int, float, str, bytes)


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read; the message names the file and the reason."""


def save(path: str | Path, payload: dict[str, Any]) -> None:
    """Write a checkpoint and its sha256, or raise CheckpointError and leave all as it was."""
    _write(Path(path), snapshot(payload))


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint after comparing its sha256; a missing one is only warned of."""
    path = Path(path)
    digest_file = sidecar(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        verified = digest_file.exists()
        if verified and digest_file.read_text().split()[:1] != [digest]:
            raise CheckpointError(
                f"{path}: damaged, its sha256 is not the one in {digest_file.name}"
            )
        payload = torch.load(path, map_location, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or foreign file can fail in any way
        reason = re.split(r"\n|\. ", str(error))[0]  # torch goes on with unsafe advice
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({reason})") from error
    version = payload.get("format_version") if isinstance(payload, dict) else None
    if version != FORMAT_VERSION:
        rule = f"this code reads version {FORMAT_VERSION}; use the code that wrote the file"
        raise CheckpointError(f"{path}: format version {version}, but {rule}")
    if not verified:
        get_logger().warning(f"{path}: not verified, {digest_file.name} is missing")
    return payload


def sha256(path: Path) -> str:
    """Of the file; read from the one beside it, if there is one, which `load` compares it with."""
    beside = sidecar(path)
    if beside.exists():
        return beside.read_text().split()[0]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """Digest of a model's parameters, their names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def snapshot(obj: Any) -> Any:
    """Copy nested dicts, lists and tuples of plain values and tensors to host memory.

    Copies are compact (a view does not bring its whole storage) and tensors that share memory
    share one copy. From CUDA they go to pinned memory, with one synchronisation at the end.
    Anything else raises TypeError now, because `weights_only` would refuse it when it is read.
    """
    copies: dict[tuple, torch.Tensor] = {}
    result = _copy(obj, copies)
    if any(tensor.is_pinned() for tensor in copies.values()):
        torch.cuda.synchronize()
    return result


def _copy(obj: Any, copies: dict[tuple, torch.Tensor]) -> Any:
    if isinstance(obj, torch.Tensor):
        key = (obj.device, obj.data_ptr(), obj.dtype, obj.shape, obj.stride())
        if key not in copies:
            copies[key] = _to_host(obj.detach())
        return copies[key]
    if isinstance(obj, dict):
        return {_copy(key, copies): _copy(value, copies) for key, value in obj.items()}
    if isinstance(obj, list):
        return [_copy(item, copies) for item in obj]
    if isinstance(obj, tuple):
        return tuple(_copy(item, copies) for item in obj)
    if type(obj) in _PLAIN:
        return obj
    raise TypeError(f"a checkpoint holds plain values and tensors, not {type(obj)}: {obj!r}")


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    pinned = tensor.is_cuda
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return copy.copy_(tensor, non_blocking=pinned)


class _HashingFile:
    """The file that `torch.save` writes to; hashes what passes and keeps the first OSError.

    The error is kept and not raised, since torch's zip writer would replace it by one of its own
    ("unexpected pos") that hides the full disk.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.sha256.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing where torch asks for it: `_write` flushes once, to the disk."""


def _write(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` so that a crash at any point leaves the old file or the new one.

    The old sidecar goes first: a file without one is still read, with a warning, whereas a file
    beside another's digest would be taken for damaged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary_sidecar = temporary.with_suffix(".sha256.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            hashing = _HashingFile(file)
            torch.save(payload | {"format_version": FORMAT_VERSION}, hashing)
            if hashing.error:
                raise hashing.error
            _flush(file)
        with temporary_sidecar.open("wb") as file:
            file.write(f"{hashing.sha256.hexdigest()}  {path.name}\n".encode())
            _flush(file)
        sidecar(path).unlink(missing_ok=True)
        temporary.replace(path)
        temporary_sidecar.replace(sidecar(path))
        _fsync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: not saved: {error.strerror or error}") from error
    finally:
        for leftover in (temporary, temporary_sidecar):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fsync_directory(directory: Path) -> None:
    """Make renames durable, where the file system offers it (mounted folders may not)."""
    descriptor = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def sidecar(path: Path) -> Path:
    """The file that holds the sha256 of the one at `path`."""
    return path.with_name(f"{path.name}.sha256")


class Checkpointer:
    """A run's `step_*.pt` files: written by a thread, rotated, and found again after a crash.

    Args:
        directory: where they are.
        keep_last: how many of them rotation keeps.
        mirror: told of each one that is written.
    """

    def __init__(
        self, directory: str | Path, keep_last: int, mirror: "Mirror | None" = None
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last ({keep_last}) must be at least 1")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.mirror = mirror
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures: list[str] = []

    def save(self, step: int, payload: dict[str, Any]) -> None:
        """Copy the payload to host memory and write it in the background.

        Waits for the write before it, so that at most one copy is alive. A failed write shows in
        `failures()`; it never stops the caller.
        """
        self.wait()
        self._pending = self._thread.submit(self._write_and_rotate, step, snapshot(payload))

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._pending:
            self._pending.result()

    def failures(self) -> list[str]:
        """Return the messages of the writes that failed since the last call."""
        messages, self._failures = self._failures, []
        return messages

    def latest(
        self, wanted: Callable[[dict[str, Any]], bool] = bool
    ) -> tuple[Path, dict[str, Any]] | None:
        """Load the newest undamaged checkpoint that is `wanted`; None without one.

        Removes leftover temporaries.
        """
        for leftover in self.directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)  # another rank may be here too
        for _, path in sorted(self._files().items(), reverse=True):
            try:
                payload = load(path)
            except CheckpointError as error:
                get_logger().warning(f"skipping {error}")
            else:
                if wanted(payload):
                    return path, payload
        return None

    def close(self) -> None:
        """Finish the write in flight and end the thread."""
        self._thread.shutdown(wait=True)

    def _files(self) -> dict[int, Path]:
        names = {
            path: re.fullmatch(r"step_(\d+)\.pt", path.name) for path in self.directory.glob("*")
        }
        return {int(match[1]): path for path, match in names.items() if match}

    def _write_and_rotate(self, step: int, payload: dict[str, Any]) -> None:
        try:
            _write(self.directory / f"step_{step:08d}.pt", payload)
            self._rotate(step)
            if self.mirror:
                self.mirror.update()
        except Exception as error:  # whatever it is, training goes on
            self._failures.append(str(error))

    def _rotate(self, saved: int) -> None:
        """Keep the checkpoint just saved, which is known to be good, and those before it.

        Later ones are damaged or of a course that a rollback or `--resume-from` gave up; left in
        place they would be resumed from.
        """
        files = self._files()
        keep = sorted(step for step in files if step <= saved)[-self.keep_last :]
        for step in files.keys() - set(keep):
            files[step].unlink()
            sidecar(files[step]).unlink(missing_ok=True)

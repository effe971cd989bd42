"""Verified copies of a run on another disk: Google Drive, NFS, any mounted folder.

A rented machine takes its disk along when it goes. After each checkpoint a thread copies what a
resumed run needs to `<mirror_dir>/<run name>/`: config, metrics and samples, then the newest
checkpoint, whose bytes are compared with its sha256 and read back before they get their name.
Metrics come first, so that the mirror's never end before its checkpoint. Checkpoints that rotation
has taken from the run go from the mirror too, once a newer one is there.

The mirror never stops a run: whatever goes wrong is warned of, at most every half hour, and tried
again after the next checkpoint. Its folder is never made, since the path of an unmounted drive
would then be an ordinary folder on the disk that is about to vanish.

Left out: checkpoints that came and went while a copy took longer than the time between two.
"""

import contextlib
import errno
import hashlib
import os
import queue
import threading
import time
from pathlib import Path

from utils.checkpoint import sidecar
from utils.config import ConfigError
from utils.logging import get_logger

TEXTS = (
    "config.yaml", "versions.yaml", "metrics.jsonl", "samples.jsonl", "wandb_id.txt", "report.html",
)  # fmt: skip
REPORT_EVERY_S = 1800.0
PATIENCE_S = 600.0  # 8 GB at 15 MB/s, the slow end of what Drive takes; a dead mount never returns
BLOCK_BYTES = 4 * 2**20


class Mirror:
    """Copies of the files of one run, made in the background.

    Args:
        run: the run's folder; the mirror's has the same name.
        mirror_dir: an existing folder on another disk.
    """

    def __init__(self, run: str | Path, mirror_dir: str | Path) -> None:
        self.run = Path(run)
        self.path = Path(mirror_dir) / self.run.name
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._reported = -REPORT_EVERY_S
        self._failing = False

    def holds_a_run(self) -> bool:
        """Whether there is a checkpoint to lose or to resume from."""
        return any(self.path.rglob("*.pt"))

    def update(self) -> None:
        """Copy what is new, in the background."""
        if self._thread is None:
            # A daemon: a mount that hangs must not keep the program from ending.
            self._thread = threading.Thread(target=self._serve, name="mirror", daemon=True)
            self._thread.start()
        self._requests.put(True)

    def close(self) -> None:
        """Copy what is new and wait for it, not longer than `PATIENCE_S`."""
        self.update()
        self._requests.put(False)
        thread, self._thread = self._thread, None
        thread.join(PATIENCE_S)
        if thread.is_alive():
            get_logger().warning(f"mirror {self.path}: still copying, left unfinished")

    def restore(self, newer_than: str = "") -> bool:
        """Bring the newest valid checkpoint, and the metrics, back into the run's folder.

        Args:
            newer_than: the name of the checkpoint that the run has; older ones are not brought.
        """
        (self.run / "checkpoints").mkdir(parents=True, exist_ok=True)
        for path in reversed(_checkpoints(self.path)):
            if path.name <= newer_than:
                break
            try:
                self._copy_texts(self.path, self.run)
                _copy_checkpoint(path, self.run / "checkpoints" / path.name)
            except Exception as error:  # the next older one may do
                get_logger().warning(f"mirror: skipping {path}: {_reason(error)}")
                continue
            get_logger().info(f"restored {path} from the mirror")
            return True
        return False

    def _serve(self) -> None:
        going_on = True
        while going_on:
            going_on = self._requests.get()
            while going_on and not self._requests.empty():  # one copy answers all that wait
                going_on = self._requests.get()
            try:
                self._copy_all()
            except Exception as error:  # whatever it is, training goes on
                self._report(error)
            else:
                if self._failing:
                    get_logger().info(f"mirror {self.path}: up to date again")
                self._failing = False

    def _copy_all(self) -> None:
        for folder in (self.path, self.path / "checkpoints"):
            folder.mkdir(exist_ok=True)  # without parents, see above
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
        self._copy_texts(self.run, self.path)
        ours = _checkpoints(self.run)
        for path in (*ours[-1:], *self.run.glob("*_final.pt")):
            _copy_checkpoint(path, self.path / path.relative_to(self.run))
        kept = {path.name for path in ours}
        for path in _checkpoints(self.path):
            if kept and path.name not in kept:
                path.unlink()
                sidecar(path).unlink(missing_ok=True)

    def _copy_texts(self, source: Path, target: Path) -> None:
        for name in TEXTS:
            if (source / name).exists():
                _copy(source / name, target / name)

    def _report(self, error: Exception) -> None:
        self._failing = True
        if time.monotonic() - self._reported < REPORT_EVERY_S:
            return
        self._reported = time.monotonic()
        get_logger().warning(
            f"mirror {self.path}: {_reason(error)}. Training goes on without it; "
            "the next checkpoint tries again"
        )


def open_mirror(run: Path, mirror_dir: str | None, resume: bool) -> Mirror | None:
    """The mirror of the run in this folder, if one is wanted.

    Raises:
        ConfigError: `mirror_dir` is no folder, or the run's own, or its copy of this run would be
            overwritten.
    """
    if mirror_dir is None:
        return None
    mirror = Mirror(run, mirror_dir)
    if not mirror.path.parent.is_dir():
        raise ConfigError(
            f"train.mirror_dir ({mirror_dir}) is no folder: mount the drive, make the folder, or "
            "set the key to null"
        )
    if mirror.path.resolve() == run.resolve():
        raise ConfigError(
            f"train.mirror_dir ({mirror_dir}) is where the run itself lies: give a folder on "
            "another disk, or set the key to null"
        )
    if not resume and mirror.holds_a_run():
        raise ConfigError(
            f"{mirror.path} already mirrors a run: continue it with --resume, choose another name, "
            "or delete the folder"
        )
    return mirror


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step_*.pt"))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint and its sha256, unless they are there.

    A kill may have left the source without its sha256; it is then copied unverified, as it would
    be read unverified.
    """
    ours, theirs = sidecar(source), sidecar(target)
    text = ours.read_text() if ours.exists() else None
    if text and target.exists() and theirs.exists() and theirs.read_text() == text:
        return
    theirs.unlink(missing_ok=True)  # first: beside another's digest a file counts as damaged
    _copy(source, target, text and text.split()[0])
    if text:
        _copy(ours, theirs)


def _copy(source: Path, target: Path, digest: str | None = None) -> None:
    """Copy a file so that `target` is the old one or the whole new one, read back and compared.

    Raises:
        OSError: it could not be copied, or its sha256 is not `digest`; `target` is as it was.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    hashing = hashlib.sha256()
    try:
        with source.open("rb") as original, temporary.open("wb") as copy:
            while block := original.read(BLOCK_BYTES):
                hashing.update(block)
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        if digest not in (None, hashing.hexdigest()):
            raise OSError(errno.EIO, f"{source} is damaged, its sha256 is another")
        with temporary.open("rb") as copy:
            if hashlib.file_digest(copy, "sha256").digest() != hashing.digest():
                raise OSError(errno.EIO, f"{target} does not read back as it was written")
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

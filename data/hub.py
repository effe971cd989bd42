"""Datasets of the Hugging Face hub: which files hold a split, and reading them from afar.

`datasets` knows which files a subset and split of a dataset consist of, `huggingface_hub` opens
them by HTTP range requests: a parquet file costs the bytes of its text column, and nothing is
written to disk. A dataset is read at one commit, resolved once and kept by whoever asked.

A failed request is repeated with exponential back-off at the byte where it broke, below the
parsers, so no row is read twice or lost however often the connection drops. What no waiting can
mend (no such dataset, gated, no network from the start) is a ConfigError with the remedy.

Left out: loading scripts, and formats other than those of `data/sources.py`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

from utils.config import ConfigError
from utils.logging import get_logger

HUB_PREFIX = "hub:"
URL_PREFIX = "hf://"
BLOCK_BYTES = 8 << 20  # of a range request: long enough that its latency does not show
ASKS = 3  # for what comes before step 0, where someone waits for the message
READS = 12  # in the middle of training: the waits add up to 20 minutes
LONGEST_WAIT_S = 300.0
LONGEST_REASON = 300  # characters; `datasets` lists every suffix there is
PASSING_STATUS = (408, 429)  # with all of 5xx; other refusals stay
T = TypeVar("T")


def resolve_commit(name: str, dataset: str, revision: str | None) -> str:
    """The commit that a branch, tag or commit of a dataset stands for now.

    Args:
        name: the source's, for messages.

    Raises:
        ConfigError: no such dataset or revision, no access, no network.
    """
    from huggingface_hub import HfApi

    try:
        info = _persistently(lambda: HfApi().dataset_info(dataset, revision=revision), ASKS)
        _persistently(lambda: HfApi().auth_check(dataset, repo_type="dataset"), ASKS)
    except Exception as error:
        raise hub_error(name, dataset, error) from error
    return info.sha


def data_files(name: str, dataset: str, commit: str, subset: str | None, split: str) -> list[str]:
    """The URLs of a split's files, sorted.

    Raises:
        ConfigError: no such subset or split, no access, no network.
    """
    import datasets

    try:
        builder = _persistently(
            lambda: datasets.load_dataset_builder(dataset, subset, revision=commit), ASKS
        )
    except Exception as error:
        raise hub_error(name, dataset, error) from error
    splits = builder.config.data_files or {}
    if split not in splits:
        raise ConfigError(
            f"source '{name}': '{dataset}' has no split '{split}'; it has "
            f"{', '.join(map(repr, splits)) or 'none that consists of files'}. "
            "Set the source's split"
        )
    return sorted(splits[split])


def open_url(name: str, url: str) -> io.RawIOBase:
    """A file of the hub for reading, whatever happens to the connection.

    Raises:
        ConfigError: it cannot be had.
    """
    return _HubFile(name, url)


def hub_error(name: str, dataset: str, error: Exception) -> ConfigError:
    """What an error of the hub's libraries means to a user, and what to do about it."""
    from huggingface_hub import errors

    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
    chain = [error, error.__cause__, error.__context__]

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if is_a(errors.GatedRepoError):
        what = (
            f"it is gated. Accept its terms at https://huggingface.co/datasets/{dataset} and run "
            "`hf auth login` (or set HF_TOKEN)"
        )
    elif is_a(errors.RevisionNotFoundError):
        what = "it has no such revision. Set or remove the source's revision"
    elif is_a(errors.RepositoryNotFoundError):
        what = (
            "there is no such dataset, or it is private. Check the id; for a private one run "
            "`hf auth login` (or set HF_TOKEN)"
        )
    elif "onfig name" in str(error) or "BuilderConfig" in str(error):
        told = " ".join(str(error).partition("Example of")[0].split())
        what = f"{told}. Set the source's subset"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        what = "HF_HUB_OFFLINE is set. Remove it"
    else:
        what = f"{reason}. Check the network, the id, subset and split"
    return ConfigError(
        f"source '{name}': could not get '{dataset}' from the hub: {what}; "
        "or download its files and give their folder as the path"
    )


class _HubFile(io.RawIOBase):
    """A file of the hub that outlives its connections."""

    def __init__(self, name: str, url: str) -> None:
        from huggingface_hub import HfFileSystem

        self.source, self.url = name, url
        fs = HfFileSystem()
        self._file: Any = self._try(lambda: fs.open(url, "rb", block_size=BLOCK_BYTES))

    def _try(self, call: Callable[[], T]) -> T:
        try:
            return _persistently(call, READS)
        except Exception as error:
            dataset = self.url.removeprefix(f"{URL_PREFIX}datasets/").partition("@")[0]
            raise hub_error(self.source, dataset, error) from error

    def _read_once(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < min(size, self._file.size - (self._file.tell() - len(data))):
            self._file.seek(-len(data), io.SEEK_CUR)
            raise ConnectionError(f"{self.url}: the answer was cut short")
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self._try(lambda: self._read_once(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _persistently(call: Callable[[], T], times: int) -> T:
    """What `call` returns, tried again after 1, 2, 4, ... seconds where waiting may help."""
    for attempt in range(times):
        try:
            return call()
        except Exception as error:
            if attempt + 1 == times or not _passing(error):
                raise
            wait_s = min(2.0**attempt, LONGEST_WAIT_S)
            get_logger().warning(f"hub: {error!r:.200}; trying again in {wait_s:.0f} s")
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _passing(error: Exception) -> bool:
    """Whether the same request may succeed later; all but refusals and mistakes of ours may."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in PASSING_STATUS
    refusals = (errors.OfflineModeIsEnabled, errors.EntryNotFoundError, FileNotFoundError)
    return isinstance(error, OSError | errors.HTTPError) and not isinstance(error, refusals)

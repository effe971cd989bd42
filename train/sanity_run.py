"""Checks of what surrounds a run: the machine, its data, and the disks that keep what it made.

The counterpart of `train/sanity.py`, which has those of the model. They read and write where the
run would, in files of their own that are removed again, and take from the data the first rows only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from data import builtin_tasks, chat, preferences, prompts
from data.conversations import ChatSource
from data.preferences import PairSource
from data.prompts import PromptSource
from data.records import RecordSource, Tally, read_source, usable_rows
from data.sources import SourceConfig, list_files, sample_texts
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from models.config import GIB
from models.transformer import Transformer
from optim.optimizer import OptimConfig, make_optimizer
from train.loss import cross_entropy_loss
from train.rewards import check_answer
from train.sanity import Result, failed, passed, random_batch, skipped
from utils import checkpoint
from utils.checkpoint import CheckpointError
from utils.config import Config
from utils.logging import human_bytes
from utils.mirror import open_mirror

ROWS_SHOWN = 2
ROWS_READ = 200  # at most so many are read until one can be used
BYTES_PER_TOKEN = 3  # of tokenized data: 2 of the token, 1 of the mask, where there is one
BYTES_PER_PARAMETER = 12  # of a checkpoint: the weight and AdamW's two moments, in float32
PROBE_BYTES = 2**20
NETWORK_TIMEOUT_S = 5.0
WANDB_URL = "https://api.wandb.ai"

# ---------------------------------------------------------------------------------------------
# The machine


def check_device(device: torch.device, needed_gib: float | None) -> Result:
    """It multiplies correctly, and has the memory that the run, if any, is estimated to need."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    error = ((a.to(device) @ b.to(device)).cpu() - a @ b).abs().max().item()
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"cpu, {os.cpu_count()} cores"
    if not error < 0.1:
        return failed(f"{name}: a matrix product is wrong by {error:.2g}", "restart the machine")
    free = free_memory_gib(device)
    if needed_gib is None:
        return passed(f"{name}: {free:.1f} GiB free")
    told = f"{name}: {free:.1f} GiB free, {needed_gib:.1f} GiB estimated for the run"
    if needed_gib > free:
        return failed(
            told, "halve train.micro_batch (the result stays the same), or take a larger device"
        )
    return passed(told)


def free_memory_gib(device: torch.device) -> float:
    """Memory that a new program can have: of the GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB  # all of it, on a Mac


# ---------------------------------------------------------------------------------------------
# The data


def check_source(source: Config, tokenizer: Tokenizer | TokenizerConfig | None) -> Result:
    """The source is there, its first rows can be used, and the tokenizer gives them back.

    Args:
        tokenizer: or what to load; None: none is known, the rows are only shown.
    """
    left_out = Tally()
    texts = list(islice(_first_texts(source, left_out), ROWS_SHOWN))
    if not texts:
        what = f": {left_out}" if left_out.counts else ""
        return failed(
            f"no usable row among the first {ROWS_READ} of '{source.path}'{what}",
            f"mend the rows, or take '{source.name}' out of the config",
        )
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer = _tokenizer(tokenizer, texts)
    shown = "; ".join(_excerpt(text) for text in texts)
    if tokenizer is None:
        return passed(f"{shown} (no tokenizer tried: give --base-model)")
    counts = []
    for text in texts:
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            return failed(
                f"the tokenizer does not give back {_excerpt(text)} but "
                f"{_excerpt(tokenizer.decode(ids))}",
                "choose a tokenizer that keeps every text, such as a byte-level one",
            )
        counts.append(len(ids))
    return passed(f"{shown}; there and back in {' and '.join(map(str, counts))} tokens")


def _first_texts(source: Config, left_out: Tally) -> Iterator[str]:
    """The texts of the first rows that can be used, one a row."""
    if isinstance(source, SourceConfig):
        yield from filter(str.strip, islice(sample_texts(source), ROWS_READ))
        return
    for row in _first_rows(source, left_out):
        value = row.value
        if isinstance(source, PairSource):
            chosen, rejected = (_as_text(messages) for messages in value)
            yield f"chosen: {chosen}\nrejected: {rejected}"
        else:
            yield _as_text(value if isinstance(value, list) else value.messages)


def _first_rows(source: RecordSource, left_out: Tally) -> Iterator[Any]:
    """As the stage that reads such a source reads it."""
    if isinstance(source, ChatSource):
        generate, examples = builtin_tasks.chat, builtin_tasks.N_EXAMPLES
        how = (chat.to_messages, chat.check_messages, chat.SHAPES)
    elif isinstance(source, PairSource):
        generate, examples = builtin_tasks.preference, preferences.BUILTIN_EXAMPLES
        how = (preferences.to_pair, preferences.check_pair, preferences.SHAPES)
    else:
        assert isinstance(source, PromptSource)
        generate, examples = builtin_tasks.prompt, prompts.BUILTIN_EXAMPLES
        how = (
            lambda record: prompts.to_prompt(record, source.verifier),
            lambda row: prompts.check_prompt(row, check_answer),
            prompts.SHAPES,
        )
    records = islice(read_source(source, generate, examples), ROWS_READ)
    yield from usable_rows(source, records, *how, left_out)


def _as_text(messages: list[dict[str, str]]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _tokenizer(config: TokenizerConfig, texts: list[str]) -> Tokenizer:
    """The configured one; one that is to be trained is trained on these texts alone."""
    if config.path != "trained":
        return load_tokenizer(config)
    return train_tokenizer(texts, config.model_copy(update={"vocab_size": 512}))


def _excerpt(text: str, longest: int = 60) -> str:
    return json.dumps(text if len(text) <= longest else f"{text[:longest]}...", ensure_ascii=False)


# ---------------------------------------------------------------------------------------------
# The disks


def check_checkpoint(model: Transformer, folder: Path) -> Result:
    """What is written is read back to the bit, and a flipped bit is noticed.

    Args:
        folder: where the run's folder is, or will be.
    """
    optimizer = make_optimizer(model.named_parameters(), OptimConfig())
    cross_entropy_loss(model, random_batch(model, [16]))[0].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    payload = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    with tempfile.TemporaryDirectory(dir=_existing(folder), prefix=".sanity-") as temporary:
        path = Path(temporary) / "step_00000001.pt"
        checkpoint.save(path, payload)
        size = path.stat().st_size
        remedy = "replace the disk, or train on another one (runs_dir)"
        if not _equal(checkpoint.snapshot(payload), checkpoint.load(path)):
            return failed("a checkpoint is not read back as it was written", remedy)
        with path.open("r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))
        try:
            checkpoint.load(path)
        except CheckpointError:
            return passed(f"{human_bytes(size)} read back to the bit; a flipped bit is refused")
    return failed(
        "a checkpoint with a flipped bit is taken for good", "look at utils/checkpoint.py"
    )


def _equal(written: Any, read: Any) -> bool:
    if isinstance(written, torch.Tensor):
        return torch.equal(written, read)
    if isinstance(written, dict):
        return all(key in read and _equal(value, read[key]) for key, value in written.items())
    if isinstance(written, list | tuple):
        return len(written) == len(read) and all(map(_equal, written, read))
    return written == read


def check_disk(config: Any) -> Result:
    """Room for the checkpoints that are kept, one more while it is written, and tokenized data."""
    runs = Path(config.runs_dir) / config.name
    needs = {runs: checkpoint_bytes(config, config.train.keep_checkpoints + 1)}
    cache = getattr(config.data, "cache_dir", None)
    if cache is not None:
        needs[Path(cache)] = _token_bytes(config)
    disks: dict[int, list[Path]] = {}  # device number -> the places on it
    for place in needs:
        disks.setdefault(_existing(place).stat().st_dev, []).append(place)
    told = []
    for places in disks.values():
        size = sum(max(0, needs[place] - _size(place)) for place in places)
        free = shutil.disk_usage(_existing(places[0])).free
        names = " and ".join(map(str, places))
        told.append(f"{names}: {human_bytes(size)} needed, {human_bytes(free)} free")
        if size > free:
            return failed(
                told[-1],
                "make room, lower train.keep_checkpoints, or set runs_dir and data.cache_dir to "
                "a larger disk",
            )
    return passed("; ".join(told))


def checkpoint_bytes(config: Any, checkpoints: int) -> int:
    """Of so many checkpoints and the final one, which holds weights alone."""
    return config.model.n_params * (BYTES_PER_PARAMETER * checkpoints + 4)


def _token_bytes(config: Any) -> int:
    """Tokenized data, estimated: half the bytes of local text (four characters to a token of two
    bytes; compressed files hold four times as much), else the tokens that the config tells of."""
    total = 0
    for source in config.data.sources:
        if isinstance(source, SourceConfig) and Path(source.path).exists():
            paths = [Path(file.path) for file in list_files(source)]
            total += sum(
                p.stat().st_size * (2 if p.suffix in (".gz", ".zst", ".parquet") else 0.5)
                for p in paths
            )
        elif isinstance(source, SourceConfig) and not source.path.startswith("builtin:"):
            share = source.weight / sum(s.weight for s in config.data.sources)
            total += share * config.train.total_steps * config.train.batch_tokens * 2
    return int(total) + (getattr(config.data, "expected_tokens", None) or 0) * BYTES_PER_TOKEN


def _existing(place: Path) -> Path:
    """The folder itself or the nearest one above it that is there."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check_mirror(config: Any) -> Result:
    """It takes a file and gives it back, and has room for a new checkpoint beside the old one."""
    if config.train.mirror_dir is None:
        return skipped("train.mirror_dir is null: a lost disk takes the run along")
    mirror = open_mirror(Path(config.runs_dir) / config.name, config.train.mirror_dir, resume=True)
    folder, data = mirror.path.parent, os.urandom(PROBE_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sanity-") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            same = Path(file.name).read_bytes() == data
    except OSError as error:
        return failed(
            f"{folder}: {error.strerror}", "make it writable, make room, or mount the drive again"
        )
    if not same:
        return failed(f"{folder} does not read back as it was written", "mount the drive again")
    needed, free = checkpoint_bytes(config, 2), shutil.disk_usage(folder).free
    told = f"{folder}: {human_bytes(needed)} needed, {human_bytes(free)} free"
    return passed(told) if needed <= free else failed(told, "make room there")


# ---------------------------------------------------------------------------------------------
# W&B


def check_wandb(config: Any) -> Result:
    """A login, and a server that answers; the run itself does without either."""
    if config.train.wandb_project is None:
        return skipped("train.wandb_project is null: metrics.jsonl has everything")
    if importlib.util.find_spec("wandb") is None:
        return skipped("wandb is not installed (pip install wandb); metrics.jsonl has everything")
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return passed(f"WANDB_MODE is {mode}: no login and no network needed")
    url = urlparse(os.environ.get("WANDB_BASE_URL", WANDB_URL))
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), NETWORK_TIMEOUT_S).close()
    except OSError as error:
        return failed(
            f"{url.geturl()} does not answer ({error})",
            "set WANDB_MODE=offline, and `wandb sync` later; or train.wandb_project=null",
        )
    if not _logged_in(url.hostname):
        return failed("not logged in", "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE")
    return passed(f"logged in at {url.geturl()}")


def _logged_in(host: str) -> bool:
    """Whether W&B's key is in the environment or in the netrc file that `wandb login` writes."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        path = os.environ.get("NETRC") or Path("~/.netrc").expanduser()
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

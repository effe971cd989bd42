"""What a run was made with: commit, packages, device. Kept beside its config for the report.

Left out: a full `pip freeze`; these are the packages that change numbers or speed.
"""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "torch", "numpy", "transformers", "tokenizers", "datasets", "flash-attn", "flash-attn-4",
    "torchao", "liger-kernel",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Name to version of code, interpreter, packages that are installed, and device."""
    cuda = torch.cuda.is_available()
    found = {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(terse=True),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
    }
    if cuda:
        found["cuda"] = str(torch.version.cuda)
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The checkout's commit, and whether files differ from it."""
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
    if commit is None:
        return "unknown: not a git checkout"
    return f"{commit[:12]}, with local changes" if changed else commit[:12]


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

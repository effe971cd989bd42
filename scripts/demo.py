"""`make demo`: train a small language model on built-in text, then let it write.

Everything is embedded: no download, no GPU. Run again after an interruption, it goes on where it
was. The results lie in runs/demo.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FINAL = "runs/demo/pretrain/pretrain_final.pt"
STAGES = ("train_pretrain.py --config configs/demo/pretrain.yaml --resume",)
SAMPLES = (
    f'inference.py --checkpoint {FINAL} --prompt "The " --max-new-tokens 60',
    f'inference.py --checkpoint {FINAL} --prompt "def " --max-new-tokens 60',
)


def main() -> int:
    for command in (*STAGES, *SAMPLES):
        print(f"\n$ python {command}", flush=True)
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, check=False)
        if done.returncode:
            print("stopped; `make demo` goes on from here", file=sys.stderr)
            return done.returncode
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

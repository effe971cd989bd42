"""`make demo`: pretraining, SFT and DPO of a small language model on built-in data.

Everything is embedded: no download, no GPU. Run again after an interruption, it goes on where it
was. The results lie in runs/demo.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = "runs/demo/pretrain/pretrain_final.pt"
CHAT = "runs/demo/sft/sft_final.pt"
PREFERRED = "runs/demo/dpo/dpo_final.pt"
STAGES = (
    "train_pretrain.py --config configs/demo/pretrain.yaml --resume",
    f"train_sft.py --config configs/demo/sft.yaml --base-model {PRETRAINED} --resume",
    f"train_pref.py --config configs/demo/dpo.yaml --base-model {CHAT} --resume",
)
SAMPLES = (
    f'inference.py --checkpoint {PRETRAINED} --prompt "The " --max-new-tokens 60',
    f'inference.py --checkpoint {PREFERRED} --prompt "What is 3 + 4?" --temperature 0',
)


def main() -> int:
    # Threads that wait should sleep: spinning ones take the cores from each other when it is busy.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    for command in (*STAGES, *SAMPLES):
        print(f"\n$ python {command}", flush=True)
        done = subprocess.run(
            [sys.executable, *shlex.split(command)], cwd=ROOT, env=environment, check=False
        )
        if done.returncode:
            print("stopped; `make demo` goes on from here", file=sys.stderr)
            return done.returncode
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

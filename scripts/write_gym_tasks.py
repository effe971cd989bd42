"""Write procedural tasks of reasoning-gym to a jsonl file, for train_rlvr.py to ask.

    pip install -r requirements-gym.txt
    python scripts/write_gym_tasks.py --tasks leg_counting,basic_arithmetic --out gym.jsonl

The package pins old versions of others and compiles one, so it may live in an environment of its
own, beside pydantic and pyyaml: the file is read without it. --verifier says how its answers are
checked:

    reasoning_gym   by the task's own scorer, which needs the package where the run is
    exact_match     as text, where the task has one right answer; needs nothing
    number          as a number; needs nothing

Then in a config: data.sources: [{name: gym, path: gym.jsonl}].
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train.rewards import check_answer
from utils.command_line import run_script
from utils.config import ConfigError

VERIFIERS = ("reasoning_gym", "exact_match", "number")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    names = [name for name in args.tasks.split(",") if name]
    rows = [row for name in names for row in tasks(name, args.count, args.seed, args.verifier)]
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows):,} tasks of {len(names)} kinds in {args.out}")


def tasks(name: str, count: int, seed: int, verifier: str) -> Iterator[dict]:
    """Rows that `data.prompts` reads.

    Raises:
        ConfigError: no such task, or its answers are not of the verifier's kind.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"reasoning-gym cannot be imported ({error}): `pip install -r requirements-gym.txt`"
        ) from error
    try:
        dataset = reasoning_gym.create_dataset(name, size=count, seed=seed)
    except ValueError as error:
        raise ConfigError(f"--tasks: {error}") from error
    for entry in dataset:
        if verifier == "reasoning_gym":
            yield json.loads(json.dumps(entry, default=str))
            continue
        answer = str(entry["answer"])
        if reason := check_answer(verifier, answer):
            raise ConfigError(
                f"--verifier {verifier} does not fit task '{name}': {reason} ({answer!r})"
            )
        yield {"prompt": entry["question"], "answer": answer, "verifier": verifier}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", required=True, metavar="A,B,...")
    parser.add_argument("--count", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verifier", choices=VERIFIERS, default="reasoning_gym")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)

"""Measure a checkpoint on benchmarks, with EleutherAI's harness (lm-eval) over our own engine.

    pip install -r requirements-eval.txt
    python eval.py --checkpoint runs/demo/pretrain/pretrain_final.pt --bpb README.md
    python eval.py --checkpoint runs/pretrain_160m/pretrain_160m_final.pt --suite quick
    python eval.py --checkpoint FILE --tasks hellaswag,arc_easy,mmlu,gsm8k --limit 200
    python eval.py --checkpoint FILE --suite chat                    # prompts are conversations
    python eval.py --checkpoint FILE --tasks gsm8k --data-dir DIR    # no network: DIR/gsm8k/*.jsonl

Suites: quick (500 samples each of hellaswag, arc_easy, piqa), base, chat. Names may be tasks,
groups or tags of the harness, or paths of its YAML task files. The results and all that it takes to
get them again are added to eval.json beside the checkpoint, and shown in the run's report. The same
command goes on where an interrupted one was.

Bits per byte (--bpb) need no harness and compare models of any tokenizer on any text.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from train import setup
from train.harness_run import SUITES, Means, Settings, evaluate_checkpoint
from train.setup import RuntimeConfig
from utils.command_line import run_script
from utils.config import ConfigError
from utils.report_evals import references_of, rows_of, text_table


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    settings = read_settings(args)
    runtime = RuntimeConfig(precision=args.precision)
    means = Means(args.data_dir, args.include_path, args.batch_tokens, runtime, args.out)
    dist = setup.start_devices(runtime, settings.seed)
    command = f"python eval.py {shlex.join(argv)}"
    try:
        record = evaluate_checkpoint(args.checkpoint, settings, means, dist, command)
    except KeyboardInterrupt:
        print(f"\ninterrupted; to go on: {command}", file=sys.stderr)
        raise
    print(text_table(rows_of(record)))
    for line in references_of([result["task"] for result in record["results"]]):
        print(f"published, for orientation: {line}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="of any stage but verifier")
    add("--tasks", default="", metavar="A,B,...", help="names of tasks, groups, tags, or files")
    add("--suite", help="quick, base or chat")
    add("--bpb", nargs="+", default=[], metavar="FILE", help="texts to measure bits per byte on")
    add("--limit", type=positive, metavar="N", help="only the first N samples of each task")
    add("--num-fewshot", type=whole, metavar="N", help="solved examples; default: the task's own")
    add("--apply-chat-template", action="store_true", help="prompts are conversations")
    add("--data-dir", type=Path, metavar="DIR", help="benchmark files, looked for here first")
    add("--include-path", type=Path, metavar="DIR", help="a folder of task files of your own")
    add("--batch-tokens", type=positive, metavar="N", help="scored at once; fewer: less memory")
    add(
        "--precision",
        choices=("auto", *setup.PRECISIONS),
        default="auto",
        help="auto: bf16 where a GPU has it",
    )
    add("--seed", type=int, default=0, help="of sampled answers; benchmarks are mostly greedy")
    add("--out", type=Path, metavar="FILE", help="the record, instead of eval.json")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if whole(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, 0 or more")
    return int(text)


def read_settings(args: argparse.Namespace) -> Settings:
    """What is asked for, suites resolved.

    Raises:
        ConfigError: an unknown suite, or nothing is asked for.
    """
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    limit, chat = args.limit, args.apply_chat_template
    if args.suite:
        if args.suite not in SUITES:
            raise ConfigError(f"--suite '{args.suite}' is none of {', '.join(SUITES)}")
        suite = SUITES[args.suite]
        tasks, limit, chat = [*suite.tasks, *tasks], limit or suite.limit, chat or suite.chat
    if not tasks and not args.bpb:
        raise ConfigError("nothing to evaluate: give --tasks, --suite or --bpb (see --help)")
    return Settings(
        tuple(dict.fromkeys(tasks)), tuple(args.bpb), limit, args.num_fewshot, chat, args.seed
    )


if __name__ == "__main__":
    run_script(main)

"""`make demo`: the whole life of a small language model on built-in data, on a CPU.

    python scripts/demo.py                                       # as `make demo`; runs/demo
    python scripts/demo.py --configs MY/CONFIGS --runs-dir OUT   # other configs, another place

Pretraining, SFT, DPO and RLVR, one after the other, then a summary: what each stage learned, what
it did to what the model could before, a few dialogues, and one report over all four runs.

Everything is embedded: no download, no GPU. Run again after Ctrl-C or a kill, it goes on where it
was. `--configs` is a folder with pretrain.yaml, sft.yaml, dpo.yaml and rlvr.yaml, each with the
`name` of its file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.chain import Progress, Stage, alone, check_base, run_stage  # noqa: E402
from utils.command_line import run_script  # noqa: E402
from utils.logging import human_time  # noqa: E402
from utils.report import write_report  # noqa: E402
from utils.terminal import BOLD_GREEN, paint  # noqa: E402


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    os.chdir(ROOT)
    stages = make_stages(args.configs, args.runs_dir)
    began = time.monotonic()
    with alone(args.runs_dir) as lock:
        for number, stage in enumerate(stages, 1):
            print(heading(f"\n[{number}/{len(stages)}] {stage.name}: {stage.about}"), flush=True)
            live(stage, lock)
        summarise(stages, args.runs_dir)
    print(f"\n{human_time(time.monotonic() - began)} in all.", flush=True)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", type=from_root, default="configs/demo", metavar="DIR")
    parser.add_argument("--runs-dir", type=from_root, default="runs/demo", metavar="DIR")
    return parser.parse_args(argv)


def from_root(text: str) -> Path:
    """A path as the stages, which run in the repository's root, are to get it."""
    if text in ("configs/demo", "runs/demo"):
        return Path(text)  # wherever the demo is started
    path = Path(text).resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def make_stages(configs: Path, runs_dir: Path) -> list[Stage]:
    stages: list[Stage] = []
    for script, name, about in (
        ("train_pretrain.py", "pretrain", "learns to write, from generated text, code and maths"),
        ("train_sft.py", "sft", "learns to answer a question and stop, from short chats"),
        ("train_pref.py", "dpo", "learns to prefer right answers, from pairs with a wrong one"),
        ("train_rlvr.py", "rlvr", "learns from its own attempts at sums, which a rule checks"),
    ):
        base = stages[-1] if stages else None
        stages.append(Stage(script, configs / f"{name}.yaml", runs_dir, about, base))
    return stages


def live(stage: Stage, lock: int) -> None:
    """Take the model through a stage, unless it has it behind it; a failure ends the program."""
    check_base(stage)
    if stage.finished():
        print(f"  finished before: {stage.final}", flush=True)
        return
    print(f"  python {' '.join(stage.command())}", flush=True)
    progress = Progress(sys.stdout)
    code = run_stage(stage, progress, lock)
    if code == 0:
        print(f"  done in {progress.elapsed()}: {stage.final}", flush=True)
        return
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        print(f"stopped in {stage.name}", file=sys.stderr)
    else:
        reason = f"signal {code - 128}" if code > 128 else f"exit code {code}"
        print(f"{progress.error()}\n{stage.name} failed ({reason})", file=sys.stderr)
        print(f"its whole output: {stage.folder / 'console.log'}", file=sys.stderr)
    print("run it again to go on from the last checkpoint", file=sys.stderr)
    sys.exit(code)


def summarise(stages: list[Stage], runs_dir: Path) -> None:
    """Tables, dialogues and the way on; the same as values in summary.json."""
    from train import summary  # torch's models are not needed before

    own = [summary.own_account(stage.folder) for stage in stages]
    print(heading("\nWhat each stage learned, on its own held-out data\n"))
    print(summary.own_table(own), flush=True)
    print(heading("\nWhat it did to the rest: every final checkpoint on the same unseen data\n"))
    measured = [summary.measure(stage.final) for stage in stages]
    for stage, one in zip(stages, measured, strict=True):
        summary.keep(stage.final, one)
    print("\n".join([summary.common_table(measured), *summary.remarks(measured)]), flush=True)

    print(heading("\nWhat the model says now\n"))
    talks = summary.dialogues(stages[-1].final)
    for talk in talks:
        for message in talk:
            print(f"  {message['role'] + ':':<10} {message['content']}")
        print()
    values = json.dumps(summary.as_dict(own, measured, talks), indent=2)
    (runs_dir / "summary.json").write_text(values + "\n")
    report = write_report([stage.folder for stage in stages], runs_dir / "report.html")
    print(heading("What next"))
    print(f"  python inference.py --checkpoint {stages[-1].final} --interactive")
    print(f"  open {report} in a browser: all four runs on one page")


def heading(text: str) -> str:
    return paint(text, BOLD_GREEN, sys.stdout)


if __name__ == "__main__":
    run_script(main)

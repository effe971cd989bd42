"""Draw one or several runs as a page that opens in any browser, without network.

    python report.py runs/demo/pretrain                  # writes runs/demo/pretrain/report.html
    python report.py runs/demo/*                         # all stages: runs/demo/report.html
    python report.py runs/pretrain_160m runs/pretrain_160m_b --out compared/report.html

A run may still be going: the page shows it as far as it is. The plots lie beside it as PNG files in
`plots/`. Every stage writes its own report at its end.
"""

from __future__ import annotations

import argparse

from utils.command_line import run_script
from utils.report import runs_among, write_report


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", metavar="FILE", help="the page, instead of the place above")
    args = parser.parse_args(argv)
    runs, others = runs_among(args.runs)
    if others:
        print(f"no runs, left out: {', '.join(others)}")
    print(f"report: {write_report(runs, args.out)}")


if __name__ == "__main__":
    run_script(main)

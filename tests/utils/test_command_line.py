"""A script's arguments, its exit codes and its last words."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.command_line import parse_command_line
from utils.config import ConfigError


def test_command_line() -> None:
    argv = ["--config", "a.yaml", "optim.lr=1", "--resume", "--base-model", "b.pt", "batch=3"]
    line = parse_command_line("Doc.", base_model=True, argv=argv)
    assert (line.config, line.base_model) == (Path("a.yaml"), Path("b.pt"))
    assert (line.resume, line.dry_run, line.resume_from) == (True, False, None)
    assert line.overrides == ["optim.lr=1", "batch=3"]
    assert line.verifier_model is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config"),
        (["--config"], "expected one argument"),
        (["--config", "a", "--resum"], r"'--resum' is no flag \(the nearest is --resume\)"),
        (["--config", "a", "--dryrun"], "nearest is --dry-run"),
        (["--config", "a", "--base-model", "b.pt"], "'--base-model' is no flag"),
        (["--config", "a", "word"], "'word' is no flag .* and no key=value override"),
        (["--config", "a", "--optim.lr=3"], "'--optim.lr=3' is no flag"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_command_line("Doc.", argv=argv)


SCRIPT = '''"""Trains nothing.

Run:  python script.py --config x.yaml
"""
from utils.command_line import parse_command_line, run_script
from utils.config import Config, load_config

class Run(Config):
    steps: int = 1

def main(argv):
    line = parse_command_line(__doc__, argv=argv)
    print(load_config(Run, line.config, line.overrides))
    raise KeyboardInterrupt

run_script(main)
'''


def test_exit_codes_of_a_script(tmp_path: Path) -> None:
    script, config = tmp_path / "script.py", tmp_path / "config.yaml"
    script.write_text(SCRIPT)
    config.write_text("steps: 2")
    root = Path(__file__).parents[2]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root})

    interrupted = run("--config", str(config), "steps=3")
    assert (interrupted.returncode, interrupted.stdout) == (130, "steps=3\n")
    helped = run("--help")
    assert helped.returncode == 0
    assert "Trains nothing.\n\nRun:  python script.py --config x.yaml\n" in helped.stdout
    for wrong in ([], ["--config", str(config), "stesp=1"], ["--config", "gone.yaml"], ["--x"]):
        failed = run(*wrong)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")
        assert "Traceback" not in failed.stderr
        assert failed.stdout == ""


@pytest.mark.parametrize("ending", ["return", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_a_ctrl_c_on_the_way_out_ends_it_without_a_traceback(ending):
    root = Path(__file__).parents[2]
    program = (
        "import atexit, os, signal, sys, time\n"
        "from utils.command_line import run_script\n"
        "def main(argv):\n"
        "    atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))\n"
        f"    {ending}\n"
        "run_script(main)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")

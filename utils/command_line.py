"""The stage scripts' arguments, and how a script ends: with an exit code, and no traceback for a
mistake of the user."""

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from utils.config import ConfigError
from utils.terminal import discard_stdout


@dataclass
class CommandLine:
    """The flags that all stage scripts share."""

    config: Path
    resume: bool
    resume_from: Path | None
    dry_run: bool
    overrides: list[str]
    base_model: Path | None = None
    verifier_model: Path | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `python {self.prog} --help`)")


def parse_command_line(
    doc: str,
    *,
    base_model: bool = False,
    verifier_model: bool = False,
    argv: list[str] | None = None,
) -> CommandLine:
    """Read a stage script's arguments; `doc`, its docstring, is what --help prints first."""
    usage = "%(prog)s --config FILE [flags] [key.sub=value ...]"
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(usage=usage, description=doc, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="the stage's YAML file")
    add("--resume", action="store_true", help="go on from the newest checkpoint of this run")
    add("--resume-from", type=Path, metavar="FILE", help="go on from this checkpoint")
    if base_model:
        add("--base-model", type=Path, metavar="FILE", help="checkpoint of the stage before")
    if verifier_model:
        add("--verifier-model", type=Path, metavar="PATH", help="model that scores completions")
    add("--dry-run", action="store_true", help="validate, print the run's size and cost, leave")
    known, rest = parser.parse_known_args(argv)
    for text in rest:
        if text.startswith("-") or "=" not in text:
            near = get_close_matches(text, parser._option_string_actions, n=1, cutoff=0)[0]
            parser.error(f"'{text}' is no flag (the nearest is {near}) and no key=value override")
    return CommandLine(**vars(known), overrides=rest)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)`; a user's mistake is one message on stderr and exit code 2, no traceback."""
    try:
        try:
            main(sys.argv[1:])
        finally:  # a Ctrl-C from here on must end it, not print a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (
            error.filename is None
        ):  # else a path of the user's: a folder that cannot be written, say
            raise
        remedy = "give another path, or make this one usable"
        print(f"error: {error.filename}: {error.strerror}; {remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _flush() -> None:
    """Now, since Python ends with an error of its own if it fails later."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_stdout()

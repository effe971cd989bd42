"""Let a checkpoint of any stage write: one text, a conversation, or a file of prompts.

    python inference.py --checkpoint runs/demo/pretrain/pretrain_final.pt --prompt "The old mill"
    python inference.py --checkpoint runs/demo/dpo/dpo_final.pt --prompt "What is 3 + 4?" --stats
    python inference.py --checkpoint runs/demo/dpo/dpo_final.pt --interactive
    python inference.py --checkpoint FILE --prompts-file prompts.jsonl --out answers.jsonl

A pretrained checkpoint continues a text; one that was trained to answer gets its chat template. A
prompts file is text with one prompt a line, or jsonl with {"prompt": TEXT} or {"messages": [...]}
on each; its answers come in the same order, other keys of a line are kept.

The same prompt, settings and seed give the same text; --temperature 0 takes the likeliest tokens.
Line n of a prompts file (from 0), and answer n of a conversation, is drawn with seed + n. Left out:
several checkpoints side by side, a server; for those, export_hf.py makes what other tools load.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.chat import ChatTemplate, Message, render_prompt
from data.dialogue import Dialogue, with_system
from data.prompts_file import Line, obstacle, read_prompts
from data.text_stream import before_stop, readable, stop_when
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.generate import DEFAULT_SLOTS, Completion, Engine, Request, StopWhen
from models.sampling import Sampling
from models.transformer import Transformer
from train.runtime import PRECISIONS, choose_precision
from utils import checkpoint
from utils.command_line import run_script
from utils.config import ConfigError, validate
from utils.speed import Speed
from utils.terminal import LineInput, discard_stdout, interruptible, notice, show

USAGE = "%(prog)s --checkpoint FILE (--prompt TEXT | --interactive | --prompts-file FILE) [flags]"
HELP = """\
/system TEXT  tell the model how to behave; without a text, nothing any more
/reset        forget the conversation, keep the system message
/save FILE    write the conversation as json
/help         this
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with a space is never a command."""


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    lines = read_prompts(args.prompts_file) if args.prompts_file else []
    model, tokenizer, template = load(args.checkpoint, args.device, args.dtype)
    if args.system and template is None:
        raise ConfigError(
            f"--system: {args.checkpoint} continues texts and knows no conversations; leave it "
            "out, or give the checkpoint of a later stage"
        )
    writer = Writer(model, tokenizer, template, args)
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character ends nothing
    try:
        if args.interactive:
            Chat(writer).run()
        elif args.prompts_file:
            answer_lines(writer, lines)
        else:
            answer_one(writer, args.prompt)
    except BrokenPipeError:  # `| head` has seen enough; nor may Python flush into it at its end
        discard_stdout()
    except OSError as error:
        what = error.filename or "the output"
        raise ConfigError(f"{what} cannot be written: {error.strerror}") from error


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="write what follows it")
    what.add_argument("--interactive", action="store_true", help="chat in the terminal")
    what.add_argument("--prompts-file", metavar="FILE", help="answer each line")
    add("--out", metavar="FILE", help="answers to --prompts-file, as jsonl; else stdout")
    add("--slots", type=_whole(1), default=DEFAULT_SLOTS, help="lines answered at once")
    add("--system", metavar="TEXT", help="tells a chat model how to behave")
    add("--max-new-tokens", type=_whole(1), default=200, metavar="N")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    add("--temperature", type=float, default=0.8, help="0: the likeliest token")
    add("--top-k", type=int, default=0, help="0: all tokens")
    add("--top-p", type=float, default=0.95)
    add("--min-p", type=float, default=0.0, help="a share of the likeliest token's probability")
    add("--repetition-penalty", type=float, default=1.0, help="1: none")
    add("--seed", type=_whole(0), default=0)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add(
        "--dtype",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="auto: bf16 where a GPU has it",
    )
    add("--stats", action="store_true", help="speed and token counts, on stderr")
    args = parser.parse_args(argv)
    if args.out and not args.prompts_file:
        raise ConfigError("--out is for the answers to --prompts-file; send others to a file by >")
    if args.out and Path(args.out).is_file():
        raise ConfigError(f"--out {args.out}: is there already; choose another name, or delete it")
    if "" in args.stop:
        raise ConfigError("--stop is empty: give the text that ends an answer")
    args.sampling = _sampling(args)
    return args


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) < 2**62):
            raise argparse.ArgumentTypeError(f"'{text}' must be a whole number from {least} on")
        return int(text)

    return convert


def _sampling(args: argparse.Namespace) -> Sampling:
    values = {f.name: getattr(args, f.name) for f in fields(Sampling)}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} ({value}) must be a finite number")
    try:
        return Sampling(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load(
    path: str, device: str = "auto", dtype: str = "auto"
) -> tuple[Transformer, Tokenizer, ChatTemplate | None]:
    """What any stage's checkpoint holds, the model on the GPU if there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; leave it out, or give cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dtype, _ = choose_precision(dtype, torch.device(device))
    except ValueError as error:
        raise ConfigError(f"--dtype: {error}") from error
    state = checkpoint.load(path)
    if state["stage"] == "verifier":
        raise ConfigError(
            f"--checkpoint {path} is a verifier, which scores answers and writes none: "
            "give the checkpoint of another stage"
        )
    model = Transformer(validate(ModelConfig, state["model_config"], path), PRECISIONS[dtype])
    model.load_state_dict(state["model"])
    template = state["chat_template"] and ChatTemplate.from_state(state["chat_template"])
    return model.to(device).eval(), Tokenizer.from_state(state["tokenizer"]), template


# ---------------------------------------------------------------------------------------------
# Writing


@dataclass
class Writer:
    """A checkpoint, and how it is to write.

    Attributes:
        template: None: it continues texts, and knows no conversations.
    """

    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    args: argparse.Namespace

    def tokens(self, messages: list[Message]) -> list[int]:
        """A conversation and the header of its answer, or a text to be continued."""
        if self.template:
            return render_prompt(messages, self.tokenizer, self.template)
        bos = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        return bos + self.tokenizer.encode(messages[-1]["content"])

    def encode(self, messages: list[Message], place: str) -> list[int]:
        """The tokens of what can be answered.

        Raises:
            ConfigError: this cannot; the message begins with `place`.
        """
        if reason := obstacle(messages):
            raise ConfigError(f"{place}: {reason}; give a text to answer")
        ids = self.tokens(messages)
        context = self.model.config.max_seq_len
        if len(ids) >= context:
            raise ConfigError(
                f"{place}: {len(ids):,} tokens, and the model's context of {context:,} must hold "
                "the answer as well: shorten it"
            )
        return ids

    def engine(self, slots: int, capacity: int | None, when: StopWhen | None = None) -> Engine:
        """What runs so many prompts at once; `capacity` as in `Engine`."""
        return Engine(
            self.model,
            slots,
            capacity,
            sampling=self.args.sampling,
            stop_ids={self.tokenizer.eos_id},
            stop_when=when,
        )

    def stream(
        self,
        engine: Engine,
        request: Request,
        speed: Speed,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """The answer in pieces, until it is `interrupted`."""
        ids = takewhile(lambda _: not interrupted(), self._sampled(engine, request, speed))
        return self.text(ids, request.prompt)

    def text(self, ids: Iterable[int], prompt: Sequence[int]) -> Iterator[str]:
        """What is shown of new tokens; a text's continuation may begin with a space."""
        after = () if self.template else prompt
        return before_stop(readable(self.tokenizer, ids, after), self.args.stop)

    def _sampled(self, engine: Engine, request: Request, speed: Speed) -> Iterator[int]:
        for updated in engine.steps([request]):
            for completion in updated:
                new = completion.answer[len(completion.tokens) - 1 :]
                speed.count(len(new))
                yield from new


# ---------------------------------------------------------------------------------------------
# One prompt, a file of prompts


def answer_one(writer: Writer, prompt: str) -> None:
    """Streams the answer; where a text is continued, after the text itself."""
    args = writer.args
    messages = with_system([{"role": "user", "content": prompt}], args.system)
    ids = writer.encode(messages, "--prompt")
    engine = writer.engine(1, len(ids) + args.max_new_tokens)
    if writer.template is None:
        print(prompt, end="", flush=True)
    speed = Speed(len(ids))
    show(writer.stream(engine, Request(ids, args.max_new_tokens, args.seed), speed))
    if args.stats:
        speed.tell()


def answer_lines(writer: Writer, lines: list[Line]) -> None:
    """Answers all lines at once; writes each answer as soon as those before it are written."""
    args = writer.args
    requests = []
    for seed, line in enumerate(lines, args.seed):
        if writer.template is None and "messages" in line.record:
            raise ConfigError(f"{line.place}: this checkpoint only continues texts; give a prompt")
        ids = writer.encode(with_system(line.messages, args.system), line.place)
        requests.append(Request(ids, args.max_new_tokens, seed))
    engine = writer.engine(
        min(args.slots, len(requests)),
        max(len(r.prompt) for r in requests) + args.max_new_tokens,
        stop_when(writer.tokenizer, args.stop),
    )
    speed = Speed(sum(len(r.prompt) for r in requests))
    done: dict[int, Completion] = {}  # not yet written
    written = 0
    out = Path(args.out).open("w", encoding="utf-8") if args.out else nullcontext(sys.stdout)  # noqa: SIM115
    with out as file, tqdm(total=len(lines), unit=" answers", desc="writing") as bar:
        for updated in engine.steps(requests):
            speed.count(sum(not c.ends_with_stop_token for c in updated))
            done |= {c.index: c for c in updated if c.done}
            while completion := done.pop(written, None):
                record = lines[written].record | _answer(writer, completion)
                tqdm.write(json.dumps(record, ensure_ascii=False), file=file)
                file.flush()
                written += 1
                bar.update()
    if args.stats:
        speed.tell()


def _answer(writer: Writer, completion: Completion) -> dict[str, Any]:
    """What a record gets."""
    return {
        "completion": "".join(writer.text(completion.answer, completion.request.prompt)),
        "finish_reason": "stop" if completion.stopped else "length",
        "new_tokens": len(completion.answer),
        "seed": completion.request.seed,
    }


# ---------------------------------------------------------------------------------------------
# A conversation


class Chat:
    """A conversation in the terminal; a checkpoint without a chat template continues each line."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.engine = writer.engine(1, None)
        self.dialogue = Dialogue(writer.args.system)
        self.seed = writer.args.seed

    def run(self) -> None:
        """Until the user leaves."""
        does = "chat" if self.writer.template else "each line is continued (no chat template)"
        notice(f"{self.writer.args.checkpoint}: {does}; /help tells more")
        lines = LineInput("> ")
        while (line := lines.read()) is not None and line.strip() != "/exit":
            if line.startswith("/"):
                self.command(*line.partition(" ")[::2])
            elif line.strip():
                lines.interrupted = self.answer(line)

    def command(self, name: str, text: str) -> None:
        name, text = name.strip(), text.strip()
        if name == "/help":
            notice(HELP)
        elif name not in ("/reset", "/system", "/save"):
            notice(f"there is no {name}; /help tells what there is")
        elif self.writer.template is None:
            notice(f"{name}: each line is continued alone, there is no conversation")
        elif name == "/save":
            try:
                self.dialogue.save(text)
                notice(f"saved in {text}")
            except ConfigError as error:
                notice(f"/save {error}")
        elif name == "/system":
            self.dialogue.system = text
            notice("the system message is set" if text else "there is no system message any more")
        else:
            self.dialogue.forget()
            notice("the conversation is forgotten")

    def answer(self, line: str) -> bool:
        """Streams the answer to a line; returns whether Ctrl-C ended it."""
        writer, args = self.writer, self.writer.args
        self.dialogue.ask(line)
        try:
            ids = self.prompt()
        except ConfigError as error:
            self.dialogue.answer("")
            notice(str(error))
            return False
        if writer.template is None:
            print(line, end="", flush=True)
        speed = Speed(len(ids))
        request = Request(ids, args.max_new_tokens, self.seed)
        with interruptible() as interrupted:
            text = show(writer.stream(self.engine, request, speed, interrupted))
        self.seed += 1
        self.dialogue.answer(text)
        if writer.template is None:
            self.dialogue.forget()
        if interrupted():
            notice("stopped; Ctrl-C again, or Ctrl-D, leaves")
        elif not text.strip():
            notice("the answer is empty; the conversation goes on without it")
        if args.stats:
            speed.tell()
        return interrupted()

    def prompt(self) -> list[int]:
        """The tokens of the conversation, its oldest turns dropped if they leave too little room.

        Raises:
            ConfigError: the last message alone is too long.
        """
        context = self.writer.model.config.max_seq_len
        # A long answer may claim half of a short context, not the whole conversation.
        limit = context - min(self.writer.args.max_new_tokens, context // 2)
        dropped = self.dialogue.dropped
        more = self.dialogue.make_room(lambda seen: len(self.writer.tokens(seen)) <= limit)
        try:
            ids = self.writer.encode(self.dialogue.seen(), "your message")
        except ConfigError:
            self.dialogue.dropped = dropped
            raise
        if more:
            notice(f"the context ({context:,} tokens) is full: the oldest turns are dropped")
        return ids


if __name__ == "__main__":
    run_script(main)

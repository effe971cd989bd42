"""The project's models as lm-eval sees them: the three kinds of requests of its benchmarks.

    loglikelihood          a continuation after a context    multiple choice
    loglikelihood_rolling  a whole text                      perplexity
    generate_until         text until a stop string          answers

lm-eval (EleutherAI's harness; Gao et al. 2021) owns tasks, prompts and metrics. Text becomes tokens
as with its own transformers backend on the exported model, so that both give the same result on
every sample: BOS where documents begin with it, white space at a context's end moved into the
continuation, what exceeds the context cut off at the front. That backend scores a whole text with
BOS both as its first token and before it; so do we here, and `likelihood.bits_per_byte` does not.

One difference is meant: text never becomes a special token here, so a benchmark that spells out
`</s>` is read as those characters. A conversation does have its special tokens: `ChatContext`
carries them beside the text.

Left out: several GPUs, beam search.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data.chat import ChatTemplate, Message, render, render_prompt
from data.tokenizer import Tokenizer
from models import generate
from models.generate import Engine
from models.sampling import Sampling
from models.transformer import Transformer
from train.likelihood import Request, Score, score
from utils.logging import get_logger
from utils.seed import derive

# Answers written at once. At 600M and a context of 2,048 their keys and values take 26 GB.
GPU_SLOTS = 256
CPU_SLOTS = 16
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
KNOWN_SETTINGS = {"do_sample", "until", "max_gen_toks", *SAMPLING_SETTINGS}


class Question(NamedTuple):
    """A prompt to answer; those of which all but the first two are alike share an engine."""

    prompt: list[int]
    seed: int
    new_tokens: int
    until: list[str]
    sampling: dict[str, float]


class ChatContext(str):
    """A rendered conversation, and the tokens that it stands for.

    Attributes:
        head: ids up to the last special token.
        tail: the text after it, which is encoded together with what continues it.
    """

    head: list[int]
    tail: str


class Finished:
    """Results by key, kept in a file as soon as they are there, so that a kill loses one batch.

    One JSON line for each result; a line that a kill has torn is not read.

    Args:
        path: the file; None: nothing is kept.
        identity: what the results depend on beside a request: the model, the code.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path = path
        self.identity = identity.encode()
        self.results: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                self.results[key] = value

    def key(self, *parts: object) -> str:
        digest = hashlib.blake2b(self.identity, digest_size=16)
        for part in parts:
            data = part if isinstance(part, bytes) else repr(part).encode()
            digest.update(b"%d:%s" % (len(data), data))
        return digest.hexdigest()

    def add(self, results: Iterable[tuple[str, Any]]) -> None:
        new = list(results)
        self.results |= dict(new)
        if self.path is None or not new:
            return
        lines = "".join(json.dumps(item) + "\n" for item in new)
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(b"\n" + lines.encode())  # the last line may be torn
        except OSError as error:
            get_logger().warning(f"{self.path}: not written: {error.strerror}; going on without")
            self.path = None

    def forget(self) -> None:
        """Remove the file: what it was kept for is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class HarnessModel(TemplateLM):
    """A model and its tokenizer behind lm-eval's interface.

    Args:
        template: of conversations; None: a base model.
        batch_tokens: that go through the model at once when it scores; None: as suits the device.
        finished: results that are there already, and where new ones are kept.
        seed: of what samples.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        batch_tokens: int | None = None,
        finished: Finished | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.template = template
        self.batch_tokens = batch_tokens
        self.finished = finished or Finished(None, "")
        self.seed = seed
        self.bos = [tokenizer.bos_id] if tokenizer.add_bos else []

    # -----------------------------------------------------------------------------------------
    # Text to tokens

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What predicts the first token of a text."""
        return self.text.eos_id if self.text.bos_id is None else self.text.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return self.text.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        return ([] if add_special_tokens is False else self.bos) + self.text.encode(string)

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> ChatContext:
        """A conversation that is to be answered or, without a prompt, whose last answer goes on."""
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        begun = "" if add_generation_prompt else chat_history[-1]["content"].strip()
        before, prompt = (self._rendered_text(turns, wanted) for wanted in (False, True))
        context = ChatContext(prompt + begun)
        context.head = render(turns, self.text, self.template).tokens
        context.tail = prompt.removeprefix(before) + begun
        if self.template.name == "roles":  # the header is a token
            context.head, context.tail = render_prompt(turns, self.text, self.template), begun
        return context

    def _rendered_text(self, messages: list[Message], prompt: bool) -> str:
        from jinja2 import Environment

        bos = self.text.decode(self.bos, skip_special=False)
        eos = self.text.decode([self.text.eos_id], skip_special=False)
        form = Environment(trim_blocks=True, lstrip_blocks=True).from_string(self.template.jinja)
        return form.render(
            messages=messages, add_generation_prompt=prompt, bos_token=bos, eos_token=eos
        )

    def _split(self, context: str) -> tuple[list[int], str]:
        """Ids that stand in front, and text that is encoded together with what follows."""
        if isinstance(context, ChatContext):
            return context.head, context.tail
        return self.bos, context

    def _pairs(self, arguments: Sequence[tuple[str, str]]) -> list[Request]:
        """Contexts and continuations as tokens, parted where the context alone would end."""
        parts = []
        for context, continuation in arguments:
            head, tail = ([], "") if context == "" else self._split(context)
            stripped = tail.rstrip()
            parts.append((head, stripped, tail[len(stripped) :] + continuation))
        texts = list({t for _, tail, rest in parts for t in (tail, tail + rest)})
        ids = dict(zip(texts, self.text.encode_batch(texts), strict=True))
        requests, before, context = [], None, []
        for head, tail, rest in parts:
            if (head, tail) != before:  # one list for all answers to a question: `score` reads once
                before, context = (head, tail), head + ids[tail] or [self.prefix_token_id]
            requests.append(Request(context, ids[tail + rest][len(ids[tail]) :]))
        return requests

    # -----------------------------------------------------------------------------------------
    # Requests

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = self._pairs([request.args for request in requests])
        return self._sums([_in_parts(pair, self.max_length) for pair in pairs], "log-likelihoods")

    def _loglikelihood_tokens(self, requests: list[tuple], **kwargs: object) -> list[Score]:
        return self._scores([Request(*tokens) for _, *tokens in requests], "log-likelihoods")

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(*request.args), self.prefix_token_id, self.max_length, context_len=1
            )
            texts.append([Request(*make_disjoint_window(window)) for window in windows])
        return [total for total, _ in self._sums(texts, "whole texts")]

    def _sums(self, parts: list[list[Request]], title: str) -> list[Score]:
        """The score of each list of requests: their sum, and whether all are greedy."""
        scores = iter(self._scores([request for some in parts for request in some], title))
        members = [[next(scores) for _ in some] for some in parts]
        return [Score(math.fsum(s[0] for s in some), all(s[1] for s in some)) for some in members]

    def _scores(self, requests: list[Request], title: str) -> list[Score]:
        """Scores in order, of which those that are finished already are not computed."""
        done = self.finished
        keys = [done.key(*(np.array(tokens).tobytes() for tokens in r)) for r in requests]
        todo = [i for i, key in enumerate(keys) if key not in done.results]
        with tqdm(total=len(keys), initial=len(keys) - len(todo), desc=title) as bar:
            results = score(self.model, [requests[i] for i in todo], self.batch_tokens)
            for batch in results:
                done.add((keys[todo[i]], result) for i, result in batch)
                bar.update(len(batch))
        return [Score(*done.results[key]) for key in keys]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [self._question(number, *r.args) for number, r in enumerate(requests)]
        done = self.finished
        keys = [done.key(question) for question in asked]
        alike: dict[str, list[int]] = {}  # what one engine can answer
        for i, key in enumerate(keys):
            if key not in done.results:
                alike.setdefault(repr(asked[i][2:]), []).append(i)
        left = sum(map(len, alike.values()))
        with tqdm(total=len(keys), initial=len(keys) - left, desc="answers") as bar:
            for members in alike.values():
                for number, text in self._answers([asked[i] for i in members]):
                    done.add([(keys[members[number]], text)])
                    bar.update()
        return [done.results[key] for key in keys]

    def _question(self, number: int, context: str, settings: dict[str, Any]) -> Question:
        values = dict(normalize_gen_kwargs(settings))
        if unknown := sorted(values.keys() - KNOWN_SETTINGS):
            get_logger().warning(f"generation settings without effect: {', '.join(unknown)}")
        new = values["max_gen_toks"]
        if new >= self.max_length:  # which the harness refuses for transformers models
            new = self.max_length // 2
        head, tail = self._split(context)
        prompt = (head + self.text.encode(tail))[-(self.max_length - new) :]
        sampled = values["do_sample"]
        sampling = {key: values[key] for key in SAMPLING_SETTINGS if sampled and key in values}
        eos = self.text.decode([self.eot_token_id], skip_special=False)
        until = handle_stop_sequences(list(values.get("until") or []), eos)
        seed = derive(self.seed, number) if sampled else 0
        return Question(prompt, seed, new, until, sampling or {"temperature": 0.0})

    def _answers(self, questions: list[Question]) -> Iterator[tuple[int, str]]:
        """The number and text of each answer as it is done, cut off at its first stop string."""
        new, until, sampling = questions[0][2:]
        slots = GPU_SLOTS if self.model.device.type == "cuda" else CPU_SLOTS
        engine = Engine(
            self.model,
            min(slots, len(questions)),
            max(len(question.prompt) for question in questions) + new,
            sampling=Sampling(**sampling),
            stop_ids={self.eot_token_id},
            stop_when=partial(self._has_stopped, until, max(len(s.encode()) for s in until)),
        )
        requests = (generate.Request(q.prompt, q.new_tokens, q.seed) for q in questions)
        for completion in engine.run(requests):
            text = self.text.decode(completion.answer)
            yield completion.index, postprocess_generated_text(text, until, None)

    def _has_stopped(self, until: list[str], longest: int, tokens: list[int]) -> bool:
        """Whether the last tokens spell a stop string of at most `longest` bytes.

        Two more are read, since a character may be cut in two and a space at the start be lost.
        """
        text = self.text.decode(tokens[-longest - 2 :])
        return any(stop in text for stop in until if stop)


def _in_parts(request: Request, limit: int) -> list[Request]:
    """A continuation longer than the context, in parts that fit."""
    context, continuation = request
    if len(continuation) <= limit:
        return [request]
    tokens = [*context, *continuation]
    starts = range(len(context), len(tokens), limit)
    return [Request(tokens[:start], tokens[start : start + limit]) for start in starts]

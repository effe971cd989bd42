"""What a chat model says: held-out questions answered greedily, at every evaluation of a run.

Exact match compares a whole answer with the expected one, white space around them aside; it is
measured on sources whose answers are the only right ones. A generation has stopped by itself if it
ended with the end of the turn and not because of its length: a model that never stops is the
classic failure of SFT, and no loss shows it.

The base model, which knows no chat form, is measured with a prompt of solved examples instead, so
that the gain is that of the training and not of the form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import NonNegativeInt, PositiveInt

from data.chat_loader import Question
from data.tokenizer import Tokenizer
from models.generate import generate
from models.transformer import Transformer
from utils.config import Config
from utils.distributed import Distributed

GENERATED_AT_ONCE = 32  # their key-value cache takes 3.2 GB at 600M and full context


class ChatEvalConfig(Config):
    """What is generated at an evaluation."""

    questions: NonNegativeInt = 64
    """Held-out questions that are answered, of all sources together."""
    max_new_tokens: PositiveInt = 128
    """Where an answer that does not stop is cut off."""
    samples: NonNegativeInt = 5
    """So many of the answers are kept in samples.jsonl."""


def answer_questions(
    model: Transformer,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    config: ChatEvalConfig,
    dist: Distributed,
) -> tuple[dict[str, float], list[dict]]:
    """Answer held-out questions greedily; every rank answers its share.

    Returns:
        sft/stopped_frac, the share of answers that ended by themselves, and sft/exact_match, of
        those questions whose answer is known, if there are any; and the samples to keep.
    """
    mine = questions[dist.rank :: dist.world_size]
    prompts = [question.prompt for question in mine]
    completions = _complete(model, prompts, tokenizer, config.max_new_tokens)
    counts = torch.zeros(4, dtype=torch.float64)  # exact, known, stopped, all
    samples = []
    for question, completion in zip(mine, completions, strict=True):
        answer, expected = tokenizer.decode(completion), tokenizer.decode(question.answer)
        room = model.config.max_seq_len - len(question.prompt)
        stopped = len(completion) < min(room, config.max_new_tokens)
        exact = question.known and answer.strip() == expected.strip()
        counts += torch.tensor([exact, question.known, stopped, True])
        prompt = tokenizer.decode(question.prompt, skip_special=False)
        samples.append(
            {"prompt": prompt, "answer": answer, "stopped": stopped, "expected": expected}
        )
    exact, known, stopped, total = dist.all_reduce_sum(counts.to(dist.device)).tolist()
    metrics = {"sft/stopped_frac": stopped / total} if total else {}
    if known:
        metrics["sft/exact_match"] = exact / known
    return metrics, samples[: config.samples]


def few_shot_exact_match(
    model: Transformer,
    examples: Sequence[Question],
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    dist: Distributed,
) -> float:
    """The share of known answers that a base model gives after solved examples.

    Its answer is the first line that it writes. What does not fit into the context is cut off at
    the front.
    """
    known = [q for q in questions if q.known][dist.rank :: dist.world_size]
    expected = [tokenizer.decode(question.answer).strip() for question in known]
    solved = "".join(
        f"{_asked(example, tokenizer)} {tokenizer.decode(example.answer).strip()}\n"
        for example in examples
    )
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    longest = max((len(question.answer) for question in known), default=0)
    new = min(longest + 4, model.config.max_seq_len // 2)  # 4: a space, the end of the line
    room = model.config.max_seq_len - new - len(bos)
    prompts = [bos + tokenizer.encode(solved + _asked(q, tokenizer))[-room:] for q in known]
    completions = _complete(model, prompts, tokenizer, new)
    right = sum(
        tokenizer.decode(completion).strip().partition("\n")[0].strip() == answer
        for completion, answer in zip(completions, expected, strict=True)
    )
    counts = torch.tensor([right, len(known)], dtype=torch.float64, device=dist.device)
    right, total = dist.all_reduce_sum(counts).tolist()
    return right / max(1.0, total)


def _asked(question: Question, tokenizer: Tokenizer) -> str:
    """The last user message, as plain text to be completed."""
    ends = [i for i, token in enumerate(question.prompt) if token == tokenizer.eos_id]
    turn = question.prompt[ends[-2] + 1 if len(ends) > 1 else 0 : ends[-1]]
    text = tokenizer.decode(turn).strip().removeprefix("<|user|>").strip()
    return f"Question: {text}\nAnswer:"


def _complete(
    model: Transformer, prompts: list[list[int]], tokenizer: Tokenizer, max_new_tokens: int
) -> list[list[int]]:
    model.eval()
    completions = generate(
        model,
        prompts,
        max_new_tokens,
        temperature=0.0,
        stop_ids=[tokenizer.eos_id],
        slots=GENERATED_AT_ONCE,
    )
    model.train()
    return completions

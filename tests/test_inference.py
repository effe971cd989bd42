"""What a user gets from inference.py: one text, a file of them, one message for a mistake."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import inference
from models.generate import generate
from tests.pipeline import run
from tests.terminal import Terminal
from tests.tiny import CONTEXT, LONG_CONTEXT, NEW, SAMPLING, Checkpoints, assistant, user
from utils.config import ConfigError

PROMPTS = ["The old mill", "What is 3 + 4?", "a", "def add(a, b):\n    return", "naïve 漢字"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def chat(made) -> str:
    return made.save("chat", chat=True)


@pytest.fixture(scope="module")
def base(made) -> str:
    return made.save("base", chat=False)


@pytest.fixture
def write(capsys):
    """Runs the script here, on the CPU; returns what it wrote on stdout and stderr."""

    def call(path: str, *argv: object, new: int = NEW) -> tuple[str, str]:
        flags = ["--checkpoint", path, "--max-new-tokens", str(new), "--device", "cpu"]
        inference.main([*flags, *map(str, argv)])
        return tuple(capsys.readouterr())

    return call


# ---------------------------------------------------------------------------------------------
# One prompt


@pytest.mark.parametrize("seed", [0, 7])
def test_one_answer_is_that_of_generate(made, chat, write, seed):
    out, err = write(chat, "--prompt", PROMPTS[1], "--seed", seed)
    assert out == made.answer([user(PROMPTS[1])], seed=seed) + "\n"
    assert err == ""


def test_a_base_checkpoint_goes_on_with_the_text(made, base, write):
    out, _ = write(base, "--prompt", PROMPTS[0])
    assert out == PROMPTS[0] + made.continuation(PROMPTS[0]) + "\n"


def test_the_system_message_is_said_first(made, chat, write):
    out, _ = write(chat, "--prompt", "Hi", "--system", "Be brief")
    system = {"role": "system", "content": "Be brief"}
    assert out == made.answer([system, user("Hi")]) + "\n"
    assert out != made.answer([user("Hi")]) + "\n"


def test_the_flags_of_sampling_arrive(made, chat, write):
    flags = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    flags["repetition_penalty"] = 1.3
    argv = [part for name, v in flags.items() for part in (f"--{name.replace('_', '-')}", v)]
    out, _ = write(chat, "--prompt", "Hi", *argv)
    assert out == made.answer([user("Hi")], **flags) + "\n"
    for name in flags:
        assert out != made.answer([user("Hi")], **{k: v for k, v in flags.items() if k != name})


def test_bf16_on_a_cpu(chat, write):
    out, _ = write(chat, "--prompt", "Hi", "--dtype", "bf16")
    assert len(out) > NEW


def test_an_answer_ends_with_the_context(made, base, write):
    out, err = write(base, "--prompt", PROMPTS[0], "--stats", new=10 * CONTEXT)
    assert out == PROMPTS[0] + made.continuation(PROMPTS[0], 10 * CONTEXT) + "\n"
    tokens = len(made.tokenizer.encode(PROMPTS[0])) + 1
    assert f"{tokens} prompt tokens, {CONTEXT - tokens} new tokens" in err


def test_the_end_of_text_token_ends_the_text(made, write):
    """It is made likelier than what would have come third."""
    ids = [made.tokenizer.bos_id, *made.tokenizer.encode("Hi")]
    (free,) = generate(made.model, [ids], NEW, temperature=0)
    assert free.index(free[2]) == 2
    state = {k: v.clone() for k, v in made.model.state_dict().items()}
    row = state["embedding.weight"]
    row[made.tokenizer.eos_id] = 1.01 * row[free[2]]
    path = made.save("ends", chat=False, model=state)
    out, err = write(path, "--prompt", "Hi", "--temperature", 0, "--stats")
    assert out == "Hi" + made.tokenizer.decode(free[:2]) + "\n"
    assert " 2 new tokens" in err


def test_a_stop_string_across_tokens_ends_the_text_before_it(made, chat, write):
    prompt = made.render([user("Hi")])
    (ids,) = generate(made.model, [prompt], NEW, **SAMPLING)
    texts = [made.tokenizer.decode(ids[:n]) for n in range(NEW + 1)]
    for n in range(3, NEW - 1, 4):
        stop = texts[NEW][len(texts[n]) - 1 : len(texts[n + 1]) + 1]  # of three tokens
        assert len(stop) >= 3
        out, err = write(chat, "--prompt", "Hi", "--stop", stop, "--stop", "never", "--stats")
        assert out == texts[NEW].partition(stop)[0] + "\n"
        taken = next(n for n, text in enumerate(texts) if stop in text)
        assert f"{taken} new tokens" in err


def test_stats_are_told_on_stderr(made, chat, write):
    out, err = write(chat, "--prompt", "Hi", "--stats")
    tokens = len(made.render([user("Hi")]))
    assert out == made.answer([user("Hi")]) + "\n"
    line = r"stats: [\d,.]+ tokens/s, time to first token [\d.]+ s, {} prompt tokens, {} new tokens"
    assert re.match(line.format(tokens, NEW), err)
    assert err.count("\n") == 1


def test_text_appears_while_it_is_made(made, tmp_path):
    """A run that is killed within its answer has shown the beginning of it."""
    path = made.save("long", chat=True, context=LONG_CONTEXT)
    argv = ("--prompt", "Hi", "--max-new-tokens", LONG_CONTEXT, "--device", "cpu")
    with Terminal("inference", "--checkpoint", path, *argv) as terminal:
        terminal.expect(re.escape(made.answer([user("Hi")])))
        terminal.signal(signal.SIGKILL)
        assert terminal.wait() == -signal.SIGKILL


# ---------------------------------------------------------------------------------------------
# A file of prompts


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_a_file_is_answered_in_order_as_one_at_a_time(chat, write, tmp_path, slots):
    chats = [[user(p)] for p in PROMPTS]
    chats[2] = [{"role": "system", "content": "Hm"}, user("a"), assistant("b"), user("c")]
    records = [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)]
    records[2] = {"messages": chats[2]}
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    argv = ("--stop", "e", "--seed", 3, "--stats", "--system", "Be brief")
    flags = ("--prompts-file", source, "--out", target, "--slots", slots)
    out, err = write(chat, *flags, *argv)
    assert out == ""
    assert "5/5" in err
    answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    new_tokens = sum(a["new_tokens"] for a in answers)
    assert f" {new_tokens} new tokens" in err
    for i, (record, answer) in enumerate(zip(records, answers, strict=True)):
        assert answer.items() >= record.items()
        assert answer["seed"] == 3 + i
        if "prompt" in record:
            one, told = write(chat, "--prompt", record["prompt"], *argv, "--seed", 3 + i)
            assert answer["completion"] + "\n" == one
            assert f" {answer['new_tokens']} new tokens" in told
    assert {a["finish_reason"] for a in answers} == {"stop", "length"}


def test_a_conversations_own_system_message_is_kept(made, chat, write, tmp_path):
    source = tmp_path / "in.jsonl"
    messages = [{"role": "system", "content": "Hm"}, user("a"), assistant("b"), user("c")]
    source.write_text(json.dumps({"messages": messages}))
    out, _ = write(chat, "--prompts-file", source, "--system", "Be brief")
    assert json.loads(out)["completion"] == made.answer(messages)


def test_a_text_file_of_a_base_checkpoint_goes_to_stdout(made, base, write, tmp_path):
    source = tmp_path / "in.txt"
    texts = [p for p in PROMPTS if "\n" not in p]
    source.write_text("\n".join(texts) + "\n", encoding="utf-8")
    out, err = write(base, "--prompts-file", source)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["prompt"] for a in answers] == texts
    expected = [made.continuation(t, seed=i) for i, t in enumerate(texts)]
    assert [a["completion"] for a in answers] == expected
    assert "stats" not in err


# ---------------------------------------------------------------------------------------------
# Mistakes


def outcome(tmp_path: Path, *argv: object, **limits: Any) -> Any:
    return run("inference", *argv, log=tmp_path / "log", **limits)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--prompt", "a", "--checkpoint", "none.pt"], "none.pt: cannot be read: No such file"),
        (["--prompt", "a", "--checkpoint", "README.md"], "damaged or not a checkpoint"),
        ([], "one of the arguments --prompt --interactive --prompts-file is required"),
        (["--prompt", "a", "--interactive"], "not allowed with argument"),
        (["--prompt", ""], "--prompt: empty message"),
        (["--prompt", " \n"], "--prompt: empty message"),
        (["--prompt", "a\udcff"], "--prompt: broken UTF-8"),
        (["--prompt", "word " * CONTEXT], f"model's context of {CONTEXT}"),
        (["--prompts-file", "none.txt"], "none.txt: cannot be read: No such file"),
        (["--prompts-file", "{bad}"], "bad.jsonl, line 2: not JSON"),
        (["--prompts-file", "{long}"], "long.txt, line 2: "),
        (["--prompts-file", "{good}", "--out", "{bad}"], "is there already"),
        (["--prompts-file", "{good}", "--out", "no/such/folder"], "no/such/folder cannot be wri"),
        (["--prompt", "a", "--out", "b"], "--out is for the answers to --prompts-file"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--temperature", "-1"], "temperature (-1.0)"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature (nan) must be a finite number"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p (1.5)"),
        (["--prompt", "a", "--min-p", "-1"], "min_p (-1.0)"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty (0.0)"),
        (["--prompt", "a", "--max-new-tokens", "0"], "must be a whole number from 1 on"),
        (["--prompt", "a", "--slots", "0"], "must be a whole number from 1 on"),
        (["--prompt", "a", "--seed", str(2**64)], "must be a whole number from 0 on"),
        (["--prompt", "a", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_a_mistake_is_one_message(chat, tmp_path, argv, reason):
    files = {"good.txt": "a\n", "bad.jsonl": '{"prompt": "a"}\n{"prompt"\n'}
    files["long.txt"] = "a\n" + "word " * CONTEXT
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = {Path(name).stem: tmp_path / name for name in files}
    argv = [part.format(**places) if "{" in part else part for part in argv]
    result = outcome(tmp_path, *([] if "--checkpoint" in argv else ["--checkpoint", chat]), *argv)
    assert result.code == 2
    assert reason in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert (tmp_path / "bad.jsonl").read_text() == files["bad.jsonl"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(chat):
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        inference.main(["--checkpoint", chat, "--prompt", "a", "--device", "cuda"])


def test_a_checkpoint_that_knows_no_conversations(base, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": [user("a")]}))
    for argv in (["--prompt", "a", "--system", "b"], ["--prompts-file", str(source)]):
        with pytest.raises(ConfigError, match="continues texts"):
            inference.main(["--checkpoint", base, *argv])


def test_a_verifier_is_refused(made, tmp_path):
    path = made.save("verifier", chat=True, stage="verifier")
    result = outcome(tmp_path, "--checkpoint", path, "--prompt", "a")
    assert result.code == 2
    assert "scores answers and writes none" in result.err


def test_a_full_disk_is_told_and_keeps_what_was_written(chat, tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a\n" * 50)
    argv = ("--checkpoint", chat, "--prompts-file", source, "--out", target, "--slots", 1)
    result = outcome(tmp_path, *argv, "--max-new-tokens", NEW, largest_file=4096)
    assert result.code == 2
    assert "cannot be written: File too large" in result.err
    assert "Traceback" not in result.err
    first = target.read_text().splitlines()[0]
    assert json.loads(first)["prompt"] == "a"

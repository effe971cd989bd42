"""Our side of lm-eval against its own transformers backend on the exported model, by sample."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")
pytest.importorskip("accelerate", reason="needs requirements-dev.txt")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import export_hf
from data import builtin
from data.chat import ChatTemplate, render, render_prompt
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from tests.local_tasks import write_tasks
from train.harness import ChatContext, Finished, HarnessModel
from train.harness_tasks import load_tasks
from train.likelihood import Request
from utils import checkpoint
from utils.config import load_yaml, plain

ROOT = Path(__file__).resolve().parents[2]
DEMO = load_yaml(ROOT / "configs/model/smol_tiny.yaml")
# The demo's shape, with room for the 256 tokens that lm-eval's tasks generate by default.
SHAPE = ModelConfig(**DEMO | {"vocab_size": 1024, "max_seq_len": 640})
LLAMA = ROOT.parent / "shared/data/tokenizers/llama2"
needs_llama = pytest.mark.skipif(not LLAMA.exists(), reason="the Llama-2 tokenizer is not here")
KINDS = ["roles", "zephyr", pytest.param("llama", marks=needs_llama)]
GSM8K = ROOT.parent / "shared/data/rlvr"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 2 + 3?\n"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And in words?"},
]


def without_roles(tokenizer: Tokenizer, **changes: object) -> Tokenizer:
    """The same vocabulary, in which no token stands for a role: conversations in Zephyr's form."""
    state = tokenizer.state_dict()
    values = json.loads(state["json"])
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] in ("<s>", "</s>")]
    roles = {role: tokenizer.roles[role] for role in ("bos", "eos")}
    return Tokenizer.from_state(state | {"json": json.dumps(values), "roles": roles} | changes)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    texts = [builtin.document(d, i) for i in range(60) for d in builtin.DOMAINS]
    roles = train_tokenizer(texts, TokenizerConfig(vocab_size=1024))
    plain = without_roles(roles)
    made = {"roles": roles, "zephyr": plain, "no bos": without_roles(roles, add_bos=False)}
    if LLAMA.exists():
        made["llama"] = load_tokenizer(TokenizerConfig(path=str(LLAMA)))
    return made


def perturbed(shape: ModelConfig) -> Transformer:
    """No two weights are alike, and no answer is obvious."""
    torch.manual_seed(0)
    model = Transformer(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 2.0))
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return perturbed(SHAPE)


@pytest.fixture(scope="module")
def backends(tokenizers, tmp_path_factory):
    """Ours and lm-eval's, for a vocabulary."""
    made = {}

    def pair(kind: str) -> tuple[HarnessModel, HFLM]:
        if kind not in made:
            folder, tokenizer = tmp_path_factory.mktemp(kind.replace(" ", "_")), tokenizers[kind]
            template = ChatTemplate.of(tokenizer)
            shape = SHAPE.model_copy(update={"vocab_size": tokenizer.vocab_size})
            model = perturbed(shape)
            values = {
                "stage": "sft", "step": 1, "tokens": 1, "model": model.state_dict(),
                "model_config": plain(shape), "tokenizer": tokenizer.state_dict(),
                "chat_template": template.state_dict(), "config": {"name": "x"},
            }  # fmt: skip
            checkpoint.save(folder / "x.pt", values)
            out = folder / "hf"
            export_hf.main(["--checkpoint", str(folder / "x.pt"), "--out", str(out)])
            theirs = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=1)
            made[kind] = HarnessModel(model, tokenizer, template), theirs
        return made[kind]

    return pair


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Small tasks of the three kinds, as files."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def evaluate(model: object, names: list[str], tasks: Path | None, **settings: object) -> dict:
    loaded, missing = load_tasks(names, settings.pop("data_dir", None), tasks)
    assert missing == []
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(model, tasks=loaded, task_manager=manager, bootstrap_iters=0, **settings)


def assert_same_samples(ours: dict, theirs: dict, name: str) -> None:
    pairs = list(zip(ours["samples"][name], theirs["samples"][name], strict=True))
    assert pairs
    for a, b in pairs:
        for mine, yours in zip(a["resps"], b["resps"], strict=True):
            if isinstance(mine[0], tuple):
                assert mine[0][0] == pytest.approx(yours[0][0], rel=1e-5, abs=1e-4)
                assert mine[0][1] == yours[0][1]
            elif isinstance(mine[0], float):
                assert mine[0] == pytest.approx(yours[0], rel=1e-5)
            else:
                assert mine == yours
        for metric in a["metrics"]:
            assert a[metric] == pytest.approx(b[metric], rel=1e-5)
    assert ours["results"][name].keys() == theirs["results"][name].keys()


@pytest.mark.parametrize("kind", ["no bos", *KINDS[::2]])
@pytest.mark.parametrize(
    "name", ["own_choice", "own_spaced", "own_begun", "own_text", "own_answer"]
)
def test_every_sample_is_that_of_the_transformers_backend(backends, tasks, kind, name):
    ours, theirs = backends(kind)
    results = [evaluate(side, [name], tasks) for side in (ours, theirs)]
    assert_same_samples(*results, name)
    if name == "own_answer":
        texts = [sample["resps"][0][0] for sample in results[0]["samples"][name]]
        assert any(texts) and not any("e" in text for text in texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["own_choice", "own_begun", "own_answer"])
def test_every_sample_of_a_chat_model_is_that_of_the_transformers_backend(
    backends, tasks, kind, name
):
    ours, theirs = backends(kind)
    settings = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    results = [evaluate(side, [name], tasks, **settings) for side in (ours, theirs)]
    assert_same_samples(*results, name)
    prompts = [sample["arguments"][0][0] for sample in results[0]["samples"][name]]
    assert prompts == [sample["arguments"][0][0] for sample in results[1]["samples"][name]]


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_every_sample_of_gsm8k_is_that_of_the_transformers_backend(backends, tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl.gz").symlink_to(GSM8K / f"gsm8k_{split}.jsonl.gz")
    ours, theirs = backends("roles")
    settings = {"data_dir": tmp_path, "limit": 3, "num_fewshot": 1}
    task = str(Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml")  # no index of all tasks
    results = [evaluate(side, [task], None, **settings) for side in (ours, theirs)]
    assert_same_samples(*results, "gsm8k")


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_has_the_tokens_of_training(backends, tokenizers, kind):
    ours, _ = backends(kind)
    tokenizer = tokenizers[kind]
    template = ChatTemplate.of(tokenizer)
    context = ours.apply_chat_template(CHAT)
    assert isinstance(context, ChatContext)
    assert context.head + tokenizer.encode(context.tail) == render_prompt(CHAT, tokenizer, template)
    whole = render([*CHAT, {"role": "assistant", "content": "five"}], tokenizer, template).tokens
    (request,) = ours._pairs([(context, "five")])
    assert [*request.context, *request.continuation] == whole[:-1]
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    context = ours.apply_chat_template(begun, add_generation_prompt=False)
    tokens = context.head + tokenizer.encode(context.tail)
    assert tokens == render(begun, tokenizer, template).tokens[:-1]


def test_text_never_becomes_a_special_token(backends, tokenizers):
    ours, _ = backends("roles")
    tokenizer = tokenizers["roles"]
    (request,) = ours._pairs([("<s>Say </s>", " <|user|>")])
    ids = {*request.context[1:], *request.continuation}
    assert request.context[0] == tokenizer.bos_id
    assert not ids & set(tokenizer.roles.values())


def instance(kind: str, *arguments: object) -> Instance:
    return Instance(kind, {}, arguments, 0, ("x", 0, 1))


def test_prompts_too_long_for_the_context_keep_their_end(model, tokenizers):
    ours = HarnessModel(model, tokenizers["roles"])
    long = builtin.document("web", 1) * 30
    question = ours._question(0, long, {"until": ["x"], "max_gen_toks": 100})
    assert question.new_tokens == 100 and question.until == ["x", "</s>"]
    assert question.prompt == ours.tok_encode(long)[-540:]
    question = ours._question(0, long, {"until": [], "max_gen_toks": 9999})
    assert (len(question.prompt), question.new_tokens) == (320, 320)


def test_a_continuation_longer_than_the_context_is_scored_in_parts(model, tokenizers):
    """Each token once, after as much as fits: what the harness refuses for transformers models."""
    ours = HarnessModel(model, tokenizers["roles"])
    long = builtin.document("web", 1) * 7
    (total, greedy), short = ours.loglikelihood(
        [instance("loglikelihood", "Once", text) for text in (long, " upon")]
    )
    (pair,) = ours._pairs([("Once", long)])
    n, limit = len(pair.continuation), ours.max_length
    assert limit < n < 2 * limit and not greedy
    tokens = [*pair.context, *pair.continuation]
    end = len(pair.context) + limit
    parts = [Request(pair.context, pair.continuation[:limit]), Request(tokens[:end], tokens[end:])]
    expected = sum(found.logprob for found in ours._scores(parts, ""))
    assert total == pytest.approx(expected, rel=1e-6)
    assert short == ours.loglikelihood([instance("loglikelihood", "Once", " upon")])[0]


def test_sampled_answers_depend_on_seed_and_number_alone(model, tokenizers):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = [instance("generate_until", text, settings) for text in ("One", "Two", "One")]

    def answers(seed: int) -> list[str]:
        return HarnessModel(model, tokenizers["roles"], seed=seed).generate_until(requests)

    assert answers(1) == answers(1) != answers(2)
    assert answers(1)[0] != answers(1)[2]


def test_finished_results_are_not_computed_again(model, tokenizers, tmp_path, monkeypatch):
    path = tmp_path / "partial.jsonl"
    scored = [instance("loglikelihood", "Once", f" upon {i}") for i in range(5)]
    asked = [instance("generate_until", "Once", {"until": ["x"], "max_gen_toks": 5})]

    def run(identity: str) -> tuple:
        finished = Finished(path, identity)
        ours = HarnessModel(model, tokenizers["roles"], finished=finished)
        return ours.loglikelihood(scored), ours.generate_until(asked)

    first = run("a")
    path.write_bytes(path.read_bytes()[:-5])  # a kill within the last line
    monkeypatch.setattr("train.harness.score", lambda model, requests, tokens: iter([]))
    again = run("a")  # the torn answer alone is written anew
    assert again == first
    calls = []
    monkeypatch.setattr("train.harness.Engine", lambda *args, **kwargs: calls.append(args))
    assert run("a") == first and calls == []
    with pytest.raises(KeyError):
        run("b")  # of another model: nothing of it is used


def test_the_bench_compares_like_with_like(capsys):
    """Our scores, lm-eval's, and those of what stands in for it where it is not installed."""
    from bench import eval as bench

    bench.main(["--shape", "tiny", "--device", "cpu", "--requests", "60"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["peer"] == "lm-eval's HFLM"
    for row in result["families"].values():
        assert row["nats_apart_per_token"] < 1e-5 and row["greedy_alike"] == 1
    shape = bench.ModelConfig(**load_yaml(bench.SHAPES / "smol_tiny.yaml"))
    _, theirs = bench.build("tiny", torch.device("cpu"), torch.float32)
    requests = bench.make_requests("letters", 20, shape) + bench.make_requests("endings", 20, shape)
    stand_in = bench.padded_scores(theirs, requests, 4)
    for a, b in zip(stand_in, bench.make_peer(theirs)[1](requests, 4), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]

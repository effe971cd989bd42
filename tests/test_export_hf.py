"""Exports against transformers: the same logits, text and tokens, or nothing at all."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, SmolLM3ForCausalLM

import export_hf
from data import builtin
from data.chat import ChatTemplate, render, render_prompt
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from models.config import ModelConfig
from models.generate import generate
from models.transformer import Transformer
from tests.pipeline import run
from utils import checkpoint, model_card
from utils.config import ConfigError, load_yaml, plain

ROOT = Path(__file__).resolve().parents[1]
LLAMA = ROOT.parent / "shared/data/tokenizers/llama2"
STEP, TOKENS = 30, 4321
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hello,\n\n  world 12! "},
    {"role": "assistant", "content": "Hi! 漢字 naïve\n\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "- see you\n- soon"},
]


def shape(name: str) -> ModelConfig:
    return ModelConfig(**load_yaml(ROOT / f"configs/model/{name}.yaml"))


def perturbed(config: ModelConfig) -> Transformer:
    """A model no two weights of which are alike: ones in a norm would hide a wrong place."""
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 2.0))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [builtin.document(d, i) for i in range(100) for d in builtin.DOMAINS]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=1024))


def without_roles(tokenizer: Tokenizer, **changes: object) -> Tokenizer:
    """The same vocabulary, in which no token stands for a role."""
    state = tokenizer.state_dict()
    values = json.loads(state["json"])
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] in ("<s>", "</s>")]
    roles = {role: tokenizer.roles[role] for role in ("bos", "eos")}
    return Tokenizer.from_state(state | {"json": json.dumps(values), "roles": roles} | changes)


@pytest.fixture
def save(tmp_path, tokenizer):
    """Writes a model's checkpoint; returns its path."""

    def write(model: Transformer, tokenizer: Tokenizer = tokenizer, **changes: object) -> Path:
        values = {
            "stage": "sft", "step": STEP, "tokens": TOKENS, "model": model.state_dict(),
            "model_config": plain(model.config), "tokenizer": tokenizer.state_dict(),
            "chat_template": ChatTemplate.of(tokenizer).state_dict(),
            "config": {"name": "chatty", "data": {"sources": [
                {"name": "a", "path": "builtin:chats", "weight": 3.0},
                {"name": "b", "path": "org/data", "weight": 1.0},
            ]}},
        }  # fmt: skip
        path = tmp_path / "run" / "chatty_final.pt"
        checkpoint.save(path, values | changes)
        return path

    return write


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "exported"


def export(path: Path, out: Path, dtype: str = "float32") -> SmolLM3ForCausalLM:
    export_hf.main(["--checkpoint", str(path), "--out", str(out), "--dtype", dtype])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is SmolLM3ForCausalLM
    return model


def sequences(count: int, length: int, tokenizer: Tokenizer, vocab_size: int) -> torch.Tensor:
    """Rows (count, length), half of random tokens and half of built-in text."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(vocab_size, (count - count // 2, length), generator=generator)
    stream, index = [], 0
    while len(stream) < count // 2 * length:
        domain = builtin.DOMAINS[index % len(builtin.DOMAINS)]
        stream += tokenizer.encode_documents([builtin.document(domain, 1000 + index)])[0]
        index += 1
    real = torch.tensor(stream[: count // 2 * length], dtype=torch.int64)
    return torch.cat([random, real.view(-1, length)])


@torch.no_grad()
def largest_difference(model: Transformer, theirs: SmolLM3ForCausalLM, rows: torch.Tensor) -> float:
    differences = []
    for part in rows.split(10):
        difference = theirs(part).logits - export_hf.logits(model, part)
        differences.append(difference.abs().max().item())
    return max(differences)


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_logits_are_the_checkpoints(save, out, tokenizer, count):
    model = perturbed(shape("smol_tiny"))
    theirs = export(save(model), out)
    rows = sequences(count, 256, tokenizer, model.config.vocab_size)
    assert largest_difference(model, theirs, rows) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smol_160m", "smol_600m"])
def test_logits_of_the_large_shapes_are_the_checkpoints(save, out, tokenizer, name):
    model = perturbed(shape(name))
    theirs = export(save(model), out)
    short = sequences(16, 128, tokenizer, model.config.vocab_size)
    long = sequences(1, 2048, tokenizer, model.config.vocab_size)
    assert largest_difference(model, theirs, short) < 1e-4
    assert largest_difference(model, theirs, long) < 1e-4


@pytest.mark.parametrize("nope_every", [0, 3, 4])
def test_any_choice_of_layers_without_rotary_embedding(save, out, tokenizer, capsys, nope_every):
    config = ModelConfig(
        vocab_size=1024, d_model=32, n_layers=6, n_heads=4, n_kv_heads=1, d_ffn=64,
        max_seq_len=64, nope_every=nope_every, rope_theta=500.0, norm_eps=1e-3,
    )  # fmt: skip
    model = perturbed(config)
    theirs = export(save(model), out)
    rows = sequences(4, 64, tokenizer, config.vocab_size)
    assert largest_difference(model, theirs, rows) < 1e-4
    assert ("llama.cpp" in capsys.readouterr().out) == (nope_every != 4)
    assert ("convert_hf_to_gguf" in (out / "README.md").read_text()) == (nope_every == 4)


@pytest.mark.parametrize("name", ["smol_tiny", "smol_160m", "smol_600m"])
def test_llama_cpp_finds_the_layers_without_rotary_embedding(name):
    """It reads no such list: it takes layer i for one when (i + 1) is a multiple of 4."""
    config = export_hf.hf_config(shape(name), {}, torch.float32)
    steps = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    assert config.no_rope_layers == steps
    assert config.no_rope_layer_interval == 4


def test_tools_written_for_transformers_4_find_theta_and_tokenizer_class(save, out):
    config = shape("smol_tiny").model_copy(update={"rope_theta": 77.0})
    export(save(perturbed(config)), out)
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 77.0
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoConfig.from_pretrained(out).rope_parameters["rope_theta"] == 77.0


@torch.no_grad()
def test_bf16_is_within_three_percent(save, out, tokenizer):
    """The root mean square of the differences, over that of the logits."""
    model = perturbed(shape("smol_tiny"))
    theirs = export(save(model), out, "bfloat16")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    rows = sequences(12, 256, tokenizer, model.config.vocab_size)
    ours = export_hf.logits(model, rows)
    difference = theirs(rows).logits.float() - ours
    deviation = (difference.square().mean() / ours.square().mean()).sqrt()
    assert 1e-4 < deviation < export_hf.BFLOAT16_TOLERANCE


def test_greedy_text_is_that_of_generate_and_stops(save, out, tokenizer):
    """EOS is made a little likelier than what would have come tenth, so that it ends the text."""
    model = perturbed(shape("smol_tiny"))
    question = render_prompt(CHAT[:2], tokenizer, ChatTemplate.of(tokenizer))
    (free,) = generate(model, [question], 40, temperature=0)
    assert len(free) == 40
    weight = model.embedding.weight.data
    weight[tokenizer.eos_id] = 1.01 * weight[free[10]]
    (ours,) = generate(model, [question], 40, temperature=0, stop_ids={tokenizer.eos_id})
    assert len(ours) <= free.index(free[10])

    theirs = export(save(model), out)
    exported = AutoTokenizer.from_pretrained(out)
    inputs = exported.apply_chat_template(
        CHAT[:2], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)[0, len(question) :]
    assert answer.tolist() == [*ours, tokenizer.eos_id]
    assert exported.decode(answer, skip_special_tokens=True) == tokenizer.decode(ours)


@pytest.mark.parametrize("form", ["roles", "zephyr", "llama"])
def test_the_tokenizer_reads_text_and_conversations_alike(save, out, tokenizer, form):
    if form == "llama" and not LLAMA.exists():
        pytest.skip("the Llama-2 tokenizer is not here")
    ours = {
        "roles": lambda: tokenizer,
        "zephyr": lambda: without_roles(tokenizer),
        "llama": lambda: load_tokenizer(TokenizerConfig(path=str(LLAMA))),
    }[form]()
    small = ModelConfig(
        vocab_size=32_000, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ffn=16
    )
    export(save(Transformer(small), ours), out)
    theirs, template = AutoTokenizer.from_pretrained(out), ChatTemplate.of(ours)
    texts = [builtin.document(d, i) for i in range(10) for d in builtin.DOMAINS]
    assert theirs(texts).input_ids == [[ours.bos_id, *ours.encode(t)] for t in texts]
    for end in (3, 5):
        rendered = theirs.apply_chat_template(CHAT[:end], return_dict=False)
        assert rendered == render(CHAT[:end], ours, template).tokens
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.pad_token_id is not None
    assert (out / "tokenizer.model").exists() == (form == "llama")
    for ids in theirs(texts).input_ids:
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_a_vocabulary_without_bos_gets_none(save, out, tokenizer):
    ours = without_roles(tokenizer, add_bos=False)
    config = shape("smol_tiny")
    export(save(Transformer(config), ours, stage="pretrain", chat_template=None), out)
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs("Hello").input_ids == ours.encode("Hello")
    assert theirs.chat_template is None
    assert not json.loads((out / "tokenizer_config.json").read_text())["add_bos_token"]
    assert "apply_chat_template" not in (out / "README.md").read_text()


def test_the_card_tells_the_runs_facts(save, out):
    path = save(perturbed(shape("smol_tiny")))
    lines = [{"step": s, "time": 0.0, "val/loss": 1.25 + STEP - s, "x": None} for s in (0, STEP)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path.parent / "metrics.jsonl").write_text(text + '{"step": 30, "val/loss": 9')
    export(path, out)
    card = (out / "README.md").read_text()
    for fact in (
        "# chatty", "1,049,728", "30 steps, 4,321 tokens", "| val/loss | 1.25 |",
        "| a (`builtin:chats`) | 3 x an epoch |", "name: chatty", "apply_chat_template",
    ):  # fmt: skip
        assert fact in card
    assert "31.25" not in card


def test_the_card_names_what_was_trained_on(save, out):
    hub = {"name": "g", "path": "hub:org/math", "subset": "main", "split": "train"}
    data = {
        "sources": [hub | {"weight": 0.5}, hub | {"name": "t", "split": "test", "use": "held_out"}],
        "text_tokens": 9000,
        "text_sources": [
            {"name": "web", "path": "w.txt", "weight": 3.0, "split": "train"},
            {"name": "code", "path": "c.txt", "weight": 1.0},
        ],
    }

    def rows(stage: str) -> list[str]:
        state = {"stage": stage, "config": {"data": data}}
        (text,) = model_card._data(state)
        return text.splitlines()[4:]

    plain = "of 9,000 tokens of plain text an epoch"
    assert rows("sft") == [
        "| g (`hub:org/math`, main, train) | 0.5 x an epoch |",
        f"| web (`w.txt`) | 75.0% {plain} |",
        f"| code (`c.txt`) | 25.0% {plain} |",
    ]
    data["sources"] = data.pop("text_sources")
    assert rows("pretrain") == [
        "| web (`w.txt`) | 75.0% of the tokens |",
        "| code (`c.txt`) | 25.0% of the tokens |",
    ]


def test_a_verifier_is_refused(save, out):
    path = save(perturbed(shape("smol_tiny")), stage="verifier")
    with pytest.raises(ConfigError, match=r"is a verifier.*another stage"):
        export(path, out)
    assert not out.exists()


@pytest.mark.parametrize("here", [".", "a/.."])
def test_the_folder_one_is_in_is_refused(save, out, here, monkeypatch):
    out.mkdir()
    monkeypatch.chdir(out)
    with pytest.raises(ConfigError, match="is the folder you are in"):
        export(save(perturbed(shape("smol_tiny"))), Path(here))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_not_overwritten(save, out, kind):
    there = out / "notes.txt" if kind == "folder" else out
    there.parent.mkdir(exist_ok=True)
    there.write_text("mine")
    with pytest.raises(ConfigError, match="choose another folder, or delete it first"):
        export(save(perturbed(shape("smol_tiny"))), out)
    assert there.read_text() == "mine"


def test_an_empty_folder_and_a_killed_exports_leftover_are_no_obstacle(save, out):
    out.mkdir()
    leftover = out.parent / f".{out.name}.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    export(save(perturbed(shape("smol_tiny"))), out)
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WRITES_TO_STREAM", ("o_proj.weight",), "exported model is not"),
        ("hf_tokenizer", None, "exported tokenizer is not"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_export_is_refused(save, out, monkeypatch, name, value, reason, dtype):
    """A model whose feed-forward layers are not shrunk; a tokenizer that forgets BOS."""
    right = export_hf.hf_tokenizer

    def forgetful(tokenizer: Tokenizer, *rest: object) -> object:
        return right(without_roles(tokenizer, add_bos=False), *rest)

    path = save(perturbed(shape("smol_tiny")))
    monkeypatch.setattr(export_hf, name, value or forgetful)
    with pytest.raises(ConfigError, match=f"{reason}.*Nothing was written"):
        export(path, out, dtype)
    assert sorted(p.name for p in out.parent.iterdir()) == ["run"]


def test_a_full_disk_leaves_nothing(save, out, tmp_path):
    path = save(perturbed(shape("smol_tiny")))
    command = ("--checkpoint", path, "--out", out)
    outcome = run("export_hf", *command, log=tmp_path / "log", largest_file=1_000_000)
    assert outcome.code == 2
    assert "cannot be written" in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.err", "log.out", "run"]

"""Reward models of both kinds, on conversations of unequal length."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from data.chat import ChatTemplate, render
from data.tokenizer import TokenizerConfig, train_tokenizer
from models.config import ModelConfig
from models.verifier import Verifier
from train.reward_model import load_reward_model, score_tokens
from train.rewards import RewardConfig
from utils import checkpoint
from utils.config import ConfigError

WORDS = ["[PAD]", "[UNK]", "why", "good", "bad", "because", "so"]
CPU, FLOAT = torch.device("cpu"), torch.float32
SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 1,
}  # fmt: skip


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ASKED = [
    conversation("why", "good"),
    conversation("why why so", "bad because so"),
    conversation("so " * 60, "good"),  # longer than the model's context
    conversation("so " * 60, "bad"),
]


def save_folder(path, kind, config):
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    words = Fast(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", model_max_length=38
    ).save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BertForSequenceClassification, BertConfig(**SHAPE)),
        (RobertaForSequenceClassification, RobertaConfig(**SHAPE)),
    ],
    ids=["bert", "roberta"],
)
def test_a_folder_of_transformers_reads_the_answers(tmp_path, kind, config):
    model = save_folder(tmp_path, kind, config)
    settings = RewardConfig(model_weight=1.0, score_mean=0.5, score_deviation=2.0)
    score = load_reward_model(tmp_path, settings, CPU, FLOAT).score
    together = score(ASKED)
    assert together == pytest.approx([score([asked])[0] for asked in ASKED], abs=1e-5)
    assert abs(together[2] - together[3]) > 1e-4  # the question is cut, not the answer
    ids = torch.tensor([[WORDS.index("why"), WORDS.index("good")]])
    with torch.no_grad():
        logit = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    assert together[0] == pytest.approx((logit - 0.5) / 2.0, abs=1e-5)


@pytest.fixture
def verifier(tmp_path):
    """A checkpoint of a verifier that nobody has trained, and its parts."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["why good bad because so"] * 9, TokenizerConfig(vocab_size=300))
    shape = ModelConfig(
        vocab_size=300, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=48, max_seq_len=48
    )
    model, template = Verifier(shape), ChatTemplate.of(tokenizer)
    state = {
        "stage": "verifier", "step": 0, "tokens": 0, "config": {}, "model": model.state_dict(),
        "model_config": shape.model_dump(), "tokenizer": tokenizer.state_dict(),
        "chat_template": template.state_dict(), "head": {"mean": 0.25, "deviation": 2.0},
    }  # fmt: skip
    return tmp_path / "verifier_final.pt", state, model, tokenizer, template


def test_a_checkpoint_scores_the_last_token_standardised(verifier):
    path, state, model, tokenizer, template = verifier
    checkpoint.save(path, state)
    score = load_reward_model(path, RewardConfig(), CPU, FLOAT).score
    for asked, found in zip(ASKED, score(ASKED), strict=True):
        tokens = torch.tensor([render(asked, tokenizer, template).tokens[-48:]])
        n = tokens.shape[1]
        bounds = torch.tensor([0, n], dtype=torch.int32)
        hidden = model(tokens, torch.arange(n)[None], bounds)
        expected = (model.scores(hidden[0, -1]).item() - 0.25) / 2.0
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_fingerprint_is_of_what_decides_a_checkpoints_scores(verifier, tmp_path):
    path, state, *_ = verifier

    def fingerprint(dtype: torch.dtype = FLOAT, **changed) -> str:
        checkpoint.save(path, state | changed)
        return load_reward_model(path, RewardConfig(), CPU, dtype).fingerprint

    first = fingerprint()
    assert fingerprint(torch.bfloat16, step=7, config={"name": "another"}) == first
    assert fingerprint(head={"mean": 0.5, "deviation": 2.0}) != first
    weights = {name: tensor.clone() for name, tensor in state["model"].items()}
    weights["embedding.weight"][0, 0] += 1
    assert fingerprint(model=weights) != first


def test_the_fingerprint_is_of_what_decides_a_folders_scores(tmp_path):
    settings = RewardConfig(model_weight=1.0)
    save_folder(tmp_path, BertForSequenceClassification, BertConfig(**SHAPE))
    first = load_reward_model(tmp_path, settings, CPU, FLOAT).fingerprint
    (tmp_path / "README.md").write_text("what it is")
    assert load_reward_model(tmp_path, settings, CPU, torch.bfloat16).fingerprint == first
    template = tmp_path / "chat_template.jinja"  # where newer versions of transformers keep it
    template.write_text("{{ messages }}")
    assert load_reward_model(tmp_path, settings, CPU, FLOAT).fingerprint != first
    template.unlink()
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert load_reward_model(tmp_path, settings, CPU, FLOAT).fingerprint != first


def test_padding_does_not_change_a_score(verifier):
    *_, model, _, _ = verifier
    short, long = [3, 4, 5], list(range(40))
    both = score_tokens(model, [short, long])
    torch.testing.assert_close(both[0], score_tokens(model, [short])[0], rtol=0, atol=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path, verifier):
    path, state, *_ = verifier
    checkpoint.save(path, state | {"head": {"name": "scalar"}})
    with pytest.raises(ConfigError, match="not finished"):
        load_reward_model(path, RewardConfig(), CPU, FLOAT)
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="holds a BertModel, and only"):
        load_reward_model(tmp_path / "plain", RewardConfig(), CPU, FLOAT)
    BertForSequenceClassification(BertConfig(**SHAPE | {"num_labels": 3})).save_pretrained(
        tmp_path / "three"
    )
    with pytest.raises(ConfigError, match="has 3 labels"):
        load_reward_model(tmp_path / "three", RewardConfig(), CPU, FLOAT)

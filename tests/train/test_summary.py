"""The demo's summary: its measures against slow obvious ones, and what it calls a fall."""

import numpy as np
import pytest
import torch

from data import builtin, builtin_tasks
from data.chat import ChatTemplate, render_prompt
from data.packing import make_batch, pack_rows
from data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from train import summary
from train.evals import held_out_loss
from train.loss import cross_entropy_loss
from train.summary import Measured


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [builtin.document("web", i) for i in range(40)]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=400))


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
    model = Transformer(ModelConfig(**shape, d_ffn=32, max_seq_len=192))
    with torch.no_grad():
        model.embedding.weight.mul_(4)  # so that not everything is as likely
    return model.eval()


def logits_alone(model: Transformer, ids: list[int]) -> torch.Tensor:
    """(len(ids), V) of one sequence alone."""
    batch = make_batch([pack_rows([np.array(ids)], len(ids), 1)[0]], len(ids), 1)
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)[0]
    return (hidden @ model.head_weight.T).detach()


def test_text_measures_are_the_held_out_loss_and_a_count_by_hand(model, tokenizer, monkeypatch):
    documents = {"web": 3, "code": 2}
    monkeypatch.setattr(summary, "DOCUMENTS", documents)
    texts = [
        builtin.document(d, builtin.N_DOCUMENTS[d] + i)
        for d, n in documents.items()
        for i in range(n)
    ]
    loss, accuracy, tokens = summary.text_measures(model, tokenizer)

    ids = tokenizer.encode_documents(texts)
    rows = pack_rows(map(np.array, ids), 192, 16)
    batches = {"text": [make_batch(rows, 192, 16)]}
    expected = held_out_loss(model, batches, {"text": 1.0}, cross_entropy_loss, summary.ALONE)
    assert loss == pytest.approx(expected["val/loss"], rel=1e-5)

    right = total = 0
    for row in rows:
        for piece in row:
            likeliest = logits_alone(model, piece.tokens.tolist()).argmax(-1).numpy()
            right += int((likeliest == piece.targets).sum())
            total += int((piece.targets >= 0).sum())
    assert (accuracy, tokens) == (pytest.approx(right / total), total)
    assert 0 < right < total


def test_a_pair_is_told_apart_by_its_answers_tokens_alone(model, tokenizer, monkeypatch):
    monkeypatch.setattr(summary, "PAIRS", 20)
    template = ChatTemplate.of(tokenizer)

    def answer_logp(prompt: list[dict], answer: str) -> float:
        ids = render_prompt(prompt, tokenizer, template)
        total = 0.0
        for token in [*tokenizer.encode(answer), tokenizer.eos_id]:
            total += float(logits_alone(model, ids)[-1].log_softmax(-1)[token])
            ids = [*ids, token]
        return total

    pairs = [builtin_tasks.preference("heldout", i) for i in range(20)]
    right = sum(
        answer_logp(p["prompt"], p["chosen"]) > answer_logp(p["prompt"], p["rejected"])
        for p in pairs
    )
    assert summary.pair_accuracy(model, tokenizer) == right / 20
    assert 0 < right < 20


def measured(name: str, text: float, questions: float, pairs: float) -> Measured:
    return Measured(name, 1.0, text, 100, questions, pairs, few_shot=name == "pretrain")


CHAIN = [
    measured("pretrain", 0.76, 0.05, 0.5),
    measured("sft", 0.74, 0.8, 0.9),
    measured("dpo", 0.745, 0.78, 0.95),
    measured("rlvr", 0.73, 0.85, 0.91),
]


def test_the_largest_fall_is_from_the_stage_that_taught_the_measure():
    title, teacher, later, change = summary.largest_fall(CHAIN)
    assert (title, teacher.name, later.name) == ("pairs, right likelier", "dpo", "rlvr")
    assert change == pytest.approx(-0.04)
    said = summary.remarks(CHAIN)
    assert said[-1] == (
        "largest fall of an earlier measure: pairs, right likelier, -4.0 points from dpo to rlvr"
    )
    risen = [measured("pretrain", 0.7, 0, 0), measured("sft", 0.8, 0.5, 0.5)]
    assert summary.remarks(risen)[-1] == "no later stage has brought an earlier measure down"
    assert len(summary.remarks(risen[:1])) == 1


def test_the_table_has_each_share_and_its_change():
    header, *lines = summary.common_table(CHAIN).splitlines()
    assert header.split("  ")[0] == "after"
    assert lines[0].split() == ["pretrain", "1.00", "76.0%", "5.0%*", "50.0%"]
    assert lines[1].split() == ["sft", "1.00", "74.0%", "-2.0", "80.0%", "+75.0", "90.0%", "+40.0"]
    assert max(map(len, [header, *lines])) <= 100

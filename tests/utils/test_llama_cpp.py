"""What llama.cpp is told of a tokenizer: exactly what `tokenizers` does, or nothing."""

import itertools
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data import builtin
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from utils import llama_cpp

LLAMA = Path(__file__).resolve().parents[3] / "shared/data/tokenizers/llama2"
ROLES = {"unk": 0, "bos": 1, "eos": 2}
TEXTS = [builtin.document(d, i) for i in range(30) for d in builtin.DOMAINS]
ODD = ["", " ", "  a  ", "\n\n\tb", "naïve 漢字 😀", "▁x", "3.14e-10", "-- ------", "a" * 40]


@pytest.fixture(scope="module")
def piecewise() -> tokenizers.Tokenizer:
    """A small vocabulary of Llama 2's kind."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *sorted(llama_cpp.BYTES)]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False)
    # Words are parted for the training alone.
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    inner.train_from_iterator(TEXTS, trainer)
    values = json.loads(inner.to_str())
    values["pre_tokenizer"] = None
    values["added_tokens"] = values["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def content(tokenizer: tokenizers.Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def read(model: bytes) -> object:
    pytest.importorskip("google.protobuf")
    from transformers.utils import sentencepiece_model_pb2_new

    return sentencepiece_model_pb2_new.ModelProto.FromString(model)


def encode(pieces: list, text: str) -> list[int]:
    """SentencePiece's BPE: join the best-scored neighbours, the leftmost first."""
    ids = {p.piece: i for i, p in enumerate(pieces) if p.type == llama_cpp.NORMAL}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = ["".join(pair) for pair in itertools.pairwise(parts)]
        pairs = [(-pieces[ids[p]].score, i) for i, p in enumerate(joined) if p in ids]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [joined[i]]
    fallback = {p.piece: i for i, p in enumerate(pieces) if p.type == llama_cpp.BYTE}
    result = []
    for part in parts:
        known = part in ids
        result += [ids[part]] if known else [fallback[f"<0x{b:02X}>"] for b in part.encode()]
    return result


def test_the_scores_give_the_merges(piecewise):
    model = read(llama_cpp.sentencepiece_model(content(piecewise), ROLES))
    for text in TEXTS[:20] + ODD:
        assert encode(model.pieces, text) == piecewise.encode(text, add_special_tokens=False).ids


def test_pieces_keep_their_ids_and_kinds(piecewise):
    model = read(llama_cpp.sentencepiece_model(content(piecewise), ROLES))
    assert [p.piece for p in model.pieces] == [
        piecewise.id_to_token(i) for i in range(piecewise.get_vocab_size())
    ]
    kinds = [p.type for p in model.pieces]
    assert kinds[:3] == [llama_cpp.UNKNOWN, llama_cpp.CONTROL, llama_cpp.CONTROL]
    assert kinds.count(llama_cpp.BYTE) == 256
    assert set(kinds[259:]) == {llama_cpp.NORMAL}
    trainer = model.trainer_spec
    assert (trainer.model_type, trainer.byte_fallback) == (llama_cpp.BPE, True)
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (0, 1, 2, -1)
    normalizer = model.normalizer_spec
    assert (normalizer.name, normalizer.add_dummy_prefix) == ("identity", True)
    assert (normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces) == (False, True)


def test_sentencepiece_itself_reads_the_file(piecewise):
    library = pytest.importorskip("sentencepiece")
    model = llama_cpp.sentencepiece_model(content(piecewise), ROLES)
    processor = library.SentencePieceProcessor(model_proto=model)
    for text in TEXTS + ODD:
        assert processor.encode(text) == piecewise.encode(text, add_special_tokens=False).ids


@pytest.mark.skipif(not LLAMA.exists(), reason="the Llama-2 tokenizer is not here")
def test_llama_2s_own_file_orders_its_pieces_alike():
    ours = load_tokenizer(TokenizerConfig(path=str(LLAMA)))
    rebuilt = read(llama_cpp.sentencepiece_model(content(ours.inner), ours.roles)).pieces
    own = read((LLAMA / "tokenizer.model").read_bytes()).pieces
    assert [(p.piece, p.type) for p in rebuilt] == [(p.piece, p.type) for p in own]
    merged = {"".join(pair) for pair in content(ours.inner)["model"]["merges"]}
    places = [i for i, p in enumerate(own) if p.piece in merged]
    by_own, by_rebuilt = (sorted(places, key=lambda i: (-p[i].score, i)) for p in (own, rebuilt))
    assert by_own == by_rebuilt


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        {"normalizer": None},
        {"model": {"byte_fallback": False}},
        {"model": {"merges": [["a", "b"], ["c", "d"], ["a", "b"]]}},
        {"added_tokens": [{"id": 5000, "content": "<far>", "special": True}]},
    ],
)
def test_what_no_score_describes_gets_no_file(piecewise, changes):
    values = content(piecewise)
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) and values[key] else change
    assert llama_cpp.sentencepiece_model(values, ROLES) is None


def test_a_trained_tokenizer_splits_as_smollm_and_others_are_not_named(piecewise):
    trained = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))
    assert isinstance(trained, Tokenizer)
    values = content(trained.inner)
    assert llama_cpp.pre_tokenizer(values) == "smollm"
    assert llama_cpp.sentencepiece_model(values, trained.roles) is None
    assert llama_cpp.pre_tokenizer(content(piecewise)) is None
    steps = values["pre_tokenizer"]["pretokenizers"]
    steps[1]["add_prefix_space"] = True
    assert llama_cpp.pre_tokenizer(values) is None

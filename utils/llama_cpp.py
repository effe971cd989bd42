"""What llama.cpp's converter needs to know of a tokenizer and cannot see in a tokenizer.json.

A vocabulary made by SentencePiece (Llama 2's) it reads from a `tokenizer.model`, with a score for
each piece. From a tokenizer.json alone it takes the pieces and not the merges: every piece gets the
same score, and texts silently become other tokens. `sentencepiece_model` writes that file from
the merges.

A byte-level vocabulary it recognises by a hash of the tokens of one text, that is, only if it is a
published one. `pre_tokenizer` names the published tokenizer that splits text as a trained one does.
"""

from __future__ import annotations

import struct
from typing import Any

LLAMA_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))

# Numbers of fields and values in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK, UNK_ID, BOS_ID, EOS_ID, PAD_ID = 3, 4, 35, 40, 41, 42, 43
BPE = 2


def pre_tokenizer(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer.json splits text; None: not known here.

    Single digits, then GPT-2's pattern, is what SmolLM does, and a tokenizer trained here.
    """
    steps = (tokenizer["pre_tokenizer"] or {}).get("pretokenizers", [])
    kinds = [step["type"] for step in steps]
    if kinds != ["Digits", "ByteLevel"] or tokenizer["normalizer"]:
        return None
    digits, level = steps
    same = digits["individual_digits"] and level["use_regex"] and not level["add_prefix_space"]
    return "smollm" if same else None


def sentencepiece_model(tokenizer: dict[str, Any], roles: dict[str, int]) -> bytes | None:
    """A tokenizer.json of Llama 2's kind as the bytes of a `tokenizer.model`.

    SentencePiece merges the two neighbours whose union has the highest score: minus the rank of the
    first merge that makes it.

    Args:
        tokenizer: the content of a tokenizer.json.
        roles: the ids of its special tokens.

    Returns:
        None where it is of another kind, or where its merges are in an order no score gives.
    """
    model = tokenizer["model"]
    if not (
        model["type"] == "BPE"
        and model["byte_fallback"]
        and not model.get("ignore_merges")
        and tokenizer["normalizer"] == LLAMA_NORMALIZER
        and tokenizer["pre_tokenizer"] is None
    ):
        return None
    kinds = dict.fromkeys(model["vocab"], NORMAL) | dict.fromkeys(BYTES, BYTE)
    ids = dict(model["vocab"])
    for token in tokenizer["added_tokens"]:
        ids[token["content"]] = token["id"]
        kinds[token["content"]] = CONTROL if token["special"] else USER_DEFINED
    kinds[model["unk_token"]] = UNKNOWN
    scores = _scores(model["merges"])
    names = sorted(ids, key=ids.__getitem__)
    if (
        scores is None
        or kinds.keys() != ids.keys()
        or [ids[n] for n in names] != [*range(len(ids))]
    ):
        return None
    lowest = -float(len(scores))
    pieces = [_piece(name, scores.get(name, lowest), kinds[name]) for name in names]
    trainer = (
        _int(MODEL_TYPE, BPE) + _int(VOCAB_SIZE, len(ids)) + _int(BYTE_FALLBACK, 1)
        + _int(UNK_ID, ids[model["unk_token"]]) + _int(BOS_ID, roles.get("bos", -1))
        + _int(EOS_ID, roles.get("eos", -1)) + _int(PAD_ID, roles.get("pad", -1))
    )  # fmt: skip
    # Only a space before the text: no other change of it, runs of white space kept.
    add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces = 3, 4, 5
    normalizer = (
        _bytes(1, b"identity") + _int(add_dummy_prefix, 1)
        + _int(remove_extra_whitespaces, 0) + _int(escape_whitespaces, 1)
    )  # fmt: skip
    return b"".join(pieces) + _bytes(TRAINER, trainer) + _bytes(NORMALIZER, normalizer)


def _scores(merges: list[list[str]] | list[str]) -> dict[str, float] | None:
    """Minus the place of each merged piece; None if a piece's merges do not follow each other."""
    scores, previous = {}, None
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        piece = left + right
        if piece != previous and piece in scores:
            return None
        scores.setdefault(piece, -float(len(scores)))
        previous = piece
    return scores


def _piece(text: str, score: float, kind: int) -> bytes:
    value = _bytes(1, text.encode()) + _tag(2, 5) + struct.pack("<f", score) + _int(3, kind)
    return _bytes(PIECES, value)


# Protocol buffers: a field is its number and wire type, then its value.


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(value)) + value


def _int(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value % 2**64)


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the eighth says that more follow."""
    parts = []
    while value > 127:
        parts.append(value % 128 + 128)
        value //= 128
    return bytes([*parts, value])

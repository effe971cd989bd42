"""A model as verifier: what a trained scorer thinks of a completion, standardised.

Two kinds: a checkpoint of `train_pref.py` with `preference.loss: bradley_terry`, and a folder of
`transformers` with a sequence classifier of one label, as most reward models are published. Both
read text, which is rendered by the model's own template and tokenized for it: the policy's tokens
mean nothing to another vocabulary.

A score has no scale of its own (Bradley-Terry fixes differences alone), so it is given in standard
deviations from its mean over held-out answers. A checkpoint of ours holds the two; for a folder
they are the config's `score_mean` and `score_deviation`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.chat import ChatTemplate, Message, render_many
from data.packing import IGNORE, Piece, make_batch
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.verifier import Verifier
from train.rewards import RewardConfig, standardise
from utils import checkpoint
from utils.config import ConfigError, validate

Conversation = Sequence[Message]
ScoreFn = Callable[[Sequence[Conversation]], list[float]]
SCORED_AT_ONCE = 64
# Files that decide what it scores: weights, configs, tokenizers, chat templates.
OF_A_FOLDER = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


@dataclass
class RewardModel:
    """A function from conversations, which end with the answer, to standardised scores; and a
    digest of what it scores with, the same in every precision."""

    score: ScoreFn
    fingerprint: str


def load_reward_model(
    path: Path, config: RewardConfig, device: torch.device, dtype: torch.dtype
) -> RewardModel:
    """What lies at `path`, ready to score.

    Raises:
        ConfigError: nothing of the two kinds lies at `path`.
    """
    if path.is_dir():
        score, mean, deviation = _from_transformers(path, config, device, dtype)
        fingerprint = _folder_fingerprint(path)
    else:
        score, mean, deviation, fingerprint = _from_checkpoint(path, device, dtype)

    def standardised(conversations: Sequence[Conversation]) -> list[float]:
        scores = []
        for start in range(0, len(conversations), SCORED_AT_ONCE):
            scores += score(conversations[start : start + SCORED_AT_ONCE])
        return [standardise(value, mean, deviation) for value in scores]

    return RewardModel(standardised, fingerprint)


# ---------------------------------------------------------------------------------------------
# A checkpoint of ours


def _from_checkpoint(
    path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[ScoreFn, float, float, str]:
    state = checkpoint.load(path)
    if state["stage"] != "verifier":
        raise ConfigError(
            f"--verifier-model {path} is of stage '{state['stage']}', and only a verifier scores: "
            "train one with train_pref.py --config configs/verifier.yaml"
        )
    if "mean" not in state.get("head", {}):
        raise ConfigError(
            f"--verifier-model {path} has no mean score, as it is not finished; give the run's "
            "final checkpoint"
        )
    model = Verifier(validate(ModelConfig, state["model_config"], str(path)), dtype)
    model.load_state_dict(state["model"])
    model.to(device).eval().requires_grad_(False)
    tokenizer = Tokenizer.from_state(state["tokenizer"])
    template = ChatTemplate.from_state(state["chat_template"])

    def score(conversations: Sequence[Conversation]) -> list[float]:
        rendered = render_many(conversations, tokenizer, template)
        return score_tokens(model, [r.tokens for r in rendered]).tolist()

    head = state["head"]
    scale = {"head": torch.tensor([head["mean"], head["deviation"]])}
    fingerprint = checkpoint.weights_fingerprint(state["model"] | scale)
    return score, head["mean"], head["deviation"] or 1.0, fingerprint


@torch.no_grad()
def score_tokens(model: Verifier, sequences: Sequence[Sequence[int]]) -> Tensor:
    """(n,) float32 scores of sequences at their last tokens; of one too long, its end is read."""
    longest = min(max(map(len, sequences)), model.config.max_seq_len)
    cut = [np.array(sequence[-longest:], dtype=np.int64) for sequence in sequences]
    rows = [[Piece(tokens, np.full(len(tokens), IGNORE))] for tokens in cut]
    batch = make_batch(rows, longest, 1).to(model.device)
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)  # (n, T, C)
    ends = torch.tensor([len(tokens) - 1 for tokens in cut], device=model.device)
    return model.scores(hidden[torch.arange(len(cut), device=model.device), ends])


# ---------------------------------------------------------------------------------------------
# A folder of transformers


def _from_transformers(
    path: Path, config: RewardConfig, device: torch.device, dtype: torch.dtype
) -> tuple[ScoreFn, float, float]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--verifier-model {path} cannot be loaded: {error}") from error
    model.to(device).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.truncation_side = "left"  # the answer is at the end
    model.config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    longest = min(positions, tokenizer.model_max_length)  # RoBERTa's positions begin at 2

    @torch.no_grad()
    def score(conversations: Sequence[Conversation]) -> list[float]:
        texts = [_as_text(conversation, tokenizer) for conversation in conversations]
        special = not tokenizer.chat_template  # a template writes them itself
        inputs = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=longest,
            add_special_tokens=special,
            return_tensors="pt",
        ).to(device)
        return model(**inputs).logits[:, 0].float().tolist()

    return score, config.score_mean, config.score_deviation


def _folder_fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in OF_A_FOLDER:
            with file.open("rb") as opened:
                digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _check_folder(path: Path) -> None:
    file = path / "config.json"
    if not file.exists():
        raise ConfigError(
            f"--verifier-model {path} is a folder without a config.json: give a verifier's "
            "checkpoint, or a folder of transformers with a sequence classifier"
        )
    described = json.loads(file.read_text())
    kinds = described.get("architectures") or ["none named"]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(
            f"--verifier-model {path} holds a {kinds[0]}, and only a model for sequence "
            "classification scores answers"
        )
    labels = described.get("num_labels", len(described.get("id2label", {0: ""})))
    if labels != 1:
        raise ConfigError(
            f"--verifier-model {path} has {labels} labels; a score is one number: give a model "
            "with one label"
        )


def _as_text(conversation: Conversation, tokenizer: object) -> str:
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(list(conversation), tokenize=False)
    return "\n\n".join(message["content"] for message in conversation)

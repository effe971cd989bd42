"""A model too small to say anything, its checkpoints, and what it must answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data import builtin
from data.chat import ChatTemplate, Message, render_prompt
from data.tokenizer import TokenizerConfig, train_tokenizer
from models.config import ModelConfig
from models.generate import generate
from models.transformer import Transformer
from utils import checkpoint
from utils.config import plain

CONTEXT, LONG_CONTEXT, NEW = 160, 30_000, 24  # tokens
SAMPLING = {"temperature": 0.8, "top_p": 0.95}  # the defaults of inference.py


class Checkpoints:
    """A model with random weights that writes plain letters and does not stop by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = [builtin.document(d, i) for i in range(40) for d in builtin.DOMAINS]
        self.tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=600))
        self.template = ChatTemplate.of(self.tokenizer)
        torch.manual_seed(0)
        self.model = Transformer(self.shape(CONTEXT)).eval()
        with torch.no_grad():
            self.model.final_norm.weight.normal_()  # else a token is likeliest after itself
            for block in self.model.blocks:
                block.attention.o_proj.weight.mul_(8)
            weight = self.model.embedding.weight.mul_(8)
            for token in range(self.tokenizer.vocab_size):
                text = self.tokenizer.decode([token])
                if not (text.isascii() and text.isprintable() and text.strip()):
                    weight[token] = 0

    def shape(self, context: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=600, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=64,
            max_seq_len=context,
        )  # fmt: skip

    def save(self, name: str, chat: bool, context: int = CONTEXT, **changes: Any) -> str:
        values = {
            "stage": "sft" if chat else "pretrain", "step": 1, "tokens": 1, "config": {},
            "model": self.model.state_dict(), "model_config": plain(self.shape(context)),
            "tokenizer": self.tokenizer.state_dict(),
            "chat_template": self.template.state_dict() if chat else None,
        }  # fmt: skip
        path = self.folder / f"{name}.pt"
        checkpoint.save(path, values | changes)
        return str(path)

    def render(self, messages: list[Message]) -> list[int]:
        return render_prompt(messages, self.tokenizer, self.template)

    def answer(self, messages: list[Message], new: int = NEW, **sampling: Any) -> str:
        return self.written(self.render(messages), new, **sampling)

    def continuation(self, text: str, new: int = NEW, **sampling: Any) -> str:
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        return self.written(ids, new, **sampling)

    def written(self, prompt: list[int], new: int, **sampling: Any) -> str:
        stop_ids = {self.tokenizer.eos_id}
        (ids,) = generate(self.model, [prompt], new, stop_ids=stop_ids, **SAMPLING | sampling)
        return self.tokenizer.decode(ids)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}

"""Exports in llama.cpp itself: its converter reads them, and its tokens and logits are ours.

Runs where `llama_cpp` (llama-cpp-python) is installed and LLAMA_CPP names a folder of llama.cpp's
source; README.md names the version that was tried.
"""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import export_hf
from data import builtin
from data.chat import ChatTemplate
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from utils import checkpoint
from utils.config import plain

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
SOURCE = os.environ.get("LLAMA_CPP", "")
LLAMA = Path(__file__).resolve().parents[2] / "shared/data/tokenizers/llama2"
TEXTS = [builtin.document(d, i) for i in range(5) for d in builtin.DOMAINS] + [
    "", " ", "\n", "  two  spaces\n\n", "0 12 345 \uff11\uff12 ½ Ⅷ", "naïve 漢字 😀🏽",
    "\u00a0\u3000x\u200b", "a\r\n\tb", " " * 37 + "x", "-- ------ ====", "</s><s><|user|>", "▁x",
    "I'm we'll 'S",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(SOURCE, "convert_hf_to_gguf.py").is_file(), reason="no LLAMA_CPP"),
]


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "trained":
        return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=700))
    if not LLAMA.exists():
        pytest.skip("the Llama-2 tokenizer is not here")
    return load_tokenizer(
        TokenizerConfig(path=str(LLAMA), add_bos=False if kind == "without BOS" else None)
    )


@pytest.fixture(params=["trained", "llama", "without BOS"])
def converted(request, tmp_path) -> tuple[Transformer, Tokenizer, str]:
    """A model of 8 layers, of which the 4th and 8th have no rotary embedding, and its GGUF file.

    The command is the model card's.
    """
    tokenizer = tokenizer_of(request.param)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=64, n_layers=8, n_heads=4, n_kv_heads=2,
        d_ffn=128, max_seq_len=256, rope_theta=500.0,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 2.0))
    values = {
        "stage": "sft", "step": 1, "tokens": 1, "model": model.state_dict(),
        "model_config": plain(model.config), "tokenizer": tokenizer.state_dict(),
        "chat_template": ChatTemplate.of(tokenizer).state_dict(), "config": {"name": "small"},
    }  # fmt: skip
    checkpoint.save(tmp_path / "small_final.pt", values)
    out = tmp_path / "exported"
    export_hf.main(["--checkpoint", str(tmp_path / "small_final.pt"), "--out", str(out)])
    card = (out / "README.md").read_text()
    (command,) = re.findall(r"```\n(python .*?)\nllama-cli -m model.gguf\n```", card, re.DOTALL)
    (out / "llama.cpp").symlink_to(Path(SOURCE).resolve())
    command = command.replace("model.gguf", "model.gguf --outtype f32", 1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-c", command], cwd=out, check=True, timeout=300, env={**os.environ, "PATH": path}
    )
    return model, tokenizer, str(out / "model.gguf")


@pytest.fixture
def loaded(converted) -> Iterator[object]:
    model = llama_cpp.llama_model_load_from_file(
        converted[2].encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    yield model
    llama_cpp.llama_model_free(model)


def encode(loaded: object, text: str) -> list[int]:
    """Its tokens of a text; none of them from text that spells a special token."""
    data = text.encode()
    buffer = (llama_cpp.llama_token * (len(data) + 8))()
    vocab = llama_cpp.llama_model_get_vocab(loaded)
    count = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), True, False)
    return list(buffer[:count])


def logits(loaded: object, row: list[int], vocab_size: int) -> torch.Tensor:
    """(T, V), with a key-value cache in float32."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(loaded, settings)
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for i, token in enumerate(row):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    address = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    result = np.ctypeslib.as_array(address, (len(row), vocab_size)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return torch.from_numpy(result)


@torch.no_grad()
def test_llama_cpp_reads_the_texts_and_computes_the_logits(converted, loaded):
    model, tokenizer, _ = converted
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    for text in TEXTS:
        assert encode(loaded, text) == start + tokenizer.encode(text), text
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(model.config.vocab_size, (1, 200), generator=generator)
    expected = export_hf.logits(model, row)[0]
    difference = logits(loaded, row[0].tolist(), model.config.vocab_size) - expected
    assert difference.abs().max() < 1e-4 * max(1.0, expected.abs().max().item())

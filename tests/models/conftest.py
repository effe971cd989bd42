"""What the model tests share: a tiny configuration and rows of packed documents."""

import pytest
import torch

from models.config import ModelConfig


@pytest.fixture
def tiny() -> ModelConfig:
    return ModelConfig(
        vocab_size=97, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, d_ffn=96, max_seq_len=32
    )


@pytest.fixture
def documents():
    """tokens, positions (B, T) and cu_seqlens of random packed documents.

    Each row is cut at the given places; two empty documents stand at the end, as in a real batch.
    """

    def make(vocab_size: int, seq_len: int, cuts: list[list[int]], device: str = "cpu"):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (len(cuts), seq_len), generator=generator)
        positions, bounds = torch.empty_like(tokens), [0]
        for row, row_cuts in enumerate(cuts):
            for start, end in zip([0, *row_cuts], [*row_cuts, seq_len], strict=True):
                positions[row, start:end] = torch.arange(end - start)
                bounds.append(row * seq_len + end)
        cu_seqlens = torch.tensor([*bounds, bounds[-1], bounds[-1]], dtype=torch.int32)
        return tokens.to(device), positions.to(device), cu_seqlens.to(device)

    return make

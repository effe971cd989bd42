"""20M tokens of real text: shares of 87/10/3 are exact all the way, with every source repeating."""

import gzip
from itertools import islice
from pathlib import Path

import pytest

from data.streaming import DataConfig, PretrainLoader, open_stores
from data.tokenizer import TokenizerConfig, load_tokenizer

REAL = Path(__file__).parents[3] / "shared/data"
SHARES = {"web": 0.87, "code": 0.10, "math": 0.03}
MATH_ROWS = 250  # of 900: the whole file outlasts 3% of 20M tokens, and would not repeat


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real text is not here")
def test_shares_of_real_text_stay_within_a_piece_over_20m_tokens(tmp_path):
    paths = {name: REAL / f"pretrain/{name}.jsonl.gz" for name in SHARES}
    with gzip.open(paths["math"], "rt") as lines:
        paths["math"] = tmp_path / "math.jsonl"
        paths["math"].write_text("".join(islice(lines, MATH_ROWS)))
    config = DataConfig(
        sources=[
            {"name": n, "domain": n, "weight": 100 * s, "path": str(paths[n])}
            for n, s in SHARES.items()
        ],
        cache_dir=str(tmp_path / "cache"),
    )
    tokenizer = load_tokenizer(TokenizerConfig(path=str(REAL / "tokenizers/llama2")))
    loader, worst = PretrainLoader(open_stores(config, tokenizer), config, 0, 1, 1), 0.0
    total = 0
    while total < 20_000_000:
        next(loader)
        total = sum(loader.mixture.tokens)
        for tokens, share in zip(loader.mixture.tokens, SHARES.values(), strict=True):
            worst = max(worst, abs(tokens - share * total))
    print(f"{total:,} tokens, largest deviation {worst:.0f} tokens of a piece of {config.seq_len}")
    assert worst <= config.seq_len
    assert min(stream.epoch for stream in loader.streams) >= 1

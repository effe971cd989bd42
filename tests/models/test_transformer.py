"""The model against transformers' SmolLM3; packing against single documents; cache; compilation."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from models.config import ModelConfig
from models.kv_cache import KVCache
from models.transformer import Transformer

SMOL_160M = ModelConfig(d_model=768, n_layers=18, n_heads=12, n_kv_heads=4, d_ffn=2048)


@pytest.fixture
def model(tiny) -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny)


def smollm3(model: Transformer, tied: bool):
    """The same function as a SmolLM3ForCausalLM: tied with a rescaled stream, or untied."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    shrink = math.sqrt(c.d_model)
    theirs = transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ffn,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            max_position_embeddings=c.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            no_rope_layers=[int(c.has_rope(layer)) for layer in range(c.n_layers)],
            rms_norm_eps=c.norm_eps / c.d_model if tied else c.norm_eps,
            tie_word_embeddings=tied,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    renamed = {
        "embedding.weight": "model.embed_tokens.weight",
        "blocks.": "model.layers.",
        ".attention_norm.": ".input_layernorm.",
        ".ffn_norm.": ".post_attention_layernorm.",
        ".attention.": ".self_attn.",
        ".ffn.": ".mlp.",
        "final_norm.": "model.norm.",
    }
    state = {}
    for name, weight in model.state_dict().items():
        for ours, others in renamed.items():
            name = name.replace(ours, others)
        if tied and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight = weight / shrink
        if not tied and name == "model.embed_tokens.weight":
            weight = weight * shrink
        state[name] = weight
    state["lm_head.weight"] = model.head_weight.detach()
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_smollm3(model, tied):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # all ones would hide a norm in the wrong place
                parameter.uniform_(0.5, 1.5)
        tokens = torch.randint(model.config.vocab_size, (2, 32))
        positions, bounds = torch.arange(32).expand(2, 32), torch.tensor([0, 32, 64]).int()
        ours = model.logits(model(tokens, positions, bounds))
        theirs = smollm3(model, tied)(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_packed_documents_are_what_they_are_alone(model, documents):
    cuts = [[5, 6, 20], [13]]
    tokens, positions, bounds = documents(model.config.vocab_size, 24, cuts)
    packed = model(tokens, positions, bounds).flatten(0, 1)
    for start, end in pairwise(bounds.tolist()):
        if start == end:
            continue
        alone = tokens.flatten()[None, start:end]
        length = torch.tensor([0, end - start], dtype=torch.int32)
        hidden = model(alone, torch.arange(end - start)[None], length)
        torch.testing.assert_close(packed[start:end], hidden[0], rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_another_documents_tokens(model, documents):
    tokens, positions, bounds = documents(model.config.vocab_size, 24, [[10], [4]])
    tokens = torch.arange(48).view(2, 24)  # all different, so each has its row of the embedding
    model(tokens, positions, bounds).flatten(0, 1)[10:24].sum().backward()
    touched = model.embedding.weight.grad.any(-1).nonzero().flatten().tolist()
    assert touched == list(range(10, 24))


def test_bf16_is_close_to_float32_and_parameters_stay_float32(tiny, model, documents):
    half = Transformer(tiny, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    batch = documents(tiny.vocab_size, 24, [[7], []])
    hidden = half(*batch)
    assert hidden.dtype == torch.bfloat16
    assert half.logits(hidden).dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(hidden.float(), model(*batch), rtol=0.05, atol=0.05)


def initial_excess_loss(config: ModelConfig) -> float:
    torch.manual_seed(0)
    model, length = Transformer(config), 128
    tokens = torch.randint(config.vocab_size, (1, length + 1))
    with torch.no_grad():
        bounds = torch.tensor([0, length], dtype=torch.int32)
        logits = model.logits(model(tokens[:, :-1], torch.arange(length)[None], bounds))
    loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).item()
    return loss - math.log(config.vocab_size)


@pytest.mark.parametrize("shape", ["tiny", "reduced", pytest.param("full", marks=pytest.mark.slow)])
def test_first_loss_is_near_that_of_a_uniform_guess(shape):
    """Short rows: over longer ones attention averages more away and leaves more of the token."""
    update = {
        "tiny": {"vocab_size": 2048, "d_model": 128, "n_layers": 4, "n_heads": 4, "d_ffn": 384},
        "reduced": {"d_model": 192, "n_layers": 6, "d_ffn": 512},
        "full": {},
    }[shape]
    assert 0 < initial_excess_loss(SMOL_160M.model_copy(update=update)) < 0.3


def test_initialisation_is_truncated_normal(tiny):
    torch.manual_seed(0)
    weights = Transformer(tiny).blocks[0].ffn.up_proj.weight
    std = 0.5 / math.sqrt(tiny.d_model)
    assert weights.abs().max() <= 3.0001 * std
    assert weights.std().item() == pytest.approx(0.9866 * std, rel=0.02)  # of N(0, 1) within ±3
    assert weights.mean().item() == pytest.approx(0, abs=0.05 * std)


def test_cached_steps_give_the_uncached_hidden_states(model):
    """Sequences of lengths 9, 14 and 11, whose first 2, 7 and 4 tokens go in together."""
    lengths, prompts = [9, 14, 11], [2, 7, 4]
    sequences = [torch.randint(model.config.vocab_size, (n,)) for n in lengths]
    cache = KVCache(model.config, 3, 14, torch.float32, torch.device("cpu"))
    filled = torch.nn.utils.rnn.pad_sequence(
        [s[:n] for s, n in zip(sequences, prompts, strict=True)], batch_first=True
    )
    with torch.no_grad():
        hidden = model.extend(filled, torch.arange(7).expand(3, 7), cache)
        cached = [list(hidden[i, :n]) for i, n in enumerate(prompts)]
        for step in range(7):
            positions = torch.tensor(prompts)[:, None] + step
            tokens = torch.stack([s[p] for s, p in zip(sequences, positions, strict=True)])
            for i, new in enumerate(model.extend(tokens, positions, cache)):
                cached[i].append(new[0])
        for sequence, states in zip(sequences, cached, strict=True):
            n = len(sequence)
            bounds = torch.tensor([0, n], dtype=torch.int32)
            expected = model(sequence[None], torch.arange(n)[None], bounds)
            ours, theirs = model.logits(torch.stack(states)), model.logits(expected[0])
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_compiles_to_one_graph_that_serves_other_documents(model, documents):
    counter = CompileCounter()
    plain = copy.deepcopy(model)
    model.blocks.compile(backend=counter, fullgraph=True, dynamic=False)
    for cuts in ([[5], [13]], [[], [2, 3]]):
        batch = documents(model.config.vocab_size, 24, cuts)
        torch.testing.assert_close(model(*batch), plain(*batch), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_a_copy_of_a_compiled_model_has_its_own_weights(model, documents):
    model.blocks.compile(backend="eager", dynamic=False)
    batch = documents(model.config.vocab_size, 24, [[5]])
    before = model(*batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(*batch), before, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["fa4", "fa2", "varlen", "flex", "dense"])
def test_compiled_training_step_on_a_gpu(kernel, documents):
    """Loss and gradients of the compiled bf16 model against those of float32 on the CPU."""
    config = ModelConfig(
        vocab_size=512, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ffn=512
    )
    torch.manual_seed(0)
    exact = Transformer(config)
    model = Transformer(config, dtype=torch.bfloat16, kernel=kernel).cuda()
    model.load_state_dict(exact.state_dict())
    try:
        model.attention_kernel()
    except ValueError as error:
        pytest.skip(str(error))
    model.compile_blocks()
    for cuts in ([[100, 101], [37]], [[], [5, 128, 200]]):
        grads = []
        for each, device in ((exact, "cpu"), (model, "cuda")):
            each.zero_grad()
            hidden = each(*documents(config.vocab_size, 256, cuts, device))
            hidden.float().square().mul(torch.linspace(0, 1, 256, device=device)).sum().backward()
            grads.append(torch.cat([p.grad.flatten().cpu() for p in each.parameters()]))
        assert ((grads[1] - grads[0]).norm() / grads[0].norm()).item() < 0.03

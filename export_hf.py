"""Write a checkpoint as a folder that `transformers` loads, with no remote code.

    python export_hf.py --checkpoint runs/demo/pretrain/pretrain_final.pt --out exported/demo
    python export_hf.py --checkpoint FILE --out DIR --dtype bfloat16

The folder is a `SmolLM3ForCausalLM`: weights (safetensors), config, tokenizer, chat template,
generation config and a model card that says how to use it with transformers, vLLM and llama.cpp.
Before it gets its name it is loaded as a user would, and its logits and tokens are compared with
the checkpoint's; where they differ nothing is left behind.

SmolLM3 does not multiply the embedding's output by sqrt(d_model), but its embedding and head can
stay tied: the stream may shrink by that factor as long as everything added to it does too
(`o_proj` and `down_proj`), because each layer reads it through a norm, whose epsilon shrinks by the
factor's square. The head then sees what it saw before.

Left out: verifiers, whose scalar head has no such class; quantisation, which GGUF tools do.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.chat import ChatTemplate, render_prompt
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from utils import checkpoint
from utils.command_line import run_script
from utils.config import ConfigError, validate
from utils.llama_cpp import sentencepiece_model
from utils.model_card import model_card

if TYPE_CHECKING:
    from transformers import SmolLM3Config, TokenizersBackend

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}  # what inference.py does
NAMES = (
    ("embedding.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
    (".ffn.", ".mlp."),
    ("final_norm.", "model.norm."),
)
WRITES_TO_STREAM = ("o_proj.weight", "down_proj.weight")

# The largest deviation of a float32 export's logits, in units of the largest logit if above 1.
FLOAT32_TOLERANCE = 1e-4
# Root mean square of a bf16 export's deviations over that of the logits; 0.005 to 0.01 were seen.
BFLOAT16_TOLERANCE = 0.03
COMPARED_TOKENS = 128
PROBES = ("Once upon a time", "  two  spaces\n\n", "3.14 + 12 = 15.14", "naïve 漢字 😀")
PROBE_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 23?"},
    {"role": "assistant", "content": "25"},
    {"role": "user", "content": "And in words?\nPlease."},
]


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    state = load_language_model(args.checkpoint)
    out = Path(args.out)
    if out.resolve() == Path.cwd():
        raise ConfigError(f"--out {out} is the folder you are in: name a new one in it")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty: choose another folder, or delete it first")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial, state, getattr(torch, args.dtype))
        deviation = compare(partial, state)
        card = model_card(state, Path(args.checkpoint), args.dtype, deviation)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: SmolLM3ForCausalLM in {args.dtype}; {deviation}")
    if state["model_config"]["nope_every"] != 4:
        print("note: llama.cpp assumes that every fourth layer has no rotary embedding, and this")
        print("model differs there; transformers and vLLM read the layers from config.json")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or an empty folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def load_language_model(path: str) -> dict[str, Any]:
    """A checkpoint of any stage that ends in a language model.

    Raises:
        ConfigError: it is a verifier's.
    """
    state = checkpoint.load(path)
    if state["stage"] == "verifier":
        raise ConfigError(
            f"--checkpoint {path} is a verifier: it scores answers and has no language model's "
            "head. Export the checkpoint of another stage"
        )
    return state


# ---------------------------------------------------------------------------------------------
# Writing


def write(folder: Path, state: dict[str, Any], dtype: torch.dtype) -> None:
    """Everything but the model card."""
    from transformers import GenerationConfig

    config = validate(ModelConfig, state["model_config"], "the checkpoint's model_config")
    tokenizer = Tokenizer.from_state(state["tokenizer"])
    specials = special_ids(tokenizer)
    hf_config(config, specials, dtype).save_pretrained(folder)
    GenerationConfig(**specials, **SAMPLING).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(hf_weights(state["model"], config.d_model, dtype), file, metadata={"format": "pt"})
    file.chmod((folder / "config.json").stat().st_mode)  # readable by a server's user, too
    template = state["chat_template"]
    hf_tokenizer(tokenizer, config, template and template["jinja"]).save_pretrained(folder)
    # transformers 4 and tools written for it look elsewhere; without this they would silently
    # rotate by SmolLM3's own theta, and find no tokenizer class.
    add_keys(folder / "config.json", rope_theta=config.rope_theta)
    add_keys(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    add_llama_cpp_files(folder, tokenizer)


def add_llama_cpp_files(folder: Path, tokenizer: Tokenizer) -> None:
    """What llama.cpp's converter does not find in a tokenizer.json; transformers ignores it."""
    model = sentencepiece_model(json.loads(tokenizer.state_dict()["json"]), tokenizer.roles)
    if model:
        (folder / "tokenizer.model").write_bytes(model)
    if not tokenizer.add_bos:  # it would put one before a text of a SentencePiece vocabulary
        add_keys(folder / "tokenizer_config.json", add_bos_token=False)


def add_keys(path: Path, **values: float | str) -> None:
    """Set keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids by which transformers begins, ends and pads; padding is never attended to."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    pad = tokenizer.roles.get("pad", eos)
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def hf_config(
    config: ModelConfig, specials: dict[str, int | None], dtype: torch.dtype
) -> SmolLM3Config:
    """The same shape in transformers' words, for tied embeddings that are not scaled."""
    from transformers import SmolLM3Config

    return SmolLM3Config(
        architectures=["SmolLM3ForCausalLM"],
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ffn,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        no_rope_layers=[int(config.has_rope(layer)) for layer in range(config.n_layers)],
        no_rope_layer_interval=config.nope_every or config.n_layers + 1,
        rms_norm_eps=config.norm_eps / config.d_model,
        tie_word_embeddings=True,
        **specials,
    )


def hf_weights(weights: dict[str, Tensor], d_model: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under transformers' names, the stream shrunk by sqrt(d_model)."""
    renamed = {}
    for name, weight in weights.items():
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        shrink = math.sqrt(d_model) if name.endswith(WRITES_TO_STREAM) else 1.0
        renamed[name] = (weight / shrink).to(dtype)
    return renamed


def hf_tokenizer(tokenizer: Tokenizer, config: ModelConfig, jinja: str | None) -> TokenizersBackend:
    """A text becomes BOS, where documents begin with it, and its tokens: a prompt to continue.

    No EOS follows, although documents end with one: it would end the prompt too.
    """
    import tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer.from_str(tokenizer.state_dict()["json"])
    inner.post_processor = None
    names = {}
    for role in ("bos", "eos", "pad", "unk"):
        index = tokenizer.roles.get(role)
        if index is not None:
            names[f"{role}_token"] = inner.id_to_token(index)
    if "eos_token" in names:
        names.setdefault("pad_token", names["eos_token"])
    if tokenizer.add_bos:
        bos = names["bos_token"]
        inner.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=jinja,
        model_max_length=config.max_seq_len,
        clean_up_tokenization_spaces=False,
        **names,
    )


# ---------------------------------------------------------------------------------------------
# Comparing


@torch.no_grad()
def compare(folder: Path, state: dict[str, Any]) -> str:
    """Load the folder as a user does, and say how far its logits are from the checkpoint's.

    Raises:
        ConfigError: further than rounding explains, or its tokens differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    compare_tokens(AutoTokenizer.from_pretrained(folder), state)
    with torch.device("meta"):
        model = Transformer(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"], assign=True)  # no second copy of the weights
    tokens = random_tokens(model.config)
    expected = logits(model, tokens)
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    difference = exported(tokens).logits.float() - expected
    if exported.dtype == torch.float32:
        deviation, tolerance = difference.abs().max().item(), FLOAT32_TOLERANCE
        tolerance *= max(1.0, expected.abs().max().item())
        what = "largest deviation of a logit"
    else:
        deviation = (difference.square().mean() / expected.square().mean()).sqrt().item()
        what, tolerance = "deviation of the logits, relative", BFLOAT16_TOLERANCE
    if not deviation <= tolerance:
        raise ConfigError(
            f"the exported model is not the checkpoint's: {what} is {deviation:.2g}, more than "
            f"the {tolerance:.2g} that rounding explains. Nothing was written. This is a defect "
            "of the export or of the installed transformers; requirements.txt says which work"
        )
    return f"{what} {deviation:.1g} over {tokens.numel()} tokens"


def random_tokens(config: ModelConfig) -> Tensor:
    """One row (1, T), the same every time."""
    generator = torch.Generator().manual_seed(0)
    length = min(COMPARED_TOKENS, config.max_seq_len)
    return torch.randint(config.vocab_size, (1, length), generator=generator)


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """(B, T, V) of rows (B, T) that are one document each."""
    batch, length = tokens.shape
    bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    return model.logits(model(tokens, torch.arange(length).expand_as(tokens), bounds))


def compare_tokens(exported: TokenizersBackend, state: dict[str, Any]) -> None:
    """Text and, where there is a template, a conversation must become the checkpoint's tokens."""
    tokenizer = Tokenizer.from_state(state["tokenizer"])
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    for text in PROBES:
        _same(exported(text).input_ids, start + tokenizer.encode(text), repr(text))
    if state["chat_template"]:
        template = ChatTemplate.from_state(state["chat_template"])
        theirs = exported.apply_chat_template(
            PROBE_CHAT, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        _same(theirs, render_prompt(PROBE_CHAT, tokenizer, template), "a conversation")


def _same(theirs: Sequence[int], ours: Sequence[int], what: str) -> None:
    if list(theirs) != list(ours):
        raise ConfigError(
            f"the exported tokenizer is not the checkpoint's: it reads {what} as {theirs}, "
            f"not {ours}. Nothing was written"
        )


if __name__ == "__main__":
    run_script(main)

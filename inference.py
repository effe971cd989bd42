"""Continue a text with a pretrained checkpoint, or ask one that was trained to answer.

    python inference.py --checkpoint runs/demo/pretrain/pretrain_final.pt --prompt "The old mill"
    python inference.py --checkpoint runs/demo/dpo/dpo_final.pt --prompt "What is 3 + 4?"

The same prompt, settings and seed give the same text; --temperature 0 takes the likeliest tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch

from data.chat import ChatTemplate, render_prompt
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.generate import stream
from models.transformer import Transformer
from utils import checkpoint
from utils.config import ConfigError, run_script, validate


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    model, tokenizer, template = load(args.checkpoint)
    if template is None:
        before = [tokenizer.bos_id] if tokenizer.add_bos else []
        prompt = before + tokenizer.encode(args.prompt)
        print(args.prompt, end="", flush=True)
    else:
        message = {"role": "user", "content": args.prompt}
        prompt = render_prompt([message], tokenizer, template)
    try:
        ids = stream(
            model,
            prompt,
            args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            stop_ids={tokenizer.eos_id},
            seed=args.seed,
        )
        for text in readable(tokenizer, ids):
            print(text, end="", flush=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load(path: str) -> tuple[Transformer, Tokenizer, ChatTemplate | None]:
    """What any stage's checkpoint holds, the model on the GPU if there is one."""
    state = checkpoint.load(path)
    if state["stage"] == "verifier":
        raise ConfigError(
            f"--checkpoint {path} is a verifier, which scores answers and writes none: "
            "give the checkpoint of another stage"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Transformer(validate(ModelConfig, state["model_config"], path), dtype)
    model.load_state_dict(state["model"])
    template = state["chat_template"] and ChatTemplate.from_state(state["chat_template"])
    return model.to(device).eval(), Tokenizer.from_state(state["tokenizer"]), template


def readable(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as it becomes certain: bytes of an unfinished character wait."""
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=True)
    for token in ids:
        text = decoder.step(tokenizer.inner, token)
        if text is not None:
            yield text


if __name__ == "__main__":
    run_script(main)

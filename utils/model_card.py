"""The README.md of an exported model, written from what its checkpoint and its run recorded.

Nothing in it is typed by hand: shape, stage, tokens, data and settings come from the checkpoint,
held-out measures from the `metrics.jsonl` of its run where the checkpoint still lies there.

Left out: license and intended use, which no run knows; a person adds them before publishing.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from utils.llama_cpp import pre_tokenizer, sentencepiece_model
from utils.logging import human_count, read_metrics

STAGES = {
    "pretrain": "pretrained on text; it continues what it is given",
    "sft": "fine-tuned on conversations",
    "pref": "fine-tuned on conversations and then on preferences",
    "rlvr": "trained by reinforcement learning on answers that can be verified",
}
CHAT = """\
chat = [{"role": "user", "content": "What is 2 + 3?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
CONVERT_BYTE_LEVEL = """\
python - . --outfile model.gguf <<'END'
import sys
sys.path.insert(0, "llama.cpp")
import convert_hf_to_gguf
from conversion import TextModel
TextModel.get_vocab_base_pre = lambda *_: "{splitter}"
convert_hf_to_gguf.main()
END"""
COMPLETION = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'


def model_card(state: dict[str, Any], checkpoint: Path, dtype: str, deviation: str) -> str:
    """The card's text.

    Args:
        state: the exported checkpoint.
        checkpoint: where it lies.
        deviation: how far the export's logits are from the checkpoint's.
    """
    name = state["config"]["name"]
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {name}\n\n{_summary(state)}",
        _usage(state),
        "## Model\n\n" + _table(_shape(state, dtype, deviation)),
        *_data(state),
        *_measures(state, checkpoint),
        _config(state),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(state: dict[str, Any]) -> str:
    kind = STAGES.get(state["stage"], f"of stage {state['stage']}")
    return (
        f"A small language model of {human_count(_parameters(state))} parameters, {kind}. It makes "
        "mistakes and repeats what its data say; nobody has checked it for safety."
    )


def _parameters(state: dict[str, Any]) -> int:
    return sum(weight.numel() for weight in state["model"].values())


def _usage(state: dict[str, Any]) -> str:
    inputs = CHAT if state["chat_template"] else COMPLETION
    endpoint = "chat/completions" if state["chat_template"] else "completions"
    return f"""\
## Use

No remote code is needed: it is a `SmolLM3ForCausalLM`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{inputs}
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

With vLLM, an OpenAI-compatible server (`/v1/{endpoint}`) that runs transformers' SmolLM3; this
export has not been tried in it:

```
vllm serve .
```

{_gguf(state)}"""


def _gguf(state: dict[str, Any]) -> str:
    if state["model_config"]["nope_every"] != 4:
        return (
            "Not for llama.cpp, which takes every fourth layer of a SmolLM3 for one without "
            "rotary embedding; this model's layers differ."
        )
    tokenizer = json.loads(state["tokenizer"]["json"])
    start = "llama-cli -m model.gguf"
    if not state["chat_template"]:
        start = 'llama-completion -m model.gguf -no-cnv -p "Once upon a time"'
    splitter = pre_tokenizer(tokenizer)
    if splitter:
        return f"""\
With llama.cpp, whose converter knows published byte-level tokenizers only and must be told that
this one splits text as `{splitter}` does (`llama.cpp` is its folder):

```
{CONVERT_BYTE_LEVEL.format(splitter=splitter)}
{start}
```"""
    known = sentencepiece_model(tokenizer, state["tokenizer"]["roles"]) is not None
    doubt = (
        ". Its converter knows the tokenizers of published models: compare the tokens of a text "
        "with transformers' before trusting the file"
    )
    return f"""\
With llama.cpp (`llama.cpp` is its folder){"" if known else doubt}:

```
python llama.cpp/convert_hf_to_gguf.py . --outfile model.gguf
{start}
```"""


def _shape(state: dict[str, Any], dtype: str, deviation: str) -> Iterator[tuple[str, object]]:
    model = state["model_config"]
    yield "parameters", f"{_parameters(state):,}"
    yield "layers", model["n_layers"]
    yield "width (feed-forward)", f"{model['d_model']:,} ({model['d_ffn']:,})"
    yield "heads (key-value)", f"{model['n_heads']} ({model['n_kv_heads']})"
    yield "vocabulary", f"{model['vocab_size']:,}"
    yield "context", f"{model['max_seq_len']:,} tokens"
    yield "weights", dtype
    yield "trained in this stage", f"{state['step']:,} steps, {state['tokens']:,} tokens"
    yield "compared with its checkpoint", deviation


def _data(state: dict[str, Any]) -> Iterator[str]:
    """What was trained on: of pretraining shares of the tokens, of other stages times an epoch."""
    data = state["config"].get("data", {})
    sources = [s for s in data.get("sources") or [] if s.get("use") != "held_out"]
    if not sources:
        return
    if state["stage"] == "pretrain":
        rows = _shares(sources, "of the tokens")
    else:
        rows = [(_place(s), f"{s.get('weight', 1.0):g} x an epoch") for s in sources]
        tokens = f"of {data.get('text_tokens', 0):,} tokens of plain text an epoch"
        rows += _shares(data.get("text_sources") or [], tokens)
    yield "## Data of this stage\n\n" + _table(rows)


def _shares(sources: list[dict[str, Any]], whole: str) -> list[tuple[str, str]]:
    total = sum(source.get("weight", 1.0) for source in sources)
    return [(_place(s), f"{s.get('weight', 1.0) / total:.1%} {whole}") for s in sources]


def _place(source: dict[str, Any]) -> str:
    parts = [source[key] for key in ("subset", "split") if source.get(key)]
    of_hub = source["path"].startswith("hub:")
    return f"{source['name']} (`{source['path']}`{', '.join(['', *parts]) if of_hub else ''})"


def _measures(state: dict[str, Any], checkpoint: Path) -> Iterator[str]:
    """The evaluation at the checkpoint's step, if its run's metrics lie beside it."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        path = folder / "metrics.jsonl"
        if not path.is_file():
            continue
        for line in read_metrics(path):
            if line["step"] == state["step"] and "val/loss" in line:
                rows = ((k, f"{v:.4g}") for k, v in line.items() if _is_measure(k, v))
                yield "## Measured on held-out data\n\n" + _table(rows)
        return


def _is_measure(key: str, value: object) -> bool:
    return key not in ("step", "time") and isinstance(value, int | float)


def _config(state: dict[str, Any]) -> str:
    text = yaml.safe_dump(state["config"], sort_keys=False)
    summary = "<details><summary>the run's whole config</summary>"
    return f"## Settings\n\n{summary}\n\n```yaml\n{text}```\n\n</details>"


def _table(rows: Iterable[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])

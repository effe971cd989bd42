"""Small tasks of the harness's three kinds, as YAML and JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from data import builtin


def write_tasks(folder: Path) -> None:
    questions = [
        {
            "question": f"{builtin.document('web', i)[: 40 + 30 * i]}\nHow much is {i} + {k}?",
            "choices": [str(i + k), "a horse", f"{k}", f"{k} horses and\na cow "],
            "label": i % 4,
            "answer": str(i + k),
        }
        for i, k in zip(range(12), range(3, 15), strict=True)
    ]
    texts = [{"text": builtin.document("web", 99 + i) * (1 + 9 * (i == 2))} for i in range(4)]
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    data = {"questions": questions, "texts": texts}
    for name, rows in data.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)

    def write(name: str, data: str, **values: object) -> None:
        files = {"data_files": {"test": str(folder / f"{data}.jsonl")}}
        values = {"task": name, "dataset_kwargs": files, **common, **values}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))

    asked = {"doc_to_text": "Question: {{question}}\nAnswer:", "fewshot_split": "test"}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
    }
    metrics = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True}
        for m in ("acc", "acc_norm", "acc_mutual_info")
    ]
    write("own_choice", "questions", **asked, **choice, metric_list=metrics, num_fewshot=1)
    write(
        "own_spaced", "questions", **choice, doc_to_text="{{question}} ", target_delimiter="",
        metric_list=metrics[:1],
    )  # fmt: skip
    write("own_begun", "questions", **asked, **choice, gen_prefix="It is", metric_list=metrics[:1])
    bits = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    write(
        "own_text", "texts", output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="text", metric_list=bits,
    )  # fmt: skip
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write(
        "own_answer", "questions", **asked, output_type="generate_until", doc_to_target="answer",
        metric_list=exact, generation_kwargs={"until": ["e", "\n\n"], "max_gen_toks": 24},
    )  # fmt: skip

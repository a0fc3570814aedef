"""Tasks of lm-eval as users write them: a YAML file, its rows, and its code."""

import json
from pathlib import Path

import pytest

SCORES = "def process(doc, results):\n    return "
"""The beginning of a task's code that scores every row alike."""


def own_task(folder: Path, metrics: str, name: str = "own", code: str = "") -> str:
    """A multiple-choice task of a user's; with `code` one that scores a row as `process(doc, results)` there does."""
    pytest.importorskip("lm_eval")
    rows = [{"q": f"a{n}:", "choices": ["b", "c", "d"], "label": n % 3} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}_code.py").write_text(code)
    lines = [
        *(f"task: {name}", "dataset_path: json", "dataset_kwargs:", "  data_files:"),
        *(f"    test: {folder / 'rows.jsonl'}", "test_split: test", "output_type: multiple_choice"),
        *("doc_to_text: '{{q}}'", "doc_to_target: label", "doc_to_choice: choices"),
        *([f"process_results: !function {name}_code.process"] if code else []),
        *("metric_list:", metrics),
    ]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines))
    return str(path)


def metric(name: str, higher: str | None, aggregation: str = "mean") -> str:
    return f"  - metric: {name}\n    aggregation: {aggregation}" + (
        "" if higher is None else f"\n    higher_is_better: {higher}"
    )

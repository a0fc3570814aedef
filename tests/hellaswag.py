"""A few rows of a prior task in the hub's schema, for tests that have lm-eval read them from a file."""

import json
from pathlib import Path

_ITEMS = [
    ("Boiling an egg", "A woman puts a pot of water on the stove. She waits until it boils. she", "lowers an egg"),
    ("Walking the dog", "A man takes a lead from its hook. The dog runs to the door. the man", "opens the door"),
    ("Painting a wall", "A boy opens a tin of paint. He dips a brush into it. the boy", "paints the wall"),
    ("Reading", "A girl sits down in a chair with a book. She opens the book. the girl", "reads the first page"),
]
_WRONG = ["eats the chair.", "swims across the roof.", "is made of wood and glue."]
CONTEXTS = [context for _, context, _ in _ITEMS]


def write_mirror(folder: Path) -> None:
    """The rows as `--data-mirror` reads them, in a folder that is there."""
    rows = [
        {"activity_label": label, "ctx_a": context, "ctx_b": "", "endings": [f"{ending}.", *_WRONG], "label": "0"}
        for label, context, ending in _ITEMS
    ]
    (folder / "hellaswag_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))

"""What the items of lm-eval's tasks ask, and which answers a model took for likely: out of what it logs of each."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlrazor.lm.harness.tasks import Task
from rlrazor.lm.scores import Question

SHOWN = 120  # characters of the end of a prompt, or of an answer
# By what a metric divides the log-likelihood of an answer before it takes the largest.
_LENGTHS: Mapping[str, Callable[[str], int]] = {
    "acc": lambda _: 1,
    "acc_norm": len,
    "acc_bytes": lambda text: len(text.encode()),
}

Row = Mapping[str, Any]


def item_name(row: Row) -> str:
    """Of a logged item: the same whichever model is scored, another where the item says something else.

    With its place, as a task may have a row twice.
    """
    return f"{row['doc_id']}-{row['doc_hash'][:12]}"


def questions(task: Task, samples: Mapping[str, Sequence[Row]], metric: str, filtered: str) -> dict[str, Any]:
    """Task -> item -> Question, as `ItemResults.questions`."""
    return {
        name: {item_name(row): _question(leaf, row, metric) for row in rows}
        for name, leaf in task.leaves.items()
        if (rows := [row for row in samples.get(name, ()) if row["filter"] == filtered and metric in row])
    }


def _question(leaf: Any, row: Row, metric: str) -> Question:
    contexts, answers = zip(*((str(one[0]), str(one[1])) for one in row["arguments"]), strict=True)
    if leaf.OUTPUT_TYPE != "multiple_choice":
        return Question(_end(contexts[0]))
    texts = [str(one) for one in leaf.doc_to_choice(row["doc"])]
    contexts, answers = contexts[: len(texts)], answers[: len(texts)]  # of mutual information there are twice as many
    prompt = contexts[0]
    if len(set(contexts)) > 1:  # as in WinoGrande: what follows is the same
        prompt = os.path.commonprefix(contexts)  # noqa: RUF071  # characters are meant
        answers, prompt = tuple(one[len(prompt) :] for one in contexts), f"{prompt}_{answers[0]}"
    divided = _LENGTHS.get(metric, _LENGTHS["acc"])
    logprobs = [
        float(likely) / max(divided(text), 1)
        for (likely, _), text in zip(row["filtered_resps"][: len(texts)], texts, strict=True)
    ]
    if not all(map(math.isfinite, logprobs)):
        return Question(_end(prompt))
    shown = tuple(_end(answer.strip()) for answer in answers)
    return Question(_end(prompt), shown, tuple(logprobs), _right(leaf, row, metric, texts, logprobs))


def _end(text: str) -> str:
    return text if len(text) <= SHOWN else f"…{text[-SHOWN:]}"


def _right(leaf: Any, row: Row, metric: str, texts: Sequence[str], logprobs: Sequence[float]) -> tuple[int, ...]:
    """The places of the right answers, as lm-eval finds them; none where they do not explain the outcome."""
    if metric not in _LENGTHS or leaf.config.process_results is not None:  # with code of its own, as mc2
        return ()
    places = right_places(leaf, row["doc"], row["target"], texts)
    likeliest = max(range(len(logprobs)), key=logprobs.__getitem__)  # the first, as numpy's argmax
    return places if float(likeliest in places) == float(row[metric]) else ()


def scored_count(leaf: Any, limit: int | None) -> int:
    """How many of the evaluated rows are scored, the first ones; `limit` None: all."""
    count = len(leaf.eval_docs)
    return count if limit is None else min(limit, count)


def right_places(leaf: Any, doc: Any, target: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """The places of an item's right answers among its choices, as its target names them; none where it does not."""
    gold = leaf.doc_to_text(doc) if leaf.multiple_input else target
    listed = gold if isinstance(gold, list) else [gold]
    places = [texts.index(one) if isinstance(one, str) and one in texts else one for one in listed]
    return tuple(places) if all(isinstance(one, int) and 0 <= one < len(texts) for one in places) else ()

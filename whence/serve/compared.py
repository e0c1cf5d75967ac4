"""Two answers side by side: how alike they put the rows in order, and which rows moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from whence.report import words
from whence.serve.asked import Asked
from whence.serve.asking import SIDES, Asking
from whence.store.plain import plain
from whence.validate.agreement import agreement

POINTS = 2000
"""Of a picture of two scores."""


def side_by_side(asking: Asking, a: Asked, b: Asked, top: int) -> dict[str, Any]:
    """How alike two answers put the rows in order, and which rows moved."""
    first, second = (replace(each.scores, queries=each.scores.queries.assign(id="q")) for each in (a, b))
    sides, others = (first, second), bool(a.stage and b.stage and a.stage != b.stage)
    both = None if others or not set(first.example_ids) & set(second.example_ids) else agreement(first, second)
    ranks = [_ranks(side.values_of(0), side.example_ids) for side in sides]
    tops = [list(side.top(0, top)["id"]) for side in sides]
    if both is None:
        lists = [{name: asking.document(each, top)["query"][name] for name in SIDES} for each in (a, b)]
        return plain({"a": _side(a) | lists[0], "b": _side(b) | lists[1], "rows_in_common": 0})
    texts = {name: str(text) for side in sides for name, text in zip(side.example_ids, side.examples["text"], strict=True)}
    sources = {name: value for side in sides for name, value in zip(side.example_ids, side.examples["source"], strict=True)}
    rows = []
    for name in dict.fromkeys([*tops[0], *tops[1]]):
        (rank_a, value_a), (rank_b, value_b) = (each.get(name, (None, None)) for each in ranks)
        moved = rank_a - rank_b if rank_a is not None and rank_b is not None else None
        source = None if words.missing(sources[name]) else sources[name]
        seen = {"id": name, "text": texts[name], "source": source, "place": asking.place(name)}
        rows.append(seen | {"rank_a": rank_a, "rank_b": rank_b, "value_a": value_a, "value_b": value_b, "moved": moved})
    ids = both.a.example_ids
    shown = set(tops[0]) | set(tops[1])
    places = [place for place, name in enumerate(ids) if name in shown]
    rest = [place for place, name in enumerate(ids) if name not in shown]
    places += rest[:: max(1, -(-len(rest) // max(1, POINTS - len(places))))]
    values = [each.values_of(0)[places] for each in (both.a, both.b)]
    overlap = {f"overlap@{k}": float(both.overlap(k)[0]) for k in both.sizes}
    return plain(
        {
            "a": _side(a),
            "b": _side(b),
            "rows_in_common": len(ids),
            "spearman": float(both.spearman[0]),
            **overlap,
            "rows": rows,
            "only_a": [name for name in tops[0] if name not in tops[1]],
            "only_b": [name for name in tops[1] if name not in tops[0]],
            "scatter": {"a": values[0], "b": values[1], "ids": [ids[place] for place in places]},
        }
    )


def _side(found: Asked) -> dict[str, Any]:
    scores, about = found.scores, words.query_of(found.scores, 0)
    said = {"key": found.key, "method": scores.made_by, "unit": scores.unit, "prompt": about.get("prompt")}
    damping = found.question.damping if found.question else None
    own = next((each for each in found.stages if each["stage"] == found.stage), {})
    said |= {"stage": found.stage, "rows": scores.shape[1], "share": own.get("share"), "net": own.get("net")}
    return said | {"completion": about.get("completion") or about.get("text"), "damping": damping}


def _ranks(values: np.ndarray, ids: Sequence[str]) -> dict[str, tuple[int, float]]:
    order = np.argsort(-values, kind="stable")
    return {str(ids[place]): (rank, float(values[place])) for rank, place in enumerate(order.tolist(), 1)}

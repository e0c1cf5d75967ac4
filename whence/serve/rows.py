"""The training rows to look through: searched, sorted, with their self-influence and what was decided about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from whence.plots.scores import score_histogram
from whence.run import Run
from whence.serve.asking import Asking
from whence.serve.decisions import Decisions, parted
from whence.serve.lacking import Lacking
from whence.store.plain import encoded, plain
from whence.store.scores import Scores, row_text
from whence.tasks import CausalLM

SHOWN = 400
"""Characters of a row in a list."""

VERDICTS = ("drop", "keep", "fix", "unsure")


class Browser:
    """The rows of a run; `itself` are its rows' scores against themselves, if there are any."""

    def __init__(self, run: Run, asking: Asking, decisions: Decisions, itself: Scores | None):
        self.run, self.asking, self.decisions, self.rows = run, asking, decisions, run.all_rows
        self.itself: dict[str, float] = {}
        if itself is not None:
            self.itself = dict(zip(itself.example_ids, itself.values_of(0).tolist(), strict=True))
        order = sorted(self.itself, key=lambda name: -self.itself[name])
        self.ranks = {name: rank for rank, name in enumerate(order, 1)}
        self.lengths = np.array([len(row_text(row)) for row in self.rows])
        spread = {"length": self.lengths.astype(float), "self": np.array(list(self.itself.values()))}
        self.histograms = {name: plain(score_histogram(values)) if len(values) else None for name, values in spread.items()}

    def page(
        self, offset: int, limit: int, sort: str = "row", search: str = "", source: str | None = None, decided: str = "any"
    ) -> dict[str, Any]:
        """Rows in an order, those that have all words of the search."""
        if sort == "self" and not self.itself:
            raise Lacking("The rows have no self-influence yet.", job="self", fix="start the job here, or whence score --self")
        current, words = self.decisions.current(), search.casefold().split()
        numbers = list(range(len(self.rows)))
        if source is not None:
            numbers = [number for number in numbers if self.rows[number].get("source") == source]
        if decided != "any":
            numbers = [number for number in numbers if _fits(current.get(self.rows.ids[number]), decided)]
        if words:
            texts = ((number, row_text(self.rows[number]).casefold()) for number in numbers)
            names = self.rows.ids
            numbers = [n for n, text in texts if all(word in text or word == names[n].casefold() for word in words)]
        if sort == "self":
            numbers.sort(key=lambda number: -self.itself.get(self.rows.ids[number], float("-inf")))
        elif sort == "length":
            numbers.sort(key=lambda number: -int(self.lengths[number]))
        return {
            "total": len(self.rows),
            "found": len(numbers),
            "offset": offset,
            "rows": [self._short(number, current) for number in numbers[offset : offset + limit]],
            "has_self": bool(self.itself),
            "histograms": self.histograms,
        }

    def row(self, name: str) -> dict[str, Any]:
        """A row in full, as the model reads it once it is loaded."""
        number = self.asking.number(name)
        row, tokens = self.rows[number], []
        if "loaded" in vars(self.run) and isinstance(task := self.run.task(), CausalLM):
            tokens = [{"text": text, "in_loss": known} for text, known in task.display(task.tokenize([row])[0])]
        parts = {key: row[key] for key in ("text", "prompt", "completion", "messages") if key in row}
        known = self._known(number, self.decisions.current())
        history = self.decisions.history(name)
        return plain({**known, "text": row_text(row), "parts": parts, "tokens": tokens, "history": history})

    def review(self, offset: int, limit: int, decided: str = "no") -> dict[str, Any]:
        """Rows to decide about: those that the model could only learn from themselves come first."""
        found = self.page(offset, limit, "self", decided=decided)
        return {"rows": found["rows"], "found": found["found"], "progress": self.progress()}

    def progress(self) -> dict[str, Any]:
        """How many rows are decided about."""
        current = self.decisions.current()
        counts = Counter(event["verdict"] for event in current.values())
        return {"decided": len(current), "of": len(self.rows), "by": {name: counts[name] for name in VERDICTS}}

    def drop_list(self, form: str) -> bytes:
        """The rows to leave out: ids (txt), or all about them (jsonl); or the rows that stay (kept)."""
        current = self.decisions.current()
        dropped, kept = parted(self.rows, current)
        if form == "txt":
            return "".join(f"{name}\n" for name in dropped).encode("utf-8", "replace")
        if form == "jsonl":
            lines = (self._known(self.asking.number(name), current) | {"text": self._text(name)} for name in dropped)
            return b"".join(encoded(line) + b"\n" for line in lines)
        return b"".join(encoded(row) + b"\n" for row in kept)

    def _text(self, name: str) -> str:
        return row_text(self.rows[self.asking.number(name)])

    def _known(self, number: int, current: Mapping[str, Any]) -> dict[str, Any]:
        name, row = self.rows.ids[number], self.rows[number]
        about = {"number": number, "id": name, "source": row.get("source"), "copies": self.rows.copies[number]}
        about |= {"place": self.asking.place(name), "self": self.itself.get(name), "self_rank": self.ranks.get(name)}
        return about | {"decision": current.get(name)}

    def _short(self, number: int, current: Mapping[str, Any]) -> dict[str, Any]:
        text = row_text(self.rows[number])
        return plain(self._known(number, current) | {"text": text[:SHOWN], "cut": len(text) > SHOWN})


def _fits(decision: Mapping[str, Any] | None, wanted: str) -> bool:
    return (decision is not None) == (wanted == "yes") if wanted in ("yes", "no") else (decision or {}).get("verdict") == wanted

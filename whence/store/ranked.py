"""The table that a ranking is: a data frame of pandas that shows what matters first."""

from __future__ import annotations

from typing import Any

import pandas

from whence.show.markup import framed
from whence.store.shown import cell_of, lines_of, table_of


class Ranked(pandas.DataFrame):
    """Rows in the order of their scores, as `Scores.top` gives them; a part of it is a data frame like any other."""

    _metadata = ["unit"]

    @property
    def _constructor(self) -> Any:
        return pandas.DataFrame

    def __repr__(self) -> str:
        return "\n".join(lines_of(self.to_dict("records"), getattr(self, "unit", ""))) or "no rows"

    def _repr_html_(self) -> str:
        rows = self.to_dict("records")
        return framed("", table_of(rows, getattr(self, "unit", ""), [cell_of(str(row["text"])) for row in rows]))


def ranked(rows: pandas.DataFrame, unit: str) -> Ranked:
    """A table of `Scores.top`, whose values are in `unit`."""
    found = Ranked(rows)
    object.__setattr__(found, "unit", unit)
    return found

"""Which rows are worth exact gradients: the best of cheap rankings, every query's, joined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from whence.errors import UsageError


@dataclass(frozen=True)
class Amount:
    """So many rows, or a share of them, as "500" and "2%" say it."""

    text: str

    def of(self, rows: int) -> int:
        """How many of `rows` rows that is, at least one."""
        number = float(self.text.removesuffix("%"))
        return max(1, min(rows, math.ceil(rows * number / 100 - 1e-9) if self.text.endswith("%") else int(number)))

    @classmethod
    def read(cls, value: str | int, name: str) -> Self:
        """Raises UsageError, which calls the value `name`, where it is neither."""
        text = str(value).strip()
        number, share = text.removesuffix("%"), text.endswith("%")
        try:
            valid = 0 < float(number) <= 100 if share else int(number) > 0
        except ValueError:
            valid = False
        if not valid:
            raise UsageError(f"{name} can't be {text!r}.", accepted="a number of rows such as 500, or a share such as 2%")
        return cls(text)


@dataclass(frozen=True)
class Wanted:
    """The best rows of a retriever's ranking for each query."""

    retriever: str
    amount: Amount


def read_candidates(text: str, retrievers: Sequence[str]) -> tuple[Wanted, ...]:
    """What "bm25:2%+index:500" asks for. Raises UsageError for what can't be read, or is none of the `retrievers`."""
    wanted = []
    for part in text.split("+"):
        name, colon, amount = (piece.strip() for piece in part.partition(":"))
        if not colon or name not in retrievers or name in (want.retriever for want in wanted):
            raise UsageError(
                f"Candidates can't be {part.strip()!r}.",
                accepted=f"RETRIEVER:ROWS of each query, joined by +, each once: {', '.join(retrievers)}",
                fix="bm25:2%, or index:1%+bm25:100",
            )
        wanted.append(Wanted(name, Amount.read(amount, f"The rows of {name}")))
    return tuple(wanted)


@dataclass(frozen=True)
class Candidates:
    """The rows that are chosen, in the order of the data, and how near each of all rows was to it."""

    rows: np.ndarray
    depth_N: np.ndarray
    """The rank, from 1/2 on, in units of what was asked for, by the query and ranking for which a row is best: chosen to 1."""
    named: Mapping[str, int]
    """How many of the chosen are within what each retriever was asked for."""

    @property
    def rest(self) -> np.ndarray:
        """All other rows, the nearest to being chosen first."""
        order = np.argsort(self.depth_N, kind="stable")
        return order[~np.isin(order, self.rows)]


def choose(rankings: Mapping[str, np.ndarray], wanted: Sequence[Wanted], most: Amount | None = None) -> Candidates:
    """The union of every query's best rows in each ranking `[Q, N]`; rows at minus infinity are not in it.

    Where that is more than `most` of the rows, all shares shrink alike: rows go in by their depth, the rank in units of what
    was asked for.
    """
    size = next(iter(rankings.values())).shape[1]
    depths = {}
    for want in wanted:
        ranks_QN = np.argsort(np.argsort(-rankings[want.retriever], axis=1, kind="stable"), axis=1) + 0.5
        ranks_QN[np.isneginf(rankings[want.retriever])] = np.inf
        depths[want.retriever] = ranks_QN.min(0) / want.amount.of(size)
    depth_N = np.min(list(depths.values()), axis=0)
    rows = np.flatnonzero(depth_N <= 1)
    if most is not None and len(rows) > most.of(size):
        rows = np.sort(rows[np.argsort(depth_N[rows], kind="stable")[: most.of(size)]])
    return Candidates(rows, depth_N, {name: int((depth_N[rows] <= 1).sum()) for name, depth_N in depths.items()})

"""Numbers become `Scores`: with the ids and texts of both sides, and what is known of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from whence.data.rows import Rows
from whence.engine.point import Point
from whence.store.scores import Scores, describe_rows


def tabulated(
    raw: np.ndarray,
    at: Point,
    of: Point,
    table: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    n_train: int | None = None,
    **parts: Any,
) -> Scores:
    """Scores `[Q, N]` of the rows of `of`; `table` says what is known of each query, which was asked at `at`."""
    train = of.examples
    copies = train.rows.copies if isinstance(train.rows, Rows) else None
    return Scores(
        raw=raw,
        n_train=n_train or len(train.usable),
        examples=describe_rows(train.rows, train.ids, train.sizes, copies),
        queries=table,
        about={**measured(at), **about},
        **parts,
    )


def measured(at: Point) -> dict[str, str | None]:
    """The unit of values, what is measured of queries, and what its log-likelihood is known to be."""
    measurement = at.settings.get("measurement", "logprob")
    return {
        "unit": "nats per copy" if measurement in ("logprob", "loss") else f"{measurement} per copy",
        "measurement": measurement,
        "likelihood": at.task.likelihood,
    }

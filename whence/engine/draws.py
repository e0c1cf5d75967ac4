"""Rows drawn for the steps of a stochastic search: a function of the seed and the step, so that a killed search resumes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def drawn_rows(rows: Sequence[int], size: int, step: int, seed: int = 0) -> list[int]:
    """The `size` rows of a step: all in turn, in an order that is drawn anew for each pass over them (all of them if fewer)."""
    count, size = len(rows), min(size, len(rows))
    places = range(step * size, (step + 1) * size)
    orders = {number: np.random.default_rng([seed, number]).permutation(count) for number in {p // count for p in places}}
    return [rows[orders[place // count][place % count]] for place in places]

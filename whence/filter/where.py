"""Which rows are meant: conditions on what is known of each row, such as `source=web`, `tokens>=20` or `text~lighthouse`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from whence.errors import UsageError

if TYPE_CHECKING:
    import pandas

COLUMNS = ("source", "id", "stage", "copies", "tokens", "text")
"""What rows can be told by, as far as their table has it."""

MEANINGS = "COLUMN=VALUE, !=, <, <=, >, >=, or ~ (contains, upper or lower case)"

_CONDITION = re.compile(r"\s*([a-z]+)\s*(!=|<=|>=|=|<|>|~)(.*)", re.DOTALL)

_ORDERS: dict[str, Callable[[Any, Any], Any]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def matching(examples: pandas.DataFrame, where: Sequence[str]) -> np.ndarray:
    """The rows of a table that meet all conditions, `[N]`, as booleans.

    Several `COLUMN=VALUE` of one column are alternatives. A value is compared as text, and as a number by `<`, `<=`, `>`, `>=`.

    Raises UsageError for a text that is no condition, a column that the rows lack, or where no row meets all.
    """
    meet, either = np.ones(len(examples), dtype=bool), dict[str, np.ndarray]()
    for condition in where:
        column, sign, value = _parsed(condition, [name for name in COLUMNS if name in examples])
        if sign in _ORDERS:
            met = _ORDERS[sign](examples[column].to_numpy(), _number(condition, value))
        else:
            texts = examples[column].astype(object).where(examples[column].notna(), "").astype(str)
            met = (texts.str.contains(value, case=False, regex=False) if sign == "~" else texts == value).to_numpy(dtype=bool)
        if sign == "=":
            either[column] = either.get(column, False) | met
        else:
            meet &= ~met if sign == "!=" else met
    for met in either.values():
        meet &= met
    if not meet.any():
        names = examples["source"].dropna().astype(str).unique() if "source" in examples else []
        known = f"sources are {', '.join(sorted(names)[:10])}{', …' if len(names) > 10 else ''}" if len(names) else ""
        raise UsageError(f"No row meets {' and '.join(where)}.", given=f"{len(examples):,} rows", accepted=known)
    return meet


def _parsed(condition: str, columns: Sequence[str]) -> tuple[str, str, str]:
    """Column, sign and value."""
    found = _CONDITION.fullmatch(condition)
    if found is None:
        raise UsageError("That is not a condition on rows.", given=condition, accepted=MEANINGS)
    column, sign, value = found.groups()
    if column not in columns or (sign in _ORDERS) > (column in ("copies", "tokens")):
        numbers = "; in order: copies, tokens" if sign in _ORDERS else ""
        raise UsageError(f"Rows can't be told by {column}{sign}.", given=condition, accepted=f"{', '.join(columns)}{numbers}")
    return column, sign, value.strip()


def _number(condition: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError("A condition on order needs a number.", given=condition, accepted="such as tokens>=20") from None

"""What Python keeps data in, as a sequence of examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from whence.errors import UsageError
from whence.progress import note


def sequence_of(data: Any) -> Sequence[Any]:
    """Turn tables, lists by column, splits and `(inputs, targets)` into a sequence of examples; sequences stay as they are.

    Raises `UsageError` for what can be gone through only once, or has no order, with what to pass instead.
    """
    kind = type(data).__name__
    if isinstance(data, Mapping):
        return _of_mapping(data)
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # a DataFrame; what is missing there is NaN
        return data.astype(object).where(data.notna(), None).to_dict("records")
    for method in ("to_pylist", "to_dicts"):  # tables of pyarrow and polars
        if hasattr(data, method):
            return getattr(data, method)()
    if hasattr(data, "iloc"):  # a Series
        return data.to_list()
    if hasattr(data, "batch_sampler"):
        raise _not_rows(kind, "batches are made by whence, which needs to know each example", "the data set: loader.dataset")
    if isinstance(data, Iterator):
        raise _not_rows(kind, "it can be gone through only once, and fit and score each read the data", "a list: list(rows)")
    if isinstance(data, tuple) and len(data) == 2 and all(_is_array(part) for part in data):
        return _pairs(*data)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        fix = "a list of its rows: list(data.take(10_000)), or list(data)" if hasattr(data, "__iter__") else ""
        raise _not_rows(kind, "it has no length or no rows by number", fix)
    return data


def _of_mapping(data: Mapping[Any, Any]) -> Sequence[Any]:
    if data and all(hasattr(value, "column_names") or hasattr(value, "iloc") for value in data.values()):
        if "train" not in data and len(data) > 1:
            names = list(map(str, data))
            raise _not_rows(f"{type(data).__name__} with {', '.join(names)}", "these are splits", f'data["{names[0]}"]')
        name = "train" if "train" in data else next(iter(data))
        note(f"of the splits {', '.join(map(str, data))} the rows are those of {name}")
        return sequence_of(data[name])
    columns = {name: value for name, value in data.items() if isinstance(value, list | tuple) or _is_array(value)}
    lengths = {len(value) for value in columns.values()}
    if not data or len(columns) < len(data) or len(lengths) > 1:
        shown = ", ".join(f"{name}: {len(v) if hasattr(v, '__len__') else type(v).__name__}" for name, v in data.items())
        raise _not_rows(f"mapping with {shown}", "it is neither lists of one length by column nor a list of rows", "[row, ...]")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _pairs(inputs: Any, targets: Any) -> Sequence[Any]:
    if len(inputs) != len(targets):
        raise UsageError(
            "There are not as many inputs as targets.",
            given=f"{len(inputs)} inputs and {len(targets)} targets",
            accepted="(inputs, targets) of one length",
        )
    note(f"{len(inputs):,} examples of (inputs, targets)")
    return list(zip(inputs, targets, strict=True))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and len(value.shape) > 0


def _not_rows(kind: str, why: str, fix: str) -> UsageError:
    return UsageError(
        f"The examples can't be read from a {kind}: {why}.",
        given=f"a {kind}",
        accepted="a list, a data set with a length, a table of pandas or pyarrow, (inputs, targets), a path",
        fix=fix,
    )

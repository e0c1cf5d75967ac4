"""Read data from wherever it is: files, folders of the `datasets` library, the hub, or Python lists."""

from __future__ import annotations

import difflib
import functools
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from whence.data.columns import Record
from whence.data.rows import Rows, make_rows
from whence.errors import UsageError, WhenceError
from whence.store.intact import unsealed

Reader = Callable[[Path, int | None, Mapping[str, str]], Iterable[Any]]

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def load_data(
    path: str | Path, *, columns: Mapping[str, str] | None = None, split: str = "train", limit: int | None = None
) -> Rows:
    """Load rows of text; `limit` keeps the first ones.

    | path | read as |
    |---|---|
    | `.jsonl`, `.ndjson` | one object or string per line |
    | `.json` | a list of objects or strings, `{"data": [...]}`, or the same as `.jsonl` |
    | `.csv`, `.tsv` | all values as text; a TSV has no quotes; without a header line columns are named "0", "1", ... |
    | `.parquet`, `.arrow` | a table |
    | `.txt`, `.text`, `.md`, `.tokens` | one row per paragraph; blank lines separate paragraphs |
    | a folder | what `Dataset.save_to_disk` wrote |
    | `owner/name`, `name`, `owner/name:config` | a data set of the hub, when nothing of that name is here |

    Text files may be compressed (`.gz`). `columns` says which column plays which part (see `whence.data.columns`); without it
    well-known names are recognised and the guess is noted. Rows are named by their content unless `columns` has an `"id"`.
    Raises `ColumnError` when no column fits, `UsageError` for anything else that can't be read.
    """
    place, origin = Path(path), str(path)
    if place.is_dir():
        records = _read_folder(place, split, limit)
    elif place.is_file():
        records = _read_file(place, limit, columns or {})
    elif HUB_NAME.fullmatch(origin) and _kind(place) not in READERS:
        records = _read_hub(origin, split, limit)
    else:
        near = difflib.get_close_matches(place.name, _names_in(place.parent), n=1, cutoff=0.5)
        raise UsageError(f"There is no data at {origin}.", fix=f"did you mean {place.parent / near[0]}?" if near else "")
    return make_rows(records, columns=columns, origin=origin)


def as_rows(data: Any) -> Rows:
    """Rows of what a user may pass: `Rows`, a path, a list of strings or dicts, or a `datasets.Dataset`."""
    if isinstance(data, Rows):
        return data
    if isinstance(data, str | Path):
        return load_data(data)
    if hasattr(data, "to_list"):
        return make_rows(data.to_list(), origin=f"a {type(data).__name__}")
    if isinstance(data, list | tuple) and all(isinstance(row, str | Mapping) for row in data):
        return make_rows(data, origin=f"a list of {len(data):,} rows")
    raise UsageError(
        "This is no text data.",
        given=f"a {type(data).__name__}",
        accepted="a path or hub name, a list of strings or dicts, a datasets.Dataset, or what load_data returned",
    )


def _read_file(path: Path, limit: int | None, columns: Mapping[str, str]) -> list[Record | str]:
    kind = _kind(path)
    if kind not in READERS:
        raise UsageError(
            f"It is not clear how to read {path}.", given=f"the ending {kind or '(none)'}", accepted=", ".join(READERS)
        )
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty.", accepted="at least one row")
    try:
        return list(itertools.islice(READERS[kind](path, limit, columns), limit))
    except WhenceError:
        raise
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        packed = f" ({path.suffix.removeprefix('.')})" if path.suffix == ".gz" else ""
        raise UsageError(
            f"{path} can't be read as {kind.removeprefix('.')}{packed}.", given=f"{type(error).__name__}: {error}"
        ) from error


def _kind(path: Path) -> str:
    """Take the ending that says how to read the file, without `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _open(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def _read_jsonl(path: Path, limit: int | None, columns: Mapping[str, str]) -> Iterator[Record | str]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield _record(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _read_json(path: Path, limit: int | None, columns: Mapping[str, str]) -> Iterable[Record | str]:
    with _open(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(path, limit, columns)
        raise
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = unsealed(value, path)["data"]
    if not isinstance(value, list):
        raise UsageError(
            f"{path} holds no list of rows.",
            given=f"an object with {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}",
            accepted='[row, row, ...] or {"data": [row, row, ...]}, a row being an object or a string',
        )
    return [_record(row) for row in value[:limit]]


def _record(value: Any) -> Record | str:
    if not isinstance(value, dict | str):
        raise ValueError(f"a row is an object or a string, not {json.dumps(value)[:60]}")
    return value


def _read_table(separator: str, quoting: int) -> Reader:
    def read(path: Path, limit: int | None, columns: Mapping[str, str]) -> list[Any]:
        import pandas as pd

        read_csv = functools.partial(
            pd.read_csv, path, sep=separator, quoting=quoting, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
        wanted = {name for column in columns.values() for name in column.split("+")}
        missing = wanted - set(read_csv(nrows=0).columns)
        by_position = missing and all(name.isdigit() for name in missing)
        frame = read_csv(nrows=limit, header=None if by_position else 0)
        return frame.rename(columns=str).to_dict("records")

    return read


def _read_parquet(path: Path, limit: int | None, columns: Mapping[str, str]) -> list[Record]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).slice(0, limit).to_pylist()


def _read_arrow(path: Path, limit: int | None, columns: Mapping[str, str]) -> Iterable[Any]:
    import datasets

    return iter(datasets.Dataset.from_file(str(path)))


def _read_paragraphs(path: Path, limit: int | None, columns: Mapping[str, str]) -> Iterator[str]:
    with _open(path) as lines:
        for blank, paragraph in itertools.groupby(lines, key=lambda line: not line.strip()):
            if not blank:
                yield "".join(paragraph).strip("\n")


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table(",", quoting=0),
    ".tsv": _read_table("\t", quoting=3),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_paragraphs,
    ".text": _read_paragraphs,
    ".md": _read_paragraphs,
    ".tokens": _read_paragraphs,
}


def _read_folder(path: Path, split: str, limit: int | None) -> Iterable[Record]:
    import datasets

    data: Any
    try:
        data = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is no folder of Dataset.save_to_disk.",
            given=f"a folder with {', '.join(_names_in(path)[:8]) or 'nothing in it'}",
            accepted="such a folder, or one file of it",
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            splits = [str(name) for name in data]
            raise UsageError(f"{path} has no split {split!r}.", accepted=", ".join(splits), fix=f'split="{splits[0]}"')
        data = data[split]
    return itertools.islice(data, limit)


def _read_hub(name: str, split: str, limit: int | None) -> list[Record]:
    import datasets

    repository, _, config = name.partition(":")
    data: Any
    try:
        data = datasets.load_dataset(repository, config or None, split=split, streaming=limit is not None)
        return list(itertools.islice(data, limit))
    except Exception as error:  # the hub client raises many unrelated types; all mean that there is no data
        raise UsageError(
            f"There is no file {name!r} here, and loading a data set of that name from the hub failed.",
            given=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            accepted="owner/name or owner/name:config of a data set that you may read, or a local path",
            fix="check the name and split, and for a gated data set: hf auth login",
        ) from error


def _names_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []

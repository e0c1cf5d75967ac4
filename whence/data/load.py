"""Read data from wherever it is: files, folders, globs, the hub, or what Python has."""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import gzip
import io
import itertools
import json
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from whence.data.columns import Record, column_error, is_known, propose
from whence.data.containers import sequence_of
from whence.data.rows import Rows, make_rows
from whence.errors import UsageError, WhenceError
from whence.progress import Silent, note, report_to
from whence.settings import Count, valid
from whence.store.intact import intact, refuse_loop, unsealed

Reader = Callable[[Path, int | None, Mapping[str, str]], Iterable[Any]]

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")

SPLITS = (("train", "training"), ("validation", "valid", "val", "dev"), ("test", "eval", "evaluation"))
"""What files of a data set's splits are called, each by several names."""

BESIDE = re.compile(r"(readme|license|licence|changelog|notice|dataset_infos?|state|metadata|\.).*", re.IGNORECASE)
"""Files beside the data of a folder."""

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"} | {
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""How a file begins that says its encoding; those of UTF-32 before those of UTF-16, with which they begin."""

SEPARATORS = (";", "\t", "|", ",")
"""What stands between columns beside what the ending says."""


def load_data(
    path: str | Path, *, columns: Mapping[str, str] | None = None, split: str = "train", limit: int | None = None
) -> Rows:
    """Load rows of text; `limit` keeps the first ones.

    | path | read as |
    |---|---|
    | `.jsonl`, `.ndjson` | one object or string per line; objects over several lines are read too |
    | `.json` | a list of objects or strings, `{"data": [...]}`, lists by column, or the same as `.jsonl` |
    | `.csv`, `.tsv` | all values as text; a TSV has no quotes; without a header line columns are named "0", "1", ... |
    | `.parquet`, `.arrow` | a table |
    | `.txt`, `.text`, `.md`, `.tokens` | one row per paragraph; blank lines separate paragraphs |
    | a folder | what `Dataset.save_to_disk` wrote, or all its files, which are of one kind |
    | `shards/part-*.jsonl` | all these files, in the order of their names |
    | `owner/name`, `name`, `owner/name:config` | a data set of the hub, when nothing of that name is here |

    Text is UTF-8, or UTF-16 where the file says so, and may be compressed (`.gz`). `columns` says which column plays which part
    (see `whence.data.columns`); without it well-known names are recognised and the guess is noted. Rows are named by their
    content unless `columns` has an `"id"`.
    Raises `ColumnError` when no column fits, `UsageError` for anything else that can't be read.
    """
    _check_arguments(path, columns, limit)
    place, origin = Path(path), str(path)
    refuse_loop(place)
    if place.is_dir():
        if any((place / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            return make_rows(_read_folder(place, split, limit), columns=columns, origin=origin)
        return _load_files(_files_of(place, split), columns, origin, limit)
    if place.is_file():
        return make_rows(_read_file(place, limit, columns or {}), columns=columns, origin=origin)
    if glob.has_magic(origin):
        files = sorted((Path(name) for name in glob.glob(origin, recursive=True) if Path(name).is_file()), key=_in_order)
        if not files:
            raise UsageError(f"There are no files {origin}.", fix=f"ls {place.parent}")
        return _load_files(files, columns, origin, limit)
    if HUB_NAME.fullmatch(origin) and _kind(place) not in READERS:
        return make_rows(_read_hub(origin, split, limit), columns=columns, origin=origin)
    near = difflib.get_close_matches(place.name, _names_in(place.parent), n=1, cutoff=0.5)
    raise UsageError(f"There is no data at {origin}.", fix=f"did you mean {_suggested(place.parent, near[0])}?" if near else "")


def _check_arguments(path: object, columns: object, limit: object) -> None:
    """Raise UsageError where they are of another kind."""
    if not isinstance(path, str | Path):
        raise UsageError(
            f"The path can't be a {type(path).__name__}.",
            accepted="a file, a folder or a name of the hub; rows in memory go to whence.fit and whence.score as they are",
        )
    if columns is not None and not isinstance(columns, Mapping):
        raise UsageError(f"columns can't be {columns!r}.", accepted='part and column, such as {"prompt": "Input"}')
    valid(Count | None, limit, "limit")


def count_rows(path: str | Path, *, columns: Mapping[str, str] | None = None, split: str = "train") -> int | None:
    """How many rows `load_data` reads without a limit; None for a data set of the hub that does not say."""
    if Path(path).exists() or glob.has_magic(str(path)):
        with report_to(Silent()):  # what is noted of rows was noted of those that are used
            return len(load_data(path, columns=columns, split=split))
    import datasets

    repository, _, config = str(path).partition(":")
    splits: Any = datasets.load_dataset_builder(repository, config or None).info.splits or {}
    return splits[split].num_examples if split in splits else None


def places(path: str | Path, split: str = "train") -> list[tuple[Path, int]]:
    """The file and the line, from 1, where each row begins that `load_data` reads without a limit, for formats that have lines.

    Empty for other formats, for objects of JSON that go on over several lines, and for data sets of the hub.
    """
    place, found = Path(path), []
    files = [place] if place.is_file() else []
    with report_to(Silent()):
        if place.is_dir() and not (place / "dataset_info.json").is_file() and not (place / "state.json").is_file():
            files = _files_of(place, split)
        elif not files and glob.has_magic(str(path)):
            files = sorted((Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()), key=_in_order)
        for file in files:
            found += [(file, line) for line in _beginnings(file)]
    return found


def _beginnings(file: Path) -> Iterator[int]:
    """The lines, from 1, where the rows of a file begin."""
    kind = _kind(file)
    if kind in (".csv", ".tsv"):
        separator, quoting = (",", csv.QUOTE_MINIMAL) if kind == ".csv" else ("\t", csv.QUOTE_NONE)
        lines = _lines(file, *(_other_separator(file, separator, quoting) or (separator, quoting)), None)
        yield from (line - sum(cell.count("\n") for cell in cells) for line, cells in lines[1:])
    elif READERS.get(kind) in (_read_jsonl, _read_paragraphs):
        before = ""
        with _open(file) as text:
            for number, line in enumerate(text, 1):
                if line.strip() and not (before and READERS[kind] is _read_paragraphs):
                    yield number
                before = line.strip()


def as_rows(data: Any) -> Rows:
    """Rows of what a user may pass: `Rows`, a path, strings or dicts, a table of pandas or pyarrow, a `datasets.Dataset`."""
    if isinstance(data, Rows):
        return data
    if isinstance(data, str | Path):
        return load_data(data)
    origin = f"a list of {len(data):,} rows" if isinstance(data, list | tuple) else f"a {type(data).__name__}"
    rows: Any = sequence_of(data)
    records = rows.to_list() if hasattr(rows, "to_list") else [rows[number] for number in range(len(rows))]
    if all(isinstance(row, str | Mapping) for row in records):
        return make_rows(records, origin=origin)
    raise UsageError(
        "This is not text data.",
        given=origin,
        accepted="a path or hub name, a list of strings or dicts, a table, a datasets.Dataset, or what load_data returned",
    )


def _load_files(files: Sequence[Path], columns: Mapping[str, str] | None, origin: str, limit: int | None) -> Rows:
    """Read files one after the other, as one data set."""
    kinds = dict.fromkeys(map(_kind, files))
    if len(kinds) > 1:
        raise UsageError(
            f"The files of {origin} are of several kinds, and it is not clear which are the data.",
            given=", ".join(f"{next(file.name for file in files if _kind(file) == kind)}" for kind in kinds),
            accepted="files of one kind",
            fix=f"name them: '{files[0].parent}/*{''.join(files[0].suffixes[-1:])}'",
        )
    records: list[Record | str] = []
    ends: list[int] = []
    for file in files:
        left = None if limit is None else limit - len(records)
        if left == 0:
            break
        records += _read_file(file, left, columns or {})
        ends.append(len(records))
    note(f"{origin}: {len(ends)} files, {files[0].name} to {files[len(ends) - 1].name}, {len(records):,} rows")

    def where(number: int) -> str:
        which = next(i for i, end in enumerate(ends) if number <= end)
        return f"Row {number - (ends[which - 1] if which else 0)} of {files[which]}"

    return make_rows(records, columns=columns, origin=origin, place=where)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a folder that are its data; of one with splits, those of the split."""
    files = [file for file in folder.rglob("*") if file.is_file() and _kind(file) in READERS]
    files = sorted((file for file in files if not BESIDE.match(file.relative_to(folder).name)), key=_in_order)
    if not files:
        raise UsageError(
            f"There is no data in {folder}.",
            given=f"a folder with {', '.join(_names_in(folder)[:8]) or 'nothing in it'}",
            accepted=f"a folder of Dataset.save_to_disk, or one with files {', '.join(READERS)}",
        )
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    names = list(dict.fromkeys(name for name in splits.values() if name))
    if not names:
        return files
    wanted = next((known[0] for known in SPLITS if split.lower() in known), split)
    chosen = [file for file in files if splits[file] == wanted]
    left_out = [str(file.relative_to(folder)) for file in files if file not in chosen]
    if chosen and left_out:
        note(f"{folder}: split {wanted}; not read: {', '.join(left_out[:5])}{', ...' if len(left_out) > 5 else ''}")
    if not chosen:
        raise UsageError(f"{folder} has no split {split!r}.", accepted=", ".join(names), fix=f"--split {names[0]}")
    return chosen


def _split_of(file: Path) -> str | None:
    """The split that a file is of, by the first word of its name or of its folder's."""
    for part in (file.name, *(parent.name for parent in file.parents)):
        word = re.split(r"[^a-z]", part.lower(), maxsplit=1)[0]
        for known in SPLITS:
            if word in known:
                return known[0]
    return None


def _in_order(file: Path) -> list[Any]:
    """Sort names so that part-10 comes after part-9."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", str(file))]


def _suggested(folder: Path, name: str) -> str:
    """The file of this name, or all that differ from it by a number only."""
    pattern = re.sub(r"\d+", "*", name)
    alike = glob.glob(str(Path(glob.escape(str(folder))) / pattern)) if pattern != name else []
    return f"'{folder / pattern}'" if len(alike) > 1 else str(folder / name)


def _read_file(path: Path, limit: int | None, columns: Mapping[str, str]) -> list[Record | str]:
    kind = _kind(path)
    if kind not in READERS:
        raise UsageError(
            f"It is not clear how to read {path}.", given=f"the ending {kind or '(none)'}", accepted=", ".join(READERS)
        )
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty.", accepted="at least one row")
    try:
        try:
            return list(itertools.islice(READERS[kind](intact(path), limit, columns), limit))
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, error) from error  # reads it again, which may fail too
    except WhenceError:
        raise
    except (ValueError, OSError, EOFError, RecursionError, zlib.error, csv.Error) as error:
        packed = f" ({path.suffix.removeprefix('.')})" if path.suffix == ".gz" else ""
        raise UsageError(
            f"{path} can't be read as {kind.removeprefix('.')}{packed}.", given=f"{type(error).__name__}: {error}"
        ) from error


def _kind(path: Path) -> str:
    """Take the ending that says how to read the file, without `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _open(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file, in the encoding that it says."""
    raw: Any = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 - closed with its text
    try:
        beginning = raw.read(4096)
        raw.seek(0)
    except BaseException:
        raw.close()
        raise
    encoding = next((name for mark, name in MARKS.items() if beginning.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in beginning and len(beginning) % 2 == 0:
        # plain letters in UTF-16 have a zero beside each
        zeros = [beginning[start::2].count(0) / max(1, len(beginning) // 2) for start in (0, 1)]
        encoding = "utf-16-le" if zeros[1] > 0.4 else "utf-16-be" if zeros[0] > 0.4 else encoding
    return io.TextIOWrapper(raw, encoding=encoding, newline=newline)


def _wrong_encoding(path: Path, error: UnicodeDecodeError) -> UsageError:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        name = codecs.lookup(_likely_encoding(file.read(2**18))).name.upper()
    end, unpack = error.end, "zcat" if path.suffix == ".gz" else "cat"
    return UsageError(
        f"{path} can't be read as {_kind(path).removeprefix('.')}: it is not UTF-8.",
        given=f"the bytes {error.object[max(0, error.start - 20) : end + 20]!r}, which may be {name}",
        accepted="text in UTF-8, or in UTF-16 with its mark",
        fix=f"{unpack} {shlex.quote(str(path))} | iconv -f {name} -t UTF-8 > utf8{_kind(path)}",
    )


def _likely_encoding(content: bytes) -> str:
    """A guess at the encoding of text that isn't UTF-8: Western European where nothing better is installed to tell."""
    try:
        import charset_normalizer
    except ImportError:  # it comes with other packages only
        return "cp1252"
    best = charset_normalizer.from_bytes(content).best()
    return best.encoding if best is not None else "latin_1"


def _read_jsonl(path: Path, limit: int | None, columns: Mapping[str, str]) -> Iterator[Record | str]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                try:  # a value that goes on over several lines
                    values = _values(line + lines.read())
                except json.JSONDecodeError:
                    raise ValueError(f"line {number}: {error}") from error
                for value in values:
                    yield from _records(value)
                return
            yield from _records(value)


def _read_json(path: Path, limit: int | None, columns: Mapping[str, str]) -> Iterable[Record | str]:
    with _open(path) as file:
        text = file.read()
    values = _values(text)
    if len(values) != 1:
        return [record for value in values for record in _records(value)]
    (value,) = values
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = unsealed(value, path)["data"]
    elif isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = sequence_of(value)
    elif isinstance(value, dict) and value and all(isinstance(column, dict) for column in value.values()):
        numbers = [list(column) for column in value.values()]  # as DataFrame.to_json writes it
        if all(other == numbers[0] for other in numbers):
            value = sequence_of({name: list(column.values()) for name, column in value.items()})
    if not isinstance(value, list):
        raise UsageError(
            f"{path} holds no list of rows.",
            given=f"an object with {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}",
            accepted='[row, row, ...] or {"data": [row, row, ...]}, a row being an object or a string',
        )
    return [_record(row) for row in value[:limit]]


def _values(text: str) -> list[Any]:
    """The values of JSON that stand one after the other, on lines of their own or not."""
    decoder, values, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return values


def _records(value: Any) -> list[Record | str]:
    return [_record(row) for row in value] if isinstance(value, list) else [_record(value)]


def _record(value: Any) -> Record | str:
    if not isinstance(value, dict | str):
        raise ValueError(f"a row is an object or a string, not {json.dumps(value)[:60]}")
    return value


def _read_table(separator: str, quoting: Any) -> Reader:
    def read(path: Path, limit: int | None, columns: Mapping[str, str]) -> list[Any]:
        other = _other_separator(path, separator, quoting)
        lines = _lines(path, *(other or (separator, quoting)), limit)
        if not lines:
            return []
        header = lines[0][1]
        wanted = {name for column in columns.values() for name in column.split("+")}
        missing = wanted - set(header)
        if missing and all(name.isdigit() and int(name) < len(header) for name in missing):
            header = [str(number) for number in range(max(len(cells) for _, cells in lines))]
        elif not wanted & set(header) and not is_known(header) and _looks_like_a_row(header):
            sample: Record = {str(number): cell for number, cell in enumerate(header)}
            raise column_error(f"{path} seems to begin with a row: no header line names its columns.", sample, propose(sample))
        else:
            header = _unique([name.strip() for name in header], path)
            lines = lines[1:]
        return [_cells(header, cells, line, path) for line, cells in lines[:limit]]

    return read


def _other_separator(path: Path, separator: str, quoting: Any) -> tuple[str, Any] | None:
    """What stands between the columns, and how it quotes, where it is not what the ending says; noted."""
    with _open(path) as file:
        first = next((line for line in file if line.strip()), "")
    if len(next(csv.reader([first], delimiter=separator, quoting=quoting), [])) != 1:
        return None
    for other in SEPARATORS:
        names = next(csv.reader([first], delimiter=other, quoting=csv.QUOTE_MINIMAL))
        if len(names) > 1 and other != separator:
            lines = _lines(path, other, csv.QUOTE_MINIMAL, None) if not is_known(names) and other != "," else []
            if is_known(names) or (lines and all(len(cells) == len(names) for _, cells in lines)):
                note(f"{path}: read with {other!r} between the columns")
                return other, csv.QUOTE_MINIMAL
    return None


def _lines(path: Path, separator: str, quoting: Any, limit: int | None) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not empty, split into cells, with their numbers."""
    widest = csv.field_size_limit(sys.maxsize)  # a cell may be a whole document
    try:
        with _open(path, newline="") as file:
            reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
            try:
                filled = ((reader.line_num, cells) for cells in reader if cells)
                return list(itertools.islice(filled, None if limit is None else limit + 1))
            except csv.Error as error:
                raise csv.Error(f"line {reader.line_num}: {error} (quotes inside a quoted text are written twice)") from error
    finally:
        csv.field_size_limit(widest)


def _cells(header: Sequence[str], cells: list[str], line: int, path: Path) -> Record:
    """Name a row's cells; a separator at its end makes no cell, and one that is missing there is null."""
    extra = cells[len(header) :]
    if any(cell.strip() for cell in extra):
        raise UsageError(
            f"Line {line} of {path} has {len(cells)} cells, more than the header line ({len(header)}).",
            given=f"{', '.join(header)}: {json.dumps(cells, ensure_ascii=False)[:300]}",
            accepted="as many cells as columns; a separator at the end of the line does no harm",
            fix='put quotes around a text with separators in it ("a, b"), or take a format that needs none (jsonl)',
        )
    return {**dict.fromkeys(header), **dict(zip(header, cells, strict=False))}


def _unique(names: Sequence[str], path: Path) -> list[str]:
    """Names of columns that may be used as keys."""
    unique: list[str] = []
    for number, name in enumerate(names):
        name = name or f"Unnamed: {number}"
        copies = sum(earlier == name or re.fullmatch(rf"{re.escape(name)}\.\d+", earlier) is not None for earlier in unique)
        if name in unique:
            note(f"{path}: there are several columns {name!r}; a later one is {name}.{copies}")
            name = f"{name}.{copies}"
        unique.append(name)
    return unique


def _looks_like_a_row(header: Sequence[str]) -> bool:
    """Whether cells are what a text or a label would be, and no name of a column."""
    numbers = sum(re.fullmatch(r"-?\d+([.,]\d+)?", cell.strip()) is not None for cell in header)
    texts = sum(len(cell) > 40 or cell.rstrip().endswith((".", "!", "?")) for cell in header)
    return numbers + texts > 0 or len(set(header)) < len(header)


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
    ".csv": _read_table(",", csv.QUOTE_MINIMAL),
    ".tsv": _read_table("\t", csv.QUOTE_NONE),
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
        if not isinstance(data, datasets.DatasetDict):
            return list(itertools.islice(data, limit))
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is not a folder of Dataset.save_to_disk.",
            given=f"a folder with {', '.join(_names_in(path)[:8]) or 'nothing in it'}",
            accepted="such a folder, or one file of it",
        ) from error
    except Exception as error:  # json, pyarrow and datasets raise what they like for damaged files
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"{path} is a damaged folder of Dataset.save_to_disk.",
            given=f"{type(error).__name__}: {reason}",
            fix="restore it from a copy, or save the data set again",
        ) from error
    if split not in data:
        splits = [str(name) for name in data]
        raise UsageError(f"{path} has no split {split!r}.", accepted=", ".join(splits), fix=f'split="{splits[0]}"')
    rows: Any = data[split]
    return itertools.islice(rows, limit)


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

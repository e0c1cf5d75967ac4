"""Rows of text with stable ids: what training data and queries are to everything else."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from whence.data.columns import Record, read_columns
from whence.data.content import content_digest, content_id
from whence.errors import UsageError
from whence.progress import note

__all__ = ["Rows", "content_id", "make_rows", "numbered", "with_contents"]


@dataclass(frozen=True, eq=False)
class Rows(Sequence[dict[str, Any]]):
    """Rows of data in their order, each with an id that doesn't depend on it.

    A row is `{"text"}`, `{"prompt", "completion"}` or `{"messages": [{"role", "content"}, ...]}`. Prompt and completion
    are put together as they are: a space or a line break between them is part of one of them. A turn of a conversation may
    have `tool_calls` and the like for the chat template, and `"train": False`, which leaves it out of the loss; the row may
    have `tools`. A row may carry a `source`, and a `label` for classification; a query may carry a `contrast` (another
    completion) or a `span` (the part of the completion that it asks about).
    """

    rows: tuple[dict[str, Any], ...]
    ids: tuple[str, ...]
    """Unique: the user's, or 12 hex digits of the content's hash, where the second copy of a row gets `#2`, and so on."""
    copies: tuple[int, ...]
    """How many rows of the data that was loaded have exactly this content, this one included; `take` keeps the number."""
    origin: str
    """Where the rows come from, for people."""
    fingerprint: str
    """Hash of the ids and contents in their order."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Rows:
        return self.take(range(len(self))[index]) if isinstance(index, slice) else self.rows[index]

    def __repr__(self) -> str:
        return f"Rows({len(self):,} rows of {self.origin}, fingerprint {self.fingerprint[:12]})"

    def take(self, indices: Iterable[int]) -> Rows:
        """Choose the rows at these positions; they keep their ids and counts of copies."""
        chosen = list(indices)
        rows, ids = tuple(self.rows[i] for i in chosen), tuple(self.ids[i] for i in chosen)
        return Rows(rows, ids, tuple(self.copies[i] for i in chosen), self.origin, _fingerprint(ids, rows))


def with_contents(rows: Rows, contents: Iterable[dict[str, Any]]) -> Rows:
    """Give the rows other contents under the same ids."""
    changed = tuple(contents)
    return replace(rows, rows=changed, fingerprint=_fingerprint(rows.ids, changed))


def make_rows(
    records: Iterable[Record | str],
    *,
    columns: Mapping[str, str] | None = None,
    origin: str,
    place: Callable[[int], str] | None = None,
) -> Rows:
    """Build rows from records (strings are texts). The source of a row is no part of its content.

    Raises `UsageError` when there is no row or the user's ids repeat, and what `read_columns` raises.
    """
    table = [{"text": record} if isinstance(record, str) else record for record in records]
    if not table:
        raise UsageError(f"There are no rows in {origin}.", accepted="at least one row")
    rows, own_ids = read_columns(table, columns, origin, place)
    digests = [content_digest({role: value for role, value in row.items() if role != "source"}) for row in rows]
    counts = Counter(digests)
    if len(counts) < len(rows):
        note(f"{origin}: {len(rows) - len(counts):,} of {len(rows):,} rows are exact copies of an earlier row")
    repeated = [name for name, count in Counter(own_ids or ()).items() if count > 1]
    if repeated:
        raise UsageError(
            f"{len(repeated):,} ids of {origin} name more than one row.",
            given=", ".join(repeated[:5]) + (", ..." if len(repeated) > 5 else ""),
            accepted="a column whose values are all different",
            fix='leave "id" out of columns: rows are then named by their content',
        )
    ids = tuple(numbered(digest[:12] for digest in digests) if own_ids is None else own_ids)
    return Rows(tuple(rows), ids, tuple(counts[digest] for digest in digests), origin, _fingerprint(ids, rows))


def numbered(names: Iterable[str]) -> Iterator[str]:
    """The names, where the second of a kind gets `#2`, and so on."""
    seen = Counter[str]()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def _fingerprint(ids: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, row in zip(ids, rows, strict=True):
        digest.update(f"{content_digest(name)}{content_digest(row)}".encode())
    return digest.hexdigest()

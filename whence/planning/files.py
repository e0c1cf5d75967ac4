"""Bytes of the files that fitting, scoring and indexing leave."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from whence.coverage import Site
from whence.fitting import Curvature
from whence.indexing.build import rows_bytes
from whence.planning.work import Data
from whence.settings import Index
from whence.store.compact import compact_bytes

if TYPE_CHECKING:
    import pandas

MANIFESTS = 6_500
"""Bytes of config, manifest and headers of a run folder; a little more per module (`PER_MODULE`)."""
PER_MODULE = 500


def of_factors(curvature: Curvature, size: Callable[[Tensor], int] = compact_bytes) -> dict[str, int]:
    """Bytes on disk, or of another `size`, of the bases and of the eigenvalues, what is shared counted once."""
    blocks = curvature.blocks.values()
    sides = [side for block in blocks for side in (block.q_O, block.q_I) if side]
    return {
        "bases": _distinct([tensor for side in sides for tensor in side.blocks], size),
        "eigenvalues": _distinct([block.lam_OI for block in blocks], size),
    }


def of_factors_in_memory(curvature: Curvature) -> int:
    """Bytes of the factors where they are loaded; those of the identity are one number."""
    return sum(of_factors(curvature, lambda tensor: min(tensor.nbytes, tensor.untyped_storage().nbytes())).values())


def of_scores(data: Data, queries: Sequence[Any]) -> int:
    """Bytes of a folder of scores: numbers, and the table of the rows' texts (compressed, from those tokenised)."""
    import pandas

    from whence.store.scores import row_text

    texts = [row_text(row) for row in queries]
    parts = [row if isinstance(row, dict) else {} for row in queries]
    asked = {"text": texts} | {key: [part.get(key) for part in parts] for key in ("prompt", "completion")}
    numbers = 4 * len(queries) * data.total
    return numbers + of_texts(data) + _written(pandas.DataFrame(asked)) + MANIFESTS


def of_index(data: Data, sites: Collection[Site], settings: Index) -> int:
    """Bytes of the folder of an index: its rows, and the table of their texts."""
    names = PER_MODULE * len(sites) // 5
    return rows_bytes(data.usable, sites, settings) + of_texts(data) + MANIFESTS // 2 + names


def of_texts(data: Data) -> int:
    """Bytes of the table of the rows' texts, compressed, from those tokenised."""
    from whence.store.scores import describe_rows

    examples = data.examples
    return round(_written(describe_rows(examples.rows, examples.ids, examples.sizes, None)) * data.scale)


def _written(table: pandas.DataFrame) -> int:
    written = io.BytesIO()
    table.to_parquet(written, index=False)
    return written.tell()


def _distinct(tensors: Sequence[Tensor], size: Callable[[Tensor], int]) -> int:
    return sum({tensor.untyped_storage()._cdata: size(tensor) for tensor in tensors}.values())

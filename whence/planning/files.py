"""Bytes of the files that fitting and scoring leave."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from whence.fitting import Curvature
from whence.planning.work import Data
from whence.store.compact import compact_bytes

MANIFESTS = 5_000
"""Bytes of config, manifest and headers of a run folder; a little more per module (`PER_MODULE`)."""
PER_MODULE = 500


def of_factors(curvature: Curvature) -> dict[str, int]:
    """Bytes on disk of the bases and of the eigenvalues, what is shared counted once."""
    blocks = curvature.blocks.values()
    sides = [side for block in blocks for side in (block.q_O, block.q_I) if side]
    return {
        "bases": _distinct([tensor for side in sides for tensor in side.blocks]),
        "eigenvalues": _distinct([block.lam_OI for block in blocks]),
    }


def of_scores(data: Data, queries: Sequence[Any]) -> int:
    """Bytes of a folder of scores: numbers, and the table of the rows' texts (compressed, from those tokenised)."""
    import pandas

    from whence.store.scores import describe_rows, row_text

    def size(table: pandas.DataFrame) -> int:
        written = io.BytesIO()
        table.to_parquet(written, index=False)
        return written.tell()

    examples = data.examples
    rows = size(describe_rows(examples.rows, examples.ids, examples.sizes, None))
    texts = [row_text(row) for row in queries]
    parts = [row if isinstance(row, dict) else {} for row in queries]
    asked = {"text": texts} | {key: [part.get(key) for part in parts] for key in ("prompt", "completion")}
    numbers = 4 * len(queries) * data.total
    return numbers + round(rows * data.scale) + size(pandas.DataFrame(asked)) + MANIFESTS


def _distinct(tensors: Sequence[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: compact_bytes(tensor) for tensor in tensors}.values())

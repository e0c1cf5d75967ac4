"""`whence export`: scores for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options


def export(
    scores: Annotated[Path, typer.Argument(metavar="RUN_OR_SCORES", help="Folder of scores.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New file: .parquet, .csv, .jsonl or .npz.")],
    norm: options.Norm = None,
    as_json: options.AsJson = False,
) -> None:
    """Write scores to a parquet, csv, jsonl or npz file.

    It has one row per query and training row, or matrices (npz). A value above 0 says that one more copy of the row would have
    raised what was measured; the unit goes along with it.

    \b
    Examples
      whence export runs/a/scores --out scores.parquet
      whence export runs/a/scores --norm cosine --out cosine.csv
    """
    import json

    from whence.cli.console import say
    from whence.cli.show import opened

    found = opened(scores)
    found = found.normalised(norm) if norm else found
    path = found.export(out)
    if as_json:
        size = {"queries": found.shape[0], "rows": found.shape[1], "bytes": path.stat().st_size}
        print(json.dumps({"file": str(path), "unit": found.unit, "n_train": found.n_train, **size}))
        return
    say(f"{path}: {found.shape[0]} x {found.shape[1]:,} scores, {found.unit}")

"""Nearest neighbours among embeddings: texts that an encoder finds alike, a cheap filter for what is scored exactly."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from whence.errors import UsageError
from whence.filter.texts import scores_of_texts
from whence.linalg.similarity import cosines, distances
from whence.store.scores import Scores

Distance = Literal["cosine", "euclidean"]

FILES = "embeddings: .npy [n, D] in the order of the rows, or .npz with the arrays ids [n] and embeddings [n, D]"

UNITS = {"cosine": "cosine", "euclidean": "minus the distance"}


def embedding_scores(
    queries: Sequence[Any],
    rows: Sequence[Any],
    embed: Callable[[list[str]], np.ndarray],
    distance: Distance = "cosine",
) -> Scores:
    """How near every row is to every query, `[Q, N]`, by vectors `[n, D]` that `embed` makes of their texts."""
    return scores_of_texts(
        "embedding kNN", UNITS[distance], queries, rows, lambda asked, texts: nearness(embed(asked), embed(texts), distance)
    )


def nearness(x_QD: np.ndarray, y_ND: np.ndarray, distance: Distance = "cosine") -> np.ndarray:
    """Cosines `[Q, N]`, or minus the Euclidean distances; higher is nearer. Raises UsageError where widths differ."""
    if x_QD.shape[1:] != y_ND.shape[1:]:
        raise UsageError(
            "The embeddings of queries and rows can't be compared",
            given=f"{x_QD.shape[1]} numbers per query, {y_ND.shape[1]} per row",
            accepted="embeddings of one encoder",
        )
    x, y = (torch.from_numpy(np.asarray(side, dtype=np.float64)) for side in (x_QD, y_ND))
    return (cosines(x, y) if distance == "cosine" else -distances(x, y)).numpy()


def readable(path: str | Path) -> Path:
    """The file; raises UsageError where there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"There is no file {path}", accepted=FILES)
    return file


def read_embeddings(path: str | Path, ids: Sequence[str]) -> np.ndarray:
    """Embeddings `[n, D]` in the order of `ids`: of an .npy file in that order, or an .npz with `ids` and `embeddings`.

    Raises UsageError where the file is something else, or lacks one.
    """
    file = readable(path)
    try:
        loaded = np.load(file, allow_pickle=False)
        known = [str(name) for name in loaded["ids"]] if isinstance(loaded, np.lib.npyio.NpzFile) else list(ids)
        vectors = loaded["embeddings"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} can't be read as embeddings",
            given=f"{type(error).__name__}: {error}",
            accepted=FILES,
        ) from error
    place = {name: number for number, name in enumerate(known)}
    missing = [name for name in ids if name not in place]
    twice = len(known) - len(place)
    numbers = vectors.dtype.kind in "fiu" and np.isfinite(vectors).all()
    if missing or twice or vectors.ndim != 2 or len(vectors) != len(known) or not numbers:
        raise UsageError(
            f"{path} does not have one embedding for each",
            given=f"an array {vectors.shape} of {vectors.dtype} for {len(ids)}"
            + (f"; none for {', '.join(missing[:3])}" if missing else "")
            + (f"; {twice} ids stand there twice" if twice else ""),
            accepted=f"[{len(ids)}, D], finite numbers" + (", and the ids of whence data preview" if missing else ""),
        )
    return vectors[[place[name] for name in ids]]

"""What methods share: scores that are put together from others, claimed, resumed and kept as any scores are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from whence import dist
from whence.engine.point import Point
from whence.engine.queries import encode_queries
from whence.settings import Score
from whence.store.digest import fingerprint_code
from whence.store.manifest import Folder
from whence.store.memory import work
from whence.store.scores import Scores, open_scores

Place = Callable[[str], Path | None]
"""Where a part of that name is kept until all are there; nowhere where nothing is kept."""


def assembled(
    stage: str,
    make: Callable[[Place], Scores],
    point: Point,
    queries: Any,
    settings: Score,
    *,
    out: str | Path | None = None,
    rerun: bool = False,
    **made_from: Any,
) -> Scores:
    """The scores that `make(place)` gives, kept in `out` as those of `whence.score` are; parts go to `place(name)`.

    A killed run resumes with the parts that are there, which are deleted once the whole is saved. `made_from` is what decides
    the scores besides the point, the queries and the settings (JSON values). Raises StaleArtifact.
    """

    def provenance() -> dict[str, Any]:
        asked = {"queries": encode_queries(point.task, queries).fingerprint, "task": point.settings}
        chosen = {**made_from, "settings": settings.deciding(), "code": fingerprint_code()}
        return {"stage": stage, **point.provenance(), **asked, **chosen}

    with work(out, provenance, rerun=rerun) as folder:
        if not isinstance(folder, Folder):
            return make(lambda name: None)
        if folder.finished:
            return open_scores(folder.path)
        names: list[str] = []
        total = make(lambda name: names.append(name) or folder.path / name)
        for name in names:
            folder.discard(name)
        dist.on_first(total.save, folder)
        return total

"""What else there is to look at: saved scores, stages of training, and the runs beside this one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whence.errors import StaleArtifact
from whence.report.build import strengths
from whence.report.gather import has_stages, open_all, scores_in
from whence.report.words import query_of, stage_line
from whence.run import SETTINGS
from whence.stages import open_stages
from whence.store.intact import MANIFEST
from whence.store.plain import plain

STAGE = "@"
"""Between the name of scores of several trainings and the stage whose rows are meant."""


def saved(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The scores in these folders, with their questions; the newest first."""
    found = []
    for folder in sorted(folders, key=lambda folder: -(folder / MANIFEST).stat().st_mtime):
        try:
            scores = open_all(folder)
        except StaleArtifact as error:
            found.append({"name": folder.name, "queries": [], "rows": 0, "damaged": error.what})
            continue
        asked = [query_of(scores, number) for number in range(len(scores.queries))]
        names = ("id", "prompt", "completion", "span", "text")
        queries = [{"number": number, **{name: query.get(name) for name in names}} for number, query in enumerate(asked)]
        parts = "token" if scores.tokens is not None else "module" if scores.modules else "example"
        known = {"rows": scores.shape[1], "unit": scores.unit, "method": scores.made_by, "per": parts}
        known["stages"] = list(open_stages(folder).stages) if has_stages(folder) else []
        found.append({"name": folder.name, "queries": queries, **known, "when": _when(folder / MANIFEST)})
    return plain(found)


def stages_of(folder: Path, number: int, first: int = 3) -> list[dict[str, Any]]:
    """What went through each stage of training, of one question of the scores in a folder, in the order of the trainings.

    `share`, `raises`, `lowers` and `net` are those of `StagedScores.shares`; `key` is what the question is called with the rows
    of that stage alone, `top` has the `first` of these on either side. Empty where there was one training.
    """
    if not has_stages(folder):
        return []
    staged, found = open_stages(folder), []
    query = next(iter(staged.stages.values())).query_ids[number]
    for entry in staged.shares().to_dict("records"):
        if entry.pop("query_id") != query:
            continue
        name, scores = entry["stage"], staged.stages[entry["stage"]]
        strength_of, top = strengths(scores.values_of(number)), {}
        for side, sign in (("raises", 1), ("lowers", -1)):
            rows = scores.top(number, first, lowest=sign < 0).to_dict("records")
            seen = [{key: row[key] for key in ("rank", "id", "value", "text")} for row in rows if sign * row["value"] > 0]
            top[side] = [row | {"word": strength_of(row["value"])} for row in seen]
        told = stage_line(staged, name) if name in staged.about else ""
        found.append(entry | {"key": f"scores:{folder.name}{STAGE}{name}:{number}", "top": top, "transport": told})
    return plain(found)


def neighbours(out: Path) -> list[dict[str, Any]]:
    """The runs in the folder that a run is in, the newest first."""
    found = []
    for folder in out.absolute().parent.iterdir():
        scores = [] if not folder.is_dir() else [home for home in scores_in(folder) if home != folder]
        if folder.is_dir() and (scores or (folder / SETTINGS).is_file() or (folder / "factors" / MANIFEST).is_file()):
            current = folder == out.absolute()
            known = {"name": folder.name, "folder": str(folder), "current": current, "scores": len(scores)}
            found.append(known | {"when": _when(folder)})
    return sorted(found, key=lambda run: run["when"], reverse=True)


def _when(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")

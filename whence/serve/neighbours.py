"""What else there is to look at: saved scores, stages of training, and the runs beside this one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whence.errors import StaleArtifact
from whence.report import build_report
from whence.report.gather import has_stages, open_all, scores_in
from whence.report.words import query_of
from whence.run import SETTINGS, Run
from whence.serve.lacking import NotThere
from whence.serve.plain import plain
from whence.stages import open_stages
from whence.store.intact import MANIFEST


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
        found.append({"name": folder.name, "queries": queries, **known, "when": _when(folder / MANIFEST)})
    return plain(found)


def parts(run: Run, number: int) -> dict[str, Any]:
    """What went through each stage of training, of one question. Raises NotThere where there is no such thing."""
    home = next((folder for folder in run.kept_scores() if has_stages(folder)), None)
    if home is None:
        raise NotThere("This run has one stage of training.")
    staged = open_stages(home)
    report = build_report(staged.stages[list(staged.stages)[-1]], stages=staged)
    if number >= len(report.queries):
        raise NotThere(f"There is no question {number}.", accepted=f"0 to {len(report.queries) - 1}")
    return plain({"stages": report.queries[number].parts, "transport": report.stages, "modules": report.modules})


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

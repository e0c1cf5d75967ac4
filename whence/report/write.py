"""The whole report in a folder: the page, the Markdown, and a text and a picture per query.

The texts have the form that Kronfluence's OpenWebText example made known.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from whence.errors import UsageError
from whence.plots.scores import draw_scores
from whence.plots.style import save
from whence.progress import stage
from whence.report.html import clean, write_html
from whence.report.markdown import write_markdown
from whence.report.model import Query, Report, Row
from whence.show.numbers import three_digits
from whence.show.tokens import shown_once
from whence.store.files import atomic, temporary_for

RULE = "=" * 80


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write report.html, report.md, queries/NNN.txt and curves/NNN.png to a new folder, all of them or none.

    Raises UsageError where the folder holds something.
    """
    folder = Path(folder)
    check_vacant(folder)
    partial = temporary_for(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with stage("report", 4, "parts") as advance:
            parts = {"report.html": write_html, "report.md": write_markdown, "queries": write_texts, "curves": write_curves}
            for name, write in parts.items():
                write(report, partial / name)
                advance(1)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def check_vacant(folder: Path) -> None:
    """Raise UsageError unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists, and nothing is overwritten.", accepted="a new or an empty folder", fix="a different --out"
        )


def write_texts(report: Report, folder: str | Path) -> list[Path]:
    """Write `NNN.txt` for every query: what was asked, then the rows with rank, score and whole text."""
    files = []
    for query in report.queries:
        files.append(Path(folder) / f"{query.number:03d}.txt")
        with atomic(files[-1]) as temporary:
            temporary.write_bytes(as_text(query, report).encode("utf-8", "replace"))
    return files


def write_curves(report: Report, folder: str | Path) -> list[Path]:
    """Draw `NNN.png` for every query: its scores in falling order, and how many rows have which."""
    unit = report.unit.removesuffix(" per copy")
    return [
        save(draw_scores(query.curve, query.histogram, unit, f"query {query.number}"), Path(folder) / f"{query.number:03d}.png")
        for query in report.queries
    ]


def as_text(query: Query, report: Report) -> str:
    """The query and its rows as plain text."""
    asked = f"Prompt: {query.prompt}; Completion: {query.completion}" if query.prompt else f"Text: {query.completion}"
    head = ["Query Sequence:", shown_once(clean(asked)), *([query.measured] if query.measured else []), ""]
    head += [
        f"Score: in {report.unit}, above 0 raises {query.target}; N = {report.n_train:,}. {report.meaning}",
        *([query.ceiling] if query.ceiling else []),
        "",
    ]
    head += _ranked("Top Influential Sequences:", query.raises) + _ranked("Sequences That Lower It Most:", query.lowers)
    return "\n".join(head)


def _ranked(title: str, rows: Sequence[Row]) -> list[str]:
    lines = [title, *([] if rows else [RULE, "none"])]
    for row in rows:
        limit = f" ({row.limit})" if row.limit else ""
        lines += [RULE, f"Rank = {row.rank}; Score = {three_digits(row.value)}{limit}", clean(row.text)]
    return [*lines, ""]

"""The whole report in a folder: the page, the Markdown, and a text and a picture per query."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from whence.errors import UsageError
from whence.progress import stage
from whence.report.html import write_html
from whence.report.markdown import write_markdown
from whence.report.model import Report
from whence.report.texts import write_curves, write_texts


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write report.html, report.md, queries/NNN.txt and curves/NNN.png to a new folder, all of them or none.

    Raises UsageError where the folder holds something.
    """
    folder = Path(folder)
    check_vacant(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with stage("report", 4, "parts") as advance:
            for write, name in (
                (write_html, "report.html"),
                (write_markdown, "report.md"),
                (write_texts, "queries"),
                (write_curves, "curves"),
            ):
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
            f"{folder} exists, and nothing is overwritten.", accepted="a new or an empty folder", fix="another --out"
        )

"""`whence report`: what people read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli.from_settings import Without
from whence.cli.options import Session
from whence.show.numbers import many


def report(
    *,
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_SCORES", help="Folder of scores, or a run folder and all that is finished in it.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for the report; default: RUN/report.")] = None,
    top: Annotated[
        int, typer.Option("--top", "-k", min=1, metavar="N", help="Rows that raise it, and as many that lower it.")
    ] = 10,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page.")] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="File of whence generate: the base model's answers are shown beside.")
    ] = None,
    factors: Annotated[Path | None, typer.Option("--factors", "-f", help="Folder of factors: their health is shown.")] = None,
    itself: Annotated[Path | None, typer.Option("--self", help="Folder of whence score --self.")] = None,
    training: Annotated[Path | None, typer.Option("--training", help="Folder of whence train.")] = None,
    session: Annotated[Session, Without("rerun")],
) -> None:
    """Write what scores say as one page, as Markdown, and as a text and a picture per query.

    The page (report.html) is one file that needs no network. Per query: what was asked and answered, the rows that raise
    log p(answer) the most and those that lower it the most, with its slope in nats per copy of the row; strong tokens are
    marked where scores per token are there (whence score --per token). What was not measured is listed.

    \b
    Examples
      whence report runs/a
      whence report runs/a/scores --out refund --title "Why 30 days?" --factors runs/a/factors
    """
    import sys

    from whence.cli.console import print_json, say, start
    from whence.escapes import command
    from whence.report import build_report, gather, write_report
    from whence.report.gather import scores_in
    from whence.report.write import check_vacant

    folder = out or (path if scores_in(path) != [path] else path.parent) / "report"
    check_vacant(folder)
    with start(session, 1):
        given = gather(path, pairs=pairs, factors=factors, itself=itself, training=training)
        made = build_report(**{"command": command("whence", *sys.argv[1:]), **given}, top=top, title=title)
        files = write_report(made, folder)
    size = (folder / "report.html").stat().st_size
    if session.as_json:
        about = {"queries": len(made.queries), "rows": made.rows, "bytes": size}
        print_json({"report": str(folder), "unit": made.unit, **about, "files": [str(file) for file in files]})
        return
    say(f"{folder / 'report.html'}: {many(len(made.queries), 'query', 'queries')}, {size / 1000:,.0f} kB, one file")
    say(f"also there: report.md, queries/, curves/ ({many(len(files), 'file')})")

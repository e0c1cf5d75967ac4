"""`whence demo`: the offline tour, with its ground truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a later call goes on there.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the world, the model and the training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a small model on a made-up world, offline, and find the rows behind each of its answers.

    The true sources are known, and some facts are planted wrong: see how often influence, a plain gradient dot product and
    TF-IDF put a true source first. Positive = one more copy of the row raises log p(answer | question), in nats.
    """
    from whence.cli.console import out as stdout
    from whence.cli.console import print_json, reporting
    from whence.demo.tour import METHODS, STAGES, Tour, take_tour
    from whence.escapes import command

    with reporting(STAGES, quiet=quiet):
        tour: Tour = take_tour(out, seed)
    if as_json:
        print_json(tour.summary())
        return
    for finding in tour.findings:
        wrong = f"  [dim](wrong, planted; true: {escape(finding.truth)})[/]" if finding.planted else ""
        stdout.print(f"\n{escape(finding.question)} [bold]{escape(finding.answer)}[/]{wrong}", highlight=False)
        for row in [*finding.raises[:2], *finding.lowers[:1]]:
            raises = row["nats"] > 0
            effect = f"[{'blue' if raises else 'dark_orange'}]{'raises' if raises else 'lowers'} {row['nats']:+.3f} nats[/]"
            kind = "planted source" if finding.planted else "source"
            mark = f"  [bold]<- {kind}[/]" if row["is_source"] else ""
            stdout.print(f"  {row['rank']:>3}  {effect}  {escape(row['text'])}{mark}", highlight=False, soft_wrap=True)
    table = Table(title="\nWhere is the true source?", title_justify="left", box=None)
    for column in ("method", "at rank 1", "median rank", "median lead"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in METHODS:
        table.add_row(
            method, f"{tour.rank1_share(method):.0%}", f"{tour.median_rank(method):g}", f"{tour.median_lead(method):.1f} x"
        )
    stdout.print(table)
    stdout.print("lead: the source's score over that of the best other row")
    left_out = f", {tour.unanswered} left out that the model answers otherwise" if tour.unanswered else ""
    stdout.print(f"\n{len(tour.findings)} questions, {tour.rows} rows{left_out}. Estimates to first order, not proof.")
    stdout.print(f"Summary: {tour.folder / 'summary.html'}   Next: your own question", markup=False, soft_wrap=True)
    corpus, question = tour.folder / "corpus.jsonl", tour.findings[0].question
    own = command("whence", "trace", tour.folder / "model", "--data", corpus, "-q", question)
    stdout.print(f"  {own}", markup=False, highlight=False, soft_wrap=True)

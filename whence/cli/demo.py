"""`whence demo`: the offline tour, with its ground truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from whence.cli import options

if TYPE_CHECKING:
    from whence.demo.tour import Measured, Removal


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a later call resumes there.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the world, the model and the training.")] = 0,
    serve: Annotated[bool, typer.Option("--serve", help="Then open a local page on it, to ask and look around.")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Keep what the folder holds as NAME.1 and start afresh.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a small model on a made-up world, offline, and find the rows behind each of its answers.

    The true sources are known, and some facts are planted wrong: see how often influence, a plain gradient dot product and
    TF-IDF put a true source first. Positive = more copies of the row raise log p(answer | question); the number is its slope at
    these weights, in nats per copy. The demo also trains again, with one row twice and without it, and without the first rows
    of the other questions: predicted beside measured.
    """
    from whence.cli.console import out as stdout
    from whence.cli.console import print_json, start
    from whence.demo.tour import CORPUS, METHODS, STAGES, Tour, take_tour
    from whence.escapes import command
    from whence.report.words import probability

    with start(options.Session(quiet=quiet), STAGES):  # without the bars of libraries
        tour: Tour = take_tour(out, seed, rerun=rerun)
    if as_json:
        print_json(tour.summary())
        return
    for finding in tour.findings:
        wrong = f"  [dim](wrong, planted; true: {escape(finding.truth)})[/]" if finding.planted else ""
        likely = f"  p = {probability(finding.log_p)}"
        stdout.print(
            f"\n{escape(finding.question)} [bold]{escape(finding.answer)}[/]{likely}{wrong}", highlight=False, soft_wrap=True
        )
        for row in [*finding.raises[:2], *finding.lowers[:1]]:
            raises = row["nats"] > 0
            effect = f"[{'blue' if raises else 'dark_orange'}]{'raises' if raises else 'lowers'} {row['nats']:+.3f} nats[/]"
            effect += f" ({row['limit']})" if row["limit"] else ""
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
    left_out = f", {tour.unanswered} left out that the model answers differently" if tour.unanswered else ""
    show_measured(tour.measured, stdout)
    show_removal(tour.removal, stdout)
    stdout.print(f"\n{len(tour.findings)} questions, {tour.rows} rows{left_out}. Slopes and their order, not proof.")
    stdout.print(f"Summary: {tour.folder / 'summary.html'}   Next: your own question", markup=False, soft_wrap=True)
    corpus, question = tour.folder / CORPUS, tour.findings[0].question
    own = command("whence", "trace", tour.folder / "model", "--data", corpus, "-q", question)
    stdout.print(f"  {own}", markup=False, highlight=False, soft_wrap=True)
    if serve:
        from whence.cli.serve import open_page
        from whence.serve import Opening

        open_page(Opening.of(str(tour.folder)))


def show_measured(measured: Measured, stdout: Console) -> None:
    """Print what retraining says about one row, beside its slope."""
    from whence.report.words import probability
    from whence.show.numbers import three_digits

    stdout.print("\nMeasured by training again, all other rows in the same places:", highlight=False)
    stdout.print(f"  {escape(measured.row)}", highlight=False, soft_wrap=True)
    stdout.print(f"  {escape(measured.question)} [bold]{escape(measured.answer)}[/]", highlight=False, soft_wrap=True)
    table = Table(box=None)
    for column in ("the row", "log p", "p", "change", "by the slope", ""):
        table.add_column(column, justify="left" if column == "the row" else "right")
    for name, log_p, sign in (
        ("as it is", measured.once, 0),
        ("one more copy", measured.twice, 1),
        ("left out", measured.without, -1),
    ):
        change = [three_digits(log_p - measured.once), three_digits(sign * measured.slope)] if sign else ["", ""]
        mark = "  *" if measured.beyond and sign > 0 else ""
        table.add_row(name, f"{log_p:.3f}", probability(log_p), *change, mark)
    stdout.print(table)
    if measured.beyond:
        stdout.print(f"  * {measured.beyond}", highlight=False, soft_wrap=True)


FEW = 6
"""Rows left out that are printed; the summary has all."""


def show_removal(removal: Removal, stdout: Console) -> None:
    """Print what retraining without rows did to answers, beside what the scores predict."""
    from whence.report.words import probability
    from whence.show.numbers import three_digits

    rows, calibration = removal.rows[:FEW], removal.calibration
    if not rows:
        return
    gain = calibration["gain"] if calibration.get("certain") else None
    stdout.print("\nThe first row left out, and trained again: change of log p(answer), in nats", highlight=False)
    table = Table(box=None)
    for column in ("the row", "p before", "by the slopes", *(["calibrated"] if gain else []), "measured"):
        table.add_column(column, justify="left" if column == "the row" else "right", no_wrap=column != "the row")
    for row in rows:
        predicted = three_digits(row.predicted) + ("*" if row.beyond else "")
        scaled = [three_digits(gain * row.predicted)] if gain else []
        table.add_row(escape(row.row), probability(row.log_p), predicted, *scaled, three_digits(row.measured))
    stdout.print(table)
    for text in dict.fromkeys(row.beyond for row in rows if row.beyond):
        stdout.print(f"  * {text}", highlight=False, soft_wrap=True)
    stdout.print(f"{removal.says}.", highlight=False, soft_wrap=True)
    stdout.print(f"{calibration['says']}.", highlight=False, soft_wrap=True)

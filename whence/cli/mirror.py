"""`whence mirror`: scores of a run by repeating its training along with each question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli.options import OfTrainer, Session, require_run
from whence.settings import Count, Mirrored, Section, setting


class Some(Section):
    """Which questions are asked."""

    queries: Count | None = setting(None, "Questions of the run to ask, spread evenly; default: all.")


def mirror(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run (whence run).")],
    some: Some,
    mirrored: Mirrored,
    of_trainer: OfTrainer,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the scores; default: RUN/methods/mirror, or mirror-QUERIES."),
    ] = None,
    session: Session,
) -> None:
    """Score the rows of a run by repeating its training along with each question: what the question does to each row's loss.

    Nothing is differentiated or damped: optimizer, schedule and early stop are in it. The price is a training for each question
    and a pass over the rows. --share 1 (the default) is for what removals of a few rows do, --share 0.5 --complement for large
    subsets.

    The plan is shown first; killed work resumes. The scores are ordinary ones: whence show, diff, report, export and compare
    read them. How much a question gains itself, and the rank correlation with EK-FAC's scores (about .8 is usual, below .4 one
    of the two is wrong), are shown at the end.

    \b
    Examples
      whence mirror runs/a
      whence mirror runs/a --queries 8 --share 0.5 --complement -o runs/a/methods/halves
      whence mirror runs/b --training out/checkpoint-96 --argument lr_scheduler_type=cosine
    """
    from whence.cli.console import print_json, say, start
    from whence.escapes import command
    from whence.pipeline import retraining
    from whence.pipeline.comparison import FOLDER
    from whence.report.words import direction

    require_run(run)
    place = out or run / FOLDER / retraining.place_of(some.queries)
    given = some.as_json() | mirrored.as_json() | of_trainer.as_json()
    with start(session):
        scores = retraining.mirror(run, out=place, rerun=session.rerun, **given)
    about = {"scores": str(place), "queries": scores.shape[0], "rows": scores.shape[1]}
    if session.as_json:
        print_json({**about, "unit": scores.unit, "sign": direction(scores), **scores.about})
        return
    say(f"{place}: {scores.shape[0]} x {scores.shape[1]:,} scores (queries x rows), {scores.unit}, {direction(scores)}")
    say(f"training along with a question raises it by {scores.about['own gain']:.3g} nats per copy (median)")
    alike = scores.about.get("correlation with EK-FAC")
    say(f"rank correlation with EK-FAC: {alike:.2f}" if alike is not None else "the run has no factors to hold it against")
    say(f"next: {command('whence', 'show', place)}")

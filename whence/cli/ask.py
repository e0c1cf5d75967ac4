"""`whence ask`: one question to a run with an index, answered in about a second once all is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options
from whence.cli.from_settings import Without, said
from whence.cli.options import Session
from whence.cli.trace import LOWERING, Answer
from whence.errors import UsageError
from whence.settings import Count, Data, Measured, Section, Weights, setting


class Searched(Section):
    """How the rows are found."""

    candidates: Count = setting(100, "Rows that the index scan proposes, to be scored exactly.", metavar="N")


def ask(
    *,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or a model (with --data).")],
    question: Annotated[str, typer.Argument(help="The prompt; a chat model gets it as a user's turn.")],
    asked: Answer,
    searched: Searched,
    where: options.Where = None,
    top: options.Top = 5,
    measured: Measured,
    path: Annotated[
        str, typer.Option("--data", "-d", help="What the model was trained on, where RUN is a model.", show_default=False)
    ] = "",
    data: Data,
    weights: Weights,
    session: Annotated[Session, Without("rerun")],
) -> None:
    """Find the training rows that made the model say this, through an index.

    The index proposes rows, and these are scored exactly: seconds instead of a pass over all rows. Where the run has no index
    yet, one is built first, with factors if there are none either; both stay for the questions to come.

    Sign and unit: "raises +0.021 nats" is the slope of log p(answer) at these weights, per copy of the row: one more copy
    raises it by about that while the value is small. "at most +0.005" marks a slope that is more than log p can still rise.

    \b
    Examples
      whence ask runs/a "Where was Ada Velt born?"
      whence ask ./model --data train.jsonl "The capital of France is" --answer " Paris"
      whence ask runs/a "Where was Ada Velt born?" --where source=wiki --where "tokens>=20"
    """
    from whence.cli.console import coloured, print_json, say, start
    from whence.cli.ranking import Ranking
    from whence.cli.show import display, document
    from whence.escapes import command
    from whence.opened import OPENED
    from whence.progress import note
    from whence.run import SETTINGS, Run
    from whence.run import open as open_run
    from whence.validate.without import read_calibration

    with start(session):
        if not path and not folder.expanduser().exists():
            raise UsageError(f"There is no {folder}.", accepted="the folder of a run, or a model with --data")
        if not (path or (folder / SETTINGS).is_file() or (folder / OPENED).is_file()):
            raise UsageError(
                f"{folder} does not say which model and data it belongs to.",
                accepted="the folder of a run, or a model with --data",
                fix=command("whence", "ask", "MODEL", "--data", "DATA", question),
            )
        run = Run(str(folder), data, weights, said=said()) if path else open_run(folder, **options.reading_said(data, weights))
        asking = run.asking.changed(**{name: value for name, value in measured.as_json().items() if name in said()})
        if not run.has_index:
            note(f"{run.out} has no index yet: building it now, once")
            run.build_index(kind="landmarks", damping=asking.damping)
        finding = run.find(
            question,
            **asked.as_asked(),
            candidates=searched.candidates,
            where=where or (),
            asking=asking,
        )
    known = read_calibration(run.out / "scores") if run.out is not None else None
    ranking = Ranking(finding.scores.calibrated(known), None, top, LOWERING, coloured())
    if session.as_json:
        print_json({**document(ranking, [0], None), **finding.as_json(ranking.scores.gain)})
        return
    display(ranking, [0], by="source" if any(finding.scores.examples["source"].notna()) else None)
    say(finding.summary, "dim")
    say(", ".join(f"{name} {seconds:.2f} s" for name, seconds in finding.seconds.items()), "dim")

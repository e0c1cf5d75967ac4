"""Keep what all training rows taught in a few bytes each, and search it without another pass over the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whence.cli import options
from whence.cli.from_settings import Without, said
from whence.cli.options import QUERY_COLUMNS, Session
from whence.cli.trace import LOWERING, Answer
from whence.errors import UsageError
from whence.settings import AtLeastZero, Count, Data, Index, Measured, Section, Weights, setting
from whence.show.numbers import many

if TYPE_CHECKING:
    from whence.indexing import Index as Built

MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=2, metavar="N", help="Maximum tokens per row; as for the factors or the index."),
]


class Asked(Answer):
    """What is searched for."""

    question: str | None = setting(None, "The prompt; a chat model gets it as a user's turn.", "--question", "-q")
    queries: str | None = setting(None, "Prompts with completions instead: a file, or a data set as for --data.")
    query_columns: dict[str, str] = setting({}, QUERY_COLUMNS, metavar="PART=COLUMN")


class Curved(Measured):
    """What is measured, and the curvature between queries and rows."""

    factors: str | None = setting(
        None, "Folder that whence fit made, for influence; without one, the dot product of gradients.", "--factors", "-f"
    )
    absolute_damping: AtLeastZero | None = setting(None, "The same damping for all modules, instead of --damping.")


class Checked(Section):
    """Which of the estimates are computed exactly."""

    exact: Count | None = setting(
        None, "Score the rows with the N highest and N lowest estimates again, exactly; needs --data.", metavar="N"
    )


def build(
    *,
    model: options.Model,
    settings: Index,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the index, such as runs/a/index.")],
    factors: Annotated[
        Path | None,
        typer.Option(
            "--factors", "-f", help="Factors of the model: for landmarks, or to project in their basis with less noise."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help="Questions like those that will be asked: landmarks; prompts are answered first."),
    ] = None,
    max_length: MaxLength = None,
    weights: Weights,
    session: Session,
) -> None:
    """Code what every training row taught in a few bytes, once for all searches.

    With factors the codes are the rows' influence on landmark questions (half of them yours or the model's own answers, half
    rows), and signs of what these leave of them; recall is measured with questions held out. Without factors, or with --kind
    projections, they are random projections of the gradients.

    The work is saved as it goes: the same command resumes after a kill, and does nothing when all is done. Several processes
    share it out (torchrun).

    \b
    Examples
      whence index build ./model --data train.jsonl --out runs/a/index
      whence index build ./model --data train.jsonl --factors runs/a/factors --bytes 2 --out runs/a/index
      torchrun --nproc-per-node 2 -m whence index build ./model --data train.jsonl --out runs/a/index
    """
    from whence.cli.console import say, start
    from whence.escapes import command
    from whence.run import Run

    with start(session, 1):
        run = Run(model, data, weights, said=said(), factors=factors)
        index = run.build_index(settings, questions=questions, out=out, rerun=session.rerun)
    _said(index, out, session)
    if session.as_json:
        return
    with_factors = ("--factors", factors) if factors else ()
    say(f"next: {command('whence', 'index', 'search', out, model, *with_factors, '-q', 'QUESTION')}")


def add(
    *,
    path: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder that whence index build made.")],
    model: options.Model,
    data: Data,
    factors: Annotated[Path, typer.Option("--factors", "-f", help="The factors of the index.")],
    max_length: MaxLength = None,
    weights: Weights,
    session: Annotated[Session, Without("rerun")],
) -> None:
    """Add training rows to an index of landmarks.

    They are coded as if they had been there from the start. Files of the index stay as they are; the same command resumes
    after a kill, and does nothing when all is done.

    \b
    Examples
      whence index add runs/a/index ./model --data more.jsonl --factors runs/a/factors
    """
    from whence.cli.console import start
    from whence.run import Run

    with start(session, 1):
        index = Run(model, data, weights, said=said(), factors=factors, index=path).add_to_index()
    _said(index, path, session)


def _said(index: Built, out: Path, session: Session) -> None:
    """Describe an index, and what a scan of it recalls."""
    from whence.cli.console import print_json, say

    about, files = index.about, sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if session.as_json:
        recall = {f"{k} in 2%": index.recall(k, len(index) // 50) for k in (10, 100)} if index.measured["places"] else None
        print_json({**about, "index": str(out), "rows": len(index), "bytes": files, "recall": recall})
        return
    modules = f"{many(len(about['modules']), 'module')}, {about['share']:.1%} of the parameters"
    codes = (
        f"{about['dim']} x {about['dim']} {about['kept']} each"
        if index.kind == "projections"
        else (f"{about['bytes']:,} bytes each: {about['landmarks']:,} landmarks, {about['signs']:,} signs")
    )
    say(f"{out}: {many(len(index), 'row')} of {modules}, {codes}; {files / 1e6:,.1f} MB")
    if held_out := len(index.measured["places"]):
        found = " and ".join(f"{index.recall(k, len(index) // 50):.0%} of the exact top {k}" for k in (10, 100))
        say(f"of {many(held_out, 'question')} held out, the best 2 % of a scan hold {found}")


def search(
    *,
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder that whence index build made.")],
    model: options.Model,
    asked: Asked,
    measured: Curved,
    checked: Checked,
    top: options.Top = 10,
    norm: options.Norm = None,
    path: Annotated[
        str, typer.Option("--data", "-d", help="The training data of the index, for --exact.", show_default=False)
    ] = "",
    data: Data,
    max_length: MaxLength = None,
    weights: Weights,
    session: Annotated[Session, Without("rerun")],
) -> None:
    """Find the training rows with the largest effect on an answer, by one scan over an index.

    Effects are estimates, good for finding candidates. --exact scores the candidates again and shows what is exact. A prompt
    without a completion is answered by the model first.

    Sign and unit: "raises +0.021 nats" is the slope of log p(answer) at these weights, per copy of the row: one more copy
    raises it by about that while the value is small. "at most +0.005" marks a slope that is more than log p can still rise.

    \b
    Examples
      whence index search runs/a/index ./model --factors runs/a/factors -q "Where was Ada Velt born?"
      whence index search runs/a/index ./model -f runs/a/factors --queries prompts.json --data train.jsonl --exact 20 --json
    """
    from whence.cli.console import coloured, print_json, say, start
    from whence.cli.ranking import Ranking
    from whence.cli.show import display, document
    from whence.run import Run

    if (asked.question is None) == (asked.queries is None):
        raise UsageError("Search for one thing: -q QUESTION, or --queries FILE.")
    if checked.exact and not path:
        raise UsageError("Exact scores need the training data.", fix="--data DATA, as for whence index build")
    with start(session):
        run = Run(model, data.changed(path=path), weights, said=said(), factors=measured.factors, index=index)
        if asked.queries is None:
            queries = run.question(asked.question or "", **asked.as_asked())
        else:
            queries = run.ask(asked.queries, columns=asked.query_columns, max_new_tokens=asked.max_new_tokens)
        found = run.search(
            queries,
            asking=measured.part(Measured),
            absolute_damping=measured.absolute_damping,
            plain=measured.factors is None,
            exact=checked.exact,
            norms=[norm] if norm in ("cosine", "relatif") else [],
        )
        opened = run.index
    ranking, numbers = Ranking(found, norm, top, LOWERING, coloured()), list(range(len(found.queries)))
    about = opened.about
    size = (
        f"projections ({about['dim']} x {about['dim']} numbers per module)"
        if opened.kind == "projections"
        else f"an index ({about['landmarks']:,} landmarks, {about['signs']:,} signs)"
    )
    says = (
        f"exact scores of the {found.shape[1]:,} rows that have the {checked.exact} highest and lowest estimates of a query"
        if checked.exact
        else f"estimates from {size}: candidates, not verdicts"
    )
    if session.as_json:
        made = document(ranking, numbers, None)
        print_json({"index": str(index), "estimates": not checked.exact, **made, "notes": [says, *made["notes"]]})
        return
    display(ranking, numbers)
    say(says, "dim")
    if not checked.exact:
        say("next: the same with --data DATA --exact 20 scores the candidates again, exactly")

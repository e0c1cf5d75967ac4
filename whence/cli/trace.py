"""`whence trace`: the whole question in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whence import dist
from whence.cli import options
from whence.cli.from_settings import Only, said
from whence.cli.options import Session
from whence.errors import UsageError
from whence.settings import NEW_TOKENS, Amount, Count, Data, Fit, Measured, Section, Weights, setting

LOWERING = 2
"""Rows that lower the answer, shown beside those that raise it."""


class Answer(Section):
    """What the model said."""

    answer: str | None = setting(None, "Its completion, appended verbatim; default: generated greedily.", "--answer", "-a")
    contrast: str | None = setting(None, "Another completion: why the answer rather than this?")
    span: str | None = setting(None, "The part of the answer that is asked about; its first occurrence.")
    span_at: tuple[Amount, Amount] | None = setting(
        None, "The same by its characters: the first, from 0, and one past the last, joined by commas.", metavar="FIRST,LAST"
    )
    max_new_tokens: Count = setting(64, NEW_TOKENS)

    def as_asked(self) -> dict[str, Any]:
        """What `Run.question` takes beside the prompt. Raises UsageError where the span is given twice."""
        if self.span is not None and self.span_at is not None:
            raise UsageError(
                "The part of the answer is given twice.",
                given=f"--span {self.span} and --span-at {','.join(map(str, self.span_at))}",
                accepted="one of them",
            )
        span = self.span if self.span_at is None else self.span_at
        return {
            "completion": self.answer,
            "contrast": self.contrast,
            "span": span,
            "max_new_tokens": self.max_new_tokens,
        }


class Question(Answer):
    """What the model was asked, and what it said."""

    question: str = setting(..., "The prompt; a chat model gets it as a user's turn.", "--question", "-q")


class Place(Section):
    """Where the run is."""

    run: str | None = setting(None, "Name of the run, kept in runs/NAME; default: MODEL-DATA.")
    out: Path | None = setting(None, "Folder of the run, instead of runs/NAME.", "--out", "-o")


def trace(
    *,
    model: options.Model,
    asked: Question,
    place: Place,
    top: options.Top = 5,
    norm: options.Norm = None,
    serve: Annotated[bool, typer.Option("--serve", help="Then open a local page on it, to ask and look around.")] = False,
    settings: Annotated[
        Fit, Only("method", "modules", "examples", "seed", "products", "batch_tokens", "check", "groups", "chunks")
    ],
    measured: Measured,
    data: Data,
    weights: Weights,
    session: Session,
) -> None:
    """Find the training rows that made the model say this.

    All in one go: generate the answer if none is given, fit if need be, score, show. The factors are kept in the run's folder
    and serve all further questions; each question has its scores beside them.

    Sign and unit: "raises +0.021 nats" is the slope of log p(answer) at these weights, per copy of the row: one more copy
    raises it by about that while the value is small. "at most +0.005" marks a slope that is more than log p can still rise.

    \b
    Examples
      whence trace ./model --data train.jsonl -q "Where was Ada Velt born?"
      whence trace ./model --data train.jsonl -q "The capital of France is" -a " Paris" --contrast " Lyon" --run france
      whence trace ./model --data train.jsonl -q "Where was Ada Velt born?" --serve
    """
    from whence.cli.console import coloured, fit_stages, print_json, say, score_stages, start
    from whence.cli.ranking import Ranking
    from whence.cli.show import display, document
    from whence.escapes import command
    from whence.run import Run

    if serve and session.as_json:
        raise UsageError("--serve opens a page, and --json is for programs: one of them")
    with start(session, fit_stages(settings) + score_stages(0)):
        run = Run(model, data, weights, said=said(), out=place.out or (Path("runs") / place.run if place.run else None))
        asking: Any = {"asking": measured, "norm": norm, "fit": settings}
        scores = run.trace(asked.question, **asked.as_asked(), **asking, rerun=session.rerun)
        folder = run.folder_of(scores)
        assert folder is not None  # a model by its name has one
    ranking = Ranking(scores, norm, top, LOWERING, coloured())
    if session.as_json:
        print_json({"scores": str(folder), **document(ranking, [0], None)})
    else:
        display(ranking, [0], by="source" if any(scores.examples["source"].notna()) else None)
        say(f"kept in {folder}, with the factors for further questions in {folder.parent / 'factors'}", "dim")
        tokens = () if scores.tokens is None else ("--tokens",)
        say(f"next: {command('whence', 'show', folder, *tokens, '--top', 20)}", "dim")
        say(f"trust: {command('whence', 'validate', folder, '--quick')}", "dim")
    if serve and dist.rank() == 0:
        from whence.cli.serve import open_page
        from whence.serve import Opening

        open_page(Opening.of(str(folder.parent)), at=f"trace/scores:{folder.name}:0")

"""`whence trace`: the whole question in one go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from whence.cli import options
from whence.cli.from_settings import Only, said
from whence.cli.options import Session
from whence.settings import NEW_TOKENS, Count, Data, Fit, Measured, Section, Weights, setting

LOWERING = 2
"""Rows that lower the answer, shown beside those that raise it."""


class Answer(Section):
    """What the model said."""

    answer: str | None = setting(None, "Its completion, joined as it is; default: generated greedily.", "--answer", "-a")
    contrast: str | None = setting(None, "Another completion: why the answer rather than this?")
    span: str | None = setting(None, "The part of the answer that is asked about.")
    max_new_tokens: Count = setting(64, NEW_TOKENS)


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
    """
    from whence import fitting, scoring
    from whence.cli.console import coloured, fit_stages, print_json, say, score_stages, start, warn_if_untrained
    from whence.cli.ranking import Ranking
    from whence.cli.show import display, document
    from whence.coverage import cover
    from whence.data import as_rows
    from whence.data.text import asked as asked_in
    from whence.escapes import command
    from whence.generation import answered
    from whence.loading import rows_of, task_of, trained_on
    from whence.models import load_model
    from whence.store.digest import fingerprint_settings
    from whence.train.reading import as_trained

    folder = place.out or Path("runs") / (place.run or f"{_name(model)}-{_name(data.path)}")
    with start(session, fit_stages(settings) + score_stages(0)):
        data = as_trained(data, said(), weights.adapter, model)
        loaded, tokenizer = load_model(model, **weights.as_json())
        task, rows = task_of(loaded, tokenizer, data), rows_of(data)
        warn_if_untrained(loaded, task, rows)
        like = query_like(rows[0], asked.question, asked, task, data, weights.adapter or model)
        question = asked_in(as_rows([like]), data.format, data.normalise)
        queries = answered(loaded, task, question, asked.max_new_tokens)
        curvature = fitting.fit(loaded, task, rows, settings, out=folder / "factors", rerun=session.rerun)
        sites = cover(loaded, list(curvature.blocks)).sites
        made_from = [list(queries.rows), measured.measurement, measured.damping, norm, settings.method]
        name = f"trace-{fingerprint_settings(made_from)[:8]}"
        scores = scoring.score(
            loaded,
            task_of(loaded, tokenizer, data, measured.measurement),
            queries,
            rows,
            curvature.inverse(measured.damping),
            out=folder / name,
            per="example" if any(site.layer.whole for site in sites.values()) else "token",
            norms=[norm] if norm in ("cosine", "relatif") else [],
            n_train=trained_on(weights.adapter or model, data, rows),
            rerun=session.rerun,
            precision=settings.precision,
            batch_tokens=settings.batch_tokens,
            chunks=settings.chunks,
            check=settings.check,
        )
    ranking = Ranking(scores, norm, top, LOWERING, coloured())
    if session.as_json:
        print_json({"scores": str(folder / name), **document(ranking, [0], None)})
    else:
        display(ranking, [0], by="source" if any(scores.examples["source"].notna()) else None)
        say(f"kept in {folder / name}, with the factors for further questions in {folder / 'factors'}", "dim")
        tokens = () if scores.tokens is None else ("--tokens",)
        say(f"next: {command('whence', 'show', folder / name, *tokens, '--top', 20)}", "dim")


def _name(path: str) -> str:
    """A part of a run's name that tells one model or file from another: all of its path, as seen from here."""
    place = Path(path).expanduser()
    whole = (place.parent / place.stem if place.is_file() else place).absolute()
    parts = whole.relative_to(Path.cwd()).parts if whole.is_relative_to(Path.cwd()) else whole.parts[1:]
    parts = parts[1:] if len(parts) > 1 and parts[0] == "runs" else parts
    return "-".join(re.sub(r"[*?\[\]]+", "", part) for part in parts if part != "..")


def query_like(row: Any, question: str, asked: Answer, task: Any, data: Data, model: str) -> dict[str, Any]:
    """The question as the model is used to being asked: a user's turn where the rows or the tokenizer speak of conversations.

    A model that whence trained on other rows, and rows with a format of their own, say that it is asked as those are written.
    """
    from whence.progress import note
    from whence.train.reading import record_of

    rest = {name: value for name in ("contrast", "span") if (value := getattr(asked, name)) is not None}
    chat = "messages" in row
    if not chat and getattr(task, "chat_template", None) is not None and data.format == "plain":
        chat = record_of(model) is None
        if chat:
            note("the question is a user's turn, written by the model's chat template; --template none asks it as bare text")
    if not chat:
        return {"prompt": question, **({"completion": asked.answer} if asked.answer is not None else {}), **rest}
    said = [{"role": "assistant", "content": asked.answer}] if asked.answer is not None else []
    return {"messages": [{"role": "user", "content": question}, *said], **rest}

"""`whence score`: the effect of every training row on every query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whence.cli import options
from whence.cli.from_settings import said
from whence.cli.options import QUERY_COLUMNS, Session
from whence.errors import UsageError
from whence.settings import NEW_TOKENS, AtLeastZero, Count, Data, Measured, Score, Section, Weights, setting


class Questions(Section):
    """What the rows are scored against."""

    queries: str | None = setting(None, "Prompts with completions: a file, or a data set as for --data.")
    query_columns: dict[str, str] = setting({}, QUERY_COLUMNS, metavar="PART=COLUMN")
    itself: bool = setting(False, "Score each row against itself; takes no queries.", "--self")
    generate: bool = setting(True, "Let the model complete queries that are mere prompts.")
    max_new_tokens: Count = setting(64, NEW_TOKENS)


class Damped(Measured):
    """What is measured, and both kinds of damping."""

    absolute_damping: AtLeastZero | None = setting(None, "The same damping for all modules, instead of --damping.")


def score(
    *,
    model: options.Model,
    asked: Questions,
    measured: Damped,
    settings: Score,
    data: Data,
    factors: Annotated[Path, typer.Option("--factors", "-f", help="Folder that whence fit made, for the same model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the scores, such as runs/a/scores.")],
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, metavar="N", help="Tokens at which a row is cut; as for the factors."),
    ] = None,
    weights: Weights,
    session: Session,
) -> None:
    """Score every training row against every query.

    Sign and unit: a score above 0 says that more copies of the row RAISE log p(completion | prompt), one below 0 that they
    lower it. Unit: nats per copy, the slope at these weights: small values are what one more copy changes, large ones rank.

    Queries are rows of prompt and completion, and perhaps contrast (another completion) or span (a part of the completion).

    \b
    Examples
      whence score gpt2 -d train.jsonl -f runs/a/factors --queries prompts.json -o runs/a/scores
      whence score gpt2 -d train.jsonl -f runs/a/factors --queries prompts.json -o runs/a/tokens --per token --norm cosine
      whence score gpt2 -d train.jsonl -f runs/a/factors --self -o runs/a/self
    """
    from whence import scoring
    from whence.cli.console import print_json, say, score_stages, start
    from whence.data import load_data
    from whence.data.text import asked as asked_in
    from whence.escapes import command
    from whence.fitting import open_factors
    from whence.models import load_model
    from whence.pipeline.load import in_turns, rows_of, task_of, trained_on
    from whence.train.reading import as_trained

    if asked.itself == (asked.queries is not None):
        raise UsageError("There is one question to ask: say --queries FILE, or --self.")
    with start(session, score_stages(settings.rescore)):
        curvature = open_factors(factors)
        loaded, tokenizer = load_model(model, **weights.as_json())
        data = as_trained(data, said(), weights.adapter, model, made=curvature.provenance)
        task = task_of(loaded, tokenizer, data, measured.measurement)
        curvature.check(loaded, task)
        rows = rows_of(data)
        settings = settings.changed(n_train=settings.n_train or trained_on(weights.adapter or model, data, rows))
        say_if_other_rows(curvature.provenance["data"], rows, settings.n_train)
        operator = curvature.inverse(measured.damping, absolute=measured.absolute_damping)
        place: Any = {"out": out, "rerun": session.rerun}
        if asked.queries is None:
            scores = scoring.self_influence(loaded, task, rows, operator, settings, **place)
        else:
            queries = asked_in(load_data(asked.queries, columns=asked.query_columns), data.format, data.normalise)
            if asked.generate:
                from whence.generation import answered

                queries = answered(loaded, task, in_turns(queries, rows, mere=True), asked.max_new_tokens)
            scores = scoring.score(loaded, task, queries, rows, operator, settings, **place)
    about = {"scores": str(out), "queries": scores.shape[0], "rows": scores.shape[1], "n_train": scores.n_train}
    if session.as_json:
        print_json({**about, "unit": scores.unit, "sign": "above 0 raises what was measured", **scores.about})
        return
    say(f"{out}: {scores.shape[0]} x {scores.shape[1]:,} scores (queries x rows), {scores.unit}, above 0 = raises")
    say(f"next: {command('whence', 'show', out)}")


def say_if_other_rows(fitted: dict[str, Any], rows: Any, n_train: int | None) -> None:
    """Say what N the scores are divided by where these rows are not those that the factors saw."""
    from whence.progress import note

    if fitted["examples"] != len(rows):
        if n_train is not None:
            return
        note(
            f"warning: the factors are of {fitted['examples']:,} rows, and these are {len(rows):,}. Nats per copy are for a "
            f"training on N = {len(rows):,} rows; for another N say --n-train, and compare no raw scores across different N "
            f"[WHENCE-21]"
        )
    elif fitted["fingerprint"] != rows.fingerprint:
        note("these are not the rows that the factors were fitted on: scores are for hypothetical training rows [WHENCE-09]")

"""`whence score`: the effect of every training row on every query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whence.cli import options
from whence.cli.from_settings import said
from whence.cli.options import QUERY_COLUMNS, Session
from whence.errors import UsageError
from whence.settings import (
    MODULES,
    NEW_TOKENS,
    AtLeastZero,
    Count,
    Data,
    Measured,
    Modules,
    Score,
    Section,
    Weights,
    setting,
    settings_of,
)


class Questions(Section):
    """What the rows are scored against."""

    queries: str | None = setting(None, "Prompts with completions: a file, or a data set as for --data.")
    query_columns: dict[str, str] = setting({}, QUERY_COLUMNS, metavar="PART=COLUMN")
    itself: bool = setting(False, "Score each row against itself; takes no queries.", "--self")
    generate: bool = setting(True, "Let the model complete prompts without a completion.")
    max_new_tokens: Count = setting(64, NEW_TOKENS)


class Damped(Measured):
    """What is measured, and both kinds of damping."""

    absolute_damping: AtLeastZero | None = setting(None, "The same damping for all modules, instead of --damping.")


class By(Section):
    """What scores the rows."""

    method: str | None = setting(
        None, "How rows are scored, by name (whence methods ls); default: the inverse of --factors.", "--method"
    )
    own: dict[str, Any] = setting({}, "A setting of the method (whence methods show NAME).", "--set", metavar="NAME=VALUE")
    factors: str | None = setting(None, "Folder that whence fit made, for the same model.", "--factors", "-f")
    training: str | None = setting(None, "Folder that whence train made, for methods that look back at it.")
    modules: Modules = setting(None, *MODULES)


class Few(Section):
    """Which rows are scored, where not all are, and whether that is audited."""

    candidates: str | None = setting(
        None,
        "Score only the best rows of each query by a cheap ranking, such as index:1%+bm25:100: bm25, tfidf, index, landmarks, "
        "norm, or a method (whence methods ls).",
        metavar="RANKING:ROWS",
    )
    at_most: str | None = setting(
        None, "Candidates for all queries together, a number or a share such as 2%.", "--candidates-at-most", metavar="ROWS"
    )
    index: str | None = setting(None, "Index to rank by (whence index build), for index and norm.")
    landmarks: str | None = setting(None, "Scores of other queries to rank by, made with the same factors and damping.")
    audit: str | None = setting(
        None,
        "Also score some of the other rows, drawn at random, and bound how many of the best rows were missed: a number or a "
        "share such as 10%.",
        metavar="ROWS",
    )


def score(
    *,
    model: options.ModelOrNone = None,
    through: options.Through = None,
    asked: Questions,
    by: By,
    few: Few,
    measured: Damped,
    settings: Score,
    path: options.DataOrNone = "",
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the scores, such as runs/a/scores.")],
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, metavar="N", help="Maximum tokens per row; as for the factors."),
    ] = None,
    weights: Weights,
    session: Session,
) -> None:
    """Score every training row against every query.

    Sign and unit: a score above 0 says that more copies of the row RAISE log p(completion | prompt), one below 0 that they
    lower it. Unit: nats per copy, the slope at these weights: small values are what one more copy changes, large ones rank.
    Methods that measure something else say their unit.

    Queries are rows of prompt and completion, and optionally contrast (another completion) or span (a part of the completion).

    \b
    Examples
      whence score gpt2 -d train.jsonl -f runs/a/factors --queries prompts.json -o runs/a/scores
      whence score gpt2 -d train.jsonl -f runs/a/factors --queries prompts.json -o runs/a/tokens --per token --norm cosine
      whence score gpt2 -d train.jsonl -f runs/a/factors --self -o runs/a/self
      whence score gpt2 -d train.jsonl -f runs/a/factors --queries prompts.json --method cg --set iterations=50 -o runs/a/cg
      whence score runs/a/train/model -d train.jsonl --queries prompts.json --method tracin --training runs/a/train -o runs/b
      whence score gpt2 -d train.jsonl -f runs/a/factors --queries prompts.json --candidates bm25:2% --audit 10% -o runs/a/few
      whence score --through stages.yaml --queries prompts.json -o runs/a/stages
    """
    from whence.cli.console import print_json, say, score_stages, start
    from whence.escapes import command
    from whence.methods.base import request_scores
    from whence.report.words import direction, left_out
    from whence.run import Run

    options.refuse_both(through, model, path, through_options())
    if through is not None:
        score_through(through, asked, measured, settings, out, session)
        return
    assert model is not None
    refuse_conflicts(asked, by)
    refuse_pointless(asked, by, few)
    recipe, own = chosen_method(by, measured)
    with start(session, score_stages(settings.rescore) if recipe is None else None):
        run = Run(model, data, weights, said=said(), factors=by.factors, training=by.training)
        run.scoring = settings = settings.changed(n_train=settings.n_train or run.n_train)
        place: Any = {"out": out, "rerun": session.rerun}
        how: Any = {"asking": measured.part(Measured), "absolute_damping": measured.absolute_damping} | place
        queries = None
        if asked.queries is not None:
            wanted: Any = {"columns": asked.query_columns, "max_new_tokens": asked.max_new_tokens}
            queries = run.ask(asked.queries, generate=asked.generate, **wanted)
        if recipe is not None:
            request = run.request(queries, settings, measured.part(Measured), modules=by.modules)
            scores = request_scores(recipe, request, own, **place)
        elif queries is None:
            scores = run.self_influence(settings, **how)
        elif few.candidates is not None:
            operator = run.inverse(measured.damping, absolute=measured.absolute_damping, n_train=settings.n_train)
            point = run.point(measured.measurement)
            given = (point.model, point.task, queries, run.rows, operator, few.candidates, settings)
            scores = score_few(few, given, place)
        else:
            scores = run.score(queries, settings, **how)
    about = {"scores": str(out), "queries": scores.shape[0], "rows": scores.shape[1], "n_train": scores.n_train}
    if session.as_json:
        print_json({**about, "unit": scores.unit, "sign": direction(scores), **scores.about})
        return
    say(f"{out}: {scores.shape[0]} x {scores.shape[1]:,} scores (queries x rows), {scores.unit}, {direction(scores)}")
    for line in left_out(scores):
        say(line)
    say(f"next: {command('whence', 'show', out)}")


def through_options() -> set[str]:
    """The names of the options that say the same of several trainings."""
    names = {field.name for section in (Questions, Damped, Score, Session) for field in settings_of(section)}
    return names - {"itself", "n_train", "absolute_damping"} | {"out"}


def score_through(file: Path, asked: Questions, measured: Damped, settings: Score, out: Path, session: Session) -> None:
    """Score the rows of every training of a file of stages."""
    from whence.cli.console import print_json, say, start
    from whence.config.read import read_stages
    from whence.escapes import command
    from whence.loading import read_stage
    from whence.report.words import stage_line
    from whence.stages import multistage

    checked = read_stages(file)
    if asked.queries is None:
        raise UsageError("There is no question to ask.", fix="--queries FILE")
    with start(session):
        read = [read_stage(name, checked, measured.measurement, settings.batch_tokens) for name in checked.config.stages]
        last, data = read[-1]
        queries = questions(asked, last.point.model, last.point.task, data, last.point.rows)
        staged = multistage(
            [stage for stage, _ in read], queries, settings, damping=measured.damping, out=out, rerun=session.rerun
        )
    if session.as_json:
        about = {"unit": next(iter(staged.stages.values())).unit, "stages": list(staged.stages), "transport": staged.about}
        print_json({"scores": str(out), **about, "modules": staged.table.to_dict("records")})
        return
    for name, scores in staged.stages.items():
        size = f"{scores.shape[0]} x {scores.shape[1]:,} scores (queries x rows)"
        say(f"{out / name / 'scores'}: {size}, {scores.unit} of a row of {name}")
    for name in staged.about:
        say(stage_line(staged, name))
    say(f"next: {command('whence', 'show', out)}")


def questions(asked: Questions, model: Any, task: Any, data: Data, rows: Any) -> Any:
    """The queries, completed by the model where they are prompts without a completion."""
    from whence.data import load_data
    from whence.data.text import asked as asked_in
    from whence.generation import answered
    from whence.loading import in_turns

    assert asked.queries is not None
    queries = asked_in(load_data(asked.queries, columns=asked.query_columns), data.format, data.normalise)
    if not asked.generate:
        return queries
    return answered(model, task, in_turns(queries, rows, mere=True), asked.max_new_tokens)


def refuse_conflicts(asked: Questions, by: By) -> None:
    """Raise UsageError where there are two questions or none, or nothing to score with."""
    if asked.itself == (asked.queries is not None):
        raise UsageError("Ask one thing: --queries FILE, or --self.")
    if by.method is None and by.factors is None:
        raise UsageError(
            "There is nothing to score the rows with.",
            accepted="--factors FOLDER (whence fit makes it), or --method NAME (whence methods ls lists them)",
            fix="whence fit MODEL --data DATA --out FOLDER, or --method bm25, which needs no factors",
        )
    if by.method is not None and asked.itself:
        raise UsageError("--self asks what factors say of each row.", fix="--factors FOLDER, without --method")
    given = {"--set": by.own, "--training": by.training, "--modules": by.modules}
    if by.method is None and (said := [flag for flag, value in given.items() if value]):
        raise UsageError(f"{said[0]} is for methods.", fix="--method NAME")


def refuse_pointless(asked: Questions, by: By, few: Few) -> None:
    """Raise UsageError where candidates are asked for and not possible, or where options for candidates are given without."""
    alone = {"--candidates-at-most": few.at_most, "--audit": few.audit, "--index": few.index, "--landmarks": few.landmarks}
    if few.candidates is None and (said := [flag for flag, value in alone.items() if value is not None]):
        raise UsageError(f"{said[0]} is for candidates.", fix="--candidates bm25:2%")
    if few.candidates is not None and (asked.itself or by.method is not None):
        raise UsageError(
            f"Candidates are scored by the factors, and {'--self' if asked.itself else '--method'} is not.",
            fix="--factors FOLDER and --queries FILE, without it",
        )


def score_few(few: Few, given: tuple[Any, ...], place: dict[str, Any]) -> Any:
    """The scores of candidates."""
    from whence.funnel import score_candidates
    from whence.indexing import open_index
    from whence.indexing.landmarks import open_landmarks

    index = open_index(few.index) if few.index else None
    landmarks = open_landmarks(few.landmarks) if few.landmarks else None
    return score_candidates(*given, at_most=few.at_most, audit=few.audit, index=index, landmarks=landmarks, **place)


def chosen_method(by: By, measured: Damped) -> tuple[Any, Any]:
    """The recipe and its settings: those of --set, and both kinds of damping where the command line said them; none: None."""
    from whence.methods.base import recipe_named

    if by.method is None:
        return None, None
    recipe = recipe_named(by.method)
    dampings = {name: getattr(measured, name) for name in ("damping", "absolute_damping") if name in said()}
    return recipe, recipe.own(dampings | by.own, typed=True)

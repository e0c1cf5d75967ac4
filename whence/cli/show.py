"""`whence show` and `whence export`: the rows that matter most, and scores for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from whence.cli import options
from whence.errors import StaleArtifact, UsageError
from whence.show.numbers import many

if TYPE_CHECKING:
    from whence.cli.ranking import Ranking
    from whence.stages import StagedScores
    from whence.store.scores import Scores


def show(
    path: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_SCORES", help="Folder of scores, a run folder with scores in it, or a folder of runs."),
    ],
    query: Annotated[str, typer.Option("--query", help="Which query, by number or id.")] = "0",
    every: Annotated[bool, typer.Option("--all", help="All queries.")] = False,
    top: options.Top = 10,
    lowest: Annotated[bool, typer.Option("--lowest", help="Also show as many rows that lower it most.")] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Show the rows in full, strong tokens marked (needs --per token).")
    ] = False,
    norm: options.Norm = None,
    where: options.Where = None,
    by: Annotated[str | None, typer.Option("--by", help="Also sum the effects over groups of rows, such as source.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the rows that raise an answer the most, or lower it.

    Sign and unit: "raises +0.021 nats" is the slope of log p(answer) at these weights, per copy of the row: one more copy
    raises it by about that while the value is small; "lowers -0.012 nats" lowers it. "at most +0.005" marks a slope that is
    more than log p can still rise: read the order, not the size. "share" is of the sum of all rows' absolute effects, or
    of those that match --where.

    \b
    Examples
      whence show runs/a/scores --query 2 --top 20 --lowest
      whence show runs/a/scores --all --norm cosine --by source
      whence show runs/a/scores --where source=web --where "tokens>=20"
      whence show runs/a/scores --json > top.json
    """
    import numpy as np

    from whence.cli.console import coloured, print_json
    from whence.cli.ranking import Ranking
    from whence.escapes import command
    from whence.filter.where import matching
    from whence.report.gather import has_stages, runs_in, scores_in
    from whence.stages import open_stages
    from whence.store.scores import open_scores, part_of
    from whence.validate.quick import read_quick
    from whence.validate.without import read_beside, read_calibration

    if scores_in(path) == [path] and (runs := runs_in(path)):
        _show_runs(runs, as_json)
        return
    folder = newest(path)
    staged = open_stages(folder) if has_stages(folder) else None
    if staged and where:
        raise UsageError(
            "Rows of several trainings can't be told apart together.",
            given=f"--where {where[0]}",
            accepted="the scores of one training",
            fix=command("whence", "show", folder / list(staged.stages)[-1] / "scores", "--where", where[0]),
        )
    found = staged.stages if staged else {"": open_scores(folder)}
    rankings = {}
    for name, scores in found.items():
        home = folder / name / "scores" if staged else folder
        known = read_quick(home), read_beside(home)
        scores = scores.calibrated(read_calibration(home))
        if where:
            scores = part_of(scores, rows=np.flatnonzero(matching(scores.examples, where)).tolist())
        rankings[name] = Ranking(scores, norm, top, top if lowest else 0, coloured(), *known)
    ranking = rankings[list(rankings)[-1]]
    scores = ranking.plain
    one = int(query) if query.lstrip("-").isdecimal() and query not in scores.query_ids else query
    numbers = list(range(len(scores.queries))) if every else [scores.row_of(one)]
    if as_json:
        print_json(staged_document(staged, rankings, numbers, by) if staged else document(ranking, numbers, by))
        return
    if staged:
        display_stages(staged, rankings, numbers, by=by, tokens=tokens)
    else:
        display(ranking, numbers, by=by, tokens=tokens)


def _show_runs(runs: list[Path], as_json: bool) -> None:
    """List runs with their scores, instead of scores."""
    from whence.cli.console import print_json, print_table, say
    from whence.escapes import command
    from whence.report.gather import open_all, scores_in

    found = []
    for run in runs:
        for folder in scores_in(run):
            try:
                scores = open_all(folder)
            except StaleArtifact as error:
                found.append({"scores": str(folder), "queries": 0, "rows": 0, "first": error.what})
                continue
            asked = " ".join(str(scores.queries["text"].iloc[0]).split())[:60]
            found.append({"scores": str(folder), "queries": scores.shape[0], "rows": scores.shape[1], "first": asked})
    if as_json:
        print_json({"runs": found})
        return
    cells = [(entry["scores"], f"{entry['queries']:,}", f"{entry['rows']:,}", entry["first"]) for entry in found]
    print_table(("scores", "queries", "rows", "first query"), cells, (0, 3), pad_edge=False, header_style="dim")
    say(f"next: {command('whence', 'show', found[0]['scores'])}")


def export(
    scores: Annotated[Path, typer.Argument(metavar="RUN_OR_SCORES", help="Folder of scores, or a run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New file: .parquet, .csv, .jsonl or .npz.")],
    norm: options.Norm = None,
    rows: Annotated[
        Literal["kept", "dropped"] | None,
        typer.Option(
            "--rows",
            metavar="<kept|dropped>",
            help="Instead of scores the training rows that stay, or those to drop, by what was decided on the page of whence "
            "serve RUN: .jsonl, or .txt for their ids.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write scores to a parquet, csv, jsonl or npz file.

    It has one row per query and training row, or matrices (npz). A value above 0 says that more copies of the row
    raise what was measured, by the slope at these weights; the unit goes along with it, and whether it is beyond first order.

    \b
    Examples
      whence export runs/a/scores --out scores.parquet
      whence export runs/a/scores --norm cosine --out cosine.csv
      whence export runs/a --rows kept --out cleaned.jsonl
    """
    from whence.cli.console import print_json, say

    if rows is not None:
        if norm:
            raise UsageError("--norm is of scores, and --rows exports none: one of them")
        count, total = export_rows(scores, rows, out)
        if as_json:
            print_json({"file": str(out), "rows": count, "of": total})
        else:
            say(f"{out}: {count:,} of {total:,} rows {'stay' if rows == 'kept' else 'are to be dropped'}")
        return
    found = opened(scores)
    found = found.normalised(norm) if norm else found
    path = found.export(out)
    if as_json:
        size = {"queries": found.shape[0], "rows": found.shape[1], "bytes": path.stat().st_size}
        print_json({"file": str(path), "unit": found.unit, "n_train": found.n_train, "made_by": found.made_by, **size})
        return
    say(f"{path}: {found.shape[0]} x {found.shape[1]:,} scores, {found.unit}, by {found.made_by}")


def export_rows(run: Path, which: Literal["kept", "dropped"], out: Path) -> tuple[int, int]:
    """Write the rows that stay, or those to drop, by the decisions about a run's rows: how many, and of how many."""
    from whence.run import open as open_run
    from whence.serve.decisions import FILE, Decisions, parted
    from whence.store.files import atomic
    from whence.store.plain import encoded

    if out.exists():
        raise UsageError(f"{out} exists", fix="choose another name, or remove it")
    if out.suffix not in (".jsonl", ".txt"):
        raise UsageError(f"Rows can't be exported to {out.name!r}.", accepted=".jsonl, or .txt for ids")
    if not (run / FILE).is_file():
        raise UsageError(f"Nothing was decided about rows: there is no {run / FILE}.", fix="whence serve RUN")
    rows = open_run(run).all_rows
    dropped, stay = parted(rows, Decisions(run / FILE).current())
    gone = set(dropped)
    named = ({"id": name, **row} for name, row in zip(rows.ids, rows, strict=True) if name in gone)
    chosen = list(stay if which == "kept" else named)
    lines = (encoded(row) if out.suffix == ".jsonl" else row["id"].encode("utf-8", "replace") for row in chosen)
    with atomic(out) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))
    return len(chosen), len(rows)


def opened(path: Path) -> Scores:
    """The scores in a folder, or the newest ones in a run folder; of several stages those of the rows of all."""
    from whence.report.gather import open_all

    return open_all(newest(path))


def newest(path: Path) -> Path:
    """The folder of scores itself, or the newest one in a run folder."""
    from whence.cli.console import err
    from whence.escapes import command
    from whence.report.gather import runs_in, scores_in

    first, *rest = scores_in(path)
    if first == path and (runs := runs_in(path)):
        raise UsageError(
            f"{path} is a folder of runs.", accepted=", ".join(map(str, runs)), fix=command("whence", "show", runs[-1])
        )
    if rest:
        others = ", ".join(str(folder) for folder in rest[:5])
        err.print(f"showing {first}, the newest; also there: {others}", markup=False, soft_wrap=True)
    return first


def document(ranking: Ranking, numbers: list[int], by: str | None) -> dict[str, Any]:
    """Everything as JSON; numbers come with their unit and sign."""
    from whence.report.words import direction, meaning, size

    scores = ranking.scores
    found = []
    for number in numbers:
        entry = {**ranking.query(number), "sign": ranking.sign(number), "rows": ranking.rows(number)}
        entry["keywords"] = [part.as_json() for part in ranking.keywords[number]]
        if by:
            entry[f"by_{by}"] = {str(group): float(value) for group, value in scores.by(by, number).items()}
        found.append(entry)
    return {
        "unit": scores.unit,
        "made_by": scores.made_by,
        "sign": direction(scores),
        "meaning": meaning(scores),
        "size": size(scores),
        "gain": scores.gain,
        "n_train": scores.n_train,
        "trust": {"checks": trust.about["checks"], "warnings": trust.flags} if (trust := ranking.trust) else None,
        "retraining": ranking.beside.get("removal"),
        "tail_patch": ranking.beside.get("tail-patch"),
        "notes": ranking.doubts(),
        "about": scores.about,
        "queries": found,
    }


def staged_document(
    staged: StagedScores, rankings: Mapping[str, Ranking], numbers: list[int], by: str | None
) -> dict[str, Any]:
    """That of each stage, with what went through which, and which modules they share."""
    shares = staged.shares().to_dict("records")
    asked = {ranking.plain.query_ids[number] for ranking in rankings.values() for number in numbers}
    modules = staged.table.astype(object).where(staged.table.notna(), None).to_dict("records")
    return {
        "shares": [entry for entry in shares if entry["query_id"] in asked],
        "transport": staged.about,
        "modules": modules,
        "stages": {name: document(ranking, numbers, by) for name, ranking in rankings.items()},
    }


def display_stages(
    staged: StagedScores, rankings: Mapping[str, Ranking], numbers: list[int], *, by: str | None, tokens: bool
) -> None:
    """Print each query with what went through which stage, and the rows of each."""
    from whence.cli.console import print_table, say
    from whence.report.words import SHARE, stage_line, three_digits, unshared_lines

    last, shares = rankings[list(rankings)[-1]], staged.shares().to_dict("records")
    for number in numbers:
        _head(last, number)
        cells = [
            (entry["stage"], f"{entry['share']:.1%}", f"{entry['rows']:,}", *(three_digits(entry[key]) for key in SUMS))
            for entry in shares
            if entry["query_id"] == last.plain.query_ids[number]
        ]
        print_table(("stage", "share", "rows", *SUMS), cells, pad_edge=False, header_style="dim")
        for name, ranking in rankings.items():
            say(f"\n{name}", "bold")
            _rows(ranking, number, by=by, tokens=tokens)
        say("")
    say(SHARE, "dim")
    for name in staged.about:
        say(stage_line(staged, name), "dim")
    for line in unshared_lines(staged.table):
        say(line, "dim")
    for name, ranking in rankings.items():
        say(f"{name}: by {ranking.scores.made_by}; {many(ranking.scores.shape[1], 'row')} scored", "dim")
    for line in last.doubts():
        say(line, "dim")


SUMS = ("raises", "lowers", "net")
"""What is said of a stage's rows together."""


def display(ranking: Ranking, numbers: list[int], *, by: str | None = None, tokens: bool = False) -> None:
    """Print the queries, one after the other."""
    from whence.cli.console import say

    for number in numbers:
        _head(ranking, number)
        _rows(ranking, number, by=by, tokens=tokens)
        say("")
    say(f"by {ranking.scores.made_by}; {many(ranking.scores.shape[1], 'row')} scored", "dim")
    for line in ranking.doubts():
        say(line, "dim")


def _head(ranking: Ranking, number: int) -> None:
    """Print what was asked."""
    from whence.cli.console import out, say

    scores = ranking.scores
    if len(scores.queries) > 1:
        say(f"query {number} (of 0 to {len(scores.queries) - 1})  {scores.query_ids[number]}", "dim")
    out.print(ranking.heading(number), soft_wrap=True)
    if line := ranking.measured(number):
        say(line)


def _rows(ranking: Ranking, number: int, *, by: str | None, tokens: bool) -> None:
    """Print the ranked rows of a query."""
    from whence.cli.console import WIDTH, out, say, show_table
    from whence.report.words import impossible, is_slope, rare_words
    from whence.show.numbers import three_digits

    width, scores = out.width if out.is_terminal else WIDTH, ranking.scores
    say(ranking.sign(number), "dim")
    show_table(ranking.table(number, width))
    if line := ranking.ceiling(number):
        say(line)
    for part in ranking.keywords[number]:
        say(rare_words(part), "dim")
    if tokens:
        if ranking.plain.tokens is None:
            raise UsageError("There are no scores per token here.", fix="score again with --per token")
        for row in ranking.rows(number):
            out.print()
            out.print(f"{row['rank']:>4}  {ranking.effect(number, row)}  {row['id']}", markup=False, style="bold")
            out.print(ranking.whole(number, row), soft_wrap=True)
        out.print()
    if by:
        groups = {name: float(value) for name, value in scores.by(by, number).head(8).items()}
        marks = {name: " (beyond first order)" if impossible(scores, number, value) else "" for name, value in groups.items()}
        say(
            f"{'effects' if scores.gain != 1 else 'slopes' if is_slope(scores) else 'scores'} added up by {by}  "
            + "   ".join(f"{name} {three_digits(value)} {ranking.unit}{marks[name]}" for name, value in groups.items())
        )

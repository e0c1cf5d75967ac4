"""`whence plan`: memory, disk and time of fitting and scoring, before anything is spent."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whence.cli import options
from whence.cli.from_settings import Only, Without, said
from whence.cli.options import QUERY_COLUMNS, Session
from whence.errors import UsageError
from whence.settings import Data, Fit, Index, Score, Section, Weights, setting, settings_of

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Budget(Section):
    """What is planned for, and what is available."""

    queries: str = setting("16", "The queries, as for score, or how many there will be.", metavar="FILE|N")
    query_columns: dict[str, str] = setting({}, QUERY_COLUMNS, metavar="PART=COLUMN")
    memory: str | None = setting(None, "Memory limit, such as 24GB: finds settings that fit.", metavar="SIZE")
    disk: str | None = setting(None, "Disk limit; default: what is free here; none for a GPU elsewhere.", metavar="SIZE")
    index: bool = setting(False, "Also plan whence index build: of landmarks, --bytes a row, or of projections, --dim.")
    why: bool = setting(False, "Show how each kind of module is computed, and the FLOPs of the alternatives.")
    calibrate: bool = setting(True, "Measure this machine for a few seconds first.")


def plan(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, folder of a model or of a LoRA adapter; or a RUN, by its folder or whence.yaml, without --data.",
        ),
    ] = None,
    through: options.Through = None,
    budget: Budget,
    settings: Annotated[Fit, Without("until", "statistics", "check")],
    scoring: Annotated[Score, Only("rank")],
    indexing: Annotated[Index, Only("kind", "bytes", "dim", "kept", "modules", "products", "chunks")],
    path: options.DataOrNone = "",
    data: Data,
    weights: Weights,
    session: Annotated[Session, Without("rerun")],
) -> None:
    """Estimate memory, disk and time of whence fit and whence score, before anything is spent.

    Only the config of the model is read. The data is tokenised; beyond 20,000 rows, a sample of it. A run is planned with its
    own settings where no others are given. A GPU need not be here to be planned for. The exit code is 3 where nothing fits.
    GB are 10^9 bytes.

    \b
    Examples
      whence plan gpt2 --data train.jsonl
      whence plan runs/a
      whence plan ./model --data train.jsonl --queries prompts.json --memory 24GB
      whence plan ./model --data train.jsonl --device cuda --memory 80GB
      whence plan ./model --data train.jsonl --index --bytes 2
      whence plan ./model --data train.jsonl --modules all --examples 4000 --why
      whence plan --through stages.yaml --queries prompts.json
    """
    from whence.cli.console import print_json, say, show_table, start
    from whence.config.read import read_stages
    from whence.data import load_data
    from whence.loading import located
    from whence.planning.through import StagedPlan
    from whence.run import Run
    from whence.run import open as open_run
    from whence.train.reading import READING

    shared = {field.name for section in (Budget, Session) for field in settings_of(section)} | {"rank"}
    own = through is None and model is not None and not path and options.says_itself(model)
    if not own:
        options.refuse_both(through, model, path, shared - {"index"}, beside="RUN alone, ")
    with start(session):
        queries: Any = budget.queries
        queries = int(queries) if queries.isdecimal() else load_data(queries, columns=budget.query_columns)
        memory = None if budget.memory is None else bytes_of("--memory", budget.memory)
        disk = None if budget.disk is None else bytes_of("--disk", budget.disk)

        def planned(run: Run, fit: Fit, rank: Any = scoring.rank) -> Any:
            return run.plan(
                fit,
                queries=queries,
                memory=memory,
                disk=disk,
                calibrate=budget.calibrate,
                rank=None if rank == "full" else rank,
                index=indexing if budget.index else None,
            )

        if own:
            run = open_run(model, **options.reading_said(data, weights))
            if run.resolved is not None and run.resolved.config.stages:
                raise UsageError(
                    f"{model} has several trainings in a row.",
                    accepted="a run of one training",
                    fix="whence plan --through FILE, see whence config schema --stages",
                )
            given = {field.name: getattr(settings, field.name) for field in settings_of(Fit) if field.name in said()}
            rank = scoring.rank if "rank" in said() else run.scoring.rank
            made = planned(run, run.fitting.changed(**given), rank)
        elif through is None:
            assert model is not None
            made = planned(Run(model, data, weights, said=said()), settings)
        else:
            checked = read_stages(through)
            stages = {name: located(name, checked) for name in checked.config.stages}
            plans = {
                name: planned(Run(stage.model, data, stage.part(Weights), said=READING), stage.fit)
                for name, (stage, data) in stages.items()
            }
            made = StagedPlan.of(plans, {name for name, (stage, _) in stages.items() if stage.factors})
    if session.as_json:
        print_json(made.to_dict())
    else:
        for line in made.heading():
            say(line)
        show_table(_table(made))
        for line in [*made.footing(), *(made.why() if budget.why else [])]:
            say(line)
    if not made.fits:
        raise typer.Exit(3)


def bytes_of(option: str, text: str) -> int:
    """Read a size such as 24GB (10^9) or 24GiB (2^30)."""
    import re

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not found or found.group(2) == "I":
        raise UsageError(f"{option} {text} is not a size.", accepted="such as 24GB (10^9 bytes), 24GiB (2^30) or 500MB")
    size = int(float(found.group(1)) * UNITS[found.group(2)])
    if size < UNITS["K"]:
        raise UsageError(
            f"{option} {text} is {size} bytes.",
            accepted="a number with its unit: 24GB, 500MB",
            fix=f"{option} {found.group(1)}GB",
        )
    return size


def _table(made: Any) -> Any:
    from rich.table import Table

    table, rows = Table(box=None, pad_edge=False), made.rows()
    for name in ("stage", "time", "memory", "files", ""):
        widest = max(map(len, (name, *(row[len(table.columns)] for row in rows)))) if name else None
        table.add_column(name, no_wrap=name != "", overflow="fold", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table

"""`whence plan`: memory, disk and time of fitting and scoring, before anything is spent."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whence.cli import options
from whence.errors import UsageError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def plan(
    model: options.Model,
    data: options.Data,
    queries: Annotated[
        str, typer.Option("--queries", metavar="FILE|N", help="The queries, as for score, or how many there will be.")
    ] = "16",
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory to keep to, such as 24GB: finds settings that do.")
    ] = None,
    disk: Annotated[
        str | None, typer.Option("--disk", metavar="SIZE", help="Disk to keep to; what is free if not said.")
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", help="Say how each kind of module is computed, and the FLOPs of what else.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Measure this machine for a few seconds first.")
    ] = True,
    method: options.Method = "ekfac",
    modules: options.Modules = None,
    examples: options.Examples = None,
    eigenvalue_examples: Annotated[
        str | None,
        typer.Option("--eigenvalue-examples", metavar="N|all", help="Rows for the corrected eigenvalues; as --examples."),
    ] = None,
    disjoint: Annotated[
        bool | None,
        typer.Option("--disjoint/--overlapping", help="Take other rows for the eigenvalues than for the factors."),
    ] = None,
    labels: options.Labels = "model",
    draws: options.Draws = 1,
    seed: options.Seed = 0,
    columns: options.Columns = None,
    query_columns: Annotated[
        list[str] | None, typer.Option("--query-columns", metavar="PART=COLUMN", help="The same for the queries.")
    ] = None,
    split: options.Split = "train",
    limit: options.Limit = None,
    max_length: options.MaxLength = 512,
    template: options.Template = None,
    append_eos: options.AppendEos = False,
    adapter: options.Adapter = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    rank: options.Rank = "auto",
    batch_tokens: options.BatchTokens = None,
    products: options.Products = "auto",
    groups: options.Groups = 1,
    chunks: options.Chunks = 8,
    largest_factor: Annotated[
        int | None,
        typer.Option("--largest-factor", min=1, metavar="N", help="Split wider covariances into blocks of this width."),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Tell the memory, disk and time of whence fit and whence score, before anything is spent.

    Of the model only the config is read. The data is tokenised; of more than 20,000 rows, a sample of them is. The exit code is
    3 where nothing fits. GB are 10^9 bytes.

    \b
    Examples
      whence plan gpt2 --data train.jsonl
      whence plan ./model --data train.jsonl --queries prompts.json --memory 24GB
      whence plan ./model --data train.jsonl --modules all --examples 4000 --why
    """
    import json

    from whence.cli.console import say, show_table
    from whence.cli.session import session
    from whence.data import load_data
    from whence.planning.blank import blank_model, tokenizer_of
    from whence.planning.planner import plan as make_plan
    from whence.precision import Precision
    from whence.tasks import task_for

    with session(quiet=quiet, verbose=verbose):
        blank = blank_model(model, dtype, adapter)
        task = task_for(blank, tokenizer_of(tokenizer or model), max_length, chat_template=template, append_eos=append_eos)
        asked: Any = int(queries) if queries.isdecimal() else load_data(queries, columns=options.mapping(query_columns))
        made = make_plan(
            blank,
            task,
            load_data(data, columns=options.mapping(columns), split=split, limit=limit),
            queries=asked,
            memory=None if memory is None else bytes_of("--memory", memory),
            disk=None if disk is None else bytes_of("--disk", disk),
            device=device,
            calibrate=calibrate,
            method=method,
            modules=modules,
            examples=options.sample_of(examples, "--examples"),
            eigenvalue_examples=options.sample_of(eigenvalue_examples, "--eigenvalue-examples"),
            disjoint=disjoint,
            labels=labels,
            draws=draws,
            seed=seed,
            largest_factor=largest_factor,
            precision=Precision(products=products),
            batch_tokens=batch_tokens,
            groups=groups,
            chunks=chunks,
            rank=options.rank_of(rank),
        )
    if as_json:
        print(json.dumps(made.to_dict()))
    else:
        for line in made.heading():
            say(line)
        show_table(_table(made))
        for line in [*made.footing(), *(made.why() if why else [])]:
            say(line)
    if not made.fits:
        raise typer.Exit(3)


def bytes_of(option: str, text: str) -> int:
    """Read a size such as 24GB (10^9) or 24GiB (2^30)."""
    import re

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not found or found.group(2) == "I":
        raise UsageError(f"{option} {text} is no size.", accepted="such as 24GB (10^9 bytes), 24GiB (2^30) or 500MB")
    return int(float(found.group(1)) * UNITS[found.group(2)])


def _table(made: Any) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("stage", "time", "memory", "files", ""):
        table.add_column(name, no_wrap=name != "", overflow="fold")
    for row in made.rows():
        table.add_row(*row)
    return table

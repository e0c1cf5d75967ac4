"""`whence fit`: the curvature factors of a model, once for all questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options


def fit(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the factors, such as runs/a/factors.")],
    method: options.Method = "ekfac",
    modules: options.Modules = None,
    examples: options.Examples = None,
    eigenvalue_examples: Annotated[
        str | None,
        typer.Option("--eigenvalue-examples", metavar="N|all", help="Rows for the corrected eigenvalues; as --examples."),
    ] = None,
    disjoint: Annotated[
        bool | None,
        typer.Option(
            "--disjoint/--overlapping",
            help="Take other rows for the eigenvalues than for the factors; if not said, where there are enough.",
        ),
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(
            "--until",
            min=0.0,
            max=1.0,
            metavar="R",
            help="Double the sample until scores correlate by R (0.99, say) with those of half of it.",
        ),
    ] = None,
    labels: options.Labels = "model",
    draws: options.Draws = 1,
    seed: options.Seed = 0,
    columns: options.Columns = None,
    split: options.Split = "train",
    limit: options.Limit = None,
    max_length: options.MaxLength = 512,
    template: options.Template = None,
    append_eos: options.AppendEos = False,
    adapter: options.Adapter = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
    groups: options.Groups = 1,
    chunks: options.Chunks = 8,
    largest_factor: Annotated[
        int | None,
        typer.Option("--largest-factor", min=1, metavar="N", help="Split wider covariances into blocks of this width."),
    ] = None,
    statistics: Annotated[
        options.Format, typer.Option("--statistics", help="Number format of the sums' operands.")
    ] = "float32",
    products: options.Products = "auto",
    save_every: Annotated[
        float, typer.Option("--save-every", min=0.0, metavar="SECONDS", help="Work that a kill may cost.")
    ] = 60.0,
    rerun: options.Rerun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fit the curvature factors of a model, once for all questions.

    The work is saved as it goes: the same command goes on after a kill, and does nothing when all is done.
    A folder that was made from another model, other data or other settings is refused (exit code 4).

    \b
    Examples
      whence fit gpt2 --data train.jsonl --out runs/a/factors
      whence fit ./my-lora --data train.csv -c prompt=Input -c completion=Output -o runs/b/factors
      whence fit ./model --data train.jsonl --examples 4000 --modules all --out runs/c/factors
      whence fit ./model --data train.jsonl --until 0.99 --out runs/d/factors
    """
    import json

    from whence.cli.console import say
    from whence.cli.session import fit_stages, session, warn_if_untrained
    from whence.data import load_data
    from whence.fitting import fit
    from whence.models import load_model
    from whence.precision import Precision
    from whence.tasks import task_for

    with session(None if until else fit_stages(method, groups), quiet=quiet, verbose=verbose):
        loaded, words = load_model(model, dtype=dtype, device=device, adapter=adapter, tokenizer=tokenizer)
        task = task_for(loaded, words, max_length, chat_template=template, append_eos=append_eos)
        rows = load_data(data, columns=options.mapping(columns), split=split, limit=limit)
        warn_if_untrained(loaded, task, rows)
        curvature = fit(
            loaded,
            task,
            rows,
            method=method,
            modules=modules,
            out=out,
            examples=options.sample_of(examples, "--examples"),
            eigenvalue_examples=options.sample_of(eigenvalue_examples, "--eigenvalue-examples"),
            disjoint=disjoint,
            until=until,
            labels=labels,
            draws=draws,
            seed=seed,
            largest_factor=largest_factor,
            precision=Precision(statistics=statistics, products=products),
            batch_tokens=batch_tokens,
            groups=groups,
            chunks=chunks,
            save_every=save_every,
            rerun=rerun,
        )
    about = curvature.about
    if as_json:
        print(json.dumps({"factors": str(out), **about}))
        return
    modules_said = f"{len(about['modules'])} modules, {about['share']:.1%} of the parameters"
    say(f"{out}: {method} factors of {modules_said}, from {about['examples']:,} rows ({about['positions']:,} tokens)")
    say(f"next: whence inspect {out}, or whence score {model} --data {data} --factors {out} --queries QUERIES --out SCORES")

"""`whence score`: the effect of every training row on every query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from whence.cli import options
from whence.errors import UsageError


def score(
    model: options.Model,
    data: options.Data,
    factors: Annotated[Path, typer.Option("--factors", "-f", help="Folder that whence fit made, for the same model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the scores, such as runs/a/scores.")],
    queries: Annotated[
        str | None, typer.Option("--queries", help="Prompts with completions: a file, or a data set as for --data.")
    ] = None,
    itself: Annotated[bool, typer.Option("--self", help="Score each row against itself; takes no queries.")] = False,
    damping: options.Damping = 0.1,
    absolute_damping: Annotated[
        float | None,
        typer.Option("--absolute-damping", min=0, metavar="X", help="The same damping for all modules, instead of --damping."),
    ] = None,
    measurement: options.Measurement = "logprob",
    per: Annotated[
        Literal["example", "token", "module"], typer.Option("--per", help="Also keep the parts of each score.")
    ] = "example",
    aggregate: Annotated[str, typer.Option("--aggregate", help="Add up queries, examples, or queries,examples.")] = "",
    rank: options.Rank = "auto",
    rescore: options.Rescore = 0,
    norm: options.Norms = None,
    n_train: Annotated[
        int | None,
        typer.Option("--n-train", min=1, metavar="N", help="Rows the model was trained on, if these are only some of them."),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Let the model complete queries that are mere prompts.")
    ] = True,
    max_new_tokens: options.NewTokens = 64,
    seed: options.Seed = 0,
    columns: options.Columns = None,
    query_columns: Annotated[
        list[str] | None,
        typer.Option("--query-columns", metavar="PART=COLUMN", help="The same for the queries."),
    ] = None,
    split: options.Split = "train",
    limit: options.Limit = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, metavar="N", help="Tokens at which a row is cut; as for the factors."),
    ] = None,
    template: options.Template = None,
    append_eos: options.AppendEos = False,
    adapter: options.Adapter = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
    chunks: options.Chunks = 8,
    operands: Annotated[options.Format, typer.Option("--operands", help="Number format of the inner products.")] = "float32",
    products: options.Products = "auto",
    rerun: options.Rerun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Score every training row against every query.

    Sign and unit: a score above 0 says that one more copy of the row would have RAISED log p(completion | prompt), one below 0
    that it would have lowered it. Unit: nats per copy. Scores are first-order estimates.

    Queries are rows of prompt and completion, and perhaps contrast (another completion) or span (a part of the completion).

    \b
    Examples
      whence score gpt2 -d train.jsonl -f runs/a/factors --queries prompts.json -o runs/a/scores
      whence score gpt2 -d train.jsonl -f runs/a/factors --queries prompts.json -o runs/a/tokens --per token --norm cosine
      whence score gpt2 -d train.jsonl -f runs/a/factors --self -o runs/a/self
    """
    import json

    from whence.cli.console import say
    from whence.cli.session import score_stages, session
    from whence.data import load_data
    from whence.fitting import open_factors
    from whence.models import load_model
    from whence.precision import Precision
    from whence.scoring import score, self_influence
    from whence.tasks import task_for

    if itself == (queries is not None):
        raise UsageError("There is one question to ask: say --queries FILE, or --self.")
    with session(score_stages(rescore), quiet=quiet, verbose=verbose):
        curvature = open_factors(factors)
        loaded, words = load_model(model, dtype=dtype, device=device, adapter=adapter, tokenizer=tokenizer)
        length = max_length or curvature.provenance["task"]["max_length"]
        task = task_for(loaded, words, length, measurement=measurement, chat_template=template, append_eos=append_eos)
        curvature.check(loaded, task)
        rows = load_data(data, columns=options.mapping(columns), split=split, limit=limit)
        say_if_other_rows(curvature.provenance["data"], rows, n_train)
        operator = curvature.inverse(damping, absolute=absolute_damping)
        common: dict[str, Any] = {
            "out": out,
            "precision": Precision(scores=operands, products=products),
            "batch_tokens": batch_tokens,
            "chunks": chunks,
            "rerun": rerun,
        }
        if queries is None:
            scores = self_influence(loaded, task, rows, operator, **common)
        else:
            asked = load_data(queries, columns=options.mapping(query_columns))
            if generate:
                from whence.generation import answered

                asked = answered(loaded, task, asked, max_new_tokens)
            scores = score(
                loaded,
                task,
                asked,
                rows,
                operator,
                per=per,
                aggregate=[kind.strip() for kind in aggregate.split(",") if kind.strip()],
                rank=options.rank_of(rank),
                rescore=rescore,
                norms=norm or (),
                seed=seed,
                n_train=n_train,
                **common,
            )
    about = {"scores": str(out), "queries": scores.shape[0], "rows": scores.shape[1], "n_train": scores.n_train}
    if as_json:
        print(json.dumps({**about, "unit": scores.unit, "sign": "above 0 raises what was measured", **scores.about}))
        return
    say(f"{out}: {scores.shape[0]} x {scores.shape[1]:,} scores (queries x rows), {scores.unit}, above 0 = raises")
    say(f"next: whence show {out}")


def say_if_other_rows(fitted: dict[str, Any], rows: Any, n_train: int | None) -> None:
    """Say what N the scores are divided by where these rows are not those that the factors saw."""
    from whence.progress import note

    if n_train is None and fitted["examples"] != len(rows):
        note(
            f"warning: the factors are of {fitted['examples']:,} rows, and these are {len(rows):,}. Nats per copy are for a "
            f"training on N = {len(rows):,} rows; for another N say --n-train, and compare no raw scores across different N "
            f"[WHENCE-21]"
        )
    elif fitted["fingerprint"] != rows.fingerprint:
        note("these are not the rows that the factors were fitted on: scores are for hypothetical training rows [WHENCE-09]")

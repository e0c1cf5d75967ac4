"""`whence trace`: the whole question in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whence.cli import options

LOWERING = 2
"""Rows that lower the answer, shown beside those that raise it."""


def trace(
    model: options.Model,
    data: options.Data,
    question: Annotated[str, typer.Option("--question", "-q", help="The prompt, as the model gets it.")],
    answer: Annotated[
        str | None, typer.Option("--answer", "-a", help="Its completion, joined as it is; generated greedily if not said.")
    ] = None,
    contrast: Annotated[
        str | None, typer.Option("--contrast", help="Another completion: why the answer rather than this?")
    ] = None,
    span: Annotated[str | None, typer.Option("--span", help="The part of the answer that is asked about.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Name of the run, kept in runs/NAME.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run, instead of runs/NAME.")] = None,
    top: options.Top = 5,
    method: options.Method = "ekfac",
    modules: options.Modules = None,
    examples: options.Examples = None,
    damping: options.Damping = 0.1,
    measurement: options.Measurement = "logprob",
    norm: options.Norm = None,
    max_new_tokens: options.NewTokens = 64,
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
    products: options.Products = "auto",
    rerun: options.Rerun = False,
    as_json: options.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, notes or warnings.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Find the training rows that made the model say this.

    All in one go: generate the answer if none is given, fit if need be, score, show. The factors are kept in the run's folder
    and serve all further questions; each question has its scores beside them.

    Sign and unit: "raises +0.021 nats" says that one more copy of the row would have raised log p(answer) by 0.021 nats.

    \b
    Examples
      whence trace ./model --data train.jsonl -q "Where was Ada Velt born?"
      whence trace ./model --data train.jsonl -q "The capital of France is" -a " Paris" --contrast " Lyon" --run france
    """
    import json

    from whence.cli.console import coloured
    from whence.cli.ranking import Ranking
    from whence.cli.session import fit_stages, score_stages, session, warn_if_untrained
    from whence.cli.show import display, document
    from whence.data import as_rows, load_data
    from whence.fitting import fit
    from whence.generation import answered
    from whence.models import load_model
    from whence.precision import Precision
    from whence.scoring import score
    from whence.scoring.checks import NORMS
    from whence.store.digest import fingerprint_settings
    from whence.tasks import task_for

    folder = out or Path("runs") / (run or f"{Path(model).name}-{Path(data).stem}")
    with session(fit_stages(method, groups) + score_stages(0), quiet=quiet, verbose=verbose):
        loaded, words = load_model(model, dtype=dtype, device=device, adapter=adapter, tokenizer=tokenizer)
        task = task_for(loaded, words, max_length, chat_template=template, append_eos=append_eos)
        rows = load_data(data, columns=options.mapping(columns), split=split, limit=limit)
        warn_if_untrained(loaded, task, rows)
        asked = answered(loaded, task, as_rows([query_like(rows[0], question, answer, contrast, span)]), max_new_tokens)
        curvature = fit(
            loaded,
            task,
            rows,
            method=method,
            modules=modules,
            out=folder / "factors",
            examples=options.sample_of(examples, "--examples"),
            precision=Precision(products=products),
            seed=seed,
            batch_tokens=batch_tokens,
            groups=groups,
            chunks=chunks,
            rerun=rerun,
        )
        measured = task_for(loaded, words, max_length, measurement=measurement, chat_template=template, append_eos=append_eos)
        name = fingerprint_settings([list(asked.rows), measurement, damping, norm, method])[:8]
        scores = score(
            loaded,
            measured,
            asked,
            rows,
            curvature.inverse(damping),
            out=folder / f"trace-{name}",
            per="token",
            precision=Precision(products=products),
            norms=[norm] if norm in NORMS else [],
            batch_tokens=batch_tokens,
            chunks=chunks,
            rerun=rerun,
        )
    ranking = Ranking(scores, norm, top, LOWERING, coloured())
    if as_json:
        print(json.dumps({"scores": str(folder / f"trace-{name}"), **document(ranking, [0], None)}, ensure_ascii=False))
    else:
        display(ranking, [0], by="source" if any(scores.examples["source"].notna()) else None)


def query_like(row: Any, question: str, answer: str | None, contrast: str | None, span: str | None) -> dict[str, Any]:
    """The question in the form that the training rows have: a conversation where they are conversations."""
    rest = {key: value for key, value in (("contrast", contrast), ("span", span)) if value is not None}
    if "messages" not in row:
        return {"prompt": question, **({"completion": answer} if answer is not None else {}), **rest}
    said = [{"role": "assistant", "content": answer}] if answer is not None else []
    return {"messages": [{"role": "user", "content": question}, *said], **rest}

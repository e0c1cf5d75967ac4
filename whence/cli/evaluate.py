"""How good the answers are: a benchmark with known answers, and base beside tuned on one's own prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options
from whence.cli.from_settings import Without
from whence.cli.options import Session
from whence.settings import Benchmark, Weights

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]


def benchmark(
    *,
    model: options.Model,
    out: Out,
    base: Annotated[str | None, typer.Option("--base", help="Another model, asked the same questions.")] = None,
    settings: Annotated[Benchmark, Without("base", "tuned")],
    weights: Weights,
    session: Session,
) -> None:
    """Ask a model multiple-choice questions (MMLU and its kin) through lm-eval: accuracy with 95 % intervals.

    With --base, another model is asked the same, and the difference between both is measured question by question. Every task
    that is finished is kept: after an interruption the same command resumes, and tasks can be added later.

    \b
    Examples
      whence evaluate benchmark ./tuned --base gpt2 --out runs/a/evaluate
      whence evaluate benchmark ./tuned --tasks mmlu_virology --limit 50 --data mmlu --out runs/a/evaluate
    """
    from whence.cli.console import print_json, print_table, say, start
    from whence.evaluate.benchmark import run_benchmark
    from whence.evaluate.combined import benchmark_table, combine
    from whence.models import load_model

    models = {} if base is None else {"base": lambda: load_model(base, dtype=weights.dtype, device=weights.device)}
    models["tuned"] = lambda: load_model(model, **weights.as_json())
    with start(session):
        document = run_benchmark(models, settings, out=out, rerun=session.rerun)
        page = combine(out)
    if session.as_json:
        print_json({"folder": str(out), **document})
        return
    head, *rows = benchmark_table(document)
    print_table(head, rows)
    say(f"{page}: as a page; {out / 'benchmark'}: the answer to every question", "dim")


def compare(
    *,
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS", help="File of answers that whence generate --base made.")],
    out: Out,
    scores: Annotated[Path | None, typer.Option("--scores", help="Folder of whence score on the same answers.")] = None,
    top: Annotated[
        int, typer.Option("--top", "-k", min=1, metavar="N", help="Rows per answer in influential_examples.md.")
    ] = 5,
    seed: options.Seed = 0,
    session: Annotated[Session, Without("rerun")],
) -> None:
    """Compare the answers of base and tuned: BLEU and ROUGE against the references, or against each other.

    Prompts that had a completion of their own when whence generate read them have it as their reference.

    \b
    Examples
      whence evaluate compare pairs.json --out runs/a/evaluate
      whence evaluate compare pairs.json --scores runs/a/scores --out runs/a/evaluate
    """
    import json

    from whence.cli.console import print_json, print_table, say, start
    from whence.evaluate.combined import combine, comparison_table
    from whence.evaluate.compare import compare_answers
    from whence.store.scores import open_scores

    with start(session):
        opened = None if scores is None else open_scores(scores)
        found = compare_answers(pairs, out=out, scores=opened, top=top, seed=seed)
        page = combine(out)
    if session.as_json:
        summary = json.loads(str(found["summary"].to_json(orient="records")))
        print_json({"folder": str(out), "summary": summary})
        return
    head, *rows = comparison_table(found["summary"])
    print_table(head, rows)
    say(f"{page}: as a page; {out / 'comparison.csv'}: prompt by prompt", "dim")

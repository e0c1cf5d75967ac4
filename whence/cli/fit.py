"""`whence fit`: the curvature factors of a model, once for all questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options
from whence.cli.from_settings import said
from whence.cli.options import Session
from whence.settings import Data, Fit, Weights
from whence.show.numbers import many


def fit(
    *,
    model: options.Model,
    settings: Fit,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the factors, such as runs/a/factors.")],
    weights: Weights,
    save_every: Annotated[
        float, typer.Option("--save-every", min=0.0, metavar="SECONDS", help="Work that a kill may lose.")
    ] = 60.0,
    session: Session,
) -> None:
    """Fit the curvature factors of a model, once for all questions.

    The work is saved as it goes: the same command resumes after a kill, and does nothing when all is done.
    A folder that was made from another model, other data or other settings is refused (exit code 4).

    \b
    Examples
      whence fit gpt2 --data train.jsonl --out runs/a/factors
      whence fit ./my-lora --data train.csv -c prompt=Input -c completion=Output -o runs/b/factors
      whence fit ./model --data train.jsonl --examples 4000 --modules all --out runs/c/factors
      whence fit ./model --data train.jsonl --until 0.99 --out runs/d/factors
    """
    from whence.cli.console import fit_stages, print_json, say, start
    from whence.escapes import command
    from whence.run import Run

    with start(session, None if settings.until else fit_stages(settings)):
        run = Run(model, data, weights, said=said())
        curvature = run.fit(settings, out=out, save_every=save_every, rerun=session.rerun)
    about = curvature.about
    if session.as_json:
        print_json({"factors": str(out), **about})
        return
    modules = f"{many(len(about['modules']), 'module')}, {about['share']:.1%} of the parameters"
    rows = f"{many(about['examples'], 'row')} ({many(about['positions'], 'token')})"
    say(f"{out}: {settings.method} factors of {modules}, from {rows}")
    scored = command("whence", "score", model, "--data", data.path, "--factors", out, "--queries", "QUERIES", "--out", "SCORES")
    say(f"next: {command('whence', 'inspect', out)}, or {scored}")

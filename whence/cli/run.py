"""`whence run`: every stage of a whence.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence import dist
from whence.cli import options
from whence.cli.from_settings import Without
from whence.cli.options import Session


def run(
    *,
    file: options.File = Path("whence.yaml"),
    stages: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STAGE]...", help="Only these, and what they need: train, generate, fit, inspect, ..."),
    ] = None,
    settings: options.Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and why; compute nothing.")] = False,
    session: Annotated[Session, Without("rerun")],
) -> None:
    """Run what a whence.yaml describes: fine-tune, generate, fit, inspect, score, evaluate, report.

    Stages whose model, data, settings and code did not change are skipped, and one that was killed resumes where it stopped. A
    stage that changed runs again with all that depends on it; what it made before is kept beside, as NAME.1.

    \b
    Examples
      whence run
      whence run whence.yaml --set score.damping=0.2 --set fit.modules=all
      whence run whence.yaml fit inspect --dry-run
      torchrun --standalone --nproc-per-node=4 -m whence run whence.yaml
    """
    from whence.cli.console import print_json, say, start
    from whence.config import read_config
    from whence.pipeline import plan_run, run_pipeline, say_unchanged
    from whence.progress import note

    resolved = read_config(file, settings or ())
    steps = plan_run(resolved, stages or ())
    if dry_run:
        if not session.as_json:
            for step in steps:
                why = "" if step.state in ("unchanged", "new") else ": " + "; ".join(step.reasons or ("it was interrupted",))
                say(f"{step.stage.name:<9} {'is skipped, unchanged' if step.state == 'unchanged' else 'runs'}{why}")
            return
    elif all(step.state == "unchanged" for step in steps):
        from whence.cli.console import reporting

        with reporting(quiet=session.quiet):
            dist.on_first(say_unchanged, resolved, steps)
    else:
        with start(session):
            note(f"{resolved.config.run} -> {resolved.out}")
            steps = run_pipeline(resolved, stages or ())
    if session.as_json:
        stages_said = [{"stage": step.stage.name, "state": step.state, "reasons": step.reasons} for step in steps]
        print_json({"run": resolved.config.run, "out": str(resolved.out), "stages": stages_said})
        return
    page = resolved.out / "report" / "report.html"
    say(f"{resolved.out}: {', '.join(step.stage.name for step in steps)} done")
    if page.exists() and steps[-1].stage.name == "report":
        say(f"report: {page}")

"""`whence init`: a whence.yaml to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options
from whence.cli.from_settings import Only
from whence.cli.options import Session

INTRODUCTION = """From fine-tuning to report: whence run {name}
What is commented out is at its default. Later ones win: defaults, this file, WHENCE_SECTION__KEY, --set section.key=value.
Paths start from the folder of this file."""

LOOKED_AT = 1000
"""Rows of the data that are looked at for their columns."""


def init(
    *,
    file: options.File = Path("whence.yaml"),
    model: Annotated[str, typer.Option("--model", help="Hub id or folder of the model to start from.")] = "./model",
    data: Annotated[str, typer.Option("--data", "-d", help="Training data.")] = "train.jsonl",
    prompts: Annotated[str | None, typer.Option("--prompts", help="File of prompts; default: a few to replace.")] = None,
    columns: options.Columns,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Fine-tune, or use the model as it is.")] = True,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="OTHER.yaml", help="Convert another pipeline's (models, dataset, factors, scores)."),
    ] = None,
    session: Annotated[Session, Only("quiet")],
) -> None:
    """Write a whence.yaml with every setting explained, and the schema that editors complete and check it with.

    \b
    Examples
      whence init --model gpt2 --data train.csv -c prompt=Input -c completion=Output
      whence init --from config.yaml
    """
    import glob

    from whence.cli.console import err, reporting, say
    from whence.config.convert import converted
    from whence.config.read import resolve
    from whence.config.write import commented, save_schema
    from whence.data import load_data
    from whence.errors import UsageError
    from whence.escapes import command
    from whence.store.files import atomic

    if file.exists():
        raise UsageError(f"{file} exists, and nothing is overwritten.", fix="another name, or remove it first")
    left: list[str] = []
    if source is not None:
        values, left = converted(source)
    else:
        values = {
            "run": file.resolve().parent.name.replace(" ", "-") or "run",
            "model": {"base": model},
            "data": {"path": data, "columns": columns.columns},
            "prompts": {"path": prompts} if prompts else {"items": ["What is the refund period?", "Who answers at night?"]},
            **({"train": {"epochs": 1.0}} if train else {}),
            "evaluate": {"compare": True},
        }
    resolved = resolve(values, file.parent, str(source or file))
    rows = resolved.config.data
    if glob.has_magic(rows.path) or Path(resolved.place(rows.path)).exists():
        with reporting(quiet=session.quiet):  # a missing column is reported now, not by the run
            load_data(resolved.place(rows.path), columns=rows.columns, split=rows.split, limit=LOOKED_AT)
    save_schema(file.parent)
    with atomic(file) as temporary:
        temporary.write_text(commented(values, INTRODUCTION.format(name=file)), encoding="utf-8")
    if left and not session.quiet:
        err.print(f"not converted, because whence has no such setting: {', '.join(left)}", markup=False, soft_wrap=True)
    if source and (tuned := values["model"].get("path")) and not session.quiet:
        said = f"{tuned} holds the fine-tuned model: it is asked as it is, and nothing is trained (with `train` instead of"
        err.print(f"{said} `model.path` it is trained anew)", markup=False, soft_wrap=True)
    say(f"{file}: edit it, then {command('whence', 'run', file)}")

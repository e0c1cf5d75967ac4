"""Whole runs to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options
from whence.cli.from_settings import Only
from whence.cli.options import Session

Name = Annotated[str, typer.Argument(metavar="NAME", help="One that whence recipes ls lists.")]


def ls(as_json: options.AsJson = False) -> None:
    """List the recipes."""
    from whence.cli.console import print_json, say
    from whence.recipes import recipe_about, recipe_names

    if as_json:
        print_json({name: recipe_about(name) for name in recipe_names()})
        return
    for name in recipe_names():
        say(f"{name:<22} {recipe_about(name)}")


def cat(name: Name) -> None:
    """Print a recipe."""
    from whence.recipes import recipe_text

    print(recipe_text(name), end="")


def cp(
    *,
    name: Name,
    folder: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="New folder; default: NAME.")] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The small variant, which runs offline on weights made on the spot.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Data of the small variant, instead of the embedded corpus.")
    ] = None,
    columns: options.Columns,
    seed: options.Seed = 0,
    session: Annotated[Session, Only("quiet")],
) -> None:
    """Copy a recipe to a folder, to edit and run there.

    \b
    Examples
      whence recipes cp tinyllama-patents
      whence recipes cp tinyllama-patents small --tiny
      whence recipes cp tinyllama-patents mine --tiny --data questions.csv -c prompt=Question -c completion=Answer
    """
    from whence.cli.console import say, start
    from whence.escapes import command
    from whence.recipes import OFFLINE, copy_recipe

    target = folder or Path(name)
    if tiny or name in OFFLINE:
        with start(session):
            path = copy_recipe(name, target, tiny=tiny, data=data, columns=columns.columns or None, seed=seed)
    else:
        path = copy_recipe(name, target, tiny=tiny, data=data)
    say(f"{path}: {command('whence', 'run', path)}")

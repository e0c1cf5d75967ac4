"""The methods: how rows are scored."""

from __future__ import annotations

from dataclasses import MISSING
from inspect import cleandoc
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whence.cli import options

if TYPE_CHECKING:
    from whence.methods.base import Recipe

Name = Annotated[str, typer.Argument(metavar="NAME", help="One that whence methods ls lists.")]


def ls(as_json: options.AsJson = False) -> None:
    """List the methods: what each needs, what it costs, where it is from."""
    from whence.cli.console import print_json, print_table, say
    from whence.methods.base import recipes

    if as_json:
        print_json([about(recipe) for recipe in recipes().values()])
        return
    cells = [(each.name, each.title, needed(each), each.price, each.source) for each in recipes().values()]
    print_table(("name", "title", "needs", "price", "source"), cells, range(5), pad_edge=False, header_style="dim")
    say("next: whence methods show NAME, then whence score --method NAME")


def show(name: Name, as_json: options.AsJson = False) -> None:
    """Show a method: its formula, and its settings with their defaults.

    \b
    Examples
      whence methods show tracin
      whence score gpt2 -d train.jsonl --queries prompts.json --method cg --set iterations=50 -o runs/a/cg
    """
    from whence.cli.console import print_json, print_table, say
    from whence.methods.base import recipe_named

    recipe = recipe_named(name)
    found = about(recipe)
    if as_json:
        print_json(found)
        return
    say(f"{recipe.name}: {recipe.title}  ({recipe.source})", "bold")
    say(found["formula"])
    say("")
    say(f"needs: {needed(recipe)}; price: {recipe.price}", "dim")
    if not found["settings"]:
        say("settings: none", "dim")
        return
    cells = [(setting["name"], str(setting["default"]), setting["meaning"]) for setting in found["settings"]]
    print_table(("setting", "default", "meaning"), cells, range(3), pad_edge=False, header_style="dim")
    say(f"set one: whence score ... --method {recipe.name} --set {cells[0][0]}={cells[0][1]}", "dim")


def about(recipe: Recipe) -> dict[str, Any]:
    """Everything about a method, as JSON."""
    from whence.settings import settings_of

    settings = [
        {
            "name": each.name,
            "default": list(each.default) if isinstance(each.default, tuple) else each.default,
            "meaning": each.meaning,
        }
        for each in settings_of(recipe.settings)
        if each.default is not MISSING
    ]
    return {
        "name": recipe.name,
        "title": recipe.title,
        "source": recipe.source,
        "needs": list(recipe.needs),
        "uses": list(recipe.uses),
        "price": recipe.price,
        "formula": cleandoc(formula(recipe)),
        "settings": settings,
    }


def formula(recipe: Recipe) -> str:
    """What the function that makes the scores says of itself; that of its parts where some of its arguments are fixed."""
    return getattr(recipe.make, "func", recipe.make).__doc__ or ""


def needed(recipe: Recipe) -> str:
    """What it needs, and what it takes where there is some: "training, factors if any"."""
    return ", ".join([*recipe.needs, *(f"{name} if any" for name in recipe.uses if name not in recipe.needs)]) or "nothing"

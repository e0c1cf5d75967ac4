"""Whole runs to start from, as YAML: list them, read them, copy them, or copy a small variant that needs no network."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from whence.errors import UsageError

HOME = Path(__file__).parent
OFFLINE = ("demo",)
"""Recipes that are small and offline as they are."""


def recipe_names() -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in HOME.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe; UsageError for an unknown name."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        raise UsageError(
            f"There is no recipe {name!r}.",
            accepted=", ".join(recipe_names()),
            fix=f"did you mean {near[0]}?" if near else "whence recipes ls",
        )
    return (HOME / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_about(name: str) -> str:
    """The first sentence of a recipe's comment."""
    first = recipe_text(name).splitlines()[0].removeprefix("# ")
    return first.split(". ")[0].rstrip(".") + "."


def recipe_values(name: str) -> dict[str, Any]:
    """The settings of a recipe."""
    from whence.config.read import by_name
    from whence.config.schema import Config

    return by_name(yaml.safe_load(recipe_text(name)), Config, name)


def copy_recipe(
    name: str,
    folder: str | Path,
    *,
    tiny: bool = False,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """Write a recipe as `whence.yaml` into a new folder, with its prompts and the schema that editors read; gives the path.

    `tiny` makes the variant that runs offline on small weights, on the file `data` (with `columns` as in
    `load_data`) or else on the embedded corpus.
    Raises UsageError where the folder holds a `whence.yaml` already.
    """
    from whence.config.write import HEAD, save_schema
    from whence.shortage import shortages
    from whence.store.files import atomic

    folder = Path(folder)
    path = folder / "whence.yaml"
    text = recipe_text(name)
    prompts = HOME / f"{name}.prompts.json"
    for file in (path, *([folder / "prompts.json"] if prompts.exists() and not tiny else [])):
        if file.exists():
            raise UsageError(f"{file} exists, and nothing is overwritten.", fix="a different folder")
    if data is not None and not tiny:
        raise UsageError("--data is for the small variant.", fix="--tiny --data FILE, or edit data.path in the copy")
    if data is not None and "stages" in recipe_values(name):
        raise UsageError(f"{name} has data for each of its stages.", fix="without --data; then edit each `path` in the copy")
    with shortages(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if tiny or name in OFFLINE:
            from whence.recipes.tiny import write_tiny

            text = write_tiny(name, recipe_values(name), folder, data, columns, seed)
        else:
            text = HEAD + text
            if prompts.exists():
                shutil.copyfile(prompts, folder / "prompts.json")
    save_schema(folder)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path

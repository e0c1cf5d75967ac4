"""Print what a whence.yaml means: its settings as they are resolved, or their schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whence.cli import options


def show(
    file: options.File = Path("whence.yaml"),
    settings: options.Settings = None,
    origin: Annotated[bool, typer.Option("--origin", help="Show where each value comes from.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Print all settings as they are resolved: defaults, file, WHENCE_SECTION__KEY, --set."""
    import json

    from whence.cli.console import print_json, say
    from whence.config import read_config
    from whence.config.read import values_of

    resolved = read_config(file, settings or ())
    if as_json:
        print_json(resolved.config.as_json())
        return
    for name, value in values_of(resolved.config):
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        # of a mapping each entry may have come from elsewhere
        below = dict.fromkeys(where for part, where in resolved.origins.items() if part.startswith(f"{name}."))
        came = ", ".join(below) or next((resolved.origins[part] for part in above if part in resolved.origins), "default")
        line = f"{name} = {json.dumps(value, ensure_ascii=False, default=list)}"
        say(f"{line:<56} {came}" if origin else line)


def schema(
    stages: Annotated[bool, typer.Option("--stages", help="That of a stages.yaml, for whence score --through.")] = False,
) -> None:
    """Print the JSON Schema of a whence.yaml, for editors."""
    import json

    from whence.config import json_schema
    from whence.config.schema import Config, Stages

    print(json.dumps(json_schema(Stages if stages else Config), indent=1))

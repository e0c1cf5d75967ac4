"""What several commands share, each said once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from whence import settings
from whence.settings import Doc, Section

File = Annotated[Path, typer.Argument(metavar="[FILE]", help="The settings of the run, whence.yaml.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting over the file's, such as score.damping=0.2; repeat for more."),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder of a model, or folder of a LoRA adapter.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn.")]
Top = Annotated[int, typer.Option("--top", "-k", min=1, metavar="N", help="Rows to show that raise it most.")]
Norm = Annotated[
    Literal["cosine", "relatif", "length"] | None,
    typer.Option("--norm", help="Divide by what makes long or odd rows score high."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QueryColumns = Annotated[dict[str, str], Doc("The columns of the queries.", metavar="PART=COLUMN")]


@dataclass(frozen=True, kw_only=True)
class Columns(Section):
    """Which column of the data is what."""

    columns: settings.Columns = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Session(Section):
    """What a command does with what its folder holds, and what it says."""

    rerun: Annotated[bool, Doc("Move a folder made from something else aside and start again.")] = False
    as_json: Annotated[bool, Doc("Print one JSON document.", "--json")] = False
    quiet: Annotated[bool, Doc("No progress, notes or warnings.", "--quiet", "-q")] = False
    verbose: Annotated[bool, Doc("Also what the libraries beneath say.", "--verbose", "-v")] = False

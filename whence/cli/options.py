"""What several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from whence.cli.from_settings import said
from whence.errors import UsageError
from whence.settings import COLUMNS, SEED, Data, Section, Weights, setting, settings_of

File = Annotated[Path, typer.Argument(metavar="[FILE]", help="The settings of the run, whence.yaml.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting that overrides the file's, such as score.damping=0.2; repeat for more."
    ),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder of a model, or folder of a LoRA adapter.")]
ModelOrNone = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Hub id, folder of a model, or folder of a LoRA adapter.")
]
DataOrNone = Annotated[
    str,
    typer.Option(
        "--data", "-d", help=next(field.meaning for field in settings_of(Data) if field.name == "path"), show_default=False
    ),
]
Through = Annotated[
    Path | None,
    typer.Option(
        "--through",
        metavar="FILE",
        help="Instead of MODEL and --data: a file of trainings in a row, see whence config schema --stages.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help=SEED)]
Top = Annotated[int, typer.Option("--top", "-k", min=1, metavar="N", help="Rows to show that raise it most.")]
Norm = Annotated[
    Literal["cosine", "relatif", "length"] | None,
    typer.Option("--norm", help="Divide by what makes long or odd rows score high."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="CONDITION", help="Only rows that match: source=web, tokens>=20, text~word; repeat for more."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QUIET = "No progress, notes or warnings."
Quiet = Annotated[bool, typer.Option("--quiet", help=QUIET)]
QUERY_COLUMNS = "The columns of the queries."


class Columns(Section):
    """Which column of the data is what."""

    columns: dict[str, str] = setting({}, *COLUMNS, metavar="PART=COLUMN")


class Session(Section):
    """What a command does with what its folder holds, and what it says."""

    rerun: bool = setting(False, "Move a folder made from something else aside and start again.")
    as_json: bool = setting(False, "Print one JSON document.", "--json")
    quiet: bool = setting(False, QUIET, "--quiet")
    verbose: bool = setting(False, "Also messages of the libraries underneath.", "--verbose", "-v")


class OfTrainer(Section):
    """A training that whence did not make."""

    training: Path | None = setting(None, "RUN without a training: checkpoint-N of the Trainer that made its model.")
    arguments: dict[str, Any] = setting({}, "Arguments that this Trainer was given.", "--argument", metavar="NAME=VALUE")
    initial_adapter: str | None = setting(
        None,
        "If it trained an adapter: how that began, as a folder or the seed set before get_peft_model.",
        metavar="FOLDER|SEED",
    )


def says_itself(run: str) -> bool:
    """Whether a folder, or a file of settings, says which model and data it belongs to."""
    from whence.opened import OPENED, is_settings
    from whence.train.reading import record_of

    folder = Path(run).expanduser()
    said = is_settings(folder) or any((folder / name).is_file() for name in (OPENED, "whence.yaml"))
    return said or record_of(folder) is not None


def require_run(path: Path) -> None:
    """Raise UsageError unless it is the folder of a run."""
    if not (path / "whence.yaml").is_file():
        raise UsageError(f"{path} is not a run.", accepted="a folder that whence run made", fix="whence run whence.yaml")


def refuse_both(through: Path | None, model: str | None, data: str, allowed: Iterable[str], *, beside: str = "") -> None:
    """Raise UsageError where there are no model and data, or a file of stages beside what it says of each.

    `beside` is what else is accepted.
    """
    if through is None and not (model and data):
        raise UsageError(
            f"There is no {'--data' if model else 'MODEL'}.",
            accepted=f"MODEL --data DATA, {beside}or --through FILE for several trainings in a row",
        )
    own = sorted(said() - {"through", *allowed})
    if through is not None and own:
        name = {"model": "MODEL", "path": "--data"}.get(own[0], f"--{own[0].replace('_', '-')}")
        raise UsageError(f"{name} is for one training, and --through has several.", fix=f"set it for each in {through}")


def reading_said(data: Data, weights: Weights) -> dict[str, Any]:
    """What was said on the command line of how rows and model are read, for `whence.open`."""
    given = data.as_json() | weights.as_json()
    return {name: given[name] for name in said() - {"path"} if name in given}

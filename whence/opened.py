"""How the run in a folder was opened, noted beside what it made: with that the folder alone opens it again. Needs no torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whence.errors import DiskFull, StaleArtifact, UsageError
from whence.progress import note
from whence.store.files import write_json
from whence.store.intact import OPENED, intact, read_json

PLACES = ("model", "data", "adapter", "tokenizer", "chat_template", "factors", "index", "training")
"""Arguments of `whence.open` that may be paths."""


def remember(folder: Path, arguments: Mapping[str, Any], *, anew: bool = True) -> None:
    """Note the arguments of `whence.open` that opened the run in a folder. Paths below the folder move along with it.

    What the folder says already stays, unless it is to be said `anew`.
    """
    home = folder.absolute()

    def noted(value: str) -> str:
        path = Path(value).expanduser().absolute()
        if not _exists(str(path)):
            return value  # of the hub, or not a path
        return f"./{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)

    said = {name: value for name, value in arguments.items() if value not in (None, {})}
    document = {name: noted(str(value)) if name in PLACES else value for name, value in said.items()}
    file = folder / OPENED
    if file.is_file() and (not anew or read_json(file) == document):
        return
    try:
        write_json(file, document)
    except DiskFull as error:  # what was made is there all the same
        note(f"{folder} will not open by its name alone: {error.what}")


def remembered(folder: str | Path) -> dict[str, Any] | None:
    """The arguments of `whence.open` that opened the run in a folder; None where the folder does not say.

    Raises UsageError where the model or another part is no longer there, StaleArtifact for a damaged file.
    """
    file = Path(folder).expanduser() / OPENED
    if not file.is_file():
        return None
    arguments = read_json(intact(file))
    if not isinstance(arguments, dict) or not arguments.get("model"):
        raise StaleArtifact(
            f"{file} names no model.", fix=f"name the model and its data again, and this folder as --out, without {file}"
        )
    for name in PLACES:
        if (value := arguments.get(name, "")).startswith("./"):
            arguments[name] = value = str(file.parent / value)
        if os.path.isabs(value) and not _exists(value):
            raise UsageError(
                f"{folder} was made with the {name} {value}, which is no longer there.",
                fix=f"name the model and its data again, and this folder as --out (in Python: out={str(folder)!r})",
            )
    return arguments


def is_model(folder: str | Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any((Path(folder).expanduser() / name).is_file() for name in ("config.json", "adapter_config.json"))


def is_settings(file: str | Path) -> bool:
    """Whether a file is a `whence.yaml`, under whatever name."""
    path = Path(file).expanduser()
    return path.suffix in (".yaml", ".yml") and path.is_file()


def _exists(path: str) -> bool:
    return os.path.exists(path) or bool(glob.has_magic(path) and glob.glob(path, recursive=True))

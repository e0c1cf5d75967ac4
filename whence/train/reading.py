"""How a training read its rows, which factors, scores and questions about its model should keep to. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from whence.progress import note
from whence.settings import Data
from whence.store.intact import intact, read_json

RECORD = "training.json"
"""What a training records of itself, beside the folder of its model."""

READING = ("format", "normalise", "max_length", "chat_template", "append_eos")
"""The settings of the data that say how text is read."""


def record_of(model: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """What a training says of the model in this folder, and the file above it; None where none does.

    Raises StaleArtifact for a damaged file.
    """
    folder = Path(model).expanduser().absolute()
    for place in (folder, folder.parent, folder.parent.parent):  # a folder's own, above model/, above checkpoints/checkpoint-8/
        if folder.is_dir() and (file := place / RECORD).is_file():
            record = read_json(intact(file))
            if isinstance(record, dict) and any(isinstance(record.get(name), dict) for name in ("task", "reading", "rows")):
                return file, record
    return None


def reading_of(model: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """How the model in this folder read its rows in training, and the file that says so; see `record_of`.

    `max_length`, `append_eos`, and of a training that recorded them `format`, `normalise` and `chat_template`.
    """
    if (found := record_of(model)) is None:
        return None
    file, record = found
    task = {name: record["task"][name] for name in ("max_length", "append_eos") if name in record.get("task", {})}
    return file, {**task, **record.get("reading", {})}


def how_written(data: Data) -> dict[str, Any]:
    """What a training records of how its rows were written before they became tokens."""
    return {name: value for name, value in data.as_json().items() if name in ("format", "normalise")}


def as_trained(
    data: Data,
    said: Collection[str],
    *models: str | None,
    made: Mapping[str, Any] | None = None,
    names: Collection[str] = READING,
) -> Data:
    """The settings with what is not `said` as in training, or as in the provenance that factors or an index were `made` with.

    `names` are the settings that matter. `models` are the folders where a `training.json` may be above: an adapter, then the
    model. What comes from there is noted, with a warning where it is set differently.
    """
    if made is not None:
        then = {name: value for name, value in made.get("task", {}).items() if name in ("max_length", "append_eos")}
        data = data.changed(**{name: value for name, value in then.items() if name not in said})
        said = {*said, *then}
    file, reading = next(filter(None, map(reading_of, filter(None, models))), (None, {}))
    trained = data.changed(**{name: value for name, value in reading.items() if name in names})
    differing = [name for name in names if name in reading and getattr(trained, name) != getattr(data, name)]
    if taken := [name for name in differing if name not in said]:
        note(f"as in training ({file}): {', '.join(f'{name} {shown(getattr(trained, name))}' for name in taken)}")
    if other := [name for name in differing if name in said]:
        pairs = (f"{name} {shown(getattr(data, name))}, in training {shown(getattr(trained, name))}" for name in other)
        note(f"warning: not read as in training ({file}): {'; '.join(pairs)}")
    return data.changed(**{name: getattr(trained, name) for name in taken})


def shown(value: Any) -> str:
    """A setting for people, in a few words."""
    text = value if isinstance(value, str) else str(value.as_json()) if hasattr(value, "as_json") else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

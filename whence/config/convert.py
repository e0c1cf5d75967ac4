"""From the configuration of another pipeline to ours: its settings in our terms, and those that have no place here.

The other one has the sections `models`, `general`, `dataset`, `factors`, `scores`, `evaluation` and `output`, as Kronfluence
pipelines around a fine-tuned TinyLlama use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whence.config.plain_yaml import Unreadable, load_yaml
from whence.errors import UsageError
from whence.settings import Train, settings_of

DTYPES = {"bfloat16", "float16", "float32", "float64"}

MMLU = "mmlu_"
"""How lm-eval's names of the tasks begin."""


class _Reader:
    """Takes settings out of nested dictionaries and remembers which were taken."""

    def __init__(self, values: Mapping[str, Any]):
        self.values, self.taken = values, set[str]()

    def __call__(self, name: str, default: Any = None) -> Any:
        found: Any = self.values
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        self.taken.add(name)
        return found

    def left(self) -> list[str]:
        """Dotted names of what was not taken."""
        return [
            name for name in _names(self.values) if not any(name == took or name.startswith(f"{took}.") for took in self.taken)
        ]


def converted(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read such a file and convert it to our settings, see `convert`; a fine-tuned model that is there is not trained again."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, Unreadable, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read.", given=str(error)) from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings.", accepted="models, dataset, factors, scores")
    config, left = convert(values)
    tuned = _Reader(values)("models.finetuned.path")
    if tuned and (path.parent / Path(tuned).expanduser() / "config.json").is_file():
        config["model"]["path"] = tuned
        del config["train"]
    return config, left


def convert(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert the settings to ours; the second part lists those that have no counterpart.

    Raises UsageError where it has no model or no data.
    """
    read = _Reader(values)
    base, data = read("models.base.name"), read("dataset.name")
    if not base or not data:
        missing = ", ".join(name for name, value in (("models.base.name", base), ("dataset.name", data)) if not value)
        raise UsageError(
            "This configuration has no model or no data.", given=f"no {missing}", accepted="models, dataset, factors, scores"
        )
    rank = read("scores.query_gradient_rank")
    config: dict[str, Any] = {
        "run": str(read("models.finetuned.id", read("models.base.id")) or "run"),
        "seed": read("general.seed"),
        "model": {"base": base, "attention": "flash_attention_2" if read("general.use_flash_attention") else None},
        "data": _data(read, data),
        "prompts": {"path": read("general.prompts_file", "prompts.json")},
        "train": {"batch_size": 8, "learning_rate": 2e-5, **_without_none(_named(read, "training", TRAINING))},
        "fit": _fit(read),
        "inspect": _named(read, "factors", INSPECT),
        "score": {"rank": "full" if rank == -1 else rank},
        "evaluate": _evaluate(read),
        "report": {"top": read("scores.num_influential")},
    }
    read("models.finetuned.path")  # where training puts the model: ours is in the folder of the run
    return _without_none(config), read.left()


TRAINING = {field.trainer: field.name for field in settings_of(Train) if field.trainer}
INSPECT = {"inspection_layer": "layer", "visualization.clip_percentile": "clip_percentile", "visualization.cmap": "cmap"}


def _named(read: _Reader, section: str, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: read(f"{section}.{theirs}") for theirs, ours in names.items()}


def _data(read: _Reader, name: str) -> dict[str, Any]:
    columns = {"prompt": read("dataset.input_column"), "completion": read("dataset.output_column")}
    return {
        "path": name,
        "columns": columns if all(columns.values()) else None,
        "format": read("dataset.format"),
        "limit": read("dataset.num_samples"),
        "normalise": {"unicode": "NFKC"},
        "max_length": read("general.max_length"),
    }


def _fit(read: _Reader) -> dict[str, Any]:
    options = "factors.performance_options"
    partitions = [read(f"{options}.{kind}_module_partitions") for kind in ("covariance", "lambda")]
    chunks = [read(f"{options}.{kind}_data_partitions") for kind in ("covariance", "lambda")]
    dtype = read(f"{options}.dtype")
    return {
        "method": read("factors.strategy"),
        "modules": _modules(read),
        "examples": read("dataset.analysis_samples"),
        "groups": max((part for part in partitions if part), default=None),
        "chunks": max((part for part in chunks if part), default=None),
        "statistics": dtype if dtype in DTYPES else None,
    }


def _modules(read: _Reader) -> str | None:
    """Layers as globs on the names of their modules."""
    mode = read("factors.layers.mode", "all")
    chosen = read(f"factors.layers.{mode}") if mode != "all" else None
    if isinstance(chosen, Mapping):
        chosen = range(int(chosen["start"]), int(chosen["end"]) + 1)
    elif mode == "range" and isinstance(chosen, list):
        chosen = range(int(chosen[0]), int(chosen[1]) + 1)
    return ",".join(f"*.layers.{layer}.mlp.*" for layer in chosen) if chosen else None


def _evaluate(read: _Reader) -> dict[str, Any] | None:
    deep = "evaluation.deepeval"
    tasks = read(f"{deep}.tasks")
    if not tasks:
        return None
    benchmark = {
        "tasks": [MMLU + str(task).lower().removeprefix(MMLU) for task in tasks],
        "fewshot": read(f"{deep}.n_shots"),
        "base": read(f"{deep}.eval_base_model"),
        "tuned": read(f"{deep}.eval_finetuned_model"),
    }
    read(f"{deep}.benchmarks")
    return {"benchmark": benchmark}


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    cleaned = {key: _without_none(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in cleaned.items() if value is not None and value != {}}


def _names(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in values.items()
        for name in (_names(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"])
    ]

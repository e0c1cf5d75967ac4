"""Checkpoints of fine-tuning: the Trainer's own, a seal that says they are whole, and what attribution needs of them later.

checkpoint-N/
  model.safetensors, config.json, tokenizer ...   weights after step N (of LoRA: the adapter), loadable as they are
  second_moments.safetensors                      AdamW's `exp_avg_sq` of each parameter, by name
  learning_rates.npy                              of steps 1 to N, float64
  optimizer.pt, scheduler.pt, rng_state.pth ...   what resuming needs; only in the newest
  checkpoint.json                                 the seal, written last: step, epoch, learning rate, files, digests
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn

from whence.models import adapter_file, set_adapter
from whence.store.files import atomic, write_json
from whence.store.intact import SEAL, file_digest, intact, read_json, reading
from whence.store.manifest import load_tensors

MOMENTS, RATES = "second_moments.safetensors", "learning_rates.npy"
PREFIX = "checkpoint-"

RESUMING = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin")
"""Files that only resuming needs; the optimizer's is twice as large as the weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: the weights after `step` steps, which `whence.load_model` loads from `path`."""

    path: Path
    step: int
    epoch: float
    learning_rate: float
    """Of the last step before it."""
    resumable: bool
    """Whether training can go on from it."""
    unlogged: tuple[float, int] | None = None
    """Sum of the losses since the last that was logged, and the step of that; of older ones it is not known."""

    def load(self, model: nn.Module) -> None:
        """Put the weights into the model that was trained, in place."""
        load_weights(self.path, model)

    def second_moments(self) -> dict[str, Tensor]:
        """AdamW's running mean of each parameter's squared gradient, by the parameter's name; empty for other optimizers."""
        file = self.path / MOMENTS
        return load_tensors(intact(file)) if file.exists() else {}

    def learning_rates(self) -> np.ndarray:
        """Of each step so far, `[step]`."""
        with reading(intact(self.path / RATES)) as file:
            return np.load(file)


def find_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """List the whole checkpoints of a folder, oldest first; those that a kill left half-written are passed over."""
    found = [_read(path) for path in Path(folder).glob(f"{PREFIX}*")]
    return sorted((checkpoint for checkpoint in found if checkpoint is not None), key=lambda checkpoint: checkpoint.step)


def discard_unfinished(folder: Path) -> None:
    """Delete checkpoints that a kill left half-written."""
    for path in folder.glob(f"{PREFIX}*"):
        if _read(path) is None:
            shutil.rmtree(path)


def seal(path: Path, step: int, epoch: float, rates: Sequence[float], unlogged: tuple[float, int]) -> None:
    """Say that a checkpoint is whole, once all its files are on disk."""
    with atomic(path / RATES) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(rates, np.float64))
    about = {"step": step, "epoch": epoch, "learning_rate": rates[-1], "unlogged": unlogged, "resumable": True}
    _write_seal(path, about)


def save_moments(path: Path, model: nn.Module, optimizer: Any) -> None:
    """Save the optimizer's second moments by the names of the parameters, if it has any."""
    moments = {}
    for name, parameter in model.named_parameters():
        moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            moments[name] = moment.detach().to("cpu", copy=True).contiguous()
    if moments:
        with atomic(path / MOMENTS) as temporary:
            save_file(moments, temporary)


def thin(folder: Path, keep: int | None) -> None:
    """Keep the newest checkpoints, and only in the last of them what resuming needs."""
    found = find_checkpoints(folder)
    for place, checkpoint in enumerate(found[:-1]):
        if keep is not None and place < len(found) - keep:
            (checkpoint.path / SEAL).unlink()  # first: what is half-deleted must not look whole
            shutil.rmtree(checkpoint.path)
        else:
            if checkpoint.resumable:
                about = {name: getattr(checkpoint, name) for name in ("step", "epoch", "learning_rate", "unlogged")}
                known = read_json(checkpoint.path / SEAL).get("digests", {})
                _write_seal(checkpoint.path, {**about, "resumable": False}, RESUMING, known)
            for name in RESUMING:
                (checkpoint.path / name).unlink(missing_ok=True)


def _write_seal(path: Path, about: dict[str, Any], without: Sequence[str] = (), known: Mapping[str, str] = {}) -> None:
    there = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in (SEAL, *without)]
    for file in there:
        _sync(file)
    files = {file.relative_to(path).as_posix(): file for file in there}
    content = {
        **about,
        "files": {name: file.stat().st_size for name, file in files.items()},
        "digests": {name: known.get(name) or file_digest(file) for name, file in files.items()},
    }
    write_json(path / SEAL, content)


def _read(path: Path) -> Checkpoint | None:
    """Read a checkpoint's seal; None where it has none, or files are gone or cut short. StaleArtifact for a damaged seal."""
    if not (path / SEAL).is_file():
        return None
    about = read_json(path / SEAL)
    with reading(path / SEAL):
        files, _ = about.pop("files"), about.pop("digests", None)
        whole = all((path / name).is_file() and (path / name).stat().st_size == size for name, size in files.items())
        return Checkpoint(path, **about) if whole else None


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def load_weights(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into the model that it was made from, in place; StaleArtifact where files are damaged."""
    intact(path)
    from peft import PeftModel

    if isinstance(model, PeftModel):
        set_adapter(model, adapter_file(str(path)), str(path))
        return
    saved = {name: tensor for file in path.glob("model*.safetensors") for name, tensor in load_tensors(file).items()}
    if not saved.keys() <= model.state_dict().keys():  # transformers saves some models (mixtures of experts) under other names
        other, report = type(model).from_pretrained(path, dtype=model.dtype, output_loading_info=True)  # type: ignore[attr-defined]
        assert not report["missing_keys"], f"{path} holds another model: {report['missing_keys']}"
        saved = other.state_dict()
    missing, unexpected = model.load_state_dict(saved, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    counts = Counter(map(id, parameters.values()))
    aliases = {name for name, parameter in parameters.items() if counts[id(parameter)] > 1}
    assert not unexpected and set(missing) <= aliases, f"{path} holds another model: {missing} {unexpected}"

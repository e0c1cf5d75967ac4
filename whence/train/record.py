"""What a finished training leaves beside its model: what it read, in which order, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from whence.errors import UsageError
from whence.linalg.descent import Optimizer
from whence.store.digest import canonical_json, digest
from whence.store.files import atomic
from whence.store.intact import SEAL, reading
from whence.store.manifest import Folder
from whence.train.checkpoints import Checkpoint, find_checkpoints
from whence.train.metrics import FILE as METRICS
from whence.train.metrics import read_metrics
from whence.train.order import Order
from whence.train.reading import RECORD
from whence.train.replay import Descent, Replay

START = "start"
"""The shard with the trained weights before the first step, so that the training can be repeated."""

START_BYTES = 2**30
"""Larger weights are not kept there."""

OPTIMIZERS: dict[str, Literal["sgd", "adamw"]] = {"AdamW": "adamw", "SGD": "sgd"}
"""Classes of torch whose steps are known."""

SPLIT, STEPS, ROWS = "split.json", "steps.npz", "rows.jsonl"
MODEL, CHECKPOINTS = "model", "checkpoints"

PACKAGES = ("accelerate", "peft", "safetensors", "tokenizers", "torch", "transformers", "whence")


@dataclass(frozen=True)
class Training:
    """A finished training, as its folder records it."""

    path: Path
    about: dict[str, Any]
    """`training.json`."""
    split: dict[str, list[str]]
    """Ids of the rows: "train", "evaluation"."""
    steps: list[list[str]]
    """Ids of the rows of each step, in order."""
    learning_rates: np.ndarray
    """Of each step, float64."""
    metrics: list[dict[str, Any]]
    """Rows of `metrics.jsonl`; `whence.train.metrics.MEANING` says what the columns mean."""
    checkpoints: list[Checkpoint]

    @property
    def model(self) -> Path:
        """Folder of the trained weights, or adapter, and the tokenizer."""
        return self.path / MODEL

    def identity(self) -> dict[str, Any]:
        """What decides numbers that are made from it: which rows and rate each step had, and the checkpoints."""
        kept = {str(each.step): digest((each.path / SEAL).read_bytes()) for each in self.checkpoints}
        return {
            "steps": digest(canonical_json(self.steps)),
            "rates": digest(self.learning_rates.tobytes()),
            "checkpoints": kept,
        }

    @property
    def loss_scale(self) -> float:
        """How many times as large a row's loss is as what a step descended of it: its tokens, over what clipping left."""
        about, clip = self.about, self.about["settings"]["max_grad_norm"]
        norms = [row["grad_norm"] for row in self.metrics if row.get("grad_norm")]
        kept = float(np.mean([min(1.0, clip / norm) for norm in norms])) if clip and norms else 1.0
        return about["tokens"]["in_loss_per_epoch"] / about["rows"]["train"] / kept

    @property
    def logged(self) -> dict[int, float]:
        """The mean loss of the steps since the one logged before, by step, in nats per token."""
        return {row["step"]: row["loss"] for row in self.metrics if row.get("loss") is not None}

    def descent(self) -> Descent:
        """How it moved the weights; raises UsageError for an optimizer that is unknown here, or was not recorded."""
        known, chosen = self.about.get("optimizer", {}), self.about["settings"]
        given = known.get("name", "no record of it")
        variants = [name for name in ("nesterov", "dampening", "amsgrad", "maximize") if known.get(name)]
        if given not in OPTIMIZERS or variants:
            raise UsageError(
                "It is not known how the training's optimizer moved the weights.",
                given=" with ".join([given, *variants]),
                accepted="AdamW, and SGD with or without momentum",
                fix="train with --optimizer adamw_torch or sgd, or choose a method or damping that doesn't ask for it",
            )
        beta1, beta2 = known.get("betas", (0.9, 0.999))
        momentum, eps, clip = known.get("momentum", 0.0), known.get("eps", 1e-8), chosen["max_grad_norm"]
        optimizer = Optimizer(OPTIMIZERS[given], momentum, (beta1, beta2), eps, clip)
        return Descent(optimizer, chosen["weight_decay"], known["undecayed"])

    def replay(self) -> Replay:
        """How it is repeated; raises UsageError where that is impossible."""
        descent, chosen = self.descent(), self.about["settings"]
        kept = (self.path / f"{START}.safetensors").exists()
        if chosen["bf16"] or not kept:
            reason = (
                "it computed in bfloat16, whose rounding has no derivative"
                if kept
                else "the weights it began with are not kept"
            )
            raise UsageError(
                "This training can't be repeated step by step.",
                given=f"{self.path}: {reason}",
                accepted=f"a training in float32, of {START_BYTES >> 20:,} MiB of weights at most",
                fix="train again: whence train ... --no-bf16",
            )
        start = Folder.open(self.path).load(START)
        return Replay(start, self.steps, self.learning_rates, descent, per="token", batch_size=chosen["batch_size"])

    def update(self, model: nn.Module) -> float | None:
        """How far the training moved the weights, as a share of their length before; `model` is where it ended.

        None where those weights were not kept, or an adapter was trained, which begins at next to nothing.
        """
        if self.about["settings"].get("lora") or not (self.path / f"{START}.safetensors").exists():
            return None
        own, start = dict(model.named_parameters()), Folder.open(self.path).load(START)
        moved = sum(float((own[name].detach().cpu().float() - before.float()).square().sum()) for name, before in start.items())
        return math.sqrt(moved / sum(float(before.float().square().sum()) for before in start.values()))

    @property
    def rows(self) -> Path:
        """File of the rows trained on, as they were read: `load_data(..., columns={"id": "id"})` keeps their ids."""
        return self.path / ROWS


def read_training(path: str | Path) -> Training:
    """Open the folder of a finished training; raises StaleArtifact for one that is unfinished or damaged."""
    folder = Folder.open(path)
    if folder.provenance.get("stage") != "train":
        raise UsageError(
            f"{path} holds no training.", given=f"a {folder.provenance.get('stage')}", accepted="a folder of whence train"
        )
    split = folder.read_json(SPLIT)
    with reading(folder.intact(STEPS)) as file, np.load(file) as arrays:
        rows, ends, rates = arrays["rows"], arrays["ends"], arrays["learning_rates"]
    steps = [[split["train"][row] for row in step] for step in np.split(rows, ends[:-1])]
    checkpoints = find_checkpoints(folder.path / CHECKPOINTS)
    metrics = read_metrics(folder.intact(METRICS))
    return Training(folder.path, folder.read_json(RECORD), split, steps, rates, metrics, checkpoints)


def write_steps(path: Path, order: Order, rates: np.ndarray) -> None:
    """Write which rows each step read (`rows`, cut at `ends`; positions in split.json's "train") and its learning rate."""
    steps = list(order.by_step())
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            rows=np.concatenate([np.array(step, np.int32) for step in steps]),
            ends=np.cumsum([len(step) for step in steps]).astype(np.int64),
            learning_rates=rates,
        )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> None:
    """Write rows with their ids, one to a line."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for name, row in zip(ids, rows, strict=True):
            file.write(json.dumps({"id": name, **row}, ensure_ascii=False) + "\n")

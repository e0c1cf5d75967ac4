"""A training with the Trainer of transformers, as its own files tell it: for models that were not trained by `whence train`.

| file of a checkpoint | tells |
|---|---|
| `trainer_state.json` | how many steps there were, and of those that were logged the learning rate and the gradient's norm |
| `optimizer.pt` | AdamW's second moments or SGD's momentum, and weight decay |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.coverage import trained
from whence.engine.point import Point
from whence.errors import UsageError
from whence.linalg.descent import Optimizer
from whence.store.digest import digest
from whence.store.fingerprint import fingerprint_tensors
from whence.store.intact import read_json, reading
from whence.train.replay import Descent, Kept, Replay

STATE, OPTIMIZER = "trainer_state.json", "optimizer.pt"


def read_state(path: str | Path, point: Point, *, max_grad_norm: float = 1.0) -> State:
    """What a checkpoint of the Trainer tells of the training that ended at `point`, with the rows that it read.

    `path` is the folder `checkpoint-N`, or a `trainer_state.json`. Rates of steps that were not logged lie between those that
    were. `max_grad_norm` is the norm at which gradients were clipped (the Trainer's default; 0: never), which no file says.
    Raises UsageError where no learning rate was logged, or where the optimizer's state is that of another model.
    """
    path = Path(path).expanduser()
    file = path if path.name == STATE else path / STATE
    if not file.is_file():
        raise UsageError(f"There is no {STATE} in {path}", accepted="a folder checkpoint-N that the Trainer wrote")
    known = read_json(file)
    logged = [row for row in known.get("log_history", ()) if "learning_rate" in row and "step" in row]
    steps = int(known.get("global_step", 0))
    if not logged or steps < 1:
        raise UsageError(
            f"{file} tells no learning rate",
            given=f"{steps} steps, {len(logged)} logged with a learning rate",
            accepted="a training that logged some (logging_steps)",
            fix="Stage(..., rates=SUM) with the sum of the learning rates, where they are known from elsewhere",
        )
    at = [row["step"] for row in logged]
    rates = np.interp(np.arange(1, steps + 1), at, [row["learning_rate"] for row in logged])
    norms = [row["grad_norm"] for row in logged if row.get("grad_norm")]
    kept = float(np.mean([min(1.0, max_grad_norm / norm) for norm in norms])) if max_grad_norm and norms else 1.0
    descent, moments = None, {}
    if (optimizer := file.parent / OPTIMIZER).is_file():
        with reading(optimizer):
            saved = torch.load(optimizer, map_location="cpu", weights_only=True)
        descent, moments = _descent(saved, point.model, max_grad_norm)
    last = Kept(steps, float(rates[-1]), dict(point.model.named_parameters()), moments)
    losses = {row["step"]: row["loss"] for row in known["log_history"] if "loss" in row and "step" in row}
    return State(file, rates, [last], predictions_per_row(point) / kept, descent, losses)


@dataclass(frozen=True)
class State:
    """A training of which the Trainer's files tell; `checkpoints` has the last one."""

    path: Path
    learning_rates: np.ndarray
    """Of each step, float64."""
    checkpoints: Sequence[Kept]
    loss_scale: float
    """Tokens of a row in the loss, on average, over what clipping left."""
    known: Descent | None
    """How its optimizer moved the weights; None without its state."""
    logged: Mapping[int, float]
    """The mean loss of the steps since the one logged before, by step."""

    @property
    def steps(self) -> Sequence[Sequence[str]]:
        """As many as there were; which rows each read is not known."""
        return [()] * len(self.learning_rates)

    def identity(self) -> Any:
        """What decides numbers that are made from it."""
        moments = {str(each.step): fingerprint_tensors(each.moments) for each in self.checkpoints}
        return {"rates": digest(self.learning_rates.tobytes()), "moments": moments, "loss_scale": self.loss_scale}

    def descent(self) -> Descent:
        """How it moved the weights; raises UsageError where the optimizer's state is missing, or another than is known."""
        if self.known is None:
            raise UsageError(
                "It is not known how the training's optimizer moved the weights.",
                given=f"no {OPTIMIZER} of AdamW or SGD beside {self.path}",
                accepted="a checkpoint with the optimizer's state",
                fix="train with save_only_model=False, or say how far gradient descent would have gone: Stage(..., rates=SUM)",
            )
        return self.known

    def replay(self) -> Replay:
        """Raises UsageError: which rows each step read is not known."""
        raise UsageError(
            "This training can't be repeated step by step.",
            given=f"{self.path}: it doesn't tell which rows each step read",
            accepted="the folder of a training with whence train",
        )


def predictions_per_row(point: Point) -> float:
    """How many predictions the loss of a row adds up, on average: what a loss per token is to be multiplied by."""
    examples = point.examples
    return sum(point.task.predictions(examples.items[row]) for row in examples.usable) / len(examples.usable)


def _descent(saved: Mapping[str, Any], model: nn.Module, clip: float) -> tuple[Descent | None, dict[str, Tensor]]:
    """How the optimizer moved the weights, and AdamW's second moments by the parameters' names."""
    groups, state = saved["param_groups"], saved["state"]
    names = _names(model, [len(group["params"]) for group in groups])
    order = [number for group in groups for number in group["params"]]
    decays = [group.get("weight_decay", 0.0) for group in groups for _ in group["params"]]
    undecayed = [name for name, decay in zip(names, decays, strict=True) if not decay]
    first, decay = groups[0], max(decays)
    if first.get("nesterov") or first.get("dampening") or first.get("amsgrad") or first.get("maximize"):
        return None, {}
    if "betas" not in first:
        if "momentum" not in first:
            return None, {}
        return Descent(Optimizer("sgd", first["momentum"], clip=clip), decay, undecayed), {}
    found = {name: state[number]["exp_avg_sq"] for name, number in zip(names, order, strict=True) if number in state}
    own = dict(model.named_parameters())
    if wrong := [name for name, moment in found.items() if moment.shape != own[name].shape]:
        raise _another_model(f"second moments {tuple(found[wrong[0]].shape)} for {wrong[0]}, {tuple(own[wrong[0]].shape)}")
    return Descent(Optimizer("adamw", 0.0, tuple(first["betas"]), first["eps"], clip), decay, undecayed), found


def _names(model: nn.Module, sizes: Sequence[int]) -> list[str]:
    """The names of the optimizer's parameters in its order, as the Trainer puts them into groups: decayed ones first."""
    from transformers import Trainer

    moved = trained(model)
    names = [name for name, parameter in model.named_parameters() if id(parameter) in moved]
    if len(sizes) == 2:
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type] - it asks nothing of the Trainer
        names = sorted(names, key=lambda name: name not in decayed)
    if len(names) != sum(sizes):
        raise _another_model(f"{sum(sizes)} weights in the optimizer, {len(names)} that training moved in the model")
    return names


def _another_model(given: str) -> UsageError:
    return UsageError("The optimizer's state is that of another model.", given=given, accepted="the model of the checkpoint")

"""A training with the Trainer of transformers, as its own files tell it: for models that were not trained by `whence train`.

| file of a checkpoint | tells |
|---|---|
| `trainer_state.json` | how many steps there were, and of those that were logged the learning rate and the gradient's norm |
| `optimizer.pt` | AdamW's second moments or SGD's momentum, and weight decay |
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.coverage import trained
from whence.engine.point import Point
from whence.errors import UsageError
from whence.linalg.descent import Optimizer
from whence.store.digest import canonical_json, digest, plain
from whence.store.fingerprint import fingerprint_tensors
from whence.store.intact import read_json, reading
from whence.train.replay import Descent, Kept, Replay

STATE, OPTIMIZER = "trainer_state.json", "optimizer.pt"


def read_state(path: str | Path, point: Point, *, max_grad_norm: float = 1.0, learning_rate: float | None = None) -> State:
    """What a checkpoint of the Trainer tells of the training that ended at `point`, with the rows that it read.

    `path` is the folder `checkpoint-N`, or a `trainer_state.json`. Rates of steps that were not logged lie between those that
    were; where none was, every step has the `learning_rate`. `max_grad_norm` is the norm at which gradients were clipped (the
    Trainer's default; 0: never), which no file says.
    Raises UsageError where no learning rate was logged, or where the optimizer's state is that of another model.
    """
    path = Path(path).expanduser()
    file = path if path.name == STATE else path / STATE
    if not file.is_file():
        raise UsageError(f"There is no {STATE} in {path}", accepted="a folder checkpoint-N that the Trainer wrote")
    known = read_json(file)
    logged = [row for row in known.get("log_history", ()) if "learning_rate" in row and "step" in row]
    steps = int(known.get("global_step", 0))
    if (not logged and learning_rate is None) or steps < 1:
        raise UsageError(
            f"{file} tells no learning rate",
            given=f"{steps} steps, {len(logged)} logged with a learning rate",
            accepted="a training that logged some (logging_steps)",
            fix="to repeat it: --argument learning_rate=RATE, the highest; as a stage: Stage(..., rates=SUM), the sum of all",
        )
    at = [row["step"] for row in logged]
    known_rates = [row["learning_rate"] for row in logged]
    rates = np.interp(np.arange(1, steps + 1), at, known_rates) if logged else np.full(steps, learning_rate)
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
    how: Replay | None = None
    """How it is repeated, where somebody said it (`repeatable`)."""

    @property
    def steps(self) -> Sequence[Sequence[str]]:
        """As many as there were; which rows each read is not known."""
        return [()] * len(self.learning_rates)

    def identity(self) -> Any:
        """What decides numbers that are made from it."""
        moments = {str(each.step): fingerprint_tensors(each.moments) for each in self.checkpoints}
        known = {"rates": digest(self.learning_rates.tobytes()), "moments": moments, "loss_scale": self.loss_scale}
        if self.how is None:
            return known
        steps, start = digest(canonical_json(self.how.steps)), fingerprint_tensors(self.how.start)
        return {**known, "steps": steps, "start": start, "descent": plain(self.known)}

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
        """How it is repeated; raises UsageError where nobody said with which arguments it was made."""
        if self.how is not None:
            return self.how
        raise UsageError(
            "This training can't be repeated step by step.",
            given=f"{self.path}: it doesn't tell which rows each step read",
            accepted="the folder of a training with whence train, or repeatable(state, point, base, arguments)",
            fix="--training CHECKPOINT --argument learning_rate=5e-5 ... with the arguments that the Trainer was given",
        )


def repeatable(state: State, point: Point, base: nn.Module, arguments: Mapping[str, Any]) -> State:
    """The same training as one that can be repeated, from the weights of `base`.

    `arguments` are those of `transformers.TrainingArguments` that it was given; batch size, number of steps and learning rate
    are taken from its files where they are not among them. The Trainer itself is asked for the order of the rows and the rates,
    so that rows must be those it had, in their order. What no file says is noticed by where the repeated training ends.

    Raises UsageError for an argument that there is not, rates other than those that were logged, or a base that lacks weights.
    """
    from transformers import Trainer, TrainingArguments

    known = read_json(state.path)
    steps, descent = len(state.learning_rates), state.descent()
    told = {"per_device_train_batch_size": known.get("train_batch_size", 8), "max_steps": known.get("max_steps", steps)}
    told |= {"learning_rate": float(state.learning_rates.max())} if "learning_rate" not in arguments else {}
    before = random.getstate(), np.random.get_state()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        try:
            given = TrainingArguments(**{**told, **arguments, "output_dir": folder, "use_cpu": True, "report_to": "none"})
        except (TypeError, ValueError) as error:
            raise UsageError("These are not arguments of the Trainer.", given=str(error).splitlines()[0]) from error
        places: Any = range(len(point.examples))
        trainer = Trainer(nn.Linear(1, 1), given, lambda rows: {"rows": torch.tensor(rows)}, places)
        read = [
            [point.examples.ids[row] for row in rows] for rows, _ in zip(_steps_of(trainer, given), range(steps), strict=False)
        ]
        schedule = trainer.create_scheduler(given.max_steps, trainer.create_optimizer())
        rates = []
        for _ in range(steps):
            rates.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
    random.setstate(before[0])
    np.random.set_state(before[1])
    logged = {row["step"]: row["learning_rate"] for row in known["log_history"] if "learning_rate" in row and "step" in row}
    if wrong := [step for step, rate in logged.items() if abs(rates[step - 1] - rate) > 1e-3 * max(rates)]:
        raise UsageError(
            "The arguments are not those of the training.",
            given=f"a learning rate of {rates[wrong[0] - 1]:.4g} at step {wrong[0]}, where {logged[wrong[0]]:.4g} was logged",
            accepted="the learning_rate, lr_scheduler_type and warmup that the Trainer was given",
        )
    moved = trained(point.model)
    names = [name for name, parameter in point.model.named_parameters() if id(parameter) in moved]
    own = dict(base.named_parameters())
    if absent := [name for name in names if name not in own]:
        raise UsageError(
            "It is not known which weights the training began with.",
            given=f"no {absent[0]} in the base model",
            accepted="a base with every weight that was trained; of an adapter, one with the adapter as it began",
            fix="of an adapter: --initial-adapter FOLDER, saved before the training, or --initial-adapter SEED, which was set "
            "before get_peft_model (Python: whence.models.fresh_adapter)",
        )
    descent = replace(descent, optimizer=replace(descent.optimizer, clip=given.max_grad_norm))
    size = given.per_device_train_batch_size
    start = {name: own[name].detach().clone() for name in names}
    how = Replay(start, read, np.array(rates), descent, per="token", batch_size=size)
    return replace(state, learning_rates=how.learning_rates, known=descent, how=how)


def _steps_of(trainer: Any, arguments: Any) -> Iterator[list[int]]:
    """The rows that each step of the Trainer reads, epoch after epoch without end."""
    loader, epoch = trainer.get_train_dataloader(), 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        batches = [batch["rows"].tolist() for batch in loader]
        for start in range(0, len(batches), arguments.gradient_accumulation_steps):
            yield [row for batch in batches[start : start + arguments.gradient_accumulation_steps] for row in batch]
        epoch += 1


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

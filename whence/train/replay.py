"""A training that can be repeated step by step, and what methods read of any training.

A method is given a `History`: the folder of `whence train` (`whence.train.record.Training`), or a training that was `Recorded`
in memory. Its `replay()` says how to repeat it, and `Run` does so, with all trained weights in one vector.

`P` trained weights, `B` rows of a batch, `X` rows of an optimizer's state (`whence.linalg.descent`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from whence.engine.products import hessian_and_slopes, with_weights
from whence.engine.stream import Examples, to_device
from whence.errors import NumericalError, UsageError
from whence.linalg.descent import Optimizer
from whence.progress import note
from whence.store.digest import canonical_json, digest
from whence.store.fingerprint import fingerprint_tensors
from whence.tasks.base import Batch, Task

Parameters = Mapping[str, Tensor]
"""By name as in `model.named_parameters()`."""


class Snapshot(Protocol):
    """The weights after some step, on disk (`whence.train.checkpoints.Checkpoint`) or in memory (`Kept`)."""

    @property
    def step(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    def load(self, model: nn.Module) -> None: ...
    def second_moments(self) -> dict[str, Tensor]: ...


class History(Protocol):
    """What methods read of a training; `steps` are the ids of the rows of each step, `learning_rates` one for each step."""

    @property
    def steps(self) -> Sequence[Sequence[str]]: ...
    @property
    def learning_rates(self) -> np.ndarray: ...
    @property
    def checkpoints(self) -> Sequence[Snapshot]: ...
    @property
    def loss_scale(self) -> float:
        """How many times as large a row's loss is as what a step descended of it, on average."""
        ...

    @property
    def logged(self) -> Mapping[int, float]:
        """The mean loss of the steps since the one logged before, by step; empty where none was."""
        ...

    def identity(self) -> Any: ...
    def descent(self) -> Descent:
        """How it moved the weights; UsageError where that is not known."""
        ...

    def replay(self) -> Replay:
        """How it is repeated; UsageError where it can't be."""
        ...


@dataclass(frozen=True)
class Descent:
    """How a training moves weights along gradients."""

    optimizer: Optimizer
    weight_decay: float = 0.0
    undecayed: Collection[str] = ()
    """Parameters without weight decay."""


@dataclass(frozen=True)
class Replay:
    """How a training is repeated: where it began, what each step read, and how it moved the weights."""

    start: Parameters
    """The trained parameters before the first step; all others stayed as they are."""
    steps: Sequence[Sequence[str]]
    """Ids of the rows of each step."""
    learning_rates: np.ndarray
    descent: Descent
    per: Literal["row", "token"]
    """What a step's summed loss is divided by: the number of its rows, or of its tokens in the loss."""
    batch_size: int | None = None
    """Rows that went through the model at a time; None: those of a step."""
    added: Sequence[Sequence[str]] = ()
    """Ids of rows that each step reads besides; what its summed loss is divided by stays."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint in memory."""

    step: int
    learning_rate: float
    weights: Parameters
    moments: Parameters = field(default_factory=dict)

    def load(self, model: nn.Module) -> None:
        """Put the weights into the model that was trained, in place."""
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights.items():
                own[name].copy_(weight)

    def second_moments(self) -> dict[str, Tensor]:
        """AdamW's running mean of each parameter's squared gradient, by the parameter's name; empty for other optimizers."""
        return dict(self.moments)


@dataclass(frozen=True)
class Recorded:
    """A training in memory."""

    how: Replay
    checkpoints: Sequence[Kept]

    @property
    def steps(self) -> Sequence[Sequence[str]]:
        """Ids of the rows of each step."""
        return self.how.steps

    @property
    def learning_rates(self) -> np.ndarray:
        """Of each step."""
        return self.how.learning_rates

    @property
    def loss_scale(self) -> float:
        """Not scaled: `record` is given means over rows."""
        assert self.how.per == "row"
        return 1.0

    @property
    def logged(self) -> dict[int, float]:
        """Nothing was."""
        return {}

    def descent(self) -> Descent:
        """How it moved the weights."""
        return self.how.descent

    def replay(self) -> Replay:
        """How it is repeated."""
        return self.how

    def identity(self) -> Any:
        """What decides numbers that are made from it."""
        return {
            "steps": digest(canonical_json(self.steps)),
            "rates": digest(self.learning_rates.tobytes()),
            "start": fingerprint_tensors(self.how.start),
            "checkpoints": {str(each.step): fingerprint_tensors(each.weights) for each in self.checkpoints},
        }


def record(
    model: nn.Module, task: Task, examples: Examples, how: Replay, keep: Collection[int], advance: Callable[[int], None]
) -> Recorded:
    """Train as `how` says, with checkpoints after the steps `keep`."""
    run = Run(model, task, examples, how)
    state_XP, kept = run.start(), []
    for number in range(len(how.steps)):
        state_XP = run.step(number, state_XP, run.gradient(number, state_XP[0]))
        if number + 1 in keep:
            moments = run.named(state_XP[2]) if how.descent.optimizer.kind == "adamw" else {}
            kept.append(Kept(number + 1, float(how.learning_rates[number]), _copies(run.named(state_XP[0])), _copies(moments)))
        advance(1)
    return Recorded(how, kept)


def _copies(parameters: Parameters) -> Parameters:
    return {name: value.clone() for name, value in parameters.items()}


class Run:
    """A training at work on a copy of the model, in its dtype or in `dtype`; the model's own trained weights play no part.

    Raises UsageError where a row of the training is not among the examples.
    """

    def __init__(self, model: nn.Module, task: Task, examples: Examples, how: Replay, dtype: torch.dtype | None = None):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if dtype is not None:
            self.model.to(dtype)
        self.task, self.examples, self.how = task, examples, how
        own, places = dict(self.model.named_parameters()), {name: place for place, name in enumerate(examples.ids)}
        if absent := [name for name in how.start if name not in own or own[name].shape != how.start[name].shape]:
            raise UsageError(
                "The training was that of another model.",
                given=f"no parameter {absent[0]} of its shape in {type(model).__name__}",
                accepted="the model that was trained",
                fix="load the model from the training's folder",
            )
        if unknown := sorted({name for step in (*how.steps, *how.added) for name in step if name not in places}):
            raise UsageError(
                f"{len(unknown):,} rows that the training read are not among the rows.",
                given=f"{unknown[0]} is the first; {len(examples):,} rows",
                accepted="all rows of the training, with their ids",
                fix="give the rows that the training kept: FOLDER/rows.jsonl (Python: training.rows)",
            )
        self.shapes = {name: own[name].shape for name in how.start}
        like = next(iter(own.values()))
        decays = [0.0 if name in how.descent.undecayed else how.descent.weight_decay for name in self.shapes]
        sizes = torch.tensor([shape.numel() for shape in self.shapes.values()])
        self.decay_P = torch.tensor(decays).repeat_interleave(sizes).to(like)
        self.rows = [[places[name] for name in step] for step in how.steps]
        """Places of the rows of each step."""
        self.added = [[places[name] for name in step] for step in how.added] or [[]] * len(self.rows)
        self.device = like.device

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epochs(self) -> float:
        """How often a row is read, on average."""
        return sum(map(len, self.rows)) / len(set().union(*self.rows))

    def start(self) -> Tensor:
        """The state before the first step, `[X, P]`. Raises UsageError where random parts of the model forbid to repeat it."""
        refuse_random_parts(self.model)
        return self.how.descent.optimizer.begin(self.vector(self.how.start))

    def step(self, number: int, state_XP: Tensor, g_P: Tensor) -> Tensor:
        """The state after a step, counted from 0, along the gradient."""
        return self.how.descent.optimizer.step(state_XP, g_P, *self._moving(number))

    def pull(self, number: int, adjoints_QXP: Tensor, state_XP: Tensor, g_P: Tensor) -> tuple[Tensor, Tensor]:
        """Adjoints of the state before a step, the gradient held fixed, and of the gradient, `[Q, P]`."""
        return self.how.descent.optimizer.pull(adjoints_QXP, state_XP, g_P, *self._moving(number))

    def drift(self, end_P: Tensor, model: nn.Module, most: float) -> float:
        """How far from the model's weights the repeated training ends, as a share of how far it went.

        Raises NumericalError where that is more than `most`.
        """
        went_P, missed_P = end_P - self.start()[0], end_P - self.vector(dict(model.named_parameters()))
        drift = float(missed_P.norm() / went_P.norm())
        note(f"the training repeated ends {drift:.1e} of its way from the model")
        if not drift <= most:
            raise NumericalError(
                "The training repeated does not end at the model.",
                given=f"{drift:.2g} of its way from it, where {most:g} is allowed",
                accepted="the model that the training ended with, its own rows, and the task it was trained on",
                fix="compute in the format and on the kind of device that it was trained in and on; train again with a lower "
                "learning rate, where steps are so large that roundings grow; or allow more: --drift (Python: drift=...)",
            )
        return drift

    def gradient(self, number: int, theta_P: Tensor) -> Tensor:
        """The gradient of a step's loss at the weights, `[P]`."""
        total_P = torch.zeros_like(theta_P)
        for _, batch, share in self.batches(number):
            at = theta_P.detach().requires_grad_()
            with torch.enable_grad():
                loss = self.at(at, self.task.losses, batch).sum() * share
            total_P += torch.autograd.grad(loss, at)[0]
        return total_P

    def through(self, number: int, theta_P: Tensor, v_QP: Tensor, together: int) -> tuple[Tensor, Tensor]:
        """Derivatives of `<v, gradient>` of a step: by the weights, `[Q, P]`, and by what each example counts, `[Q, N]`."""
        curved_QP, slopes_QN = torch.zeros_like(v_QP), v_QP.new_zeros(len(v_QP), len(self.examples))
        for rows, batch, share in self.batches(number):
            curved, slopes_QN[:, rows] = hessian_and_slopes(self.losses(batch), theta_P, share * v_QP, together)
            curved_QP += curved
        return curved_QP, slopes_QN

    def losses(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The losses of a batch's rows, `[B]`, as a function of the weights that can be differentiated twice."""
        return lambda theta_P: self.at(theta_P, self.task.outputs, batch).losses()

    def at(self, theta_P: Tensor, function: Callable[[nn.Module, Batch], Any], batch: Batch) -> Any:
        """`function(model, batch)` where the model has the weights of the vector."""
        return with_weights(self.model, self.named(theta_P), function, batch)

    def batches(self, number: int) -> Iterator[tuple[list[int], Batch, float]]:
        """The batches of a step: places of their rows, what the model reads, and what their summed loss is multiplied by."""
        rows, size = self.rows[number], self.how.batch_size or len(self.rows[number])
        share = 1 / (
            len(rows) if self.how.per == "row" else sum(self.task.predictions(self.examples.items[row]) for row in rows)
        )
        for read in (rows, self.added[number]):  # those that were added in batches of their own: the others stay to the bit
            for start in range(0, len(read), size):
                part = read[start : start + size]
                yield part, self.batch([self.examples.items[row] for row in part]), share

    def batch(self, items: Sequence[Any]) -> Batch:
        """What the model reads of encoded items, on its device and in its dtype."""

        def moved(value: Any) -> Any:
            return value.to(self.decay_P) if isinstance(value, Tensor) and value.is_floating_point() else value

        return {key: moved(value) for key, value in to_device(self.task.collate(items), self.device).items()}

    def named(self, theta_P: Tensor) -> dict[str, Tensor]:
        """The parameters by name, as views of the vector `[..., P]`."""
        parts = theta_P.split([shape.numel() for shape in self.shapes.values()], -1)
        shaped = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(*part.shape[:-1], *shape) for (name, shape), part in shaped}

    def vector(self, parameters: Parameters) -> Tensor:
        """The vector of named parameters."""
        return torch.cat([parameters[name].detach().flatten() for name in self.shapes]).to(self.decay_P)

    def _moving(self, number: int) -> tuple[Tensor, float, int]:
        return self.decay_P, float(self.how.learning_rates[number]), number + 1


def refuse_random_parts(model: nn.Module) -> None:
    """Raise UsageError for what makes the loss of a row random or dependent on its neighbours in the batch."""
    for name, module in model.named_modules():
        # attention and recurrent layers keep it as a number: dropout, attention_dropout, ...
        rates = [value for key, value in vars(module).items() if "dropout" in key and isinstance(value, float)]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        if any(rate > 0 for rate in rates):
            raise UsageError(
                "A model with dropout can't be trained twice to the same weights",
                given=f"{name or type(module).__name__}: {module}"[:120],
                fix="build it with dropout 0 (of a Hugging Face config: attention_dropout=0, hidden_dropout=0, ...)",
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UsageError(
                "Batch statistics mix the rows of a batch, so that no row's loss is its own",
                given=f"{name}: {module}"[:120],
                fix="use LayerNorm or GroupNorm",
            )

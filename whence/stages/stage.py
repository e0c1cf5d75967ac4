"""One training in a row of trainings, and what it does to the weights that it began with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from whence.engine.point import Point
from whence.errors import UsageError
from whence.fitting.curvature import Curvature
from whence.operators import BlockDiagonal, Operator, Spectral
from whence.settings import AtLeastZero, Count, Fit, Positive, valid
from whence.train.replay import History

Transport = Literal["flow", "proximal", "inverse", "identity"]
Formed = Literal["gauss-newton", "hessian", "fisher", "empirical-fisher"]

FACTORED = ("ekfac", "kfac", "shampoo", "diagonal")
FORMED: tuple[str, ...] = get_args(Formed)


@dataclass(frozen=True)
class Stage:
    """One training in a row of trainings: the weights where it ended, and the rows it read.

        pretraining = Stage("pretraining", Point(base, task, corpus), curvature=whence.open_factors("runs/base/factors"))
        finetuning = Stage("finetuning", Point(tuned, task, examples), training=read_training("runs/tuned/train"))

    Raises UsageError for a value that can't be.
    """

    name: str
    """"pretraining", "finetuning": also its folder."""
    point: Point
    """The model at the end of this training, the task, and the rows that were trained on."""
    curvature: Curvature | BlockDiagonal | Spectral | Fit | str | None = None
    """Of the mean loss of a row, fitted on this stage's own rows at its end; or how it is made: "ekfac" (default), "kfac",
    "shampoo" or "diagonal" is fitted, as are settings of `whence.fit`; "gauss-newton", "hessian", "fisher" or
    "empirical-fisher" formed."""
    training: History | None = None
    """The training: what `whence.train.record.read_training` reads, or `whence.train.state.read_state`."""
    rates: float | None = None
    """Where there is none: the sum of the learning rates of its steps, each along the mean loss of a token (of a row where
    rows have one prediction), by gradient descent without momentum."""
    transport: Transport | Operator = "flow"
    """How weights of the stage before reach this stage's end: by gradient flow, by a proximal step, not at all ("inverse": as
    was published, for comparison), unchanged ("identity"), or by an operator of your own on gradients at this stage's end."""
    proximal: float | None = None
    """`alpha` of the proximal step `alpha / 2 |theta - theta_before|^2` beside the loss that was descended; default:
    1 / sum of learning rates."""
    renamed: Mapping[str, str | None] = field(default_factory=dict)
    """What a module of this stage is called in the stage before where that differs; None for one that is new in spite of its
    name. A `*` on both sides stands for anything: {"encoder.*": "transformer.*"}."""
    head: Literal["cross", "none"] = "cross"
    """What is done with modules that this training moved and the stage before lacks, such as a new head, or adapters in a model
    that is frozen: "cross" takes them to follow the trunk that they were fitted to (`whence.stages.heads.CrossTerm`), "none"
    leaves them out. Their damping is `damping` or `absolute_damping` where given, else that of the training."""
    modules: str | Sequence[str] | None = None
    """What is tracked where no curvature says it, as `whence.fit` takes it."""
    damping: float | Literal["training"] | None = None
    """Of this stage's inverse, instead of that of `multistage`. A short fine-tuning wants "training": with less damping its
    rows' values are those of a training to the end."""
    absolute_damping: float | None = None
    """The same damping for all weights as a number."""
    n_train: int | None = None
    """Rows that were trained on, where `point` has only some of them."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UsageError(
                "A stage is named by what can be the name of a folder",
                given=repr(self.name),
                accepted="letters, digits, - _ and . (not at the start)",
            )
        valid(Positive | None, self.rates, "rates")
        valid(Positive | None, self.proximal, "proximal")
        valid(AtLeastZero | Literal["training"] | None, self.damping, "damping")
        valid(AtLeastZero | None, self.absolute_damping, "absolute_damping")
        valid(Literal["cross", "none"], self.head, "head")
        valid(Count | None, self.n_train, "n_train")
        if not isinstance(self.transport, Operator):
            valid(Transport, self.transport, "transport")
        if isinstance(self.curvature, str) and self.curvature not in (*FACTORED, *FORMED):
            raise UsageError(
                f"There is no curvature {self.curvature!r}", accepted=", ".join((*FACTORED, *FORMED)) + ", or what was fitted"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The tracked modules: those of the curvature that is given, else `modules`, else the task's default."""
        if isinstance(self.curvature, Curvature):
            return self.curvature.operator.names
        if isinstance(self.curvature, BlockDiagonal | Spectral):
            return self.curvature.names
        chosen = self.curvature.modules if isinstance(self.curvature, Fit) else None
        return tuple(self.point.cover(self.modules or chosen).sites)

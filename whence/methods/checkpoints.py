"""Influence averaged over the checkpoints of the training: rows are read where they still had something to teach."""

from __future__ import annotations

from whence.errors import UsageError
from whence.methods.base import Recipe, Request
from whence.methods.damping import Damped, damped_inverse
from whence.settings import Share, setting
from whence.store.scores import Scores


class Along(Damped):
    """Which checkpoints are read, and how the curvature is damped."""

    start: Share = setting(0.125, "Share of the steps before the first checkpoint that counts: initial weights say little.")


def checkpoint_mean(request: Request, settings: Along) -> Scores:
    """`mean over c of grad m(query; theta_c)^T (G + damping)^-1 grad log p(row; theta_c)`, `G` being the model's own.

    The sum of TracIn (Pruthi et al. 2020, section 3.2) over checkpoints that count alike, in the metric of influence functions.
    """
    assert request.training is not None
    operator = damped_inverse(request, settings, request.curvature())
    first = settings.start * len(request.training.steps)
    parts = [
        request.score(operator, f"checkpoint-{checkpoint.step}", point=point)
        for checkpoint, point in request.checkpoints()
        if checkpoint.step >= first
    ]
    if not parts:
        raise UsageError(
            "No checkpoint is left to take the mean over",
            given=f"start={settings.start:g}; the last is that of step {request.kept_checkpoints()[-1].step}",
            accepted=f"checkpoints from step {first:g} on, of {len(request.training.steps)}",
            fix="a smaller start, or whence train ... --keep 8 --save-steps N",
        )
    return Scores.mean(parts).named(f"mean over {len(parts)} checkpoints of {operator.label}")


RECIPES = (
    Recipe(
        "checkpoint-mean",
        "Mean over checkpoints",
        "Pruthi et al. 2020, section 3.2, in the metric of Grosse et al. 2023",
        checkpoint_mean,
        Along,
        needs=("training",),
        uses=("factors",),
        price="a fit, and a pass over the rows for each checkpoint",
    ),
)

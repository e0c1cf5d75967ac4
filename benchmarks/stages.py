"""Which formula tells what a row of the first training did to the model of the second? Trainings that can be repeated exactly.

    python -m benchmarks.stages

A logistic regression with 20 weights is trained to its minimum and then fine-tuned on other rows: to the minimum of a proximal
problem, or by some steps of gradient descent. What each row of the first training did is known: both trainings are repeated
without it, in float64, in plain torch that shares no code with what is measured. Writes stages.json and stages.md: Pearson
correlation over the rows of the first training, the mean over 30 queries, of `whence.multistage` with each transport and of
what knows one stage only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.engine.point import Point
from whence.gradients import Dense, Gradients
from whence.methods.base import attribute
from whence.operators import Operator
from whence.progress import Silent, report_to
from whence.stages import Stage, multistage
from whence.store.files import atomic
from whence.tasks import Classification

RESULTS = Path(__file__).parent / "results"

WEIGHTS, ROWS, TUNING_ROWS, QUERIES = 20, 300, 100, 30
RIDGE = 1e-2
"""Of the first training: `RIDGE / 2 |w|^2` beside the mean loss."""
RATE = 0.5
"""Of the steps of gradient descent."""
SPREADS = (3.0, 4.5)
"""Standard deviation of the logits that labels are drawn with: some doubt about them, and little."""
PUBLISHED = 1e-4
"""The damping of the fine-tuned model's curvature that was published, whatever the fine-tuning."""

FINE_TUNINGS: dict[str, dict[str, Any]] = {
    **{f"prox {alpha:g}": {"alpha": alpha} for alpha in (1e-3, 1e-2, 1e-1)},
    **{f"GD {steps}": {"steps": steps} for steps in (5, 50, 500)},
}


class Logit(nn.Module):
    """Two classes, told apart by one number."""

    def __init__(self, w_P: Tensor):
        super().__init__()
        self.linear = nn.Linear(len(w_P), 1, bias=False, dtype=w_P.dtype)
        self.linear.weight.data = w_P[None].clone()

    def forward(self, x_BP: Tensor) -> Tensor:
        """Logits, `[B, 2]`."""
        z_B1 = self.linear(x_BP)
        return torch.cat([torch.zeros_like(z_B1), z_B1], -1)


@dataclass(frozen=True)
class Labelled:
    """Inputs `[N, P]` and labels `[N]`, 0 or 1, in float64."""

    x_NP: Tensor
    y_N: Tensor

    @property
    def rows(self) -> list[tuple[Tensor, int]]:
        """As a task takes them."""
        return [(x_P, int(y)) for x_P, y in zip(self.x_NP, self.y_N, strict=True)]

    def log_p(self, w_KP: Tensor) -> Tensor:
        """Log-probability of each label at each of `K` weight vectors, `[K, N]`."""
        return nn.functional.logsigmoid((2 * self.y_N - 1) * (w_KP @ self.x_NP.T))

    def slope(self, w_KP: Tensor, counts_KN: Tensor) -> Tensor:
        """Gradient of the loss in which each row counts so much, over the number of rows, `[K, P]`."""
        return (counts_KN * ((w_KP @ self.x_NP.T).sigmoid() - self.y_N)) @ self.x_NP / len(self.y_N)

    def bend(self, w_KP: Tensor, counts_KN: Tensor) -> Tensor:
        """Its Hessian, `[K, P, P]`."""
        p_KN = (w_KP @ self.x_NP.T).sigmoid()
        return torch.einsum("kn,np,nq->kpq", counts_KN * p_KN * (1 - p_KN), self.x_NP, self.x_NP) / len(self.y_N)


def drawn(rows: int, w_P: Tensor, spread: float, generator: torch.Generator) -> Labelled:
    """Inputs of directions that differ in size, and labels of a logistic model, whose logits have about that spread."""
    sizes_P = torch.logspace(0, -1.5, len(w_P), dtype=torch.float64)
    x_NP = torch.randn(rows, len(w_P), generator=generator, dtype=torch.float64) * (spread * sizes_P / sizes_P.norm())
    y_N = (torch.rand(rows, generator=generator, dtype=torch.float64) < (x_NP @ w_P).sigmoid()).double()
    return Labelled(x_NP, y_N)


def minimum(rows: Labelled, counts_KN: Tensor, ridge: float, around_KP: Tensor) -> Tensor:
    """Where the loss and `ridge / 2 |w - around|^2` are smallest, `[K, P]`: by Newton's method, to the last digit."""
    w_KP, eye_PP = around_KP.clone(), torch.eye(around_KP.shape[1], dtype=torch.float64)
    for _ in range(100):
        slope_KP = rows.slope(w_KP, counts_KN) + ridge * (w_KP - around_KP)
        if float(slope_KP.abs().max()) < 1e-13:
            return w_KP
        step_KP = torch.linalg.solve(rows.bend(w_KP, counts_KN) + ridge * eye_PP, slope_KP)
        w_KP = w_KP - step_KP * (2 / step_KP.norm(dim=1, keepdim=True)).clamp(max=1)
    raise ArithmeticError("Newton's method did not end")


@dataclass(frozen=True)
class World:
    """Rows of both trainings, queries, and how the second went: `alpha` or `steps`."""

    first: Labelled
    second: Labelled
    queries: Labelled
    alpha: float = 0.0
    steps: int = 0

    @classmethod
    def make(cls, seed: int = 0, spread: float = SPREADS[0], **tuning: Any) -> World:
        """The labels of the first training are those of one model, the others of its mean with another."""
        generator = torch.Generator().manual_seed(seed)
        one_P, other_P = torch.randn(2, WEIGHTS, generator=generator, dtype=torch.float64)
        both_P = (one_P + other_P) / 2**0.5
        first, second = drawn(ROWS, one_P, spread, generator), drawn(TUNING_ROWS, both_P, spread, generator)
        return cls(first, second, drawn(QUERIES, both_P, spread, generator), **tuning)

    @property
    def rates(self) -> float:
        """The sum of the learning rates; of a proximal problem the one that goes as far."""
        return RATE * self.steps or 1 / self.alpha

    def pretrain(self, counts_KN: Tensor) -> Tensor:
        """The first training with rows that count so much, `[K, P]`."""
        return minimum(self.first, counts_KN, RIDGE, torch.zeros(len(counts_KN), WEIGHTS, dtype=torch.float64))

    def tune(self, w_KP: Tensor) -> Tensor:
        """The second from these weights."""
        counts_KN = torch.ones(len(w_KP), len(self.second.y_N), dtype=torch.float64)
        if self.alpha:
            return minimum(self.second, counts_KN, self.alpha, w_KP)
        for _ in range(self.steps):
            w_KP = w_KP - RATE * self.second.slope(w_KP, counts_KN)
        return w_KP

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """After the first and the second training, `[P]` each."""
        w_KP = self.pretrain(torch.ones(1, ROWS, dtype=torch.float64))
        return w_KP[0], self.tune(w_KP)[0]

    @cached_property
    def truth(self) -> np.ndarray:
        """What each row of the first training did to log p of the queries: both trainings without it, `[Q, N]`."""
        without_KP = self.tune(self.pretrain(1 - torch.eye(ROWS, dtype=torch.float64)))
        return (self.queries.log_p(self.weights[1][None]) - self.queries.log_p(without_KP)).T.numpy()

    @cached_property
    def transported(self) -> Tensor:
        """The derivative of the tuned weights by those before, `[P, P]`: nothing is approximated."""
        eye_PP, one = torch.eye(WEIGHTS, dtype=torch.float64), torch.ones(1, TUNING_ROWS, dtype=torch.float64)
        if self.alpha:
            return self.alpha * torch.linalg.inv(self.second.bend(self.weights[1][None], one)[0] + self.alpha * eye_PP)
        w_P, result_PP = self.weights[0], eye_PP
        for _ in range(self.steps):
            result_PP = (eye_PP - RATE * self.second.bend(w_P[None], one)[0]) @ result_PP
            w_P = w_P - RATE * self.second.slope(w_P[None], one)[0]
        return result_PP


class Exact(Operator):
    """A transport that is known, `[P, P]`, over the one module that there is."""

    names, label = ("linear",), "the derivative itself"

    def __init__(self, transport_PP: Tensor):
        self.transport_PP = transport_PP

    def apply_to(self, gradients: Gradients) -> Gradients:
        """From gradients at the end to gradients at the beginning."""
        return {"linear": Dense(gradients["linear"].dense().w_BOI @ self.transport_PP)}

    def identity(self) -> Any:
        """The matrix."""
        return {"transport": self.transport_PP}


def estimators(world: World) -> dict[str, Callable[[], np.ndarray]]:
    """By name, what gives scores `[Q, N]` of the rows of the first training for each query."""
    task, queries = Classification(), world.queries.rows
    before, after = (Point(Logit(w_P), task) for w_P in world.weights)
    rows, tuning_rows = (Point(at.model, task, own.rows) for at, own in ((before, world.first), (after, world.second)))

    def staged(curvature: str = "gauss-newton", **how: Any) -> Callable[[], np.ndarray]:
        first = Stage("first", rows, curvature=curvature, absolute_damping=RIDGE)
        second = Stage("second", tuning_rows, curvature=curvature, **how)
        return lambda: multistage([first, second], queries).stages["first"].values

    def single(method: str, **own: Any) -> Callable[[], np.ndarray]:
        return lambda: attribute(method, after.model, task, queries, world.first.rows, **own).values

    return {
        "matching transport": staged(transport=Exact(world.transported)),
        "gradient flow": staged(rates=world.rates),
        "proximal, alpha = 1 / sum of rates": staged(rates=world.rates, transport="proximal"),
        "gradient flow, EK-FAC": staged("ekfac", rates=world.rates),
        "inverse, 1e-4 (published)": staged(transport="inverse", proximal=PUBLISHED),
        "identity": staged(transport="identity"),
        "single-stage at the tuned weights": single("gauss-newton", absolute_damping=RIDGE),
        "gradient dot at the tuned weights": single("gradient-dot"),
    }


def correlation(estimate_QN: np.ndarray, truth_QN: np.ndarray) -> float:
    """Pearson over the rows, the mean over the queries."""
    return float(np.mean([np.corrcoef(found, true)[0, 1] for found, true in zip(estimate_QN, truth_QN, strict=True)]))


def measure(name: str, seed: int = 0, spread: float = SPREADS[0], only: Collection[str] = ()) -> dict[str, float]:
    """Correlation with the truth by estimator, for one of `FINE_TUNINGS`."""
    world = World.make(seed, spread, **FINE_TUNINGS[name])
    with report_to(Silent()):
        chosen = {each: scores for each, scores in estimators(world).items() if not only or each in only}
        return {estimator: correlation(scores(), world.truth) for estimator, scores in chosen.items()}


def page(found: Mapping[str, Mapping[str, Mapping[str, float]]], seeds: int) -> str:
    """What was measured, in Markdown: for each spread of logits a row for each estimator, a column for each fine-tuning."""
    lines = [
        "# Two trainings, repeated without each row",
        "",
        f"A logistic regression of {WEIGHTS} weights is trained to its minimum on {ROWS} rows and fine-tuned on {TUNING_ROWS}",
        "others: to the minimum of a proximal problem (`prox alpha`), or by steps of gradient descent (`GD steps`). Both",
        "trainings are repeated without each row of the first, in float64. Pearson correlation of estimates with what that",
        f"changed, over the {ROWS} rows; the mean over {QUERIES} queries and {seeds} pairs of trainings. Curvature is the",
        "Gauss-Newton matrix unless it is said otherwise; the matching transport is the derivative of the tuned weights by",
        "those before, with nothing approximated, and ends below 1 only because leaving a row out is more than a slope. A",
        "proximal problem has no learning rates: in its columns they sum to 1 / alpha.",
        "",
        "`python -m benchmarks.stages` makes this page.",
    ]
    for spread, columns in found.items():
        lines += ["", f"Labels are drawn with logits of a standard deviation of {spread}:", ""]
        lines += [f"| estimator | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for estimator in next(iter(columns.values())):
            lines.append(f"| {estimator} | {' | '.join(f'{column[estimator]:.3f}' for column in columns.values())} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write stages.json and stages.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of stages.json and stages.md")
    parser.add_argument("--seeds", type=int, default=3, help="worlds; values are their mean")
    chosen = parser.parse_args(arguments)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for spread in SPREADS:
        columns = found[f"{spread:g}"] = {}
        for name in FINE_TUNINGS:
            several = [measure(name, seed, spread) for seed in range(chosen.seeds)]
            columns[name] = {each: round(float(np.mean([one[each] for one in several])), 4) for each in several[0]}
    text = page(found, chosen.seeds)
    print(text, flush=True)
    with atomic(chosen.out / "stages.json") as temporary:
        temporary.write_text(json.dumps({"seeds": chosen.seeds, "pearson": found}, indent=1) + "\n", encoding="utf-8")
    with atomic(chosen.out / "stages.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Two trainings in a row of a net of 27 weights and a head, each to its optimum, as functions of one vector in float64.

The second begins with the trunk of the first, and has a head of its own. Newton's method finds optima to the last digits, so
that finite differences of the whole are exact enough to be the truth. A weight matrix has its bias as its last column.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from whence.tasks import Classification

WIDTH, TRUNK = 4, {"trunk.0": (3, 5), "trunk.2": (3, 4)}
SIZES = {"trunk": 27, "before": 12, "after": 8}
"""Weights of the trunk, and of the heads: three classes before, two after."""

DECAY = {"before": 0.02, "after": 0.05}
"""Weight decay of each training."""

CHANGED = 12
"""Rows of the first training whose weight is changed."""

Function = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Two layers, and a head of that name."""

    def __init__(self, head: str, classes: int):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
        self.add_module(head, nn.Linear(3, classes))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.head)(self.trunk(x))


def net(head: str, theta: Tensor) -> Net:
    """The net with these weights."""
    model = Net(head, (len(theta) - SIZES["trunk"]) // 4).double().eval()
    for module, matrix in zip((model.trunk[0], model.trunk[2], model.get_submodule(head)), matrices(theta), strict=True):
        module.weight.data.copy_(matrix[:, :-1])
        module.bias.data.copy_(matrix[:, -1])
    return model


def matrices(theta: Tensor) -> list[Tensor]:
    """The weights of each layer."""
    first, second, head = theta.split([15, 12, len(theta) - SIZES["trunk"]])
    return [first.view(3, 5), second.view(3, 4), head.view(-1, 4)]


def log_p(theta: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """Log-probability of each row's class, `[N]`."""
    x, labels = rows
    *layers, head = matrices(theta)
    for w in layers:
        x = torch.tanh(x @ w[:, :-1].T + w[:, -1])
    return (x @ head[:, :-1].T + head[:, -1]).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def optimum(loss: Function, start: Tensor) -> tuple[Tensor, Tensor]:
    """Where the gradient is zero, by L-BFGS and then Newton's method, and the inverse Hessian there."""
    theta = start.clone().requires_grad_()
    descent = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> float:
        theta.grad = torch.func.grad(loss)(theta.detach())
        return float(loss(theta.detach()))

    descent.step(closure)
    inverse = torch.linalg.inv(torch.func.hessian(loss)(theta.detach()))
    assert torch.linalg.eigvalsh(inverse)[0] > 0
    return moved(loss, (theta.detach(), inverse)), inverse


def moved(loss: Function, optimum: tuple[Tensor, Tensor]) -> Tensor:
    """Where the optimum is of a loss that differs by little."""
    theta, inverse = optimum
    for _ in range(30):
        gradient = torch.func.grad(loss)(theta)
        if gradient.norm() < 1e-13:
            return theta
        theta = theta - inverse @ gradient
    raise AssertionError(f"no optimum: {float(gradient.norm()):g}")


def labelled(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    mix = torch.randn(WIDTH, classes, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return x, ((x + 0.5 * x**2) @ mix + noise).argmax(-1)


def pairs(rows: tuple[Tensor, Tensor]) -> list[tuple[Tensor, int]]:
    return [(x, int(label)) for x, label in zip(*rows, strict=True)]


class TwoStages:
    """The rows of both, and where both end; `alpha` holds the trunk where it was (None: frozen)."""

    def __init__(self, alpha: float | None = None):
        self.alpha, self.task = alpha, Classification()
        self.rows = {"before": labelled(30, 3, 1), "after": labelled(24, 2, 2)}
        self.queries = labelled(4, 2, 3)
        draw = lambda size: 0.5 * torch.randn(size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)  # noqa: E731
        self.first = optimum(self.pretraining, draw(SIZES["trunk"] + SIZES["before"]))
        self.before = self.first[0]
        start = draw(SIZES["after"]) if alpha is None else torch.cat([self.before[: SIZES["trunk"]], draw(SIZES["after"])])
        self.second = optimum(self.tuning(self.before), start)
        self.after = self.joined(self.before, self.second[0])

    def pretraining(self, theta: Tensor, row: int = 0, weight: float = 0.0) -> Tensor:
        """Mean loss, weight decay, and one row once more with a weight."""
        losses = -log_p(theta, self.rows["before"])
        return losses.mean() + DECAY["before"] / 2 * theta @ theta + weight * losses[row]

    def joined(self, before: Tensor, found: Tensor) -> Tensor:
        """Trunk and head, of what the second training moves."""
        return found if self.alpha is not None else torch.cat([before[: SIZES["trunk"]], found])

    def tuning(self, before: Tensor) -> Function:
        """Mean loss, weight decay, and the pull to the trunk that there was; a function of what the second training moves."""

        def loss(found: Tensor) -> Tensor:
            theta = self.joined(before, found)
            pulled = (theta - before[: len(theta)])[: SIZES["trunk"]]
            decayed = DECAY["after"] / 2 * theta @ theta
            return -log_p(theta, self.rows["after"]).mean() + decayed + (self.alpha or 0) / 2 * pulled @ pulled

        return loss

    @functools.cached_property
    def truth(self) -> Tensor:
        """The derivative of each query's log-probability by the weight of some rows of the first training, `[Q, N]`."""
        columns = []
        for row in range(CHANGED):
            ends = []
            for weight in (1e-4, -1e-4):
                before = moved(lambda theta, row=row, weight=weight: self.pretraining(theta, row, weight), self.first)
                ends.append(log_p(self.joined(before, moved(self.tuning(before), self.second)), self.queries))
            columns.append((ends[0] - ends[1]) / 2e-4)
        return torch.stack(columns, 1)

    def predicted(self, trunk_QP: Tensor) -> Tensor:
        """The same, of gradients of the trunk as it began the second training: through the first one's exact curvature."""
        v_QP = nn.functional.pad(trunk_QP, (0, SIZES["before"]))
        gradients = torch.func.jacrev(lambda theta: log_p(theta, self.rows["before"]))(self.before)[:CHANGED]
        return torch.linalg.solve(torch.func.hessian(self.pretraining)(self.before), v_QP.T).T @ gradients.T

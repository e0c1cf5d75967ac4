"""A small model, what it was trained on and what it is asked, as functions of all its weights in one vector, in float64.

`P` weights, `N` training rows, `Q` queries, `B` rows of a batch, `T` predictions of a row, `V` numbers per prediction (the
logits of a class or token, the outputs of a regression). Autograd on the vector; no part of the engine's mathematics.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from whence.coverage import cover
from whence.engine.stream import encode, read
from whence.errors import UsageError
from whence.tasks import CausalLM, Classification, Regression
from whence.tasks.base import Batch, Task
from whence.tasks.causal_lm import next_token_logits
from whence.tasks.measurements import IGNORED
from whence.tasks.supervised import predict

POSITIONS = 4096
"""Positions of a batch."""

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From weights `[P]` to a number and its gradient `[P]`."""


@dataclass(frozen=True)
class Outputs:
    """What the model says `h_BTV`, and which of the predictions are in the loss, `[B, T]`."""

    h_BTV: Tensor
    counted_BT: Tensor
    family: Literal["softmax", "gaussian"]

    def divergence(self, target: Outputs) -> Tensor:
        """Bregman divergence of the loss between these outputs and others, `[B]`: the labels have dropped out.

        `KL(p_target || p)` summed over predictions for cross-entropy; half the squared distance for squared error
        (Bae et al. 2022, section 4.1).
        """
        if self.family == "gaussian":
            return (self.h_BTV - target.h_BTV).square().sum((1, 2)) / 2
        q_BTV, moved = target.h_BTV.softmax(-1), self.h_BTV - target.h_BTV
        moved = moved - (q_BTV * moved).sum(-1, keepdim=True)
        excess = (q_BTV * (moved.expm1() - moved)).sum(-1)  # log sum q e^moved, without rounding to 1 first
        return (excess.log1p() * self.counted_BT).sum(1)

    def curve(self, u_BTV: Tensor) -> Tensor:
        """The loss's Hessian with respect to the outputs, times `u`."""
        if self.family == "gaussian":
            return u_BTV
        p_BTV = self.h_BTV.softmax(-1)
        return p_BTV * (u_BTV - (p_BTV * u_BTV).sum(-1, keepdim=True)) * self.counted_BT[..., None]

    def root(self) -> Tensor:
        """`b` with `b b^T` the loss's Hessian at each prediction, `[B, T, V, V]`: `diag(sqrt p) - p sqrt(p)^T` for softmax."""
        n_v = self.h_BTV.shape[-1]
        eye = torch.eye(n_v).to(self.h_BTV)
        if self.family == "gaussian":
            return eye.expand(*self.h_BTV.shape, n_v)
        p_BTV = self.h_BTV.softmax(-1)
        root = p_BTV.sqrt()
        return (root[..., None] * eye - p_BTV[..., None] * root[..., None, :]) * self.counted_BT[..., None, None]


class Problem:
    """The functions; `theta` are the weights that the model has now. The model itself is copied, not touched.

    `modules` is a selector as of `fit` (None: every weight that can be trained is in the vector). Raises UsageError for a
    task whose outputs are not known here.
    """

    def __init__(self, model: nn.Module, task: Task, train: Any, queries: Any = (), modules: str | Sequence[str] | None = None):
        self.model, self.task = copy.deepcopy(model).double().eval().requires_grad_(False), task
        self.device = next(self.model.parameters()).device
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        chosen = trainable if modules is None else _tracked(self.model, modules)
        weights = {name: parameter for name, parameter in self.model.named_parameters() if name in chosen}
        self.shapes = {name: parameter.shape for name, parameter in weights.items()}
        self.theta = torch.cat([parameter.detach().flatten() for parameter in weights.values()])
        self.train = encode(task, train)
        self.rows = self.train.usable
        """Numbers of the training rows that have a loss."""
        self.batches = [self._batch([self.train.items[row] for row in part]) for part in self._parts()]
        self.weighted = task.encode_queries(read(queries)) if len(queries) else []
        self.asked = [
            [(self._batch([item]), weight) for item, weight in query] for query in self.weighted
        ]  # one at a time: their gradients are needed one by one
        self._call = _Call(self.model)
        self._check_outputs()

    @property
    def size(self) -> int:
        """P."""
        return len(self.theta)

    def moved_to(self, theta: Tensor) -> Problem:
        """The same problem with `theta` as the model's own weights."""
        other = copy.copy(self)
        other.theta = theta.detach()
        return other

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """The weights by name, as views of the vector."""
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def vector(self, parameters: dict[str, Tensor]) -> Tensor:
        """The vector of named weights."""
        return torch.cat([parameters[name].detach().double().flatten() for name in self.shapes])

    def at(self, theta: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(model, *arguments)` where the model has the weights `theta`."""
        swapped = {f"model.{name}": weight for name, weight in self.named(theta).items()}
        return functional_call(self._call, swapped, (function, *arguments))

    def outputs(self, theta: Tensor, batch: Batch) -> Outputs:
        """What the model with the weights `theta` says of a batch."""
        return self.at(theta, outputs_of, self.task, batch)

    def losses(self, theta: Tensor) -> Tensor:
        """Loss of every row that has one, `[N]`."""
        return torch.cat([self.at(theta, self.task.losses, batch) for batch in self.batches])

    def row(self, row: int) -> Batch:
        """A training row as a batch of its own."""
        return self._batch([self.train.items[row]])

    def row_gradient(self, row: int, theta: Tensor | None = None) -> Tensor:
        """Gradient of the row's loss, `[P]`."""
        return self._gradient(lambda at: self.at(at, self.task.losses, self.row(row)).sum(), theta)

    @torch.no_grad()
    def measured(self, theta: Tensor | None = None) -> Tensor:
        """The measurement of every query, `[Q]`."""
        at = self.theta if theta is None else theta
        return torch.stack([self._measure(at, query) for query in self.asked])

    def query_gradients(self) -> Tensor:
        """Gradient of every query's measurement at the model's own weights, `[Q, P]`."""
        return torch.stack([self._gradient(lambda at, query=query: self._measure(at, query)) for query in self.asked])

    def sum_of(self, theta: Tensor, terms: Callable[[int, Batch, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Sum over batches of `terms(number, batch, theta)`, and its gradient `[P]`: one batch in memory at a time."""
        value, gradient = theta.new_zeros(()), torch.zeros_like(theta)
        for number, batch in enumerate(self.batches):
            at = theta.detach().requires_grad_()
            term = terms(number, batch, at)
            gradient += torch.autograd.grad(term, at)[0]
            value += term.detach()
        return value, gradient

    def gauss_newton(self, v_P: Tensor) -> Tensor:
        """The Gauss-Newton matrix of the mean loss times a vector, `1/N sum_n J_n^T H_n J_n v`, never formed."""
        total = torch.zeros_like(v_P)
        for batch in self.batches:
            at = self.theta.detach().requires_grad_()
            found = self.outputs(at, batch)
            u = torch.zeros_like(found.h_BTV).requires_grad_()
            (transposed,) = torch.autograd.grad(found.h_BTV, at, u, create_graph=True)  # J^T u, linear in u
            (along,) = torch.autograd.grad(transposed, u, v_P)  # J v
            total += torch.autograd.grad(found.h_BTV, at, found.curve(along).detach())[0]
        return total / len(self.rows)

    def jacobian_rows(self) -> Iterator[Tensor]:
        """`b^T J` of each training row, `[T * V, P]`, `b b^T` the loss's Hessian: their mean square is Gauss-Newton."""
        for row in self.rows:
            at = self.theta.detach().requires_grad_()
            found = self.outputs(at, self.row(row))
            counted = found.counted_BT[0]
            cotangents = torch.zeros(int(counted.sum()), found.h_BTV.shape[-1], *found.h_BTV.shape).to(at)
            for number, t in enumerate(counted.nonzero()[:, 0].tolist()):
                cotangents[number, :, 0, t] = found.root()[0, t].T
            yield torch.autograd.grad(found.h_BTV, at, cotangents.flatten(0, 1), is_grads_batched=True)[0]

    @property
    def dual_size(self) -> int:
        """Rows that `jacobian_rows` gives in all: the numbers that the loss depends on."""
        with torch.no_grad():
            found = [self.outputs(self.theta, batch) for batch in self.batches]
        return sum(int(part.counted_BT.sum()) * part.h_BTV.shape[-1] for part in found)

    def _measure(self, theta: Tensor, query: list[tuple[Batch, float]]) -> Tensor:
        return torch.stack([weight * self.at(theta, self.task.measurements, batch).sum() for batch, weight in query]).sum()

    def _gradient(self, function: Callable[[Tensor], Tensor], theta: Tensor | None = None) -> Tensor:
        at = (self.theta if theta is None else theta).detach().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]

    def _parts(self) -> Iterator[list[int]]:
        part: list[int] = []
        for row in self.rows:
            if part and max(self.train.sizes[other] for other in (*part, row)) * (len(part) + 1) > POSITIONS:
                yield part
                part = []
            part.append(row)
        yield part

    def _batch(self, items: Sequence[Any]) -> Batch:
        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(self.device, torch.float64 if value.is_floating_point() else value.dtype)

        return {key: moved(value) for key, value in self.task.collate(items).items()}

    @torch.no_grad()
    def _check_outputs(self) -> None:
        """Refuse a task whose loss is not the one that `outputs_of` stands for."""
        batch = self.batches[0]
        found = self.outputs(self.theta, batch)
        label = batch.get("labels", batch.get("targets", batch.get("label", batch.get("target"))))
        assert label is not None
        if found.family == "gaussian":
            expected = (found.h_BTV[:, 0] - label.to(found.h_BTV).reshape(found.h_BTV[:, 0].shape)).square().sum(1) / 2
        else:
            label = label[:, batch["kept"]] if "kept" in batch else label.reshape(found.counted_BT.shape)
            chosen = found.h_BTV.log_softmax(-1).gather(-1, label.clamp(min=0)[..., None])[..., 0]
            expected = -(chosen * found.counted_BT).sum(1)
        if not torch.allclose(expected, self.at(self.theta, self.task.losses, batch).to(expected), rtol=1e-6, atol=1e-9):
            raise UsageError(
                "The exact curvature and the PBRF are known for cross-entropy and squared error only.",
                given=f"{type(self.task).__name__}, whose loss is another one",
                accepted="CausalLM, Classification, Regression",
            )


def outputs_of(model: nn.Module, task: Task, batch: Batch) -> Outputs:
    """The outputs that the loss of a task is a function of; raises UsageError for tasks that are not known here."""
    if isinstance(task, CausalLM):
        labels = batch["labels"][:, batch["kept"]] if "kept" in batch else batch["labels"]
        with _plain_attention():
            return Outputs(next_token_logits(model, batch), labels != IGNORED, "softmax")
    if isinstance(task, Classification | Regression):
        h = predict(model, batch)[0]
        h_BV = h.flatten(1) if h.dim() > 1 else h[:, None]
        everywhere = torch.ones(len(h_BV), 1, dtype=torch.bool, device=h.device)
        return Outputs(h_BV[:, None], everywhere, "gaussian" if isinstance(task, Regression) else "softmax")
    raise UsageError(
        "The outputs of this task are not known here.",
        given=type(task).__name__,
        accepted="CausalLM, Classification, Regression",
    )


class _Call(nn.Module):
    """Calls a function with the model, so that the model's weights can be swapped around the call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


def _tracked(model: nn.Module, modules: str | Sequence[str]) -> set[str]:
    """Names of the weights that the engine tracks with the selector."""
    used = {id(own) for site in cover(model, modules).sites.values() for module, _ in site.uses for own in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in used}


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products, which can be differentiated twice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield

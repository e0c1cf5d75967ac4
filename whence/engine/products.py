"""Products of curvature matrices of a model's tracked weights with many vectors at once, without forming a matrix.

Of the mean training loss per example over `N` rows: the Gauss-Newton matrix `1/N sum_n J_n^T H_n J_n` (Schraudolph 2002), the
Hessian (Pearlmutter 1994), and the Fisher matrix `1/N sum_n g_n g_n^T` of whatever gradients are streamed: of drawn labels, or
of the data's own (the empirical one). `K` vectors are `{site: w_KOI}`, as dense gradients are. What is summed here is not yet
divided by `N`, so that several processes can add up theirs.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from whence.attention import plain_attention
from whence.capture import Capture
from whence.coverage import Site
from whence.engine.sinks import Sums
from whence.engine.stream import to_device
from whence.errors import CoverageError
from whence.gradients import Dense, Gradient, chunks, dot
from whence.tasks.base import Batch, Task
from whence.tasks.outputs import Outputs, check_outputs

Block = dict[str, Tensor]
"""`K` vectors in named parts, `[K, ...]` each; or one, without the `K`."""

Function = Callable[[Block], Outputs]
"""The outputs for a batch, of weights by name."""

TANGENTS, WIDTH = 2**25, 4096
"""Numbers that the tangents of a layer may have at a time, and how wide its widest layer is taken to be at least."""


def curvature_product(
    of: Callable[[Function, Block, Block], Block],
    model: nn.Module,
    task: Task,
    sites: Mapping[str, Site],
    items: Sequence[Any],
    batches: Sequence[Sequence[int]],
    vectors: Block,
    advance: Callable[[int], None] = lambda positions: None,
) -> Block:
    """Sum over the rows of the batches of their Gauss-Newton matrix or Hessian (`of`) times each vector, `{site: w_KOI}`.

    Only `hessian` takes vectors of some of the sites: those of the others count as zero. `advance` is told the positions done.
    Raises UsageError for a task whose loss is not that of its `outputs`, CoverageError where a weight or a layer can't be
    differentiated this way.
    """
    weights = Weights(model, sites)
    tangents, like_KOI = weights.spread(vectors), next(iter(vectors.values()))
    sums = {name: like_KOI.new_zeros(len(like_KOI), *site.shape) for name, site in sites.items()}
    with Capture(model, {}):  # frozen, in evaluation mode, and afterwards as it was
        model.eval()  # checkpoints, which are recomputed after their weights are back, are off, too
        for number, indices in enumerate(batches):
            chosen = [items[index] for index in indices]
            batch = to_device(task.collate(chosen), next(model.parameters()).device)
            if number == 0:
                with torch.no_grad():
                    check_outputs(task, model, batch)

            def outputs(values: Block, batch: Batch = batch) -> Outputs:
                return with_weights(model, values, task.outputs, batch)

            for name, w_KOI in weights.gather(of(outputs, weights.values, tangents)).items():
                sums[name] += w_KOI
            advance(sum(task.size(item) for item in chosen))
    return sums


class FisherProduct(Sums):
    """Sum over the rows whose gradients are streamed of `g_n <g_n, v>`: the objective's Fisher matrix times each vector."""

    def __init__(self, vectors: Block):
        self.vectors = {name: Dense(w_KOI) for name, w_KOI in vectors.items()}
        like = next(iter(vectors.values()))
        super().__init__(like.dtype, like.device)

    def restart(self) -> None:
        """Forget what came since the last `merge`."""
        super().restart()
        self.sums |= {name: torch.zeros_like(vector.w_BOI) for name, vector in self.vectors.items()}

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """Forget the batch before."""
        super().begin(indices, batch)
        self.gradients: dict[str, Gradient] = {}

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Keep a site's gradients until all have come."""
        self.gradients[name] = gradient.to(self.dtype)

    def end(self) -> None:
        """Add the batch."""
        along_KB = dot(self.vectors, self.gradients)
        for name, gradient in self.gradients.items():
            start, sums_KX = 0, self.sums[name].flatten(1)
            for part in chunks(gradient, sums_KX.shape[1]):
                sums_KX.addmm_(along_KB[:, start : start + len(part)], part.dense().w_BOI.flatten(1))
                start += len(part)


def gauss_newton(outputs: Function, weights: Block, vectors: Block) -> Block:
    """`J^T H J v` of each vector: forwards through the model, through the loss, and backwards.

    The forward derivatives of many vectors are one pass (`vmap`), whose attention is made of plain products. Models with a
    function that has none go through it backwards twice instead, which takes longer.
    """
    at = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with torch.enable_grad():
        found = outputs(at)
    fixed, columns = Outputs(found.h_BTV.detach(), found.labels, found.family), []
    step = max(1, TANGENTS // (found.h_BTV[..., 0].numel() * max(found.h_BTV.shape[-1], WIDTH)))
    for part in zip(*(w.split(step) for w in vectors.values()), strict=True):
        for u_BTV in fixed.curve(_moved(outputs, at, part)):
            back = torch.autograd.grad(found.h_BTV, list(at.values()), u_BTV, retain_graph=True, materialize_grads=True)
            columns.append(back)
    return {name: torch.stack(column) for name, column in zip(at, zip(*columns, strict=True), strict=True)}


def _moved(outputs: Function, at: Block, vectors: Sequence[Tensor]) -> Tensor:
    """`J v` of each vector, `[K, B, T, V]`."""

    def along(*tangents: Tensor) -> Tensor:
        weights = tuple(weight.detach() for weight in at.values())
        return jvp(lambda *values: outputs(dict(zip(at, values, strict=True))).h_BTV, weights, tangents)[1]

    try:
        with plain_attention(), torch.no_grad():
            return vmap(along)(*vectors)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("forward AD", "functorch", "vmap")):
            raise
        try:
            return _moved_by_two_backward_passes(outputs, at, vectors)
        except RuntimeError as again:
            raise _not_differentiable(error) from again


def _moved_by_two_backward_passes(outputs: Function, at: Block, vectors: Sequence[Tensor]) -> Tensor:
    """The same: `J^T u` is linear in `u`, and its derivative along `v` is `J v`."""
    with torch.enable_grad(), plain_attention():
        h_BTV = outputs(at).h_BTV
        u_BTV = torch.zeros_like(h_BTV, requires_grad=True)
        slopes = torch.autograd.grad(h_BTV, list(at.values()), u_BTV, create_graph=True, materialize_grads=True)
    return torch.stack([_along(slopes, [u_BTV], vector)[0] for vector in zip(*vectors, strict=True)])


def hessian(outputs: Function, weights: Block, vectors: Block) -> Block:
    """`d^2 loss / d weights^2` times each vector, by a backward pass through the backward pass.

    Weights without vectors have those of zero, and no slope is taken of them: where only a head has vectors, each batch goes
    forwards through the model once for all vectors, and back through it once for each.
    """
    at = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with torch.enable_grad(), plain_attention():
        loss = outputs(at).losses().sum()
        slopes = torch.autograd.grad(loss, [at[name] for name in vectors], create_graph=True, materialize_grads=True)
    columns = [_along(slopes, list(at.values()), vector) for vector in zip(*vectors.values(), strict=True)]
    return {name: torch.stack(column) for name, column in zip(at, zip(*columns, strict=True), strict=True)}


def hessian_and_slopes(
    losses: Callable[[Tensor], Tensor], theta_P: Tensor, v_KP: Tensor, together: int
) -> tuple[Tensor, Tensor]:
    """Of rows whose losses `[B]` are a function of the weights: their summed Hessian times each vector, and slopes along it.

    `sum_b d^2 loss_b / d theta^2 v [K, P]` and `<d loss_b / d theta, v> [K, B]`: both are what comes back through the gradient
    of `sum_b w_b loss_b`, `together` vectors at a time.
    """

    def gradient(theta_P: Tensor, w_B: Tensor) -> Tensor:
        return torch.func.grad(lambda theta_P: (w_B * losses(theta_P)).sum())(theta_P)

    with plain_attention():
        with torch.no_grad():
            w_B = torch.ones_like(losses(theta_P))
        try:
            back = torch.func.vjp(gradient, theta_P, w_B)[1]
            found = [vmap(back)(part) for part in v_KP.split(together)]
        except RuntimeError as error:
            if not any(word in str(error) for word in ("derivative", "functorch", "vmap")):
                raise
            raise _not_differentiable(error) from error
    return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])


def _along(slopes: Sequence[Tensor], leaves: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of `<slopes, vector>`.

    A backward pass through all of it: `torch.autograd.grad` would leave out what can't be differentiated twice, in silence.
    """
    for leaf in leaves:
        leaf.grad = None
    pairs = [(slope, v) for slope, v in zip(slopes, vector, strict=True) if slope.requires_grad]
    torch.autograd.backward([slope for slope, _ in pairs], [v for _, v in pairs], retain_graph=True)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(model, *arguments)` where the model has these parameters in place of its own."""
    swapped = {f"model.{name}": weight for name, weight in weights.items()}
    return functional_call(_Call(model), swapped, (function, *arguments))


class _Call(nn.Module):
    """Calls a function with the model, so that the model's weights can be swapped around the call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


class Weights:
    """The parameters that hold the sites' weights: `values` by name."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]):
        self.sites, self.values = sites, Block()
        known, self.names = {id(parameter): name for name, parameter in model.named_parameters()}, dict[str, list[str]]()
        for name, site in sites.items():
            module, layer = site.uses[0]
            parameters = layer.parameters(module)
            if not parameters or not all(id(each) in known and each.is_floating_point() for each in parameters):
                raise CoverageError(
                    f"The weight of {name} is packed, so that its curvature can't be multiplied with",
                    given=type(module).__name__,
                    fix="load the model without quantisation, or track its adapters only (--modules lora)",
                )
            self.names[name] = [known[id(each)] for each in parameters]
            self.values |= {known[id(each)]: each.detach() for each in parameters}

    def spread(self, vectors: Block) -> Block:
        """The parameters' own parts of vectors of sites, `[K, ...]` each."""
        count, moved = len(next(iter(vectors.values()))), [name for name in self.sites if name in vectors]
        values = {each: self.values[each] for name in moved for each in self.names[name]}
        tensors = {name: value.new_zeros(count, *value.shape) for name, value in values.items()}
        for name, (side, parts) in self._parts(tensors, moved).items():
            for part, w_KOI in zip(parts, vectors[name].split([part.shape[side] for part in parts], side), strict=True):
                part.copy_(w_KOI)
        return tensors

    def gather(self, tensors: Block) -> Block:
        """The way back."""
        return {name: torch.cat(parts, side) for name, (side, parts) in self._parts(tensors, self.sites).items()}

    def _parts(self, tensors: Block, names: Iterable[str]) -> dict[str, tuple[int, list[Tensor]]]:
        uses = {name: self.sites[name].uses[0] for name in names}
        return {
            name: (layer.side, layer.parts(module, [tensors[each] for each in self.names[name]]))
            for name, (module, layer) in uses.items()
        }


def _not_differentiable(error: Exception) -> CoverageError:
    """What to say where a module has neither a forward derivative nor a second one; the error's frames know which it is."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [module for module in frames if isinstance(module, nn.Module)]
    configs = [module.config for module in modules if hasattr(module, "config")]
    attention = getattr(configs[-1], "_attn_implementation", None) if configs else None
    return CoverageError(
        f"{type(modules[-1]).__name__} can't be differentiated forwards or twice, as products with the Gauss-Newton matrix are",
        given=str(error).splitlines()[0] + (f"; attention {attention!r}" if attention else ""),
        fix='load_model(..., attention="sdpa") or "eager"; or use the Fisher matrix, which takes one backward pass',
    )

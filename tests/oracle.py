"""The slow reference: everything by its definition, one example at a time, in float64, with dense matrices.

Nothing of the engine's mathematics is used. Weight gradients come from autograd on the parameters; inputs and output
gradients from plain hooks; curvature is a matrix over a module's weight, row-major in (O, I), made of Kronecker products;
an inverse is a dense inverse.

Letters as in the package: R positions of one example (of all its uses of a module), O outputs, I inputs with a bias as
last column.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.coverage import cover
from whence.engine.stream import draws, encode
from whence.gradients import Dense

Value = Callable[[nn.Module], Tensor]
"""A number that a model gives, to take gradients of."""


# what is differentiated


def log_likelihood(item: Any, noise: Tensor | None = None) -> Value:
    """Log-probability of an example's labels, or of labels drawn with `noise`; items are token rows or (input, label) pairs."""
    return (_class if isinstance(item, tuple) else _text)(item, noise)


def _text(item: Any, noise_T: Tensor | None) -> Value:
    """Sum over the tokens in the loss of log p(token | all before), on the whole row, unpadded and uncut."""

    def value(model: nn.Module) -> Tensor:
        ids = torch.from_numpy(item.ids)
        log_p_TV = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        total = log_p_TV.new_zeros(())
        for t in range(len(ids) - 1):
            if item.in_loss[t + 1]:
                token = int(ids[t + 1]) if noise_T is None else drawn(log_p_TV[t], float(noise_T[t]))
                total = total + log_p_TV[t, token]
        return total

    return value


def _class(item: tuple[Tensor, int], noise: Tensor | None) -> Value:
    def value(model: nn.Module) -> Tensor:
        log_p_V = model(item[0][None])[0].log_softmax(-1)
        return log_p_V[item[1] if noise is None else drawn(log_p_V, float(noise))]

    return value


def drawn(log_p_V: Tensor, uniform: float) -> int:
    """The first class at which the distribution function exceeds `uniform`."""
    reached = 0.0
    for number, p in enumerate(log_p_V.detach().exp().tolist()):
        reached += p
        if reached > uniform:
            return number
    return len(log_p_V) - 1


def likelihoods(task: Any, items: Sequence[Any], ids: Sequence[str], labels: str, purpose: str, seed: int = 0) -> list[Value]:
    """The examples' log-likelihoods with the data's labels, or those drawn for the pass `purpose` (covariance, eigenvalues)."""
    if labels == "data":
        return [log_likelihood(item) for item in items]
    return [log_likelihood(item, draws(task, item, name, f"{seed}:{purpose}")) for item, name in zip(items, ids, strict=True)]


@functools.cache
def traced(case: Any, labels: str, purpose: str, seed: int = 0) -> list[dict[str, Trace]]:
    """The gradients of all training examples of a case (tests/models.py), with labels as in `likelihoods`."""
    task = case.task()
    examples = encode(task, case.train())
    names = list(cover(case.model(), case.modules).sites)
    return traces(case.model(), names, likelihoods(task, examples.items, examples.ids, labels, purpose, seed))


# one example's gradient


@dataclass(frozen=True)
class Trace:
    """One example at one module: `w_OI`, and where it is the sum over positions `g_RO^T a_RI`, its parts."""

    w_OI: Tensor
    g_RO: Tensor | None
    a_RI: Tensor | None
    reads: tuple[int, int] | None
    """Identity and width of the tensor it reads, if it is used once and reads its input as it is."""
    one_hot: bool

    @property
    def active_R(self) -> Tensor:
        """Positions where the module's output has a gradient (an embedding's output is on the input side)."""
        assert self.g_RO is not None and self.a_RI is not None
        return ((self.g_RO != 0).any(-1)) & ((self.a_RI != 0).any(-1))


def traces(model: nn.Module, names: Sequence[str], values: Sequence[Value]) -> list[dict[str, Trace]]:
    """The gradients of every value at every module."""
    return [trace(model, names, value) for value in values]


def trace(model: nn.Module, names: Sequence[str], value: Value) -> dict[str, Trace]:
    """The gradient of one value at the modules; modules that share a weight are one, under the name that is asked for."""
    asked = {name: model.get_submodule(name) for name in names}
    calls: dict[str, list[tuple[nn.Module, tuple[Any, ...], Tensor]]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: calls[name].append(
            (module, args, output[0] if isinstance(output, tuple) else output)
        )

    handles = [
        module.register_forward_hook(hook(name))
        for name, first in asked.items()
        for module in model.modules()
        if module is first or (hasattr(module, "weight") and module.weight is getattr(first, "weight", None))
    ]
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True)
    total = value(model)
    for handle in handles:
        handle.remove()
    parameters = {name: _parameters(module) for name, module in asked.items()}
    wanted = [p for pair in parameters.values() for p in pair] + [y for uses in calls.values() for _, _, y in uses]
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    weights = {name: _matrix(module, [next(found) for _ in parameters[name]]) for name, module in asked.items()}
    result = {}
    for name, uses in calls.items():
        parts = [_positions(module, args, next(found)) for module, args, _ in uses]
        summed = bool(parts) and all(part is not None for part in parts)
        g_RO, a_RI = (torch.cat([part[side] for part in parts]) if summed else None for side in (0, 1))  # type: ignore[index]
        plain = len(uses) == 1 and type(uses[0][0]).__name__ in ("Linear", "Conv1D")
        reads = (id(uses[0][1][0]), weights[name].shape[1]) if plain else None
        result[name] = Trace(weights[name], g_RO, a_RI, reads, isinstance(asked[name], nn.Embedding))
    for parameter, flag in zip(model.parameters(), before, strict=True):
        parameter.requires_grad_(flag)
    return result


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    owner = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
    return [p for p in (owner.weight, getattr(owner, "bias", None)) if p is not None]


def _matrix(module: nn.Module, gradients: Sequence[Tensor]) -> Tensor:
    """Weight and bias gradients as the matrix [O, I]: the bias is the last column, or the second row of a norm."""
    weight, *bias = gradients
    if weight.ndim == 1:
        return torch.stack([weight, *bias])
    weight = weight.T if type(module).__name__ == "Conv1D" else weight.flatten(1)
    return torch.cat([weight, *(b[:, None] for b in bias)], dim=1)


def _positions(module: nn.Module, args: tuple[Any, ...], gradient: Tensor) -> tuple[Tensor, Tensor] | None:
    """`g_RO`, `a_RI` of one use; None where the weight's gradient is no sum over positions of outer products."""
    x = args[0].detach()
    if isinstance(module, nn.Embedding):
        return torch.eye(module.num_embeddings, dtype=gradient.dtype)[x.flatten()], gradient.flatten(0, -2)
    if isinstance(module, nn.Conv2d):
        return None if module.groups > 1 else (gradient[0].flatten(1).T, _ones(module, _patches(module, x[0])))
    if isinstance(module, nn.MultiheadAttention):
        return gradient.flatten(0, -2), _ones(module.out_proj, _attended(module, x.flatten(0, 1)))
    if type(module).__name__ in ("Linear", "Conv1D"):
        return gradient.flatten(0, -2), _ones(module, x.flatten(0, -2))
    return None


def _ones(module: nn.Module, a_RI: Tensor) -> Tensor:
    return a_RI if module.bias is None else torch.cat([a_RI, a_RI.new_ones(len(a_RI), 1)], dim=1)


def _patches(conv: nn.Conv2d, x_CHW: Tensor) -> Tensor:
    """What the kernel lies on, position by position: [R, C*k*k]."""
    (top, left), (down, right), (hop, skip) = conv.padding, conv.stride, conv.dilation  # type: ignore[misc]
    padded = nn.functional.pad(x_CHW, (left, left, top, top))
    high, wide = (hop * (conv.kernel_size[0] - 1) + 1, skip * (conv.kernel_size[1] - 1) + 1)
    rows = range(0, padded.shape[1] - high + 1, down)
    columns = range(0, padded.shape[2] - wide + 1, right)
    return torch.stack([padded[:, i : i + high : hop, j : j + wide : skip].flatten() for i in rows for j in columns])


def _attended(attention: nn.MultiheadAttention, x_RE: Tensor) -> Tensor:
    """Self-attention up to the output projection, head by head."""
    q, k, v = (x_RE @ attention.in_proj_weight.T + attention.in_proj_bias).detach().chunk(3, dim=1)
    width = attention.head_dim
    heads = [slice(start, start + width) for start in range(0, attention.embed_dim, width)]
    return torch.cat([(q[:, h] @ k[:, h].T / math.sqrt(width)).softmax(-1) @ v[:, h] for h in heads], dim=1)


# curvature


def curvature(
    method: str,
    covariance: Sequence[Mapping[str, Trace]],
    eigenvalues: Sequence[Mapping[str, Trace]],
    largest: int | None = None,
) -> dict[str, Tensor]:
    """The matrix [O*I, O*I] of every module, from the traces of the two passes."""
    return {name: _block(method, name, covariance, eigenvalues, largest) for name in covariance[0]}


def _block(
    method: str,
    name: str,
    covariance: Sequence[Mapping[str, Trace]],
    eigenvalues: Sequence[Mapping[str, Trace]],
    largest: int | None,
) -> Tensor:
    w_NOI = torch.stack([example[name].w_OI for example in eigenvalues])
    size = w_NOI[0].numel()
    if method == "identity":
        return torch.eye(size, dtype=w_NOI.dtype)
    if method == "diagonal":
        return torch.diag(w_NOI.square().mean(0).flatten())
    by_example = method == "shampoo" or covariance[0][name].g_RO is None
    out, into, scale = _by_example(name, covariance) if by_example else _by_position(name, covariance)
    if covariance[0][name].one_hot:
        out = torch.diag(out.diag())
    out, into = _diagonal_blocks(out, largest if not covariance[0][name].one_hot else None), _diagonal_blocks(into, largest)
    if method == "kfac":
        return scale * kronecker(out, into)
    q_O = torch.eye(len(out), dtype=out.dtype) if covariance[0][name].one_hot else torch.linalg.eigh(out).eigenvectors
    q = kronecker(q_O, torch.linalg.eigh(into).eigenvectors)
    measured = torch.stack([(q.T @ w_OI.flatten()).square() for w_OI in w_NOI]).mean(0)
    if largest is None:
        measured = _alike_where_nothing_was_seen(measured.view(len(out), len(into)), out, into, covariance[0][name].one_hot)
    return q @ torch.diag(measured.flatten()) @ q.T


def _alike_where_nothing_was_seen(lam_OI: Tensor, out: Tensor, into: Tensor, one_hot: bool) -> Tensor:
    """The mean over each side's null space, whose basis is anybody's choice, in the place of each eigenvalue there."""
    for matrix, dim in ((out, 0), (into, 1)):
        values = torch.linalg.eigvalsh(matrix)
        unseen = values <= 1e-13 * len(values) * values.max()
        if not (one_hot and dim == 0) and unseen.any():
            part = lam_OI.movedim(dim, 0)
            part[unseen] = part[unseen].mean(0)
    return lam_OI


def _by_position(name: str, examples: Sequence[Mapping[str, Trace]]) -> tuple[Tensor, Tensor, float]:
    """Means of `g g^T` over active positions, of `a a^T` over those of all who read the input; active positions per example."""
    out, into, n_out, n_in = 0.0, 0.0, 0, 0
    for example in examples:
        own = example[name]
        assert own.g_RO is not None and own.a_RI is not None
        readers = [t for t in example.values() if t is own or (own.reads is not None and t.reads == own.reads)]
        active_R = torch.stack([t.active_R for t in readers]).any(0)
        for g_O, a_I, active, reached in zip(own.g_RO, own.a_RI, own.active_R, active_R, strict=True):
            if active:
                out, n_out = out + torch.outer(g_O, g_O), n_out + 1
            if reached:
                into, n_in = into + torch.outer(a_I, a_I), n_in + 1
    return out / n_out, into / n_in, n_out / len(examples)


def _by_example(name: str, examples: Sequence[Mapping[str, Trace]]) -> tuple[Tensor, Tensor, float]:
    """Means of `w w^T` and `w^T w` over examples; the product is divided by their common trace."""
    w_NOI = [example[name].w_OI for example in examples]
    out = torch.stack([w @ w.T for w in w_NOI]).mean(0)
    into = torch.stack([w.T @ w for w in w_NOI]).mean(0)
    return out, into, 1 / float(out.trace())


def kronecker(out: Tensor, into: Tensor) -> Tensor:
    """`out kron into`: the entry at ((o, i), (p, j)) is `out[o, p] into[i, j]`."""
    return torch.einsum("op,ij->oipj", out, into).reshape(len(out) * len(into), -1)


def _diagonal_blocks(matrix: Tensor, largest: int | None) -> Tensor:
    """The matrix with everything outside of equal diagonal blocks of at most `largest` set to zero."""
    if largest is None or len(matrix) <= largest:
        return matrix
    parts = torch.tensor_split(torch.arange(len(matrix)), -(-len(matrix) // largest))
    kept = torch.zeros_like(matrix)
    for part in parts:
        kept[part[0] : part[-1] + 1, part[0] : part[-1] + 1] = matrix[part[0] : part[-1] + 1, part[0] : part[-1] + 1]
    return kept


def inverse(matrices: Mapping[str, Tensor], damping: float = 0.1) -> dict[str, Tensor]:
    """`(G + damping * mean eigenvalue)^-1` of each matrix."""
    return {
        name: torch.linalg.inv(matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype))
        for name, matrix in matrices.items()
    }


# scores


@dataclass(frozen=True)
class Reference:
    """Raw scores: `total [Q, N]`, `modules[name] [Q, N]`, `tokens[name][q][n] [R]` where there are positions, `self_ [N]`."""

    total: Tensor
    modules: dict[str, Tensor]
    tokens: dict[str, list[list[Tensor]]]
    self_: Tensor
    gradient_norms: Tensor
    query_norms: Tensor


def scores(
    queries: Sequence[Mapping[str, Trace]], train: Sequence[Mapping[str, Trace]], operator: Mapping[str, Tensor]
) -> Reference:
    """`q^T operator w` of every query with every example."""
    modules, tokens, self_, squares, applied = {}, {}, 0.0, 0.0, 0.0
    for name, matrix in operator.items():
        w_NP = torch.stack([example[name].w_OI.flatten() for example in train])
        v_QP = torch.stack([matrix @ query[name].w_OI.flatten() for query in queries])
        modules[name] = v_QP @ w_NP.T
        self_ = self_ + torch.stack([w @ matrix @ w for w in w_NP])
        squares, applied = squares + w_NP.square().sum(1), applied + v_QP.square().sum(1)
        if all(example[name].g_RO is not None for example in train):
            v_QOI = v_QP.unflatten(1, train[0][name].w_OI.shape)
            tokens[name] = [[_by_token(v_OI, example[name]) for example in train] for v_OI in v_QOI]
    return Reference(sum(modules.values()), modules, tokens, self_, squares.sqrt(), applied.sqrt())  # type: ignore[arg-type]


def _by_token(v_OI: Tensor, example: Trace) -> Tensor:
    """`g_r^T v a_r` of every position."""
    assert example.g_RO is not None and example.a_RI is not None
    return torch.stack([g_O @ v_OI @ a_I for g_O, a_I in zip(example.g_RO, example.a_RI, strict=True)])


# the Gauss-Newton matrix


def gauss_newton(model: nn.Module, names: Sequence[str], inputs: Sequence[Callable[[nn.Module], Tensor]]) -> dict[str, Tensor]:
    """Mean over examples of `sum_t J_t^T (diag(p_t) - p_t p_t^T) J_t` at each module, `J_t` being the logits' Jacobian.

    `inputs[n](model)` gives the logits [T, V] of the positions of example n that are in the loss.
    """
    totals: dict[str, Any] = dict.fromkeys(names, 0.0)
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True)
    for logits in inputs:
        for z_V in logits(model):
            p_V = z_V.detach().softmax(-1)
            rows: dict[str, list[Tensor]] = {name: [] for name in names}
            for z in z_V:
                for name in names:
                    module = model.get_submodule(name)
                    found = torch.autograd.grad(z, _parameters(module), retain_graph=True)
                    rows[name].append(_matrix(module, found).flatten())
            for name in names:
                jacobian = torch.stack(rows[name])
                totals[name] = totals[name] + jacobian.T @ (torch.diag(p_V) - torch.outer(p_V, p_V)) @ jacobian / len(inputs)
    for parameter, flag in zip(model.parameters(), before, strict=True):
        parameter.requires_grad_(flag)
    return totals


def text_logits(item: Any) -> Callable[[nn.Module], Tensor]:
    """The logits [T, V] at the positions of a token row that predict a token in the loss."""
    return lambda model: model(input_ids=torch.from_numpy(item.ids)[None]).logits[0, :-1][torch.from_numpy(item.in_loss[1:])]


def agree(found: Any, expected: Any, tolerance: float = 1e-8) -> None:
    """Assert that two arrays agree relative to the largest entry of what is expected."""
    found, expected = (x if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in (found, expected))
    assert found.shape == expected.shape, (found.shape, expected.shape)
    error, size = float((found.double() - expected.double()).abs().max()), float(expected.double().abs().max())
    assert error <= tolerance * size, f"differs by {error:.3g}, where the largest entry is {size:.3g}"


def matrices_of(curvature):
    """The curvature's block of each module as a matrix `[O*I, O*I]`."""
    return {name: block.dense() for name, block in curvature.blocks.items()}


def matrix_of(operator, name, shape):
    """What an operator does at a module, as a matrix `[out, O*I]`: what comes of each number alone being one."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).unflatten(1, shape)
    return (operator @ {name: Dense(units)})[name].dense().w_BOI.flatten(1).T

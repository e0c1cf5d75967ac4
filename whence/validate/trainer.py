"""A deterministic trainer of many copies of one small model at once: the same model, rows and settings give the same bits.

Every replica has its own weight on every row, so a row is removed by a weight of 0 while the order of the rows, what stands
in which batch and the number of steps stay as they were. The copies are stacked, `[K, ...]`, and go through
`torch.func.vmap` together where that is quicker than one after the other.

`K` replicas, `N` rows, `B` rows of a batch, `Q` queries.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.engine.stream import encode, read, to_device
from whence.errors import UsageError
from whence.linalg.descent import Optimizer
from whence.progress import stage
from whence.store.files import atomic
from whence.store.manifest import load_tensors
from whence.tasks.base import Batch, Task
from whence.tasks.forward import in_mode
from whence.train.replay import Descent, Recorded, Replay, record, refuse_random_parts
from whence.train.small import one_thread, warm_cosine

Parameters = dict[str, Tensor]
"""By name as in `model.named_parameters()`, stacked over replicas: `[K, ...]`."""

VMAP_PARAMETERS = 1_200_000
"""Replicas go together up to so many parameters in sum: beyond, the stacked weights no longer stay in the cache and one
after the other is as quick. Measured on one core; `docs/quality.md` has the table."""

VMAP_REPLICAS = 64
"""At most so many together; more gain nothing."""

EVALUATED = 256
"""Rows of a batch without gradients."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; every number that decides the weights is here."""

    learning_rate: float
    epochs: float
    batch_size: int
    optimizer: Literal["sgd", "momentum", "adamw"] = "sgd"
    weight_decay: float = 0.0
    """Of all parameters: decoupled for adamw, else the gradient of half its squared norm is added."""
    momentum: float = 0.9
    """For "momentum" only."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["constant", "cosine", "warm-up"] = "constant"
    """"warm-up": a cosine, too, after a linear rise from 0 over the first tenth of the steps."""
    seed: int = 0
    """Of the initial weights."""
    order_seed: int = 0
    """Of the order of the rows."""

    def __post_init__(self) -> None:
        for name, known in {"optimizer": ("sgd", "momentum", "adamw"), "schedule": ("constant", "cosine", "warm-up")}.items():
            if getattr(self, name) not in known:
                raise UsageError(f"There is no {name} {getattr(self, name)!r}", accepted=", ".join(known))
        if not (self.learning_rate > 0 and self.epochs > 0 and self.batch_size >= 1):
            raise UsageError("A recipe needs a learning rate, epochs and a batch size above zero", given=str(self))

    def steps(self, rows: int) -> int:
        """Steps that the training of so many rows takes."""
        return max(1, round(self.epochs * math.ceil(rows / self.batch_size)))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0."""
        if self.schedule == "warm-up":
            return self.learning_rate * warm_cosine(step / steps, 0.1)
        share = 1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))
        return self.learning_rate * share


@dataclass(frozen=True)
class Replicas:
    """`K` trained copies of a model."""

    model: nn.Module
    """What they are copies of; its own weights play no part."""
    task: Task
    parameters: Parameters
    together: int = 1
    checkpoints: Mapping[int, Parameters] = field(default_factory=dict)
    """The parameters after so many steps, where asked for."""

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def losses(self, data: Any) -> Tensor:
        """Each replica's loss of each row, `[K, N]`, in nats."""
        examples = encode(self.task, data)
        return self._evaluated(examples.items, self.task.losses)

    def measurements(self, queries: Any) -> Tensor:
        """Each replica's measurement of each query, `[K, Q]`."""
        weighted = self.task.encode_queries(read(queries))
        flat = [(item, weight, q) for q, query in enumerate(weighted) for item, weight in query]
        found_KM = self._evaluated([item for item, _, _ in flat], self.task.measurements)
        result_KQ = found_KM.new_zeros((len(self), len(weighted)))
        weights_M, owners = found_KM.new_tensor([weight for _, weight, _ in flat]), torch.tensor([q for _, _, q in flat])
        return result_KQ.index_add(1, owners.to(result_KQ.device), found_KM * weights_M)

    def load_into(self, model: nn.Module, k: int) -> nn.Module:
        """Give `model` the weights of replica `k`; returns it."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.parameters[name][k])
        return model

    def copy_of(self, k: int) -> nn.Module:
        """A model of its own with the weights of replica `k`, in evaluation mode."""
        return self.load_into(copy.deepcopy(self.model), k).eval()

    def save(self, path: str | Path) -> Path:
        """Write the parameters to a safetensors file."""
        from safetensors.torch import save_file

        with atomic(Path(path)) as temporary:
            save_file({name: stacked.contiguous() for name, stacked in self.parameters.items()}, temporary)
        return Path(path)

    @classmethod
    def open(cls, path: str | Path, model: nn.Module, task: Task, together: int = 1) -> Replicas:
        """The replicas of `model` that `save` wrote; raises UsageError where they are of another model."""
        parameters = load_tensors(Path(path))
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found = {name: tuple(stacked.shape[1:]) for name, stacked in parameters.items()}
        if found != expected:
            raise UsageError(f"{path} holds another model", given=str(found)[:200], accepted=str(expected)[:200])
        return cls(model, task, parameters, together)

    @torch.no_grad()
    def _evaluated(self, items: Sequence[Any], measure: Callable[[nn.Module, Batch], Tensor]) -> Tensor:
        """`measure` of every item, `[K, M]`; items without a position have 0."""
        device, sizes = next(iter(self.parameters.values())).device, [self.task.size(item) for item in items]
        order = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i])
        run = _Run(self.model, measure)
        result = next(iter(self.parameters.values())).new_zeros((len(self), len(items)))
        with in_mode(self.model, training=False), one_thread():
            for start in range(0, len(order), EVALUATED):
                chosen = order[start : start + EVALUATED]
                batch = to_device(self.task.collate([items[i] for i in chosen]), device)
                parts = [run(part, batch) for part in _pieces(self.parameters, self.together)]
                result[:, chosen] = torch.cat(parts).to(result.dtype)
        return result


def retrain(
    model: nn.Module,
    task: Task,
    data: Any,
    recipe: Recipe,
    weights_KN: Tensor | np.ndarray | None = None,
    *,
    start: Literal["initial", "given"] | Parameters = "initial",
    seeds: Sequence[int] | None = None,
    order_seeds: Sequence[int] | None = None,
    together: int | Literal["auto"] = "auto",
    checkpoints: Sequence[int] = (),
    progress: str = "retrain",
) -> Replicas:
    """Train `K` copies of `model` on the rows of `data`, the loss of row `n` counting `weights_KN[k, n]` times in copy `k`.

    A step's objective is `sum_b w_b loss_b / B` with `B` the rows of the batch whatever their weights. `start` "initial"
    draws the weights anew (`fresh`), "given" begins with those of `model`; stacked parameters, such as those of replicas that
    another training gave, are where each copy begins. Parameters of `model` that need no gradient stay as they are: a trunk
    may be frozen. `seeds` and `order_seeds` differ by replica,
    else they are the recipe's. `together` replicas are computed at a time ("auto": by a measured rule; 1: one after the
    other). `checkpoints` keeps the parameters after these numbers of steps too. `model` itself is not changed. `progress` names
    the work where it is shown ("": nothing is).

    Raises UsageError for dropout and batch statistics, which would make two trainings differ by more than their weights.
    """
    refuse_random_parts(model)
    examples = encode(task, data)
    weights, seeds, orders = _choices(len(examples), recipe, weights_KN, seeds, order_seeds)
    if together == "auto":
        size = sum(parameter.numel() for parameter in model.parameters())
        together = min(VMAP_REPLICAS, VMAP_PARAMETERS // max(1, size))
    count = max(1, min(together, len(seeds)))
    groups = [
        members[first : first + count]
        for order in dict.fromkeys(orders)
        for members in [[k for k, own in enumerate(orders) if own == order]]
        for first in range(0, len(members), count)
    ]
    steps = recipe.steps(len(examples.usable))
    parts: list[tuple[list[int], list[Parameters]]] = []
    run, device = _Run(model, task.losses), next(model.parameters()).device
    moving = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    batches: list[tuple[list[int], Batch]] = []
    latest: int | None = None
    shown = stage(progress, steps * len(seeds), "steps") if progress else contextlib.nullcontext(lambda count: None)
    with in_mode(model, training=False), one_thread(), shown as advance:
        for members in groups:
            if orders[members[0]] != latest:
                latest = orders[members[0]]
                ordered = data_order(examples.usable, recipe, latest, steps)
                batches = [(rows, to_device(task.collate([examples.items[i] for i in rows]), device)) for rows in ordered]
            if isinstance(start, str):
                first = stacked([model if start == "given" else fresh(model, seeds[k]) for k in members])
            else:
                first = {name: stacked_K[members].clone() for name, stacked_K in start.items()}
            own = None if weights is None else weights[members]
            parts.append((members, _trained(run, first, moving, batches, own, recipe, checkpoints, advance)))
    found = [_in_order([(members, kept[number]) for members, kept in parts]) for number in range(len(checkpoints) + 1)]
    return Replicas(model, task, found[-1], count, dict(zip(checkpoints, found, strict=False)))


def recorded(
    model: nn.Module,
    task: Task,
    data: Any,
    recipe: Recipe,
    *,
    start: Literal["initial", "given"] = "initial",
    checkpoints: Sequence[int] = (),
    progress: str = "record",
) -> Recorded:
    """The training that `retrain` makes of all rows with the recipe's seeds, as methods read a training.

    It is repeated once, for the checkpoints after these numbers of steps and AdamW's second moments there; the weights are
    those of `retrain` but for rounding.
    """
    examples = encode(task, data)
    steps = recipe.steps(len(examples.usable))
    order = list(data_order(examples.usable, recipe, recipe.order_seed, steps))
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = dict((model if start == "given" else fresh(model, recipe.seed)).named_parameters())
    kind = "adamw" if recipe.optimizer == "adamw" else "sgd"
    momentum = recipe.momentum if recipe.optimizer == "momentum" else 0.0
    how = Replay(
        {name: weight.detach().clone() for name, weight in first.items() if name in moving},
        [[examples.ids[row] for row in rows] for rows in order],
        np.array([recipe.rate(step, steps) for step in range(steps)]),
        Descent(Optimizer(kind, momentum, recipe.betas, recipe.eps), recipe.weight_decay),
        per="row",
    )
    shown = stage(progress, steps, "steps") if progress else contextlib.nullcontext(lambda count: None)
    with one_thread(), shown as advance:
        return record(model, task, examples, how, checkpoints, advance)


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with weights drawn anew, as its class draws them.

    Raises UsageError where a module can't: it has parameters but neither a Hugging Face config nor `reset_parameters`.
    """
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(model, "config") and hasattr(model, "_init_weights"):
            drawn = type(model)(model.config)
        else:
            drawn = copy.deepcopy(model).float().cpu()
            for name, module in drawn.named_modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
                elif any(True for _ in module.parameters(recurse=False)):
                    raise UsageError(
                        f"{name or 'The model'} ({type(module).__name__}) doesn't say how its weights are drawn",
                        fix='give it a method reset_parameters(), or retrain with start="given"',
                    )
    return drawn.to(device=device, dtype=dtype).train(model.training)


def stacked(models: Sequence[nn.Module]) -> Parameters:
    """The parameters of the models, `[K, ...]`: copies."""
    named = [dict(model.named_parameters()) for model in models]
    return {name: torch.stack([own[name].detach() for own in named]) for name in named[0]}


def data_order(rows: Sequence[int], recipe: Recipe, order_seed: int, steps: int) -> Iterator[list[int]]:
    """The rows of each step: every epoch a new permutation, cut into batches; the last of an epoch may be smaller."""
    generator, done = torch.Generator().manual_seed(order_seed), 0
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(order), recipe.batch_size):
            if done == steps:
                return
            yield [rows[i] for i in order[first : first + recipe.batch_size]]
            done += 1


class _Run:
    """A task's number per row as a function of the parameters of several replicas: `[K, B]`."""

    def __init__(self, model: nn.Module, measure: Callable[[nn.Module, Batch], Tensor]):
        self.whole = _Measured(model, measure)

    def __call__(self, parameters: Parameters, batch: Batch) -> Tensor:
        def of_one(own: Parameters) -> Tensor:
            return functional_call(self.whole, {f"model.{name}": value for name, value in own.items()}, (batch,))

        if len(next(iter(parameters.values()))) == 1:
            return of_one({name: value.squeeze(0) for name, value in parameters.items()}).unsqueeze(0)
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention can't be batched over replicas
            return vmap(of_one)(parameters)


class _Measured(nn.Module):
    """A model whose output is what a task measures of it."""

    def __init__(self, model: nn.Module, measure: Callable[[nn.Module, Batch], Tensor]):
        super().__init__()
        self.model, self.measure = model, measure

    def forward(self, batch: Batch) -> Tensor:
        return self.measure(self.model, batch)


def _trained(
    run: _Run,
    parameters: Parameters,
    moving: Sequence[str],
    batches: Sequence[tuple[list[int], Batch]],
    weights_KN: Tensor | None,
    recipe: Recipe,
    checkpoints: Sequence[int],
    advance: Callable[[int], None],
) -> list[Parameters]:
    """The parameters at each of the checkpoints and at the end."""
    update, kept = _UPDATES[recipe.optimizer](recipe), {}
    values = [parameters[name].requires_grad_() for name in moving]
    for step, (rows, batch) in enumerate(batches):
        losses_KB = run(parameters, batch)
        if weights_KN is not None:
            losses_KB = losses_KB * weights_KN[:, rows].to(losses_KB)
        # replicas share no parameter, so the gradient of their sum separates into theirs
        gradients = torch.autograd.grad(losses_KB.sum() / len(rows), values)
        with torch.no_grad():
            update(values, gradients, recipe.rate(step, len(batches)))
        if step + 1 in checkpoints:
            kept[step + 1] = {name: value.detach().clone() for name, value in parameters.items()}
        advance(len(losses_KB))
    missing = [step for step in checkpoints if step not in kept]
    if missing:
        raise UsageError("There is no such step to keep", given=str(missing), accepted=f"1 to {len(batches)}")
    return [*(kept[step] for step in checkpoints), {name: value.detach() for name, value in parameters.items()}]


Update = Callable[[Sequence[Tensor], Sequence[Tensor], float], None]
"""Moves parameters in place by their gradients at a learning rate; the operations are those of torch.optim, in their order."""


def _sgd(recipe: Recipe) -> Update:
    def update(values: Sequence[Tensor], gradients: Sequence[Tensor], rate: float) -> None:
        for value, gradient in zip(values, gradients, strict=True):
            value.add_(_decayed(gradient, value, recipe), alpha=-rate)

    return update


def _momentum(recipe: Recipe) -> Update:
    velocity: list[Tensor] = []

    def update(values: Sequence[Tensor], gradients: Sequence[Tensor], rate: float) -> None:
        decayed = [_decayed(gradient, value, recipe) for value, gradient in zip(values, gradients, strict=True)]
        if velocity:
            for own, gradient in zip(velocity, decayed, strict=True):
                own.mul_(recipe.momentum).add_(gradient)
        else:
            velocity.extend(gradient.clone() for gradient in decayed)
        for value, own in zip(values, velocity, strict=True):
            value.add_(own, alpha=-rate)

    return update


def _adamw(recipe: Recipe) -> Update:
    first: list[Tensor] = []
    second: list[Tensor] = []
    (beta1, beta2), taken = recipe.betas, 0

    def update(values: Sequence[Tensor], gradients: Sequence[Tensor], rate: float) -> None:
        nonlocal taken
        taken += 1
        if not first:
            first.extend(torch.zeros_like(value) for value in values)
            second.extend(torch.zeros_like(value) for value in values)
        for value, gradient, m, v in zip(values, gradients, first, second, strict=True):
            value.mul_(1 - rate * recipe.weight_decay)
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            spread = (v.sqrt() / math.sqrt(1 - beta2**taken)).add_(recipe.eps)
            value.addcdiv_(m, spread, value=-rate / (1 - beta1**taken))

    return update


_UPDATES: dict[str, Callable[[Recipe], Update]] = {"sgd": _sgd, "momentum": _momentum, "adamw": _adamw}


def _decayed(gradient: Tensor, value: Tensor, recipe: Recipe) -> Tensor:
    return gradient.add(value, alpha=recipe.weight_decay) if recipe.weight_decay else gradient


def _choices(
    rows: int,
    recipe: Recipe,
    weights_KN: Tensor | np.ndarray | None,
    seeds: Sequence[int] | None,
    orders: Sequence[int] | None,
) -> tuple[Tensor | None, list[int], list[int]]:
    """Weights `[K, N]`, seed and order of each replica; raises UsageError where they are not of one number or finite."""
    weights = None if weights_KN is None else torch.as_tensor(np.asarray(weights_KN), dtype=torch.float64)
    counts = {
        **({"weights_KN": len(weights)} if weights is not None else {}),
        **({"seeds": len(seeds)} if seeds is not None else {}),
        **({"order_seeds": len(orders)} if orders is not None else {}),
    }
    if len(set(counts.values())) > 1:
        raise UsageError("Weights, seeds and order_seeds have different numbers of replicas", given=str(counts))
    if weights is not None and (weights.shape[1:] != (rows,) or not bool(torch.isfinite(weights).all())):
        raise UsageError(
            "Weights are one finite number per replica and row", given=f"{tuple(weights.shape)}", accepted=f"(K, {rows})"
        )
    count = next(iter(counts.values()), 1)
    return (
        weights,
        list(seeds) if seeds is not None else [recipe.seed] * count,
        list(orders) if orders is not None else [recipe.order_seed] * count,
    )


def _in_order(parts: Sequence[tuple[Sequence[int], Parameters]]) -> Parameters:
    """Join groups of replicas, each at its place."""
    places = torch.tensor([k for members, _ in parts for k in members])
    joined = {name: torch.cat([own[name] for _, own in parts]) for name in parts[0][1]}
    return {name: value[torch.argsort(places).to(value.device)] for name, value in joined.items()}


def _pieces(parameters: Parameters, together: int) -> Iterator[Parameters]:
    total = len(next(iter(parameters.values())))
    for first in range(0, total, together):
        yield {name: value[first : first + together] for name, value in parameters.items()}

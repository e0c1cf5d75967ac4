"""The only place with hooks: collects each tracked weight's gradient, example by example, while a backward pass runs.

The user's model is borrowed. Inside the context all weights are frozen, so autograd forms no weight gradient, and the
graph starts at the first tracked module; afterwards hooks, flags, modes and attributes are as they were, whatever
happened in between.

What a module read is kept by autograd's own saved tensors, so gradient checkpointing and offloading of saved tensors
work as for any other operation, and an input that is overwritten in place before it is needed is an error of autograd
instead of a wrong number. What is needed of it can also be taken on the way forward (`Capture(inputs=...)`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # type: ignore[import-not-found]

from whence.coverage import Site, selector_without
from whence.errors import CoverageError
from whence.gradients import Factored, Gradient
from whence.layers import Layer, modules_of
from whence.precision import multiplying_on

Receive = Callable[[str, Gradient, tuple[str, ...]], None]
"""Takes (site, gradient, readers): `readers` are the sites that read the same input in this pass, `site` among them."""


class _Keep(torch.autograd.Function):
    """Saves tensors as autograd saves them; `keeper.grad_fn.saved_tensors` gives them back, recomputed if need be."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return root.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:  # pragma: no cover - no path leads here
        raise AssertionError


class _Start(torch.autograd.Function):
    """The identity, at which the graph starts; a copy, since some models overwrite a layer's output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:
        return None, None


@dataclass
class _Input:
    """One input tensor of a pass, and the sites that read it; its columns are made once for all of them."""

    tensor: weakref.ref[Tensor]
    version: int
    """How often it had been written to: what is overwritten in between is another input."""
    width: int
    readers: list[str] = field(default_factory=list)
    columns: Tensor | None = None
    left: int = 0
    projected: dict[int, Tensor] = field(default_factory=dict)
    """The columns times a matrix, by the matrix."""


@dataclass
class _Use:
    """One call of a tracked module: what it read is kept by `keeper` until its output's gradient arrives.

    Or `projected` is, the product that is kept instead: a tensor of our own, so small that it is held as it is.
    """

    site: Site
    module: nn.Module
    layer: Layer
    source: _Input | None
    keeper: Any = None
    projected: Tensor | None = None


class Capture:
    """Context in which `backward` hands every tracked site's gradients to a receiver, and then forgets them.

    Of an input whose site is in `inputs`, only its product with that matrix `[I, P]` is kept, taken on the way forward: the
    gradient's `a_BRI` is `[B, R, P]` then. They are sites that multiply their input as it is (`Site.reads_columns`).
    """

    def __init__(self, model: nn.Module, sites: dict[str, Site], inputs: Mapping[str, Tensor] | None = None):
        self.model, self.sites, self.inputs = model, sites, inputs or {}
        self._restore: list[Callable[[], Any]] = []
        self._reset()

    def _reset(self) -> None:
        self._paused = False  # also where an error came in between
        self._examples, self._rows = 0, frozenset[int]()
        self._inputs: list[_Input] = []
        self._calls: dict[str, int] = {}
        self._shared: dict[str, None] = {}
        self._arrived: dict[str, list[tuple[int, Gradient]]] = {}
        self._receive: Receive | None = None

    def __enter__(self) -> Capture:
        modules = modules_of(self.model)
        modes = [(module, module.training) for module in modules if module.training != _recomputes(module)]
        weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        trained = [weight for weight in weights if weight.requires_grad]
        self.root = torch.zeros((), requires_grad=True, device=weights[0].device)
        fastpath = torch.backends.mha.get_fastpath_enabled()
        compiled = [module for module in modules if module._compiled_call_impl is not None]
        calls = [(module, module._compiled_call_impl) for module in compiled]
        self._restore = [
            lambda: [setattr(module, "training", mode) for module, mode in modes],
            lambda: [parameter.requires_grad_(True) for parameter in trained],
            lambda: torch.backends.mha.set_fastpath_enabled(fastpath),  # the fused path calls no module
            lambda: [setattr(module, "_compiled_call_impl", call) for module, call in calls],
        ]
        if any("_orig_mod" in module._modules for module in modules):  # compiled layers would not see new hooks
            eager = torch.compiler.set_stance("force_eager")
            eager.__enter__()
            self._restore.append(lambda: eager.__exit__(None, None, None))
        for module in compiled:
            module._compiled_call_impl = None
        torch.backends.mha.set_fastpath_enabled(False)
        for module, mode in modes:
            module.training = not mode
        for parameter in trained:
            parameter.requires_grad_(False)
        for site in self.sites.values():
            for module, layer in site.uses:
                hook = module.register_forward_hook(self._on_forward(module, site, layer), with_kwargs=True)
                self._restore.append(hook.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for undo in reversed(self._restore):
            undo()
        self._restore.clear()
        self._reset()

    def begin(self, examples: int, rows: frozenset[int]) -> None:
        """Start a pass over `examples` examples; `rows` are the row counts that a flattened `[rows, width]` input may have."""
        self._reset()
        self._examples, self._rows = examples, rows

    def backward(self, total: Tensor, receive: Receive) -> None:
        """Run backward from the scalar `total`, handing over each site as soon as all its uses have their gradient."""
        if not total.requires_grad:
            raise CoverageError(
                "No tracked module took part in computing the loss",
                given=f"{len(self.sites)} tracked modules, {next(iter(self.sites))} the first",
                fix="track modules that the loss depends on (--modules all), and don't compute it under torch.no_grad",
                code=16,
            )
        self._receive = receive
        for source in self._inputs:
            source.left = len(source.readers)
        total.backward()
        for name in list(self._arrived):  # a use whose output never reached the loss
            self._hand_over(name)
        self._reset()

    def _on_forward(self, module: nn.Module, site: Site, layer: Layer) -> Callable[..., Any]:
        first = 0 if vars(module).get("batch_first", True) else 1  # a miss of getattr takes ten times as long

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._paused:
                return None
            if self._receive is None:  # inside backward this is a recomputation for a checkpoint, not a further use
                self._calls[site.name] = self._calls.get(site.name, 0) + 1
            if not torch.is_grad_enabled():
                return None
            y = output[0] if isinstance(output, tuple) else output
            if not isinstance(y, Tensor):
                raise self._unusable(site.name, f"{site.name} gives a {type(output).__name__}, where its kind gives a tensor")
            self._paused = True
            read = layer.reads(module, args, kwargs)
            self._paused = False
            kept = read if isinstance(read, tuple) else (read,)
            if is_functorch_wrapped_tensor(y):
                name = site.name
                raise self._unusable(name, f"{name} is called inside of torch.vmap or another transform of torch.func")
            if not y.requires_grad:
                y = _Start.apply(y, self.root)
            told_apart = y.ndim >= layer.dimensions(module) and y.shape[first] in self._rows
            if not told_apart:  # wrong only if a gradient comes back: DoRA calls its layers for a norm, too
                self._calls[site.name] -= self._receive is None
                self._shared[site.name] = None
                y.register_hook(lambda g: self._refuse_shared(site.name, g))
                return (y, *output[1:]) if isinstance(output, tuple) else y
            use = _Use(site, module, layer, self._source(site, layer, kept[0]))
            if site.name in self.inputs:
                use.projected = self._projected(use, kept[0])
            else:
                use.keeper = _Keep.apply(self.root, *kept).grad_fn  # type: ignore[union-attr]
            number = self._calls[site.name]
            y.register_hook(lambda g: self._on_gradient(use, number, g))
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def _refuse_shared(self, name: str, g: Tensor) -> None:
        raise self._unusable(
            name,
            f"What {name} computes can't be told apart by example",
            f"an output of shape {tuple(g.shape)} in a batch of {self._examples} examples: computed once for all of them, "
            "or one by one, or for tokens in an order of its own",
        )

    def _unusable(self, name: str, what: str, given: str = "") -> CoverageError:
        """What to say of a module whose gradient can't be caught, with the selector that leaves it out."""
        shared = [site for site in self._shared if not self._calls[site]]
        rest = selector_without(self.sites, [name, *shared])
        fix = f"leave it out: --modules '{rest}' (modules={rest!r})" if rest else "track other modules (--modules)"
        return CoverageError(what, given=given, fix=fix)

    def _source(self, site: Site, layer: Layer, x: Tensor) -> _Input | None:
        """The record of the input, shared with the sites that read the very same numbers to the same width."""
        if layer.columns is None or self._receive is not None:
            return None
        width = site.shape[1]
        for known in reversed(self._inputs):
            if known.tensor() is x and known.version == x._version and known.width == width:
                known.readers.append(site.name)
                return known
        self._inputs.append(_Input(weakref.ref(x), x._version, width, [site.name]))
        return self._inputs[-1]

    def _projected(self, use: _Use, x: Tensor) -> Tensor:
        """The input's columns times the site's matrix; taken once for sites that share both."""
        assert use.layer.columns is not None, f"{use.site.name} does not multiply its input as it is"
        matrix, products = self.inputs[use.site.name], use.source.projected if use.source else {}
        if id(matrix) not in products:
            products[id(matrix)] = use.layer.columns(use.module, x.detach(), self._examples).to(matrix.dtype) @ matrix
        return products[id(matrix)]

    def _columns(self, use: _Use, x: Tensor) -> Tensor:
        """The input's columns, made once for all sites that read it."""
        assert use.layer.columns is not None
        source = use.source
        if source is None:
            return use.layer.columns(use.module, x, self._examples)
        if source.columns is None:
            source.columns = use.layer.columns(use.module, x, self._examples)
        columns = source.columns
        source.left -= 1
        if source.left == 0:
            source.columns = None
        return columns

    @multiplying_on
    def _on_gradient(self, use: _Use, number: int, g: Tensor) -> None:
        if self._receive is None:
            name = use.site.name
            raise self._unusable(name, f"What {name} computes is differentiated inside of forward, before the loss is")
        x: Any = use.projected
        if x is None:
            kept = tuple(tensor.detach() for tensor in use.keeper.saved_tensors)
            x = kept[0] if len(kept) == 1 else kept
            if use.layer.columns is not None:
                x = self._columns(use, x)
        use.keeper = use.projected = None
        self._paused = True  # a layer may run its module again
        gradient = use.layer.gradient(use.module, x, g, self._examples)
        self._paused = False
        readers = tuple(use.source.readers) if use.source else (use.site.name,)
        name = use.site.name
        if self._calls[name] == 1:
            self._give(name, gradient, readers)
            return
        calls = self._arrived.setdefault(name, [])
        calls.append((number, gradient))
        if len(calls) == self._calls[name]:
            self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        """Join the uses of a repeated module: their gradients add up before anything is squared."""
        parts = [gradient for _, gradient in sorted(self._arrived.pop(name), key=lambda pair: pair[0])]
        self._give(name, _joined(parts), (name,))

    def _give(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        assert self._receive is not None
        self._receive(name, gradient, readers)


@contextlib.contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[tuple[str, nn.Module, Tensor]]]:
    """Every module's output tensor in the order in which they come to be, by the module's name, while the model runs inside."""
    seen: list[tuple[str, nn.Module, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            first = next(iter(output), None) if isinstance(output, tuple | list) else output
            if isinstance(first, Tensor):
                seen.append((name, module, first.detach()))

        return see

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module reads, call after call, while its model runs inside."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values()))).detach())

    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _recomputes(module: nn.Module) -> bool:
    """Whether a transformers layer checkpoints, as it only does in training mode, and does nothing else there."""
    if not vars(module).get("gradient_checkpointing"):  # set on the layer itself
        return False
    layer = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    return layer and not any("drop" in name and value for name, value in vars(module).items() if isinstance(value, float))


def _positions(gradient: Factored) -> Tensor:
    """Where each summand is from, `[B, R]`."""
    if gradient.positions_BR is not None:
        return gradient.positions_BR
    examples, summands = gradient.g_BRO.shape[:2]
    return torch.arange(summands, device=gradient.g_BRO.device).expand(examples, summands)


def _joined(parts: list[Gradient]) -> Gradient:
    """The sum of a weight's uses: factored ones side by side, dense ones added."""
    if all(isinstance(part, Factored) for part in parts):
        factored = [part for part in parts if isinstance(part, Factored)]
        return Factored(
            torch.cat([part.g_BRO for part in factored], 1),
            torch.cat([part.a_BRI for part in factored], 1),
            torch.cat([_positions(part) for part in factored], 1),
        )
    total = parts[0].dense()
    for part in parts[1:]:
        total = type(total)(total.w_BOI + part.dense().w_BOI)
    return total

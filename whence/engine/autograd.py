"""Whether captured gradients are those of the loss: a few rows in one batch, beside a plain backward pass of two of them alone.

Capture sees calls of modules, and takes each of them for the arithmetic of its kind, and their rows for those of the examples
in their order. Where a model does something else, this finds out, and what it is, before anything is computed.
"""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from whence import dist
from whence.capture import Capture, outputs_of
from whence.coverage import Site, selector_without
from whence.engine.partition import release_memory
from whence.engine.stream import Objective, Sink, one_for_each, stream, to_device
from whence.errors import CoverageError, NumericalError, WhenceError
from whence.gradients import Dense, Gradient
from whence.precision import multiplying
from whence.progress import note
from whence.shortage import is_out_of_memory
from whence.store.manifest import Folder
from whence.store.memory import Memory

if TYPE_CHECKING:
    from whence.engine.point import Point
    from whence.engine.queries import Queries

LENGTH = 8
"""Positions of the rows that are looked at, at least, if there are rows of so many."""

BATCH, ALONE = 4, 2
"""Rows in the batches that are looked at, and how many of them are computed alone."""

FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of weights that autograd can differentiate by."""

GROUP_BYTES, GROUPS = 32 * 2**20, 8
"""Bytes of weight gradients held at a time, so that a check needs less memory than the work it precedes; more of them take
another pass, up to `GROUPS` passes."""

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Relative errors that rounding explains; models of float64 do part of their work in float32."""

SHORT, SHORT_ALONE = 0.03, 0.1
"""The same for shorter formats: of gradients of the same pass, and of all modules' gradients together in a batch of another
shape, for which kernels and routers may choose otherwise."""

FLOOR = 1e-2
"""A module whose gradient is smaller than this share of that of all modules is measured by the latter."""

ENDS = 1e-6, 1 - 1e-6
"""Of the noise in [0, 1) that labels are drawn with: what lies at one end of a distribution, and at the other."""

SEPARATE = "running statistics instead of the batch's (track_running_stats=True), and losses that are sums over rows"

PLAIN = tuple(kind.forward for kind in (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention))
"""What modules do whose gradients are taken to be those of their kind."""


def check_rows(folder: Folder | Memory, point: Point, sites: Mapping[str, Site]) -> None:
    """Compare captured gradients of a few rows of the point with autograd's; folder and point remember that it was done.

    Notes of which sites nothing is captured though the loss depends on their weights, as their modules are not called. Raises
    CoverageError where others differ, or where rows depend on what they are batched with.
    """
    examples = point.examples
    ids = {place: f"row {examples.ids[place]}" for place in examples.usable}
    if ids:
        _check(folder, "check.json", _Sample(point, sites, examples.items, ids, point.likelihood), "rows")


def check_queries(folder: Folder | Memory, point: Point, sites: Mapping[str, Site], queries: Queries) -> None:
    """The same for what is measured of queries."""
    ids = {place: f"query {queries.ids[owner]}" for place, owner in enumerate(queries.owners)}
    measured = lambda model, batch, places: point.task.measurements(model, batch)  # noqa: E731
    _check(folder, "check-queries.json", _Sample(point, sites, queries.items, ids, measured), queries.fingerprint)


def _check(folder: Folder | Memory, file: str, sample: _Sample, of: str) -> None:
    """Compare, unless it is done: for this folder, or at this point, of the same and of these modules or more."""
    point, names = sample.point, frozenset(sample.sites)
    if _is_blank(point) or folder.has_json(file):
        return
    before = (found for (what, modules), found in point.checked.items() if what == of and names <= modules)
    if (found := next(before, None)) is None:
        found = point.checked[of, names] = dist.on_first(_checked, sample)
    folder.write_json(file, found)


def labels_drawn(point: Point, sites: Mapping[str, Site], check: bool = True) -> Literal["model", "data"]:
    """Whose labels a Fisher matrix is of where the model's are asked for: the data's, if the task draws none. That is said.

    Of tasks of the user's own two draws are compared; with no `check` only the arguments of `losses` are looked at.
    """
    if dist.on_first(_draws_labels, point, sites, check):
        return "model"
    note(
        f"warning: {type(point.task).__name__}.losses draws no labels with `noise`: this is the empirical Fisher matrix, of "
        f"the data's own labels, and is recorded as such (labels='data')"
    )
    return "data"


def _draws_labels(point: Point, sites: Mapping[str, Site], check: bool) -> bool:
    """Whether noise of both ends gives other losses, or other gradients."""
    losses = point.task.losses
    if losses.__module__.startswith("whence."):
        return True
    try:
        inspect.signature(losses).bind(point.model, {}, None)
    except TypeError:
        return False
    ids = {place: f"row {point.examples.ids[place]}" for place in point.examples.usable}
    if not (check and ids) or _is_blank(point):
        return True
    low, high = (_Sample(point, sites, point.examples.items, ids, _with_noise(point, value)) for value in ENDS)
    places = low.choose()
    try:
        values = [_watched(sample, places)[0] for sample in (low, high)]
        if not torch.equal(*values):
            return True
        first, second = (sample.captured(places) for sample in (low, high))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        return True
    return any(not torch.equal(first[name].dense().w_BOI, second[name].dense().w_BOI) for name in first)


def _is_blank(point: Point) -> bool:
    """Whether the model has no numbers, as where a plan is made: there is nothing to compare."""
    weight = next(point.model.parameters())
    return isinstance(weight, FakeTensor) or weight.device.type == "meta"


def _with_noise(point: Point, value: float) -> Objective:
    """The log-likelihood of labels drawn with this number in the place of each random one."""

    def objective(model: nn.Module, batch: Any, indices: Sequence[int]) -> Tensor:
        items = [point.examples.items[index] for index in indices]
        noise = [torch.full(point.task.noise_shape(item), value, dtype=torch.float64) for item in items]
        return -point.task.losses(model, batch, point.task.collate_noise(items, noise).to(point.device))

    return objective


def _checked(sample: _Sample) -> dict[str, Any]:
    """Which rows were compared, and which modules have a gradient without being called."""
    places, not_called = sample.choose(), list[str]()
    try:
        cudnn = torch.backends.cudnn
        with multiplying("float32", sample.point.device), cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
            not_called = _compare(sample, places)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        release_memory()
        note("gradients were not compared with autograd's: there is too little memory to form those of weights")
    except NumericalError:  # the pass over all rows says which they are
        pass
    if not_called:
        shown = ", ".join(not_called[:5])
        note(f"{len(not_called)} modules are left out: their weights are used without calling them ({shown})")
    return {"rows": [sample.ids[place] for place in places], "not_called": not_called}


def _compare(sample: _Sample, places: list[int]) -> list[str]:
    """The sites of which nothing is captured though they have a gradient; raises CoverageError where others' are off."""
    batches = [(order, sample.captured(order)) for order in (places, places[::-1])[: len(places)]]
    captured = batches[0][1]
    alone = [sample.alone([(found, order.index(place)) for order, found in batches], place) for place in places[:ALONE]]
    tolerance = _tolerance([sample.point.dtype, *(gradient.dtype for gradient in captured.values())])
    off = {name for errors in alone for name in errors.beyond(tolerance)}
    suspects = [name for name in sample.sites if name in off and name in captured]
    if suspects:
        _explain(sample, batches, suspects, tolerance)
    return [name for name in sample.sites if name in off and name not in captured]


def _tolerance(dtypes: Iterable[torch.dtype]) -> float:
    return max(TOLERANCE.get(dtype, SHORT) for dtype in dtypes)


@dataclass
class _Errors:
    """Norms by site: of a gradient, and of its difference from what was captured."""

    size: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def put(self, name: str, expected: Tensor, found: Tensor) -> None:
        """Measure a site's matrix `[O, I]`; found several times the larger error counts."""
        wide = torch.promote_types(expected.dtype, torch.float32)
        error = float(torch.linalg.vector_norm(found.to(wide) - expected.to(wide)))
        self.size[name] = float(torch.linalg.vector_norm(expected.to(wide)))
        self.error[name] = max(self.error.get(name, 0.0), error)

    def relative(self, name: str) -> float:
        """The error of a site beside its gradient, or beside a share of all gradients."""
        size = max(self.size[name], FLOOR * math.hypot(*self.size.values()), math.ulp(0))
        return self.error[name] / size

    def beyond(self, tolerance: float) -> list[str]:
        """The sites that are off by more; not those whose gradients are not finite."""
        return [name for name in self.size if self.relative(name) > tolerance]

    @property
    def together(self) -> float:
        """The error of all sites beside all gradients."""
        return math.hypot(*self.error.values()) / max(math.hypot(*self.size.values()), math.ulp(0))


Found = tuple[Mapping[str, Gradient], int]
"""What was captured of a batch, and the row in it."""


class _Kept(Sink):
    """Keeps every gradient."""

    def __init__(self) -> None:
        self.gradients: dict[str, Gradient] = {}

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        self.gradients[name] = gradient


@dataclass(frozen=True)
class _Sample:
    """Items of a point, of which a few are looked at; `ids` names those that can be."""

    point: Point
    sites: Mapping[str, Site]
    items: Sequence[Any]
    ids: Mapping[int, str]
    objective: Objective

    def choose(self) -> list[int]:
        """Items that differ, short ones, at least two of them; or one, where batches have no more."""
        sizes = {place: max(1, self.point.task.size(self.items[place])) for place in self.ids}
        distinct = list({self.ids[place].partition("#")[0]: place for place in reversed(list(self.ids))}.values())
        places = distinct if len(distinct) > 1 else list(self.ids)
        order = sorted(places, key=lambda place: (sizes[place] < LENGTH, abs(sizes[place] - LENGTH), place))
        longer = [place for place in order if sizes[order[0]] < sizes[place] <= 2 * sizes[order[0]] + LENGTH]
        chosen = list(dict.fromkeys([order[0], *longer, *order]))  # of different lengths, where that costs little
        chosen = [place for place in chosen if sizes[place] <= max(sizes[each] for each in chosen[:ALONE])][:BATCH]
        return chosen[: max(1, self.point.batch_tokens // max(sizes[place] for place in chosen))]

    def values(self, places: Sequence[int]) -> Tensor:
        """The objective of these items as one batch, `[B]`."""
        model, task = self.point.model, self.point.task
        batch = to_device(task.collate([self.items[place] for place in places]), self.point.device)
        return one_for_each(self.objective(model, batch, places), len(places), task)

    def value_alone(self, place: int) -> Tensor:
        """The objective of one item by itself, which went well in a batch. Raises CoverageError where it can't be computed."""
        try:
            return self.values([place])[0]
        except (RuntimeError, ValueError) as error:
            if isinstance(error, WhenceError) or is_out_of_memory(error):
                raise
            raise _not_alone(self, error) from error

    def captured(self, places: Sequence[int]) -> dict[str, Gradient]:
        """What is captured of these items as one batch."""
        kept, point = _Kept(), self.point
        with Capture(point.model, dict(self.sites)) as capture:
            stream(capture, point.task, self.items, [places], self.objective, kept, lambda positions: None)
        return kept.gradients

    def alone(self, found: Sequence[Found], place: int) -> _Errors:
        """How far what was captured is from the gradient of the item alone; of packed weights, from what is captured alone."""
        errors = self.errors(found, lambda: self.value_alone(place), list(self.sites))
        if packed := [name for name in found[0][0] if name not in errors.size]:
            again = self.captured([place])
            for name in packed:
                for captured, row in found:
                    errors.put(name, again[name].dense().w_BOI[0], captured[name][row : row + 1].dense().w_BOI[0])
        return errors

    def errors(self, found: Sequence[Found], value: Callable[[], Tensor], names: Sequence[str]) -> _Errors:
        """How far what was captured is from the gradient of `value`."""
        errors = _Errors()

        def receive(name: str, expected: Tensor) -> None:
            for captured, row in found:
                if name in captured:
                    errors.put(name, expected, captured[name][row : row + 1].dense().w_BOI[0])
                else:
                    errors.put(name, expected, torch.zeros_like(expected))

        self.differentiate(value, names, receive)
        return errors

    def differentiate(self, value: Callable[[], Tensor], names: Sequence[str], receive: Callable[[str, Tensor], None]) -> None:
        """Hand over the gradient of `value` at each of the sites whose weight is held by parameters, `[O, I]`."""
        held = {name: self.sites[name].layer.parameters(self.sites[name].uses[0][0]) for name in names}
        held = {name: each for name, each in held.items() if _differentiable(each, self.sites[name])}
        size = sum(parameter.nbytes for parameters in held.values() for parameter in parameters)
        while held:
            group, room = [], max(GROUP_BYTES, size // GROUPS)
            for name, parameters in held.items():
                room -= sum(parameter.nbytes for parameter in parameters)
                if room < 0 and group:
                    break
                group.append(name)
            gradients = self._gradients(value, [parameter for name in group for parameter in held[name]])
            for name in group:
                module, layer = self.sites[name].uses[0]
                parts = layer.parts(module, [gradients[id(parameter)] for parameter in held.pop(name)])
                receive(name, torch.cat(parts, layer.side))

    def _gradients(self, value: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
        """The gradients of some parameters, zero where there is none; the model's own are left as they are."""
        model = self.point.model
        owned = [(parameter, parameter.grad) for parameter in model.parameters()]
        stepping = [hooks for parameter in parameters if (hooks := parameter._post_accumulate_grad_hooks)]
        taken = [dict(hooks) for hooks in stepping]  # optimizers that step while the backward pass runs
        with Capture(model, {}):
            try:
                for hooks in stepping:
                    hooks.clear()
                for parameter in parameters:
                    parameter.grad = None
                    parameter.requires_grad_(True)
                with torch.enable_grad():
                    total = value()
                if total.requires_grad:
                    total.backward()
                return {id(p): torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters}
            finally:
                for hooks, own in zip(stepping, taken, strict=True):
                    hooks.update(own)
                for parameter, gradient in owned:
                    parameter.requires_grad_(False)
                    parameter.grad = gradient


def _differentiable(parameters: Sequence[nn.Parameter], site: Site) -> bool:
    """Whether the site's matrix is what these parameters hold: not packed, not elsewhere."""
    here = all(parameter.dtype in FORMATS and parameter.device.type != "meta" for parameter in parameters)
    sizes = [parameter.numel() if site.layer.piece is None else parameter[0].numel() for parameter in parameters]
    return here and sum(sizes) == math.prod(site.shape)


def _explain(
    sample: _Sample, batches: Sequence[tuple[list[int], Mapping[str, Gradient]]], suspects: Sequence[str], tolerance: float
) -> None:
    """Raise CoverageError with the cause: chance, rows or padding that are seen by others, or what the suspects compute."""
    places = batches[0][0]
    _refuse_chance(sample, places, tolerance)
    if len(places) > 1:
        for order, _ in batches:
            _refuse_others(sample, order, suspects, tolerance)
    off = dict[str, float]()
    for order, captured in batches:
        for row in range(len(order)):
            errors = sample.errors([(captured, row)], lambda order=order, row=row: sample.values(order)[row], suspects)
            for name in errors.beyond(tolerance):
                off[name] = max(off.get(name, 0), errors.relative(name))
    if not off:
        return
    both = {name: Dense(gradient.dense().w_BOI.sum(0, keepdim=True)) for name, gradient in batches[0][1].items()}
    summed = sample.errors([(both, 0)], lambda: sample.values(places).sum(), list(off))
    first = next(iter(off))
    module = sample.sites[first].uses[0][0]
    if len(places) > 1 and all(summed.relative(name) < share / 10 for name, share in off.items()):
        what = f"The rows that {first} is called with are not in the order of the examples"
        cause = "their sum is right: time before examples, a transposed or sorted batch, or a packed sequence does this"
    elif type(module).forward in PLAIN and "forward" not in vars(module):
        what = f"The weight of {first} is also used where its module is not called"
        cause = "F.linear or F.embedding with it, weights tied that way, or a hook on the module's output or the weight do this"
    else:
        what = f"{first} does not compute what its kind of layer does"
        cause = f"{type(module).__name__} scales, masks, normalises or rounds its weight, or has a forward of its own"
    listed = ", ".join(f"{name} (off by {_percent(share)})" for name, share in list(off.items())[:5])
    rest = selector_without(sample.sites, off)
    raise CoverageError(
        what,
        given=f"{len(off)} of {len(sample.sites)} modules whose gradients are not autograd's: {listed}"
        f"{' ...' if len(off) > 5 else ''}; {cause}",
        accepted="modules whose gradient, captured where they are called, is that of their weight",
        fix=f"leave it out: --modules '{rest}' (modules={rest!r})" if rest else "track other modules (--modules)",
        code=24,
    )


def _not_alone(sample: _Sample, error: Exception) -> CoverageError:
    """What to say where a row can't be computed by itself; the error's frames know where."""
    names = {id(module): name for name, module in sample.point.model.named_modules()}
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    named = [f"{name} ({type(module).__name__})" for module in frames if (name := names.get(id(module)))]
    return CoverageError(
        f"Rows see each other: one row alone can't be computed, by {named[-1] if named else 'the loss'}",
        given=str(error).splitlines()[0],
        accepted=SEPARATE,
        code=24,
    )


def _refuse_chance(sample: _Sample, places: Sequence[int], tolerance: float) -> None:
    """Raise CoverageError where the same batch gives something else each time."""
    (once, seen), (twice, again) = (_watched(sample, places) for _ in range(2))
    if torch.allclose(once, twice, rtol=tolerance, atol=tolerance * float(once.abs().max())):
        return
    where = _first_difference(seen, again, tolerance) or f"the loss of {type(sample.point.task).__name__}"
    row = int((once - twice).abs().argmax())
    raise CoverageError(
        f"The same rows give other numbers each time, first in {where}",
        given=f"{once[row]:.6g} and {twice[row]:.6g} for {sample.ids[places[row]]}",
        accepted="models that leave nothing to chance in evaluation mode",
        fix="switch it off there: nn.Dropout, or F.dropout(..., training=self.training)",
        code=24,
    )


def _refuse_others(sample: _Sample, places: Sequence[int], suspects: Sequence[str], tolerance: float) -> None:
    """Raise CoverageError where a row's gradient depends on what it is batched with."""
    short = tolerance >= SHORT
    dependent: dict[int, _Errors] = {}
    for row, place in enumerate(places):
        batched, errors = dict[str, Tensor](), _Errors()
        some = list(sample.sites) if short else suspects[:8]
        sample.differentiate(lambda row=row: sample.values(places)[row], some, batched.__setitem__)
        sample.differentiate(
            lambda place=place: sample.value_alone(place),
            some,
            lambda name, expected, errors=errors, batched=batched: errors.put(name, expected, batched.pop(name)),
        )
        if errors.together > SHORT_ALONE if short else errors.beyond(tolerance):
            dependent[row] = errors
    if not dependent:
        return
    _refuse_order(sample, places, tolerance)
    row, errors = next(iter(dependent.items()))
    sizes = [sample.point.task.size(sample.items[place]) for place in places]
    padded = all(sizes[row] < max(sizes) for row in dependent)
    longest = max(dependent, key=sizes.__getitem__)
    seen, apart = (_watched(sample, some)[1] for some in (places, places[longest : longest + 1]))
    where = None if padded else _first_difference(_row_of(seen, longest, len(places)), apart, tolerance)
    worst = max(errors.size, key=errors.relative)
    raise CoverageError(
        f"What {worst} learns from a row depends on the padding beside it"
        if padded
        else f"Rows see each other, first in {where or f'the loss of {type(sample.point.task).__name__}'}",
        given=f"the gradient of {worst} for {sample.ids[places[row]]}: {_percent(errors.relative(worst))} off between this row "
        f"alone and in a batch of {len(places)}",
        accepted="a mask that the model uses, where rows are padded" if padded else SEPARATE,
        fix="--batch-tokens 1 (batch_tokens=1) runs every row by itself",
        code=24,
    )


def _refuse_order(sample: _Sample, places: Sequence[int], tolerance: float) -> None:
    """Raise CoverageError where the losses of a batch are those of its rows, but in another order."""
    batched, _ = _watched(sample, places)
    alone = torch.cat([_watched(sample, [place])[0] for place in places])
    is_close = functools.partial(torch.allclose, rtol=tolerance, atol=tolerance * float(alone.abs().max()))
    if is_close(batched.sort().values, alone.sort().values) and not is_close(batched, alone):
        raise CoverageError(
            f"{type(sample.point.task).__name__} gives the losses of a batch in another order than its rows",
            given=f"{', '.join(f'{value:.6g}' for value in batched)}, where the rows by themselves have "
            f"{', '.join(f'{value:.6g}' for value in alone)}",
            accepted="one loss for each row, in the order of the rows that collate is given",
            fix="don't sort in collate; or put the losses back in order: losses[order.argsort()]",
            code=24,
        )


Seen = list[tuple[str, nn.Module, Tensor]]


def _watched(sample: _Sample, places: Sequence[int]) -> tuple[Tensor, Seen]:
    """The values of a batch, and every module's output on the way."""
    with Capture(sample.point.model, {}), outputs_of(sample.point.model) as seen, torch.no_grad():
        return sample.values(places).double().cpu(), seen


def _row_of(seen: Seen, row: int, examples: int) -> Seen:
    """What belongs to one row of a batch, of outputs that have the rows one after the other."""
    even = [(name, module, y) for name, module, y in seen if y.ndim and len(y) % examples == 0]
    return [(name, module, y.unflatten(0, (examples, -1))[row]) for name, module, y in even]


def _first_difference(seen: Seen, again: Seen, tolerance: float) -> str | None:
    """The first module whose outputs differ."""
    others = {(name, number): y for number, (name, _, y) in _numbered(again)}
    for number, (name, module, y) in _numbered(seen):
        other = others.get((name, number))
        if other is None or other.shape != y.shape or not y.is_floating_point() or not y.numel():
            continue
        if float((y - other).abs().max()) > tolerance * float(other.abs().max()):
            return f"{name} ({type(module).__name__})"
    return None


def _numbered(seen: Seen) -> list[tuple[int, tuple[str, nn.Module, Tensor]]]:
    """Each call with how many there were of its module before."""
    calls: dict[str, int] = {}
    numbered = []
    for each in seen:
        calls[each[0]] = calls.get(each[0], 0) + 1
        numbered.append((calls[each[0]], each))
    return numbered


def _percent(share: float) -> str:
    """A relative error in words; of a gradient of zero everything is."""
    return f"{share:.1%}" if share < 100 else "more than it is itself"

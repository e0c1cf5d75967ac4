"""A point of training: a model at some weights, with its task and its rows."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whence.adapters import is_adapter
from whence.coverage import WIDE, Coverage, Site, cover, trained
from whence.data.rows import Rows
from whence.engine.partition import batch_positions
from whence.engine.stream import Examples, Objective, encode, likelihood
from whence.errors import CoverageError, UsageError
from whence.progress import note
from whence.settings import Count, valid
from whence.store.fingerprint import fingerprint
from whence.tasks.base import Task
from whence.tasks.forward import borrowed


class Point:
    """A model at some weights, its task and its rows, and what all work on gradients asks of them, each found out once.

    The weights may not change while a point is in use: what is at other weights is another point. `rows` are training data as
    `whence.fit` takes them; a point that is only asked needs none. `batch_tokens` are positions per batch (default: by the
    device); they are halved for good where memory runs out.

        tuned, base = Point(tuned_model, task), Point(base_model, task, pretraining_rows)
        scores = score_points(tuned, base, queries, curvature.inverse())
    """

    def __init__(self, model: nn.Module, task: Task, rows: Any = (), *, batch_tokens: int | None = None):
        _check_kinds(model, task)
        model = borrowed(model)
        self.model, self.task, self.rows = model, task, rows
        if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise CoverageError(
                f"{absent[0]} has no numbers: it is on the meta device, as weights are that were moved to disk or never loaded",
                given=f"{len(absent)} of {sum(1 for _ in model.parameters())} weights",
                accepted="a model that is whole in memory",
                fix="load it without device_map or offload_folder: model, tokenizer = whence.load_model(...)",
            )
        first = next(model.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.sums = torch.promote_types(self.dtype, torch.float32)
        """The format of sums, of operators and of queries' gradients."""
        self.batch_tokens = batch_positions(valid(Count | None, batch_tokens, "batch_tokens"), self.device)
        self.checked: dict[tuple[str, frozenset[str]], dict[str, Any]] = {}
        """What comparing captured gradients with autograd's found (`whence.engine.autograd`): of what and of which modules."""
        self._covered: dict[tuple[str, ...] | str | None, Coverage] = {}
        self._passing: frozenset[str] = frozenset()

    @property
    def like(self) -> Tensor:
        """No numbers, in the format of sums and on the model's device."""
        return torch.empty(0, dtype=self.sums, device=self.device)

    @functools.cached_property
    def examples(self) -> Examples:
        """The rows, encoded. Raises UsageError where there are none."""
        return encode(self.task, self.rows, self.model)

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """Of the model: its architecture and its weights."""
        return fingerprint(self.model)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What of the task changes numbers."""
        return self.task.settings()

    def cover(self, modules: str | Sequence[str] | None = None) -> Coverage:
        """The tracked modules: see `cover_default`."""
        key = modules if modules is None or isinstance(modules, str) else tuple(modules)
        if key not in self._covered:
            self._covered[key] = found = cover_default(self.model, self.task, modules)
            if idle := [name for name in found.frozen_sites if name not in self._passing]:
                note(
                    f"warning: training left {len(idle)} of {len(found.sites)} tracked modules as they were "
                    f"({idle[0]} the first): what is found there moved nothing"
                )
        return self._covered[key]

    def passing(self, names: Sequence[str]) -> Point:
        """The same, where these modules count although training left them as they were: an earlier training moved them."""
        other = copy.copy(self)
        other._covered, other._passing = {}, frozenset(names)
        return other

    def only(self, rows: Sequence[int | str]) -> Point:
        """The same with some of its rows, by number or id. Raises UsageError for one that there is not.

        Rows of text are encoded only where they are chosen.
        """
        texts = self.rows if isinstance(self.rows, Rows) and "examples" not in vars(self) else None
        ids = self.examples.ids if texts is None else texts.ids
        places = {name: place for place, name in enumerate(ids)}
        chosen = [places.get(row, -1) if isinstance(row, str) else valid(int, row, "a row") for row in rows]
        if not chosen:
            raise UsageError("No row is named.", accepted=f"ids of the rows, or 0 to {len(ids) - 1}")
        if unknown := [row for row, place in zip(rows, chosen, strict=True) if not 0 <= place < len(ids)]:
            raise UsageError(f"There is no row {unknown[0]!r}", accepted=f"ids of the rows, or 0 to {len(ids) - 1}")
        fewer = copy.copy(self)
        if texts is None:
            fewer.examples = self.examples.take(chosen)
        else:
            fewer.rows = texts.take(chosen)
        return fewer

    def of(self, rows: Any) -> Point:
        """The same model and task with other rows."""
        other = copy.copy(self)
        vars(other).pop("examples", None)
        other.rows = rows
        return other

    def at(self, model: nn.Module) -> Point:
        """The same task and rows, encoded once, at the weights of another model."""
        other = Point(model, self.task, self.rows, batch_tokens=self.batch_tokens)
        other.examples = self.examples
        return other

    def provenance(self) -> dict[str, Any]:
        """What decides the gradients of its rows, for folders made from them."""
        task = {key: value for key, value in self.settings.items() if key != "measurement"}
        data = {"fingerprint": self.examples.fingerprint, "examples": len(self.examples)}
        return {"model": self.fingerprint, "data": data, "task": task}

    @property
    def likelihood(self) -> Objective:
        """The log-likelihood of each row's own labels, in nats."""
        return likelihood(self.task, self.examples)


def _check_kinds(model: object, task: Any) -> None:
    """Raise UsageError where model or task is something else, such as what belongs in the other's place."""
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"The model can't be a {type(model).__name__}.",
            accepted="a torch.nn.Module",
            fix="model, tokenizer = whence.load_model(NAME)" if isinstance(model, str | tuple) else "",
        )
    if isinstance(task, type) or not all(hasattr(task, name) for name in dir(Task) if not name.startswith("_")):
        kind = isinstance(task, type) and issubclass(task, Task)
        fix = f"an instance of it: {task.__name__}(...)" if kind else ""
        raise UsageError(
            f"The task can't be a {type(task).__name__}.",
            given=task.__name__ if kind else "",
            accepted="whence.CausalLM, Seq2Seq, Classification, Regression, or a task of your own, a subclass of whence.Task",
            fix="whence.CausalLM(tokenizer)" if hasattr(task, "all_special_ids") else fix,
        )
    if not _takes_two(task.losses):
        raise UsageError(
            f"{type(task).__name__} has losses that need further arguments.",
            given=f"losses{inspect.signature(task.losses)}",
            accepted="losses(model, batch, noise=None), which returns one number per example",
        )


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether it can be called with two arguments."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # of a builtin, nothing is known
        return True
    return True


def cover_default(model: nn.Module, task: Task, modules: str | Sequence[str] | None) -> Coverage:
    """The coverage of the selector; without one, the task's default, or all where it matches nothing.

    Where training moved only a part of the weights, and adapters or little of it match, all that it moved, but what is too
    wide for a covariance.
    """
    if modules is not None:
        return cover(model, modules)
    adapted, found, default = any(map(is_adapter, model.modules())), None, task.default_modules
    for selector in ("lora", default, "all"):
        try:
            found = cover(model, selector)
        except CoverageError:
            continue
        if not found.frozen or not (adapted or selector == "lora" or found.thin):
            if selector == "all" != default:
                matches = "little of what training moved" if found.frozen else "no module"
                note(f"{matches} matches {default!r}; tracking 'all' linear layers and convolutions")
            return found
    if found is None and len(trained(model)) == sum(1 for _ in model.parameters()):
        return cover(model, "all")  # to raise
    return _without_wide(cover(model, "trained"))


def _without_wide(coverage: Coverage) -> Coverage:
    """What training moved, but weights of which no covariance is made unless somebody asks for it."""
    wide = [name for name, site in coverage.sites.items() if _width(site) > WIDE]
    if not wide or len(wide) == len(coverage.sites):
        return coverage
    note(
        f"{', '.join(wide)} left out, which training moved, too: {max(_width(coverage.sites[name]) for name in wide):,} wide; "
        f"to track all: modules='trained' (--modules trained, and --largest-factor 8192 for its covariance)"
    )
    return coverage.without(wide)


def _width(site: Site) -> int:
    """Of its widest covariance."""
    return site.shape[1] if site.layer.one_hot else max(site.shape)


def warn_if_thin(coverage: Coverage) -> None:
    """Note that little of what training moved is tracked."""
    if coverage.thin:
        selector = "trained" if coverage.frozen else "all"
        note(
            f"warning: {1 - coverage.share:.0%} of the parameters{' that training moved' if coverage.frozen else ''} are not "
            f"looked at, so influence that went through them is not seen [WHENCE-17]; more: modules={selector!r} "
            f"(--modules {selector})"
        )


def shared_sites(at: Point, of: Point, names: Sequence[str], renamed: Mapping[str, str]) -> dict[str, Site]:
    """The modules `names` of `at` that `of` has too, as its sites; `renamed` gives their names there where they differ.

    A name that only `renamed` knows is of a module that `at` lacks, for which an operator makes gradients. Raises CoverageError
    where there is none, UsageError where one has another shape there.
    """
    if at is of and not renamed:
        return of.cover(names or None).sites
    here = at.cover(names or None).sites
    made = [name for name in names if name in renamed and name not in here]
    there = of.cover([renamed.get(name, name) for name in (*here, *made)]).sites
    pairs = {name: there[other] for name in here if (other := renamed.get(name, name)) in there}
    if other := [name for name, site in pairs.items() if site.shape != here[name].shape]:
        raise UsageError(
            f"{len(other)} of {len(here)} modules have another shape in the model of the rows",
            given=", ".join(f"{name} {here[name].shape} and {pairs[name].shape}" for name in other[:5]),
            accepted="modules of one shape; those that only one of the models has are left out",
            fix="leave them out of the operator's modules, or name their counterparts (names={...})",
        )
    weights = [sum(site.parameters for site in sites.values()) for sites in (pairs, here)]
    note(f"{len(pairs)} of {len(here)} modules are in both models, {weights[0] / weights[1]:.1%} of the parameters tracked")
    return pairs | {name: there[renamed[name]] for name in made if renamed[name] in there}

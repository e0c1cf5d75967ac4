"""The training of a finished run, repeated: what its scores promise, and scores made so (mirrored runs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from whence import dist
from whence.config import Resolved, read_config
from whence.engine.stream import Examples, encode
from whence.errors import UsageError
from whence.linalg.stats import spread
from whence.methods.base import Request, recipe_named
from whence.models import fresh_adapter
from whence.pipeline.comparison import FOLDER, request_of, score_by
from whence.pipeline.work import Workshop
from whence.store.digest import fingerprint_code
from whence.store.memory import work
from whence.store.scores import Scores, open_scores
from whence.train.state import read_state, repeatable
from whence.validate.bank import Spec
from whence.validate.results import Result, keep
from whence.validate.without import Removals, check_patch, check_subsets, check_without, keep_beside


@dataclass(frozen=True)
class Elsewhere:
    """A training that whence did not make: the checkpoint that the Trainer ended with, and the arguments that it was given."""

    checkpoint: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    initial_adapter: str | int | None = None
    """Of an adapter, how it began: its folder, or the seed that it was drawn with."""

    @classmethod
    def of(cls, training: str | Path | None, arguments: Mapping[str, Any], initial_adapter: str | int | None) -> Self | None:
        """The training whose checkpoint is named, if one is; raises UsageError where only its arguments are given."""
        if training is not None:
            return cls(Path(training), arguments, initial_adapter)
        if arguments or initial_adapter is not None:
            given = "initial_adapter" if initial_adapter is not None else ", ".join(arguments)
            fix = "--training CHECKPOINT (Python: training=...)"
            raise UsageError("The Trainer's arguments are given, but not the checkpoint it made.", given=given, fix=fix)
        return None

    def start(self, shop: Workshop) -> nn.Module:
        """The model that it began with."""
        began = self.initial_adapter
        if isinstance(began, int) or (began is not None and began.isdecimal() and not Path(began).exists()):
            return fresh_adapter(shop.base()[0], shop.model, int(began))
        return shop.base(began)[0]


def check_run(
    resolved: Resolved,
    chosen: Removals,
    *,
    subsets: tuple[Literal["halves", "removals"], int] | None = None,
    patch: int | None = None,
    trainer: Elsewhere | None = None,
    out: Path | None = None,
    rerun: bool = False,
) -> tuple[Result, list[Path]]:
    """Retrain a finished run without rows, or on `subsets` (which kind, how many) for its LDS, with the files of the result.

    They are in `out`; default: RUN/validation/removal, or lds-KIND. With `patch` nothing is retrained: the rows are
    read again in `patch` steps (RUN/validation/tail-patch). The finding of either is also kept beside the scores.
    `trainer` is the training that made the model from the run's base, where the run has none of its own.

    Raises UsageError where it isn't known how the model was trained, or there are no scores.
    """
    shop = Workshop.of(resolved)
    request, home = (trained_request if patch else repeatable_request)(shop, trainer), resolved.out / "scores"
    scores, held_out = open_scores(home), None if trainer else _held_out(shop)
    training = request.training
    assert training is not None
    name = f"lds-{subsets[0]}" if subsets else "tail-patch" if patch else "removal"
    place = out or resolved.out / "validation" / name

    def made_from() -> dict[str, object]:
        known = {"training": training.identity(), "queries": request.asked.fingerprint, "scores": scores.about}
        return {
            "stage": name,
            "settings": asdict(chosen),
            "subsets": subsets,
            "steps": patch,
            **known,
            "code": fingerprint_code(),
        }

    with work(place, made_from, rerun=rerun):
        if patch:
            result = check_patch(request, scores, chosen, steps=patch, held_out=held_out, out=place)
        elif subsets is None:
            result = check_without(request, scores, chosen, held_out=held_out, out=place)
        else:
            kind, count = subsets
            orders = tuple(range(chosen.orders))
            spec = Spec(kind, subsets=count, seeds=orders, share=chosen.fraction, seed=chosen.seed)
            bank = resolved.out / f"bank-{kind}.npz"
            given = {"held_out": held_out, "drift": chosen.drift, "together": chosen.together}
            result = check_subsets(request, scores, spec, **given, out=place, bank=bank)
        if subsets is None:
            dist.on_first(keep_beside, result, home)
        return result, dist.on_first(keep, result, place)


def mirror(
    run: str | Path,
    *,
    queries: int | None = None,
    training: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    initial_adapter: str | int | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
    **own: Any,
) -> Scores:
    """Scores of a finished run by repeating its training along with each query (Ko et al. 2024; docs/methods.md).

        scores = whence.mirror("runs/a", share=0.5, complement=True)

    `queries` is how many of the run's are taken, spread evenly; default: all. `own` are the method's settings
    (`whence.settings.Mirrored`). `training` is the checkpoint of the Trainer that made the model from the run's base, with the
    `arguments` that it was given, where whence did not train it; of an adapter also how that began (`initial_adapter`: its
    folder, or the seed that was set before `get_peft_model`). The scores are kept in `out`, default RUN/methods/mirror, of some
    queries mirror-QUERIES, and killed work resumes. The plan is shown before it begins; `scores.about` has each query's
    `own gain`, as a median, and the rank `correlation with EK-FAC` where the run has factors.

    For a model and rows that are not a run: `whence.attribute("mirror", model, task, queries, train, training=...)`.

    Raises UsageError where it isn't known how the model was trained, NumericalError where the training repeated ends elsewhere.
    """
    resolved = read_config(Path(run))
    elsewhere = Elsewhere.of(training, arguments or {}, initial_adapter)
    request = repeatable_request(Workshop.of(resolved), elsewhere)
    if queries is not None:
        request = replace(request, queries=request.queries.take(spread(len(request.queries), queries)))
    plain = request.settings.changed(per="example", norms=(), rescore=0)
    given, out = recipe_named("mirror").own(own), out or resolved.out / FOLDER / place_of(queries)
    return score_by("mirror", given, replace(request, settings=plain), resolved.out, rerun=rerun, out=out)[0]


def place_of(queries: int | None) -> str:
    """Where mirrored runs are kept: those of some queries beside those of all, which are another folder's."""
    return "mirror" if queries is None else f"mirror-{queries}"


def repeatable_request(shop: Workshop, trainer: Elsewhere | None) -> Request:
    """What a finished run asks about its rows, with a training that can be repeated: its own, or that of a Trainer."""
    if not shop.config.model.base:
        raise _unknown(shop)
    rate = trainer.arguments.get("learning_rate") if trainer else None
    request = trained_request(shop, trainer, learning_rate=rate)
    if trainer is None:
        return request
    state: Any = request.training
    return replace(request, training=repeatable(state, request.point, trainer.start(shop), trainer.arguments))


def trained_request(shop: Workshop, trainer: Elsewhere | None, *, learning_rate: float | None = None) -> Request:
    """What a finished run asks about its rows, with what is known of the training: its own, or that of a Trainer.

    If it logged no learning rate, this needs the peak rate to be given.
    """
    if (shop.config.train is None) == (trainer is None) or shop.config.stages:
        raise _unknown(shop)
    request = request_of(shop)
    if trainer is None:
        return request
    clip = {"max_grad_norm": float(trainer.arguments["max_grad_norm"])} if "max_grad_norm" in trainer.arguments else {}
    return replace(request, training=read_state(trainer.checkpoint, request.point, learning_rate=learning_rate, **clip))


def _unknown(shop: Workshop) -> UsageError:
    return UsageError(
        f"How the model of {shop.out} was trained, or from what, is unknown.",
        given="several trainings" if shop.config.stages else f"train {shop.config.train}, model {shop.config.model}"[:120],
        accepted="a run with one training of its own, or one whose model a Trainer made from the base that it names",
        fix="train in the run (whence init --train), or model.base, and --training CHECKPOINT --argument NAME=VALUE ...",
    )


def _held_out(shop: Workshop) -> Examples | None:
    """The rows that the training held out, encoded; None where it held out none."""
    names = set(shop.training.split["evaluation"])
    rows = shop.all_rows.take(number for number, name in enumerate(shop.all_rows.ids) if name in names)
    return encode(shop.task(), rows, shop.model) if names else None

"""The training of a finished run, repeated: what its scores promise, measured on the run itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from whence import dist
from whence.config import Resolved
from whence.engine.stream import Examples, encode
from whence.errors import UsageError
from whence.pipeline.comparison import request_of
from whence.pipeline.work import Workshop
from whence.store.digest import fingerprint_code
from whence.store.memory import work
from whence.store.scores import open_scores
from whence.train.state import read_state, repeatable
from whence.validate.bank import Spec
from whence.validate.results import Result, keep
from whence.validate.without import Removals, check_subsets, check_without, keep_removal


def check_run(
    resolved: Resolved,
    chosen: Removals,
    *,
    subsets: tuple[Literal["halves", "removals"], int] | None = None,
    trainer: tuple[Path, Mapping[str, Any]] | None = None,
    out: Path | None = None,
    rerun: bool = False,
) -> tuple[Result, list[Path]]:
    """Retrain a finished run without rows, or on `subsets` (which kind, how many) for its LDS, with the files of the result.

    They are in `out`; default: RUN/validation/removal, or lds-KIND. What is found of removals is said beside the scores, too.
    `trainer` is the checkpoint of a Trainer that made the model from the run's base, with the arguments that it was given.

    Raises UsageError where it isn't known how the model was trained, or there are no scores.
    """
    shop = Workshop.of(resolved)
    if (shop.config.train is None) == (trainer is None) or shop.config.stages or not shop.config.model.base:
        raise UsageError(
            f"It is not known how the model of {resolved.out} was trained, or from what.",
            given="several trainings" if shop.config.stages else f"train {shop.config.train}, model {shop.config.model}"[:120],
            accepted="a run with one training of its own, or one whose model a Trainer made from the base that it names",
            fix="train in the run (whence init --train), or model.base, and --training CHECKPOINT --argument NAME=VALUE ...",
        )
    request, home = request_of(shop), resolved.out / "scores"
    scores, held_out = open_scores(home), None
    if trainer is not None:
        checkpoint, arguments = trainer
        state = read_state(checkpoint, request.point)
        request = replace(request, training=repeatable(state, request.point, shop.base()[0], arguments))
    else:
        held_out = _held_out(shop)
    training = request.training
    assert training is not None
    name = f"lds-{subsets[0]}" if subsets else "removal"
    place = out or resolved.out / "validation" / name

    def made_from() -> dict[str, object]:
        known = {"training": training.identity(), "queries": request.asked.fingerprint, "scores": scores.about}
        return {"stage": name, "settings": asdict(chosen), "subsets": subsets, **known, "code": fingerprint_code()}

    with work(place, made_from, rerun=rerun):
        if subsets is None:
            result = check_without(request, scores, chosen, held_out=held_out, out=place)
            dist.on_first(keep_removal, result, home)
        else:
            kind, count = subsets
            orders = tuple(range(chosen.orders))
            spec = Spec(kind, subsets=count, seeds=orders, share=chosen.fraction, seed=chosen.seed)
            bank = resolved.out / f"bank-{kind}.npz"
            result = check_subsets(request, scores, spec, held_out=held_out, drift=chosen.drift, out=place, bank=bank)
        return result, dist.on_first(keep, result, place)


def _held_out(shop: Workshop) -> Examples | None:
    """The rows that the training kept out, encoded; None where it kept none."""
    names = set(shop.training.split["evaluation"])
    rows = shop.all_rows.take(number for number, name in enumerate(shop.all_rows.ids) if name in names)
    return encode(shop.task(), rows, shop.model) if names else None

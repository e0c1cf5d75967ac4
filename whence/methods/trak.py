"""TRAK: margins linearised, projected, and regressed on, averaged over models (Park et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from whence.engine.point import Point
from whence.gradients import dot
from whence.indexing.projected import curvature_of
from whence.methods.base import Recipe, Request
from whence.methods.projected import GIVES, Inverted, projected, shapes_of
from whence.models import load_model
from whence.operators.projection import random_projection
from whence.settings import setting
from whence.store.fingerprint import fingerprint
from whence.store.scores import Scores


class Trak(Inverted):
    """TRAK."""

    gram: Literal["module", "joint"] = setting(
        "module", "Invert the second moments of each module by itself, or of all together, as in the paper."
    )
    over: Literal["model", "checkpoints"] = setting("model", "Take the model, or average over the training's checkpoints.")
    models: str | None = setting(
        None, "Further models to average over, trained alike on these rows from other first weights: folders, joined by commas."
    )


def trak(request: Request, settings: Trak) -> Scores:
    """`(1/M sum_m phi_m(query)^T (Phi_m^T Phi_m + damping)^-1 phi_m(row)) (1/M sum_m 1 - p_m(row))` (eq. 13 to 17).

    `phi_m` are gradients of margins at model `m`, each with a projection of its own; of a query, of whatever is measured: that
    is the paper's with `measurement="margin"`. Of rows with several predictions the margins are added up, and `1 - p` is their
    mean. Values would be slopes per copy if the loss's second derivative in the margins were 1: their order is what counts.
    """
    parts, doubts = [], []
    for number, (name, point) in enumerate(_models(request, settings)):
        projection = random_projection(shapes_of(request), settings.dim, request.settings.seed + number)
        small = projected(request, projection, name, point=point, margins=True, joint=settings.gram == "joint")
        inverse = curvature_of(small.second_moments(), "TRAK").inverse(settings.damping)
        queries = inverse @ small.queries
        raw_QN = small.columns(lambda rows, queries=queries: dot(queries, rows))
        parts.append(small.scores(raw_QN, inverse.label, "TRAK score", n_train=request.settings.n_train))
        doubts.append(small.doubts())
    mean = Scores.mean(parts)
    return replace(mean, raw=mean.raw * torch.stack(doubts).mean(0).float().numpy())


def _models(request: Request, settings: Trak) -> Iterator[tuple[str, Point]]:
    """Names and points to average over."""
    if settings.over == "model":
        yield "model", request.point
    else:
        for checkpoint, point in request.checkpoints():
            yield f"checkpoint-{checkpoint.step}", point
    for number, model in enumerate(_further(settings), 1):
        yield f"model-{number}", request.point.at(model.to(request.point.device, request.point.dtype))


def _further(settings: Trak) -> Iterator[nn.Module]:
    return (load_model(path.strip(), device="cpu")[0] for path in (settings.models or "").split(",") if path.strip())


def _read(settings: Trak) -> list[dict[str, str]]:
    """Fingerprints of the models that the settings name."""
    return [fingerprint(model) for model in _further(settings)]


RECIPES = (
    Recipe("trak", "TRAK", "Park et al. 2023, section 3, eq. 13 to 17", trak, Trak, **GIVES, uses=("training",), reads=_read),
)

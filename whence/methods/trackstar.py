"""TrackStar: cosines of projected gradients that are whitened by their second moments (Chang et al. 2024)."""

from __future__ import annotations

import torch

from whence.gradients import dot
from whence.indexing.projected import curvature_of, grams
from whence.methods.adam import adam_metric
from whence.methods.base import Recipe, Request
from whence.methods.projected import GIVES, Inverted, cosines, projected, shapes_of
from whence.operators import Operator
from whence.operators.projection import random_projection
from whence.settings import Share, setting
from whence.store.scores import Scores


class TrackStar(Inverted):
    """TrackStar."""

    mix: Share = setting(0.5, "Share of the queries' second moments in the matrix that whitens; the rest is the rows'.")
    second_moment: bool = setting(False, "Divide gradients by the root of Adam's second moments at the last checkpoint.")


def trackstar(request: Request, settings: TrackStar) -> Scores:
    """Cosine of `R^-1/2 P grad m(query)` and `R^-1/2 P grad log p(row)` (Chang et al. 2024, section 3).

    `R` is `mix` times the mean of `g g^T` over the queries and `1 - mix` times that over the rows, a block per module, damped.
    The queries' is brought to the trace of the rows' first: how many tokens are measured of queries does not decide the mix.
    """
    projection: Operator = random_projection(shapes_of(request), settings.dim, request.settings.seed)
    if settings.second_moment:
        metric = adam_metric(request.point, request.names, request.kept_checkpoints()[-1])
        projection = projection @ metric.apply(torch.reciprocal, "inverse")
    small = projected(request, projection)
    rows, queries = small.second_moments(), grams(small.queries)
    size = sum(float(rows[name].trace()) for name in rows) / sum(float(queries[name].trace()) for name in rows)
    mixed = {name: (1 - settings.mix) * rows[name] + settings.mix * size * queries[name] for name in rows}
    inverse = curvature_of(mixed, "mixed second moments").inverse(settings.damping)
    whitened = inverse @ small.queries
    raw_QN = small.columns(lambda rows: dot(whitened, rows))
    lengths_Q, lengths_N = inverse.quadratic(small.queries).sqrt(), small.columns(inverse.quadratic, "norms").sqrt()
    return small.scores(cosines(raw_QN, lengths_Q, lengths_N), "TrackStar", "cosine", n_train=1)


RECIPES = (Recipe("trackstar", "TrackStar", "Chang et al. 2024, section 3", trackstar, TrackStar, **GIVES, uses=("training",)),)

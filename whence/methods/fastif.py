"""FastIF: influence of the rows that lie near a query in the model's own view, by tuned LiSSA."""

from __future__ import annotations

from dataclasses import replace

from whence.filter.candidates import Amount, Wanted, choose
from whence.filter.embeddings import Distance
from whence.methods.base import Recipe, Request
from whence.methods.representations import Embedded, embedding_knn
from whence.methods.stochastic import Steps, stochastic_inverse
from whence.settings import setting
from whence.store.scores import Scores


class Nearest(Steps):
    """Which rows are scored, and how."""

    candidates: str = setting("2%", "Rows nearest to each query that are scored: a number of rows, or a share.")
    distance: Distance = setting("euclidean", "Between mean last hidden states: euclidean or cosine.")


def fastif(request: Request, settings: Nearest) -> Scores:
    """LiSSA's scores of each query's nearest rows by the mean last hidden state (Guo et al. 2021, sections 3.1 and 3.2).

    The rows of all queries together are scored for all of them, and no other row is in the scores; `about["candidates"]` says
    how many are left out. The matrix is that of all rows. The released code writes `h <- v + (1 - d) h - G h / sigma`, which
    damps by `d sigma`: this d is `about["damp"]`, and what it comes to is `about["damping"]`.
    """
    near = embedding_knn(request, Embedded(distance=settings.distance))
    wanted = Wanted("embedding-knn", Amount.read(settings.candidates, "candidates"))
    rows, usable = choose({wanted.retriever: near.raw}, [wanted]).rows, request.point.examples.usable
    operator = stochastic_inverse(request, settings, "LiSSA", False, short=True)
    found = request.score(operator, point=request.point.only(rows.tolist()), n_train=request.settings.n_train or len(usable))
    counts = {"of": len(near.examples), "scored": len(rows), "left_out": len(near.examples) - len(rows)}
    by = {wanted.retriever: {"asked": wanted.amount.text, "rows": len(rows)}}
    about = {"text": f"{wanted.retriever}:{wanted.amount.text}", **counts, "by": by}
    damp = found.about["damping"] / found.about["scale"]
    return replace(found, about={**found.about, "candidates": about, "damp": damp})


SOURCE = "Guo et al. 2021, sections 3.1 and 3.2, equation 4"

PRICE = "forward passes over the rows, steps of a few rows for each query, gradients of the candidates"

RECIPES = (Recipe("fastif", "FastIF", SOURCE, fastif, Nearest, uses=("factors", "training"), price=PRICE),)

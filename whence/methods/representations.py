"""What looks alike to a model: its own hidden states, or the embeddings of another; forward passes only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from whence import dist
from whence.engine.forward import hidden_of, hidden_states, values_of
from whence.engine.point import Point
from whence.filter.embeddings import UNITS, Distance, nearness, read_embeddings, readable
from whence.linalg.similarity import cosines, linear_cka, masked_mean
from whence.methods.base import NoSettings, Recipe, Request
from whence.models import load_encoder
from whence.settings import Section, setting
from whence.store.digest import digest
from whence.store.fingerprint import fingerprint
from whence.store.intact import file_digest
from whence.store.scores import Scores
from whence.tasks.base import Batch
from whence.tasks.context import context_of
from whence.tasks.encoder import TextEncoder

Side = Literal["queries", "rows"]

LENGTH = 512
"""Tokens at which a text encoder's texts are cut, or earlier where it has no positions for so many."""


class Embedded(Section):
    """Where embeddings come from."""

    encoder: str | None = setting(None, "Text encoder, a hub id or a folder; default: the model's own hidden states.")
    rows_file: str | None = setting(None, "Embeddings of the rows: .npy in their order, or .npz with ids and embeddings.")
    queries_file: str | None = setting(None, "Embeddings of the queries, likewise.")
    distance: Distance = setting("cosine", "How near two embeddings are: cosine or euclidean.")

    def source(self, side: Side) -> str:
        """Where those of one side come from, for people."""
        return getattr(self, f"{side}_file") or self.encoder or "the model's mean last hidden state"


def similarity(request: Request, settings: NoSettings) -> Scores:
    """Cosine of the mean last hidden states of query and row."""
    mean_QI = torch.stack([h_TI.mean(0) for h_TI in hidden_of(request.point, request.asked)])
    return _compared(request, lambda h_BTI, real_BT: cosines(mean_QI, masked_mean(h_BTI, real_BT)), "cosine", "cosine of mean")


def cka(request: Request, settings: NoSettings) -> Scores:
    """Linear centred kernel alignment of the last hidden states of query and row (Kornblith et al. 2019, eq. 5)."""
    asked = hidden_of(request.point, request.asked)
    return _compared(request, lambda h_BTI, real_BT: linear_cka(asked, h_BTI, real_BT), "CKA", "linear CKA of")


def _compared(request: Request, compare: Callable[[Tensor, Tensor], Tensor], unit: str, how: str) -> Scores:
    """Scores of hidden states `[B, T, I]`, batch by batch, so that only the scores are held."""
    point = request.point

    def of(model: nn.Module, batch: Batch) -> Tensor:
        return compare(*hidden_states(point.task, model, batch))

    raw = values_of(point, point.examples, of, "representations", request.place("representations"))
    return request.scores_of(raw.double().numpy(), f"{how} last hidden states", unit)


def embedding_knn(request: Request, settings: Embedded) -> Scores:
    """Nearness of embeddings: yours, those of a text encoder, or the model's own mean hidden states."""
    x_QD, y_ND = (_embedded(request, settings, side) for side in ("queries", "rows"))
    how = " and ".join(dict.fromkeys(settings.source(side) for side in ("queries", "rows")))
    return request.scores_of(nearness(x_QD, y_ND, settings.distance), f"nearest by {how}", UNITS[settings.distance])


def _embedded(request: Request, settings: Embedded, side: Side) -> np.ndarray:
    """The embeddings `[n, D]` of one side."""
    examples, out = request.asked if side == "queries" else request.point.examples, request.place(f"embedded-{side}")
    if file := getattr(settings, f"{side}_file"):
        return dist.on_first(read_embeddings, file, examples.ids)
    if settings.encoder is not None:
        encoder, tokenizer = load_encoder(settings.encoder, device=request.point.device)
        limit, _ = context_of(encoder)
        task = TextEncoder(tokenizer, min(limit or LENGTH, LENGTH))
        point = Point(encoder, task, examples.rows, batch_tokens=request.settings.batch_tokens)
        return values_of(point, point.examples, task.embeddings, f"embeddings of {side}", out).T.numpy()
    if side == "queries":
        return torch.stack([h_TI.mean(0) for h_TI in hidden_of(request.point, request.asked)]).cpu().numpy()

    def of(model: nn.Module, batch: Batch) -> Tensor:
        return masked_mean(*hidden_states(request.point.task, model, batch)).T

    return values_of(request.point, request.point.examples, of, "embeddings of rows", out).T.numpy()


def _read(settings: Embedded) -> str:
    """A digest of the files that the settings name."""
    files = [dist.on_first(file_digest, readable(file)) for file in (settings.rows_file, settings.queries_file) if file]
    encoder = fingerprint(load_encoder(settings.encoder)[0]) if settings.encoder else {}
    return digest(*files, *encoder.values())


LOOKED_AT: dict[str, Any] = {"whole": True, "price": "a forward pass over the rows"}

RECIPES = (
    Recipe("representation-similarity", "Representation similarity", "Hanawa et al. 2021, section 2", similarity, **LOOKED_AT),
    Recipe("cka", "Linear CKA of representations", "Kornblith et al. 2019, eq. 5", cka, **LOOKED_AT),
    Recipe("embedding-knn", "Embedding kNN", "Guo et al. 2021, section 3.1", embedding_knn, Embedded, reads=_read, **LOOKED_AT),
)

"""dattri's own methods (github.com/TRAIS-Lab/dattri), as its benchmark runs them, on the models that whence trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dattri.algorithm.influence_function import IFAttributorArnoldi, IFAttributorCG
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quality import Method, Work

DAMPING = 0.1
"""What its search over dampings finds best for conjugate gradients on MNIST and logistic regression."""


def methods() -> dict[str, Method]:
    """Its influence functions, TRAK and the gradient dot product, by name."""
    return {
        f"dattri IF-CG, regularization {DAMPING:g}": influence(IFAttributorCG, max_iter=10),
        f"dattri IF-Arnoldi, regularization {DAMPING:g}": influence(IFAttributorArnoldi, max_iter=50),
        "dattri TRAK-1, 512": trak,
        "dattri Grad-Dot": gradient_dot,
    }


def influence(kind: Callable[..., Any], **settings: Any) -> Method:
    """One of its influence functions, whose target is the mean loss of a batch."""

    def scores(work: Work) -> np.ndarray:
        train, queries = loaders(work)
        attributor = kind(task=task(work, mean_loss(work)), device="cpu", regularization=DAMPING, **settings)
        attributor.cache(DataLoader(train.dataset, batch_size=len(work.setting.train)))
        return scored(attributor, train, queries)

    scores.__name__ = kind.__name__
    return scores


def gradient_dot(work: Work) -> np.ndarray:
    """TracIn of one checkpoint, its losses being those of single rows."""
    model = work.models[0]

    def loss(parameters: Any, row: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, row[0][None]), row[1][None])

    attributor = TracInAttributor(task=task(work, loss), weight_list=torch.ones(1) * 1e-3, normalized_grad=False, device="cpu")
    return scored(attributor, *loaders(work))


def trak(work: Work) -> np.ndarray:
    """TRAK of one model, trained on all rows, with 512 numbers of each gradient."""
    model = work.models[0]

    def log_p(parameters: Any, row: tuple[Tensor, Tensor]) -> Tensor:
        return -F.cross_entropy(functional_call(model, parameters, row[0][None]), row[1][None])

    def margin(parameters: Any, row: tuple[Tensor, Tensor]) -> Tensor:
        found = log_p(parameters, row)
        return found - torch.log(1 - torch.exp(found))

    settings: dict[str, Any] = {"projector_kwargs": {"proj_dim": 512, "device": "cpu"}, "device": "cpu"}
    attributor = TRAKAttributor(
        task=task(work, margin),
        correct_probability_func=lambda parameters, row: torch.exp(log_p(parameters, row)),
        **settings,
    )
    train, queries = loaders(work)
    attributor.cache(train)
    return scored(attributor, queries)


@torch.no_grad()
def scored(attributor: Any, *given: DataLoader) -> np.ndarray:
    """Its scores `[Q, N]`."""
    return attributor.attribute(*given).T.cpu().numpy()


def mean_loss(work: Work) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
    """Of a batch."""
    model = work.models[0]
    return lambda parameters, batch: F.cross_entropy(functional_call(model, parameters, batch[0]), batch[1])


def task(work: Work, loss: Callable[..., Tensor]) -> AttributionTask:
    """A loss at the trained weights."""
    model = work.models[0]
    return AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())


def loaders(work: Work) -> tuple[DataLoader, DataLoader]:
    """Of the rows and the queries, 500 at a time."""
    sets = (work.setting.train, work.setting.queries)
    pairs = [(torch.stack([x_I for x_I, _ in rows]), torch.tensor([y for _, y in rows])) for rows in sets]
    train, queries = (DataLoader(TensorDataset(*pair), batch_size=500) for pair in pairs)
    return train, queries

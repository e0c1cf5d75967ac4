"""DataInf: the mean of the rows' inverses in place of the inverse of their mean, in closed form (Kwon et al. 2024)."""

from __future__ import annotations

from whence.adapters import is_adapter
from whence.engine.mean_inverse import MeanInverse
from whence.methods.base import Recipe, Request
from whence.progress import note
from whence.settings import Positive, Section, setting
from whence.store.scores import Scores


class Swapped(Section):
    """How much of the identity is added to each row's outer product."""

    damping: Positive = setting(0.1, "Damping, in units of each module's mean squared gradient entry.")
    absolute_damping: Positive | None = setting(None, "The same damping for all modules, instead of `damping`.")


def datainf(request: Request, settings: Swapped) -> Scores:
    """`grad m(query)^T [1/n sum_i (g_i g_i^T + lambda)^-1] grad log p(row)`, module by module (Kwon et al. 2024, eq. 5).

    Three passes over the rows: their mean square, the queries' products, the scores. Only the queries' gradients are held.
    """
    if not any(map(is_adapter, request.point.model.modules())):
        note("DataInf is meant for the small blocks of LoRA: its error grows with the square of a block's size")
    inverse = MeanInverse(request.point, request.names, settings.damping, settings.absolute_damping, place=request.place)
    return request.score(inverse)


RECIPES = (Recipe("datainf", "DataInf", "Kwon et al. 2024, eq. 5", datainf, Swapped, price="three passes over the rows"),)

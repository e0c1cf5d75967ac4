"""What scores promise, done: rows are removed and the model retrained.

`Q` queries, `N` rows. Scores are effects of one more copy on what a query measures (a log-probability), so that removing
the rows with the highest should raise the query's loss the most.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from whence.errors import UsageError
from whence.linalg.stats import Interval, bootstrap
from whence.store.manifest import Folder
from whence.store.memory import Memory
from whence.validate.methods import scored
from whence.validate.results import Result
from whence.validate.settings import Setting
from whence.validate.trainer import retrain


def check_removal(
    setting: Setting,
    *,
    shares: Sequence[float] = (0.01, 0.05, 0.1),
    queries: int = 16,
    damping: float = 0.1,
    methods: Sequence[str] = ("ekfac", "identity"),
    seed: int = 0,
    folder: Folder | Memory | None = None,
) -> Result:
    """Retrain without the rows that each method puts on top of each query, and without random ones.

    What a method and a share gave is kept in the `folder`, if there is one, and not measured again.
    """
    began, kept, table, control = time.monotonic(), folder or Memory(), [], []
    says = [f"{setting.about}: retrained without the rows that each query's scores put on top"]
    model = setting.trained((seed,)).copy_of(0)
    found = {name: at(damping) for name, at in scored(setting, model, methods, seed).items()}
    for name, scores in found.items():
        for share in shares:
            part = f"{name.replace(' ', '-')}-{share:g}"
            if not kept.has(part):
                rises = removal(setting, scores, share, queries=queries, seed=seed)
                kept.save(part, {side: torch.from_numpy(np.ascontiguousarray(rise)) for side, rise in rises.items()})
            own = effects({side: rise.numpy() for side, rise in kept.load(part).items()})
            rows = rows_in(share, len(setting.train))
            row = {"method": name, "share": share, "rows": rows}
            table += [row | {"removed": what} | own[what].as_dict() for what in ("top", "top - random", "bottom")]
            if name == next(iter(found)):
                control.append(row | {"method": "random", "removed": "random"} | own["random"].as_dict())
            top, more = own["top"], own["top - random"]
            says.append(
                f"{name}, {rows} rows out: loss {top.mean:+.4f} nats, {more.mean:+.4f} more than without random rows "
                f"[{more.low:+.4f}, {more.high:+.4f}]{'' if more.low > 0 else ': NOT more than random rows'}"
            )
    about = {"setting": setting.name, "about": setting.about, "seconds": time.monotonic() - began}
    return Result("removal", about, {"Loss of the query after retraining without rows, nats": table + control}, says)


def removal(
    setting: Setting, scores_QN: np.ndarray, share: float = 0.05, *, queries: int = 32, controls: int = 8, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rise of each query's loss, `[Q]` nats, after retraining without a share of the rows.

    "top" are the rows that raise its measurement the most, "bottom" those that lower it the most; "random" is the mean over
    `controls` draws. Order, batches and steps are those of the full training with this seed; the first `queries` queries are
    asked. Raises UsageError where the scores are not of the setting's queries and rows.
    """
    expected = (len(setting.queries), len(setting.train))
    if scores_QN.shape != expected:
        raise UsageError("The scores are of other queries or rows", given=str(scores_QN.shape), accepted=str(expected))
    scores, rows = scores_QN[:queries], rows_in(share, len(setting.train))
    asked, draw = len(scores), np.random.default_rng(seed)
    order = np.argsort(-scores, axis=1, kind="stable")
    random = [draw.choice(scores.shape[1], rows, replace=False) for _ in range(controls)]
    left_out = [*order[:, :rows], *order[:, -rows:], *random, []]
    losses_KQ = -measured_without(setting, left_out, seed)[:, :asked]
    own, rises_KQ = np.arange(asked), losses_KQ - losses_KQ[-1]
    return {
        "top": rises_KQ[own, own],
        "bottom": rises_KQ[asked + own, own],
        "random": rises_KQ[2 * asked : 2 * asked + controls].mean(0),
    }


def rows_in(share: float, rows: int) -> int:
    """How many rows a share is, at least one."""
    return max(1, round(share * rows))


def effects(rises: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Means over queries, and how far top and bottom are from random (paired), with 95 % intervals."""
    random = rises["random"]
    gaps = {"top - random": rises["top"] - random, "bottom - random": rises["bottom"] - random}
    return {name: bootstrap(values) for name, values in {**rises, **gaps}.items()}


def measured_without(setting: Setting, left_out: Sequence[Sequence[int] | np.ndarray], seed: int = 0) -> np.ndarray:
    """Measurements `[K, Q]` after training without these rows, one set after the other, in order and batches of all rows."""
    weights_KN = np.ones((len(left_out), len(setting.train)))
    for own, rows in zip(weights_KN, left_out, strict=True):
        own[np.asarray(rows, int)] = 0
    replicas = retrain(
        setting.model(seed),
        setting.task,
        setting.train,
        replace(setting.recipe, seed=seed, order_seed=seed),
        weights_KN,
        progress="retrain without",
    )
    return replicas.measurements(setting.queries).double().cpu().numpy()

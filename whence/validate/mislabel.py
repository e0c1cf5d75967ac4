"""Finding wrong labels: part of the labels of a real data set are replaced, a model is trained on them, and rows are ranked.

How many of the wrong ones are among the first ones inspected is what a ranking is worth here. Influence is asked in two
ways: of each row on itself (Koh and Liang 2017: what only itself can have taught), and of each row on clean rows that were not
trained on. The loss of a row, its gradient's size and chance stand beside them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from whence.data import Rows
from whence.data.rows import with_contents
from whence.engine.point import Point
from whence.errors import UsageError
from whence.fitting import fit_at
from whence.linalg.stats import Interval, student
from whence.operators import Identity
from whence.progress import stage
from whence.scoring.score import score_points, self_influence_at
from whence.settings import Fit, Score
from whence.store.manifest import Folder
from whence.store.memory import Memory
from whence.tasks import Classification
from whence.tasks.base import Task
from whence.validate.results import Result
from whence.validate.settings import Setting
from whence.validate.trainer import Replicas, retrain

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Of the rows, that are inspected."""

METHODS = (
    "self-influence (EK-FAC)",
    "influence on clean rows (EK-FAC)",
    "gradient dot on clean rows",
    "gradient norm",
    "loss",
    "random",
)

CONTROLS = METHODS[3:]
"""What needs no attribution."""

GOAL, GOAL_SHARE = 0.9, 0.2
"""Share of the wrong labels that should be found in the first `GOAL_SHARE` of the rows."""


def mislabel(
    setting: Setting,
    *,
    planted: float = 0.1,
    seeds: Sequence[int] = range(5),
    damping: float = 0.1,
    shares: Sequence[float] = SHARES,
    folder: Folder | Memory | None = None,
) -> Result:
    """Replace `planted` of the labels of a classification setting, train on them, and rank the rows.

    Each seed draws different wrong labels, first weights and order of the rows. The clean rows are the setting's queries. What
    a seed gave is kept in the `folder`, if there is one, and not measured again.

    Raises UsageError for a setting that is not classification.
    """
    if not isinstance(setting.task, Classification):
        raise UsageError(
            f"{setting.name} has no labels that could be wrong", accepted="a classification setting, such as digits"
        )
    started, kept, labels = time.monotonic(), folder or Memory(), labels_of(setting.train)
    classes = int(max(labels.max(), labels_of(setting.queries).max())) + 1
    files = [f"seed-{seed}.json" for seed in seeds]
    with stage("mislabel", len(seeds), "seeds", done=sum(map(kept.has_json, files))) as advance:
        for seed, file in zip(seeds, files, strict=True):
            if not kept.has_json(file):
                kept.write_json(file, of_seed(setting, labels, classes, planted, damping, shares, seed))
                advance(1)
    found_SMH, auc_SM, seconds_SM, accuracies, fitted = (
        np.array([kept.read_json(file)[key] for file in files]) for key in ("found", "auc", "seconds", "accuracy", "fitted")
    )
    about = {
        "setting": setting.name,
        "rows": len(labels),
        "classes": classes,
        "planted": planted,
        "seeds": list(seeds),
        "damping": damping,
        "accuracy": _over_seeds(accuracies).as_dict(),
        "fitted": _over_seeds(fitted).as_dict(),
        "shares": list(shares),
        "seconds": round(time.monotonic() - started, 1),
    }
    return mislabel_result(about, found_SMH, auc_SM, seconds_SM.mean(0))


def mislabel_result(about: dict[str, Any], found_SMH: np.ndarray, auc_SM: np.ndarray, seconds_M: np.ndarray) -> Result:
    """What every method found with every seed, at each of the shares, in words and numbers."""
    shares, unseen, learnt = about["shares"], about["accuracy"]["mean"], about["fitted"]["mean"]
    says = [
        f"Wrong labels in {about['setting']}: {about['planted']:.0%} of {about['rows']:,} rows, {about['classes']} classes, "
        f"{len(about['seeds'])} seeds; the models are right on {unseen:.1%} of unseen rows and give back {learnt:.0%} of the "
        "wrong labels",
        f"  {'found when inspecting':<34}" + "".join(f"{share:>7.0%}" for share in shares) + "      AUC (95 %)",
    ]
    rows, detections, flags = [], [], []
    for number, name in enumerate(METHODS):
        recall, auc = [_over_seeds(values) for values in found_SMH[:, number].T], _over_seeds(auc_SM[:, number])
        lead = student(auc_SM[:, 0] - auc_SM[:, number], -1.0, 1.0) if number else None
        seconds, at = round(float(seconds_M[number]), 2), recall[shares.index(GOAL_SHARE)]
        detection = {"method": name, "recall": [each.as_dict() for each in recall], "auc": auc.as_dict()}
        detections.append(detection | {"lead": lead and lead.as_dict(), "seconds": seconds})
        row = {"method": name} | {f"found in {share:.0%}": each.mean for share, each in zip(shares, recall, strict=True)}
        rows.append(row | {"found_low": at.low, "found_high": at.high} | auc.columns("auc") | {"seconds": seconds})
        recalls = "".join(f"{each.mean:>7.1%}" for each in recall)
        says.append(f"  {name:<34}{recalls}      {auc.mean:.3f} ({auc.low:.3f} to {auc.high:.3f})")
        if lead and name in CONTROLS and not lead.low > 0:
            ahead = f"{lead.mean:+.3f} above ({lead.low:+.3f} to {lead.high:+.3f})"
            flags.append(f"{METHODS[0]} is not better than {name}: its AUC is {ahead}")
    best, low, high = (rows[0][name] for name in (f"found in {GOAL_SHARE:.0%}", "found_low", "found_high"))
    says.append(
        f"  {METHODS[0]} finds {best:.1%} ({low:.1%} to {high:.1%}) in the first {GOAL_SHARE:.0%}: "
        f"{'as it should' if best >= GOAL else 'FLAG less than ' + format(GOAL, '.0%')}"
    )
    says += [f"  FLAG {flag}" for flag in flags]
    return Result("mislabel", about | {"detections": detections, "passed": best >= GOAL}, {"": rows}, says, flags)


def _over_seeds(shares: np.ndarray) -> Interval:
    return student(shares, 0.0, 1.0)


def of_seed(
    setting: Setting, labels: np.ndarray, classes: int, planted: float, damping: float, shares: Sequence[float], seed: int
) -> dict[str, Any]:
    """What every method finds with one seed, as JSON values: shares found `[M][H]`, AUCs and seconds `[M]`."""
    wrong, noisy_labels = plant(labels, classes, planted, seed)
    noisy = relabelled(setting.train, noisy_labels)
    replicas = retrain(setting.model(seed), setting.task, noisy, setting.recipe, seeds=[seed], order_seeds=[seed])
    model = setting.model(seed)
    replicas.load_into(model, 0)
    rankings, taken = suspicions(model, setting.task, noisy, setting.queries, replicas, setting.modules, damping, seed)
    draw = np.random.default_rng(seed)
    return {
        "found": [[recall_at(rankings[name], wrong, share, draw) for share in shares] for name in METHODS],
        "auc": [area(rankings[name], wrong) for name in METHODS],
        "seconds": [taken[name] for name in METHODS],
        "accuracy": float(right(replicas, setting.queries, classes).mean()),
        "fitted": float(right(replicas, noisy, classes)[wrong].mean()),
    }


def suspicions(
    model: nn.Module, task: Task, noisy: Any, clean: Any, replicas: Replicas, modules: str, damping: float, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """How suspicious each ranking finds each row, `[N]` by name, the highest first; and the seconds that each took."""
    taken: dict[str, float] = {}
    found: dict[str, np.ndarray] = {}
    started = time.monotonic()

    def keep(name: str, values: np.ndarray, since: float) -> None:
        found[name], taken[name] = values, time.monotonic() - since

    point, together = Point(model, task, noisy), Score().changed(aggregate="queries")
    inverse = fit_at(point, Fit().changed(modules=modules)).inverse(damping)
    fitting = time.monotonic() - started
    started = time.monotonic()
    keep(METHODS[0], self_influence_at(point, inverse).raw[0], started - fitting)
    started = time.monotonic()
    keep(METHODS[1], -score_points(point, point, clean, inverse, together).raw[0], started - fitting)
    started = time.monotonic()
    dots = score_points(point, point, clean, Identity(inverse.names), together.changed(norms=("cosine",)))
    keep(METHODS[2], -dots.raw[0], started)
    keep(METHODS[3], dots.norms["gradient"], started)
    started = time.monotonic()
    keep(METHODS[4], replicas.losses(noisy)[0].numpy(), started)
    keep(METHODS[5], np.random.default_rng([seed, 1]).random(len(noisy)), time.monotonic())
    return found, taken


def labels_of(rows: Sequence[Any]) -> np.ndarray:
    """Indices of the classes, `[N]`."""
    return np.array([int(row["label"] if isinstance(row, Mapping) else row[1]) for row in rows])


def plant(labels: np.ndarray, classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows get a wrong label, `[N]`, and all labels with these: each a different class, drawn with the seed."""
    draw = np.random.default_rng([seed, 0])
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[draw.choice(len(labels), round(share * len(labels)), replace=False)] = True
    moved = (labels + draw.integers(1, classes, size=len(labels))) % classes
    return wrong, np.where(wrong, moved, labels)


def relabelled(rows: Sequence[Any], labels: np.ndarray) -> Sequence[Any]:
    """The rows with other labels; rows of text keep their ids."""
    if isinstance(rows, Rows):
        return with_contents(rows, [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)])
    return [(row[0], int(label)) for row, label in zip(rows, labels, strict=True)]


def right(replicas: Replicas, rows: Sequence[Any], classes: int) -> np.ndarray:
    """Which rows the first model gives their own label, `[N]`: no other has a smaller loss."""
    labels = labels_of(rows)
    losses = [replicas.losses(relabelled(rows, np.full(len(rows), label)))[0].numpy() for label in range(classes)]
    return np.argmin(losses, axis=0) == labels


def recall_at(suspicion: np.ndarray, wrong: np.ndarray, share: float, draw: np.random.Generator) -> float:
    """Share of the wrong rows among the first `share` of all; rows of one suspicion are taken in random order."""
    order = np.lexsort((draw.random(len(suspicion)), -suspicion))
    return float(wrong[order[: round(share * len(order))]].sum() / wrong.sum())


def area(suspicion: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the curve of true against false alarms (AUC); ties count half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(wrong, suspicion))

"""One row left out at a time from a training with AdamW, all else unchanged.

    python -m benchmarks.outside.adamw --setting text --data ../shared/data

Which methods tell what happens? AdamW divides by its own running moments, so that a row acts on all later steps; influence
functions know nothing of that. Its first step goes by the sign of the gradient, and what a row changes there has no slope.
Order, batches and steps stay as they were (Ilyas & Engstrom 2025 judge MAGIC so). Banks are kept in results/banks. Writes
adamw-text.md and .json, or adamw-lm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.command import run
from benchmarks.outside.tables import side_by_side
from benchmarks.quality import Measure, Method, by, evaluate, words
from whence.filter.bm25 import bm25_scores
from whence.validate.bank import Bank, Spec, make_bank
from whence.validate.lds import leave_one_out
from whence.validate.results import Result
from whence.validate.settings import Setting, setting
from whence.validate.trainer import data_order


@dataclass(frozen=True)
class Size:
    """Rows that are left out, and queries."""

    removals: int
    queries: int


TRAININGS: dict[str, dict[str, Any]] = {
    "As AdamW is: eps 1e-8": {"eps": 1e-8},
    "Smoother: eps 1e-5": {"eps": 1e-5},
    "Smoother still: eps 1e-3": {"eps": 1e-3},
    "With a warm-up, eps 1e-8": {"schedule": "warm-up"},
}
"""How the setting's recipe is changed. `eps` is added to the root of the second moments, which after one step is the gradient's
own size: the smaller it is, the nearer the first step comes to the sign. With a warm-up that step is short."""

SIZES = {"text": Size(100, 50), "lm": Size(64, 24)}
TINY = Size(6, 4)

MEASURES = {
    "leave-one-out": Measure("rows", 0, leave_one_out),
    "of rows first read later": Measure("later", 0, leave_one_out),
    "by rank": Measure("rows"),
}

METHODS: dict[str, Method] = {
    "MAGIC": by("magic"),
    "mirrored run": by("mirror"),
    "EK-FAC, damping 0.1": by("ekfac"),
    "EK-FAC, damping of training": by("ekfac", damping="training"),
    "K-FAC, damping 0.1": by("kfac"),
    "SOURCE": by("source"),
    "mean over checkpoints of EK-FAC": by("checkpoint-mean"),
    "TRAK": by("trak"),
    "RelatIF": by("relatif"),
    "LESS": by("less"),
    "TracIn": by("tracin"),
    "gradient dot": by("gradient-dot"),
    "gradient cosine": by("gradient-cosine"),
    "representation similarity": by("representation-similarity"),
    "BM25": words("bm25", bm25_scores),
    "random": by("random"),
}


def table(chosen: argparse.Namespace) -> Result:
    """Make the bank if it is missing, and hold every method against it."""
    own, size = setting(chosen.setting, chosen.data), TINY if chosen.tiny else SIZES[chosen.setting]
    own = smaller(own, len(own.train), size.queries)
    if chosen.tiny:
        own = smaller(replace(own, recipe=replace(own.recipe, epochs=2, batch_size=16)), 48, size.queries)
    spec = Spec("removals", size.removals, (0,), 1 / len(own.train))
    tables, rows, says = {}, [], []
    for title, changes in TRAININGS.items():
        changed = replace(own, recipe=replace(own.recipe, **changes))
        (value,) = changes.values()
        bank = make_bank(changed, spec, chosen.out / "banks" / f"adamw-{own.name}-{value}.npz")
        found, known = evaluate(changed, {"rows": bank, "later": later(bank, changed)}, METHODS, MEASURES)
        rows += [row | changes for row in found]
        tables[title] = side_by_side(found, MEASURES)
        says = [f"{method} does not apply: {why}" for method, why in known["refused"].items()]
    says = [
        f"{own.about}: {len(own.train):,} rows, of which {size.removals} are left out one at a time",
        f"Leave-one-out is Pearson's correlation over rows, by rank Spearman's: means over {len(own.queries)} queries, with "
        "95 % intervals that draw queries and rows again. Rows first read later are those that are not in the first step. "
        "Trainings: processor time, in that of one training",
        *says,
    ]
    heading = "One row left out of a training with AdamW"
    return Result(f"adamw-{chosen.setting}", {"rows": rows}, tables, says, heading=heading)


def later(bank: Bank, own: Setting) -> Bank:
    """The subsets of a bank whose rows are not among those of the training's first step."""
    first = next(data_order(range(len(own.train)), own.recipe, own.recipe.order_seed, 1))
    among = bank.kept[:, first].all(1)
    return replace(bank, kept=bank.kept[among], changes=bank.changes[:, among])


def smaller(own: Setting, rows: int, queries: int) -> Setting:
    """The first rows and queries of a setting."""
    texts = own.texts and (own.texts[0][:queries], own.texts[1][:rows])
    return replace(own, train=own.train[:rows], queries=own.queries[:queries], texts=texts)


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    options = {"--setting": {"default": "text", "choices": list(SIZES), "help": "topics of news, or a language model"}}
    return run("benchmarks.outside.adamw", __doc__ or "", table, given, data="textcls/ag_news, tinystories", options=options)


if __name__ == "__main__":
    raise SystemExit(main())

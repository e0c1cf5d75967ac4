"""Whole checks on a named setting: train its model, score with every method, retrain, compare.

`Q` queries, `N` training rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from whence.store.manifest import Folder
from whence.store.memory import Memory
from whence.validate.agreement import markdown
from whence.validate.bank import Spec, make_bank
from whence.validate.lds import LDS, ceiling, compare, lds
from whence.validate.methods import scored
from whence.validate.removal import Removed, removal
from whence.validate.settings import Setting

METHODS = ("ekfac", "kfac", "diagonal", "identity", "cosine")
CEILING = "another seed (noise ceiling)"


@dataclass(frozen=True)
class LDSCheck:
    """LDS of every method on one setting."""

    setting: str
    about: str
    kind: str
    subsets: int
    methods: dict[str, LDS]
    noise: LDS
    seconds: float

    def table(self) -> list[dict[str, Any]]:
        """Every method with its interval, and how far the first is above it; the noise ceiling last."""
        found = self.noise.interval
        ceiling_row = {"method": CEILING, "lds": found.mean, "low": found.low, "high": found.high}
        return [*compare(self.methods, next(iter(self.methods))), ceiling_row]

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """All tables by title."""
        return {f"LDS, {self.kind}": self.table()}

    def bars(self) -> list[dict[str, Any]]:
        """Rows of `whence.plots.validation.lds_figure`."""
        keys = {"method": "method", "lds": "value", "low": "ci_low", "high": "ci_high"}
        own = {"setting": self.setting, "measure": f"lds {self.kind}"}
        return [own | {new: row[old] for old, new in keys.items()} for row in self.table()]

    def summary(self) -> list[str]:
        """Lines that say what it means."""
        first, *others = self.methods
        found, noise = self.methods[first].interval, self.noise.interval
        what = "half of the rows" if self.kind == "halves" else "a few rows"
        verdict = "" if self.methods[first].beats_chance else ": no better than chance"
        behind = [name for name in others if self.methods[first].minus(self.methods[name]).low > 0]
        return [
            f"{self.about}: retrained on {self.subsets} subsets, each without {what}",
            f"{first}: LDS {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]{verdict}; training from another seed predicts "
            f"the same to {noise.mean:.3f}",
            f"beyond doubt (paired 95 %) better than: {', '.join(behind) or 'none of the others'}",
        ]

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        plain = ("setting", "about", "kind", "subsets", "seconds")
        return {
            "check": "lds",
            **{n: getattr(self, n) for n in plain},
            "summary": self.summary(),
            "tables": self.tables(),
            "flags": [],
        }


@dataclass(frozen=True)
class RemovalCheck:
    """What retraining without each method's top rows does, on one setting."""

    setting: str
    about: str
    found: dict[str, list[Removed]]
    """By method, one per share."""
    seconds: float

    def table(self) -> list[dict[str, Any]]:
        """Rise of the loss by method and share, with its interval; "random" rows are the control."""
        rows = []
        for name, several in self.found.items():
            for one in several:
                effects = one.effects
                for what in ("top", "top - random", "bottom"):
                    rows.append(
                        {"method": name, "share": one.share, "rows": one.rows, "removed": what} | effects[what].as_dict()
                    )
        first = next(iter(self.found.values()))
        control = [
            {"method": "random", "share": one.share, "rows": one.rows, "removed": "random"} | one.effects["random"].as_dict()
            for one in first
        ]
        return rows + control

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """All tables by title."""
        return {"Loss of the query after retraining without rows, nats": self.table()}

    def curve(self) -> list[dict[str, Any]]:
        """Rows of `whence.plots.validation.removal_figure`."""
        return [
            {"method": row["method"], "share": row["share"], "value": row["mean"], "ci_low": row["low"], "ci_high": row["high"]}
            for row in self.table()
            if row["removed"] in ("top", "random")
        ]

    def summary(self) -> list[str]:
        """Lines that say what it means."""
        lines = [f"{self.about}: retrained without the rows that each query's scores put on top"]
        for name, several in self.found.items():
            for one in several:
                effects = one.effects
                verdict = "" if one.beats_random else ": NOT more than random rows"
                own, more = effects["top"], effects["top - random"]
                lines.append(
                    f"{name}, {one.rows} rows out: loss {own.mean:+.4f} nats, {more.mean:+.4f} more than without random rows "
                    f"[{more.low:+.4f}, {more.high:+.4f}]{verdict}"
                )
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        plain = {name: getattr(self, name) for name in ("setting", "about", "seconds")}
        return {"check": "removal", **plain, "summary": self.summary(), "tables": self.tables(), "flags": []}


def check_lds(
    setting: Setting,
    out: str | Path,
    *,
    kind: Literal["halves", "removals"] = "removals",
    subsets: int = 64,
    damping: float = 0.1,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
) -> LDSCheck:
    """Retrain on subsets, kept in the folder `out` as a bank, and see how well each method's sums predict what happens."""
    began = time.monotonic()
    spec = Spec(kind, subsets=subsets, seeds=(seed, seed + 1))
    bank = make_bank(setting, spec, Path(out) / f"bank-{kind}.npz")
    model = setting.trained((seed,)).copy_of(0)
    found = {name: lds(scores(damping), bank) for name, scores in scored(setting, model, methods, seed).items()}
    return LDSCheck(setting.name, setting.about, kind, subsets, found, ceiling(bank), time.monotonic() - began)


def check_removal(
    setting: Setting,
    *,
    shares: Sequence[float] = (0.01, 0.05, 0.1),
    queries: int = 16,
    damping: float = 0.1,
    methods: Sequence[str] = ("ekfac", "identity"),
    seed: int = 0,
    folder: Folder | Memory | None = None,
) -> RemovalCheck:
    """Retrain without the rows that each method puts on top of each query, and without random ones.

    What a method and a share gave is kept in the `folder`, if there is one, and not measured again.
    """
    began, kept = time.monotonic(), folder or Memory()

    def removed(name: str, scores: np.ndarray, share: float) -> Removed:
        part, sides = f"{name.replace(' ', '-')}-{share:g}", ("top", "bottom", "random")
        if not kept.has(part):
            found = removal(setting, scores, share, queries=queries, seed=seed)
            tensors = {side: torch.from_numpy(np.ascontiguousarray(getattr(found, side))) for side in sides}
            kept.save(part, {**tensors, "rows": torch.tensor(found.rows)})
        own = kept.load(part)
        return Removed(share, int(own["rows"]), *(own[side].numpy() for side in sides))

    model = setting.trained((seed,)).copy_of(0)
    scores = {name: at(damping) for name, at in scored(setting, model, methods, seed).items()}
    found = {name: [removed(name, own, share) for share in shares] for name, own in scores.items()}
    return RemovalCheck(setting.name, setting.about, found, time.monotonic() - began)


def as_page(result: Any) -> str:
    """A result as Markdown: what it means, then its tables."""
    if hasattr(result, "markdown"):
        return result.markdown()
    tables = result.tables() if hasattr(result, "tables") else {"": result.table()}
    lines = "\n".join(f"    {line}" for line in result.summary())
    return "\n".join(
        [lines + "\n", *(f"{f'## {title}' if title else ''}\n\n{markdown(rows)}" for title, rows in tables.items())]
    )

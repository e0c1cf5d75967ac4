"""Results of checks as files: JSON with everything, Markdown for people, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whence.plots import validation as plots
from whence.plots.style import save
from whence.store.digest import plain
from whence.store.manifest import atomic
from whence.validate.checks import LDSCheck, RemovalCheck, as_page
from whence.validate.loo import COLD, LeaveOneOut
from whence.validate.methods import EXACT, NAMES
from whence.validate.pbrf import Check

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def keep(result: Any, folder: Path) -> list[Path]:
    """Write `result.json`, `result.md` and the figures of a result into the folder; returns what was written."""
    with atomic(folder / "result.json") as temporary:
        temporary.write_text(json.dumps(values(result.as_json()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic(folder / "result.md") as temporary:
        temporary.write_text(as_page(result), encoding="utf-8")
    drawn = [save(drawing, folder / f"{name}.png") for name, drawing in figures(result).items()]
    return [folder / "result.json", folder / "result.md", *drawn]


def values(found: Any) -> Any:
    """As JSON values that every reader takes: what is no number (never measured, say) is null."""
    found = plain(found)
    if isinstance(found, dict):
        return {key: values(value) for key, value in found.items()}
    if isinstance(found, list):
        return [values(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def figures(result: Any) -> Mapping[str, Figure]:
    """The figures of a result, by name."""
    if isinstance(result, Check):
        return _pbrf(result)
    if isinstance(result, LeaveOneOut):
        return {
            "scatter": loo_figure([result]),
            "methods": plots.bars_figure([plots.agreement_bars(result.table(), "retraining")]),
        }
    if isinstance(result, LDSCheck):
        return {"lds": plots.lds_figure(result.bars())}
    if isinstance(result, RemovalCheck):
        return {"removal": plots.removal_figure(result.curve())}
    table = result.table()
    for value, name in (("auc", "AUC"), ("mrr", "mean reciprocal rank")):
        if table and value in table[0]:
            return {value: plots.bars_figure([plots.interval_bars(table, value, name)])}
    return {}


def loo_figure(results: list[LeaveOneOut]) -> Figure:
    """A scatter of each result: exact influence and what a cold start without the row gave."""
    return plots.scatter_figure(
        [
            plots.scatter_of(found.about, found.scores[EXACT], found.effects[COLD], "retrained without the row")
            for found in results
        ]
    )


def _pbrf(result: Check) -> dict[str, Figure]:
    solved, others = result.solved[0], [name for name in NAMES.values() if name in result.solved[0].scores][:1]
    tried = ~np.isnan(solved.residuals_ER)
    panels = [
        plots.scatter_of(
            f"{EXACT}, change {epsilon:g}/N", solved.scores[EXACT][:, tried[e]], solved.effects_EQR[e][:, tried[e]], "PBRF"
        )
        for e, epsilon in enumerate(solved.epsilons)
        if e in (0, len(solved.epsilons) - 1)
    ]
    panels += [
        plots.scatter_of(f"{name}, change {solved.epsilons[-1]:g}/N", solved.scores[name], solved.effects_EQR[-1], "PBRF")
        for name in others
    ]
    drawn = {
        "scatter": plots.scatter_figure(panels),
        "methods": plots.bars_figure([plots.agreement_bars(result.table())]),
        "convergence": plots.lines_figure(plots.convergence_lines(result.convergence())),
    }
    if result.ladders:
        drawn["ladder"] = plots.bars_figure(plots.ladder_bars(result.tables()["From retraining to influence"]))
    return drawn

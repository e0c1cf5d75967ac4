"""How well do scores predict retraining, by how much each method damps? A sweep on small settings, with intervals.

    python -m benchmarks.damping --data ../shared/data

On the banks of `make quality` (benchmarks/results/banks), which it does not make. Each method is tried with shares of the mean
eigenvalue, and with what the training itself damped with. Writes damping.json and damping.md, where settings and methods
that are not tried stay as they were.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality import EXACT, MEASURES, RESULTS, Work, of_training
from whence.engine.point import Point
from whence.methods.base import Request, attribute
from whence.methods.damping import damping_of_training
from whence.store.files import atomic
from whence.train.replay import Recorded
from whence.validate.bank import open_bank, refuse_other
from whence.validate.exact import gauss_newton, influence
from whence.validate.lds import LDS
from whence.validate.problem import Problem
from whence.validate.settings import setting
from whence.validate.trainer import recorded

SETTINGS = ("concrete", "energy", "digits", "text")

DAMPINGS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""In units of the mean eigenvalue: each module's for factors, else that of all modules."""

TRAINING = "training"

Damping = float | str
Scored = Callable[[Work, Damping], "np.ndarray | None"]
Found = dict[tuple[str, Damping, str], LDS]
"""Agreement with retraining by method, damping and measure."""


def by_recipe(name: str, only: Damping | None = None, **own: Any) -> Scored:
    """Scores of a method of the registry, with one damping only where that is said."""

    def scored(work: Work, damping: Damping) -> np.ndarray | None:
        if only not in (None, damping):
            return None
        factors = work.curvature(name if name in ("kfac", "diagonal") else "ekfac", 0)
        given = (work.models[0], work.setting.task, work.setting.queries, work.setting.train)
        return attribute(name, *given, factors=factors, training=trained(work), damping=damping, **own).values

    return scored


def trained(work: Work) -> Recorded:
    """The training of the first model, repeated for what its optimizer remembers at the end."""
    own = work.setting
    last = own.recipe.steps(len(own.train))
    given = (work.models[0], own.task, own.train, own.recipe)
    return work.shared(("training",), lambda: recorded(*given, checkpoints=[last], progress=""))


def exact(work: Work, damping: Damping) -> np.ndarray | None:
    """The damped Gauss-Newton matrix of all weights solved with exactly, in the dual form: what "cg" comes to."""
    own = work.setting
    if own.name not in EXACT:
        return None
    problem = work.shared(("problem",), lambda: Problem(work.models[0], own.task, own.train, own.queries, own.modules))
    curvature = work.shared(("exact",), lambda: gauss_newton(problem))
    absolute = of_training(own) if damping == TRAINING else None
    chosen = curvature.damping(0.0 if isinstance(damping, str) else damping, absolute)
    return influence(problem, curvature.inverse(chosen.absolute))[0] / len(own.train)


WHOLE = "exact Gauss-Newton"

METHODS: dict[str, Scored] = {
    WHOLE: exact,
    "EK-FAC": by_recipe("ekfac"),
    "K-FAC": by_recipe("kfac"),
    "diagonal": by_recipe("diagonal"),
    "Arnoldi with complement": by_recipe("arnoldi"),
    "Arnoldi without complement": by_recipe("arnoldi", complement=False),
    "Nystroem of rank 64": by_recipe("nystroem"),
    "conjugate gradients": by_recipe("cg", only=TRAINING, tolerance=1e-3),
}
"""Adding a method is one line: its name, and a function from `Work` and a damping to scores `[Q, N]`."""


def sweep(name: str, data: Path, results: Path, methods: Mapping[str, Scored], dampings: Sequence[Damping]) -> dict[str, Any]:
    """Rows of one setting, and what its training damped with."""
    own = setting(name, data)
    banks = {kind: open_bank(results / "banks" / f"{name}-{kind}.npz") for kind in ("removals", "halves")}
    for bank in banks.values():
        refuse_other("The bank", bank.about, {"setting": own.describe()})
    work, found, rows = Work(own, seeds=(0,)), Found(), []
    curvature = work.curvature("ekfac", 0)
    request = Request(Point(work.models[0], own.task, own.train), own.queries, factors=curvature, training=trained(work))
    absolute, mean = damping_of_training(request).mean, curvature.mean_eigenvalue
    print(f"{name}: {own.about}; damping of training {absolute:.2g}, {absolute / mean:.2g} x mean eigenvalue", flush=True)
    for method, scored in methods.items():
        for damping in dampings:
            before = time.process_time()
            if (scores := scored(work, damping)) is None:
                continue
            seconds = time.process_time() - before
            for measure, each in MEASURES.items():
                value = found[method, damping, measure] = each.of(scores, banks[each.kind])
                about = {
                    "method": method,
                    "damping": damping,
                    "measure": measure,
                    "seconds": round(seconds, 2),
                }
                rows.append(about | interval(value))
            values = " ".join(f"{found[method, damping, measure].mean:7.3f}" for measure in MEASURES)
            print(f"  {method:28s} {damping!s:9s} {values}  {seconds:6.1f} s", flush=True)
    about = {"about": own.about, "optimizer": own.recipe.optimizer, "training": absolute, "mean": mean}
    return {**about, "rows": rows, "ahead": ahead(found, dampings)}


def joined(earlier: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, and of methods that were not tried now what was found earlier."""
    tried = {row["method"] for row in found["rows"]}
    kept = [row for row in earlier.get("rows", ()) if row["method"] not in tried]
    return {**found, "rows": [*kept, *found["rows"]], "ahead": found["ahead"] or earlier.get("ahead", [])}


def interval(value: LDS) -> dict[str, float]:
    """Mean and ends of the 95 % interval."""
    found = value.interval
    return {"value": round(found.mean, 4), "ci_low": round(found.low, 4), "ci_high": round(found.high, 4)}


def ahead(found: Found, dampings: Sequence[Damping]) -> list[dict[str, Any]]:
    """How far the whole matrix with the training's damping is ahead of EK-FAC with 0.1, and with its best (paired)."""
    rows = []
    tried = {method for method, damping, _ in found if damping == TRAINING}
    whole = WHOLE if WHOLE in tried else "conjugate gradients"
    for measure in MEASURES if {whole, "EK-FAC"} <= tried else ():
        best = max(dampings, key=lambda damping: found["EK-FAC", damping, measure].mean)
        for label, damping in (("EK-FAC, damping 0.1", 0.1), (f"EK-FAC, its best ({best})", best)):
            gap = found[whole, TRAINING, measure].minus(found["EK-FAC", damping, measure])
            low, high = round(gap.low, 4), round(gap.high, 4)
            rows.append({"measure": measure, "of": label, "value": round(gap.mean, 4), "ci_low": low, "ci_high": high})
    return rows


def markdown(settings: Mapping[str, Any], dampings: Sequence[Damping]) -> str:
    """Tables, one for each setting and measure."""
    lines = [
        "# How much to damp",
        "",
        "LDS by method and damping, with 95 % intervals from resampling queries and subsets together. Damping is in units",
        "of the mean eigenvalue (each module's for EK-FAC, K-FAC and diagonal; of all modules for the others); *training*",
        "is 1 / sum of learning rates + weight decay, of AdamW in its metric `diag(sqrt(v))`: there the mean over weights is",
        "told. Written by `python -m benchmarks.damping`.",
    ]
    for name, found in settings.items():
        times = found["training"] / found["mean"]
        lines += [
            "",
            f"## {name}",
            "",
            f"{found['about']}. Training ({found['optimizer']}) damps with {found['training']:.2g}, {times:.2g} x mean.",
        ]
        for measure in MEASURES:
            rows = {(row["method"], row["damping"]): row for row in found["rows"] if row["measure"] == measure}
            lines += [
                "",
                f"### {measure}",
                "",
                f"| method | {' | '.join(map(str, dampings))} |",
                f"| --- |{' ---: |' * len(dampings)}",
            ]
            for method in dict.fromkeys(method for method, _ in rows):
                cells = [rows.get((method, damping)) for damping in dampings]
                best = max(cell["value"] for cell in cells if cell)
                told = (written(cell, cell["value"] == best) if cell else "" for cell in cells)
                lines.append(f"| {method} | {' | '.join(told)} |")
            for gap in (gap for gap in found["ahead"] if gap["measure"] == measure):
                between = f"{gap['value']:+.3f} [{gap['ci_low']:+.3f}, {gap['ci_high']:+.3f}]"
                lines += ["", f"The whole matrix with the training's damping is ahead of {gap['of']} by {between}."]
    return "\n".join(lines) + "\n"


def written(cell: Mapping[str, Any], best: bool) -> str:
    """A value with half the width of its interval."""
    text = f"{cell['value']:.3f} ± {(cell['ci_high'] - cell['ci_low']) / 2:.3f}"
    return f"**{text}**" if best else text


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damping", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with uci, textcls, tinystories")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="some of them, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder with banks/, and for damping.*")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None, dampings: Sequence[Damping] = (*DAMPINGS, TRAINING)) -> int:
    """Sweep, and write what came of it."""
    chosen = arguments(given)
    torch.set_num_threads(1)
    methods = {name: METHODS[name] for name in METHODS if name in chosen.methods.split(",")}
    found = {name: sweep(name, chosen.data, chosen.out, methods, dampings) for name in chosen.settings.split(",")}
    file = chosen.out / "damping.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = {**earlier, **{name: joined(earlier.get(name, {}), own) for name, own in found.items()}}
    texts = {"damping.json": json.dumps(found, indent=1) + "\n", "damping.md": markdown(found, dampings)}
    for name, text in texts.items():
        with atomic(chosen.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

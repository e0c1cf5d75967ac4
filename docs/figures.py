"""Draws the pictures in docs/assets from the demo's run: `whence demo`, then `python docs/figures.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import whence
from whence.fitting.health import health
from whence.plots import factors, scores
from whence.plots.style import save

ASSETS = Path(__file__).parent / "assets"


def main(run: Path = Path("runs/demo"), module: str = "model.layers.0.mlp.down_proj", query: int = 0) -> None:
    """One module's eigenvalues, and one query's scores."""
    curvature = whence.open_factors(run / "factors")
    (found,) = [entry for entry in health(curvature, damping=0.1) if entry.module == module]
    lam_OI, sides = curvature.blocks[module].lam_OI, curvature.sides[module]
    spectrum = factors.spectrum(lam_OI, found)
    values = whence.open_scores(run / "scores")
    drawings = {
        "lambda": factors.draw_lambda(factors.lambda_map(lam_OI, spectrum, sides), module),
        "spectrum": factors.draw_spectrum(spectrum),
        "sides": factors.draw_sides(sides, found),
        "distribution": factors.draw_distribution(factors.distribution(spectrum), spectrum),
        "cumulative": factors.draw_cumulative(spectrum),
        "scores": scores.draw_scores(
            scores.score_curve(values.values[query]), scores.score_histogram(values.values[query]), values.unit
        ),
    }
    for name, drawing in drawings.items():
        save(drawing, ASSETS / f"{name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))

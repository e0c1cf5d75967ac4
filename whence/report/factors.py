"""What is found by looking at factors: pictures and a summary of chosen modules, and the health of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from whence.errors import NumericalError, UsageError
from whence.fitting.covariance import Sides
from whence.fitting.curvature import Curvature
from whence.fitting.health import Health, choose_modules, condition_words, health, rank_words
from whence.plots import factors as plots
from whence.plots.style import save
from whence.progress import note, stage
from whence.report.html import filled
from whence.settings import Inspect
from whence.show.numbers import many
from whence.store.digest import canonical_json, digest
from whence.store.files import atomic
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder

GUIDE = {
    "lambda.png": "the eigenvalues of the curvature, one per pair of an output and an input direction, strongest directions at "
    "the top left. A smooth fade from there is what K-FAC assumes; stripes and patches are what the correction of EK-FAC adds.",
    "spectrum.png": "the same eigenvalues sorted. Directions above the dashed line are measured by the data, those below are "
    "shaped by the damping. A long flat floor means that most directions were hardly seen.",
    "sides.png": "the two covariances that the directions come from. A cliff at the rank means directions that the sample "
    "never visited: more rows help if there are fewer positions than columns, otherwise the model itself doesn't use them.",
    "distribution.png": "how many eigenvalues there are of each size. For those far left of the damping only the damping "
    "counts. Two humps mean two kinds of directions.",
    "cumulative.png": "how concentrated the curvature is: the fewer eigenvalues hold 90 % of the sum, the fewer directions the "
    "loss is sensitive to. (These are shares of curvature, not of variance in the data.)",
}
"""How to read each picture, in a sentence or two; docs/inspect.md says more."""


def inspect_factors(
    curvature: Curvature,
    out: str | Path,
    settings: Inspect | None = None,
    *,
    damping: float = 0.1,
    rerun: bool = False,
) -> list[Path]:
    """Write pictures and a summary of the chosen modules, and the health of all modules, to the folder `out`.

    `settings` choose the modules (see `choose_modules`) and how the map is coloured; `damping` is relative to each module's
    mean eigenvalue. A folder that is finished and unchanged is left as it is, an unfinished one is gone on with, and one made
    from other factors or settings is refused (StaleArtifact) unless `rerun` moves it aside. Returns all files.

    Raises UsageError where nothing is chosen, and NumericalError where eigenvalues are not finite: then `health.md` says
    which, and sound modules are drawn.
    """
    import matplotlib

    settings = settings or Inspect()
    names = choose_modules(curvature.blocks, settings.layer, settings.modules)
    if settings.cmap not in matplotlib.colormaps:
        accepted = "viridis, magma, cividis or another colormap of matplotlib"
        raise UsageError(f"There is no colormap {settings.cmap!r}.", accepted=accepted)
    if curvature.provenance:
        identity = digest(canonical_json(curvature.provenance))
    else:
        identity = fingerprint_operator(curvature.operator)["identity"]
    provenance = {"stage": "inspect", "factors": identity, "settings": {**settings.as_json(), "damping": damping}}
    with Folder.claim(out, provenance, rerun=rerun) as folder:
        if folder.finished:
            note(f"{folder.path} is finished and unchanged: nothing to draw")
            return [folder.path / name for name in folder.manifest["files"] if name != "config.json"]
        found = health(curvature, damping)
        folder.write_json("health.json", {"damping": damping, "modules": [entry.as_json() for entry in found]})
        _write(folder.path / "health.md", health_table(found, damping, curvature.about))
        written = [folder.path / "health.json", folder.path / "health.md"]
        with stage("inspect", len(names), "modules") as advance:
            for entry in found:
                if entry.module in names:
                    written += inspect_module(curvature, entry, folder.path, settings)
                    advance(1)
        drawn = {entry.module: folder_of(folder.path, entry) for entry in found if entry.module in names}
        _write(folder.path / "index.html", pictures_page(found, drawn, damping, curvature.about))
        written.insert(2, folder.path / "index.html")
        if broken := [entry for entry in found if entry.not_finite or _broken_sides(entry)]:
            raise NumericalError(
                f"The eigenvalues of {broken[0].module} are not finite",
                given=f"NaN or infinity in {len(broken)} of {len(found)} modules, see {folder.path / 'health.md'}",
                fix="look for rows with a huge or undefined loss (whence data preview), and fit again, in float32",
            )
        folder.finish()
    return written


def inspect_module(curvature: Curvature, found: Health, out: Path, settings: Inspect) -> list[Path]:
    """Write one module's pictures and summary to a folder of its own; pictures that are there already are kept."""
    folder = folder_of(out, found)
    sides = curvature.sides.get(found.module)
    marks: dict[float, int] = {}
    written: list[Path] = []
    if not found.not_finite:
        block = curvature.blocks[found.module]
        values = plots.spectrum(block.lam_OI, found)
        marks = plots.cumulative(values.values)[1]
        drawings = {
            "lambda.png": lambda: plots.draw_lambda(
                plots.lambda_map(block.lam_OI, values, sides, settings.clip_percentile), found.module, settings.cmap
            ),
            "spectrum.png": lambda: plots.draw_spectrum(values),
            "distribution.png": lambda: plots.draw_distribution(plots.distribution(values), values),
            "cumulative.png": lambda: plots.draw_cumulative(values),
        }
        if sides and not _broken_sides(found):
            drawings["sides.png"] = lambda: plots.draw_sides(sides, found)
        for name, draw in drawings.items():
            written.append(folder / name if (folder / name).exists() else save(draw(), folder / name))
    facts = module_facts(found, sides, marks, curvature.about)
    guide = {name: text for name, text in GUIDE.items() if folder / name in written}
    _write(folder / "summary.md", summary_markdown(found, facts, guide))
    _write(folder / "summary.txt", summary_text(found, facts, guide))
    return [*written, folder / "summary.md", folder / "summary.txt"]


def folder_of(out: Path, found: Health) -> Path:
    """Where a module's pictures are."""
    return out / (found.module.replace("/", "_") or "model")


def pictures_page(found: Sequence[Health], drawn: Mapping[str, Path], damping: float, about: dict[str, Any]) -> str:
    """A page with the health of all modules and the pictures of those that were `drawn`, which are by name in these folders."""
    without = without_sides(about)
    pictures = {
        module: [
            (f"{folder.name}/{name}", name.removesuffix(".png"), text)
            for name, text in GUIDE.items()
            if (folder / name).is_file()
        ]
        for module, folder in drawn.items()
    }
    made = [(name.replace("_", " "), str(about[name])) for name in ("method", "examples", "labels") if name in about]
    rows = [_row(entry, without) for entry in found]
    return filled("inspect.html.j2", SimpleNamespace(unit=""), rows=rows, drawn=pictures, damping=damping, made=made)


def module_facts(found: Health, sides: Sides | None, marks: dict[float, int], about: dict[str, Any]) -> dict[str, str]:
    """What there is to say about a module, as pairs of a name and words."""
    total = found.shape[0] * found.shape[1]
    broken = f"{found.not_finite:,} NaN or infinite, {found.negative:,} negative"
    facts = {
        "shape": f"{found.shape[0]:,} outputs x {found.shape[1]:,} inputs = {total:,} eigenvalues",
        "numbers": broken if found.not_finite or found.negative else "all finite and none negative",
    }
    if "method" in about:
        facts["fitted"] = (
            f"{about['method']}, covariances over {many(about['examples'], 'row')} ({many(about['positions'], 'position')}), "
            f"eigenvalues over {many(about['eigenvalue_examples'], 'row')}, labels from the {about['labels']}"
        )
    if found.not_finite:
        return facts | {"pictures": "none: there is nothing to draw where eigenvalues are not finite"}
    facts |= {
        "mean, largest, smallest": f"{found.mean:.3e}, {found.largest:.3e}, {found.smallest:.3e}",
        "damping d": f"{found.d:.3e}",
        "effective rank at d": f"{rank_words(found.effective_rank)} of {total:,} ({found.relative_rank:.1%})",
        "condition with d": condition_words(found.condition),
        "zero to working precision": f"{found.zero:.1%}",
    }
    facts |= {
        f"{share:.0%} of the sum": f"in the largest {count:,} eigenvalues ({count / total:.2%})"
        for share, count in marks.items()
    }
    if not (sides and found.inputs and found.outputs):
        return facts | {"eigenvalues of the covariances": without_sides(about)}
    unit = "rows" if sides.by_example else "positions"
    for name, side in (("input covariance A", found.inputs), ("gradient covariance S", found.outputs)):
        facts[name] = f"rank {side.rank:,} of {side.width:,}, condition {condition_words(side.condition)}, "
        facts[name] += f"{side.samples:,} {unit} ({side.per_column:,.1f} per column"
        if side.columns < side.width:
            facts[name] += f" of its widest block, {side.columns:,}" if side.columns > 1 else ", as it is diagonal"
        facts[name] += ")"
    if sides.group != found.module:
        facts["input covariance A"] += f", that of {sides.group}, which reads the same input"
    return facts


def summary_markdown(found: Health, facts: dict[str, str], guide: dict[str, str]) -> str:
    """One module in Markdown: facts, warnings, pictures and how to read them."""
    lines = [f"# {found.module}", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items()), ""]
    lines += [f"**Warning:** {text}.\n" for text in found.warnings]
    lines += [f"![{name}]({name})\n\n**How to read it:** {text}\n" for name, text in guide.items()]
    return "\n".join([*lines, UNIT, ""])


def summary_text(found: Health, facts: dict[str, str], guide: dict[str, str]) -> str:
    """The same as plain text."""
    width = max(map(len, facts))
    lines = [found.module, "", *(f"{name:<{width}}  {text}" for name, text in facts.items()), ""]
    lines += [f"WARNING: {text}" for text in found.warnings] + [""] * bool(found.warnings)
    lines += [f"{name}: {text}" for name, text in guide.items()]
    return "\n".join([*lines, "", UNIT, ""])


UNIT = (
    "Eigenvalues are of the Gauss-Newton matrix of the mean loss per row, in nats^2 per unit of weight^2; damping d is a "
    "multiple of their mean; effective rank = sum of lambda / (lambda + d)."
)


def health_table(found: Sequence[Health], damping: float, about: dict[str, Any]) -> str:
    """All modules in Markdown, a row each."""
    rows = [_row(entry, without_sides(about)) for entry in found]
    unsound = sum(not entry.sound for entry in found)
    bad, good = f"**{unsound} of {len(found)} modules can't be used.**", "All numbers are finite, and none is negative."
    verdict = bad if unsound else good
    table = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))]
    intro = f"{verdict} Damping d is {damping:g} times each module's mean eigenvalue. A: inputs, S: output gradients."
    return "\n".join(["# Health of the factors", "", intro, "", *table, "", UNIT, ""])


def without_sides(about: dict[str, Any]) -> str:
    """Why a module has no eigenvalues of covariances."""
    return "none with this method" if about.get("method") in ("identity", "diagonal") else "not kept"


def _row(entry: Health, without: str) -> dict[str, str]:
    """A module's row of the table, by column."""
    rank = f"{rank_words(entry.effective_rank)} ({entry.relative_rank:.1%})"
    unknown = "not a number" if math.isnan(entry.effective_rank) else ""
    sides = {
        f"{what} {name}": text
        for name, side in (("A", entry.inputs), ("S", entry.outputs))
        for what, text in (
            ("rank", f"{side.rank:,} of {side.width:,}" if side else without),
            ("positions per column", f"{side.per_column:,.1f}" if side else without),
        )
    }
    return {
        "module": entry.module,
        "shape": f"{entry.shape[0]:,} x {entry.shape[1]:,}",
        "mean": _number(entry.mean),
        "largest": _number(entry.largest),
        "condition with d": condition_words(entry.condition),
        "effective rank": unknown or rank,
        **sides,
        "zero": unknown or f"{entry.zero:.1%}",
        "negative": f"{entry.negative:,}",
        "NaN or infinite": f"{entry.not_finite:,}",
        "warnings": "; ".join(entry.warnings) or "none",
    }


def _number(value: float) -> str:
    if math.isnan(value):
        return "not a number"
    return f"{value:.2e}" if math.isfinite(value) else "infinite"


def _broken_sides(entry: Health) -> bool:
    return any(side is not None and bool(side.not_finite) for side in (entry.inputs, entry.outputs))


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

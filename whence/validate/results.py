"""What a check found, and its files: JSON with everything, Markdown for people, tables, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whence.errors import UsageError
from whence.plots import panels
from whence.plots import validation as plots
from whence.plots.style import save
from whence.show import markup
from whence.store.files import atomic
from whence.store.plain import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The result of a check."""

    check: str
    about: dict[str, Any]
    """What it was made with and single numbers that came out, by name."""
    tables: dict[str, list[Row]]
    """By title; one without a title is in `says` already."""
    says: list[str]
    """Lines for people: what it means, with the flags."""
    flags: list[str] = field(default_factory=list)
    """Evidence against what was checked."""
    arrays: dict[str, Any] = field(default_factory=dict)
    """Everything that was measured, by name."""
    heading: str = ""
    """Of its page."""

    def __repr__(self) -> str:
        return f"Result({self.check}: {self.says[0].strip() if self.says else 'nothing'}; {len(self.flags)} warnings)"

    def __str__(self) -> str:
        return "\n".join(self.says)

    def _repr_html_(self) -> str:
        in_table = {text for row in self.tables.get("", []) for text in map(shown, row.values())}
        parts = []
        for text in map(str.strip, self.says):
            if not any(text.endswith(cell) for cell in in_table if cell):  # a line of the summary that is a row of the table
                parts.append(markup.line(text))
        for title, rows in self.tables.items():
            names = columns(rows)
            cells = [[shown(row.get(name)) for name in names] for row in rows]
            parts += [markup.line(title, faint=True)] if title else []
            parts.append(markup.table([name.replace("_", " ") for name in names], cells))
        return markup.framed(self.heading, *parts)

    def row(self, **wanted: Any) -> Row:
        """The first row of a table with these values in these columns; raises UsageError where there is none."""
        rows = [row for table in self.tables.values() for row in table]
        found = next((row for row in rows if all(row.get(name) == value for name, value in wanted.items())), None)
        if found is None:
            name, value = next(iter(wanted.items()))
            accepted = ", ".join(dict.fromkeys(str(row[name]) for row in rows if name in row))
            raise UsageError(f"{value!r} was not measured", given=str(wanted), accepted=accepted)
        return found

    def markdown(self) -> str:
        """The same as a page."""
        parts = [f"# {self.heading}\n"] if self.heading else []
        lead = "* " if self.heading else "    "
        parts.append("\n".join(lead + line for line in self.says) + "\n")
        parts += [f"{f'## {title}' if title else ''}\n\n{markdown_table(rows)}" for title, rows in self.tables.items()]
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values; what is not a number (never measured, say) is null."""
        said = {"summary": self.says, "tables": self.tables, "flags": self.flags}
        return plain({"check": self.check, **self.about, **said, **self.arrays})


def keep(result: Result, folder: Path) -> list[Path]:
    """Write `result.json`, `result.md` and the figures of a result into the folder; returns what was written."""
    texts = {
        "result.json": json.dumps(result.as_json(), indent=1, ensure_ascii=False) + "\n",
        "result.md": result.markdown(),
    }
    for name, text in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    drawn = [save(drawing, folder / f"{name}.png") for name, drawing in figures(result).items()]
    return [*(folder / name for name in texts), *drawn]


def columns(rows: Sequence[Row]) -> list[str]:
    """Names of the columns of a table, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows of a table as Markdown."""
    if not rows:
        return ""
    names = columns(rows)
    lines = [names, ["---"] * len(names), *([shown(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def figures(result: Result) -> dict[str, Figure]:
    """The figures of a result by name; the columns of its tables say which."""
    drawn: dict[str, Figure] = {"scatter": panels.scatter_figure(pairs)} if (pairs := scatters(result)) else {}
    for rows in result.tables.values():
        names = columns(rows)
        if "relative_error" in names:
            drawn["convergence"] = panels.lines_figure(plots.convergence_lines(rows))
        elif "objective" in names:
            drawn["ladder"] = panels.bars_figure(plots.ladder_bars(rows))
        elif "pearson_se" in names and "methods" not in drawn:
            drawn["methods"] = panels.bars_figure([plots.agreement_bars(rows)])
        elif "removed" in names:
            drawn["removal"] = panels.lines_figure(plots.removal_lines(rows))
        elif "lds" in names:
            best_first = sorted(rows, key=lambda row: -row["lds"])
            title = f"{result.about['setting']} lds {result.about['kind']}"
            drawn["lds"] = panels.bars_figure([plots.interval_bars(best_first, "lds", "LDS", title)])
        for value, name, base in (("auc", "AUC", 0.5), ("mrr", "mean reciprocal rank", 0.0)):
            if value in names:
                drawn[value] = panels.bars_figure([plots.interval_bars(rows, value, name, base=base)])
    return drawn


def loo_figure(results: Sequence[Result]) -> Figure:
    """A scatter of each result beside each other."""
    return panels.scatter_figure([panel for result in results for panel in scatters(result)])


def scatters(result: Result) -> list[panels.Scatter]:
    """Influence and what was measured: of single rows left out, or of the largest and the smallest change under the PBRF."""
    found = result.arrays.get("effects")
    if isinstance(found, Mapping):  # of leaving one out; the exact scores and the cold start stand first
        exact, cold = next(iter(result.arrays["scores"].values())), next(iter(found.values()))
        return [plots.scatter_of(result.about["about"], exact, cold, "retrained without the row")]
    if not found:
        return []
    epsilons, effects_EQR, scores = found[0]["epsilons"], found[0]["pbrf"], found[0]["scores"]
    (exact, exact_QR), *others = scores.items()
    found = []
    for e in sorted({0, len(epsilons) - 1}):
        tried = ~np.isnan(effects_EQR[e]).all(0)
        title = f"{exact}, change {epsilons[e]:g}/N"
        found.append(plots.scatter_of(title, exact_QR[:, tried], effects_EQR[e][:, tried], "PBRF"))
    for name, scores_QR in others[:1]:
        found.append(plots.scatter_of(f"{name}, change {epsilons[-1]:g}/N", scores_QR, effects_EQR[-1], "PBRF"))
    return found

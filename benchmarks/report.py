"""From measurements to rows, and from rows to a table, to which targets are met, to Markdown and to a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quiet import DISTURBED, SLOWED

Row = dict[str, Any]

AGREEMENT = {"tiny": 1e-3, "S": 1e-4, "M": 1e-2, "L": 1e-2}
"""Largest relative error of exact scores by size of the model: larger ones are fitted on fewer tokens than would separate
their eigenvectors, and rounding decides in which order libraries see these."""


UNSETTLED = 1.2
"""How many times apart two runs may be without a third."""


@dataclass
class Cell:
    """What one library took for one phase of one workload, run by run; or the reason why there is nothing."""

    runs: list[dict[str, float]] = field(default_factory=list)
    scores: np.ndarray | None = None
    reason: str = ""
    broke: bool = False
    """Whether the reason is that it failed, not that it can't."""

    def median(self, key: str) -> float | None:
        """The median over the runs; None where it was not measured."""
        values = [run[key] for run in self.runs if key in run]
        return statistics.median(values) if values else None

    @property
    def unsettled(self) -> bool:
        """Whether there are two runs, and so far apart that a third has to decide: a median of two is their mean."""
        seconds = [run["cpu_s"] for run in self.runs]
        return len(seconds) == 2 and max(seconds) > UNSETTLED * min(seconds)


def make_row(
    workload: str, size: str, phase: str, peer: str, ours: Cell, theirs: Cell, floor: Cell, tokens: float = 1.0
) -> Row:
    """One line of the result; ratios are theirs / ours, so that more than 1 is better for whence.

    `floor` is forward + backward without weight gradients over the training data, `tokens` the phase's share of its tokens.
    """
    row: Row = {"workload": workload, "size": size, "phase": phase, "peer": peer}
    for name, key in (("s", "cpu_s"), ("wall_s", "wall_s"), ("rss_mb", "rss_mb")):
        row |= {f"ours_{name}": ours.median(key), f"peer_{name}": theirs.median(key)}
    row["ratio"] = divided(row["peer_s"], row["ours_s"])
    pairs = zip(theirs.runs, ours.runs, strict=False)
    rounds = [each for t, o in pairs if (each := divided(t["cpu_s"], o["cpu_s"])) is not None]
    row["ratio_range"] = [min(rounds), max(rounds)] if rounds else None
    row["disturbed"] = max(
        (run["disturbed"] for cell in (ours, theirs) for run in cell.runs if "disturbed" in run), default=None
    )
    at_floor = floor.median("cpu_s")
    row["floor_s"] = at_floor * tokens if at_floor else None
    row["floor_ratio"], row["peer_floor_ratio"] = (divided(row[key], row["floor_s"]) for key in ("ours_s", "peer_s"))
    for name, key in (("peak_mb", "peak_mb"), ("bytes", "written_bytes"), ("disk_bytes", "disk_bytes")):
        row |= {f"{name}_ours": ours.median(key), f"{name}_peer": theirs.median(key)}
    agrees = agreement(ours.scores, theirs.scores) if ours.scores is not None and theirs.scores is not None else {}
    row |= {key: agrees.get(key) for key in ("pearson", "spearman", "relative_error")}
    row["flop_ratio"] = row["flops_per_floor"] = None
    row["repeats"], row["ours_broke"] = len(theirs.runs), ours.broke
    row["reason"] = f"whence: {ours.reason}" if ours.reason else theirs.reason
    return row


def divided(above: float | None, below: float | None) -> float | None:
    """`above / below`, or None where either is missing or there is nothing to divide by."""
    return above / below if above is not None and below else None


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation, the mean over the queries, and `|ours - theirs| / |theirs|`, of `[Q, N]` or `[N]`."""
    from scipy.stats import pearsonr, spearmanr

    pairs = list(zip(np.atleast_2d(ours), np.atleast_2d(theirs), strict=True))
    return {
        "pearson": float(np.mean([pearsonr(a, b).statistic for a, b in pairs])),
        "spearman": float(np.mean([spearmanr(a, b).statistic for a, b in pairs])),
        "relative_error": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
    }


@dataclass(frozen=True)
class Target:
    """A bound on a number of the rows that `applies` to; `decides` the exit code, or is only shown."""

    name: str
    value: Callable[[Row], float | None]
    applies: Callable[[Row], bool]
    bound: float
    at_least: bool = True
    decides: bool = True

    def check(self, rows: Sequence[Row]) -> Row | None:
        """The worst value and where it was; None where nothing was measured."""
        counted = [row for row in rows if self.applies(row) and (row["size"] != EXERCISE or row["phase"] in START)]
        found = [(value, row) for row in counted if (value := self.value(row)) is not None]
        if not found:
            return None
        value, row = (min if self.at_least else max)(found, key=lambda pair: pair[0])
        met = value >= self.bound if self.at_least else value <= self.bound
        where = f"{row['workload']}, {row['phase']}, {row['peer'] or 'whence'}"
        sign = ">=" if self.at_least else "<="
        return {"target": self.name, "bound": f"{sign} {self.bound:g}", "value": value, "met": met, "where": where} | {
            "decides": self.decides
        }


def ratio_of(key: str) -> Callable[[Row], float | None]:
    """Ours as a multiple of theirs."""
    return lambda row: divided(row[f"{key}_ours"], row[f"{key}_peer"])


def at_floor(row: Row) -> float | None:
    """Time as a multiple of the floor with the FLOPs that the phase adds to it."""
    return divided(row["floor_ratio"], row.get("flops_per_floor"))


def phase(name: str, *peers: str) -> Callable[[Row], bool]:
    """Rows of a phase, with these peers or with any."""
    return lambda row: row["phase"] == name and (not peers or row["peer"] in peers)


def started(size: str) -> Callable[[Row], bool]:
    """Rows of a first score with models of a size."""
    return lambda row: row["phase"] == "first score" and row["size"] == size


EXACT = ("fit", "query", "score", "self", "index")
START = ("import", "first score")
EXERCISE = "tiny"
"""The size of models on which only the start is a measurement: the rest takes milliseconds."""

TARGETS = [
    Target("fit, times faster than Kronfluence", lambda row: row["ratio"], phase("fit", "kronfluence"), 1.4),
    Target("fit, times faster than Bergson", lambda row: row["ratio"], phase("fit", "bergson"), 1.15),
    Target("self-influence, times faster", lambda row: row["ratio"], phase("self"), 2.0),
    Target("query side, times faster", lambda row: row["ratio"], phase("query"), 1.4),
    Target("pairwise, times faster", lambda row: row["ratio"], phase("score"), 1.0),
    Target("index, multiple of the floor with its projections", at_floor, phase("index"), 1.05, at_least=False),
    Target("index, multiple of the floor", lambda row: row["floor_ratio"], phase("index"), 1.05, at_least=False, decides=False),
    Target("peak memory, multiple of theirs", ratio_of("peak_mb"), lambda row: row["phase"] in EXACT, 1.0, at_least=False),
    Target("bytes written by fit, multiple of theirs", ratio_of("bytes"), phase("fit"), 0.5, at_least=False),
    Target(
        "bytes written by pairwise, multiple of Bergson's", ratio_of("bytes"), phase("score", "bergson"), 0.5, at_least=False
    ),
    Target("bytes written by index, multiple of Bergson's", ratio_of("bytes"), phase("index", "bergson"), 0.5, at_least=False),
    Target("own defaults, times faster", lambda row: row["ratio"], phase("defaults"), 3.0, decides=False),
    Target("own defaults, Pearson with exact", lambda row: row["pearson"], phase("defaults"), 0.99, decides=False),
    Target("start to first score, times faster", lambda row: row["ratio"], started("S"), 3.0, decides=False),
    Target("start to first score of a tiny model, times faster", lambda row: row["ratio"], started("tiny"), 3.0, decides=False),
    Target("phase, multiple of its FLOPs", lambda row: row["flop_ratio"], lambda row: True, 1.3, at_least=False, decides=False),
]
"""Of the bytes of pairwise only Bergson's count: Kronfluence keeps a table of scores and nothing else, a few kilobytes."""


def judge(rows: Sequence[Row]) -> list[Row]:
    """Every target, and the agreement of exact scores."""
    verdicts = [found for target in TARGETS if (found := target.check(rows))]
    if broken := sum(row["ours_broke"] for row in rows):
        where = next(f"{row['workload']}, {row['phase']}" for row in rows if row["ours_broke"])
        verdict = {
            "target": "whence runs, rows where it failed",
            "bound": "<= 0",
            "value": broken,
            "met": False,
            "where": where,
        }
        verdicts.append(verdict | {"decides": True})
    for row in rows:
        if row["phase"] in EXACT and row["relative_error"] is not None:
            bound = AGREEMENT[row["size"]]
            verdicts.append(
                {
                    "target": f"agreement of {row['phase']} with {row['peer']}, relative error",
                    "bound": f"<= {bound:g}",
                    "value": row["relative_error"],
                    "met": row["relative_error"] <= bound,  # not met where it is NaN
                    "where": row["workload"],
                    "decides": True,
                }
            )
    return verdicts


def failed(verdicts: Sequence[Row]) -> bool:
    """Whether a target that decides is missed."""
    return any(verdict["decides"] and not verdict["met"] for verdict in verdicts)


COLUMNS = {
    "workload": lambda row: row["workload"],
    "phase": lambda row: row["phase"],
    "peer": lambda row: row["peer"] or "-",
    "ours s": lambda row: number(row["ours_s"], 2),
    "theirs s": lambda row: number(row["peer_s"], 2),
    "ratio": lambda row: number(row["ratio"], 2, "x"),
    "ours / floor": lambda row: number(row["floor_ratio"], 2),
    "theirs / floor": lambda row: number(row["peer_floor_ratio"], 2),
    "ours / FLOPs": lambda row: number(row["flop_ratio"], 2),
    "peak MB": lambda row: f"{number(row['peak_mb_ours'], 0)} : {number(row['peak_mb_peer'], 0)}",
    "written MB": lambda row: f"{megabytes(row['bytes_ours'])} : {megabytes(row['bytes_peer'])}",
    "rel. error": lambda row: f"{row['relative_error']:.1e}" if row["relative_error"] is not None else "",
    "Pearson": lambda row: number(row["pearson"], 6),
    "Spearman": lambda row: number(row["spearman"], 6),
}
LEGEND = (
    "Seconds are CPU seconds (user + system), medians of interleaved runs; ratio = theirs / ours; floor = forward + backward "
    "without weight gradients over the same tokens; FLOPs = those of whence at this machine's rate of float32 products; "
    "peak MB = highest resident memory above the phase's start. Ours : theirs. The index is held against the floor times what "
    "its projections add to the floor's FLOPs."
)
REPEATED = (
    f"Runs during which the host took more than {DISTURBED:.0%} of a processor, or beside which a small piece of work took "
    f"{SLOWED:.0%} longer than at best, were repeated, and the quietest count."
)


def notes(rows: Sequence[Row]) -> list[str]:
    """What the numbers mean, and what was not run."""
    return [LEGEND, *[REPEATED] * any(row.get("disturbed") is not None for row in rows), *not_run(rows)]


def cells(row: Row) -> list[str]:
    """A row's text, column by column."""
    return [show(row) for show in COLUMNS.values()]


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows with a number in them."""
    return [row for row in rows if not row["reason"]]


def not_run(rows: Sequence[Row]) -> list[str]:
    """Why the others are empty, each reason once."""
    why: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            why.setdefault(("" if row["reason"].startswith("whence: ") else row["peer"], row["reason"]), []).append(
                row["phase"]
            )
    named = ((f"{peer}: " if peer else "", ", ".join(dict.fromkeys(phases)), reason) for (peer, reason), phases in why.items())
    return [f"Not run ({phases}). {peer}{reason}" for peer, phases, reason in named]


def number(value: float | None, digits: int, unit: str = "") -> str:
    """The value rounded; nothing where there is none."""
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}{unit}"


def megabytes(count: float | None) -> str:
    """Bytes as megabytes, finer where there are few."""
    return number(None if count is None else count / 1e6, 1 if count and count > 1e6 else 3)


def verdict_text(verdict: Row) -> str:
    """One line: met or missed, what, how much, where."""
    value = f"{verdict['value']:.3g}"
    return f"{'met' if verdict['met'] else 'MISSED':<6} {verdict['target']} {verdict['bound']}: {value} ({verdict['where']})"


def markdown(result: dict[str, Any], plot: str) -> str:
    """The same as a page."""
    header = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)
    lines = ["| " + " | ".join(cells(row)) + " |" for row in measured(result["rows"])]
    machine = result["machine"]
    gemm = "; ".join(
        f"{kind} " + ", ".join(f"{n}: {r}" for n, r in rates.items()) for kind, rates in machine["gemm_gflops"].items()
    )
    commands = ", ".join(f"`{command}`" for command in result["commands"])
    intro = (
        f"Made by {commands} in {result['minutes']:.0f} minutes. {machine['cpu']}, {machine['threads']} of "
        f"{machine['cores']} cores, torch {machine['torch']}, {', '.join(machine['bf16']) or 'no bf16 instructions'}; square "
        f"products in GFLOP per CPU second: {gemm}. Versions: "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        + "."
    )
    verdicts = "\n".join(f"- {verdict_text(verdict)}" for verdict in result["targets"])
    picture = f"![ratios]({plot})\n\n" if plot else ""
    below = "\n\n".join(notes(result["rows"]))
    return f"# Benchmark\n\n{intro}\n\n{picture}{header}\n" + "\n".join(lines) + f"\n\n{below}\n\n## Targets\n\n{verdicts}\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Ratios of time and of peak memory by phase, one bar for each peer: right of 1 is better for whence."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["ratio"] is not None]
    labels = list(dict.fromkeys(f"{row['workload']}\n{row['phase']}" for row in shown))
    peers = list(dict.fromkeys(row["peer"] for row in shown))
    height = 0.8 / max(1, len(peers))
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.42 * len(labels)), sharey=True, layout="constrained")
    panels = (
        ("CPU time, theirs / ours", lambda row: row["ratio"]),
        ("peak memory, theirs / ours", lambda row: divided(row["peak_mb_peer"], row["peak_mb_ours"])),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        for place, peer in enumerate(peers):
            bars = [
                (labels.index(f"{row['workload']}\n{row['phase']}"), value(row))
                for row in shown
                if row["peer"] == peer and value(row)
            ]
            y, x = [label + (place - (len(peers) - 1) / 2) * height for label, _ in bars], [width for _, width in bars]
            drawn = axis.barh(y, x, height * 0.9, label=peer)
            shown_as = [f"{width:.2f}" for width in x]
            axis.bar_label(drawn, shown_as, padding=2, fontsize=7, bbox={"color": "white", "pad": 0.5})
        axis.axvline(1, color="black", linewidth=1, zorder=0)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=7)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(peers))
    figure.savefig(path, dpi=130)
    plt.close(figure)

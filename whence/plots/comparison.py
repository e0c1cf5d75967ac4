"""Two models beside each other: accuracy on a benchmark, and likeness of their answers to references and to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from whence.plots.panels import Point, Points

if TYPE_CHECKING:
    import pandas

LABELS = {"bleu": "BLEU / 100", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def comparison_panels(summary: pandas.DataFrame) -> list[Points]:
    """Panels of a comparison's summary: likeness to the references, its difference, and likeness of both models' answers."""

    def prompts(*of: str) -> int:
        return max(row["n"] for row in records(summary) if row["of"] in of and row["measure"] in LABELS)

    def points(of: str) -> list[Point]:
        found = {row["measure"]: row for row in records(summary) if row["of"] == of}
        scale = {"bleu": 100}
        ends = ("mean", "low", "high")
        return [tuple(found[m][end] / scale.get(m, 1) for end in ends) if m in found else None for m in LABELS]

    labels, panels = list(LABELS.values()), []
    against = {who: points(who) for who in ("base", "tuned") if any(points(who))}
    if against:
        panels.append(Points("Answers against the references", f"mean over {prompts(*against)} prompts", labels, against))
    if any(points("tuned minus base")):
        title, difference = "Tuned minus base, on the same prompts", {"tuned minus base": points("tuned minus base")}
        panels.append(Points(title, "difference of means", labels, difference, around_zero=True))
    if any(points("base against tuned")):
        alike = {"base against tuned": points("base against tuned")}
        panels.append(Points("How alike base and tuned answers are", f"mean over {prompts(*alike)} prompts", labels, alike))
    return panels


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a table."""
    return table.to_dict("records")


def benchmark_panels(document: Mapping[str, Any]) -> list[Points]:
    """Panels of a benchmark: accuracy per task, and the difference of two models on the same questions."""
    results = document["results"]
    tasks = list(dict.fromkeys(row["task"] for row in results))
    named = {(row["task"], row["model"]): row for row in results}
    models = list(dict.fromkeys(row["model"] for row in results))
    sizes = {row["task"]: row["n"] for row in results}
    labels = [f"{task.removeprefix('mmlu_').replace('_', ' ')} ({sizes[task]})" for task in tasks]
    series = {name: [_point(named.get((task, name)), "accuracy") for task in tasks] for name in models}
    chance = [next(row["chance"] for row in results if row["task"] == task) for task in tasks]
    panels = [Points("Accuracy (number of questions)", "share answered correctly", labels, series, chance)]
    differences = {row["task"]: row for row in document["differences"]}
    if differences:
        of = next(iter(differences.values()))["of"]
        points = [_point(differences.get(task), "difference") for task in tasks]
        title = f"{of.capitalize()}, on the same questions"
        panels.append(Points(title, "difference of accuracies", labels, {of: points}, around_zero=True))
    return panels


def _point(row: Mapping[str, Any] | None, key: str) -> Point:
    return None if row is None else (row[key], row["low"], row["high"])

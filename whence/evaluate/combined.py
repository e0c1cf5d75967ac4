"""One page about how good the answers are: the comparison and the benchmark, or what of them there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.errors import UsageError
from whence.evaluate.benchmark import SUMMARY as BENCHMARK
from whence.evaluate.compare import SUMMARY as COMPARISON
from whence.evaluate.examples import FILE as EXAMPLES
from whence.evaluate.mmlu import PREFIX
from whence.plots.comparison import benchmark_panels, comparison_panels, records
from whence.plots.panels import points_figure
from whence.plots.style import save
from whence.store.files import atomic
from whence.store.intact import read_json

if TYPE_CHECKING:
    import pandas

PAGE, FIGURE, BENCHMARK_FIGURE = "combined.md", "combined.png", "benchmark.png"

READING = """## How to read

- An interval holds the true value with 95 % confidence, as far as the questions are a fair sample. Over few prompts (say, below
  20) those of the comparison are too narrow.
- Two models were asked the same questions: look at *tuned minus base*. When its interval holds 0, there is no evidence that
  they differ.
- BLEU (0 to 100, of single answers; corpus BLEU takes all as one text) and ROUGE (F1, 0 to 1) count words in common with a
  reference. A good answer in other words scores low. What counts pairs of words (ROUGE-2) or fours of them (corpus BLEU) says
  nothing where references or answers are shorter, and is left out there.
- *Base against tuned* says how alike the two answers are, not which is better.
- Accuracy is that of lm-eval: the choice with the highest log-probability counts as the answer. *Guessing* is right in a share
  of 1/choices.
- log p is each model's own, of its own answer, in nats, and depends on its length. Repetition is the share of 3-grams of words
  said before."""

NAMES = {
    "bleu": "BLEU",
    "corpus_bleu": "corpus BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "logprob": "log p (nats)",
    "words": "words",
    "repetition": "repetition",
}
COLUMNS = ("tuned", "base", "tuned minus base", "base against tuned")


def combine(out: Path) -> Path:
    """Write `OUT/combined.md` and `combined.png` from the comparison and the benchmark in `out`; what is missing is said.

    Where there is a benchmark, `benchmark.png` is drawn too. Raises UsageError where there is neither.
    """
    import pandas

    summary = pandas.read_csv(out / COMPARISON) if (out / COMPARISON).is_file() else None
    benchmark = read_json(out / BENCHMARK) if (out / BENCHMARK).is_file() else None
    if summary is None and benchmark is None:
        fix = "whence evaluate compare or benchmark"
        raise UsageError(f"There is nothing to combine in {out}.", accepted=f"{COMPARISON}, {BENCHMARK}", fix=fix)
    panels = comparison_panels(summary) if summary is not None else []
    if benchmark is not None:
        save(points_figure(asked := benchmark_panels(benchmark)), out / BENCHMARK_FIGURE)
        panels += asked
    save(points_figure(panels), out / FIGURE)
    head = ["# How good the answers are", f"![Comparison and benchmark]({FIGURE})"]
    parts = [*head, *_answers(summary, out), *_accuracy(benchmark), READING]
    with atomic(out / PAGE) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return out / PAGE


def comparison_table(summary: pandas.DataFrame) -> list[list[str]]:
    """Header and rows of the comparison's means, as text."""
    of = [name for name in COLUMNS if name in set(summary["of"])]
    rows = []
    for measure, name in NAMES.items():
        if found := {row["of"]: row for row in records(summary) if row["measure"] == measure}:
            count = max(row["n"] for row in found.values())
            rows.append([name, str(count), *(_interval(found[who]) if who in found else "" for who in of)])
    return [["measure", "n", *of], *rows]


def benchmark_table(document: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a benchmark's accuracies and differences, as text, in percent."""
    models = list(dict.fromkeys(row["model"] for row in document["results"]))
    named = {(row["task"], row["model"]): row for row in document["results"]}
    differences = {row["task"]: row for row in document["differences"]}
    rows = []
    for task in dict.fromkeys(row["task"] for row in document["results"]):
        asked = [named[task, model] for model in models if (task, model) in named]
        cells = [_percent(named[task, model], "accuracy") if (task, model) in named else "" for model in models]
        cut = ", ".join(str(row["cut"]) for row in asked)
        rows.append([task.removeprefix(PREFIX), str(asked[0]["n"]), *cells, f"{asked[0]['chance']:.0%}", cut])
        if differences:
            there = differences.get(task)
            rows[-1] += [_percent(there, "difference", sign="+"), f"{there['p_value']:.2g}"] if there else ["", ""]
    compared = [next(iter(differences.values()))["of"], "p"] if differences else []
    return [["task", "n", *models, "guessing", "cut prompts", *compared], *rows]


def _answers(summary: pandas.DataFrame | None, out: Path) -> list[str]:
    title = "## Answers to the prompts"
    if summary is None:
        return [title, "Not compared. `whence evaluate compare PAIRS.json` does it."]
    said = []
    if not any(row["measure"] == "rougeL" and row["of"] in ("tuned", "base") for row in records(summary)):
        said.append("No prompt has a reference answer, so nothing says which answers are better.")
    if "base" not in set(summary["of"]):
        said.append("There are no answers of the base model, so nothing is compared with it.")
    examples = f"What made the model say so: [{EXAMPLES}]({EXAMPLES})." if (out / EXAMPLES).is_file() else ""
    said.append(examples or f"No scores were given, so there is no {EXAMPLES} (`--scores DIR`).")
    return [title, _markdown(comparison_table(summary)), *said]


def _accuracy(document: dict[str, Any] | None) -> list[str]:
    title = "## Benchmark"
    if document is None:
        return [title, "Not run. `whence evaluate benchmark MODEL --base BASE` does it."]
    settings = [about["settings"] for about in document["models"].values()]
    shots = ", ".join(dict.fromkeys(f"{one['fewshot']} worked examples" for one in settings))
    limit = ", ".join(dict.fromkeys(f"at most {one['limit']} questions a task" for one in settings if one["limit"]))
    said = [f"lm-eval {document['versions']['lm_eval']}, {shots}" + (f", {limit}" if limit else "") + "."]
    if {row["model"] for row in document["results"]} < {"base", "tuned"}:
        said.append("Only one of the two models was asked, so there is no difference to show.")
    cut = [row for row in document["results"] if row["cut"] and row["task"] != "total"]
    if cut:
        named = "; ".join(f"{row['model']} {row['task']}: {row['cut']} of {row['n']}" for row in cut)
        said.append(
            f"**Prompts were cut.** Some are longer than the model reads and lost their beginning: {named}. Those were "
            "asked with fewer worked examples, or only in part."
        )
    return [title, _markdown(benchmark_table(document)), *said]


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rows = table
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _interval(row: dict[str, Any]) -> str:
    """A mean with its interval; NaN where there is none."""
    mean, low, high = (format(row[key], ".3f" if abs(row[key]) < 1 else ".3g") for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})" if row["low"] == row["low"] else mean


def _percent(row: dict[str, Any], key: str, sign: str = "") -> str:
    mean, low, high = (format(100 * row[name], f"{sign}.1f") for name in (key, "low", "high"))
    return f"{mean} % ({low} to {high})"

"""Base beside tuned on one's own prompts: how like the references their answers are, and how like each other.

Files: `comparison.csv` (a row per prompt), `comparison_summary.csv` (means with 95 % intervals), `comparison.png`, and with
scores `influential_examples.md` (`whence.evaluate.examples`). What can't be measured is left empty, and said.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from whence.errors import UsageError
from whence.evaluate.examples import write_examples, write_once
from whence.linalg.stats import Interval, bootstrap
from whence.plots.comparison import comparison_panels
from whence.plots.panels import points_figure
from whence.plots.style import save
from whence.progress import note, stage
from whence.store.intact import unsealed

if TYPE_CHECKING:
    import pandas

    from whence.store.scores import Scores

ROWS, SUMMARY, FIGURE = "comparison.csv", "comparison_summary.csv", "comparison.png"
LIKENESS = ("bleu", "rouge1", "rouge2", "rougeL")
OTHERS = ("logprob", "words", "repetition")
BY = {"tuned": "completion", "base": "base_completion"}

WORD = re.compile(r"[^\W_]+")
"""Runs of letters and digits of any script; for plain English just what rouge-score takes."""


def compare_answers(
    pairs: str | Path | Mapping[str, Any], *, out: Path, scores: Scores | None = None, top: int = 5, seed: int = 0
) -> dict[str, pandas.DataFrame]:
    """Compare the answers of pairs (a file, or what is in it) and write the files into `out`; returns its "rows" and "summary".

    Against the rows' `reference` where there is one, and base against tuned where there is a `base_completion`: BLEU
    (sacrebleu, of single answers, 0 to 100) and F1 of ROUGE-1, -2 and -L (rouge-score, 0 to 1). Of each answer: log p in nats
    where it is known, words, and the share of its 3-grams of words that it had said before. Means have percentile bootstrap
    intervals over prompts.

    Raises UsageError for a file without pairs or where a package is missing, StaleArtifact where `out` holds another
    comparison.
    """
    import pandas

    answers = read_pairs(pairs)
    measure = _likeness()
    with stage("compare", total=len(answers), unit="prompts") as advance:
        rows = []
        for answer in answers:
            rows.append(_row(answer, measure))
            advance(1)
    numbers = [f"{name}_{who}" for name in (*LIKENESS, *OTHERS) for who in BY] + [f"{name}_agreement" for name in LIKENESS]
    table = pandas.DataFrame(rows, columns=["prompt", "tuned", "base", "reference", *numbers])
    table = table.astype(dict.fromkeys(numbers, float))
    summary = _summary(table, answers, seed)
    for name, frame in ((ROWS, table), (SUMMARY, summary)):
        write_once(out / name, frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    save(points_figure(comparison_panels(summary)), out / FIGURE)
    for missing in _missing(answers):
        note(missing)
    if scores is not None:
        write_examples(out, table, scores, top)
    return {"rows": table, "summary": summary}


def read_pairs(pairs: str | Path | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read pairs, as `whence generate` writes them; every one has a prompt and a completion."""
    if isinstance(pairs, str | Path):
        try:
            document = unsealed(json.loads(Path(pairs).read_text(encoding="utf-8")), Path(pairs))
        except FileNotFoundError:
            raise UsageError(f"There is no file {pairs}.", fix="whence generate makes it") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{pairs} is not valid JSON.", given=str(error)) from error
    else:
        document = pairs
    rows: Any = document.get("data") if isinstance(document, Mapping) else document
    whole = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    if not whole or not all(isinstance(row.get(key), str) for row in rows for key in ("prompt", "completion")):
        raise UsageError(
            "There are no pairs to compare.",
            given=str(pairs)[:120],
            accepted='{"data": [{"prompt", "completion", "base_completion"?, "reference"?}, ...]}',
            fix="whence generate MODEL --base BASE --prompts FILE --out pairs.json",
        )
    return rows


def repetition(text: str) -> float:
    """Share of the text's 3-grams of words that occurred in it before; NaN below three words."""
    words = _words(text)
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def _row(answer: Mapping[str, Any], measure: Callable[[str, str], dict[str, float]]) -> dict[str, Any]:
    """Everything about one prompt; what is not there is None."""
    reference, base = (answer.get(key) or None for key in ("reference", "base_completion"))
    row: dict[str, Any] = {
        "prompt": answer["prompt"],
        "tuned": answer["completion"],
        "base": answer.get("base_completion"),
        "reference": reference,
    }
    for who, column in BY.items():
        text = answer.get(column)
        if text is None:
            continue
        if reference is not None:
            row |= {f"{name}_{who}": value for name, value in measure(text, reference).items()}
        row |= {f"words_{who}": len(_words(text)), f"repetition_{who}": repetition(text)}
        row[f"logprob_{who}"] = answer.get({"tuned": "logprob", "base": "base_logprob"}[who])
    if base is not None:
        row |= {f"{name}_agreement": value for name, value in measure(base, answer["completion"]).items()}
    return row


def _summary(table: pandas.DataFrame, answers: Sequence[Mapping[str, Any]], seed: int) -> pandas.DataFrame:
    """Means over prompts, long: measure, of (tuned, base, tuned minus base, base against tuned), n, mean, low, high."""
    import pandas

    found: list[tuple[str, str, Interval]] = []
    for name in (*LIKENESS, *OTHERS):
        tuned, base = (table[f"{name}_{who}"].to_numpy() for who in ("tuned", "base"))
        found += [(name, "tuned", bootstrap(tuned, seed)), (name, "base", bootstrap(base, seed))]
        if name != "logprob":  # of two texts, which are not the same
            found.append((name, "tuned minus base", bootstrap(tuned - base, seed)))
        if name in LIKENESS:
            found.append((name, "base against tuned", bootstrap(table[f"{name}_agreement"].to_numpy(), seed)))
    found += [("corpus_bleu", who, _corpus_bleu(answers, column)) for who, column in BY.items()]
    rows = [{"measure": name, "of": of, **interval.as_dict()} for name, of, interval in found if interval.n]
    return pandas.DataFrame(rows, columns=["measure", "of", "n", "mean", "low", "high"])


def _corpus_bleu(answers: Sequence[Mapping[str, Any]], column: str) -> Interval:
    """BLEU of all answers as one text, which has no mean over prompts and so no interval here.

    It counts sequences of up to four words. Where no answer has four it would be 0, right answers or not: there is none then.
    """
    import sacrebleu

    said = [(row[column], row["reference"]) for row in answers if row.get("reference") and row.get(column) is not None]
    if not said:
        return Interval(math.nan, math.nan, math.nan, 0)
    hypotheses, references = zip(*said, strict=True)
    bleu = sacrebleu.corpus_bleu(list(hypotheses), [list(references)])
    return Interval(float(bleu.score), math.nan, math.nan, len(said) if bleu.totals[-1] else 0)


def _likeness() -> Callable[[str, str], dict[str, float]]:
    """Prepare to measure how like a reference a text is."""
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError(
            "BLEU and ROUGE come from sacrebleu and rouge-score, which can't be imported.",
            given=str(error),
            fix="pip install sacrebleu rouge-score",
        ) from error
    scorer = RougeScorer(list(LIKENESS[1:]), tokenizer=SimpleNamespace(tokenize=_words))  # its own knows English letters only

    def measure(text: str, reference: str) -> dict[str, float]:
        rouge = {name: float(score.fmeasure) for name, score in scorer.score(reference, text).items()}
        if len(_words(reference)) < 2:  # it has no pair of words to be found again
            rouge["rouge2"] = math.nan
        return {"bleu": float(sacrebleu.sentence_bleu(text, [reference]).score), **rouge}

    return measure


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _missing(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not compared, and why."""
    count, said = len(answers), []
    references = sum(bool(row.get("reference")) for row in answers)
    if references < count:
        said.append(
            f"{count - references} of {count} prompts have no reference answer: they count only in base against tuned, "
            "which says how alike the two are and not which is better"
        )
    bases = sum(row.get("base_completion") is not None for row in answers)
    if bases < count:
        said.append(f"{count - bases} of {count} prompts have no answer of the base model: nothing is compared with it there")
    return said

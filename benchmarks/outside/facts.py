"""Fact tracing on ParaRel (Elazar et al. 2021), as quanda and TrackStar (Chang et al. 2024) judge it: MRR, recall, tail-patch.

    python -m benchmarks.outside.facts --data ../shared/data

A small language model learns real facts of T-REx from sentences, and is asked in a wording in which its rows do not state
them; other rows state other facts, also of the same subjects. Each method ranks the rows for every question that the model
answers as it was taught: are the two that state the fact first, and how much does one more step of the training on the first
ten rows raise the log-probability of the answer? Writes facts.md and facts.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.command import run
from benchmarks.outside.tables import shown
from benchmarks.quality import Method, Work, by, words
from whence.data import as_rows
from whence.demo.model import Settings, answers, make_model, make_tokenizer
from whence.engine.queries import encode_queries
from whence.engine.stream import encode
from whence.errors import UsageError
from whence.filter.bm25 import bm25_scores
from whence.filter.tfidf import tfidf_scores
from whence.linalg.stats import best_rank, bootstrap_groups
from whence.progress import stage
from whence.store.scores import row_text
from whence.tasks import CausalLM
from whence.train.patch import ending_rate
from whence.train.replay import Run
from whence.validate.facts import RELATIONS, Corpus, real_corpus, recall_at
from whence.validate.results import Result, Row
from whence.validate.settings import Setting
from whence.validate.trainer import Recipe

TOP = 10
"""Rows of a recall and of a step."""

Patch = Callable[[Sequence[Sequence[int]] | np.ndarray], np.ndarray]
"""From rows of each question to a number for it, `[Q]`."""

LENGTH = 32
"""Longer than any row, in tokens."""


@dataclass(frozen=True)
class Size:
    """Of the corpora, the model and its training."""

    seeds: tuple[int, ...]
    relations: tuple[str, ...]
    facts: int
    questions: int
    """Of each relation, as many as are asked for."""
    width: int
    recipe: Recipe


SMALL = Size((0,), RELATIONS, 40, 8, 64, Recipe(5e-3, 30, 32, "adamw", weight_decay=1.0, schedule="cosine"))
TINY = Size((0,), RELATIONS[:2], 12, 4, 32, Recipe(1e-2, 12, 16, "adamw", weight_decay=0.1, schedule="cosine"))

METHODS: dict[str, Method] = {
    "EK-FAC": by("ekfac"),
    "RelatIF": by("relatif"),
    "K-FAC": by("kfac"),
    "SOURCE": by("source"),
    "mean over checkpoints of EK-FAC": by("checkpoint-mean"),
    "TrackStar": by("trackstar"),
    "TRAK": by("trak"),
    "LoGra": by("logra"),
    "LESS": by("less"),
    "TracIn": by("tracin"),
    "gradient cosine": by("gradient-cosine"),
    "gradient dot": by("gradient-dot"),
    "embeddings (its hidden states)": by("representation-similarity"),
    "BM25": words("bm25", bm25_scores),
    "TF-IDF": words("tfidf", tfidf_scores),
    "random": by("random"),
}

REFERENCE = "EK-FAC"

PATCH = "tail-patch, thousandths of a nat"

MEASURES = ("MRR", "recall@2", f"recall@{TOP}", PATCH)


def table(chosen: argparse.Namespace) -> Result:
    """Teach each corpus to a model of its own, and trace what it answers."""
    size = TINY if chosen.tiny else SMALL
    corpora = [traced(real_corpus_of(chosen, size, seed), size) for seed in size.seeds]
    rows = [row_of(name, [corpus.found[name] for corpus in corpora]) for name in METHODS]
    best = bootstrap_groups([1e3 * corpus.stated for corpus in corpora])
    pairs = [(corpus.found[REFERENCE]["MRR"], corpus.found["BM25"]["MRR"]) for corpus in corpora]
    gap = bootstrap_groups([own - other for own, other in pairs])
    asked, answered = sum(corpus.asked for corpus in corpora), sum(corpus.answered for corpus in corpora)
    says = [
        f"{' + '.join(f'{corpus.rows:,}' for corpus in corpora)} rows of ParaRel; {corpora[0].about}",
        f"{answered} of {asked} questions are answered as the rows teach, and traced; a training takes "
        f"{corpora[0].training_seconds:.0f} s",
        f"MRR of {REFERENCE} is {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] above that of BM25",
        "Intervals of 95 % draw questions again",
        f"Tail-patch: rise of the answer's log-probability by one step of AdamW along the mean gradient of the first {TOP} "
        "rows, with the training's second moments, no momentum, and the mean rate of its last epoch; on the rows that state "
        f"the fact alone {shown(best.mean, best.low, best.high)}",
    ]
    return Result(
        "facts",
        {"corpora": [corpus.found for corpus in corpora]},
        {"": sorted(rows, key=lambda row: row["MRR"], reverse=True)},
        says,
        heading="Fact tracing on ParaRel",
    )


@dataclass(frozen=True)
class Traced:
    """What every method found in a corpus: its name, a measure and a number for each question."""

    about: str
    rows: int
    asked: int
    answered: int
    training_seconds: float
    stated: np.ndarray
    """What a step on the rows that state the fact does, `[Q]`."""
    found: dict[str, dict[str, np.ndarray]]


def real_corpus_of(chosen: argparse.Namespace, size: Size, seed: int) -> Corpus:
    """ParaRel's facts, sized."""
    own: dict[str, Any] = {"relations": size.relations, "facts": size.facts, "questions": size.questions}
    return real_corpus(chosen.data / "facts" / "pararel", seed, **own)


def traced(corpus: Corpus, size: Size) -> Traced:
    """Teach the corpus to a model, and rank its rows for what that answers."""
    work = Work(corpus_setting(corpus, size), seeds=(0,))
    prompts = [question["prompt"] for question in corpus.questions]
    said = answers(work.models[0], work.setting.task.tokenizer, prompts)  # type: ignore[arg-type, attr-defined]
    known = [q for q, (text, own) in enumerate(zip(said, corpus.questions, strict=True)) if text.startswith(own["completion"])]
    if not known:
        raise UsageError("The model answers no question as its rows teach it", fix="train it longer, or on fewer facts")
    work.setting = asking(work.setting, [corpus.questions[q] for q in known])
    sources, patch = [corpus.sources[q] for q in known], tail_patch(work)
    found = {}
    with stage(f"corpus {corpus.seed}", len(METHODS), "methods") as advance:
        for name, method in METHODS.items():
            scores_QN, seconds = work.measure(method)
            if scores_QN is None:
                raise UsageError(f"{name} does not apply", given=work.refused[method.__name__])
            found[name] = judged(scores_QN, sources, patch) | {"trainings": np.array([seconds / work.training_seconds])}
            advance(1)
    setting = work.setting
    return Traced(setting.about, len(corpus.rows), len(prompts), len(known), work.training_seconds, patch(sources), found)


def corpus_setting(corpus: Corpus, size: Size) -> Setting:
    """A Llama of one layer that reads the corpus."""
    tokenizer = make_tokenizer(corpus.rows)
    sizes = Settings(width=size.width, inner=4 * size.width, spread=size.width**-0.5, max_length=LENGTH)

    def model(seed: int) -> nn.Module:
        llama = make_model(tokenizer, seed, sizes)
        llama.set_attn_implementation("eager")  # plain attention, which `vmap` knows how to batch
        return llama

    about = f"Llama of 1 layer, {size.width} wide, {len(tokenizer):,} words"
    task = CausalLM(tokenizer, max_length=LENGTH, append_eos=True)
    return asking(Setting("facts", about, model, task, corpus.rows, [], size.recipe, "*"), corpus.questions)


def asking(setting: Setting, questions: Sequence[dict[str, str]]) -> Setting:
    """The setting with these queries."""
    queries = as_rows(list(questions))
    texts = [row_text(row) for row in queries], [row_text(row) for row in setting.train]
    return replace(setting, queries=queries, texts=texts)


def judged(scores_QN: np.ndarray, sources: Sequence[Sequence[int]], patch: Patch) -> dict[str, np.ndarray]:
    """Reciprocal rank of the first row that states the fact, recall of all, and what a step on the first rows does, `[Q]`."""
    scores_QN = np.nan_to_num(scores_QN, nan=-np.inf)  # rows that a method left out come last
    pairs = list(zip(scores_QN, sources, strict=True))
    return {
        "MRR": np.array([1 / best_rank(*pair) for pair in pairs]),
        "recall@2": np.array([recall_at(*pair, 2) for pair in pairs]),
        f"recall@{TOP}": np.array([recall_at(*pair, TOP) for pair in pairs]),
        PATCH: 1e3 * patch(np.argsort(-scores_QN, axis=1, kind="stable")[:, :TOP]),
    }


def tail_patch(work: Work) -> Patch:
    """From some rows of each question, by how much a step on them raises the answer's log-probability, `[Q]`.

    Chang et al. 2024, with one step on all of them instead of one on each.
    """
    own, training = work.setting, work.training
    examples, asked = encode(own.task, own.train), encode_queries(own.task, own.queries)
    run, how = Run(work.models[0], own.task, examples, training.replay()), training.descent().optimizer
    steps, rate = len(training.steps), ending_rate(training)
    theta_P = run.vector(dict(work.models[0].named_parameters()))
    v_P = run.vector(training.checkpoints[-1].second_moments()) / (1 - how.betas[1] ** steps)

    @torch.no_grad()
    def measured(at_P: torch.Tensor, q: int) -> float:
        values = [weight * run.at(at_P, own.task.measurements, run.batch([item])).sum() for item, weight in asked.weighted[q]]
        return float(sum(values))

    def rises(rows: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        found = []
        for q, rows_K in enumerate(rows):
            at_P = theta_P.clone().requires_grad_()
            losses_K = run.at(at_P, own.task.losses, run.batch([examples.items[row] for row in rows_K]))
            (g_P,) = torch.autograd.grad(losses_K.mean(), at_P)
            found.append(measured(theta_P - rate * g_P / (v_P.sqrt() + how.eps), q) - measured(theta_P, q))
        return np.array(found)

    return rises


def row_of(name: str, corpora: Sequence[dict[str, np.ndarray]]) -> Row:
    """A method's line."""
    found = {measure: bootstrap_groups([corpus[measure] for corpus in corpora]) for measure in MEASURES}
    row: Row = {"method": name} | {measure: shown(each.mean, each.low, each.high) for measure, each in found.items()}
    return row | {"trainings": float(f"{np.mean([corpus['trainings'] for corpus in corpora]):.2g}")}


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    return run("benchmarks.outside.facts", __doc__ or "", table, given, data="facts/pararel")


if __name__ == "__main__":
    raise SystemExit(main())

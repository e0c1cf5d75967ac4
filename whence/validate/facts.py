"""Fact tracing: a model learns facts from rows that are known, answers questions, and each method looks for the rows.

Two corpora: the demo's invented world, and real facts of T-REx in ParaRel's wordings (Elazar et al. 2021), where the wording
of a question is never that of the rows that teach its answer. Word overlap stands beside every gradient method: for facts it
is hard to beat (Akyurek et al. 2022).

`Q` questions, `N` rows, `W` worlds (corpora of other seeds).
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from whence.data import Rows, as_rows
from whence.demo.model import SETTINGS, Settings, answers, make_model, make_tokenizer
from whence.demo.world import make_world
from whence.engine.point import Point
from whence.errors import UsageError
from whence.filter.bm25 import bm25_scores
from whence.filter.tfidf import tfidf_scores
from whence.fitting import fit_at
from whence.linalg.stats import Interval, best_rank, bootstrap_groups
from whence.operators import Identity
from whence.progress import note, stage
from whence.scoring.score import score_points
from whence.settings import Fit, Score
from whence.store.manifest import Folder
from whence.store.memory import Memory
from whence.store.scores import row_text
from whence.tasks import CausalLM
from whence.train.small import train
from whence.validate.results import Result

METHODS = (
    "EK-FAC influence",
    "EK-FAC relatif",
    "gradient dot product",
    "gradient cosine",
    "BM25",
    "TF-IDF",
    "random",
)

KS = (1, 5, 10)

FRESH = (10, 11, 12, 13, 14)
"""Seeds of worlds that the demo was not designed on."""


@dataclass(frozen=True)
class Corpus:
    """Rows, and questions whose sources among the rows are known."""

    rows: Rows
    questions: tuple[dict[str, str], ...]
    """Prompt and completion: the answer that the rows teach."""
    sources: tuple[tuple[int, ...], ...]
    seed: int
    settings: Settings = SETTINGS
    """Of the model that learns it."""


def demo_facts(seeds: Sequence[int] = FRESH, *, damping: float = 0.1, folder: Folder | Memory | None = None) -> Result:
    """Trace the facts of the demo's world, in worlds that it was not designed on."""
    corpora = (demo_corpus(seed) for seed in seeds)
    return trace_facts(corpora, "the demo's world", len(seeds), damping=damping, folder=folder)


def real_facts(
    data: str | Path, seeds: Sequence[int] = (0, 1, 2), *, damping: float = 0.1, folder: Folder | Memory | None = None
) -> Result:
    """Trace real facts from one wording to another; `data` holds ParaRel (`trex_lms_vocab` and `pattern_data`)."""
    corpora = (real_corpus(data, seed) for seed in seeds)
    return trace_facts(corpora, "real facts (T-REx)", len(seeds), damping=damping, folder=folder)


def trace_facts(
    corpora: Iterable[Corpus],
    name: str,
    count: int,
    *,
    damping: float = 0.1,
    ks: Sequence[int] = KS,
    folder: Folder | Memory | None = None,
) -> Result:
    """Teach each corpus to a small model, ask its questions, and look for the rows with every method.

    What a corpus gave is kept in the `folder`, if there is one, and not measured again.
    """
    started, kept, found = time.monotonic(), folder or Memory(), []
    done = sum(kept.has_json(f"corpus-{place}.json") for place in range(count))
    with stage("fact tracing", count, "corpora", done=done) as advance:
        for place, corpus in enumerate(corpora):
            file = f"corpus-{place}.json"
            if not kept.has_json(file):
                kept.write_json(file, of_corpus(corpus, damping, ks))
                advance(1)
            found.append(kept.read_json(file))
    ranks, recalls = (
        {method: [np.array(one[what][method]) for one in found] for method in METHODS} for what in ("ranks", "recalls")
    )
    about = {
        "name": name,
        "seeds": [one["seed"] for one in found],
        "questions": sum(map(len, ranks[METHODS[0]])),
        "unanswered": sum(one["unanswered"] for one in found),
        "rows": round(float(np.mean([one["rows"] for one in found]))),
        "ks": list(ks),
        "damping": damping,
        "seconds": round(time.monotonic() - started, 1),
    }
    return facts_result(about, ranks, recalls)


def facts_result(
    about: dict[str, Any], ranks: Mapping[str, list[np.ndarray]], recalls: Mapping[str, list[np.ndarray]]
) -> Result:
    """What every method found, corpus by corpus and question by question (reciprocal ranks, and recalls `[Q, len(ks)]`)."""
    ks, seeds = about["ks"], about["seeds"]
    says = [
        f"Fact tracing, {about['name']}: {about['questions']} questions on {len(seeds)} corpora of about {about['rows']:,} "
        f"rows (seeds {', '.join(map(str, seeds))}), {about['unanswered']} more left out that the models answer differently",
        f"  {'':<22}" + "".join(f"{f'recall@{k}':<20}" for k in ks) + "MRR",
    ]
    table, tracings, flags = [], [], []
    for method in METHODS:
        recall = [bootstrap_groups([each[:, place] for each in recalls[method]]) for place in range(len(ks))]
        mrr, lead = bootstrap_groups(ranks[method]), None
        if method != METHODS[0]:
            lead = bootstrap_groups([a - b for a, b in zip(ranks[METHODS[0]], ranks[method], strict=True)])
        tracing = {"method": method, "recall": [each.as_dict() for each in recall], "mrr": mrr.as_dict()}
        tracings.append(tracing | {"lead": lead and lead.as_dict()})
        row: dict[str, Any] = {"method": method}
        for k, each in zip(ks, recall, strict=True):
            row |= each.columns(f"recall@{k}")
        table.append(row | mrr.columns("mrr"))
        says.append(f"  {method:<22}" + "".join(f"{_interval(each):<20}" for each in recall) + _interval(mrr))
        if lead and method != METHODS[1] and not lead.low > 0:
            ahead = f"{lead.mean:+.3f} above ({lead.low:+.3f} to {lead.high:+.3f})"
            flags.append(f"{METHODS[0]} is not better than {method}: its reciprocal rank is {ahead}")
    says += [f"  FLAG {flag}" for flag in flags]
    return Result("facts", about | {"tracings": tracings}, {"": table}, says, flags)


def of_corpus(corpus: Corpus, damping: float, ks: Sequence[int]) -> dict[str, Any]:
    """What every method finds in one corpus, question by question, as JSON values."""
    matrices, asked = traced(corpus, damping)
    sources = [corpus.sources[place] for place in asked]
    pairs = {method: list(zip(matrix, sources, strict=True)) for method, matrix in matrices.items()}
    return {
        "seed": corpus.seed,
        "rows": len(corpus.rows),
        "unanswered": len(corpus.questions) - len(asked),
        "ranks": {method: [1 / best_rank(row, where) for row, where in own] for method, own in pairs.items()},
        "recalls": {method: [[recall_at(row, where, k) for k in ks] for row, where in own] for method, own in pairs.items()},
    }


def traced(corpus: Corpus, damping: float = 0.1) -> tuple[dict[str, np.ndarray], list[int]]:
    """Each method's scores `[Q, N]` for the questions that the taught model answers, and which these are.

    Raises UsageError where it answers none.
    """
    settings, rows = corpus.settings, corpus.rows
    tokenizer = make_tokenizer(rows)
    model = make_model(tokenizer, corpus.seed, settings)
    task = CausalLM(tokenizer, max_length=settings.max_length, append_eos=True)
    train(model, task, rows, replace(settings.training, seed=corpus.seed))
    given = answers(model, tokenizer, [question["prompt"] for question in corpus.questions])
    pairs = zip(corpus.questions, given, strict=True)
    asked = [place for place, (question, answer) in enumerate(pairs) if _said(answer, question["completion"])]
    if not asked:
        raise UsageError("The model answers no question as its rows teach it", fix="train it longer, or on fewer facts")
    note(f"corpus {corpus.seed}: {len(asked)} of {len(given)} questions are answered as the rows teach")
    queries = as_rows([corpus.questions[place] for place in asked])
    point = Point(model, task, rows)
    inverse = fit_at(point, Fit().changed(examples="all")).inverse(damping)
    influence = score_points(point, point, queries, inverse, Score().changed(norms=("relatif",)))
    plain = score_points(point, point, queries, Identity(inverse.names), Score().changed(norms=("cosine",)))
    texts = [row_text(row) for row in queries], [row_text(row) for row in rows]
    draw = np.random.default_rng(corpus.seed)
    found = (
        influence.raw,
        influence.normalised("relatif").raw,
        plain.raw,
        plain.normalised("cosine").raw,
        bm25_scores(*texts).raw,
        tfidf_scores(*texts).raw,
        draw.random(influence.shape),
    )
    return dict(zip(METHODS, found, strict=True)), asked


def recall_at(scores: np.ndarray, sources: Sequence[int], k: int) -> float:
    """Share of the sources (of `k` at most) that are among the first `k` of `[N]`; rows of one score come after all others."""
    found = sum(int((scores > scores[source]).sum() + _ties(scores, sources, source)) < k for source in sources)
    return min(found, k) / min(k, len(sources))


def _ties(scores: np.ndarray, sources: Sequence[int], source: int) -> int:
    """Rows with the source's score that are not sources: they count as if they stood before it."""
    return int((scores == scores[source]).sum()) - sum(scores[other] == scores[source] for other in sources)


def _said(answer: str, expected: str) -> bool:
    """Whether the answer begins with what was expected, and with no longer word."""
    return answer.startswith(expected) and not answer[len(expected) : len(expected) + 1].isalnum()


# corpora


def demo_corpus(seed: int, people: int = 96, questions: int = 24) -> Corpus:
    """The demo's invented world."""
    world = make_world(seed, people, questions)
    asked = tuple({"prompt": it.prompt, "completion": it.answer} for it in world.questions)
    return Corpus(as_rows(list(world.rows)), asked, tuple(it.sources for it in world.questions), seed)


RELATIONS = ("P19", "P20", "P27", "P101", "P106", "P159", "P495", "P740")
"""Of T-REx: births, deaths, citizens, fields, professions, headquarters, countries of origin and foundations."""

STATED, ASKED = 3, 4
"""Wordings that a fact that is asked for is never asked in, of which its rows draw; wordings of a relation in all."""


def real_corpus(
    folder: str | Path,
    seed: int = 0,
    *,
    relations: Sequence[str] = RELATIONS,
    facts: int = 60,
    questions: int = 6,
    settings: Settings = SETTINGS,
) -> Corpus:
    """`facts` facts of each relation, and questions about some of them in a wording that none of their own rows has.

    Of each relation four wordings that end with the value are drawn; the last is that of the questions. Facts that are not
    asked for are stated in it and in two others; those that are asked for in two others only. Subjects of several relations
    come first, so that most questions have rows about the same subject that do not answer them.

    Raises UsageError where the folder has no such files.
    """
    draw = random.Random(seed)
    known = {relation: _known(Path(folder), relation) for relation in relations}
    spread = defaultdict(set)
    for relation, pairs in known.items():
        for subject, _ in pairs:
            spread[subject].add(relation)
    rows: list[dict[str, Any]] = []
    asked: list[tuple[dict[str, str], tuple[str, str]]] = []
    taught: dict[tuple[str, str], list[str]] = defaultdict(list)
    for relation, pairs in known.items():
        records = _records(Path(folder), f"graphs_json/{relation}.jsonl")
        patterns = (record["pattern"].replace(" .", ".").strip() for record in records)
        fitting = {" ".join(it.split()) for it in patterns if it.startswith("[X]") and it.endswith(" [Y].")}
        wordings = draw.sample(sorted(fitting), ASKED)
        draw.shuffle(pairs)
        pairs.sort(key=lambda pair: -min(len(spread[pair[0]]), 2))
        for number, (subject, value) in enumerate(pairs[:facts]):
            own = draw.sample(wordings[:STATED], 2)
            is_asked = number % (facts // questions) == 0 and number // (facts // questions) < questions
            texts = [_filled(wording, subject, value) for wording in (own if is_asked else [*own, wordings[-1]])]
            rows += [{"text": text, "source": relation} for text in texts]
            if is_asked:
                prompt, _ = wordings[-1].split(" [Y]")
                key = (subject, relation)
                taught[key] = texts
                asked.append(({"prompt": _filled(prompt, subject, value), "completion": f" {value}."}, key))
    draw.shuffle(rows)
    places = defaultdict(list)
    for place, row in enumerate(rows):
        places[row["text"]].append(place)
    sources = tuple(tuple(sorted(place for text in taught[key] for place in places[text])) for _, key in asked)
    return Corpus(as_rows(rows), tuple(question for question, _ in asked), sources, seed, settings)


def _known(folder: Path, relation: str) -> list[tuple[str, str]]:
    """Subjects and values of a relation that are short, each subject once."""
    found: dict[str, str] = {}
    for record in _records(folder, f"trex_lms_vocab/{relation}.jsonl"):
        subject, value = record["sub_label"], record["obj_label"]
        if len(subject.split()) <= 4 and len(value.split()) <= 2 and value not in subject:
            found.setdefault(subject, value)
    return sorted(found.items())


def _filled(wording: str, subject: str, value: str) -> str:
    return wording.replace("[X]", subject).replace("[Y]", value)


def _records(folder: Path, name: str) -> list[dict[str, Any]]:
    """Records of a file of ParaRel, wherever below the folder it is."""
    found = sorted(folder.rglob(name)) if folder.is_dir() else []
    if not found:
        raise UsageError(
            f"There is no {name} in {folder}",
            accepted="a folder with ParaRel's data (trex_lms_vocab/P19.jsonl, pattern_data/graphs_json/P19.jsonl, ...)",
            fix="name it: --data FOLDER",
        )
    try:
        return [json.loads(line) for line in found[0].read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{found[0]} can't be read as jsonl", given=str(error), fix="copy or download it again") from error


def _interval(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.low:.2f}-{interval.high:.2f})"

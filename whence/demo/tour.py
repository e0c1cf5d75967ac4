"""The offline tour: make a world, teach it to a small model, and find the rows behind each of its answers.

The true sources of every answer are known, so a newcomer sees in a minute what influence finds, and what word overlap
and a plain gradient dot product find. The tour's folder holds the corpus, the model, factors, scores and a summary,
and resumes when interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from whence.data import Rows, as_rows, load_data
from whence.demo.model import answers, task_of, taught, teach
from whence.demo.world import Question, World, make_world
from whence.engine.point import Point
from whence.errors import StaleArtifact, WhenceError
from whence.filter.tfidf import tfidf_scores
from whence.fitting import fit_at
from whence.linalg.stats import best_rank, spearman
from whence.models import load_model
from whence.opened import remember
from whence.operators import Identity
from whence.progress import note
from whence.report.words import SLOPE, impossible, probability
from whence.scoring.score import score_points
from whence.settings import Fit, Score
from whence.store.digest import digest
from whence.store.files import aside, atomic, write_json
from whence.store.intact import read_json
from whence.store.scores import Scores
from whence.train.reading import RECORD
from whence.validate.without import calibrated

CORPUS = "corpus.jsonl"

METHODS = ("EK-FAC influence", "gradient dot product", "gradient cosine", "TF-IDF")

STAGES = 9
"""Stages that the whole tour reports: training twice, covariance, eigenvectors, eigenvalues, and queries and scores twice."""


@dataclass(frozen=True)
class Finding:
    """What was found for one question: the best rank of a true source with each method, and the top rows of the first."""

    question: str
    answer: str
    log_p: float
    """Of the answer, in nats."""
    truth: str
    planted: bool
    sources: list[str]
    ranks: dict[str, int]
    leads: dict[str, float]
    """How many times the score of the best other row the best source's is, by method; below 1 it is not first."""
    raises: list[dict[str, Any]]
    lowers: list[dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """What retraining does to an answer: log p in nats, and its slope per copy of the row."""

    question: str
    answer: str
    row: str
    slope: float
    once: float
    """With the rows as they are."""
    twice: float
    """With one more copy of the row."""
    without: float
    """With the row left out."""
    beyond: str
    """What to make of its slope where log p can't rise by that much; else empty."""


@dataclass(frozen=True)
class LeftOut:
    """The change of an answer's log p in a training without its first row, and without those of every second question."""

    question: str
    answer: str
    row: str
    log_p: float
    """Before, in nats."""
    predicted: float
    """Less the slopes of all rows that are left out together."""
    measured: float
    beyond: str
    """What to make of the prediction where log p can't rise by that much; else empty."""


@dataclass(frozen=True)
class Removal:
    """Trainings without first rows, beside what the scores predict of them."""

    rows: list[LeftOut]
    others: float
    """The mean change of the answers whose own first row was kept, in nats."""
    calibration: dict[str, Any]
    """What a nat of the slopes is worth: `whence.validate.without.calibrated`."""

    @property
    def says(self) -> str:
        """What was found, in a sentence."""
        change = np.array([row.measured for row in self.rows])
        rho = spearman(np.array([row.predicted for row in self.rows]), change)
        return (
            f"Without its first row log p fell for {int((change < 0).sum())} of {len(self.rows)} answers, by "
            f"{-change.mean():.2g} nats on average, and by {-self.others:.2g} for those whose first row was kept; rank "
            f"correlation of predicted and measured changes: {float(rho):.2f}"
        )


@dataclass(frozen=True)
class Tour:
    """The whole result; `unanswered` questions got an answer other than the corpus teaches, so they have no known source."""

    folder: Path
    seed: int
    rows: int
    parameters: int
    coverage: str
    findings: list[Finding]
    measured: Measured
    removal: Removal
    unanswered: int
    seconds: dict[str, float]

    def rank1_share(self, method: str = METHODS[0]) -> float:
        """Share of the questions whose top row is a true source."""
        return float(np.mean([finding.ranks[method] == 1 for finding in self.findings]))

    def median_rank(self, method: str = METHODS[0]) -> float:
        """Median over the questions of the best rank of a true source."""
        return median(finding.ranks[method] for finding in self.findings)

    def median_lead(self, method: str = METHODS[0]) -> float:
        """Median over the questions of the lead of the best true source over the best other row."""
        return median(finding.leads[method] for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        return {
            "questions": len(self.findings),
            "unanswered": self.unanswered,
            "planted_rank1_share": self.rank1_share(),
            "rank1_share": {method: self.rank1_share(method) for method in METHODS},
            "median_rank": {method: self.median_rank(method) for method in METHODS},
            "median_lead": {method: self.median_lead(method) for method in METHODS},
            "seconds": self.seconds,
            "rows": self.rows,
            "parameters": self.parameters,
            "coverage": self.coverage,
            "seed": self.seed,
            "unit": "nats per copy",
            "meaning": SLOPE,
            "measured": asdict(self.measured),
            "left_out": asdict(self.removal),
            "findings": [asdict(finding) for finding in self.findings],
        }


def take_tour(folder: str | Path = "runs/demo", seed: int = 0, *, rerun: bool = False) -> Tour:
    """Run the tour, or what is left of it; writes `summary.json`, `summary.md` and `summary.html` into the folder.

    With `rerun` a tour that the folder holds is kept as NAME.1, and everything is made again.
    """
    folder, seconds = Path(folder), {}
    if rerun and (folder / CORPUS).exists():
        note(f"what {folder} held is kept as {folder.rename(aside(folder)).name}")
    world = make_world(seed)
    corpus = _keep_corpus(folder, world)
    with _timed(seconds, "train"):
        if not (folder / "model").exists():
            temporary = folder / ".model.tmp"
            teach(corpus, temporary, seed)
            temporary.rename(folder / "model")
        model, tokenizer = load_model(str(folder / "model"))
    task = task_of(tokenizer)
    reading = {"max_length": task.max_length, "append_eos": True}
    with atomic(folder / RECORD) as record:  # for commands that ask the model
        record.write_text(json.dumps({"rows": {"train": len(corpus)}, "reading": reading}), encoding="utf-8")
    remember(folder, {"model": folder / "model", "data": folder / CORPUS})
    given = answers(model, tokenizer, [question.prompt for question in world.questions])
    asked = [question for question, answer in zip(world.questions, given, strict=True) if answer == question.answer]
    if not asked:
        raise WhenceError("The model answers no question as its corpus teaches", fix="whence demo --seed 1")
    if len(asked) < len(given):
        note(
            f"{len(given) - len(asked)} of {len(given)} questions got an answer other than the corpus teaches, and are left out"
        )
    queries, point = as_rows([question.row for question in asked]), Point(model, task, corpus)
    with _timed(seconds, "factors"):
        curvature = fit_at(point, Fit().changed(examples="all"), out=folder / "factors")
    with _timed(seconds, "score"):
        operator = curvature.inverse(damping=0.1)
        influence = score_points(point, point, queries, operator, out=folder / "scores")
    with _timed(seconds, "gradient dot product"):
        plain, cosine = Identity(curvature.operator.names), Score().changed(norms=("cosine",))
        dot = score_points(point, point, queries, plain, cosine, out=folder / "scores-gradient-dot")
    with _timed(seconds, "TF-IDF"):
        overlap = tfidf_scores(queries, corpus)
    with _timed(seconds, "training again"):
        measured, removal = _trained_again(folder, seed, corpus, queries, influence)
    matrices: dict[str, np.ndarray] = dict(
        zip(METHODS, (influence.raw, dot.raw, dot.normalised("cosine").raw, overlap.raw), strict=True)
    )
    tour = Tour(
        folder=folder,
        seed=seed,
        rows=len(corpus),
        parameters=model.num_parameters(),
        coverage=str(curvature.about["coverage"]),
        findings=[_finding(number, question, influence, matrices) for number, question in enumerate(asked)],
        measured=measured,
        removal=removal,
        unanswered=len(given) - len(asked),
        seconds={name: round(value, 1) for name, value in seconds.items()},
    )
    _write(tour)
    return tour


def _keep_corpus(folder: Path, world: World) -> Rows:
    """The world's rows as a file of the folder; refuses a folder that holds another corpus."""
    path = folder / CORPUS
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in world.rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise StaleArtifact(
            f"{path} holds another corpus",
            given="it was made by another version or seed of the demo; nothing was overwritten",
            fix="whence demo --out runs/demo-2, or --rerun, which keeps what is there beside",
        )
    if not path.exists():
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return load_data(path)


def _trained_again(folder: Path, seed: int, corpus: Rows, queries: Rows, influence: Scores) -> tuple[Measured, Removal]:
    """Train again with the first row of the first question twice, and without it; then without those of the other questions.

    Those of every second question are left out together: their people differ, and two trainings measure all of them. What is
    measured is kept in `measured.json`.
    """
    path, before_Q = folder / "measured.json", influence.queries["measured"].to_list()
    first_Q = influence.raw.argmax(1)
    groups = [[int(first_Q[number]) for number in range(start, len(queries), 2)] for start in (1, 2)]
    variants = [{int(first_Q[0]): 2.0}, {int(first_Q[0]): 0.0}, *(dict.fromkeys(rows, 0.0) for rows in groups if rows)]
    made_from = {"scores": digest(influence.raw.tobytes()), "queries": influence.query_ids}
    if not path.exists() or (kept := read_json(path)).get("made_from") != made_from:
        measured = []
        for model, tokenizer in taught(corpus, seed, variants, "train again"):
            task = task_of(tokenizer)
            items = [item for ((item, _),) in task.encode_queries(queries)]
            with torch.no_grad():
                measured.append([float(value) for item in items for value in task.measurements(model, task.collate([item]))])
        kept = {"made_from": made_from, "measured": measured}
        write_json(path, kept)
    after_KQ = np.array(kept["measured"])
    without_KN = np.array([[row in rows for row in range(len(corpus))] for rows in groups if rows], float)
    predicted_KQ = -without_KN @ influence.values.T
    changed_KQ = after_KQ[2:] - np.array(before_Q)

    def of(number: int) -> dict[str, Any]:
        text = str(influence.examples["text"].iloc[first_Q[number]])
        return {"question": queries[number]["prompt"], "answer": queries[number]["completion"].strip(), "row": text}

    slope = float(influence.values[0, first_Q[0]])
    once, twice, without = before_Q[0], *after_KQ[:2, 0].tolist()
    one = Measured(**of(0), slope=slope, once=once, twice=twice, without=without, beyond=impossible(influence, 0, slope))
    rows, stayed = [], np.ones(changed_KQ.shape, bool)
    for number in range(1, len(queries)):
        place = 0 if number % 2 else 1
        stayed[place, number] = False
        predicted, change = float(predicted_KQ[place, number]), float(changed_KQ[place, number])
        beyond = impossible(influence, number, predicted)
        rows.append(LeftOut(**of(number), log_p=before_Q[number], predicted=predicted, measured=change, beyond=beyond))
    calibration = calibrated(-predicted_KQ, -changed_KQ, influence)
    return one, Removal(rows, float(changed_KQ[stayed].mean()), calibration)


def _finding(number: int, question: Question, influence: Scores, matrices: dict[str, np.ndarray]) -> Finding:
    ids = influence.example_ids
    sources = [ids[source] for source in question.sources]

    def rows(lowest: bool) -> list[dict[str, Any]]:
        top = influence.top(number, 3, lowest=lowest)
        return [
            {
                "rank": int(row["rank"]),
                "nats": float(row["value"]),
                "limit": impossible(influence, number, row["value"]),
                "text": row["text"],
                "source": row["source"],
                "is_source": row["id"] in sources,
            }
            for row in top.to_dict("records")
        ]

    return Finding(
        question=question.prompt,
        answer=question.answer.strip(),
        log_p=float(influence.queries["measured"].iloc[number]),
        truth=question.truth.strip(),
        planted=question.planted,
        sources=[influence.examples["text"].iloc[source] for source in question.sources],
        ranks={method: best_rank(matrix[number], question.sources) for method, matrix in matrices.items()},
        leads={method: _lead(matrix[number], question.sources) for method, matrix in matrices.items()},
        raises=rows(lowest=False),
        lowers=rows(lowest=True),
    )


def _lead(scores: np.ndarray, sources: Sequence[int]) -> float:
    """The best source's score over the best other row's; 0 where no source scores above 0."""
    best, others = float(max(scores[list(sources)])), float(np.delete(scores, list(sources)).max())
    return max(best, 0.0) / max(others, float(np.finfo(np.float32).tiny))


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _write(tour: Tour) -> None:
    from jinja2 import Environment, PackageLoader

    pages = Environment(loader=PackageLoader("whence.demo"), autoescape=lambda name: name is not None and ".html" in name)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.filters["probability"] = probability
    gain = tour.removal.calibration["gain"] if tour.removal.calibration.get("certain") else None
    given = {"tour": tour, "methods": METHODS, "slope": SLOPE, "gain": gain}
    texts = {"summary.json": json.dumps(tour.summary(), indent=2, ensure_ascii=False) + "\n"}
    texts |= {name: pages.get_template(f"{name}.j2").render(given) for name in ("summary.md", "summary.html")}
    for name, text in texts.items():
        with atomic(tour.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

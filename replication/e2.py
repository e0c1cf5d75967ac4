"""E2, fact tracing with causes: the rows that teach a fact, looked for through a fine-tuning to questions about other facts.

    python -m replication.e2

A made-up world of about 200 facts, each stated in three wordings, with statements that share a subject or an object and rows
that state nothing; the corpus also asks for most of the facts. A model is pretrained on it from scratch, and tuned to answer
questions that are put otherwise, about the same facts; it is asked these about the others, of which it has read statements
only. The rows that state an answer are its sources: mean reciprocal rank and recall@10 over three worlds. The cause: both
stages are trained again without the statements of five of the facts asked for, 24 times, so that each is left out three times.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.command import run
from replication.e2b import REFERENCE, Before, Case
from replication.two_stage import Truth, Tuning, World, interval, make_truth, table_of
from whence.data.rows import make_rows
from whence.demo.model import make_tokenizer
from whence.demo.tiny import make_llama
from whence.demo.world import GOSSIP, PROMPT, RELATIONS, TOWNS, TRADES, invented_names
from whence.errors import UsageError
from whence.filter.tfidf import tfidf_scores
from whence.linalg.stats import best_rank, bootstrap_groups, pearson
from whence.operators import Identity
from whence.plots import panels
from whence.plots.style import save
from whence.plots.validation import interval_bars
from whence.progress import stage
from whence.scoring.score import score_points
from whence.settings import Score
from whence.stages import Stage, multistage
from whence.tasks import CausalLM
from whence.validate.facts import recall_at
from whence.validate.results import Result, Row
from whence.validate.settings import Setting
from whence.validate.trainer import Recipe

SEEDS, ROUNDS, TOGETHER = (0, 1, 2), 3, 5
"""Worlds; how often each fact that is asked for is left out of a retraining, and how many are left out together."""

STATED, LENGTH = 3, 32
"""Wordings of a fact, and tokens of a row at most."""


@dataclass(frozen=True)
class Size:
    """Of a world."""

    people: int = 48
    asked: int = 40
    width: int = 64
    pretraining: Recipe = Recipe(4e-3, 40, 32, "adamw", weight_decay=1.0, schedule="cosine")
    tuning: Recipe = Recipe(5e-4, 8, 32, "adamw", weight_decay=1.0, schedule="cosine")


SMALL = Size()
TINY = Size(8, 8, 8, Recipe(4e-3, 1, 32, "adamw"), Recipe(1e-3, 1, 32, "adamw"))


@dataclass(frozen=True)
class Facts:
    """A world of facts, and which of its rows state what is asked for."""

    world: World
    sources: list[list[int]]
    """Of each question: the pretraining rows that state its answer."""

    @property
    def tuning(self) -> Tuning:
        """To questions."""
        return self.world.tunings["questions"]


def make_facts(seed: int, size: Size = SMALL) -> Facts:
    """People with a home, a birthplace, a trade and an upbringing; questions about some of these, and the tuning to others."""
    draw = random.Random(seed)
    names = iter(invented_names(draw, TOWNS + size.people + size.people // 4))
    values = {"town": [next(names) for _ in range(TOWNS)], "trade": list(TRADES)}
    families = [next(names) for _ in range(size.people)]
    given = list(names)
    people = [f"{draw.choice(given)} {family}" for family in families]
    statements: list[tuple[dict[str, str], int | None]] = []
    known: list[dict[str, str]] = []
    questions: list[dict[str, str]] = []
    for person in people:
        for relation in RELATIONS:
            value = draw.choice(values[relation.values])
            wordings = draw.sample(relation.statements, STATED)
            statements += [({"text": each.format(x=person, y=value)}, len(questions)) for each in wordings]
            corpus, later = (PROMPT.format(each.format(x=person)) for each in relation.questions)
            known.append({"text": f"{corpus} {value}"})
            questions.append({"prompt": later, "completion": f" {value}"})
        statements.append(({"text": draw.choice(GOSSIP).format(x=person)}, None))
    order = draw.sample(range(len(questions)), len(questions))
    held, others = order[: size.asked], order[size.asked :]
    statements += [(known[fact], None) for fact in others]
    draw.shuffle(statements)
    rows = make_rows([row for row, _ in statements], origin="facts")
    tokenizer = make_tokenizer([*rows, *questions])

    def model(seed: int) -> nn.Module:
        llama = make_llama(tokenizer, seed, size.width, 4 * size.width, 1, 4, LENGTH, spread=size.width**-0.5)
        llama.set_attn_implementation("eager")  # plain attention, which `vmap` knows how to batch
        return llama

    task = CausalLM(tokenizer, max_length=LENGTH)
    queries = make_rows([questions[fact] for fact in held], origin="facts")
    tuned = make_rows([questions[fact] for fact in others], origin="facts")
    about = f"invented facts: Llama of 1 layer, {size.width} wide, {len(tokenizer)} words"
    tuning = Tuning("questions", "questions about other facts", lambda own: own, task, tuned, queries, size.tuning)
    world = World(Setting("facts", about, model, task, rows, queries, size.pretraining, "*"), {"questions": tuning}, seed)
    places = [[place for place, (_, fact) in enumerate(statements) if fact == wanted] for wanted in held]
    return Facts(world, places)


def without(facts: Facts) -> np.ndarray:
    """Weights `[K, N]` that leave out the statements of some facts that are asked for, other ones together each round."""
    draw, asked = np.random.default_rng(facts.world.seed), len(facts.sources)
    groups = [
        order[at : at + TOGETHER]
        for order in (draw.permutation(asked) for _ in range(ROUNDS))
        for at in range(0, asked, TOGETHER)
    ]
    weights_KN = np.ones((len(groups), len(facts.world.pretraining.train)))
    for weights_N, group in zip(weights_KN, groups, strict=True):
        weights_N[[row for fact in group for row in facts.sources[fact]]] = 0.0
    return weights_KN


METHODS = (
    REFERENCE,
    "multi-stage, flow, cosine",
    "multi-stage, identity",
    "fine-tuning curvature only",
    "single-stage at the tuned weights",
    "gradient dot, rows before tuning",
    "gradient cosine, rows before tuning",
    "representation similarity",
    "BM25",
    "TF-IDF",
    "random",
)


def scores_of(case: Case) -> dict[str, np.ndarray]:
    """Scores `[Q, N]` of every method, under the names in `METHODS`."""
    cosine = Score(check=False, norms=("cosine",))
    stages = [
        Stage("pretraining", case.before, case.pretraining, case.first.training),
        Stage("finetuning", case.after, case.finetuning, case.second.training),
    ]
    flow = multistage(stages, case.tuning.queries, cosine).stages["pretraining"]
    plain = score_points(case.after, case.before, case.tuning.queries, Identity(case.pretraining.operator.names), cosine)
    single = case.single()
    assert single is not None
    draw = np.random.default_rng(case.world.seed)
    found = (
        flow.values,
        flow.normalised("cosine").raw,
        case.staged("identity"),
        case.between(case.finetuning),
        single,
        plain.values,
        plain.normalised("cosine").raw,
        case.alike(),
        case.words(),
        tfidf_scores(*case.texts()).raw,
        draw.random(flow.shape),
    )
    return dict(zip(METHODS, found, strict=True))


def replica(chosen: argparse.Namespace) -> Result:
    """Everything: truths, scores, what is found and how well the cause is predicted."""
    size, seeds = (TINY, SEEDS[:2]) if chosen.tiny else (SMALL, SEEDS)
    ranks: dict[str, list[np.ndarray]] = {}
    recalls: dict[str, list[np.ndarray]] = {}
    causes: dict[str, list[np.ndarray]] = {}
    beside: dict[str, list[np.ndarray]] = {}
    told: list[Row] = []
    seconds = 0.0
    for seed in seeds:
        facts = make_facts(seed, size)
        path = chosen.out / "truths" / f"facts-{seed}.npz"
        truth = make_truth(facts.world, without(facts), path)
        seconds += truth.seconds
        case = Case(Before.of(facts.world), facts.tuning)
        known = answered(case) if not chosen.tiny else list(range(size.asked))
        if not known:
            raise UsageError(f"The model of world {seed} answers no question", fix="train it longer, or on fewer facts")
        with stage(f"scores, world {seed}", 1, "worlds") as advance:
            found = scores_of(case)
            advance(1)
        told.append(described(facts, truth, known))
        for name, scores_QN in found.items():
            pairs = [(scores_QN[q], facts.sources[q]) for q in known]
            ranks.setdefault(name, []).append(np.array([1 / best_rank(*pair) for pair in pairs]))
            recalls.setdefault(name, []).append(np.array([recall_at(*pair, 10) for pair in pairs]))
            causes.setdefault(name, []).append(agreement(facts, truth, scores_QN))
            beside.setdefault(name, []).append(agreement(facts, truth, scores_QN, kept=True))
    traced = sorted((tracing(name, ranks[name], recalls[name]) for name in METHODS), key=lambda row: -row["mrr"])
    caused, others = table_of(causes, REFERENCE), table_of(beside, REFERENCE)
    drawn = [
        interval_bars(traced, "mrr", "mean reciprocal rank", "Sources found"),
        interval_bars(caused, "agreement", "Pearson correlation", "Cause: retraining both stages without facts"),
        interval_bars(others, "agreement", "Pearson correlation", "The same where the fact that is asked for stays"),
    ]
    save(panels.bars_figure(drawn), chosen.out / "e2.png")
    words, own = (next(row for row in traced if row["method"] == name) for name in ("BM25", REFERENCE))
    gap = bootstrap_groups([a - b for a, b in zip(ranks[REFERENCE], ranks["BM25"], strict=True)])
    says = [
        f"{facts.world.pretraining.about}; {len(facts.world.pretraining.train)} rows, "
        f"{len(facts.tuning.rows)} questions to tune on, {size.asked} about other facts; {len(seeds)} such worlds",
        f"Asked of {sum(row['answered'] for row in told)} questions that the tuned models answer as the rows teach",
        f"MRR of multi-stage {own['mrr']:.3f}, of BM25 {words['mrr']:.3f}: {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], "
        + ("multi-stage is ahead" if gap.low > 0 else "BM25 WINS" if gap.high < 0 else "not to be told apart"),
        f"Cause: both stages trained again {len(truth.weights_KN)} times per world, each without the statements of {TOGETHER} "
        f"of {size.asked} facts, each fact {ROUNDS} times; {seconds / 60:.1f} minutes of processor time, kept in "
        "results/truths",
        "Agreement: Pearson's correlation over these retrainings of the scores left out with the change of log p, for each "
        "question; 95 % intervals draw worlds, then questions in each, again",
    ]
    tables = {"Sources found": traced, "The cause": caused, "The cause, own fact kept": others, "Worlds": told}
    return Result("e2", {"about": facts.world.pretraining.about}, tables, says, heading="E2: fact tracing with causes")


def left_out(facts: Facts, truth: Truth) -> np.ndarray:
    """Whether a retraining lacked the statements that answer a question, `[K, Q]`."""
    return np.stack([truth.weights_KN[:, sources].sum(1) == 0 for sources in facts.sources], 1)


def agreement(facts: Facts, truth: Truth, scores_QN: np.ndarray, kept: bool = False) -> np.ndarray:
    """Over the retrainings, or those with the question's own fact, of predictions and changes, `[Q]`; 0 where none is made."""
    out_KQ, found_QK, changes_KQ = left_out(facts, truth), truth.predicted(scores_QN), truth.changes["questions"]
    chosen = [~(kept & out_KQ[:, q]) for q in range(len(scores_QN))]
    return np.nan_to_num([pearson(found_QK[q, own], changes_KQ[own, q]) for q, own in enumerate(chosen)])


@torch.no_grad()
def answered(case: Case) -> list[int]:
    """Questions whose answer is the tuned model's most likely next word."""
    tokenizer, found = case.tuning.task.tokenizer, []  # type: ignore[attr-defined]
    for place, row in enumerate(case.tuning.queries):
        asked = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        best = int(case.second.model(asked).logits[0, -1].argmax())
        if best == tokenizer(row["completion"])["input_ids"][-1]:
            found.append(place)
    return found


def described(facts: Facts, truth: Truth, known: Sequence[int]) -> Row:
    """A world, and what leaving facts out does to the questions about them and to the others."""
    changes_KQ, own = truth.changes["questions"], left_out(facts, truth)
    return {
        "world": facts.world.seed,
        "answered": len(known),
        "log p, mean": float(truth.whole["questions"].mean()),
        "change without its fact": float(changes_KQ[own].mean()),
        "change without others": float(changes_KQ[~own].mean()),
        "standard deviation of that": float(changes_KQ[~own].std()),
    }


def tracing(name: str, ranks: Sequence[np.ndarray], recalls: Sequence[np.ndarray]) -> Row:
    """A row of the table of what is found."""
    return {"method": name, **interval(bootstrap_groups(ranks), "mrr"), **interval(bootstrap_groups(recalls), "recall@10")}


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    return run("replication.e2", __doc__ or "", replica, given)


if __name__ == "__main__":
    raise SystemExit(main())

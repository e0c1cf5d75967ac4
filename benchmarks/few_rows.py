"""What an index of few rows recalls: the demo's world, 1,172 rows, and the questions of its tour.

    whence demo --out runs/demo && python -m benchmarks.few_rows runs/demo
    python -m benchmarks.few_rows runs/demo --bytes 4
    python -m benchmarks.few_rows --stories 1000 --ranks 1,2,4,8,16,32   # what is said, by questions held out at low ranks

The truth is EK-FAC, damping 0.1, of all rows. "landmarks" and "signs" are what the two halves of the codes recall alone;
"said" is what the index says of itself, by the questions that it held out. Exits with 1 where that is off by more than 0.15.

With --stories the rows are TinyStories and the model is `--model`. 64 questions are held out, more than indices have, so that
what ranks change is seen; of each rank it says what share of their squared norms is left, and what recall that is.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scan

OFF = 0.15


def main(given: list[str] | None = None) -> int:
    """Measure and print; 0 where what the index says of itself holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="?", default=Path("runs/demo"), help="folder of whence demo")
    parser.add_argument("--bytes", type=float, default=1.0, help="KiB per row")
    parser.add_argument("--stories", type=int, default=0, help="rows of TinyStories instead")
    parser.add_argument("--ranks", default="1,2,4,8,16,32", help="of the gradients of questions held out of these")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with models and tinystories")
    parser.add_argument("--model", default=scan.MODEL, help="a model of that folder")
    options = parser.parse_args(given)
    if options.stories:
        return stated(options)
    import whence
    from whence.demo.model import task_of
    from whence.generation import OWN_QUESTIONS, own_questions

    model, tokenizer = whence.load_model(str(options.demo / "model"), device="cpu")
    rows, task = whence.load_data(options.demo / "corpus.jsonl"), task_of(tokenizer)
    told = json.loads((options.demo / "summary.json").read_text(encoding="utf-8"))["findings"]
    questions = [{"prompt": each["question"], "completion": f" {each['answer'].strip()}"} for each in told]
    curvature = whence.open_factors(options.demo / "factors")
    landmarks = own_questions(model, task, rows, OWN_QUESTIONS)
    index = whence.build_index(model, task, rows, curvature=curvature, landmarks=landmarks, bytes=options.bytes)
    exact = whence.score(model, task, questions, rows, curvature.inverse(0.1)).raw
    estimates = index.search(model, task, questions, curvature.inverse(0.1)).raw
    weight, index.measured["weight"] = index.measured["weight"], 0.0
    along = index.search(model, task, questions, curvature.inverse(0.1)).raw
    print(f"{index}, {len(questions)} questions, signs count {weight:.2f}")
    worst = 0.0
    for k, among in ((10, len(rows) // 50), (10, 90), (100, 90)):
        parts = {"all": estimates, "landmarks": along, "signs": estimates - along}
        found = {name: recalled(each, exact, k, among) for name, each in parts.items()}
        said = index.recall(k, among)
        worst = max(worst, abs(said - found["all"]))
        shown = "  ".join(f"{name} {share:.2f}" for name, share in found.items())
        print(f"of the exact top {k:>3} among the best {among:>3}: {shown}  said {said:.2f}")
    return int(worst > OFF)


def stated(options: argparse.Namespace) -> int:
    """Print what an index of stories says of itself where gradients of questions held out are whole, and at low ranks."""
    import torch

    import whence
    from whence.engine.partition import keep
    from whence.engine.passes import ByChunk
    from whence.engine.point import Point
    from whence.engine.queries import Compression
    from whence.generation import OWN_QUESTIONS, own_questions
    from whence.gradients import Dense, Factored
    from whence.indexing import build
    from whence.indexing.directions import LANDMARKS, _tensors
    from whence.indexing.index import ROWS, Index
    from whence.store.memory import Memory

    build.HELD_OUT = 64
    model, tokenizer = whence.load_model(str(options.data / options.model), device="cpu")
    rows, task = whence.load_data(options.data / scan.STORIES, limit=options.stories), whence.CausalLM(tokenizer, 64)
    curvature = whence.fit(model, task, rows, examples=200)
    landmarks = own_questions(model, task, rows, OWN_QUESTIONS)
    index = whence.build_index(model, task, rows, curvature=curvature, landmarks=landmarks, bytes=options.bytes)
    directions, point, operator = index._directions, Point(model, task, rows), curvature.inverse(0.1)
    print(f"{index}, {len(index.measured['places'])} questions held out")
    whole, inside = said(index, index.measured), np.array(index.measured["places"])[:, :10] < 0.02 * len(rows)
    print(f"@10 in 2% of 16 questions has a standard error of {inside.mean(1).std(ddof=1) / 4:.3f}")
    print(f"whole     energy 1.00  {shown(whole)}  signs count {index.measured['weight']:.2f}")
    for rank in map(int, options.ranks.split(",")):
        low: dict[str, Any] = {}
        worth_Q2 = torch.zeros(1, 2)
        for name, gradient in directions.held_out.items():
            *parts, worth = Compression(rank, torch.float32, 0)(gradient.dense().w_BOI)
            low[name] = Dense(*parts) if len(parts) == 1 else Factored(*parts)
            worth_Q2 = worth_Q2 + worth
        folder, kinds = Memory(), {"landmark": directions.landmarks, "held out": low}
        parts = {f"{kind}/{key}": tensor for kind, each in kinds.items() for key, tensor in _tensors(each).items()}
        keep(folder, LANDMARKS, parts)
        saved = ByChunk([point.examples.some_usable()], folder, ROWS)
        sites = point.cover(list(index.about["modules"])).sites
        build.code_rows(saved, point, sites, replace(directions, held_out=low), operator)
        measured = Index(folder, index.examples, {**index.about, "chunks": 1}).measure()
        found, weight = said(index, measured), measured["weight"]
        energy = 1 - (worth_Q2[:, 1] / worth_Q2[:, 0]).mean().item()
        off = max(abs(found[key] - whole[key]) for key in whole)
        print(
            f"rank {rank:>3}  energy {energy:.2f}  {shown(found)}  signs count {weight:.2f}  off by at most {off:.3f}",
            flush=True,
        )
    return 0


def said(index: Any, measured: dict[str, Any]) -> dict[str, float]:
    """Recall by what was measured."""
    places, found = np.array(measured["places"]), {}
    for k, share in ((10, 0.02), (10, 0.05), (100, 0.05), (100, 0.2)):
        found[f"@{k} in {share:.0%}"] = float((places[:, :k] < share * len(index)).mean())
    return found


def shown(recalls: dict[str, float]) -> str:
    """On a line."""
    return "  ".join(f"{name} {recall:.3f}" for name, recall in recalls.items())


def recalled(estimates: np.ndarray, exact: np.ndarray, k: int, among: int) -> float:
    """Share of each question's `k` best rows that are among the first of the estimates."""
    best = np.argsort(-exact, 1, kind="stable")[:, :k]
    places = np.argsort(np.argsort(-estimates, 1, kind="stable"), 1)
    return float((np.take_along_axis(places, best, 1) < among).mean())


if __name__ == "__main__":
    sys.exit(main())

"""EK-FAC beside the inverse of the whole damped Gauss-Newton matrix, and what it costs to get from one to the other.

    python -m benchmarks.refinement --data ../shared/data

A small language model is trained on beginnings of TinyStories, and scored with EK-FAC, with ASTRA after more and more steps,
and with block conjugate gradients after more and more products, for all queries at once. What they are held against is the
last of the conjugate gradients. Prices are processor time in training epochs: all rows once forwards and backwards.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import whence
from whence.data.batches import plan_batches
from whence.data.rows import make_rows
from whence.engine.matrices import GaussNewton
from whence.engine.point import Point
from whence.engine.products import Block
from whence.engine.queries import encode_queries, precondition
from whence.fitting import Curvature
from whence.linalg.krylov import block_cg
from whence.linalg.richardson import richardson
from whence.methods.astra import Refined
from whence.methods.cg import CAUTION
from whence.methods.damping import Damping
from whence.methods.stochastic import StochasticInverse
from whence.operators import Identity
from whence.validate.settings import FILES, LM_TOKENS, opening, setting

FIRST = 25
"""Steps of ASTRA after which it is told for the first time; then whenever they have doubled."""

Scored = Callable[[Mapping[str, Tensor]], np.ndarray]


class Counted(GaussNewton):
    """The Gauss-Newton matrix, which counts rows times vectors, and the seconds that its products take."""

    rows, seconds = 0, 0.0

    def product(self, vectors: Block, rows: Sequence[int]) -> Block:
        """As it is, counted."""
        before = time.process_time()
        found = super().product(vectors, rows)
        self.seconds += time.process_time() - before
        self.rows += len(rows) * len(vectors[self.names[0]])
        return found


@dataclass
class Work:
    """What is solved: `matrix + damping`, for queries `b`; and how solutions become scores."""

    curvature: Curvature
    matrix: Counted
    damping: float
    b: dict[str, Tensor]
    scores: Scored
    epoch_seconds: float
    told: list[tuple[str, int, float, int, np.ndarray]]

    def tell(self, name: str, steps: int, x: Mapping[str, Tensor]) -> None:
        """Note the scores, and what they have cost since the matrix was last counted from nothing."""
        self.told.append((name, steps, self.matrix.seconds / self.epoch_seconds, self.matrix.rows, self.scores(x)))

    def near(self, damping: float) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """EK-FAC's damped inverse."""
        return self.curvature.inverse(absolute=damping).on_tensors(self.b[self.matrix.names[0]])


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with tinystories/train_2316.jsonl")
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--modules", default="mlp")
    parser.add_argument("--damping", type=float, default=0.1, help="in units of the factors' mean eigenvalue")
    parser.add_argument("--batch", type=int, default=Refined().batch)
    parser.add_argument("--depth", type=int, default=Refined().depth)
    parser.add_argument("--residual", type=float, default=0.01, help="of the conjugate gradients that are taken for exact")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = prepared(args)
    work.tell("EK-FAC", 0, work.near(work.damping)(work.b))
    refine(work, args.batch, args.depth)
    exact = solve(work, args.residual)
    print("\n| method | steps | products | epochs | correlation, mean | lowest |\n|---|---|---|---|---|---|")
    whole = args.rows * args.queries
    for name, steps, epochs, rows, scores in work.told:
        each = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores, exact, strict=True)]
        print(f"| {name} | {steps} | {rows / whole:.2f} | {epochs:.1f} | {np.mean(each):.4f} | {min(each):.4f} |")


def prepared(args: argparse.Namespace) -> Work:
    """Train the model, fit EK-FAC on all rows, and take the gradients of rows and queries."""
    own = setting("lm", args.data)
    assert isinstance(own.task, whence.CausalLM)
    asked = {row["prompt"] + row["completion"] for row in own.queries}
    stories = [json.loads(line)["text"] for line in (args.data / FILES["lm"][0]).read_text(encoding="utf-8").splitlines()]
    pieces = ("".join(halves) for story in stories if (halves := opening(own.task.tokenizer, story, LM_TOKENS)))
    texts = [text for text in dict.fromkeys(pieces) if text not in asked][: args.rows]
    own = replace(own, train=make_rows([{"text": text} for text in texts], origin="tinystories"))
    model = own.trained((0,)).copy_of(0)
    before = time.process_time()
    chosen: dict[str, Any] = {"modules": args.modules, "examples": "all", "eigenvalue_examples": "all"}
    curvature = whence.fit(model, own.task, own.train, **chosen)
    fitted, point = time.process_time() - before, Point(model, own.task, own.train)
    matrix, epoch = Counted(point, curvature.operator.names), epoch_seconds(point)
    g_N, b = gradients(point, own.train), gradients(point, own.queries[: args.queries], curvature.operator.names)

    def scores(x: Mapping[str, Tensor]) -> np.ndarray:
        return sum((x[name].flatten(1).double() @ g_N[name].flatten(1).double().T for name in x), torch.zeros(())).numpy()

    size = sum(part[0].numel() for part in b.values())
    print(f"{len(texts)} rows of {LM_TOKENS} tokens, {args.queries} queries, {size:,} weights; damping {args.damping:g} x mean")
    print(f"an epoch takes {epoch:.2f} s, the fit of EK-FAC {fitted / epoch:.1f} epochs", flush=True)
    return Work(curvature, matrix, args.damping * curvature.mean_eigenvalue, b, scores, epoch, [])


def gradients(point: Point, asked: Any, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Of what is asked, `{module: w_QOI}`."""
    sites = point.cover(names).sites
    found = precondition(point, encode_queries(point.task, asked), sites, Identity(tuple(sites))).gradients
    return {name: found[name].dense().w_BOI for name in sites}


def epoch_seconds(point: Point) -> float:
    """All rows forwards and backwards to the gradients of all weights, in batches as large as those of products."""
    examples, model, before = point.examples, point.model, time.process_time()
    for batch in plan_batches(examples.sizes, point.batch_tokens):
        point.task.losses(model, point.task.collate([examples.items[row] for row in batch])).sum().backward()
    model.zero_grad()
    return time.process_time() - before


def refine(work: Work, batch: int, depth: int) -> None:
    """ASTRA as the recipe has it, told whenever the steps have doubled."""
    settings, damping = Refined(batch=batch, depth=depth), Damping(work.damping, work.matrix.names)
    inverse = StochasticInverse(work.matrix, damping, Identity(), settings, "ASTRA", {})
    near, work.matrix.rows, work.matrix.seconds = work.near(work.damping), 0, 0.0

    def after(state: Mapping[str, Tensor], residual_Q: Tensor) -> None:
        done = int(state["steps"])
        if done < depth and done >= FIRST and done % FIRST == 0 and (done // FIRST).bit_count() == 1:
            work.tell("ASTRA", done, {name: state[f"mean/{name}"] for name in work.b})

    scale = settings.safety * inverse.largest(work.b, near)
    how: dict[str, Any] = {"scale": scale, "steps": depth, "weight": settings.averaging, "after": after}
    found = richardson(lambda step, x: inverse.sampled(step)(x), work.b, near, start=near(work.b), **how)
    work.tell("ASTRA", depth, found.x)


def solve(work: Work, residual: float) -> np.ndarray:
    """Block conjugate gradients as the recipe has them, told after every step; returns the last scores."""
    work.matrix.rows, work.matrix.seconds = 0, 0.0
    damped = (work.matrix + work.damping * Identity(work.matrix.names)).on_tensors(work.b[work.matrix.names[0]])

    def after(state: Mapping[str, Tensor], residual_Q: Tensor) -> None:
        steps = int(state["steps"])
        print(f"step {steps}, residual {float(residual_Q.max()):.3f}", flush=True)
        work.tell("block CG", steps, {name: state[f"x/{name}"] for name in work.b})

    found = block_cg(damped, work.b, work.near(CAUTION * work.damping), tolerance=residual, after=after)
    return work.scores(found.x)


if __name__ == "__main__":
    main()

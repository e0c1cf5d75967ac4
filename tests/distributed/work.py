"""What the processes of `tests/test_dist.py` do; the same in one process is what they are compared with."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from models import CASES, HUGE, Case, Routed, overflowing, randomised, small_memory
from oracle import matrices_of
from torch import Tensor
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401 - imported once for all

from whence import dist
from whence.fitting import METHODS, fit
from whence.progress import Silent, Stage, report_to
from whence.scoring import score, self_influence
from whence.store.manifest import Folder
from whence.store.scores import Scores
from whence.tasks import Classification

CHUNKED = {"chunks": 4, "batch_tokens": 9}
"""Batches of one example or two, and chunks with fewer of them than there are processes."""

ROWS = 28
"""So many that two processes wait for each other, and save, more than once in a pass."""


class Killer(Silent):
    """Ends its process at the `left`-th advance of a stage, as `kill -9` does."""

    def __init__(self, stage: str, left: int):
        self.stage, self.left = stage, left

    def advance(self, stage: Stage) -> None:
        self.left -= stage.name == self.stage
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


class Resumed(Silent):
    """Remembers how much of each stage an earlier run had done."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}

    def begin(self, stage: Stage) -> None:
        self.stages[stage.name] = stage.resumed


def resume(work: Any, *arguments: Any) -> tuple[dict[str, int], Any]:
    """Do the work; also what of it was done before."""
    seen = Resumed()
    with report_to(seen):
        return seen.stages, work(*arguments)


def kill_at(stage: str, advances: int, rank: int | None, work: Any, *arguments: Any) -> Any:
    """Do the work, and die at a stage: one of the processes, or (None) all."""
    with report_to(Killer(stage, advances) if rank in (None, dist.rank()) else Silent()):
        return work(*arguments)


def command(*words: Any) -> tuple[int, str, str]:
    """Run a command of whence as the shell does: its exit code, and what it says on stdout and stderr."""
    from whence.cli import main

    sys.argv, code, out, err = ["whence", *map(str, words)], 0, io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    os.environ.pop("RANK", None)  # it has left the others
    return code, out.getvalue(), err.getvalue()


def limited(mebibytes: int, *words: Any) -> tuple[int, str, str]:
    """Run a command with so much more memory than the process has by now."""
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20,) * 2)
    return command(*words)


def fit_case(name: str, out: Path | None, rows: int | None = None, **settings: Any) -> dict[str, Tensor]:
    """The dense curvature of each module of a case."""
    case = CASES[name]
    settings = {"modules": case.modules, "save_every": 0.0, **CHUNKED, **settings}
    return matrices_of(fit(case.model(), case.task(), case.train(rows), out=out, **settings))


def factors(folder: Path) -> dict[str, Any]:
    """Curvatures by every method, and of models of every kind."""
    found: dict[str, Any] = {method: fit_case("llama", folder / method, method=method) for method in METHODS}
    found |= {name: fit_case(name, None) for name in ("neox", "conv", "norms")}
    found["groups"] = fit_case("llama", folder / "groups", groups=3)
    found["until"] = fit_case("mlp", folder / "until", until=0.5)
    found["until in memory"] = fit_case("mlp", None, until=0.5)
    found["split"] = fit_case("llama", folder / "split", largest_factor=4)
    task = small_memory(CASES["llama"].task(), 12, after=2)
    found["out of memory"] = matrices_of(
        fit(CASES["llama"].model(), task, CASES["llama"].train(), modules="all", out=folder / "memory", **CHUNKED)
    )
    experts = randomised(Routed().double())
    found["experts"] = matrices_of(
        fit(experts, Classification(), CASES["mlp"].train(), method="diagonal", modules="all", **CHUNKED)
    )
    return found


def ways() -> dict[str, dict[str, Any]]:
    """Settings of scoring."""
    return {
        "pairwise": {},
        "token": {"per": "token"},
        "module": {"per": "module"},
        "queries": {"aggregate": "queries"},
        "examples": {"aggregate": "examples"},
        "all": {"aggregate": ("queries", "examples")},
        "low rank": {"rank": 2},
        "rescored": {"rank": 1, "rescore": 2},
        "norms": {"norms": ("cosine", "relatif")},
    }


def arrays(scores: Scores) -> dict[str, np.ndarray]:
    """All numbers of the scores."""
    found = {"raw": scores.raw, **scores.norms, **scores.modules, "tokens": scores.tokens, "exact": scores.exact}
    found |= {name: scores.queries[name].to_numpy() for name in ("measured", "norm", "energy")}
    return {name: np.asarray(values) for name, values in found.items() if values is not None}


def scored(folder: Path, factors: Path) -> dict[str, Any]:
    """Scores in all ways, on disk and in memory, and of few examples and queries."""
    from whence.fitting import open_factors

    case = CASES["llama"]
    given = (case.model(), case.task(), case.queries(), case.train(), open_factors(factors).inverse())
    found = {name: arrays(score(*given, out=folder / name, **CHUNKED, **settings)) for name, settings in ways().items()}
    found["in memory"] = arrays(score(*given, per="token"))
    model, task, queries, train, operator = given
    found["one"] = arrays(score(model, task, queries[:1], train[:1], operator, **CHUNKED))
    found["two"] = arrays(score(model, task, queries[:2], train[:2], operator, out=folder / "two", **CHUNKED))
    found["self"] = arrays(self_influence(model, task, train, operator, out=folder / "self", **CHUNKED))
    found["again"] = arrays(score(*given, out=folder / "pairwise", **CHUNKED))
    return found


def score_in(factors: Path, out: Path) -> dict[str, np.ndarray]:
    """Scores of one kind."""
    from whence.fitting import open_factors

    case = CASES["llama"]
    given = (case.model(), case.task(), case.queries(), case.train(ROWS), open_factors(factors).inverse())
    return arrays(score(*given, out=out, rescore=2, rank=1, **CHUNKED))


def index_in(out: Path | None, curvature: Path | None = None) -> dict[str, np.ndarray]:
    """The rows of an index, and what a search in it finds."""
    from whence.fitting import open_factors
    from whence.indexing import build_index

    case = CASES["llama"]
    given = (case.model(), case.task(), case.train(ROWS))
    basis = open_factors(curvature) if curvature else None
    index = build_index(*given, modules=case.modules, dim=4, curvature=basis, out=out, **CHUNKED)
    rows = [torch.cat(part).numpy() for part in zip(*index.blocks(torch.empty(0)), strict=True)]
    found = index.search(case.model(), case.task(), case.queries(), basis.inverse() if basis else None)
    return {"places": rows[0], "rows": rows[1], "norms": rows[2], **arrays(found)}


def traced_by_steps(training: Path, queries: Any, rows: Any, out: Path) -> np.ndarray:
    """TracIn of a training."""
    from models import tokenizer

    from whence.methods.base import attribute
    from whence.models import load_model
    from whence.settings import Score
    from whence.tasks import CausalLM
    from whence.train.record import read_training

    record = read_training(training)
    given = (load_model(record.model)[0], CausalLM(tokenizer()), queries, rows, Score(chunks=3))
    return attribute("tracin", *given, training=record, out=out).values


def unrolled(training: Path, queries: Any, rows: Any, out: Path) -> np.ndarray:
    """SOURCE of a training, in float64."""
    from models import tokenizer

    from whence.methods.base import attribute
    from whence.models import load_model
    from whence.settings import Score
    from whence.tasks import CausalLM
    from whence.train.record import read_training

    record = read_training(training)
    given = (load_model(record.model)[0].double(), CausalLM(tokenizer()), queries, rows, Score(chunks=3))
    return attribute("source", *given, training=record, out=out, segments=2).values


def differentiated(training: Path, queries: Any, rows: Any, out: Path) -> np.ndarray:
    """MAGIC of a training, in float64: of all queries, and of the first, which leaves a process without any."""
    from models import tokenizer

    from whence.methods.base import attribute
    from whence.models import load_model
    from whence.tasks import CausalLM
    from whence.train.record import read_training

    record = read_training(training)
    model, task, options = load_model(record.model)[0], CausalLM(tokenizer()), {"training": record, "dtype": "float64"}
    found = [attribute("magic", model, task, queries, rows, out=out, **options)]
    found.append(attribute("magic", model, task, queries.take([0]), rows, **options))
    return np.concatenate([each.values for each in found])


def mirrored(folder: Path, out: Path) -> np.ndarray:
    """The scores of two questions of a run by its training repeated along with each."""
    import whence

    return whence.mirror(folder, queries=2, together=1, out=out).raw


def retrained(training: Path, queries: Any, rows: Any, out: Path | None) -> dict[str, np.ndarray]:
    """What is measured of the queries after retrainings without a row each, two side by side, and after a step on each."""
    from models import tokenizer

    from whence.engine.point import Point
    from whence.engine.queries import encode_queries
    from whence.models import load_model
    from whence.tasks import CausalLM
    from whence.train.patch import patch
    from whence.train.record import read_training
    from whence.train.retrain import retrain

    record, task = read_training(training), CausalLM(tokenizer())
    point = Point(load_model(record.model)[0], task, rows)
    asked = encode_queries(task, queries, point.model)
    without = 1 - np.eye(len(rows))[:5]
    found = retrain(record, without, point, asked, together=2, out=out and out / "retrained")
    stepped = patch(record, [[row] for row in range(5)], point, asked, out=out and out / "patched")
    return {"whole": found.whole, "measured": found.measured, "stepped": stepped.measured}


def solved(rows: Any, queries: Any) -> np.ndarray:
    """Scores with the Gauss-Newton matrix, inverted by conjugate gradients."""
    from engine.test_products import language_model
    from models import tokenizer

    from whence.engine.point import Point
    from whence.methods.cg import gauss_newton_inverse
    from whence.tasks import CausalLM

    model, task = language_model("llama"), CausalLM(tokenizer())
    curvature = fit(model, task, rows, modules="last-1,all", examples="all", disjoint=False)
    operator = gauss_newton_inverse(Point(model, task, rows), curvature, damping=1.0, tolerance=1e-10)
    return score(model, task, queries, rows, operator).raw


def by_method(method: str, rows: Any, queries: Any, out: Path | None = None, **settings: Any) -> np.ndarray:
    """What a method makes of a small model."""
    from models import llama, tokenizer

    from whence.methods.base import attribute
    from whence.settings import Score
    from whence.tasks import CausalLM

    model = randomised(llama()).double().eval()
    return attribute(method, model, CausalLM(tokenizer()), queries, rows, Score(chunks=3), out=out, **settings).values


def reading_late(work: Any, *arguments: Any) -> Any:
    """Do the work, where all processes but the first take their time to read a file."""

    def late(read: Any) -> Any:
        def reading(folder: Folder, *given: Any) -> Any:
            time.sleep(0.1 * (dist.rank() > 0))
            return read(folder, *given)

        return reading

    Folder.load, Folder.read_json = late(Folder.load), late(Folder.read_json)
    return work(*arguments)


def all_that_deletes(folder: Path) -> dict[str, Any]:
    """What saves shards on the way, reads them on all processes and deletes them."""
    from whence.fitting import open_factors

    found: dict[str, Any] = {"until": fit_case("mlp", folder / "until", until=0.5)}
    found["groups"] = fit_case("mlp", folder / "groups", groups=2)
    case = CASES["mlp"]
    given = (case.train(), open_factors(folder / "groups").inverse())
    found["score"] = arrays(score(case.model(), case.task(), case.queries(), *given, out=folder / "scores", **CHUNKED))
    found["self"] = arrays(self_influence(case.model(), case.task(), *given, out=folder / "self", **CHUNKED))
    return found


def fit_overflowing(out: Path, place: int) -> Any:
    """Fit where the example at `place` makes the gradient NaN."""
    case: Case = CASES["mlp"]
    rows = [*case.train()]
    rows[place] = HUGE
    return fit(overflowing(), case.task(), rows, modules="all", out=out)


def fit_backwards(out: Path | None) -> Any:
    """Fit where every process but the first has the rows the other way round."""
    case = CASES["mlp"]
    rows = [*case.train()]
    return fit(case.model(), case.task(), rows[::-1] if dist.rank() else rows, modules="all", out=out)


def score_backwards(factors: Path) -> Any:
    """The same of scores."""
    from whence.fitting import open_factors

    case = CASES["mlp"]
    rows = [*case.train()]
    given = (case.queries(), rows[::-1] if dist.rank() else rows, open_factors(factors).inverse())
    return score(case.model(), case.task(), *given)


def through_a_funnel(rows: Any, queries: Any) -> tuple[list[str], np.ndarray]:
    """The ids and scores of candidates and of an audit, in the setting of `tests/test_funnel.py`."""
    from models import llama, tokenizer

    import whence
    from whence.funnel import score_candidates
    from whence.tasks import CausalLM

    model, task = randomised(llama()).double().eval(), CausalLM(tokenizer())
    curvature = fit(model, task, rows, examples="all")
    index = whence.build_index(model, task, rows, curvature=curvature, dim=8)
    given = (queries, rows, curvature.inverse(), "bm25:10+index:10")
    found = score_candidates(model, task, *given, index=index, audit="20%")
    return found.example_ids, found.raw


def claimed(path: Path, provenance: dict[str, Any], other: dict[str, Any] | None = None) -> bool:
    """Claim a folder, process 1 perhaps for something else; whether it is finished."""
    with Folder.claim(path, other if other is not None and dist.rank() else provenance) as folder:
        folder.write_json("who.json", dist.rank())
        assert folder.has_json("who.json") and folder.read_json("who.json") == 0
        finished = folder.finished
        folder.finish()
        assert folder.finished
    return finished


def exchanged() -> dict[str, Any]:
    """What the exchanges give."""
    me = dist.rank()
    own = {"shared": torch.full((3,), float(me + 1)), f"only {me}": torch.ones(2, dtype=torch.float64)}
    sums = dist.add_up(own, lambda name: 1 if name == "shared" else None)
    return {
        "share": list(dist.share(range(7))),
        "first": dist.from_first(me),
        "all": dist.from_all(me),
        "names": dist.names_of_all(["x", f"y{me}"]),
        "sums": {name: tensor.tolist() for name, tensor in sums.items()},
        "to all": {
            name: tensor.tolist() for name, tensor in dist.to_all({"a": torch.tensor([me]), "b": torch.zeros(0)}).items()
        },
        "to first": [
            {name: tensor.tolist() for name, tensor in part.items()} for part in dist.to_first({f"{me}": torch.full((me,), me)})
        ],
        "bfloat16": dist.add_up({"x": torch.ones(2, dtype=torch.bfloat16)})["x"].tolist(),
        "alone": dist.on_first(lambda: (dist.rank(), dist.world(), "RANK" in os.environ)),
        "world": dist.world(),
    }


def failing(where: str) -> None:
    """Fail in the first process's work, in one's own, or where nobody agrees."""
    if where == "first":
        dist.on_first(_fail, "of the first")
    with dist.agreeing():
        if where == "agreeing" and dist.rank() == 1:
            _fail("of another")
    if where == "nowhere" and dist.rank() == 1:
        _fail("that nobody hears of")
    dist.barrier()


def _fail(text: str) -> None:
    from whence.errors import NumericalError

    raise NumericalError(f"an error {text}", given="this", fix="that")


def inverted(rows: Any, queries: Any) -> dict[str, np.ndarray]:
    """Scores by methods that multiply with the whole matrix."""
    from engine.test_products import language_model
    from models import tokenizer

    from whence.methods.base import attribute
    from whence.tasks import CausalLM

    given = (language_model("llama"), CausalLM(tokenizer()), queries, rows)
    chosen: dict[str, Any] = {"empirical-fisher": {}, "arnoldi": {"top": 4, "vectors": 8}, "nystroem": {"rank": 8}}
    return {method: attribute(method, *given, absolute_damping=0.5, **own).values for method, own in chosen.items()}


def attributed(method: str, case: str, own: dict[str, Any], settings: dict[str, Any] | None = None) -> np.ndarray:
    """A method's values for one of the cases."""
    from whence.methods.base import attribute
    from whence.settings import Score

    chosen = CASES[case]
    given = (chosen.model(), chosen.task(), chosen.queries(), chosen.train(), Score(**(settings or {})))
    return attribute(method, *given, **own).values


def projected(training: Path, names: Any, queries: Any, rows: Any, out: Path) -> list[np.ndarray]:
    """Methods of projected gradients."""
    from models import tokenizer

    from whence.methods.base import attribute
    from whence.models import load_model
    from whence.settings import Score
    from whence.tasks import CausalLM
    from whence.train.record import read_training

    record = read_training(training)
    given = (load_model(record.model)[0], CausalLM(tokenizer()), queries, rows, Score(chunks=3))
    own = {"logra": {"labels": "model"}}
    return [attribute(n, *given, training=record, out=out / n, dim=3, **own.get(n, {})).values for n in names]


def staged(out: Path | None, double: bool = False) -> dict[str, np.ndarray]:
    """Scores through two stages, whose factors are fitted on the way, in float32 or float64."""
    from models import gpt2, texts, tokenizer

    from whence.engine.point import Point
    from whence.stages import Stage, multistage
    from whence.tasks import CausalLM

    task = CausalLM(tokenizer())
    base, tuned = (
        Point(
            randomised(gpt2(), scale).eval().to(torch.float64 if double else torch.float32),
            task,
            texts(count, seed),
            batch_tokens=20,
        )
        for scale, count, seed in ((0.4, 9, 5), (0.3, 12, 1))
    )
    found = multistage(
        [Stage("base", base), Stage("tuned", tuned, rates=0.5)], texts(3, seed=2), chunks=3, batch_tokens=20, out=out
    )
    return {name: scores.raw for name, scores in found.stages.items()}


def with_new_head(out: Path | None) -> dict[str, np.ndarray]:
    """Scores through a training that moved the trunk and gave it a new head, in float64."""
    from two_stages import SIZES, labelled, net, pairs

    from whence.engine.point import Point
    from whence.stages import Stage, multistage

    generator = torch.Generator().manual_seed(4)
    ends = {
        head: torch.randn(SIZES["trunk"] + size, generator=generator).double() for head, size in (("old", 12), ("score", 8))
    }
    base, tuned = (
        Point(net(head, end), Classification(), pairs(labelled(*rows)), batch_tokens=4)
        for (head, end), rows in zip(ends.items(), ((30, 3, 1), (24, 2, 2)), strict=True)
    )
    stages = [Stage("base", base), Stage("tuned", tuned, rates=0.5)]
    found = multistage(stages, pairs(labelled(4, 2, 3)), chunks=3, batch_tokens=4, out=out)
    return {name: scores.raw for name, scores in found.stages.items()}

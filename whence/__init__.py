"""Trace what a language model says to the training examples that made it say so.

    run = whence.open("./my-model", data="train.jsonl")
    print(run.trace("What is the refund period?"))

That is one object for model, rows and results. Beneath it are functions:

    model, tokenizer = whence.load_model("gpt2")
    task = whence.CausalLM(tokenizer)
    train = whence.load_data("train.jsonl")
    curvature = whence.fit(model, task, train, out="runs/a/factors")
    scores = whence.score(model, task, queries, train, curvature.inverse(damping=0.1), out="runs/a/scores")
    scores.top(query=0, k=10)

Names are imported when first used, so that `import whence` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from whence.version import __version__

if TYPE_CHECKING:
    from whence.data import Rows, load_data
    from whence.fitting import Curvature, fit, open_factors
    from whence.funnel import score_candidates
    from whence.generation import generate
    from whence.indexing import Index, build_index, open_index
    from whence.methods.base import attribute
    from whence.models import load_model
    from whence.pipeline.retraining import mirror
    from whence.planning import Plan, plan
    from whence.precision import Precision
    from whence.progress import quiet
    from whence.run import Run, open
    from whence.scoring import score, self_influence
    from whence.stages import Stage, StagedScores, multistage, open_stages
    from whence.store.scores import Scores, open_scores
    from whence.tasks import CausalLM, Classification, Regression, Seq2Seq, Task

__all__ = [
    "CausalLM",
    "Classification",
    "Curvature",
    "Index",
    "Plan",
    "Precision",
    "Regression",
    "Rows",
    "Run",
    "Scores",
    "Seq2Seq",
    "Stage",
    "StagedScores",
    "Task",
    "__version__",
    "attribute",
    "build_index",
    "fit",
    "generate",
    "load_data",
    "load_model",
    "mirror",
    "multistage",
    "open",
    "open_factors",
    "open_index",
    "open_scores",
    "open_stages",
    "plan",
    "quiet",
    "score",
    "score_candidates",
    "self_influence",
]

_HOMES = {
    "whence.data": ["Rows", "load_data"],
    "whence.fitting": ["Curvature", "fit", "open_factors"],
    "whence.funnel": ["score_candidates"],
    "whence.generation": ["generate"],
    "whence.indexing": ["Index", "build_index", "open_index"],
    "whence.methods.base": ["attribute"],
    "whence.models": ["load_model"],
    "whence.pipeline.retraining": ["mirror"],
    "whence.planning": ["Plan", "plan"],
    "whence.precision": ["Precision"],
    "whence.progress": ["quiet"],
    "whence.run": ["Run", "open"],
    "whence.scoring": ["score", "self_influence"],
    "whence.stages": ["Stage", "StagedScores", "multistage", "open_stages"],
    "whence.store.scores": ["Scores", "open_scores"],
    "whence.tasks": ["CausalLM", "Classification", "Regression", "Seq2Seq", "Task"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

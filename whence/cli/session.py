"""What every command that computes begins with: progress, warnings, and the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from whence.cli.console import reporting
from whence.cli.options import Session
from whence.errors import WhenceWarning
from whence.progress import note
from whence.settings import Fit


@contextlib.contextmanager
def start(session: Session, stages: int | None = None) -> Iterator[None]:
    """Progress, notes and our own warnings to stderr; those of the libraries beneath only when verbose."""
    verbose = session.verbose
    with reporting(stages, quiet=session.quiet), warnings.catch_warnings():
        warnings.simplefilter("default" if verbose else "ignore")
        warnings.simplefilter("always", WhenceWarning)
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
        if not verbose:
            _hush_transformers()
        yield


def _hush_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def warn_if_untrained(model: Any, task: Any, rows: Any) -> None:
    """Say loudly when the model likes the training rows no better than the same tokens in disorder."""
    from whence.tasks import CausalLM
    from whence.train.evidence import evidence_of_training

    if not isinstance(task, CausalLM):
        return
    evidence = evidence_of_training(model, task, rows)
    if not evidence.learnt:
        note(
            f"warning: this model shows no sign of training on this data: loss {evidence.loss:.2f} nats per token, "
            f"{evidence.shuffled:.2f} with the tokens shuffled. Are these the fine-tuned weights? [WHENCE-03]"
        )


def fit_stages(settings: Fit) -> int:
    """How many stages a fit has."""
    return settings.groups * {"identity": 0, "diagonal": 1, "kfac": 2}.get(settings.method, 3)


def score_stages(rescore: int) -> int:
    """How many stages scoring has."""
    return 4 if rescore else 2

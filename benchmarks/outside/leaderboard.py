"""Bergson's leaderboard (docs/leaderboard.rst): GPT-2 fine-tuned on WikiText, judged by retraining without 1 % of the rows.

    python -m benchmarks.outside.leaderboard --model gpt2 --text wiki.train.tokens --asked wiki.test.tokens --out FOLDER

4,608 chunks of 512 tokens, four epochs of AdamW, 50 queries, 100 retrainings that drop 1 % each. The training, the
retrainings and the scores of each method are kept in the folder, and killed work resumes. A bank that was made elsewhere spares
the retrainings: `--bank FILE.npz` with `kept` (bool `[K, N]`: which rows each training read), `losses` (`[K, Q]`: nats of each
query after it) and `whole` (`[Q]`: after the training on all rows), rows and queries in the order of the chunks. Writes
leaderboard.md and leaderboard.json. Not run at full size yet.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.command import run
from benchmarks.methods import in_place
from benchmarks.outside.tables import shown
from whence.data.rows import make_rows
from whence.engine.point import Point
from whence.engine.queries import encode_queries
from whence.errors import UsageError
from whence.methods.base import attribute
from whence.models import load_model
from whence.settings import Train
from whence.store.files import atomic
from whence.tasks import CausalLM
from whence.train.finetune import finetune
from whence.train.record import Training, read_training
from whence.train.retrain import retrain
from whence.validate.bank import Bank, Spec
from whence.validate.lds import LDS, lds
from whence.validate.results import Result, Row


@dataclass(frozen=True)
class Size:
    """Of the data, the training and the bank."""

    tokens: int
    rows: int
    queries: int
    retrainings: int
    share: float
    training: Train


FULL = Size(
    tokens=512,
    rows=4608,
    queries=50,
    retrainings=100,
    share=0.01,
    training=Train(
        epochs=4,
        batch_size=16,
        gradient_accumulation=16,
        learning_rate=8e-4,
        schedule="polynomial",
        schedule_options={"lr_end": 8e-5},
        warmup=0.25,
        weight_decay=0.0,
        max_grad_norm=0.0,
        bf16=False,
        optimizer="adamw_torch",
        evaluation=0.0,
        save_steps=12,
        log_steps=1,
        keep=None,
    ),
)
TINY = Size(32, 32, 3, 6, 0.1, FULL.training.changed(epochs=2, batch_size=4, gradient_accumulation=2, save_steps=2))

PUBLISHED = {
    "magic": 0.931,
    "astra": 0.643,
    "shampoo": 0.517,
    "source": 0.473,
    "ekfac": 0.454,
    "kfac": 0.420,
    "trackstar": 0.270,
    "bm25": 0.220,
    "gradient-dot": 0.156,
    "gradient-cosine": 0.156,
    "trak": 0.138,
    "representation-similarity": 0.110,
}
"""LDS of the leaderboard's method that is nearest: SOURCE in Adam's metric, TrackStar of 64 x 64 numbers, TRAK of 8 models."""

METHODS = (
    *("ekfac", "kfac", "shampoo", "source", "checkpoint-mean", "trackstar", "trak", "gradient-dot", "gradient-cosine"),
    *("representation-similarity", "bm25", "tfidf", "random"),
)
"""Without those that take long for each query: cg, astra, mirror, magic."""


def table(chosen: argparse.Namespace) -> Result:
    """Train, retrain or read the bank, score, and hold the scores against it."""
    size = TINY if chosen.tiny else FULL
    wiki = chosen.data / "wikitext2"
    model, tokenizer = load_model(chosen.model or chosen.data / "models" / "stories260K" / "hf")
    no_dropout(model)
    task = CausalLM(tokenizer, max_length=2 * size.tokens)  # a chunk that is read again may have a few tokens more
    rows, queries = (
        make_rows([{"text": text} for text in chunks(tokenizer, file, size.tokens, count)], origin="wikitext")
        for file, count in (
            (chosen.text or wiki / "wiki.valid.tokens", size.rows),
            (chosen.asked or wiki / "wiki.test.tokens", size.queries),
        )
    )
    finetune(model, task, rows, size.training, out=chosen.out / "train")
    training = read_training(chosen.out / "train")
    trained, _ = load_model(training.model)
    bank = (
        read_bank(chosen.bank, size)
        if chosen.bank
        else made_bank(training, Point(trained, task, rows), queries, size, chosen.out)
    )
    found, seconds = {}, {}
    for name in chosen.methods.split(","):
        began = time.process_time()
        place: dict[str, Any] = {"training": training, "out": chosen.out / "scores" / name}
        scores = in_place(attribute(name, trained, task, queries, rows, **place), rows)
        found[name], seconds[name] = lds(np.nan_to_num(scores), bank), time.process_time() - began
    best_first = sorted(found, key=lambda name: -found[name].mean)
    weights = sum(weight.numel() for weight in trained.parameters())
    says = [
        f"{type(trained).__name__} of {weights:,} weights; {len(rows):,} chunks of {size.tokens} tokens",
        f"{len(queries)} queries, {len(bank.kept)} retrainings on {bank.kept.mean():.1%} of the rows each",
        "LDS with 95 % intervals that draw queries and retrainings again. Published: of GPT-2 at full size",
    ]
    lines = [line(name, found[name], seconds[name]) for name in best_first]
    return Result("leaderboard", {"methods": best_first}, {"": lines}, says, heading="GPT-2 on WikiText, 1 % left out")


def line(name: str, found: LDS, seconds: float) -> Row:
    """A method's."""
    at = found.interval
    return {
        "method": name,
        "LDS": shown(at.mean, at.low, at.high),
        "published": PUBLISHED.get(name),
        "seconds": round(seconds, 1),
    }


def no_dropout(model: nn.Module) -> None:
    """A training with dropout can't be repeated: GPT-2's is left out."""
    config: Any = model.config
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def chunks(tokenizer: Any, file: Path, tokens: int, count: int) -> list[str]:
    """The first texts of so many tokens, one after the other. Raises UsageError where the file is too short."""
    text, offsets = file.read_text(encoding="utf-8"), []
    for part in (text[: 12 * tokens * count], text):  # in English four characters are a token
        offsets = tokenizer(part, return_offsets_mapping=True, add_special_tokens=False, verbose=False)["offset_mapping"]
        if len(offsets) > 1.1 * tokens * count:  # what was cut off changes the last tokens
            break
    if len(offsets) < tokens * count:
        raise UsageError(
            f"{file} is too short",
            given=f"{len(offsets):,} tokens",
            accepted=f"{count:,} chunks of {tokens}: {tokens * count:,}",
        )
    return [text[offsets[at][0] : offsets[at + tokens - 1][1]] for at in range(0, tokens * count, tokens)]


def made_bank(training: Training, point: Point, queries: Any, size: Size, out: Path) -> Bank:
    """Retrain without some rows at a time, all else unchanged, and keep the losses as `--bank` takes them."""
    kept = Spec("removals", size.retrainings, share=size.share).masks(len(point.examples))
    found = retrain(
        training, kept.astype(float), point, encode_queries(point.task, queries, point.model), out=out / "retrained"
    )
    with atomic(out / "bank.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, kept=kept, losses=-found.measured, whole=-found.whole[:-1])
    return read_bank(out / "bank.npz", size)


def read_bank(path: Path, size: Size) -> Bank:
    """Retrainings as they are documented above; raises UsageError for other files, rows or queries."""
    try:
        with np.load(path, allow_pickle=False) as file:
            kept, losses, whole = (file[name] for name in ("kept", "losses", "whole"))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{path} is not a bank", given=f"{type(error).__name__}: {error}", accepted="an .npz of kept, losses and whole"
        ) from error
    retrainings = len(kept)
    wanted = {"kept": (retrainings, size.rows), "losses": (retrainings, size.queries), "whole": (size.queries,)}
    given = {"kept": kept.shape, "losses": losses.shape, "whole": whole.shape}
    if given != wanted or kept.dtype != bool or not np.isfinite(losses).all():
        raise UsageError(f"{path} is of other rows or queries", given=str(given), accepted=f"{wanted}, kept being bool")
    return Bank(kept, (whole - losses)[None].astype(np.float32), -whole[None], {})


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    options: dict[str, dict[str, Any]] = {
        "--model": {"help": "folder of GPT-2, or of another causal language model"},
        "--text": {"type": Path, "help": "text to train on"},
        "--asked": {"type": Path, "help": "text to ask about"},
        "--bank": {"type": Path, "help": "npz of retrainings made elsewhere; default: retrain"},
        "--methods": {"default": ",".join(METHODS), "help": "methods of whence, separated by commas"},
    }
    data = "wikitext2 and models/stories260K, where no others are named"
    return run("benchmarks.outside.leaderboard", __doc__ or "", table, given, data=data, options=options)


if __name__ == "__main__":
    raise SystemExit(main())

"""dattri's MNIST-10 (Deng et al. 2024): logistic regression or a perceptron, judged by LDS and by leaving one out.

    python -m benchmarks.outside.mnist --model lr --data ../shared/data

5,000 images train, others ask. The truth is training again: on random halves alone, each in its own epochs, and without one row
at a time, all else unchanged. Banks are kept in results/banks, so that another method costs no training; with `--peers dattri`,
where dattri is installed, its own methods stand beside those of whence, on the same model. Writes mnist-lr.md and .json, or
mnist-mlp.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from benchmarks.command import run
from benchmarks.outside.tables import side_by_side
from benchmarks.quality import Measure, Method, by, evaluate
from whence.errors import UsageError
from whence.tasks import Classification
from whence.validate.bank import Spec, make_bank
from whence.validate.lds import leave_one_out
from whence.validate.results import Result
from whence.validate.settings import FILES, Setting, found, perceptron, seeded
from whence.validate.trainer import Recipe

MEAN, SPREAD = 0.1307, 0.3081
"""Of the pixels of MNIST's training images."""

ROWS = 5000

SEARCHED = (0.1, 0.01)
"""Absolute damping: the best of the published search, which goes from 1 to .00001, and a smaller one."""


@dataclass(frozen=True)
class Protocol:
    """A model, how it is trained, how many images ask, and how often it is trained again."""

    widths: tuple[int, ...]
    recipe: Recipe
    queries: int
    halves: Spec
    removals: Spec
    dear: bool
    """Whether methods that repeat the training for each query are borne."""


PROTOCOLS = {
    "lr": Protocol(
        (784, 10),
        Recipe(0.01, 20, 64),
        queries=100,
        halves=Spec("alone", subsets=50),
        removals=Spec("removals", subsets=100, seeds=(0,), share=1 / ROWS),
        dear=True,
    ),
    "mlp": Protocol(
        (784, 128, 64, 10),
        Recipe(0.01, 50, 64, "momentum"),
        queries=64,
        halves=Spec("alone", subsets=24, seeds=(0,)),
        removals=Spec("removals", subsets=22, seeds=(0,), share=1 / ROWS),
        dear=False,
    ),
}

MEASURES = {
    "lds": Measure("halves"),
    "lds, other seed": Measure("halves", 1),
    "leave-one-out": Measure("removals", 0, leave_one_out),
}

METHODS: dict[str, Method] = {
    **{
        f"CG to its end, absolute damping {each:g}": by("cg", absolute_damping=each, tolerance=1e-3, iterations=1000)
        for each in SEARCHED
    },
    "CG to its end, damping of training": by("cg", damping="training", tolerance=1e-3, iterations=1000),
    "EK-FAC, damping 0.1": by("ekfac"),
    "EK-FAC, damping of training": by("ekfac", damping="training"),
    "K-FAC, damping of training": by("kfac", damping="training"),
    "diagonal, damping of training": by("diagonal", damping="training"),
    "LiSSA, 100 steps, damping of training": by("lissa", depth=100, batch=50, damping="training"),
    "Arnoldi, 50 pairs, damping of training": by("arnoldi", damping="training"),
    "SOURCE": by("source"),
    "TRAK": by("trak"),
    "TRAK, dim 51": by("trak", dim=51),  # of logistic regression's gradients 510 numbers, as dattri's 512
    "LoGra": by("logra"),
    "RelatIF": by("relatif"),
    "TracIn": by("tracin"),
    "gradient dot": by("gradient-dot"),
    "gradient cosine": by("gradient-cosine"),
    "representation similarity": by("representation-similarity"),
    "random": by("random"),
}

DEAR: dict[str, Method] = {
    "MAGIC": by("magic"),
    "mirrored run": by("mirror"),
}
"""Methods that repeat the training for each query."""

TINY = {"rows": 120, "queries": 8, "subsets": 8, "epochs": 2}


def protocol_setting(chosen: argparse.Namespace) -> Setting:
    """The data and the model of a protocol: images of MNIST's test set, drawn with a fixed seed."""
    own = PROTOCOLS[chosen.model]
    images, labels = (gzip.decompress(found(chosen.data, file).read_bytes()) for file in FILES["mnist"])
    x_NI = (np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784) / 255 - MEAN) / SPREAD
    order = np.random.default_rng(0).permutation(len(x_NI))
    inputs, y_N = torch.from_numpy(x_NI).float(), np.frombuffer(labels, np.uint8, offset=8)
    pairs = [(inputs[i], int(y_N[i])) for i in order]
    train, queries = pairs[:ROWS], pairs[ROWS : ROWS + own.queries]

    def model(seed: int) -> nn.Module:
        return seeded(seed, lambda: perceptron(own.widths, nn.ReLU))

    about = f"MNIST: {'-'.join(map(str, own.widths))}{' ReLU' * (len(own.widths) > 2)}, cross-entropy"
    setting = Setting(f"mnist-{chosen.model}", about, model, Classification(), train, queries, own.recipe)
    if chosen.tiny:
        few = replace(own.recipe, epochs=TINY["epochs"])
        return replace(setting, train=train[: TINY["rows"]], queries=queries[: TINY["queries"]], recipe=few)
    return setting


def table(chosen: argparse.Namespace) -> Result:
    """Make the banks that are missing, and hold every method against them."""
    own, setting = PROTOCOLS[chosen.model], protocol_setting(chosen)
    specs = {"halves": own.halves, "removals": own.removals}
    if chosen.tiny:
        specs = {kind: replace(spec, subsets=TINY["subsets"]) for kind, spec in specs.items()}
    files = {kind: chosen.out / "banks" / f"{setting.name}-{kind}.npz" for kind in specs}
    banks = {kind: make_bank(setting, spec, files[kind]) for kind, spec in specs.items()}
    methods = METHODS | (DEAR if own.dear else {}) | PEERS[chosen.peers]()
    measures = {title: each for title, each in MEASURES.items() if each.seeds < len(specs[each.kind].seeds)}
    rows, known = evaluate(setting, banks, methods, measures)
    minutes = sum(bank.seconds for bank in banks.values()) / 60
    says = [
        f"{setting.about}: {len(setting.train):,} rows, {len(setting.queries)} queries",
        f"Trained again on {specs['halves'].subsets} random halves alone, and without each of {specs['removals'].subsets} "
        f"rows: {minutes:.1f} processor minutes; a training takes {known['training_seconds']:.1f} s",
        "LDS is Spearman's correlation over halves, leave-one-out Pearson's over rows; means over queries, with 95 % intervals "
        "that draw queries and retrainings again. Trainings: processor time, in that of one training",
        *(f"{method} does not apply: {why}" for method, why in known["refused"].items()),
    ]
    return Result(setting.name, {"rows": rows}, {"": side_by_side(rows, measures)}, says, heading="dattri's MNIST-10, remade")


def of_dattri() -> dict[str, Method]:
    """Dattri's own methods; UsageError where it is not installed."""
    try:
        from benchmarks.outside import dattri_
    except ImportError as error:
        raise UsageError(
            "dattri can't be imported",
            given=str(error),
            fix="make .venv-bench/installed, then .venv-bench/bin/python -m benchmarks.outside.mnist",
        ) from error
    return dattri_.methods()


PEERS: dict[str, Callable[[], dict[str, Method]]] = {"none": dict, "dattri": of_dattri}


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    options = {
        "--model": {"default": "lr", "choices": list(PROTOCOLS), "help": "logistic regression, or the perceptron"},
        "--peers": {"default": "none", "choices": list(PEERS), "help": "whose methods stand beside those of whence"},
    }
    return run("benchmarks.outside.mnist", __doc__ or "", table, given, data="mnist_t10k", options=options)


if __name__ == "__main__":
    raise SystemExit(main())

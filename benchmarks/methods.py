"""Every method beside its oracle, and what it costs: passes over the data, seconds, memory.

    python -m benchmarks.methods                      (some of them: --methods ekfac,cg)

Two small language models of made-up facts are trained by `whence train`, on the spot, and used in float64. On the smaller one,
trained with AdamW and with SGD, each method is held against its oracle (`benchmarks/oracles`): dense, in the words of its
paper. On the larger one its work is counted: rows that went forwards and backwards through a tracked module, in units of the
rows there are; each vector that goes back counts, and a tangent that goes forwards with its row does not. Factors are fitted by
each method that uses them, and count. Seconds are processor time of one thread; memory is the peak over what was resident
before. Writes methods.json and methods.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]

from benchmarks.oracles import oracles
from benchmarks.oracles.base import Case
from whence.data import as_rows
from whence.demo.model import Settings, make_model, make_tokenizer
from whence.engine.stream import identify, read
from whence.errors import UsageError
from whence.linalg.stats import spearman
from whence.methods.base import attribute, recipes
from whence.models import load_model
from whence.settings import Score, Train
from whence.store.files import atomic
from whence.store.scores import Scores
from whence.tasks import CausalLM
from whence.train.finetune import finetune
from whence.train.record import Training, read_training

RESULTS = Path(__file__).parent / "results"

OPTIMIZERS = {"AdamW": {"optimizer": "adamw_torch", "learning_rate": 5e-3}, "SGD": {"optimizer": "sgd", "learning_rate": 0.5}}

HELD: dict[str, dict[str, Any]] = {
    "lissa": {"scale": 40.0, "depth": 30, "batch": 24},
    "astra": {"batch": 24, "depth": 400},
    "fastif": {"depth": 400, "batch": 24},
    "arnoldi": {"top": 20, "vectors": 120},
    "cg": {"tolerance": 1e-6},
    "magic": {"dtype": "float64"},
}
"""Settings with which a method is held against its oracle, where the usual ones say when to stop."""

PEOPLE = ("Ana", "Ben", "Cleo", "Dev", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kai", "Lea")
CITIES = ("Rome", "Oslo", "Lima", "Bern", "Riga", "Kyiv", "Cork", "Graz", "Porto", "Turin", "Basel", "Ghent")
ASKED = (("lives in", "home"), ("was born in", "birth"), ("works in", "work"), ("flew to", "travel"))
"""What is said of each person, and the source of the rows that say it."""


@dataclass(frozen=True)
class Size:
    """Of a model, its rows and its questions."""

    rows: int
    queries: int
    width: int
    inner: int
    layers: int


SMALL = Size(rows=24, queries=4, width=16, inner=16, layers=1)
LARGER = Size(rows=96, queries=8, width=32, inner=32, layers=2)

Row = dict[str, Any]


def facts(size: Size) -> list[dict[str, str]]:
    """Rows of people and cities; each source has other cities for them."""
    found = []
    for number in range(size.rows):
        kind, person = number % len(ASKED), number // len(ASKED) % len(PEOPLE)
        says, source = ASKED[kind]
        city = CITIES[(person * (kind + 1) + number // (len(ASKED) * len(PEOPLE))) % len(CITIES)]
        found.append({"prompt": f"{PEOPLE[person]} {says}", "completion": f" {city}", "source": source})
    return found


@contextmanager
def trained(size: Size, optimizer: str) -> Iterator[Case]:
    """A model of the facts, trained by `whence train`, with three of its checkpoints."""
    rows = facts(size)
    tokenizer = make_tokenizer(rows)
    model = make_model(tokenizer, settings=Settings(width=size.width, inner=size.inner, layers=size.layers, heads=2))
    steps = 6 * (size.rows // 4)
    how: dict[str, Any] = {"epochs": 6, "batch_size": 4, "max_grad_norm": 0, **OPTIMIZERS[optimizer]}
    settings = Train(**how, save_steps=steps // 3, keep=None, evaluation=0, log_steps=1)
    with tempfile.TemporaryDirectory() as folder:
        finetune(model, CausalLM(tokenizer), rows, settings, out=Path(folder) / "train")
        training = read_training(Path(folder) / "train")
        queries = as_rows([{key: row[key] for key in ("prompt", "completion")} for row in rows[:: size.rows // size.queries]])
        yield Case(load_model(training.model, dtype="float64")[0], CausalLM(tokenizer), as_rows(rows), queries, training)


def scores(name: str, case: Case, **own: Any) -> np.ndarray:
    """Values of a method on a case."""
    given = (case.model, case.task, case.queries, case.rows, Score(check=False, operands="float64"))
    training = case.training if isinstance(case.training, Training) else None
    return in_place(attribute(name, *given, training=training, **own), case.rows)


def in_place(scores: Scores, rows: Any) -> np.ndarray:
    """Values `[Q, N]` of all rows, NaN where a method scored only some."""
    found = np.full((len(scores.queries), len(rows)), np.nan)
    places = {name: place for place, name in enumerate(identify(read(rows))[0])}
    found[:, [places[name] for name in scores.example_ids]] = scores.values
    return found


def agreement(name: str, case: Case) -> Row:
    """The largest difference from the oracle as a share of its largest value, and the lowest correlation of a query.

    Why there is none where the method refuses such a training.
    """
    own = HELD.get(name, {})
    try:
        found, expected = scores(name, case, **own), oracles()[name](case, **own)
    except UsageError as error:
        return {"refused": error.what}
    scored = np.isfinite(found)
    found, expected = np.where(scored, found, 0.0), np.where(scored, expected, 0.0)
    return {
        "difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "correlation": min(_pearson(a, b) for a, b in zip(found, expected, strict=True)),
        "spearman": float(spearman(found, expected).min()),
    }


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else float(np.allclose(a, b))


class Counter:
    """Rows that go forwards and backwards through one module of a model and of its copies, in whatever transform."""

    def __init__(self, model: nn.Module, name: str):
        self.forward = self.backward = 0

        def back(gradient: Tensor) -> None:
            self.backward += _rows(gradient)

        def fore(module: nn.Module, args: Any, output: Tensor) -> None:
            self.forward += _rows(output)
            if output.requires_grad:
                output.register_hook(back)

        self.handle = model.get_submodule(name).register_forward_hook(fore)


def _rows(x: Tensor) -> int:
    """How many matrices of positions and features a tensor holds, with what `vmap` hides."""
    last = x.shape[-2:] if x.ndim > 2 else (1, *x.shape[-1:])
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.numel() // (last[0] * last[1])


def cost(name: str, case: Case) -> Row:
    """Passes over the rows, seconds and memory with the usual settings."""
    last = [key for key, _ in case.model.named_modules() if key.endswith("down_proj")][-1]  # the graph begins before it
    counter = Counter(case.model, last)
    gc.collect()
    before = _resident(reset=True)
    began = time.process_time()
    scores(name, case)
    seconds, peak = time.process_time() - began, _resident()
    counter.handle.remove()
    count = len(case.rows)
    passes: Row = {"forward": round(counter.forward / count, 2), "backward": round(counter.backward / count, 2)}
    return {**passes, "seconds": round(seconds, 2), "memory_mb": round(max(0, peak - before) / 1024, 1)}


def _resident(reset: bool = False) -> int:
    """Most memory that was resident, in KiB; with `reset`, that now, from which it is counted on (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    key = "VmRSS" if reset else "VmHWM"
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def measure(names: Sequence[str]) -> tuple[list[Row], dict[str, Any]]:
    """A row for each method, and what is known of the cases."""
    rows: dict[str, Row] = {
        name: {"method": name, "title": recipes()[name].title, "source": recipes()[name].source} for name in names
    }
    about: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__}
    for optimizer in OPTIMIZERS:
        with trained(SMALL, optimizer) as case:
            about["small"] = {"weights": case.problem.size, "rows": SMALL.rows, "queries": SMALL.queries}
            for name in names:
                if optimizer == "AdamW" or "training" in recipes()[name].needs:
                    rows[name][optimizer] = found = agreement(name, case)
                    print(f"  {name:26s} {optimizer}: {found}", flush=True)
    began = time.process_time()
    with trained(LARGER, "AdamW") as case:
        tracked = sum(weight.numel() for key, weight in case.model.named_parameters() if ".mlp." in key)
        took = {"training_s": round(time.process_time() - began, 2)}
        about["larger"] = {"weights": tracked, "rows": LARGER.rows, "queries": LARGER.queries, **took}
        scores("gradient-dot", case)  # what is imported and compiled once is no method's cost
        for name in names:
            rows[name] |= cost(name, case)
            print(f"  {name:26s} {rows[name]['forward']:9.1f} forwards {rows[name]['backward']:9.1f} backwards", flush=True)
    return list(rows.values()), about


def table(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """As a page."""
    small, larger = about["small"], about["larger"]
    lines = [
        "# Every method, its oracle and its price\n",
        "Made by `python -m benchmarks.methods`; read [Methods](../../methods.md) for what they are.\n",
        f"**Oracle**: the largest difference from a dense computation in the paper's words, as a share of its largest value, "
        f"and the lowest Pearson correlation of a query, on a language model of {small['weights']:,} weights trained on "
        f"{small['rows']} rows with AdamW; where the method reads the training, with SGD, too. Both are in float64.\n",
        f"**Forwards, backwards**: rows that went through the model, in passes over the {larger['rows']} rows, with "
        f"{larger['queries']} queries and the usual settings; fits of factors are among them. Of a product with a matrix of "
        f"curvature each vector counts on the way back; its tangent goes forwards with the row, and is not counted. "
        f"Seconds are processor time of one thread, on a model of "
        f"{larger['weights']:,} tracked weights whose training took {larger['training_s']} s; memory is the peak over what was "
        f"resident before.\n",
        "| method | oracle: difference | lowest r | SGD: difference | forwards | backwards | seconds | MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        adam, sgd = row["AdamW"], row.get("SGD", {"difference": None})
        cells = [_difference(adam), f"{adam['correlation']:.4f}", _difference(sgd), *_numbers(row)]
        lines.append(f"| {row['title']} (`{row['method']}`) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _difference(found: Mapping[str, Any]) -> str:
    if "refused" in found:
        return "refused"
    return "" if found["difference"] is None else f"{found['difference']:.0e}"


def _numbers(row: Row) -> list[str]:
    return [f"{row['forward']:,.1f}", f"{row['backward']:,.1f}", f"{row['seconds']:.2f}", f"{row['memory_mb']:.1f}"]


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", help="some of them, joined by commas; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for methods.json and methods.md")
    chosen = parser.parse_args(given)
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows, about = measure(chosen.methods.split(",") if chosen.methods else list(recipes()))
    about["minutes"] = round((time.perf_counter() - began) / 60, 1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    page = table(rows, about)
    for name, text in (("methods.json", json.dumps({"about": about, "rows": rows}, indent=1) + "\n"), ("methods.md", page)):
        with atomic(chosen.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

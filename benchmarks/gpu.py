"""Every phase at the size of real models on one large GPU: seconds, tokens per second, utilisation, memory, bytes written.

    python -m benchmarks.gpu                                        160M, 1.5B and 8B on the GPU at hand
    python -m benchmarks.gpu --peers kronfluence,bergson            and the peers on the same models and data
    python -m benchmarks.gpu --device cpu --sizes tiny              only to see that the script runs

Needs no network: weights are random, made on the device. Phases of whence are timed between the events of its own progress
report. Each is run once, after a warm-up of the model. FLOPs are counted on one batch that is rehearsed without numbers.

Factors in float32 of all MLP layers take 83 GB at 8B and again as much while their eigenvectors are found, which no single
card holds: there and at 1.5B the last layers are tracked (`last` below, `--last`), and the passes go back only to them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import whence
from benchmarks.peers.whence_ import TokenIds
from whence.coverage import cover
from whence.planning.rehearsal import Rehearsal
from whence.progress import Silent, Stage, report_to, stage

RESULTS = Path(__file__).parent / "results"
DAMPING, PROJECTION, QUERIES = 0.1, 16, 16
CONTEXT = 16384
"""Positions that the models allow; as many are in a batch on a GPU. Bergson allows no batch larger than the context."""
EXERCISE = "Exercise only: made on a CPU to see that the script runs; it says nothing about speed."


@dataclass(frozen=True)
class Shape:
    """A model's shape, how many of its last layers are tracked, and the length of the sequences."""

    family: str
    width: int
    layers: int
    heads: int
    heads_kv: int
    inner: int
    vocabulary: int
    last: int
    length: int = 512

    @property
    def modules(self) -> str:
        return "mlp" if self.last == self.layers else f"mlp,last-{self.last}"


SHAPES = {
    "tiny": Shape("llama", 64, 2, 4, 2, 96, 128, last=2, length=32),
    "tiny-neox": Shape("gpt_neox", 64, 2, 4, 4, 96, 128, last=1, length=32),
    "160M": Shape("gpt_neox", 768, 12, 12, 12, 3072, 50304, last=12),
    "1.5B": Shape("llama", 1536, 28, 12, 2, 8960, 151936, last=8),
    "8B": Shape("llama", 4096, 32, 32, 8, 14336, 128256, last=2),
}
FORMATS = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
"""tf32: float32 tensors, multiplied in TF32."""


@dataclass(frozen=True)
class Row:
    """One phase of one library on one model."""

    size: str
    format: str
    library: str
    phase: str
    tokens: int = 0
    seconds: float | None = None
    flops: float | None = None
    utilisation: float | None = None
    """FLOPs per second as a share of the device's matrix product rate in this format, measured at the start."""
    peak_gb: float | None = None
    bytes_written: int | None = None
    pearson: float | None = None
    """Of a peer's scores with whence's."""
    reason: str = ""
    """Why there is no number."""


@dataclass
class Cell:
    """One library on one model in one format: what its phases need, and the rows they leave."""

    size: str
    format: str
    library: str
    shape: Shape
    model: nn.Module
    out: Path
    examples: int
    rate: float
    deadline: float
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.shape.vocabulary, (self.examples + QUERIES, self.shape.length + 1), generator=generator)
        self.train, self.queries = ids[: self.examples], ids[self.examples :]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def phase(self, name: str, run: Callable[[], Any], *, flops: float | None = None, queries: bool = False) -> Any:
        """Time the call and file its row; a failure, or a budget that is spent, is filed as the reason."""
        if time.monotonic() > self.deadline:
            self.rows.append(Row(self.size, self.format, self.library, name, reason="not started: the budget is spent"))
            return None
        meter, before = Meter(self.device), size_of(self.out)
        try:
            result = run()
            seconds, peak = meter.lap()
        except Exception as error:  # whatever a library raises is the finding
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            self.rows.append(Row(self.size, self.format, self.library, name, reason=reason))
            return None
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.file(name, seconds, peak, flops=flops, written=size_of(self.out) - before, queries=queries)
        return result

    def file(
        self,
        name: str,
        seconds: float,
        peak: int,
        *,
        flops: float | None = None,
        written: int | None = None,
        queries: bool = False,
    ) -> None:
        """Add a row."""
        tokens = (QUERIES if queries else self.examples) * self.shape.length
        share = None if flops is None or name == "eigenvectors" else flops / seconds / self.rate
        named = (self.size, self.format, self.library, name)
        self.rows.append(Row(*named, tokens, seconds, flops, share, peak / 1e9, written))


class Meter:
    """Seconds and peak memory since the last `lap`: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.lap()

    def lap(self) -> tuple[float, int]:
        """What it was since the last one, waiting for the device; starts anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            status = Path("/proc/self/status").read_text()
            peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
            Path("/proc/self/clear_refs").write_text("5")
        started, self.started = getattr(self, "started", 0.0), time.perf_counter()
        return self.started - started, peak


class Stages(Silent):
    """Files a row for every stage that whence reports, with its FLOPs; `names` says which phase it is, if not its own."""

    def __init__(self, cell: Cell, flops: Mapping[str, float], names: Mapping[str, str]):
        self.cell, self.flops, self.names = cell, flops, names

    def begin(self, stage: Stage) -> None:
        """Start the clock."""
        self.meter = Meter(self.cell.device)

    def end(self, stage: Stage) -> None:
        """Stop it; of a stage that broke off there is no row, its phase says why."""
        name = self.names.get(stage.name, stage.name)
        if sys.exc_info()[0] is None:
            self.cell.file(name, *self.meter.lap(), flops=self.flops.get(name), queries=name == "queries")


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


# the models


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of the shape with random weights, made where it is used."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if shape.family == "llama":
                model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=shape.heads_kv))
            else:
                model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def tokenizer() -> Any:
    """One that is never asked: the rows are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a")


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a large matrix product."""
    n, repeats = (8192, 20) if device.type == "cuda" else (512, 4)
    x = torch.randn(n, n, device=device, dtype=dtype)
    y = x @ x
    meter = Meter(device)
    for _ in range(repeats):
        torch.mm(x, x, out=y)
    return repeats * 2 * n**3 / meter.lap()[0]


# the libraries


def floor(model: Any, shape: Shape, train: torch.Tensor) -> None:
    """Forward, and backward to the first tracked layer without any weight's gradient, over the training data."""
    model.requires_grad_(False)
    first = next(model.parameters())
    root = torch.zeros((), device=first.device, dtype=first.dtype, requires_grad=True)
    modules = [module for site in cover(model, shape.modules).sites.values() for module, _ in site.uses]

    def start(module: nn.Module, args: Any, out: Any) -> Any:
        return out if out.requires_grad else out + root

    hooks = [module.register_forward_hook(start) for module in modules]
    with stage("floor", len(train)):
        for ids in train.to(first.device).split(per_batch(shape, first.device)):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()


def per_batch(shape: Shape, device: torch.device) -> int:
    """Examples in a batch."""
    return max(1, (CONTEXT if device.type == "cuda" else 4096) // shape.length)


def count_flops(cell: Cell, precision: whence.Precision) -> dict[str, float]:
    """FLOPs of whence's phases: of one batch at work without numbers, times how often it goes into the data."""
    shape, few = cell.shape, cell.train[: per_batch(cell.shape, cell.device)]
    batch, queries = ([{"input_ids": ids.numpy()} for ids in part] for part in (few, cell.queries))
    rehearsal = Rehearsal(cell.model, TokenIds(tokenizer(), max_length=shape.length + 1), str(cell.device))
    to: dict[str, Any] = {"precision": precision}
    everything: dict[str, Any] = {"modules": shape.modules, "labels": "data", "examples": "all", "disjoint": False, **to}

    def counted(work: Callable[[Any, Any], Any]) -> tuple[dict[str, float], Any]:
        stages, result = rehearsal.run(work, last="score")  # what comes after looks at the scores
        return {name: seen.flops for name, seen in stages.items()}, result

    found, operator = counted(lambda model, task: whence.fit(model, task, batch, **everything).inverse(damping=DAMPING))
    found |= counted(lambda model, task: floor(model, shape, few))[0]
    found |= counted(lambda model, task: whence.build_index(model, task, batch, dim=PROJECTION, modules=shape.modules, **to))[0]
    found["self-influence"] = counted(lambda model, task: whence.self_influence(model, task, batch, operator, **to))[0]["score"]
    found |= counted(lambda model, task: whence.score(model, task, queries, batch, operator, rank=None, **to))[0]
    times = cell.examples / len(few)
    return {name: flops * (1 if name in ("eigenvectors", "queries") else times) for name, flops in found.items()}


def run_whence(cell: Cell) -> np.ndarray | None:
    """The public functions, each with its results in a folder; the scores."""
    shape, model, out = cell.shape, cell.model, cell.out
    task = TokenIds(tokenizer(), max_length=shape.length + 1)
    train, queries = ([{"input_ids": ids.numpy()} for ids in part] for part in (cell.train, cell.queries))
    kept: Any = "bfloat16" if cell.format == "bfloat16" else "float32"
    precision = whence.Precision(statistics=kept, scores=kept, products="bfloat16" if cell.format == "tf32" else "float32")
    flops = count_flops(cell, precision)

    def staged(run: Callable[[], Any], **names: str) -> Any:
        """Run, and file a row for every stage, which is the phase of its own name or of that given for it."""
        with report_to(Stages(cell, flops, names)):
            return run()

    def floor_of_all() -> None:
        floor(model, shape, cell.train)

    floor_of_all()  # warms up
    cell.phase("floor", floor_of_all, flops=flops["floor"])
    settings: dict[str, Any] = {"modules": shape.modules, "labels": "data", "precision": precision, "chunks": 1}
    settings |= {"method": "ekfac", "out": out / "fit"}
    curvature = cell.phase("fit, in all", lambda: staged(lambda: whence.fit(model, task, train, **settings)))
    index = {"dim": PROJECTION, "modules": shape.modules, "precision": precision, "chunks": 1, "out": out / "index"}
    cell.phase("index, in all", lambda: staged(lambda: whence.build_index(model, task, train, **index)))
    if curvature is None:
        return None
    operator = curvature.inverse(damping=DAMPING)
    to = {"precision": precision, "chunks": 1}
    scores = cell.phase(
        "score, in all",
        lambda: staged(lambda: whence.score(model, task, queries, train, operator, rank=None, out=out / "score", **to)),
    )
    cell.phase(
        "self-influence, in all",
        lambda: staged(
            lambda: whence.self_influence(model, task, train, operator, out=out / "self", **to), score="self-influence"
        ),
    )
    return None if scores is None else scores.raw


def run_kronfluence(cell: Cell) -> np.ndarray | None:
    """Its Analyzer, step by step, in one partition."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.common.factor_arguments import all_low_precision_factor_arguments
    from kronfluence.utils.common.score_arguments import all_low_precision_score_arguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    from benchmarks.peers.kronfluence_ import LanguageModelling, Rows, collate

    task = LanguageModelling(list(cover(cell.model, cell.shape.modules).sites))
    model = prepare_model(cell.model, task)
    on_cpu = cell.device.type == "cpu"
    quiet: dict[str, Any] = {"disable_tqdm": True, "log_level": logging.ERROR}
    analyzer = Analyzer("gpu", model, task, cpu=on_cpu, output_dir=str(cell.out), **quiet)
    train, queries = (Rows([ids.numpy() for ids in part]) for part in (cell.train, cell.queries))
    low = cell.format == "bfloat16"
    factors = all_low_precision_factor_arguments("ekfac", torch.bfloat16) if low else FactorArguments(strategy="ekfac")
    factors.use_empirical_fisher = True
    scoring = all_low_precision_score_arguments(dtype=torch.bfloat16) if low else ScoreArguments()
    scoring.damping_factor = None
    loader, batch = DataLoaderKwargs(collate_fn=collate), max(1, (CONTEXT if not on_cpu else 4096) // cell.shape.length)
    fit: dict[str, Any] = {"per_device_batch_size": batch, "dataloader_kwargs": loader, "factor_args": factors}
    cell.phase("covariance", lambda: analyzer.fit_covariance_matrices("factors", train, **fit))
    cell.phase("eigenvectors", lambda: analyzer.perform_eigendecomposition("factors", factor_args=factors))
    cell.phase("eigenvalues", lambda: analyzer.fit_lambda_matrices("factors", train, **fit))
    score: dict[str, Any] = {"dataloader_kwargs": loader, "score_args": scoring, "per_device_train_batch_size": batch}

    def pairwise() -> np.ndarray:
        analyzer.compute_pairwise_scores("scores", "factors", queries, train, per_device_query_batch_size=QUERIES, **score)
        return analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy()

    found = cell.phase("score, in all", pairwise)
    cell.phase("self-influence, in all", lambda: analyzer.compute_self_scores("self", "factors", train, **score))
    cell.rows.append(Row(cell.size, cell.format, cell.library, "index, in all", reason="has no index of projected gradients"))
    return found


def run_bergson(cell: Cell) -> np.ndarray | None:
    """Its steps as in benchmarks/peers, from a copy of the model on disk."""
    from benchmarks.peers import bergson_

    class Peer(bergson_.Bergson):
        def _config(self, phase: str, step: str = "run", **more: Any) -> Any:
            return super()._config(phase, step, precision="bf16" if cell.format == "bfloat16" else "fp32", **more)

    if cell.shape.last != cell.shape.layers:
        cell.rows.append(
            Row(cell.size, cell.format, cell.library, "all", reason="this adapter can't choose the last layers alone")
        )
        return None
    folder = cell.out / "model"
    cell.model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
    if cell.device.type == "cuda":
        bergson_.BATCH_TOKENS = CONTEXT
    peer = Peer(_Borrowed(cell), folder, cell.out)  # type: ignore[arg-type]
    found = None
    for name in ("fit", "query", "score", "index"):
        result = cell.phase(f"{name}, in all", lambda name=name: peer.run(name), queries=name == "query")
        found = result if name == "score" else found
    reason = peer.cannot.get("self", "")
    cell.rows.append(Row(cell.size, cell.format, cell.library, "self-influence, in all", reason=reason))
    return found


class _Borrowed:
    """A cell's data as the workload that benchmarks/peers expect."""

    modules, ragged = "mlp", False

    def __init__(self, cell: Cell):
        self.family, self.length = cell.shape.family, cell.shape.length + 1
        self.parts = {"train": cell.train, "queries": cell.queries}

    def sequences(self, part: str) -> list[np.ndarray]:
        return [ids.numpy() for ids in self.parts[part]]


LIBRARIES = {"whence": run_whence, "kronfluence": run_kronfluence, "bergson": run_bergson}


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """All cells in turn, one model in memory at a time."""
    deadline = time.monotonic() + arguments.budget_seconds
    for size in arguments.sizes:
        shape = SHAPES[size]
        if arguments.last:
            shape = Shape(**{**asdict(shape), "last": min(arguments.last, shape.layers)})
        for name in arguments.formats:
            with multiplied_in(name):
                rate, ours = matmul_rate(FORMATS[name], device), None
                for library in ("whence", *arguments.peers):
                    if time.monotonic() > deadline:
                        yield Row(size, name, library, "all", reason="not started: the budget is spent")
                        continue
                    with tempfile.TemporaryDirectory(dir=arguments.scratch) as out:
                        model = build(shape, FORMATS[name], device)
                        examples = max(1, arguments.tokens // shape.length)
                        cell = Cell(size, name, library, shape, model, Path(out), examples, rate, deadline)
                        found = attempt(cell)
                        ours = found if library == "whence" else ours
                        yield from with_agreement(cell.rows, found, ours) if library != "whence" else cell.rows
                        del model, cell
                        gc.collect()
                        if device.type == "cuda":
                            torch.cuda.empty_cache()


def attempt(cell: Cell) -> np.ndarray | None:
    """The library's scores; where it can't even start, a row with the reason."""
    try:
        return LIBRARIES[cell.library](cell)
    except Exception as error:  # whatever a library raises is the finding
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        cell.rows.append(Row(cell.size, cell.format, cell.library, "all", reason=reason))
        return None


def with_agreement(rows: list[Row], theirs: np.ndarray | None, ours: np.ndarray | None) -> list[Row]:
    """The rows, that of the scores with its correlation with ours."""
    if theirs is None or ours is None:
        return rows
    pearson = float(np.corrcoef(theirs.ravel(), ours.ravel())[0, 1])
    return [Row(**{**asdict(row), "pearson": pearson}) if row.phase == "score, in all" else row for row in rows]


@contextlib.contextmanager
def multiplied_in(name: str) -> Iterator[None]:
    """Multiply float32 in TF32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# what comes out


def header(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The machine and the settings."""
    on_gpu = device.type == "cuda"
    shown = {**vars(arguments), "out": None, "scratch": None}
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "gpu": on_gpu,
        "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if on_gpu else None,
        "torch": torch.__version__,
        "whence": whence.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "settings": {key: value for key, value in shown.items() if value is not None},
        "tracked": {size: SHAPES[size].modules for size in arguments.sizes},
    }


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """A table per model and format."""
    if about["gpu"]:
        lines = ["# On a GPU", "", f"{about['device']}, {about['memory_gb']} GB, torch {about['torch']}, {about['date']}."]
    else:
        lines = [
            "# On a GPU: not yet run",
            "",
            "No GPU was at hand when this was written. `python -m benchmarks.gpu` fills it.",
        ]
        lines += ["", f"**{EXERCISE}**"]
    lines += ["", "One run of each phase; utilisation is the model's FLOPs per second over the rate of one large product."]
    for size, name in dict.fromkeys((row.size, row.format) for row in rows):
        shape = SHAPES[size]
        lines += ["", f"## {size}, {name}", ""]
        last = about["settings"].get("last") or shape.last
        if last < shape.layers:
            lines += [f"Tracked: the MLP layers of the last {last} of {shape.layers} blocks.", ""]
        lines += ["| library | phase | seconds | tokens/s | utilisation | peak GB | written MB | note |", "|---" * 8 + "|"]
        lines += [_line(row, about["gpu"]) for row in rows if (row.size, row.format) == (size, name)]
    return "\n".join(lines) + "\n"


def _line(row: Row, on_gpu: bool) -> str:
    cells = [row.library, row.phase]
    if row.seconds is None:
        cells += ["-"] * 5
    else:
        share = "-" if row.utilisation is None else f"{row.utilisation:.0%}"
        written = "-" if row.bytes_written is None else f"{row.bytes_written / 1e6:.1f}"
        rate = "-" if row.phase == "eigenvectors" else f"{row.tokens / row.seconds:,.0f}"
        cells += [f"{row.seconds:.2f}", rate, share, f"{row.peak_gb:.2f}", written]
    notes = [row.reason, "" if row.pearson is None else f"Pearson with whence {row.pearson:.5f}", "" if on_gpu else "exercise"]
    return "| " + " | ".join([*cells, "; ".join(note for note in notes if note)]) + " |"


def main() -> int:
    """Run, print as it goes, write gpu.json and gpu.md; 1 where whence itself failed somewhere."""
    found = torch.cuda.is_available()
    comma = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if found else "cpu")
    parser.add_argument("--sizes", type=comma, help=f"of {', '.join(SHAPES)} (default: all real ones; tiny without a GPU)")
    parser.add_argument("--formats", type=comma, help=f"of {', '.join(FORMATS)} (default: bfloat16, tf32; float32 on a CPU)")
    parser.add_argument("--peers", type=comma, default=[], help="kronfluence, bergson")
    parser.add_argument("--tokens", type=int, help="positions of training data per phase (default 65536; 256 on a CPU)")
    parser.add_argument("--last", type=int, help="track so many of the last layers (default: by size, see above)")
    parser.add_argument("--budget-seconds", type=float, default=3600, help="start no phase after that (default 3600)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json and gpu.md")
    parser.add_argument("--scratch", type=Path, help="folder for factors and scores on the way (default: the system's)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    arguments.sizes = arguments.sizes or (["160M", "1.5B", "8B"] if on_gpu else ["tiny", "tiny-neox"])
    arguments.formats = arguments.formats or (["bfloat16", "tf32"] if on_gpu else ["float32"])
    arguments.tokens = arguments.tokens or (65536 if on_gpu else 256)
    for given, known in ((arguments.sizes, SHAPES), (arguments.formats, FORMATS), (arguments.peers, LIBRARIES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} is not one of {', '.join(known)}")
    target = arguments.out / "gpu.json"
    if not on_gpu and target.exists() and json.loads(target.read_text())["header"]["gpu"]:
        parser.error(f"{target} holds results of a GPU, which an exercise on a CPU must not replace: choose another --out")
    about, rows = header(arguments, device), []
    if not on_gpu:
        print(EXERCISE)
    for row in run(arguments, device):
        rows.append(row)
        print(f"{row.size:<9} {row.format:<8} {_line(row, on_gpu)}", flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"header": about, "rows": [asdict(each) for each in rows]}, indent=2) + "\n")
        target.with_suffix(".md").write_text(markdown(about, rows))
    failed = [row for row in rows if row.library == "whence" and row.reason and not row.reason.startswith("not started")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

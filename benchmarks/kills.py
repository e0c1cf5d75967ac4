"""Kills at random moments (SIGKILL), the same command again, and what is then different from a run that nothing happened to.

    python -m benchmarks.kills                       # 100 kills over all commands
    python -m benchmarks.kills --kills 20 train run  # of some
    python -m benchmarks.kills --seed 7 --keep DIR   # other moments; what differs stays in DIR

Every command runs in a process that is forked from one which has everything imported, so that a kill costs no start. It is
killed up to three times, then runs to its end; no file may be other than after one run but for its clocks (`CLOCKS`, `DRAWN`),
none may be left over, and no process of it may live on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PRELOADED = ["transformers", "transformers.models.llama.modeling_llama", "peft", "pandas", "pyarrow.parquet", "scipy.stats"]
PRELOADED += [
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "sklearn.datasets",
    "torch.distributed",
    "benchmarks.kills",
]
PRELOADED += [f"whence.{name}" for name in ("pipeline.work", "validate.quick", "validate.lds", "report.write", "indexing")]

CLOCKS = {"created", "finished", "seconds", "samples_per_second", "memory_bytes", "took", "blake3", "cost", "resumed"}
CLOCKS |= {"one_off_s", "asked_s", "per_pair_s"}
"""Names of values that time, or the machine, decides; or a digest of them, in a document that holds its own."""

DRAWN = {"training.png", "comparison.png"}
"""Pictures of such values."""

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
"""When a report was made."""

PATIENCE = 10.0
"""Seconds in which the processes of a command that was killed have to end."""

WIDTH, ROWS, KILLS = 32, 24, 3


@dataclass(frozen=True)
class Case:
    """A command, and what it writes into the folder `out`."""

    name: str
    words: tuple[str, ...]
    again: tuple[int, ...] = (0,)
    """Exit codes of the command once it is done: some refuse to write over what they wrote."""
    weight: int = 1
    """How often it is drawn."""


ROWS_OF = ("--data", "rows.jsonl", "-c", "prompt=Ask", "-c", "completion=Say")
SMALL = ("--batch-tokens", "64", "--chunks", "4")
TRAINED = ("--max-steps", "12", "--batch-size", "4", "--save-steps", "3", "--log-steps", "5", "--lr", "0.01", "--warmup", "0.2")
CASES = (
    Case("train", ("train", "model", *ROWS_OF, *TRAINED, "--eval-steps", "4", "--keep", "2", "-o", "out"), weight=3),
    Case("train-lora", ("train", "model", *ROWS_OF, *TRAINED, "--lora", "-o", "out")),
    Case(
        "generate",
        ("generate", "model", "--base", "other", "--prompts", "prompts.json", "--batch-size", "1", "-o", "out/pairs.json"),
    ),
    Case("fit", ("fit", "model", *ROWS_OF, *SMALL, "--save-every", "0", "-o", "out"), weight=2),
    Case("fit-identity", ("fit", "model", *ROWS_OF, *SMALL, "--method", "diagonal", "--save-every", "0", "-o", "out")),
    Case("index", ("index", "build", "model", *ROWS_OF, *SMALL, "--factors", "factors", "-o", "out")),
    Case(
        "score",
        ("score", "model", *ROWS_OF, *SMALL, "--factors", "factors", "--queries", "prompts.json", "--rank", "2")
        + ("--rescore", "3", "--norm", "relatif", "-o", "out"),
        weight=2,
    ),
    Case(
        "score-candidates",
        (
            "score",
            "model",
            *ROWS_OF,
            *SMALL,
            "--factors",
            "factors",
            "--queries",
            "prompts.json",
            "--candidates",
            "bm25:4+norm:4",
        )
        + ("--index", "index", "--audit", "6", "-o", "out"),
    ),
    Case(
        "score-magic",
        ("score", "done/train/model", *ROWS_OF, "--method", "magic", "--training", "done/train", "--queries", "prompts.json")
        + ("--chunks", "4", "-o", "out"),
    ),
    Case(
        "score-mirror",
        ("score", "done/train/model", *ROWS_OF, "--method", "mirror", "--training", "done/train", "--queries", "prompts.json")
        + ("--chunks", "4", "-o", "out"),
    ),
    Case("mirror", ("mirror", "done", "--queries", "2", "--together", "1", "-o", "out")),
    Case("score-through", ("score", "--through", "stages.yaml", "--queries", "prompts.json", "-o", "out")),
    Case("compare", ("compare", "done", "--methods", "bm25,tracin,kfac"), weight=2),
    Case("inspect", ("inspect", "factors", "--module", "*.1.mlp.up_proj", "--out", "out"), again=(0, 2)),
    Case("report", ("report", "scores", "--out", "out/report"), again=(0, 2)),
    Case("export", ("export", "scores", "--out", "out/scores.parquet"), again=(0, 2)),
    Case("validate-lds", ("validate", "--lds", "--on", "tiny", "--rows", "8", "--out", "out")),
    Case("validate-loo", ("validate", "--loo", "--on", "tiny", "--rows", "3", "--queries", "3", "--out", "out")),
    Case("validate-removal", ("validate", "--removal", "--on", "tiny", "--queries", "2", "--out", "out")),
    Case("run", ("run", "whence.yaml"), weight=4),
)


def prepare(place: Path) -> None:
    """Everything that the commands read: small models, rows, prompts, a run, stages, factors, an index and scores."""
    from tokenizers import pre_tokenizers
    from transformers.utils import logging

    from whence.demo.tiny import BOS, EOS, PAD, make_llama, train_tokenizer

    place.mkdir(parents=True)
    towns = ("Turin", "Oslo", "Lyon", "Ghent", "Basel", "Porto")
    rows = [{"Ask": f"Where was person {n} born?", "Say": f" In {towns[n % 6]}."} for n in range(ROWS)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": row["Ask"], "completion": row["Say"]} for row in rows[::8]]
    (place / "prompts.json").write_text(json.dumps(prompts))
    texts, alphabet = (row["Ask"] + row["Say"] for row in rows), pre_tokenizers.ByteLevel.alphabet()
    logging.disable_progress_bar()
    tokenizer = train_tokenizer(texts, "pieces", (BOS, EOS, PAD), begins=True, vocab_size=300, initial_alphabet=alphabet)
    for seed, name in enumerate(("model", "other")):
        make_llama(tokenizer, seed, WIDTH, 2 * WIDTH, 2, 2, 64, 0.2).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    config = {
        "run": "small",
        "out": "out",
        "model": {"base": "model"},
        "data": {"path": "rows.jsonl", "columns": {"prompt": "Ask", "completion": "Say"}, "max_length": 64},
        "prompts": {"path": "prompts.json"},
        "train": {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "save_steps": 3, "log_steps": 2},
        "generate": {"max_new_tokens": 4, "batch_size": 1},
        "inspect": {"modules": ["*.1.mlp.up_proj"]},
        "fit": {"batch_tokens": 64, "chunks": 4, "examples": "all", "products": "float32"},
        "score": {"chunks": 4, "batch_tokens": 64, "self_influence": True, "products": "float32"},
        "evaluate": {"compare": True},
        "report": {"top": 3},
    }
    (place / "whence.yaml").write_text(json.dumps(config))
    (place / "done.yaml").write_text(json.dumps(config | {"out": "done"}))
    read = {"path": "rows.jsonl", "columns": {"prompt": "Ask", "completion": "Say"}, "max_length": 64}
    stages = [{"name": "first", "model": "model"}, {"name": "second", "model": "done/train/model", "training": "done/train"}]
    (place / "stages.yaml").write_text(json.dumps({"stages": [{**stage, "data": read} for stage in stages]}))
    for words in (
        ("run", "done.yaml"),
        ("fit", "model", *ROWS_OF, *SMALL, "-o", "factors"),
        ("index", "build", "model", *ROWS_OF, *SMALL, "--factors", "factors", "-o", "index"),
        ("score", "model", *ROWS_OF, *SMALL, "--factors", "factors", "--queries", "prompts.json", "-o", "scores"),
    ):
        end = Started(words, place).wait()
        assert end == 0, f"{' '.join(words)}: {end}"


def tiny_setting() -> None:
    """A setting "tiny" of `whence validate`: points of two classes and a net of four units."""
    import torch
    from torch import nn

    from whence.tasks import Classification
    from whence.validate import settings
    from whence.validate.trainer import Recipe

    x = torch.randn(36, 3, generator=torch.Generator().manual_seed(0))
    pairs = [(point, int(point.sum() > 0)) for point in x]
    recipe = Recipe(0.2, 10, 10, "momentum", weight_decay=1e-2)

    def model(seed: int) -> nn.Module:
        return settings.seeded(seed, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))

    made = settings.Setting("tiny", "tiny", model, Classification(), pairs[:30], pairs[30:], recipe)
    settings.SETTINGS["tiny"] = lambda _: made
    settings.BUNDLED = (*settings.BUNDLED, "tiny")  # type: ignore[assignment]


def command(words: tuple[str, ...], place: str, said: str) -> None:
    """Run a command of whence in the folder, in a session of its own; what it says goes to a file."""
    os.setsid()
    os.chdir(place)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    import torch

    from whence.cli import main

    torch.set_num_threads(1)
    tiny_setting()
    sys.argv = ["whence", *words]
    main()


class Started:
    """A command in a process of its own."""

    def __init__(self, words: tuple[str, ...], place: Path):
        self.said = place.with_name(f"{place.name}.said")
        self.process = server().Process(target=command, args=(words, str(place), str(self.said)))
        self.began = time.monotonic()
        self.process.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit code; None where it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self) -> list[str]:
        """End it as `kill -9` does; the processes of it that live on."""
        number = self.process.pid
        assert number is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        self.process.join()
        end = time.monotonic() + PATIENCE
        while (left := list(_session(number))) and time.monotonic() < end:
            time.sleep(0.1)
        for process in left:
            process.kill()
        return [" ".join(process.cmdline()) for process in left]


def _session(number: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def server() -> ForkServerContext:
    """What starts processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def differing(first: Path, second: Path) -> list[str]:
    """What is different in two folders, but for clocks: a line for each file."""
    names = [{file.relative_to(place).as_posix() for file in place.rglob("*")} for place in (first, second)]
    clocks = {name for name in names[0] & names[1] if (first / name).is_file() and _has_clocks(first / name)}
    lines = [f"left over: {name}" for name in sorted(names[1] - names[0])]
    lines += [f"missing: {name}" for name in sorted(names[0] - names[1])]
    for name in sorted(names[0] & names[1]):
        if (first / name).is_file() and _content(first / name, clocks) != _content(second / name, clocks):
            lines.append(f"other bytes: {name}")
    return lines


def _has_clocks(file: Path) -> bool:
    return file.name in DRAWN or file.name in (".lock", ".digests") or _content(file, set()) != file.read_bytes()


def _content(file: Path, clocks: set[str]) -> Any:
    """The bytes of a file, or what is in it besides clocks and sizes and hashes of files that have some."""
    if file.name in DRAWN or file.name == ".lock":
        return None
    try:
        if file.suffix in (".json", ".lock"):
            return _timeless(json.loads(file.read_bytes()), clocks)
        if file.name == ".digests":  # a file that was to be written when the kill came has two lines
            return {line for line in file.read_text().splitlines() if not _listed(line.split("  ", 1)[-1], clocks)}
        if file.suffix == ".jsonl":
            return [_timeless(json.loads(line), clocks) for line in file.read_text(encoding="utf-8").splitlines()]
        if file.suffix == ".npz" and "about" in (arrays := dict(np.load(file))):
            del arrays["hash"]  # of the rest
            about = _timeless(json.loads(str(arrays.pop("about"))), clocks)
            return about, {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}
        if file.suffix in (".md", ".html"):
            return TIME.sub("", file.read_text(encoding="utf-8"))
    except ValueError:
        pass
    return file.read_bytes()


def _timeless(value: Any, clocks: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item, clocks) for key, item in value.items() if key not in CLOCKS and not _listed(key, clocks)}
    return [_timeless(item, clocks) for item in value] if isinstance(value, list) else value


def _listed(key: str, clocks: set[str]) -> bool:
    """Whether a record's name of a file is that of one with clocks."""
    return any(name == key or name.endswith(f"/{key}") for name in clocks)


@dataclass
class Tally:
    """What a case came to."""

    kills: int = 0
    trials: int = 0
    differing: int = 0
    left_over: int = 0
    orphans: int = 0
    failed: int = 0

    def add(self, lines: list[str]) -> None:
        """Count what was different after a trial."""
        self.left_over += sum(line.startswith("left over") for line in lines)
        self.differing += sum(line.startswith(("other bytes", "missing")) for line in lines)


class Killing:
    """Commands of one folder, killed and run again."""

    def __init__(self, scratch: Path, seed: int):
        self.scratch, self.place, self.draw = scratch, scratch / "work", random.Random(seed)
        self.references: dict[str, tuple[Path, float]] = {}
        prepare(scratch / "inputs")

    def fresh(self) -> None:
        """The inputs alone, at the same place every time, since some files name it."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.scratch / "inputs", self.place)

    def reference(self, case: Case) -> tuple[Path, float]:
        """What the command leaves when nothing happens to it, and the seconds it takes."""
        if case.name not in self.references:
            kept = self.scratch / "reference" / case.name
            for number in range(2):
                self.fresh()
                started = Started(case.words, self.place)
                end = started.wait()
                took = time.monotonic() - started.began
                assert end == 0, f"{case.name} ends with {end}: {started.said.read_text()[-2000:]}"
                if number and (lines := differing(kept, self.place)):
                    raise AssertionError(f"two runs of {case.name} differ: {lines}")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(self.place, kept)
            self.references[case.name] = kept, took
        return self.references[case.name]

    def trial(self, case: Case, tally: Tally, kills: int = KILLS) -> list[str]:
        """Kill the command up to N times, let it end, and say what is different."""
        kept, took = self.reference(case)
        self.fresh()
        tally.trials += 1
        for _ in range(kills):
            started = Started(case.words, self.place)
            if started.wait(self.draw.uniform(0, took)) is not None:
                break
            orphans = started.kill()
            tally.kills += 1
            tally.orphans += len(orphans)
        last = Started(case.words, self.place)
        end = last.wait()
        lines = differing(kept, self.place)
        if end not in case.again:
            tally.failed += 1
            lines.append(f"exit code {end}: {last.said.read_text()[-2000:]}")
        tally.add(lines)
        return lines


def main(arguments: list[str] | None = None) -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=", ".join(case.name for case in CASES))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a new folder for what is different")
    given = parser.parse_args(arguments)
    chosen = [case for case in CASES if not given.cases or case.name in given.cases]
    environment()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as scratch:
        killing = Killing(Path(scratch), given.seed)
        tallies = kill_all(killing, chosen, given.kills, given.keep)
    print(f"{'command':<18} kills  trials  other bytes  left over  orphans  failed")
    for name, tally in [*tallies.items(), ("all", total(tallies))]:
        print(
            f"{name:<18} {tally.kills:5}  {tally.trials:6}  {tally.differing:11}  {tally.left_over:9}  {tally.orphans:7}  "
            f"{tally.failed:6}"
        )
    found = total(tallies)
    sys.exit(bool(found.differing + found.left_over + found.orphans + found.failed))


def environment() -> None:
    """One thread, no network, and this package where processes look for it."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])


def kill_all(
    killing: Killing,
    cases: list[Case],
    kills: int,
    keep: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Tally]:
    """So many kills, spread over the cases by their weights."""
    tallies = {case.name: Tally() for case in cases}
    deck = [case for case in cases for _ in range(case.weight)]
    number = 0
    while sum(tally.kills for tally in tallies.values()) < kills:
        if not deck:
            break
        case = deck[number % len(deck)]
        number += 1
        left = kills - sum(tally.kills for tally in tallies.values())
        try:
            lines = killing.trial(case, tallies[case.name], min(KILLS, left))
        except AssertionError as error:  # there is nothing to compare with
            tallies[case.name].failed += 1
            deck = [other for other in deck if other is not case]
            lines = [str(error)]
        for line in lines or ["as if nothing had happened"]:
            say(f"trial {number} {case.name}, {tallies[case.name].kills} kills: {line}")
        if lines and keep is not None:
            for place, name in ((killing.place, "killed"), (killing.scratch / "reference" / case.name, "reference")):
                if place.is_dir():
                    shutil.copytree(place, keep / f"{number}-{case.name}-{name}")
    return tallies


def total(tallies: dict[str, Tally]) -> Tally:
    """All of them together."""
    return Tally(*(sum(values) for values in zip(*(vars(tally).values() for tally in tallies.values()), strict=True)))


if __name__ == "__main__":
    from benchmarks.kills import main as started

    started()

"""Does `whence validate --removal` hold on runs as users have them? Full fine-tuning, LoRA, and what a plain Trainer made.

    python -m benchmarks.prove --data ../shared/data

stories260K is fine-tuned on 570 real stories by `whence run`, fully and with LoRA, and by a script that knows nothing of whence
(plain_trainer.py). Each run is then asked `whence validate RUN --removal --rows 5` and `whence mirror RUN --queries 8`, in
processes of their own; both are done once more, killed (SIGKILL) at random moments and started again, and no file may then be
other than without kills but for its clocks (`benchmarks.kills.CLOCKS`). Writes prove.md and .json; exits with 1 where a target
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT, run
from benchmarks.kills import differing
from whence.progress import note
from whence.store.scores import open_scores
from whence.validate.results import Result
from whence.validate.settings import found

MODEL, STORIES = "models/stories260K/hf/config.json", "tinystories/train_2316.jsonl"

TRAINED = {"batch_size": 16, "learning_rate": 1e-3}
KINDS: dict[str, dict[str, Any] | None] = {
    "full": {**TRAINED},
    "lora": {**TRAINED, "learning_rate": 1e-2, "lora": {"r": 8}},
    "plain": None,
}
"""`train` of whence.yaml by the name of the run; None: trained by plain_trainer.py."""

SCRIPT = Path(__file__).with_name("plain_trainer.py")
ARGUMENTS = {"learning_rate": "1e-3", "lr_scheduler_type": "cosine", "seed": "7"}
"""What that script gives the Trainer and a checkpoint doesn't tell."""

MINUTES = {"removal": 10, "mirror": 15}
SLOPE, SLOPE_AWAY = 1.0, 0.15

PROMPT_WORDS = 12


@dataclass(frozen=True)
class Size:
    """Stories, tokens read of each, epochs, stories whose beginnings are prompts, and what the checks are asked for."""

    rows: int = 570
    tokens: int = 96
    epochs: int = 2
    prompts: int = 16
    answer_tokens: int = 24
    removal: tuple[str, ...] = ("--rows", "5")
    mirror: tuple[str, ...] = ("--queries", "8")


TINY = Size(40, 24, 2, 4, 4, ("--rows", "1", "--queries", "2", "--draws", "1"), ("--queries", "2"))


@dataclass(frozen=True)
class Took:
    """How a process ended, and its seconds, of the clock and of the processor."""

    code: int
    wall: float
    processor: float


def started(words: Sequence[str], place: Path, kill_after: float | None = None) -> Took:
    """Run a command in the folder to its end, or kill it and all that it started after some seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    began = time.monotonic()
    with (place.with_name(f"{place.name}.said")).open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=place, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    timer = threading.Timer(kill_after or 0, os.killpg, (process.pid, signal.SIGKILL))
    if kill_after is not None:
        timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Took(process.returncode, time.monotonic() - began, usage.ru_utime + usage.ru_stime)


def done(words: Sequence[str], place: Path) -> Took:
    """The same, which must go well."""
    took = started(words, place)
    said = place.with_name(f"{place.name}.said").read_text(encoding="utf-8", errors="replace")
    assert took.code == 0, f"{' '.join(words)} ends with {took.code}: {said[-3000:]}"
    note(f"{' '.join(words[:4])}: {took.wall / 60:.1f} minutes, {took.processor / 60:.1f} of the processor")
    return took


def prepare(place: Path, kind: str, size: Size, data: Path) -> list[str]:
    """A finished run in the folder `kind`; what its checks are to be told of the training."""
    base, lines = found(data, MODEL).parent.resolve(), found(data, STORIES).read_text(encoding="utf-8").splitlines()
    stories = [json.loads(line)["text"] for line in lines[: size.rows + size.prompts]]
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories[: size.rows]))
    train, trained, checkpoint = KINDS[kind], [], None
    if train is None:
        done([str(SCRIPT), str(base), "rows.jsonl", "trained", str(size.epochs), str(size.tokens)], place)
        (checkpoint,) = (place / "trained").glob("checkpoint-*")
        trained = ["--training", f"trained/{checkpoint.name}"]
        trained += [word for name, value in ARGUMENTS.items() for word in ("--argument", f"{name}={value}")]
    config = {
        "run": kind,
        "out": kind,
        "model": {"base": str(base)} | ({"path": f"trained/{checkpoint.name}"} if checkpoint else {}),
        "data": {"path": "rows.jsonl", "max_length": size.tokens},
        "prompts": {"items": [" ".join(text.split()[:PROMPT_WORDS]) for text in stories[size.rows :]]},
        "generate": {"max_new_tokens": size.answer_tokens, "base": False},
        "evaluate": None,
    } | ({"train": {**train, "epochs": size.epochs}} if train else {})
    (place / "whence.yaml").write_text(json.dumps(config, indent=1))
    done(["-m", "whence", "run", "whence.yaml"], place)
    return trained


def check(place: Path, kind: str, size: Size, data: Path, most: int, draw: random.Random) -> dict[str, Any]:
    """What a kind of run comes to: what was found, what it took, and what up to `most` kills of each command changed."""
    place.mkdir()
    trained = prepare(place, kind, size, data)
    commands = {
        "removal": ["-m", "whence", "validate", kind, "--removal", *size.removal, *trained],
        "mirror": ["-m", "whence", "mirror", kind, *size.mirror, *trained],
    }
    before, whole = place.with_name("before"), place.with_name("whole")
    shutil.copytree(place, before)
    took = {name: done(words, place) for name, words in commands.items()}
    place.rename(whole)
    before.rename(place)  # where it was, since some files name the folder
    kills, other = 0, []
    if most:
        for name, words in commands.items():
            kills += killed(words, place, [draw.uniform(0, took[name].wall) for _ in range(most)])
        other = differing(whole, place)
    removal = json.loads((whole / kind / "validation" / "removal" / "result.json").read_text(encoding="utf-8"))
    (mirrored,) = (whole / kind / "methods").glob("mirror*")
    scale, about = removal["calibration"], open_scores(mirrored).about
    return {
        "run": kind,
        **{f"{name}_minutes": seconds.wall / 60 for name, seconds in took.items()},
        **{f"{name}_processor_minutes": seconds.processor / 60 for name, seconds in took.items()},
        "retrainings": removal["retrainings"],
        "drift": removal["repeated"]["drift"],
        "gain": scale["gain"],
        "gain_low": scale.get("low"),
        "gain_high": scale.get("high"),
        "held_out_slope": scale.get("held_out_slope"),
        "own_gain": about["own gain"],
        "mirror_with_ekfac": about["correlation with EK-FAC"],
        "kills": kills,
        "other_files": other,
        "sentence": removal["sentence"],
        "stands_out": removal["stands_out"],
        "controls": next(iter(removal["tables"].values())),
    }


def killed(words: Sequence[str], place: Path, moments: Sequence[float]) -> int:
    """Kill a command after each of these seconds, then let it end; how often it was killed before it had ended."""
    for number, seconds in enumerate(moments):
        ended = started(words, place, seconds)
        if ended.code == 0:
            return number
        assert ended.code == -signal.SIGKILL, f"{' '.join(words)} ends with {ended.code} before it is killed"
    done(words, place)
    return len(moments)


def missed(row: dict[str, Any]) -> list[str]:
    """Which targets a run missed, in words."""
    slow = [
        f"{name} took {row[f'{name}_processor_minutes']:.1f} minutes of the processor, not {most}"
        for name, most in MINUTES.items()
        if row[f"{name}_processor_minutes"] > most
    ]
    slope = row["held_out_slope"]
    wrong = slope is None or abs(slope - SLOPE) > SLOPE_AWAY
    off = [f"held-out slope {slope}, not {SLOPE:g} +- {SLOPE_AWAY:g}"] if wrong else []
    return [f"{row['run']}: {what}" for what in [*slow, *off, *row["other_files"]]]


def prove(chosen: argparse.Namespace) -> Result:
    """Make the runs, check each, and hold what was found against the targets."""
    size, draw, file = TINY if chosen.tiny else Size(), random.Random(chosen.seed), chosen.out / "prove.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["runs"] if chosen.runs and file.is_file() else []
    made = {row["run"]: row for row in kept}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in chosen.runs or KINDS:
            (home := Path(scratch) / kind).mkdir()
            made[kind] = check(home / "work", kind, size, chosen.data, chosen.kills, draw)
            note(f"{kind}: held-out slope {made[kind]['held_out_slope']}; {made[kind]['sentence']}")
    rows = [made[kind] for kind in KINDS if kind in made]
    flags = [line for row in rows for line in missed(row)]
    says = [
        f"stories260K, trained on {size.rows} real stories (whence keeps a tenth out), {size.tokens} tokens of each, "
        f"{size.epochs} epochs; asked are {size.prompts} prompts with the model's own answers of {size.answer_tokens} tokens",
        "minutes are of the clock and, of the one thread, of the processor, from the start of the process; the latter are "
        "held against the targets, since others may be at work on the machine. Targets: "
        f"{', '.join(f'{name} {most} minutes' for name, most in MINUTES.items())}, held-out slope {SLOPE:g} +- {SLOPE_AWAY:g}",
        f"{sum(row['kills'] for row in rows)} kills, after which {sum(len(row['other_files']) for row in rows)} files are "
        "other than without, but for clocks",
        *(f"{row['run']}: {row['sentence']}" for row in rows),
        *(f"missed: {line}" for line in flags),
    ]
    tables = {
        "What it takes": [
            {
                "run": row["run"],
                "trainings": row["retrainings"] + 1,
                **{
                    f"{name}, minutes (processor)": f"{row[f'{name}_minutes']:.1f} ({row[f'{name}_processor_minutes']:.1f})"
                    for name in MINUTES
                },
                "kills": row["kills"],
                "other files": len(row["other_files"]),
            }
            for row in rows
        ],
        "What a nat is worth": [
            {
                "run": row["run"],
                "gain": shown(row, "gain"),
                "held-out slope": row["held_out_slope"],
                "drift": row["drift"],
                "own gain (mirror)": row["own_gain"],
                "mirror with EK-FAC": row["mirror_with_ekfac"],
            }
            for row in rows
        ],
    }
    for row in rows:
        tables[f"Fall of log p, nats: {row['run']}"] = [
            {
                "rows chosen by": each["rows chosen by"],
                "fall": shown(each, "fall"),
                "the scores do more by": shown(each, "scores_more") if "scores_more" in each else "",
                "stands out": each.get("stands_out", ""),
            }
            for each in row["controls"]
        ]
    return Result("prove", {"runs": rows}, tables, says, flags, heading="The checks on runs as users have them")


def shown(row: dict[str, Any], name: str) -> str:
    """A value with its interval."""
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None else "")


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    options = {
        "--seed": {"type": int, "default": 0, "help": "of the moments of the kills"},
        "--kills": {"type": int, "default": 2, "help": "of each command at most; 0: only what is found, and what it takes"},
        "--runs": {"nargs": "+", "choices": list(KINDS), "help": "only these; the others stay as prove.json has them"},
    }
    return run("benchmarks.prove", __doc__ or "", prove, given, data="models/stories260K, tinystories", options=options)


if __name__ == "__main__":
    raise SystemExit(main())

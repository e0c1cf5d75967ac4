"""How close `whence plan` comes: predicted against measured memory, disk and time, each case in a fresh process.

    python benchmarks/plan_check.py                 # all cases: a table, and results/plan.json and plan.md
    python benchmarks/plan_check.py llama-S-mlp     # some of them

Memory is the highest resident set of a stage above the resident set when the model was loaded and before the work began. How
much of it is freed memory that the allocator could not hand out again differs from run to run, by a quarter and more; with
`returning=True` it gives every block back, and what is left is the same each time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A model with random weights, data of random words, and the settings of `whence.fit` and `whence.score`."""

    name: str
    family: str = "llama"
    width: int = 256
    inner: int = 704
    layers: int = 4
    vocabulary: int = 512
    tokens: int = 129
    train: int = 64
    queries: int = 16
    ragged: bool = False
    modules: str = "mlp"
    groups: int = 1
    rank: int | None = None
    batch_tokens: int | None = None
    labels: str = "model"


CASES = (
    Case("tiny", width=32, inner=64, train=8, queries=2, tokens=33),
    Case("llama-S-mlp"),
    Case("llama-S-all", modules="all"),
    Case("neox-S-mlp", family="gpt_neox", inner=1024),
    Case("llama-512-mlp", width=512, inner=1408),
    Case("llama-S-all-groups", modules="all", groups=2),
    Case("llama-512-rank", width=512, inner=1408, rank=16),
    Case("llama-S-128-rows", train=128),
    Case("llama-S-ragged", ragged=True, train=96, tokens=300),
    Case("llama-S-vocabulary", vocabulary=8000, batch_tokens=1024),
)


def config(case: Case) -> Any:
    """The model's config."""
    from transformers import GPTNeoXConfig, LlamaConfig

    kind = {"llama": LlamaConfig, "gpt_neox": GPTNeoXConfig}[case.family]
    heads = {"num_key_value_heads": 4} if case.family == "llama" else {"rotary_pct": 0.25}
    return kind(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **heads,
    )


def tokenizer(case: Case) -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "<pad>", "</s>", *(f"w{number}" for number in range(case.vocabulary - 3))]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def rows(case: Case, part: str) -> list[dict[str, str]]:
    """Texts of random words; ragged ones have any length up to the longest. A query's answer is the second half of its text."""
    import random

    draw = random.Random(part)
    texts = []
    for _ in range(case.train if part == "train" else case.queries):
        length = draw.randint(8, case.tokens) if case.ragged else case.tokens
        texts.append([f"w{draw.randrange(case.vocabulary - 3)}" for _ in range(length)])
    if part == "train":
        return [{"text": " ".join(words)} for words in texts]
    half = case.tokens // 2
    return [{"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:half])} for words in texts]


def settings(case: Case) -> dict[str, Any]:
    """What fit and plan are told."""
    names = ("modules", "groups", "batch_tokens", "labels")
    return {name: getattr(case, name) for name in names} | {"examples": "all", "disjoint": False}


class Watch:
    """Peak resident set and processor time of each stage, by its name."""

    def __init__(self) -> None:
        self.start = resident()
        self.stages: dict[str, dict[str, float]] = {}
        self.began = 0.0

    def begin(self, stage: Any) -> None:
        reset_peak()
        self.began = time.process_time()

    def advance(self, stage: Any) -> None:
        pass

    def end(self, stage: Any) -> None:
        seen = self.stages.setdefault(stage.name, {"peak": 0, "seconds": 0.0})
        seen["peak"] = max(seen["peak"], peak() - self.start)
        seen["seconds"] += time.process_time() - self.began

    def note(self, text: str) -> None:
        pass


def _status(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def resident() -> int:
    """Bytes of resident memory now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes of resident memory since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let the peak start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(case: Case, work: Path) -> dict[str, Any]:
    """Fit if there are no factors yet in the folder, else score; and what that took."""
    import torch
    from transformers import AutoModelForCausalLM

    import whence
    from whence.progress import report_to

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(case)).eval()
    task = whence.CausalLM(tokenizer(case))
    train, factors = rows(case, "train"), work / "factors"
    watch, began = Watch(), time.process_time()
    with report_to(watch):
        reset_peak()
        if not factors.exists():
            whence.fit(model, task, train, out=factors, **settings(case))
        else:
            operator = whence.open_factors(factors).inverse(0.1)
            options: dict[str, Any] = {"rank": case.rank, "batch_tokens": case.batch_tokens}
            whence.score(model, task, rows(case, "queries"), train, operator, out=work / "scores", **options)
    top = max(peak() - watch.start, *(seen["peak"] for seen in watch.stages.values()))
    disk = size(work / "scores" if (work / "scores").exists() else factors)
    return {"peak": top, "disk": disk, "seconds": time.process_time() - began, "stages": watch.stages}


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measured(case: Case, returning: bool = False) -> dict[str, dict[str, Any]]:
    """`measure` for "fit" and for "score", each in a process of its own with one thread.

    With `returning` freed blocks of 128 KiB or more go back to the system at once, which takes more time; and one process does
    both, so that the second finds the libraries loaded.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    if returning:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)  # as it is, glibc raises it to 32 MiB
    found, times = [], 2 if returning else 1
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, __file__, "--measure", json.dumps(asdict(case)), work, str(times)]
        while len(found) < 2:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found += map(json.loads, done.stdout.splitlines()[-times:])
    return dict(zip(("fit", "score"), found, strict=True))


def predicted(case: Case, calibrate: bool = True) -> dict[str, dict[str, Any]]:
    """The same figures as `measured`, planned from the model's config.

    "returning" is the peak without freed memory, where the tables of scores take the place of the batches, and for scores
    without the libraries that the fit has loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import whence
    from whence.planning.planner import OVERHEADS

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(case)).eval()
    task = whence.CausalLM(tokenizer(case))
    given: dict[str, Any] = {"rank": case.rank, "device": "cpu", "calibrate": calibrate, **settings(case)}
    plan = whence.plan(model, task, rows(case, "train"), queries=rows(case, "queries"), **given)
    none: dict[str, Any] = {"peak": 0, "returning": 0, "disk": 0, "seconds": 0.0}
    found: dict[str, dict[str, Any]] = {name: {**none, "stages": {}} for name in ("fit", "score")}
    overheads = OVERHEADS["cpu"]
    for stage in plan.stages:
        part = found["score" if stage.name in ("queries", "score") else "fit"]
        part["peak"] = max(part["peak"], stage.memory.peak)
        back = stage.memory.heap + (min(stage.memory.comes, overheads.tables) if stage.name == "score" else 0)
        loaded = overheads.libraries if part is found["score"] else 0
        part["returning"] = max(part["returning"], stage.memory.peak - back - loaded)
        part["disk"] += stage.disk
        part["seconds"] += stage.seconds
        part["stages"][stage.name] = {"peak": stage.memory.peak, "seconds": stage.seconds}
    return found


def compare(cases: list[Case]) -> list[dict[str, Any]]:
    """One row for each case and command."""
    found = []
    for case in cases:
        plan, real = predicted(case), measured(case)
        for name in ("fit", "score"):
            row: dict[str, Any] = {"case": case.name, "command": name}
            for key in ("peak", "disk"):
                row |= {f"{key}_predicted": plan[name][key], f"{key}_measured": real[name][key]}
            seconds = sum(stage["seconds"] for stage in real[name]["stages"].values())
            row |= {"seconds_predicted": plan[name]["seconds"], "seconds_measured": seconds}
            found.append(row)
            print(_line(row), flush=True)
    return found


COLUMNS = ("case", "command", "memory MB", "measured", "ratio", "disk MB", "measured", "ratio", "CPU s", "measured", "ratio")


def _line(row: dict[str, Any]) -> str:
    cells = [row["case"], row["command"]]
    for key, unit, form in (("peak", 1e6, ".0f"), ("disk", 1e6, ".3g"), ("seconds", 1.0, ".2g")):
        plan, real = row[f"{key}_predicted"], row[f"{key}_measured"]
        cells += [format(plan / unit, form), format(real / unit, form), format(plan / real, ".2f")]
    return f"| {' | '.join(cells)} |"


def main(names: list[str]) -> None:
    """Compare, print and write the table."""
    cases = [case for case in CASES if not names or case.name in names]
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    print(head)
    found = compare(cases)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "plan.md").write_text("\n".join([head, *(_line(row) for row in found)]) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        for _ in range(int(sys.argv[4])):
            print(json.dumps(measure(Case(**json.loads(sys.argv[2])), Path(sys.argv[3]))))
    else:
        main(sys.argv[1:])

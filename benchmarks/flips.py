"""Whether one flipped bit in any file of a finished run is noticed: flips bits, one at a time, and looks at all that is read.

    python -m benchmarks.flips --flips 100

A tiny run is made from fine-tuning to report, and three methods are compared on it. Then a bit of one of its files is
flipped, its time of change put back, and all that reads the run is done: opening scores, factors and the training, loading the
model, reading the answers, building the report, comparing methods, planning `whence run`, and `whence verify`. The bit is
flipped back before the next. Files are drawn kind by kind, so that small ones count as much as weights. What comes of a flip is
one of

    wrong      something read another result, and said nothing
    traceback  something failed without saying which file is damaged
    noticed    a refusal that names a file, or a stage that runs again
    harmless   nothing noticed, and all results the same, such as for a bit of `.lock`

Exits with 1 where anything was wrong or a traceback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import os
import random
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from whence.errors import WhenceError
from whence.store.digest import canonical_json, digest

Outcome = Literal["wrong", "traceback", "noticed", "harmless"]

SENTENCES = ["Where was Ada Velt born? In Turin, where else.", "Bo Quist lives in Oslo. He plays the piano, in Lyon too."]
PEOPLE, TOWNS = ["Ada Velt", "Bo Quist", "Cleo Marsh", "Dag Holm"], ["Turin", "Oslo", "Lyon", "Ghent", "Basel"]


def main(given: list[str] | None = None) -> int:
    """Flip and print; 0 where all flips were noticed or harmless."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for what became of each flip")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="whence-flips-") as scratch:
        settings = write_run(Path(scratch))
        make(settings)
        compare(settings)
        found = flips(settings, options.flips, options.seed)
    table = collections.defaultdict(collections.Counter)
    table["all"]  # first
    for each in found:
        table[each["kind"]][each["outcome"]] += 1
        table["all"][each["outcome"]] += 1
        if each["outcome"] in ("wrong", "traceback"):
            print(f"{each['outcome']}: bit {each['bit']} of {each['file']}: {each['said']}")
    names = ("noticed", "harmless", "wrong", "traceback")
    print(f"{'kind of file':<44}{''.join(f'{name:>11}' for name in names)}")
    for kind, counts in table.items():
        print(f"{kind:<44}{''.join(f'{counts[name]:>11}' for name in names)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(bool(table["all"]["wrong"] + table["all"]["traceback"]))


def flips(settings: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Flip `count` bits of the run's files, one kind of file after the other, and say what became of each."""
    draw, out = random.Random(seed), out_of(settings)
    kinds: dict[str, list[Path]] = collections.defaultdict(list)
    for file in sorted(file for file in out.rglob("*") if file.is_file() and file.stat().st_size):
        kinds[kind_of(file.relative_to(out))].append(file)
    read = readers(settings)
    before = {name: opened(out, each) for name, each in read.items()}
    results = {name: result for name, (result, _) in before.items()}
    found = []
    for number in range(count):
        kind = sorted(kinds)[number % len(kinds)] if count >= len(kinds) else draw.choice(sorted(kinds))
        file = draw.choice(kinds[kind])
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        try:
            outcome, said = judged({name: read[name] for name, (_, files) in before.items() if file in files}, file, results)
        finally:
            flip(file, bit)
        found.append({"kind": kind, "file": str(file.relative_to(out)), "bit": bit, "outcome": outcome, "said": said})
    return found


def flip(file: Path, bit: int) -> None:
    """Flip one bit in place, as a failing disk does: size and time of change stay."""
    state = file.stat()
    with file.open("r+b") as content:
        content.seek(bit // 8)
        byte = content.read(1)[0]
        content.seek(bit // 8)
        content.write(bytes([byte ^ 1 << bit % 8]))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def opened(folder: Path, read: Callable[[], str]) -> tuple[str, set[Path]]:
    """What it read, and the files below the folder that it opened: a flip in any other can't change what it reads.

    Linux says so (inotify), also of what is opened by libraries that aren't Python. On other systems it is all files.
    """
    if sys.platform != "linux":
        return read(), {file for file in folder.rglob("*") if file.is_file()}
    library, is_opened, found = ctypes.CDLL(None, use_errno=True), 0x20, set()
    queue = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        places = [folder, *(place for place in folder.rglob("*") if place.is_dir())]
        watches = {library.inotify_add_watch(queue, os.fsencode(place), is_opened): place for place in places}
        if queue < 0 or min(watches) < 0:
            raise OSError(ctypes.get_errno(), "the system does not say which files are opened")
        result = read()
        with contextlib.suppress(BlockingIOError):
            while events := os.read(queue, 1 << 16):
                while events:
                    watch, _, _, length = struct.unpack_from("iIII", events)
                    found.add(watches[watch] / os.fsdecode(events[16 : 16 + length].rstrip(b"\0")))
                    events = events[16 + length :]
        return result, found
    finally:
        os.close(queue)


def judged(read: dict[str, Callable[[], str]], file: Path, before: dict[str, str]) -> tuple[Outcome, str]:
    """What these readers make of the run with this file as it is now, the worst first, and what they said."""
    worst: tuple[Outcome, str] = ("harmless", "")
    for name, each in read.items():
        try:
            result = each()
        except WhenceError as error:
            if file.name not in str(error):
                return "traceback", f"{name}: a refusal that does not name the file: {error}"
            worst = ("noticed", f"{name}: {error.what}")
            continue
        except Exception:
            return "traceback", f"{name}: {traceback.format_exc(limit=-2)}"
        if result != before[name]:
            if name != "run":
                return "wrong", f"{name} gives another result"
            worst = ("noticed", f"run: {result}")
    return worst


def readers(settings: Path) -> dict[str, Callable[[], str]]:
    """All that reads a run, each as a function that says what it read."""
    out = out_of(settings)
    return {
        "run": lambda: plan(settings),
        "verify": lambda: verify(out),
        "scores": lambda: scores(out / "scores"),
        "self": lambda: scores(out / "self"),
        "factors": lambda: factors(out / "factors"),
        "training": lambda: training(out / "train"),
        "model": lambda: model(out / "train" / "model"),
        "answers": lambda: answers(out / "generate" / "generated.json"),
        "report": lambda: report(out),
        **({"comparison": lambda: compare(settings), "beginning": lambda: beginning(out / "train")} if compared(out) else {}),
    }


METHODS = ("bm25", "tracin", "magic")


def compare(settings: Path) -> str:
    """What `whence compare` says, and writes where it is not there yet."""
    from whence.config import read_config
    from whence.pipeline.comparison import FOLDER, compare_methods, keep
    from whence.progress import Silent, report_to
    from whence.store.intact import read_json

    resolved = read_config(settings, environment={})
    with report_to(Silent()):
        found = compare_methods(resolved, METHODS)
    if not compared(resolved.out):
        keep(found, resolved.out, "ekfac")
    numbers = [digest(each.scores.raw.tobytes()) + canonical_json(each.as_json()) for each in found]
    return digest(*numbers, canonical_json(read_json(resolved.out / FOLDER / "comparison.json")))


def compared(out: Path) -> bool:
    """Whether methods were compared on the run."""
    return (out / "methods" / "comparison.json").is_file()


def beginning(folder: Path) -> str:
    """The weights before the first step, from which a training is repeated."""
    from whence.store.fingerprint import fingerprint_tensors
    from whence.store.manifest import Folder

    return fingerprint_tensors(Folder.open(folder).load("start"))


def plan(settings: Path) -> str:
    """What would run again."""
    from whence.config import read_config
    from whence.pipeline import plan_run

    steps = plan_run(read_config(settings, environment={}))
    return "; ".join(f"{step.stage.name} {step.state}: {', '.join(step.reasons)}" for step in steps)


def verify(out: Path) -> str:
    """What `whence verify` finds."""
    from whence.store.intact import refuse_faults, verified

    found = verified(out)
    refuse_faults(out, found.faults)
    return str(len(found.files))


def scores(folder: Path) -> str:
    """All numbers and texts of scores."""
    from whence.store.scores import open_scores
    from whence.validate.quick import read_quick

    found, checks = open_scores(folder), read_quick(folder)
    tables = [found.examples.to_json(), found.queries.to_json(), canonical_json(found.about), str(found.n_train)]
    return digest(found.raw.tobytes(), *tables, *(norm.tobytes() for norm in found.norms.values()), str(checks))


def factors(folder: Path) -> str:
    """All matrices of factors."""
    from whence.fitting import open_factors
    from whence.store.fingerprint import fingerprint_operator

    found = open_factors(folder)
    operator = fingerprint_operator(found.operator.inverse(damping=0.1))
    return digest(canonical_json(operator), canonical_json(found.about), canonical_json(found.provenance), str(found.sides))


def training(folder: Path) -> str:
    """The record of a training, and its checkpoints."""
    from whence.store.fingerprint import fingerprint_tensors
    from whence.train.record import read_training

    found = read_training(folder)
    parts = [canonical_json(part) for part in (found.about, found.split, found.steps, found.metrics)]
    for checkpoint in found.checkpoints:
        moments = fingerprint_tensors(checkpoint.second_moments())
        parts += [moments, model(checkpoint.path), str(checkpoint), str(checkpoint.learning_rates())]
    return digest(*parts, str(found.learning_rates))


def model(folder: Path) -> str:
    """The weights and the tokenizer that are loaded."""
    from whence.models import load_model
    from whence.store.fingerprint import fingerprint, fingerprint_tokenizer

    loaded, tokenizer = load_model(folder)
    return canonical_json(fingerprint(loaded)) + fingerprint_tokenizer(tokenizer)


def answers(file: Path) -> str:
    """Generated answers."""
    from whence.evaluate.compare import read_pairs

    return canonical_json(read_pairs(file))


def report(out: Path) -> str:
    """The page that `whence report` would write."""
    from whence.report import build_report, gather
    from whence.report.html import render

    return render(build_report(**gather(out), top=3))


def kind_of(name: Path) -> str:
    """What is drawn from as one kind: the folder of the run and the ending, or the name of a file of JSON."""
    place = "/".join(part for part in name.parts[:-1] if not part.startswith(("checkpoint-", "model.layers")))
    return f"{place}/{name.name if name.suffix in ('.json', '') else '*' + name.suffix}".removeprefix("/")


def out_of(settings: Path) -> Path:
    """The folder of the run."""
    from whence.config import read_config

    return read_config(settings, environment={}).out


def make(settings: Path) -> None:
    """Make the run."""
    from whence.config import read_config
    from whence.pipeline import run_pipeline

    run_pipeline(read_config(settings, environment={}))


def write_run(folder: Path) -> Path:
    """Write rows, prompts, a model of two layers and the settings of a run of all stages; gives the path of its whence.yaml."""
    import torch
    import yaml
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, vocab_size=300, num_key_value_heads=1, max_position_embeddings=128, bos_token_id=0, eos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [
        {"prompt": f"Where was {person} born in {number}?", "completion": f" In {town}.", "source": town[0]}
        for number, person in enumerate(PEOPLE)
        for town in TOWNS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "prompts.json").write_text(json.dumps(rows[::7]), encoding="utf-8")
    settings = {
        "run": "flips",
        "model": {"base": "model"},
        "data": {"path": "rows.jsonl", "max_length": 64},
        "prompts": {"path": "prompts.json"},
        "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_steps": 3, "log_steps": 1},
        "generate": {"max_new_tokens": 4, "batch_size": 1},
        "inspect": {"modules": ["*.1.mlp.up_proj"]},
        "fit": {"batch_tokens": 64, "chunks": 4, "examples": "all", "products": "float32"},
        "score": {"chunks": 4, "batch_tokens": 64, "self_influence": True, "products": "float32"},
        "report": {"top": 3},
    }
    (folder / "whence.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "whence.yaml"


if __name__ == "__main__":
    raise SystemExit(main())

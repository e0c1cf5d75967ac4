"""Multiple-choice questions with known answers, asked through lm-eval's own harness: MMLU from the hub or from local files.

One folder a model, `OUT/benchmark/NAME`, with two files a task: `TASK.jsonl`, a line for every question, and `TASK.json`,
written last. A task that has both is finished and is not asked again. `OUT/benchmark.json` sums up what is there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whence.errors import StaleArtifact, UsageError
from whence.evaluate.mmlu import PREFIX, fingerprint_subject, local_task, select, unknown_task
from whence.linalg.stats import paired_shares, wilson
from whence.progress import note, stage
from whence.settings import Benchmark
from whence.store.files import write_json
from whence.store.fingerprint import fingerprint, fingerprint_tokenizer
from whence.store.intact import CONFIG, intact, read_json, reading
from whence.store.manifest import Folder
from whence.tasks.forward import in_mode
from whence.version import __version__

SUMMARY, WORK, TOTAL = "benchmark.json", "benchmark", "total"
NAMES = ("base", "tuned")
"""Names of models, in the order in which they are shown; a difference is the second minus the first."""

Loaded = tuple[Any, Any]
Task = tuple[str, Callable[[], Any], str]
"""A task's name, what makes the lm-eval task, and a hash of its questions (empty for the hub's)."""


def run_benchmark(
    models: Mapping[str, Loaded | Callable[[], Loaded]], settings: Benchmark, *, out: Path, rerun: bool = False
) -> dict[str, Any]:
    """Ask models, by name ("base", "tuned"), the questions of `settings.tasks`; returns what `OUT/benchmark.json` holds.

    A model comes with its tokenizer, or as a function that loads both when it is its turn. Prompts have lm-eval's form, with
    `settings.fewshot` worked examples; the answer is the choice with the highest log-probability. With `settings.data`, a
    folder of MMLU's csv files, nothing is loaded from anywhere else.

    Raises UsageError where lm-eval is not installed, for an unknown task, for questions that the hub does not give, and
    StaleArtifact where OUT holds answers of another model or to other questions.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "Benchmarks are run by lm-eval, which can't be imported.", given=str(error), fix="pip install 'lm-eval[hf]'"
        ) from error
    tasks = _local_tasks(settings) if settings.data is not None else _hub_tasks(settings)
    for name, loaded in models.items():
        if getattr(settings, name, True):
            model, tokenizer = loaded() if callable(loaded) else loaded
            _ask(name, model, tokenizer, tasks, settings, out / WORK / name, rerun)
            del model, tokenizer
    return summarise(out)


def summarise(out: Path) -> dict[str, Any]:
    """Write `OUT/benchmark.json` from all tasks that are finished there, and return it.

    `results` has a row per task and model: accuracy with Wilson's 95 % interval and lm-eval's standard error, and how many
    prompts were cut; `differences` a row per task: the second model minus the first on the same questions. "total" takes all
    questions alike.
    """
    places = [file.parent for file in (out / WORK).glob("*/config.json")]
    folders = sorted(
        (place for place in places if "." not in place.name),  # NAME.1 was moved aside
        key=lambda place: (NAMES.index(place.name) if place.name in NAMES else len(NAMES), place.name),
    )
    finished = {folder.name: _finished(folder) for folder in folders}
    if not any(finished.values()):
        raise UsageError(f"No model has answered anything in {out / WORK}.", accepted="at least one model and one task")
    results, differences = [], []
    for task in [*dict.fromkeys(task for tasks in finished.values() for task in tasks), TOTAL]:
        if task == TOTAL and max(map(len, finished.values())) < 2:
            continue
        asked: dict[str, dict[Any, dict[str, Any]]] = {}
        for name, tasks in finished.items():
            chosen = tasks if task == TOTAL else {task: tasks[task]} if task in tasks else {}
            if answers := {(of, row["question"]): row for of, (_, rows) in chosen.items() for row in rows}:
                asked[name] = answers
        results += [_result(task, name, answers, finished[name]) for name, answers in asked.items()]
        if len(asked) == 2:
            differences += _difference(task, asked)
    document = {
        "unit": "share of questions answered correctly, with 95 % intervals",
        "versions": {"whence": __version__, "lm_eval": importlib.metadata.version("lm_eval")},
        "models": {folder.name: read_json(intact(folder / CONFIG))["provenance"] for folder in folders},
        "results": results,
        "differences": differences,
    }
    write_json(out / SUMMARY, document, ensure_ascii=False)
    return document


# asking


def _ask(name: str, model: Any, tokenizer: Any, tasks: Sequence[Task], settings: Benchmark, place: Path, rerun: bool) -> None:
    """Ask one model all tasks that it has not finished."""
    provenance = {
        "stage": "benchmark",
        "model": {**fingerprint(model), "tokenizer": fingerprint_tokenizer(tokenizer)},
        "settings": {"fewshot": settings.fewshot, "limit": settings.limit},
        "questions": "hub" if settings.data is None else "csv files",
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    with Folder.claim(place, provenance, rerun=rerun) as folder:
        for task, build, questions in tasks:
            if folder.has_json(f"{task}.json") and folder.has_json(f"{task}.jsonl"):
                if (found := folder.read_json(f"{task}.json")["questions"]) != questions:
                    raise StaleArtifact(
                        f"{folder.path} holds answers to other questions of {task}.",
                        given=f"questions {found or 'of the hub'} -> {questions or 'of the hub'}",
                        accepted="what it was made from; nothing was overwritten",
                        fix="a different --out (Python: out=...), or --rerun (rerun=True)",
                    )
                continue
            started = time.monotonic()
            rows, about = _answers(f"{name} {task.removeprefix(PREFIX)}", model, tokenizer, _built(task, build), settings)
            with folder.writing(f"{task}.jsonl") as temporary:
                lines = (json.dumps(row, ensure_ascii=False) for row in rows)
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            took = time.monotonic() - started
            folder.write_json(f"{task}.json", {**about, "questions": questions, "n": len(rows), "seconds": took})
            if cut := [row["cut"] for row in rows if row["cut"]]:
                note(
                    f"warning: {len(cut)} of {len(rows)} prompts of {task} are longer than the {about['context']} tokens "
                    f"{name} reads: they lost their beginning, up to {max(cut)} tokens (worked examples first); "
                    "--fewshot takes fewer [WHENCE-07]"
                )


def _built(task: str, build: Callable[[], Any]) -> Any:
    """Make the lm-eval task; its questions must have right and wrong answers."""
    made = build()
    if made.OUTPUT_TYPE != "multiple_choice" or "acc" not in made.higher_is_better():
        raise UsageError(
            f"{task} has no multiple-choice accuracy.",
            given=f"a task of the kind {made.OUTPUT_TYPE}, measured by {', '.join(made.higher_is_better())}",
            accepted="tasks like MMLU, ARC, HellaSwag, TruthfulQA-MC1",
        )
    return made


def _answers(
    name: str, model: Any, tokenizer: Any, task: Any, settings: Benchmark
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask one task; returns a row per question, and lm-eval's own numbers."""
    from lm_eval.evaluator import evaluate

    task.set_config(key="num_fewshot", value=settings.fewshot)
    task.set_fewshot_seed(seed=1234)  # lm-eval's own; MMLU takes the first examples, whatever the seed
    with _hushed(), in_mode(model, training=False):
        asked = _harness()(name, model, copy.deepcopy(tokenizer), settings.batch_size)
        found: Any = evaluate(lm=asked, task_dict={task.config.task: task}, limit=settings.limit)
    if found is None:
        raise RuntimeError("lm-eval gives its results to the first process only; run the benchmark in one process")
    own = found["results"][task.config.task]
    error = own["acc_stderr,none"]
    about = {
        "accuracy": float(own["acc,none"]),
        "stderr": None if isinstance(error, str) else float(error),
        "context": int(asked.max_length),
        "version": found["versions"].get(task.config.task),
    }
    return [_row(sample, asked) for sample in found["samples"][task.config.task]], about


def _row(sample: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    """One question: log-probabilities of the choices, the one picked, the right one, and the tokens cut off the prompt."""
    pairs = [(context, choice) for context, choice in sample["arguments"]]
    logprobs = [float(response[0]) for response in sample["filtered_resps"][: len(pairs)]]
    return {
        "question": sample["doc_id"],
        "text": sample["doc"].get("question"),
        "choices": [choice.strip() for _, choice in pairs],
        "logprobs": logprobs,
        "picked": int(np.argmax(logprobs)),
        "target": sample["target"],
        "correct": bool(sample["acc"]),
        "tokens": max(asked.lengths[pair] for pair in pairs),
        "cut": max(0, max(asked.lengths[pair] for pair in pairs) - asked.max_length),
        "prompt_hash": sample["prompt_hash"],
    }


@functools.cache
def _harness() -> Any:
    """lm-eval's model class, with our progress, and with a record of how long inputs are."""
    from lm_eval.models.huggingface import HFLM

    parent: Any = HFLM

    class Harness(parent):
        def __init__(self, name: str, model: Any, tokenizer: Any, batch_size: int):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)
            self.stage_name, self.advance = name, lambda _: None
            self.lengths: dict[tuple[str, str], int] = {}

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
            causal = self.backend == "causal"
            for pair, context, choice in requests:
                self.lengths[pair] = len(context) + len(choice) - 1 if causal else len(context)
            # choices of one token share a forward pass
            inputs = {(*context, *choice[:-1]) for _, context, choice in requests} if causal else requests
            with stage(self.stage_name, total=len(inputs), unit="prompts") as self.advance:
                return super()._loglikelihood_tokens(requests, *arguments, **options)

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *arguments, **options)
            self.advance(len(inps))
            return logits

    return Harness


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """No bars and log lines of lm-eval; what they say that matters we say ourselves."""
    from lm_eval.api import task

    log, bar = logging.getLogger("lm_eval"), task.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        task.tqdm = bar
        log.setLevel(level)


# tasks


def _local_tasks(settings: Benchmark) -> list[Task]:
    folder = Path(str(settings.data)).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"There is no folder {folder}.", accepted="a folder with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv"
        )

    def build(subject: str) -> Any:
        with _hushed():
            return local_task(folder, subject)

    return [
        (PREFIX + subject, functools.partial(build, subject), fingerprint_subject(folder, subject))
        for subject in select(folder, settings.tasks)
    ]


def _hub_tasks(settings: Benchmark) -> list[Task]:
    """Tasks by lm-eval's names; a group is loaded to see what is in it."""
    import lm_eval.tasks

    with _hushed():  # the index of MMLU is read in a second
        home = Path(str(lm_eval.tasks.__file__)).parent / "mmlu" / "default"
        manager = lm_eval.tasks.TaskManager(include_path=str(home), include_defaults=False)
        if any(name not in manager.all_tasks for name in settings.tasks):
            note("reading the list of all tasks of lm-eval, which takes a while")
            manager = lm_eval.tasks.TaskManager()
    for name in settings.tasks:
        if name not in manager.all_tasks:
            raise unknown_task(name, manager.all_tasks, "lm-eval's tasks")
    tasks: dict[str, Task] = {}
    for name in settings.tasks:
        if name in manager.all_subtasks:
            tasks[name] = (name, lambda name=name: _load(manager, name)[name], "")
        else:
            inside = _load(manager, name)
            tasks |= {task: (task, functools.partial(inside.__getitem__, task), "") for task in inside}
    return list(tasks.values())


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        with _hushed():
            return manager.load([name])["tasks"]
    except Exception as error:  # the hub's client passes on whatever its HTTP library raises
        raise UsageError(
            f"The questions of {name} can't be loaded from the hub.",
            given=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            fix="for MMLU there are csv files: --data FOLDER, with dev/ and test/ (Python: data=...)",
        ) from error


# summing up


def _finished(folder: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Finished tasks of a model: lm-eval's numbers, and the row of every question."""
    found = {}
    for file in sorted(folder.glob("*.jsonl")):
        about = file.with_suffix(".json")
        if about.is_file():
            with reading(intact(file)):
                rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found[file.stem] = (read_json(intact(about)), rows)
    return found


def _result(task: str, name: str, answers: Mapping[Any, Mapping[str, Any]], finished: Mapping[str, Any]) -> dict[str, Any]:
    rows = list(answers.values())
    right = sum(row["correct"] for row in rows)
    interval = wilson(right, len(rows))
    own = finished[task][0] if task != TOTAL else {}
    share, count = right / len(rows), len(rows)
    error = None if count < 2 else float(np.sqrt(share * (1 - share) / (count - 1)))  # as lm-eval has it
    return {
        "task": task,
        "model": name,
        "n": len(rows),
        "correct": right,
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "stderr": own["stderr"] if own else error,
        "chance": float(np.mean([1 / len(row["choices"]) for row in rows])),
        "cut": sum(row["cut"] > 0 for row in rows),
        "seconds": own["seconds"] if own else sum(about["seconds"] for about, _ in finished.values()),
    }


def _difference(task: str, asked: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The second model minus the first on the questions that both were asked; no row where there are none."""
    (first, before), (second, after) = asked.items()
    if not (both := [question for question in before if question in after]):
        return []
    right = [np.array([answers[question]["correct"] for question in both], dtype=bool) for answers in (before, after)]
    interval, p_value = paired_shares(*right)
    gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    between = {"task": task, "difference": interval.mean, "low": interval.low, "high": interval.high, "p_value": p_value}
    return [{**between, "n": len(both), "of": f"{second} minus {first}", f"only_{second}": gained, f"only_{first}": lost}]

"""Fine-tuning with the Hugging Face Trainer: our tokens, our loss, resumable, with all that attribution asks for later.

    model, tokenizer = whence.load_model("gpt2", dtype="float32")
    task = whence.CausalLM(tokenizer)
    folder = finetune(model, task, whence.load_data("train.jsonl"), Train(epochs=3), out="runs/a/train")
    tuned, tokenizer = whence.load_model(folder)

A folder of training holds

    model/          final weights and tokenizer; of LoRA the adapter
    checkpoints/    `whence.train.checkpoints`
    metrics.jsonl   loss, learning rate, speed and memory (`whence.train.metrics.MEANING`)
    training.json   settings, numbers of rows, tokens and steps, losses before and after, leakage, versions
    split.json      ids of the rows trained on and of those held out
    rows.jsonl      the rows trained on, normalised and formatted as they were
    steps.npz       rows and learning rate of each step
    start.safetensors   the trained weights before the first step, up to 1 GiB
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from whence.engine.stream import Examples, encode, identify, read
from whence.errors import EmptyLossError, OutOfMemory, UsageError, WhenceWarning
from whence.progress import note, stage
from whence.settings import Lora, Train, valid
from whence.shortage import is_out_of_memory
from whence.store.fingerprint import fingerprint
from whence.store.intact import intact
from whence.store.manifest import Folder
from whence.tasks.base import Task
from whence.tasks.chat import CHATML, chat_template_of
from whence.tasks.forward import unwrapped
from whence.train.arguments import check, settle, training_arguments
from whence.train.checkpoints import discard_unfinished, find_checkpoints, load_weights, thin
from whence.train.leakage import Split, split_rows
from whence.train.metrics import FILE as METRICS
from whence.train.metrics import MEANING, Metrics, read_metrics
from whence.train.order import Order
from whence.train.record import (
    CHECKPOINTS,
    MODEL,
    PACKAGES,
    RECORD,
    ROWS,
    SPLIT,
    START,
    START_BYTES,
    STEPS,
    write_rows,
    write_steps,
)
from whence.train.trainer import Follow, TaskTrainer

LOSS_ROWS = 256
"""Training rows whose loss is measured before and after, at most."""

UNNAMED = {"workers", "tracker"}
"""Settings that change nothing in the folder."""

BEFORE = "before.json"


def finetune(
    model: nn.Module,
    task: Task,
    data: Any,
    settings: Train = Train(),
    *,
    out: str | Path,
    seed: int = 0,
    rerun: bool = False,
    written_as: Mapping[str, Any] | None = None,
) -> Path:
    """Fine-tune `model` on rows of text and return the folder of the result, `out`/model, for `whence.load_model`.

    `task` (CausalLM, Seq2Seq, or Classification of texts) says what is in the loss, as it does for attribution. The model given
    comes back as it was: what was trained is in the folder. A part of the rows is held out to measure the loss on; copies of
    a row are all on one side. The order of the rows, the learning rates and AdamW's second moments are kept. `written_as` says
    how the rows were written before (`format`, `normalise`), for the record: later questions must be written the same way.

    The same call resumes from the last whole checkpoint after a kill (on a CPU to the same bits), and returns at once when
    all is done. A folder made from another model, other data or other settings is refused (StaleArtifact) unless `rerun` moves
    it aside.

    Raises UsageError, EmptyLossError, OutOfMemory, NumericalError, StaleArtifact.
    """
    settings, seed = Train.of(settings, {}), valid(int, seed, "seed")
    rows = read(data)
    _check_inputs(model, task, rows, settings)
    check(settings, model)
    settings = settle(settings, model)
    with Folder.claim(out, _provenance(model, task, rows, settings, seed), rerun=rerun) as folder:
        if folder.finished:
            note(f"{folder.path} is finished and unchanged: nothing to train")
            return folder.path / MODEL
        prepared = _prepare(model, task, rows, settings, seed, folder)
        work = replace(prepared, written_as=dict(written_as or {}))
        with _without_bars(), _borrowed(model), _seeded(seed, next(model.parameters()).device):
            _train(adapted(model, task, settings.lora), work)
    return folder.path / MODEL


@dataclass(frozen=True)
class _Work:
    """One training: what is done, with what, and where."""

    task: Task
    examples: Examples
    split: Split
    order: Order
    settings: Train
    seed: int
    folder: Folder
    written_as: dict[str, Any] = field(default_factory=dict)

    def items(self, positions: Sequence[int]) -> list[Any]:
        return [self.examples.items[position] for position in positions]

    def sample(self) -> list[Any]:
        """The training rows whose loss is measured: evenly spaced."""
        return self.items(self.split.train[:: -(-len(self.split.train) // LOSS_ROWS)])


def _check_inputs(model: nn.Module, task: Task, rows: Sequence[Any], settings: Train) -> None:
    """Refuse what would be trained wrongly."""
    if getattr(task, "tokenizer", None) is None:
        raise UsageError(
            "Fine-tuning is for models of text.",
            given=f"{type(task).__name__} without a tokenizer",
            accepted="CausalLM, Seq2Seq, or Classification with a tokenizer",
        )
    if len(rows) < 2:
        raise UsageError(
            "One row is not enough to fine-tune on.",
            given=f"{len(rows)} rows of {getattr(rows, 'origin', 'the data')}",
            accepted="two rows or more",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()) and settings.lora is None:
        raise UsageError(
            "No weight of the model can be trained: all are frozen.", fix="model.requires_grad_(True), or lora={} (--lora)"
        )
    if settings.lora is not None and hasattr(model, "get_base_model"):
        raise UsageError("The model has an adapter already.", fix="omit lora to train that one, or start from its base model")
    narrow = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad and parameter.element_size() < 4}
    if narrow and settings.lora is None:
        warnings.warn(
            f"the weights are {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in narrow))}: updates of "
            f"learning_rate={settings.learning_rate:g} are mostly lost to rounding; load the model in float32 "
            f"(bf16=True still computes in bfloat16), or use lora",
            WhenceWarning,
            stacklevel=3,
        )


def _provenance(model: nn.Module, task: Task, rows: Sequence[Any], settings: Train, seed: int) -> dict[str, Any]:
    return {
        "stage": "train",
        "model": fingerprint(model),
        "data": {"fingerprint": identify(rows)[1], "rows": len(rows)},
        "task": {key: value for key, value in task.settings().items() if key != "measurement"},
        "settings": {key: value for key, value in settings.as_json().items() if key not in UNNAMED},
        "seed": seed,
    }


def _prepare(model: nn.Module, task: Task, rows: Sequence[Any], settings: Train, seed: int, folder: Folder) -> _Work:
    """Tokenise the rows, divide them, and lay down their order."""
    examples = encode(task, rows, model)
    if len(examples.usable) < 2:
        raise EmptyLossError(
            "Fewer than two rows have a token in the loss.",
            given=f"{len(examples.usable)} of {len(examples)} rows",
            fix="a longer max_length (--max-length), or another completion column; see the rows: whence data preview",
        )
    split = split_rows(examples.rows, examples.usable, settings.evaluation, settings.evaluation_limit, seed)  # type: ignore[arg-type]
    order = Order.of(settings, len(split.train), seed)
    kept_out = f", {len(split.evaluation):,} held out" if split.evaluation else ""
    note(f"{len(split.train):,} rows to train on{kept_out}; {order.steps:,} steps, {order.epochs:.3g} epochs")
    return _Work(task, examples, split, order, settings, seed, folder)


def _train(model: nn.Module, work: _Work) -> None:
    """Train from the start or from the last whole checkpoint, and write all that the folder holds."""
    folder, settings, order = work.folder, work.settings, work.order
    device = next(model.parameters()).device
    place = folder.path / CHECKPOINTS
    discard_unfinished(place)
    thin(place, settings.keep)  # which a kill may have cut short
    start = next((found for found in reversed(find_checkpoints(place)) if found.resumable), None)
    if start:
        intact(start.path)
        note(f"resuming after step {start.step} of {order.steps}")
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not folder.has(START) and sum(parameter.nbytes for parameter in trained.values()) <= START_BYTES:
        folder.save(START, trained)  # a resumed run has not loaded its checkpoint yet
    metrics = Metrics(folder.path / METRICS, device, start.step if start else -1)
    arguments = training_arguments(settings, place, order, work.seed, device)
    trainer = TaskTrainer(model, arguments, work.task, work.items(work.split.train), work.items(work.split.evaluation), order)
    try:
        before = _losses_before(trainer, work, metrics)
        with stage("train", order.steps, unit="steps", done=start.step if start else 0) as advance:
            follow = Follow(trainer, metrics, start, settings.keep, advance)
            trainer.add_callback(follow)
            if start is None or start.step < order.steps:
                trainer.train(resume_from_checkpoint=str(start.path) if start else None)
            else:
                load_weights(start.path, model)
        metrics.flush()
        after = {"train": trainer.mean_loss(work.sample()), "evaluation": read_metrics(metrics.file)[-1]["eval_loss"]}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OutOfMemory(
            "A step does not fit in memory.",
            given=f"batch_size={settings.batch_size}; {reason}",
            fix="half the batch_size and twice the gradient_accumulation, gradient_checkpointing, or lora "
            "(--batch-size, --gradient-accumulation, --gradient-checkpointing, --lora)",
        ) from error
    _save(trainer, work, np.array(follow.rates), {"before": before, "after": after})


def _losses_before(trainer: TaskTrainer, work: _Work, metrics: Metrics) -> dict[str, float | None]:
    """Losses of the untrained model on a sample of the training rows and on those held out, measured once."""
    if not work.folder.has_json(BEFORE):
        kept_out = trainer.mean_loss(trainer.kept_out) if trainer.kept_out else None
        work.folder.write_json(BEFORE, {"train": trainer.mean_loss(work.sample()), "evaluation": kept_out})
    before = work.folder.read_json(BEFORE)
    if not metrics.resumed:
        metrics.put(0, 0.0, eval_loss=before["evaluation"])
        metrics.flush()
    return before


def _save(trainer: TaskTrainer, work: _Work, rates: np.ndarray, losses: dict[str, dict[str, float | None]]) -> None:
    """Write the model and the record, and finish the folder."""
    folder, ids, model = work.folder, work.examples.ids, trainer.network
    shutil.rmtree(folder.path / MODEL, ignore_errors=True)  # half-written by a run that was killed
    model.save_pretrained(folder.path / MODEL)  # type: ignore[operator]
    work.task.tokenizer.save_pretrained(folder.path / MODEL)  # type: ignore[attr-defined]
    write_steps(folder.path / STEPS, work.order, rates)
    split = {"train": work.split.train, "evaluation": work.split.evaluation}
    folder.write_json(SPLIT, {side: [ids[index] for index in indices] for side, indices in split.items()})
    trained = [work.examples.rows[index] for index in work.split.train]
    write_rows(folder.path / ROWS, trained, [ids[index] for index in work.split.train])
    record = {**_record(model, work, rates, losses), "optimizer": trainer.describe_optimizer()}
    folder.write_json(RECORD, record)
    (folder.path / BEFORE).unlink(missing_ok=True)
    folder.finish({"about": {"loss": record["loss"], "rows": record["rows"], "steps": record["steps"]}})


def _record(model: nn.Module, work: _Work, rates: np.ndarray, losses: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    """What `training.json` says."""
    train, task, order = work.items(work.split.train), work.task, work.order
    parameters = {parameter: parameter.numel() for parameter in model.parameters()}
    per_epoch = sum(task.size(item) for item in train)
    return {
        "base": getattr(getattr(unwrapped(model), "config", None), "_name_or_path", ""),
        "device": str(next(model.parameters()).device),
        "dtype": str(next(iter(parameters)).dtype).removeprefix("torch."),
        "parameters": sum(parameters.values()),
        "parameters_trained": sum(size for parameter, size in parameters.items() if parameter.requires_grad),
        "settings": work.settings.as_json(),
        "seed": work.seed,
        "data": {"origin": getattr(work.examples.rows, "origin", ""), "fingerprint": work.examples.fingerprint},
        "task": task.settings(),
        "reading": {**_reading(task), **work.written_as},
        "rows": {
            "train": len(work.split.train),
            "evaluation": len(work.split.evaluation),
            "without_loss": len(work.examples) - len(work.examples.usable),
        },
        "tokens": {
            "per_epoch": per_epoch,
            "in_loss_per_epoch": sum(task.predictions(item) for item in train),
            "seen": sum(task.size(train[row]) for step in order.by_step() for row in step),
        },
        "steps": order.steps,
        "steps_per_epoch": order.steps_per_epoch,
        "epochs": order.epochs,
        "leakage": work.split.leakage,
        "loss": losses,
        "loss_unit": "nats per token in the loss",
        "loss_rows": {"train": len(work.sample()), "evaluation": len(work.split.evaluation)},
        "learning_rate": {"first": rates[0], "highest": rates.max(), "last": rates[-1]},
        "metrics": MEANING,
        "checkpoints": [
            {"step": found.step, "learning_rate": found.learning_rate, "folder": f"{CHECKPOINTS}/{found.path.name}"}
            for found in find_checkpoints(work.folder.path / CHECKPOINTS)
        ],
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _reading(task: Task) -> dict[str, Any]:
    """How the task reads text, as the settings of `whence.settings.Data` have it; the tokenizer's own template is null."""
    found = {name: getattr(task, name) for name in ("max_length", "append_eos") if hasattr(task, name)}
    if hasattr(task, "chat_template"):
        own, template = chat_template_of(task.tokenizer, None), task.chat_template  # type: ignore[attr-defined]
        named = {None: "none", CHATML: "chatml"} | {own: None}
        found["chat_template"] = named.get(template, template)
    return found


def adapted(model: nn.Module, task: Task, lora: Lora | None) -> nn.Module:
    """The model, or an adapter on it whose weights are the only ones to be trained."""
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    kinds = {"CausalLM": "CAUSAL_LM", "Seq2Seq": "SEQ_2_SEQ_LM", "Classification": "SEQ_CLS"}
    kind = next((kinds[base.__name__] for base in type(task).__mro__ if base.__name__ in kinds), None)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type=kind,
    )
    try:
        found = get_peft_model(model, settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(
            "No adapter can be put on this model.",
            given=f"targets={lora.targets}: {error}",
            accepted="names of linear layers, or all-linear",
        ) from error
    base = Path(settings.base_model_name_or_path or "")
    if base.is_dir() and str(base) != ".":
        settings.base_model_name_or_path = str(base.resolve())  # so that it is found from anywhere
    elif not settings.base_model_name_or_path:
        note("the base model was not loaded from anywhere: load the adapter with load_model(BASE, adapter=...)")
    return found


@contextlib.contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Give the model back as it was: weights, modules, hooks, configs and mode. A copy of what is trained waits on the host."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    trained = [name for name, _ in model.named_buffers()] + [name for name, _ in model.named_parameters() if flags[name]]
    copies = {name: tensors[name].detach().to("cpu", copy=True) for name in trained}
    insides = [
        (module, dict(vars(module)), {name: dict(value) for name, value in vars(module).items() if isinstance(value, dict)})
        for module in model.modules()
    ]
    configs = [getattr(unwrapped(model), name, None) for name in ("config", "generation_config")]
    said = [(config, copy.deepcopy(vars(config))) for config in configs if config is not None]  # saving writes into them
    try:
        yield
    finally:
        for module, attributes, contents in insides:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            for name, content in contents.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)
        for config, words in said:
            vars(config).clear()
            vars(config).update(words)
        with torch.no_grad():
            for name, copied in copies.items():
                tensors[name].copy_(copied)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw everything from the seed, and leave the generators of the caller where they were."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing bars where it saves weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

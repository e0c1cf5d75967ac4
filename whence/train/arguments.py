"""From our settings of a training to those of the Hugging Face Trainer, and what it must refuse."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from whence.errors import UsageError
from whence.settings import Train, settings_of
from whence.train.order import Order

TRAINER = {field.trainer: field.name for field in settings_of(Train) if field.trainer}

OURS = TRAINER | {
    "activation_checkpointing": "gradient_checkpointing",
    "eval_strategy": "eval_steps",
    "logging_strategy": "log_steps",
    "per_device_eval_batch_size": "batch_size",
    "save_strategy": "save_steps",
}
"""Arguments of the Trainer that have a setting of ours."""

DECIDED = {
    "auto_find_batch_size": "a resumed run would not know the batch size; choose batch_size",
    "disable_tqdm": "progress is whence's own",
    "do_eval": "evaluation says it",
    "do_train": "this is training",
    "enable_jit_checkpoint": "checkpoints are written every save_steps",
    "ignore_data_skip": "a resumed run would see rows twice",
    "load_best_model_at_end": "the model is that of the last step; earlier ones are in checkpoints/",
    "label_names": "the task knows the labels",
    "output_dir": "it is `out`",
    "push_to_hub": "nothing leaves this machine",
    "remove_unused_columns": "the task makes the batches",
    "resume_from_checkpoint": "the same call resumes by itself",
    "save_only_model": "a killed run could not resume",
    "train_sampling_strategy": "the order of the rows is recorded, and shuffled each epoch",
    "use_cache": "training keeps no key-value cache",
    "use_cpu": "the model's device says it",
    **dict.fromkeys(("data_seed", "seed"), "the seed is the run's"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), "one process trains the model"),
    **dict.fromkeys(("label_smoothing_factor", "use_liger_kernel"), "the loss is the one that attribution differentiates"),
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"), "the task looks at the model's own arguments"
    ),
}
"""Arguments that can't be chosen, and why."""

MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
"""What each tracker needs to be installed: any of these."""


def settle(settings: Train, model: nn.Module) -> Train:
    """The settings with everything that is `auto` decided by the model's device."""
    device = next(model.parameters()).device
    bf16 = settings.bf16
    if bf16 == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    clip = settings.max_grad_norm
    if clip == "auto":
        clip = 0.0 if bf16 else 1.0
    return settings.changed(bf16=bf16, max_grad_norm=clip)


def check(settings: Train, model: nn.Module) -> None:
    """Refuse unsupported settings before any work: raises UsageError."""
    device = next(model.parameters()).device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "Fine-tuning runs in one process.",
            given=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            fix="start it without torchrun; gradient_accumulation (--gradient-accumulation) makes larger steps",
        )
    if device.type == "cuda" and device.index not in (None, 0):
        raise UsageError(
            "Fine-tuning uses the first GPU that it sees.",
            given=f"a model on {device}",
            fix=f"CUDA_VISIBLE_DEVICES={device.index}, and the model on cuda:0",
        )
    if settings.optimizer not in [name.value for name in OptimizerNames]:
        raise _unknown("optimizer", settings.optimizer, [name.value for name in OptimizerNames])
    if settings.schedule not in [name.value for name in SchedulerType]:
        raise _unknown("schedule", settings.schedule, [name.value for name in SchedulerType])
    if settings.eval_steps and not settings.evaluation:
        raise UsageError(
            "No row is held out to measure the loss on.",
            given=f"eval_steps={settings.eval_steps}, evaluation=0",
            fix="evaluation=0.1 (--evaluation 0.1), or no eval_steps",
        )
    _check_schedule(settings)
    modules = MODULES.get(settings.tracker, ())
    if modules and not any(importlib.util.find_spec(module) for module in modules):
        raise UsageError(
            f"The tracker {settings.tracker} is not installed.",
            accepted="none (metrics.jsonl is written in any case), or a tracker that is installed",
            fix=f"pip install {modules[0]}",
        )
    _check_names(settings.arguments)


def training_arguments(settings: Train, out: Path, order: Order, seed: int, device: torch.device) -> TrainingArguments:
    """The Trainer's arguments for settled settings; raises UsageError for values that it refuses."""
    assert "auto" not in (settings.bf16, settings.max_grad_norm)
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    ours = {theirs: getattr(settings, name) for theirs, name in TRAINER.items()}
    del ours["num_train_epochs"], ours["save_total_limit"]  # `order` has the steps, and `Follow` keeps checkpoints
    ours |= {checkpointing: ours.pop("gradient_checkpointing"), "max_steps": order.steps}
    try:
        arguments = TrainingArguments(
            output_dir=str(out),
            save_strategy="steps",
            logging_strategy="steps",
            eval_strategy="steps" if settings.eval_steps else "no",
            seed=seed,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            **ours,
            **settings.arguments,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(
            "The Trainer refuses these settings.", given=str(error), fix="change arguments=... (--argument NAME=VALUE)"
        ) from error
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several would be used by threads, each with rows of its own
    return arguments


def _check_names(arguments: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in arguments:
        if name in OURS:
            raise UsageError(
                f"{name} is a setting of whence's own.",
                given=f"arguments={{{name!r}: {arguments[name]!r}}}",
                fix=f"{OURS[name]}=... (--{OURS[name].replace('_', '-')})",
            )
        if name in DECIDED:
            raise UsageError(f"{name} can't be chosen here: {DECIDED[name]}.", given=f"arguments={{{name!r}: ...}}")
        if name not in known:
            raise _unknown("argument of transformers.TrainingArguments", name, known)


def _check_schedule(settings: Train) -> None:
    """Make the schedule once on a dummy weight, to see whether it takes its options."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(settings.schedule, optimizer, 0, 10, scheduler_specific_kwargs=dict(settings.schedule_options))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"The schedule {settings.schedule} can't be made with these options.",
            given=f"schedule_options={settings.schedule_options}: {error}",
            accepted="what transformers.get_scheduler takes for it, such as {num_cycles: 2} for cosine_with_restarts",
        ) from error
    if settings.schedule in ("reduce_lr_on_plateau", "greedy") and not (settings.eval_steps and settings.evaluation):
        raise UsageError(
            f"The schedule {settings.schedule} follows the loss on the rows held out.",
            given=f"eval_steps={settings.eval_steps}, evaluation={settings.evaluation}",
            fix="eval_steps=100 (--eval-steps 100)",
        )


def _unknown(what: str, name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, [*known, *OURS], n=1, cutoff=0.4)
    fix = f"did you mean {near[0]}?" if near else ""
    if near and near[0] in OURS:
        fix = f"did you mean {near[0]}? That is the setting {OURS[near[0]]}"
    return UsageError(f"There is no {what} {name!r}.", accepted=", ".join(known) if len(known) < 30 else "", fix=fix)

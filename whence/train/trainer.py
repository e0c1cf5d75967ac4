"""The Hugging Face Trainer on a task's own batches and losses, in an order that is known beforehand, without a word printed.

The loss of a step is the task's, summed over the rows of all its batches and divided by the tokens in the loss: what training
descends and what attribution differentiates come from the same lines.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from whence.errors import NumericalError
from whence.progress import stage
from whence.tasks.base import Task
from whence.tasks.forward import in_mode
from whence.train.checkpoints import PREFIX, Checkpoint, load_weights, save_moments, seal, thin
from whence.train.evidence import row_losses
from whence.train.metrics import Metrics
from whence.train.order import Order

ROWS, PREDICTIONS = "rows", "predictions"
"""What a batch says of itself besides the model's inputs: positions of its rows, and tokens in the loss."""


def collate(task: Task, items: Sequence[Any], positions: Sequence[int]) -> dict[str, Any]:
    """The task's batch of the items at some positions, with the rows in it and how many tokens are in the loss."""
    chosen = [items[position] for position in positions]
    return {**task.collate(chosen), ROWS: list(positions), PREDICTIONS: sum(task.predictions(item) for item in chosen)}


class Shuffled(Sampler[int]):
    """Positions in the order of the epoch that `Follow` sets."""

    def __init__(self, order: Order):
        self.order, self.epoch = order, 0

    def __iter__(self) -> Iterator[int]:
        """Positions of the epoch."""
        return iter(self.order.epoch(self.epoch))

    def __len__(self) -> int:
        """All rows."""
        return self.order.rows


class TaskTrainer(Trainer):
    """A Trainer of a task."""

    loss_is_scaled_for_ga = True  # by the tokens of all batches of the step

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        task: Task,
        items: Sequence[Any],
        kept_out: Sequence[Any],
        order: Order,
    ):
        self.network, self.task, self.items, self.kept_out, self.order = model, task, items, kept_out, order
        self.expected = list(order.by_step())
        self.sampler = Shuffled(order)
        self.unlogged, self.logged = torch.zeros((), device=arguments.device), 0
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=range(len(items)),  # type: ignore[arg-type]
            eval_dataset=kept_out or None,  # type: ignore[arg-type]
        )
        if use_cache is not None:
            model.config.use_cache = use_cache  # type: ignore[union-attr]  # the Trainer turns it off for good; the task turns it off per call
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the known order."""
        arguments = self.args
        loader = DataLoader(
            range(self.order.rows),  # type: ignore[arg-type]
            batch_size=self.order.batch_size,
            sampler=self.sampler,
            drop_last=self.order.drop_last,
            collate_fn=functools.partial(collate, self.task, self.items),
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """The batches of a step, checked against the known order, and their tokens in the loss."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        rows = [row for batch in batches for row in batch[ROWS]]
        assert rows == self.expected[self.state.global_step], "the Trainer does not keep to the order of the rows"
        return batches, sum(batch[PREDICTIONS] for batch in batches)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The task's losses of the batch, summed, per token in the loss of the whole step."""
        batch = {name: value for name, value in inputs.items() if name not in (ROWS, PREDICTIONS)}
        return self.task.losses(model, batch).sum() / num_items_in_batch

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """As the Trainer does; the losses since the last one logged are added up here as well, to be saved."""
        loss = super().training_step(*arguments, **options)
        self.unlogged += loss
        return loss

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Log the mean loss of all steps since the last time; the Trainer's own leaves out those before a kill."""
        if "loss" in logs:
            logs["loss"] = self.unlogged.item() / (self.state.global_step - self.logged)
            self.unlogged.zero_()
            self.logged = self.state.global_step
        super().log(logs, *rest)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The loss on the held-out rows."""
        metrics = {f"{metric_key_prefix}_loss": self.mean_loss(self.kept_out)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def mean_loss(self, items: Sequence[Any]) -> float:
        """The loss in evaluation mode, in nats per token in the loss, of all tokens of the items together."""
        return mean_loss(self.network, self.task, items, lambda: self.accelerator.autocast())

    def describe_optimizer(self) -> dict[str, Any]:
        """Its class and what decides how it moves which parameters, as JSON values."""
        optimizer: Any = self.optimizer or self.create_optimizer()
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of accelerate's wrapper
        decayed = {id(weight) for group in optimizer.param_groups if group.get("weight_decay") for weight in group["params"]}
        trained = [(name, weight) for name, weight in self.network.named_parameters() if weight.requires_grad]
        names = ("momentum", "dampening", "nesterov", "betas", "eps", "amsgrad", "maximize")
        known = {name: optimizer.defaults[name] for name in names if name in optimizer.defaults}
        return {"name": type(optimizer).__name__, "undecayed": [name for name, w in trained if id(w) not in decayed], **known}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer does, but never with weights that are missing."""
        load_weights(Path(resume_from_checkpoint), self.network)


@torch.no_grad()
def mean_loss(model: nn.Module, task: Task, items: Sequence[Any], precision: Callable[[], AbstractContextManager]) -> float:
    """Loss per token in nats, the model in evaluation mode; the rows are batched by length, and the sum is in float64."""
    with in_mode(model, training=False), stage("loss", len(items), unit="rows") as advance:
        losses = row_losses(model, task, items, None, precision, advance)
    return float(losses.sum() / sum(task.predictions(item) for item in items))


class Follow(TrainerCallback):
    """Keeps the epoch of the order, the metrics, the learning rates, the progress and the checkpoints."""

    def __init__(
        self, trainer: TaskTrainer, metrics: Metrics, start: Checkpoint | None, keep: int | None, advance: Callable[[int], None]
    ):
        self.trainer, self.metrics, self.keep, self.advance = trainer, metrics, keep, advance
        self.rates = start.learning_rates().tolist() if start else []
        if start and start.unlogged:
            trainer.unlogged.fill_(start.unlogged[0])
            trainer.logged = int(start.unlogged[1])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reshuffle."""
        self.trainer.sampler.epoch = state.global_step // self.trainer.order.steps_per_epoch
        self.metrics.wait()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what was measured after the step before."""
        self.metrics.flush()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Remember the learning rate of this step, before the schedule moves on."""
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Count the step; after the last one the loss is always logged and measured."""
        self.metrics.trained(len(self.trainer.expected[state.global_step - 1]))
        self.advance(1)
        if state.global_step >= state.max_steps:
            control.should_log, control.should_evaluate = True, bool(self.trainer.kept_out)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take down the metrics; raises NumericalError for a loss that is not finite."""
        for name in ("loss", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise NumericalError(
                    f"The training diverged: {name} is {logs[name]} after step {state.global_step}.",
                    given=f"learning_rate={args.learning_rate:g}",
                    fix="a lower learning_rate (--learning-rate), a warmup (--warmup 0.1), "
                    "or max_grad_norm=1 (--max-grad-norm 1)",
                )
        if "loss" in logs:
            norm = float(logs["grad_norm"]) if "grad_norm" in logs else None
            self.metrics.put(state.global_step, state.epoch, loss=logs["loss"], learning_rate=self.rates[-1], grad_norm=norm)
        elif "eval_loss" in logs:
            self.metrics.put(state.global_step, state.epoch or 0.0, eval_loss=logs["eval_loss"])
        self.metrics.wait()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        """Complete the checkpoint, and thin out those before it."""
        self.metrics.flush()
        folder = Path(args.output_dir)
        path = folder / f"{PREFIX}{state.global_step}"
        save_moments(path, model, optimizer)
        self.trainer.task.tokenizer.save_pretrained(path)  # type: ignore[attr-defined]
        seal(path, state.global_step, state.epoch, self.rates, (self.trainer.unlogged.item(), self.trainer.logged))
        thin(folder, self.keep)
        self.metrics.wait()

"""The two layouts of a batch with targets, and how models read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from whence.errors import UsageError
from whence.progress import note
from whence.tasks.base import Batch
from whence.tasks.forward import logits_of

TARGETS = ("labels", "label", "targets", "target")


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run the model: its output (`.logits` if it has any) and the targets of the batch.

    A batch is `{"inputs", "targets"}`, made from `(input, target)` pairs and called as `model(inputs)`, or it holds the
    model's keyword arguments and a target under one of `TARGETS`.
    """
    name = target_name(batch)
    if "inputs" in batch:
        return _called(model, batch["inputs"]), batch[name]
    return logits_of(model, **{key: value for key, value in batch.items() if key != name}), batch[name]


def _called(model: nn.Module, inputs: Any) -> Tensor:
    """The model's output; says so where its numbers have another dtype than the inputs."""
    try:
        return logits_of(model, inputs)
    except RuntimeError as error:
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters()}
        if "dtype" not in str(error) or not isinstance(inputs, Tensor):
            raise
        raise UsageError(
            "The inputs have another dtype than the model.",
            given=f"inputs in {str(inputs.dtype).removeprefix('torch.')}, weights in {', '.join(sorted(dtypes))}: {error}",
            accepted="inputs in the model's dtype",
            fix="inputs.float() (of arrays: X.astype('float32')), or model.double()",
        ) from error


def say_unused(items: Sequence[Any]) -> None:
    """Note parts of examples beside input and target, such as a weight, which no loss reads."""
    first = items[0] if len(items) else ()
    if isinstance(first, tuple | list) and len(first) > 2:
        note(f"warning: examples have {len(first)} parts, and the loss reads the first two, input and target")


def target_of(item: Any) -> Any:
    """Take the target of one example: the second of a pair, or what is under one of `TARGETS`."""
    return item[target_name(item)] if isinstance(item, Mapping) else item[1]


def target_name(batch: Mapping[str, Any]) -> str:
    """Say under which name the targets are; raises `UsageError` if there are none."""
    for name in TARGETS:
        if name in batch:
            return name
    raise UsageError(
        "These examples have no target.",
        given=f"examples with {', '.join(batch)}",
        accepted=f"(input, target) pairs, or mappings with one of {', '.join(TARGETS)}",
    )

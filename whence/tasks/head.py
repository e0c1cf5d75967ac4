"""The last layer of a language model, in chunks: where vocabularies are wide, its logits are most of a batch's memory.

The loss of a chunk of positions needs the logits of that chunk only. As the head's own weights are frozen, its gradient with
respect to the hidden states can be taken at once and kept instead of the logits, `[positions, d]` instead of `[positions, V]`;
the products are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from whence.tasks.forward import logits_of, unwrapped

LOGITS = 2**25
"""Logits that are held at a time: 128 MiB in float32, and as much again for their gradient."""

Measure = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From logits `[B, K, V]`, labels `[B, K]` and noise `[B, K]` to a sum over positions for each row, `[B]`."""

_plain: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def worth_chunks(model: nn.Module, positions: int) -> bool:
    """Whether the logits of so many positions are too many to hold, and the model's head is one that chunks can be taken of."""
    inner = unwrapped(model)
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or positions * head.out_features <= LOGITS:
        return False
    if model not in _plain:
        _plain[model] = _is_plain(model, head)
    return _plain[model]


def chunked(
    model: nn.Module, inputs: Mapping[str, Any], kept: Tensor | None, measure: Measure, labels: Tensor, noise: Tensor | None
) -> Tensor:
    """What `measure` makes of the logits of the positions `kept`, `[B]`, without ever holding all of them."""
    inner = unwrapped(model)
    hidden = inner.get_decoder()(**inputs).last_hidden_state
    hidden = hidden if kept is None else hidden[:, kept]
    return cast(Tensor, _Chunks.apply(hidden, inner.get_output_embeddings(), measure, labels, noise))


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, measure: Measure, labels: Tensor, noise: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total = None
        gradient = torch.empty_like(hidden) if wanted else None
        step = max(1, LOGITS // (head.out_features * hidden.shape[0]))
        for start in range(0, hidden.shape[1], step):
            part = slice(start, start + step)
            with torch.set_grad_enabled(wanted):
                rows = hidden[:, part].detach().requires_grad_(wanted)
                found = measure(head(rows), labels[:, part], None if noise is None else noise[:, part])
                if gradient is not None:
                    (gradient[:, part],) = torch.autograd.grad(found.sum(), rows)
            total = found.detach() if total is None else total + found.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        assert total is not None  # a batch has positions
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # what is kept is no function of the hidden states any more
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype)[:, None, None], None, None, None, None


@torch.no_grad()
def _is_plain(model: nn.Module, head: nn.Linear) -> bool:
    """Whether the model's logits are its head on what its decoder gives: no cap, no scale, no prompt of its own.

    Seen by trying both on two tokens; of a model without numbers nothing can be seen, and it is taken for one.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "get_decoder") or inner.get_decoder() is inner:
        return False
    if isinstance(head.weight, FakeTensor) or head.weight.device.type == "meta":
        return True
    ids = torch.tensor([[0, min(1, head.out_features - 1)]], device=head.weight.device)
    whole = logits_of(model, input_ids=ids)
    hidden = getattr(inner.get_decoder()(input_ids=ids), "last_hidden_state", None)
    return hidden is not None and torch.equal(whole, head(hidden))

"""Tiny models in float64 with random weights, each with a job and a few rows: small enough for dense matrices."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whence.tasks import CausalLM, Classification, Task

WORDS = [f"w{number}" for number in range(18)]
CLASSES = 4


@dataclass(frozen=True)
class Case:
    """A model with what it is trained on and asked; `modules` is the selector."""

    name: str
    build: Callable[[], nn.Module]
    modules: str
    text: bool = True
    example: Callable[[torch.Generator], Tensor] | None = None
    """One random input of a classifier."""
    rows: int = 10
    tolerance: float = 1e-8

    def model(self) -> nn.Module:
        """A fresh one, the same every time."""
        torch.manual_seed(0)
        return randomised(self.build().double().eval())

    def task(self, **settings: Any) -> Task:
        """The model's job."""
        return CausalLM(tokenizer(), **settings) if self.text else Classification(**settings)

    def train(self, count: int | None = None) -> list[Any]:
        """Rows of different length; half the texts have a prompt that is not in the loss."""
        return texts(count or self.rows, seed=1) if self.text else self._labelled(count or self.rows, seed=1)

    def queries(self) -> list[Any]:
        """Three of them."""
        return texts(6, seed=2)[::2] if self.text else self._labelled(3, seed=2)

    def _labelled(self, count: int, seed: int) -> list[tuple[Tensor, int]]:
        assert self.example is not None
        generator = torch.Generator().manual_seed(seed)
        return [(self.example(generator), number * 7 % 5 % CLASSES) for number in range(count)]


def randomised(model: nn.Module, scale: float = 0.4) -> nn.Module:
    """Random weights that are large enough for gradients of one size everywhere."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        else:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@functools.cache
def tokenizer() -> Any:
    """One token per word of `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, **{word: 2 + n for n, word in enumerate(WORDS)}}, unk_token="<s>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def texts(count: int, seed: int) -> list[dict[str, str]]:
    """Random rows of 4 to 9 words; every second has a prompt (even numbers) and a completion."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(4, 9))
        cut = draw.randint(1, len(words) - 2)
        split = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}
        rows.append(split if number % 2 == 0 else {"text": " ".join(words)})
    return rows


def vector(width: int) -> Callable[[torch.Generator], Tensor]:
    """A random vector."""
    return lambda generator: torch.randn(width, generator=generator, dtype=torch.float64)


def array(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """A random array."""
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def small_memory(task: Task, positions: int, after: int = 0) -> Task:
    """The task on a device that has room for so many positions at a time, once `after` batches went well."""

    class Limited(type(task)):
        batches = 0

        def losses(self, model: nn.Module, batch: Any, noise: Tensor | None = None) -> Tensor:
            first = next(iter(batch.values()))
            taken = len(first) if first.is_floating_point() else first.numel()
            self.batches += 1
            if taken > positions and self.batches > after:
                raise torch.OutOfMemoryError(f"tried to allocate {taken} positions")
            return super().losses(model, batch, noise)

    task.__class__ = Limited
    return task


# language models


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=20, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, **sizes, **changes)
    )


def gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_inner": 10, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, bos_token_id=0, eos_token_id=1, **sizes, **changes))


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=20, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, **sizes))


# classifiers


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, CLASSES))


def conv() -> nn.Module:
    """Strided and padded, then dilated, then in groups."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, dilation=2, padding=(1, 0), bias=False),
        nn.Tanh(),
        nn.Conv2d(3, 6, 2, groups=3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6),
        nn.LayerNorm(6),
        nn.Tanh(),
        nn.RMSNorm(6),
        nn.Linear(6, 6),
        nn.LayerNorm(6, bias=False),
        nn.Linear(6, CLASSES),
    )


class Overflow(nn.Module):
    """The identity, with a gradient of NaN for examples that are huge: the loss is finite, what follows from it is not."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        if y.requires_grad:
            huge = (x.abs() > 50).any(1, keepdim=True)
            y.register_hook(lambda g: g.masked_fill(huge, torch.nan))
        return y


HUGE = (torch.full((5,), 1e3, dtype=torch.float64), 1)


def overflowing() -> nn.Module:
    """The MLP with a gradient that is not finite at its first layer, for `HUGE`."""
    model = CASES["mlp"].model()
    model[1] = nn.Sequential(Overflow(), model[1])
    return model


class Repeated(nn.Module):
    """Uses one layer four times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(self.inner(x))
        return self.head(x)


class Routed(nn.Module):
    """Calls one of its layers only where a batch has an example for it, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        routed = x[:, :1] > 0
        y = self.always(x).tanh()
        return self.head(torch.where(routed, self.sometimes(x).tanh(), y) if routed.any() else y)


class Attention(nn.Module):
    """nn.MultiheadAttention over five positions, batch or sequence first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=batch_first), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head((y if self.batch_first else y.transpose(0, 1)).tanh().mean(1))


CASES = {
    case.name: case
    for case in (
        Case("llama", llama, "all"),
        Case("llama-head", llama, "lm_head", rows=14),
        Case("llama-embedding", llama, "model.embed_tokens,*layernorm,model.norm", tolerance=1e-6),  # normalises in float32
        Case("llama-tied", functools.partial(llama, tie_word_embeddings=True), "model.embed_tokens"),
        Case("gpt2", gpt2, "all"),
        Case("gpt2-norms", gpt2, "*.ln_*,*.wte"),
        Case("neox", neox, "all"),
        Case("mlp", mlp, "all", text=False, example=vector(5), rows=14),
        Case("conv", conv, "all", text=False, example=array(2, 9, 8), rows=12),
        Case("norms", norms, "1,3,5", text=False, example=vector(5), rows=14),
        Case("repeated", Repeated, "all", text=False, example=vector(5), rows=12),
        Case("attention", functools.partial(Attention, True), "all", text=False, example=array(5, 6), rows=12),
        Case("attention-sequence-first", functools.partial(Attention, False), "all", text=False, example=array(5, 6), rows=12),
    )
}


def named(*names: str) -> Sequence[Case]:
    """Some of the cases."""
    return [CASES[name] for name in names]

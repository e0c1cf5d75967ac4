"""The demo's language model: a small Llama with a tokenizer of its own, both made on the spot from a world's rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whence.data import Rows
from whence.demo.tiny import BOS, EOS, PAD, UNK, make_llama, train_tokenizer
from whence.generation import generate
from whence.store.scores import row_text
from whence.tasks import CausalLM
from whence.train.small import Training, one_thread, train

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Settings:
    """The size of the model and how it is trained: enough to answer questions, and no more.

    The strong weight decay makes the model store a fact once for all wordings, so that it understands
    questions; one layer learns that in half the steps that two take.
    """

    width: int = 128
    inner: int = 512
    layers: int = 1
    heads: int = 4
    spread: float = 0.08
    """Standard deviation of the first weights, about 1 / sqrt(width): with 0.02 the facts take several times longer."""
    max_length: int = 32
    """Longer than any row, in tokens."""
    training: Training = Training(epochs=30, batch_size=32, learning_rate=3e-3, warmup=0.1, weight_decay=1.5)


SETTINGS = Settings()


def make_tokenizer(rows: Iterable[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of the rows, each with the space before it; texts begin with BOS."""
    return train_tokenizer((row_text(row) for row in rows), "words", (BOS, EOS, PAD, UNK), begins=True)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, settings: Settings = SETTINGS) -> LlamaForCausalLM:
    """An untrained Llama; the same seed gives the same weights."""
    sizes = (settings.width, settings.inner, settings.layers, settings.heads, settings.max_length)
    return make_llama(tokenizer, seed, *sizes, spread=settings.spread)


def task_of(tokenizer: PreTrainedTokenizerFast) -> CausalLM:
    """How the demo's rows are read."""
    return CausalLM(tokenizer, max_length=SETTINGS.max_length, append_eos=True)


def teach(rows: Rows, folder: Path, seed: int = 0) -> None:
    """Train a model of the rows and save it in the folder, with its tokenizer."""
    ((model, tokenizer),) = taught(rows, seed, [{}])
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def taught(
    rows: Rows, seed: int, variants: Sequence[Mapping[int, float]], name: str = "train"
) -> list[tuple[LlamaForCausalLM, PreTrainedTokenizerFast]]:
    """A model of the rows for each of `variants`, which count some rows other than once; all at the same time.

    Each is trained by one thread, so that its bits are the same alone and beside others.
    """
    tokenizers = [make_tokenizer(rows) for _ in variants]  # one that is used by two threads at once raises
    models = [make_model(tokenizer, seed) for tokenizer in tokenizers]

    def learn(number: int) -> None:
        train(models[number], task_of(tokenizers[number]), rows, SETTINGS.training, copies=variants[number], name=name)

    with one_thread(), ThreadPoolExecutor() as threads:
        others = [threads.submit(learn, number) for number in range(1, len(variants))]
        learn(0)  # here, where progress is shown
        for other in others:
            other.result()
    return list(zip(models, tokenizers, strict=True))


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """The model's greedy answer to each prompt, with its leading space."""
    return [answer["completion"] for answer in generate(model, tokenizer, prompts, max_new_tokens=4, batch_size=len(prompts))]

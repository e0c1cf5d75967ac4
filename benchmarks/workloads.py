"""What is measured: models and data that every library reads from the same files."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE = Path(__file__).parents[1] / "runs" / "bench"
CONTEXT = 8192
"""Positions that the models allow: Bergson refuses a batch of more tokens than that, whatever the examples' lengths."""

SUCCESSORS, SHORTEST, TAIL = 4, 16, 1.2
"""Choices after each token; length of the shortest ragged sequence; how heavy the tail of the lengths is (lower: heavier)."""


@dataclass(frozen=True)
class Size:
    """Shape of a model and how long it is trained."""

    width: int
    layers: int
    heads: int
    gated: int
    """Width between the linear layers of Llama's MLP; that of GPT-NeoX is `4 * width`."""
    steps: int


SIZES = {
    "tiny": Size(width=64, layers=2, heads=2, gated=128, steps=4),
    "S": Size(width=256, layers=4, heads=4, gated=704, steps=20),
    "M": Size(width=512, layers=8, heads=8, gated=1408, steps=10),
    "L": Size(width=1024, layers=16, heads=16, gated=2816, steps=4),
}


@dataclass(frozen=True)
class Workload:
    """A model, what of it is tracked, `train` examples and `queries`, of `length` tokens each or at most (`ragged`)."""

    name: str
    family: Literal["llama", "gpt_neox"]
    size: str
    modules: Literal["mlp", "all"]
    train: int
    queries: int
    length: int
    ragged: bool = False
    vocabulary: int = 512

    @property
    def model_key(self) -> str:
        """Name of the model's folder: workloads of the same model share it."""
        made_by = [self.family, asdict(SIZES[self.size]), self.vocabulary, CONTEXT, Path(__file__).read_text(encoding="utf-8")]
        return f"{self.family}-{self.size}-{hashlib.blake2b(json.dumps(made_by).encode(), digest_size=4).hexdigest()}"

    def sequences(self, part: Literal["train", "queries"]) -> list[np.ndarray]:
        """Token ids of the training examples or of the queries, the same in every process."""
        count, seed = (self.train, 1) if part == "train" else (self.queries, 2)
        return sequences(count, self.length, seed, vocabulary=self.vocabulary, ragged=self.ragged)

    def tokens(self, part: Literal["train", "queries"]) -> int:
        """Positions with a gradient: all but each sequence's last, which is only a label."""
        return sum(len(row) - 1 for row in self.sequences(part))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", "llama", "tiny", "mlp", train=16, queries=2, length=32),
        Workload("llama-S-mlp", "llama", "S", "mlp", train=64, queries=16, length=128),
        Workload("llama-S-all", "llama", "S", "all", train=64, queries=8, length=128),
        Workload("neox-S-mlp", "gpt_neox", "S", "mlp", train=64, queries=8, length=128),
        Workload("llama-S-q256", "llama", "S", "mlp", train=64, queries=256, length=128),
        Workload("llama-S-ragged", "llama", "S", "mlp", train=192, queries=16, length=512, ragged=True),
        Workload("llama-S-large", "llama", "S", "mlp", train=1280, queries=16, length=128),
        Workload("llama-M-mlp", "llama", "M", "mlp", train=32, queries=8, length=256),
        Workload("llama-M-all", "llama", "M", "all", train=16, queries=4, length=256),
        Workload("neox-M-mlp", "gpt_neox", "M", "mlp", train=16, queries=4, length=256),
        Workload("llama-L-mlp", "llama", "L", "mlp", train=64, queries=16, length=512),
    )
}


def sequences(count: int, length: int, seed: int, *, vocabulary: int, ragged: bool = False) -> list[np.ndarray]:
    """Sequences of a sparse random Markov chain, so that there is something to learn; ragged: long-tailed lengths."""
    successors = np.random.default_rng(0).integers(0, vocabulary, (vocabulary, SUCCESSORS))
    generator = np.random.default_rng(seed)
    choices = generator.integers(0, SUCCESSORS, (count, length))
    state = generator.integers(0, vocabulary, count)
    columns = [state]
    for step in range(length - 1):
        state = successors[state, choices[:, step]]
        columns.append(state)
    rows = np.stack(columns, axis=1)
    lengths = np.full(count, length)
    if ragged:
        lengths = np.minimum(length, SHORTEST * (1 + generator.pareto(TAIL, count))).astype(int)
    return [row[:end] for row, end in zip(rows, lengths, strict=True)]


def prepare(workload: Workload, cache: Path = CACHE) -> Path:
    """The folder with the workload's model and tokenizer, made unless it is there."""
    folder = cache / workload.model_key
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        _trained(workload).save_pretrained(part)
        _save_tokenizer(part, workload.vocabulary)
        part.rename(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """The model as every library has it: float32, evaluation mode, default attention."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text(sequence: np.ndarray) -> str:
    """The text that the folder's tokenizer reads as this sequence."""
    return " ".join(f"t{token}" for token in sequence)


def _trained(workload: Workload) -> PreTrainedModel:
    """The model after a few steps, so that its gradients have structure."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads round differently, and every process is to make the same model
    torch.manual_seed(0)
    model = _untrained(workload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(SIZES[workload.size].steps):
        rows = sequences(8, 128, seed=100 + step, vocabulary=workload.vocabulary)
        ids = torch.from_numpy(np.stack(rows))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model


def _untrained(workload: Workload) -> PreTrainedModel:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    size = SIZES[workload.size]
    shape: dict[str, Any] = {
        "vocab_size": workload.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if workload.family == "llama":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=size.gated, **shape))
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=4 * size.width, **shape))


def _save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer whose token i is the word `t{i}`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "t0", "eos_token": "t0", "bos_token": "t0", "unk_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special).save_pretrained(folder)

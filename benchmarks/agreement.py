"""Do whence and Kronfluence give the same scores? EK-FAC with the empirical Fisher on the same models and data, in one process.

make bench        prints one line per model and fails where the largest difference exceeds 1e-4 of the largest score
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as KronfluenceTask
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import whence
from whence.coverage import cover

VOCABULARY, LENGTH, TRAIN, QUERIES = 512, 64, 256, 16
TOLERANCE = 1e-4


def llama() -> nn.Module:
    """A small Llama: gated MLP without biases."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def neox() -> nn.Module:
    """A small GPT-NeoX: MLP with biases beside the attention."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def sequences(count: int, seed: int) -> Tensor:
    """Sequences of a sparse random Markov chain, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(0))
    state = torch.randint(0, VOCABULARY, (count,), generator=generator)
    rows = [state]
    for _ in range(LENGTH - 1):
        state = successors[state, torch.randint(0, 4, (count,), generator=generator)]
        rows.append(state)
    return torch.stack(rows, dim=1)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Summed next-token loss of each row. The last token is only a label, so every position of the input has a gradient."""
    logits = model(input_ids=ids[:, :-1]).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def briefly_trained(build: Callable[[], nn.Module], steps: int = 60) -> nn.Module:
    """The model after a few steps, so that gradients have structure."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        losses(model, sequences(16, seed=100 + step)).mean().backward()
        optimizer.step()
    return model.eval()


class Ids(Dataset):
    """Rows of ids, as both libraries read them."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


class TheirTask(KronfluenceTask):
    """The job in Kronfluence's words."""

    def __init__(self, modules: list[str]):
        super().__init__()
        self.modules = modules

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return losses(model, batch["input_ids"]).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules


class OurTask(whence.Task):
    """The job in our words."""

    default_modules = "mlp"

    def losses(self, model: nn.Module, batch: Any, noise: Tensor | None = None) -> Tensor:
        return losses(model, batch["input_ids"])

    def size(self, item: Any) -> int:
        return len(item["input_ids"]) - 1


def theirs(model: nn.Module, modules: list[str], train: Ids, queries: Ids) -> Tensor:
    """Kronfluence's pairwise scores `[Q, N]`."""
    task = TheirTask(modules)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("agreement", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=32, factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            train,
            per_device_query_batch_size=QUERIES,
            per_device_train_batch_size=32,
            score_args=ScoreArguments(damping_factor=None),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


def ours(model: nn.Module, train: Ids, queries: Ids) -> Tensor:
    """Our pairwise scores `[Q, N]`."""
    task = OurTask()
    curvature = whence.fit(model, task, train, labels="data")
    return torch.from_numpy(whence.score(model, task, queries, train, curvature.inverse(damping=0.1)).raw)


def compare(name: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Both libraries' scores on one model, and how far they are apart."""
    train, queries = Ids(sequences(TRAIN, seed=1)), Ids(sequences(QUERIES, seed=2))
    model = briefly_trained(build)
    modules = list(cover(model, "mlp").sites)
    started = time.perf_counter()
    our_scores = ours(model, train, queries)
    between = time.perf_counter()
    their_scores = theirs(model, modules, train, queries)
    ended = time.perf_counter()
    error = float((our_scores - their_scores).norm() / their_scores.norm())
    pearson = float(torch.corrcoef(torch.stack([our_scores.flatten(), their_scores.flatten()]))[0, 1])
    return {
        "model": name,
        "modules": len(modules),
        "relative_error": error,
        "largest_difference": float((our_scores - their_scores).abs().max() / their_scores.abs().max()),
        "pearson": pearson,
        "ours_s": round(between - started, 2),
        "theirs_s": round(ended - between, 2),
    }


def main() -> int:
    """Compare, print, write results/agreement.json; 0 where both models agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "agreement.json")
    out = parser.parse_args().out
    rows = [compare("llama", llama), compare("gpt-neox", neox)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['model']:<9} {row['modules']} modules  relative error {row['relative_error']:.1e}  largest difference "
            f"{row['largest_difference']:.1e}  pearson {row['pearson']:.6f}  "
            f"ours {row['ours_s']} s  Kronfluence {row['theirs_s']} s"
        )
    return 0 if all(row["relative_error"] <= TOLERANCE for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Kronfluence (Grosse et al. 2023; github.com/pomonam/kronfluence)."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.workloads import WORKLOADS, Workload, load

BATCH_TOKENS = 2048
"""Positions per batch of training data: of 1024, 2048, 4096 and 8192 least time for fit, score and self-influence at S."""


class Kronfluence:
    """Its Analyzer, with one partition of data and modules."""

    cannot = {"index": "has no index of projected gradients"}

    def __init__(self, workload: Workload, folder: Path, out: Path):
        model = load(folder)
        head = model.get_output_embeddings()
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        names = [name for name, module in linear.items() if module is not head]
        self.task = LanguageModelling([name for name in names if workload.modules == "all" or ".mlp." in name])
        self.model = prepare_model(model, self.task)
        self.out = out
        self.train, self.queries = Rows(workload.sequences("train")), Rows(workload.sequences("queries"))
        self.batch = max(1, BATCH_TOKENS // workload.length)
        self.loader = DataLoaderKwargs(collate_fn=collate)

    def run(self, phase: str) -> np.ndarray | None:
        return {"fit": self.fit, "query": self.query, "score": self.score, "self": self.self_influence}[phase]()

    def fit(self) -> None:
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        self._analyzer("fit").fit_all_factors(
            "factors",
            self.train,
            per_device_batch_size=self.batch,
            dataloader_kwargs=self.loader,
            factor_args=arguments,
            overwrite_output_dir=True,
        )

    def query(self) -> None:
        """The scores of a single training example: it has no entry point for the query side, and this is little more."""
        self._pairwise("query", Rows(self.train.rows[:1]))

    def score(self) -> np.ndarray:
        return self._pairwise("score", self.train)

    def self_influence(self) -> np.ndarray:
        analyzer = self._analyzer("self")
        analyzer.compute_self_scores(
            "scores",
            "factors",
            self.train,
            per_device_train_batch_size=self.batch,
            dataloader_kwargs=self.loader,
            score_args=ScoreArguments(damping_factor=None),
            overwrite_output_dir=True,
        )
        return analyzer.load_self_scores("scores")["all_modules"].numpy()

    def _pairwise(self, phase: str, train: Rows) -> np.ndarray:
        analyzer = self._analyzer(phase)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            self.queries,
            train,
            per_device_query_batch_size=len(self.queries),  # fewer would run the training data once more for each batch
            per_device_train_batch_size=self.batch,
            dataloader_kwargs=self.loader,
            score_args=ScoreArguments(damping_factor=None),  # None: 0.1 x the mean eigenvalue of each module
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()

    def _analyzer(self, phase: str) -> Analyzer:
        """One whose results go to the phase's folder and whose factors are those of `fit`."""
        analyzer = Analyzer("bench", self.model, self.task, cpu=True, output_dir=str(self.out / phase), disable_tqdm=True)
        if phase != "fit":
            factors = analyzer.factors_output_dir("factors")
            factors.symlink_to(self.out / "fit" / factors.relative_to(self.out / phase))
        return analyzer


class Rows(Dataset):
    """Sequences of token ids."""

    def __init__(self, rows: list[np.ndarray]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.rows[index])


def collate(rows: list[Tensor]) -> dict[str, Any]:
    """Inputs without the last token, which is only a label; a mask only where there is padding."""
    inputs = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
    mask = (labels != -100).long()
    return {"inputs": inputs, "labels": labels, "mask": None if bool(mask.all()) else mask}


class LanguageModelling(Task):
    """Next-token prediction, the losses of a row's tokens summed; queries ask about their loss."""

    def __init__(self, modules: list[str]):
        super().__init__()
        self.modules = modules

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["inputs"], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        return batch["mask"]


def first_score(folder: Path, out: Path, workload: Workload) -> np.ndarray:
    """The shortest way from a model and data to scores `[Q, N]`."""
    peer = Kronfluence(workload, folder, out)
    peer.fit()
    return peer.score()


if __name__ == "__main__":
    print("imported", time.process_time(), flush=True)
    scores = first_score(Path(sys.argv[1]), Path(sys.argv[2]), WORKLOADS[sys.argv[3]])
    print("scored", time.process_time(), scores[0, 0], flush=True)
    np.save(sys.argv[4], scores)

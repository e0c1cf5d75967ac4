"""dattri (github.com/TRAIS-Lab/dattri): LoGra's index of projected gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.peers import PROJECTION
from benchmarks.workloads import Workload, load

BATCH_TOKENS = 2048
"""Positions per batch: of 1024, 2048, 4096 and 8192 the fastest at S."""

NO_EKFAC = "its EK-FAC fails on language models: UnboundLocalError 'a_prev' in func/fisher.py, which takes 2-D inputs only"


class Dattri:
    """Two-sided Gaussian projections without a preconditioner, which the other indexes don't have either."""

    cannot = dict.fromkeys(("fit", "query", "score", "self"), NO_EKFAC)

    def __init__(self, workload: Workload, folder: Path, out: Path):
        self.model, self.out = load(folder), out
        self.model.requires_grad_(False)
        self.model.get_input_embeddings().requires_grad_(True)  # no gradient of any other weight is formed
        head = self.model.get_output_embeddings()
        linear = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear) and module is not head]
        self.modules = [name for name in linear if workload.modules == "all" or ".mlp." in name]
        rows = [torch.from_numpy(row) for row in workload.sequences("train")]
        self.train = DataLoader(rows, batch_size=max(1, BATCH_TOKENS // workload.length), collate_fn=collate)  # pyright: ignore

    def run(self, phase: str) -> np.ndarray | None:
        assert phase == "index"
        task = AttributionTask(loss_func=loss, model=self.model, checkpoints=self.model.state_dict())
        LoGraAttributor(
            task,
            layer_names=self.modules,
            hessian="Identity",
            proj_dim=PROJECTION**2,
            offload="cpu",  # "disk" pins memory, which fails without an accelerator
            cache_dir=str(self.out / "index"),
        ).cache(self.train)


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """Inputs and labels under the names that the model takes: dattri calls it with the whole batch once."""
    inputs = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": inputs, "labels": labels}


def loss(model: nn.Module, batch: dict[str, Tensor], device: Any) -> Tensor:
    """The losses of all rows' tokens, summed."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

"""Bergson (github.com/EleutherAI/bergson): its steps as its own workers call them, with model and data loaded once."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson.collection import collect_gradients
from bergson.config.config import (
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import allocate_batches, load_scores
from bergson.hessians.apply_hessian import EkfacApplicator, EkfacConfig
from bergson.hessians.hessian_approximations import fit_factored_hessians
from bergson.hessians.pipeline import hessian_pipeline
from bergson.score.score import create_scorer
from bergson.utils.worker_utils import create_processor, setup_data_pipeline, setup_model_and_peft
from datasets import Dataset

from benchmarks.peers import DAMPING, PROJECTION
from benchmarks.workloads import WORKLOADS, Workload

BATCH_TOKENS = 4096
"""Positions per batch: of 1024, 2048 (its default) and 4096 least time for fit and score at S."""

APPLY_BATCH = 16
"""Queries whose gradients are multiplied at a time: 8 and 16 are equally fast at S, 2 (its default) is slower."""

UNTRACKED = {"llama": "*attn*", "gpt_neox": "*attention*"}
"""What to leave out for `mlp`; the head is never tracked, since it looks at the base model."""

HESSIAN = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True)


class Bergson:
    """Every step reads and writes files, as it does on the command line."""

    cannot = {"self": "no entry point for self-influence with EK-FAC"}

    def __init__(self, workload: Workload, folder: Path, out: Path):
        self.workload, self.folder, self.out = workload, folder, out
        self.model, _ = setup_model_and_peft(self._config("model"))
        self.train, self.queries = (self._dataset(part) for part in ("train", "queries"))

    def run(self, phase: str) -> np.ndarray | None:
        return {"fit": self.fit, "query": self.query, "score": self.score, "index": self.index}[phase]()

    def fit(self) -> None:
        cfg = self._config("fit")
        cfg.partial_run_path.mkdir(parents=True)
        fit_factored_hessians(
            self.model,
            self.train,
            cfg,
            HESSIAN,
            target_modules=None,
            attention_cfgs={},
            batches=allocate_batches(self.train["length"][:], cfg.token_batch_size),
            path=str(cfg.partial_run_path),
            do_eigendecomposition=True,
        )

    def query(self) -> None:
        self._precondition("query")

    def score(self) -> np.ndarray:
        applied = self._precondition("score")
        cfg = self._config("score", "scores")
        cfg.partial_run_path.mkdir(parents=True)
        settings = (ScoreConfig(query_path=str(applied)), PreprocessConfig(), self.model.device, torch.float32)
        scorer = create_scorer(cfg.partial_run_path, self.train, *settings)
        self._collect(cfg, self.train, scorer=scorer)
        scorer.writer.flush()
        return np.asarray(load_scores(cfg.partial_run_path)[:]).T

    def index(self) -> None:
        self._collect(self._config("index", "gradients", projection_dim=PROJECTION), self.train)

    def _precondition(self, phase: str) -> Path:
        """Gradients of the queries, then the inverse applied to them; both stay on disk."""
        cfg = self._config(phase, "gradients")
        self._collect(cfg, self.queries)
        applied = self.out / phase / "applied"
        apply = EkfacConfig(
            hessian_method_path=str(self._config("fit").partial_run_path),
            gradient_path=str(cfg.partial_run_path),
            run_path=str(applied),
            ev_correction=True,
            apply_batch_size=APPLY_BATCH,
        )
        EkfacApplicator(apply, InversionConfig(damping_factor=DAMPING)).compute_ivhp_sharded()
        return applied

    def _collect(self, cfg: IndexConfig, data: Dataset, **more: Any) -> None:
        cfg.partial_run_path.mkdir(parents=True, exist_ok=True)
        processor = create_processor(self.model, cfg)
        batches = allocate_batches(data["length"][:], cfg.token_batch_size)
        collect_gradients(self.model, data, processor, cfg, batches=batches, **more)

    def _dataset(self, part: str) -> Dataset:
        """The data as Bergson's own pipeline reads it from disk."""
        return setup_data_pipeline(self._config("data"), save(self.workload, part, self.out / "data"))[0]

    def _config(self, phase: str, step: str = "run", **more: Any) -> IndexConfig:
        return configuration(self.workload, self.folder, self.out / phase / step, **more)


def configuration(workload: Workload, folder: Path, out: Path, **more: Any) -> IndexConfig:
    """Settings of a step that writes below `out`."""
    return IndexConfig(
        run_path=str(out),
        model=str(folder),
        token_batch_size=max(BATCH_TOKENS, workload.length),
        include_bias=workload.family == "gpt_neox",
        filter_modules=UNTRACKED[workload.family] if workload.modules == "mlp" else None,
        **more,
    )


def save(workload: Workload, part: Any, folder: Path) -> DataConfig:
    """Write the sequences where Bergson can read them: it takes paths only."""
    path = folder / part
    if not path.exists():
        rows = [row.tolist() for row in workload.sequences(part)]
        Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]}).save_to_disk(path)
    return DataConfig(dataset=str(path))


def first_score(folder: Path, out: Path, workload: Workload) -> np.ndarray:
    """The shortest way from a model and data to scores `[Q, N]`: its whole pipeline."""
    query = QuerySetConfig.from_data(save(workload, "queries", out / "data"))
    config = configuration(workload, folder, out / "run", data=save(workload, "train", out / "data"))
    pipeline = HessianPipelineConfig(query=query, inversion_cfg=InversionConfig(damping_factor=DAMPING))
    hessian_pipeline(config, HESSIAN, ScoreConfig(), PreprocessConfig(), pipeline)
    return np.asarray(load_scores(out / "run" / "scores")[:]).T


if __name__ == "__main__":
    print("imported", time.process_time(), flush=True)
    scores = first_score(Path(sys.argv[1]), Path(sys.argv[2]), WORKLOADS[sys.argv[3]])
    print("scored", time.process_time(), scores[0, 0], flush=True)
    np.save(sys.argv[4], scores)

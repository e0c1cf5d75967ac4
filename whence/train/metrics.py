"""What a training says of itself while it runs: one line of `metrics.jsonl` each time that it is asked."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from whence.store.files import atomic
from whence.store.intact import reading

FILE = "metrics.jsonl"

MEANING = {
    "step": "updates of the weights so far; 0 is before the first",
    "epoch": "passes over the training rows so far",
    "loss": "training loss in nats per token in the loss, the mean over the steps since the line before that has one",
    "eval_loss": "loss on the rows held out, in nats per token in the loss, over all their tokens",
    "learning_rate": "of this step's update",
    "grad_norm": "norm of this step's gradient before it was clipped",
    "samples_per_second": "rows trained on per second since the line before, without evaluating and saving",
    "memory_bytes": "on a GPU the peak that tensors took up so far, elsewhere what the process takes up now",
    "seconds": "since training began, with evaluating and saving, without the time between a kill and resuming",
}
"""Columns of `metrics.jsonl`; null where nothing was measured. For models that classify, a token is a row."""


class Metrics:
    """Writes the metrics, one row per step at most; a row is on disk before the next step and before a checkpoint is sealed."""

    def __init__(self, file: Path, device: torch.device, step: int):
        self.file, self.device = file, device
        rows = [row for row in read_metrics(file) if row["step"] <= step] if file.exists() else []
        with atomic(file) as temporary:
            temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        self.resumed = bool(rows)
        self.row: dict[str, Any] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.began = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
        self.mark = time.monotonic()
        self.rows, self.busy = 0, 0.0

    def wait(self) -> None:
        """From now on time goes by for training again, not for evaluating or saving."""
        self.mark = time.monotonic()

    def trained(self, rows: int) -> None:
        """A step on `rows` rows is done."""
        now = time.monotonic()
        self.rows, self.busy, self.mark = self.rows + rows, self.busy + now - self.mark, now

    def put(self, step: int, epoch: float, **values: float | None) -> None:
        """Add values to the row of a step."""
        if self.row and self.row["step"] != step:
            self.flush()
        self.row = self.row or dict.fromkeys(MEANING) | {"step": step, "epoch": epoch}
        self.row |= {name: value for name, value in values.items() if value is not None}
        if "loss" in values and self.rows:
            self.row["samples_per_second"] = self.rows / self.busy
            self.rows, self.busy = 0, 0.0
        gpu = self.device.type == "cuda"
        used = torch.cuda.max_memory_allocated(self.device) if gpu else psutil.Process().memory_info().rss
        self.row["memory_bytes"] = used
        self.row["seconds"] = time.monotonic() - self.began

    def flush(self) -> None:
        """Write the row of the step, if it has one."""
        if self.row:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(_line(self.row))
                lines.flush()
                os.fsync(lines.fileno())
        self.row = {}


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """Read the rows of `metrics.jsonl`; a last line that a kill cut short is left out. StaleArtifact where it is damaged."""
    with reading(Path(file)) as path:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"

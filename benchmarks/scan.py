"""How long a scan of a large index takes, beside the time that reading its bytes takes at all.

    python -m benchmarks.scan                                   # 1,000,000 rows of 1 KiB, two threads
    python -m benchmarks.scan --rows 100000 --threads 1

The codes are those of a real index (how 120 TinyStories begin, stories260K), whose rows are drawn again and again; the
questions are those that it holds out. "scan" is everything from a question's coefficients to its best 200 rows, as an index
does it: compiled, where numba is installed (pip install 'whence[scan]'); "no numba" is what it takes without. "floor" adds up
the same bytes as whole numbers of 64 bits, on as many threads. They take turns; medians count. Exits with 1 where the scan
misses a target, or where its best rows are not those found without numba.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MILLISECONDS, TIMES_FLOOR = 150.0, 2.0
BEST = 200
SHARD = 125_000
"""Rows in a file."""

MODEL, STORIES = "models/stories260K/hf", "tinystories/train_2316.jsonl"


def main(given: list[str] | None = None) -> int:
    """Measure and print; 0 where the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with models and tinystories")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--codes", type=Path, help="folder of the real index; built there if it is not")
    options = parser.parse_args(given)
    import torch

    torch.set_num_threads(options.threads)
    real = real_index(options)
    index, size = enlarged(real, options.rows)
    plain = copy.copy(index)
    plain._kernel = None
    ways = {"scan": index} if index._kernel is None else {"scan": index, "no numba": plain}
    along, rest = real._directions.coded(real._directions.held_out)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ways, "floor")}
    same = True
    for number in range(options.rounds + 1):
        question, best = number % len(along), []
        for name in times:
            began = time.perf_counter(), time.process_time()
            if name == "floor":
                for shard in index._shards:
                    for key in ("codes", "signs"):
                        shard[key].view(-1)[: shard[key].numel() // 8 * 8].view(torch.int64).sum()
            else:
                first, second = ways[name].scan_parts(along[question : question + 1], rest[question : question + 1])
                raw = torch.from_numpy(first[0] + np.float32(real.measured["weight"]) * second[0])
                best.append(raw.topk(BEST).values)
            if number:  # the first reads what others have put out of the caches, and compiles
                times[name].append((1000 * (time.perf_counter() - began[0]), 1000 * (time.process_time() - began[1])))
        same &= all(torch.allclose(each, best[0], rtol=1e-4) for each in best)
    scan, floor = (statistics.median(wall for wall, _ in times[name]) for name in ("scan", "floor"))
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(times["scan"], times["floor"], strict=True))
    print(f"{len(index):,} rows, {size / len(index):,.0f} bytes each, {options.threads} threads; best score {best[0][0]:.3g}")
    for name, each in times.items():
        wall, processor = (statistics.median(column) for column in zip(*each, strict=True))
        print(f"{name:<9}{wall:9.1f} ms  {min(each)[0]:.1f} at best  {processor:.1f} of processors")
    print(f"a scan and its best {BEST}: {scan:.0f} ms (target {MILLISECONDS:.0f}), {ratio:.2f} times the floor ({TIMES_FLOOR})")
    print(f"that is {size / scan / 1e6:.1f} GB/s, and {size / floor / 1e6:.1f} at the floor")
    if not same:
        print(f"the best {BEST} scores differ with numba and without")
    return int(scan > MILLISECONDS or ratio > TIMES_FLOOR or not same)


def real_index(options: argparse.Namespace) -> Any:
    """An index of 1 KiB per row of how some stories begin."""
    import whence

    model, tokenizer = whence.load_model(str(options.data / MODEL), device="cpu")
    stories = whence.load_data(options.data / STORIES, limit=getattr(options, "stories", 600))
    task = whence.CausalLM(tokenizer, 64)
    curvature = whence.fit(model, task, stories, examples=60)
    return whence.build_index(model, task, stories, curvature=curvature, bytes=1, out=options.codes)


def enlarged(real: Any, rows: int) -> tuple[Any, int]:
    """An index of so many rows, drawn from those of a real one, and the bytes that a scan reads."""
    import pandas
    import torch

    from whence.indexing import Index
    from whence.store.memory import Memory

    folder, draw = Memory(), np.random.default_rng(0)
    parts = {key: torch.cat([shard[key] for shard in real._shards]) for key in ("codes", "scale", "signs", "size", "norm")}
    starts = range(0, rows, SHARD)
    for number, start in enumerate(starts):
        places = torch.from_numpy(draw.integers(0, len(real), min(SHARD, rows - start)))
        tensors = {key: tensor[places] for key, tensor in parts.items()}
        folder.save(f"rows-{number:04d}", {**tensors, "indices": torch.arange(start, start + len(places))})
    index = Index(folder, pandas.DataFrame(index=range(rows)), real.about | {"chunks": len(starts)})
    return index, sum(shard[key].nbytes for shard in index._shards for key in ("codes", "scale", "signs", "size"))


if __name__ == "__main__":
    sys.exit(main())

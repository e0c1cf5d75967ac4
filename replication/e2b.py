"""E2b."""

import sys
import time
from pathlib import Path

import torch

from replication.tinystories import make_world
from replication.two_stage import make_truth, removals

SUBSETS, SHARE, SEEDS = 32, 0.1, (0, 1, 2)
TRUTHS = Path(__file__).parent / "results" / "truths"
if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in SEEDS:
        world = make_world(Path(sys.argv[1]), seed)
        began = time.process_time()
        truth = make_truth(world, removals(world, SUBSETS, SHARE), TRUTHS / f"tinystories-{seed}.npz")
        print(
            seed,
            truth.seconds,
            {n: (float(c.std()), float(truth.whole[n].mean())) for n, c in truth.changes.items()},
            flush=True,
        )

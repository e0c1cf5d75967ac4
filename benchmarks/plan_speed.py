"""How long a plan takes: of a Llama as wide as those of 8B, with and without remembered calls (`whence.planning.calls`).

python -m benchmarks.plan_speed                # 4 layers, both ways: processor seconds, their ratio, the plans compared
python -m benchmarks.plan_speed --layers 32    # all 8B on one GPU of 80 GB: seconds, and the plan that was found
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest import mock

import torch

import whence
from benchmarks.plan_check import Case, rows, tokenizer
from whence.planning import calls

GPU = {"device": "cuda", "memory": 80 * 10**9, "calibrate": False}


def main() -> None:
    """Plan, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of 4096 wide MLPs of 14336; 32 are planned once, as users do")
    layers = parser.parse_args().layers
    torch.set_num_threads(1)
    if layers > 4:
        seconds, plan = planned(layers, **GPU)
        print(plan, plan.changes, f"\n{layers} layers: planned in {seconds:.0f} s of processor time", sep="\n")
        return
    _ = planned(1)
    with mock.patch.object(calls, "_described", never):
        asked, one = planned(layers)
    calls._known.clear()
    remembered, other = planned(layers)
    same = [stage == again for stage, again in zip(one.stages, other.stages, strict=True)]
    print(
        f"{layers} layers: {asked:.1f} s of processor time, {remembered:.1f} s with remembered calls: {remembered / asked:.2f}"
    )
    print(f"{sum(same)} of {len(same)} stages have the same seconds, memory and files")
    if not all(same):
        raise SystemExit(1)


def never(value: Any, tensors: Any) -> None:
    """For no call is all said by the shapes."""
    raise calls._MoreToIt


def planned(layers: int, **settings: Any) -> tuple[float, whence.Plan]:
    """Processor seconds of a plan, and the plan."""
    from transformers import LlamaConfig, LlamaForCausalLM

    case = Case("8b", tokens=300, train=96, ragged=True)
    wide: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    with torch.device("meta"):
        config = LlamaConfig(vocab_size=128_256, num_hidden_layers=layers, num_key_value_heads=8, **wide)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    began = time.process_time()
    common: dict[str, Any] = {"queries": rows(case, "queries"), "device": "cpu", "calibrate": False}
    plan = whence.plan(model, whence.CausalLM(tokenizer(case)), rows(case, "train"), **common | settings)
    return time.process_time() - began, plan


if __name__ == "__main__":
    main()

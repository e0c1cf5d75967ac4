"""What is frozen of the numeric work: fits, scores, indices and texts of tiny models, with checksums and hashes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from distributed.work import arrays
from models import randomised, texts, tokenizer
from oracle import matrices_of
from safetensors import safe_open
from torch import Tensor, nn

import whence
from whence.linalg.rotation import Rotation
from whence.operators.eigen import BlockDiagonal, EigenBlock
from whence.precision import Precision

TOLERANCE = {"fit": 1e-9, "score": 1e-9, "index": 1e-9, "search": 1e-5, "texts": 1e-5}
"""Of results of float64 models, relative to their mean size; searches and log-probabilities are float32 even there."""

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SHARED = {"vocab_size": 20, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, **SHARED, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(**SHARED, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=32),
    "neox": transformers.GPTNeoXConfig(**SIZES, **SHARED),
}

PARTS: dict[str, Any] = {"chunks": 4, "batch_tokens": 24, "precision": Precision(products="float32")}
"""Several chunks of several batches."""

FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, ekfac": ("llama", {"modules": "all"}),
    "gpt2, ekfac": ("gpt2", {"modules": "all"}),
    "neox, ekfac": ("neox", {"modules": "all"}),
    "kfac": ("llama", {"method": "kfac"}),
    "shampoo": ("llama", {"method": "shampoo"}),
    "diagonal": ("llama", {"method": "diagonal"}),
    "identity": ("llama", {"method": "identity"}),
    "labels of the data": ("llama", {"labels": "data"}),
    "groups": ("llama", {"groups": 2}),
    "one chunk": ("llama", {"chunks": 1}),
    "draws": ("llama", {"draws": 2}),
    "split": ("gpt2", {"largest_factor": 10}),
}
SCORES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "tokens": {"per": "token"},
    "modules": {"per": "module"},
    "rank": {"rank": 4},
    "rescored": {"rank": 1, "rescore": 2},
    "queries": {"aggregate": "queries"},
    "examples": {"aggregate": "examples"},
    "both": {"aggregate": ("queries", "examples")},
    "norms": {"norms": ("cosine", "relatif")},
}
SHORT = Precision(products="bfloat16", scores="bfloat16", statistics="bfloat16")
"""Of float32 models only: a float64 model is never lowered."""


def model(name: str, dtype: torch.dtype) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return randomised(transformers.AutoModelForCausalLM.from_config(MODELS[name]).double().eval()).to(dtype)


def fits(folder: Path, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """The dense curvature of each module, by every method; the factors lie in `folder`."""
    work = dict(FITS)
    if dtype == torch.float32:
        work["short products"] = ("llama", {"precision": SHORT})
    task, rows = whence.CausalLM(tokenizer()), texts(20, seed=1)
    return {
        way: matrices_of(whence.fit(model(name, dtype), task, rows, out=folder / way, save_every=0.0, **(PARTS | settings)))
        for way, (name, settings) in work.items()
    }


def scores(folder: Path, dtype: torch.dtype) -> dict[str, dict[str, np.ndarray]]:
    """All numbers of scores in all ways, and of self-influence; needs the `fits` in the folder beside."""
    task, rows, queries = whence.CausalLM(tokenizer()), texts(20, seed=1), texts(6, seed=2)[::2]
    found = {}
    for name, ways in {"llama": SCORES, "gpt2": {"pairs": {}}, "neox": {"pairs": {}}}.items():
        operator = whence.open_factors(folder.parent / "fit" / f"{name}, ekfac").inverse(damping=0.1)
        given, out = model(name, dtype), folder / name
        for way, settings in ways.items():
            done = whence.score(given, task, queries, rows, operator, out=out / way, **PARTS, **settings)
            found[f"{name}, {way}"] = arrays(done)
        found[f"{name}, in memory"] = arrays(whence.score(given, task, queries, rows, operator, precision=PARTS["precision"]))
        found[f"{name}, self"] = arrays(whence.self_influence(given, task, rows, operator, out=out / "self", **PARTS))
        if dtype == torch.float32:
            short = whence.score(given, task, queries, rows, operator, **(PARTS | {"precision": SHORT}))
            found[f"{name}, short products"] = arrays(short)
    return found


def searches(folder: Path, dtype: torch.dtype) -> dict[str, dict[str, np.ndarray]]:
    """What searches find in indices, which lie in `folder`; needs the `fits` in the folder beside."""
    task, rows, queries = whence.CausalLM(tokenizer()), texts(20, seed=1), texts(6, seed=2)[::2]
    curvature = whence.open_factors(folder.parent / "fit" / "llama, ekfac")
    if dtype == torch.float64:
        curvature = settled(curvature)
    given, found = model("llama", dtype), {}
    for kept in ("int8", "float16", "float32"):
        for way, base in {kept: None, f"{kept}, with curvature": curvature}.items():
            selected = {"modules": "all"} if base is None else {"curvature": base}
            index = whence.build_index(given, task, rows, dim=4, kept=kept, out=folder / way, **PARTS, **selected)
            inverse = base and base.inverse(damping=0.1)
            found[way] = arrays(index.search(given, task, queries, inverse))
    return found


def settled(curvature: whence.Curvature) -> whence.Curvature:
    """The same eigenvalues in coordinates made up here: which eigenvectors a library finds differs between processors."""
    draw = torch.Generator().manual_seed(0)

    def rotation(width: int) -> Rotation:
        return Rotation((torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q,))

    blocks = {name: EigenBlock(*map(rotation, block.lam_OI.shape), block.lam_OI) for name, block in curvature.blocks.items()}
    return replace(curvature, operator=BlockDiagonal(blocks))


def generated(dtype: torch.dtype) -> dict[str, list[list[Any]]]:
    """Texts, with their log-probabilities in nats."""
    prompts = [row["prompt"] for row in texts(6, seed=3)[::2]]
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "drawn": {"temperature": 1.0, "seed": 1}, "one by one": {"batch_size": 1}}
    return {
        f"{name}, {way}": [
            [answer["completion"], answer["logprob"]]
            for answer in whence.generate(model(name, dtype), tokenizer(), prompts, 8, **settings)
        ]
        for name in MODELS
        for way, settings in ways.items()
    }


def results(folder: Path, dtype: torch.dtype) -> dict[str, dict[str, Mapping[str, Any]]]:
    """What several processes can do, by kind."""
    return {"fit": fits(folder / "fit", dtype), "score": scores(folder / "score", dtype)}


def checksum(array: Any) -> dict[str, Any]:
    """Shape, mean size, a sum with a weight of its own for every entry, the first and the last entry; of finite entries."""
    values = np.asarray(array, dtype=np.float64)
    flat = values[np.isfinite(values)]
    weights = np.cos(np.arange(1, flat.size + 1))
    sums = (
        {"size": np.abs(flat).mean(), "sum": (weights * flat).mean(), "first": flat[0], "last": flat[-1]} if flat.size else {}
    )
    finite = {} if flat.size == values.size else {"finite": flat.size}
    return {"shape": list(values.shape), **finite, **{name: float(f"{value:.13g}") for name, value in sums.items()}}


def close(kind: str, found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two checksums agree but for rounding."""
    error = TOLERANCE[kind] * expected.get("size", 0)
    return found.keys() == expected.keys() and all(
        abs(found[name] - value) <= error if isinstance(value, float) else found[name] == value
        for name, value in expected.items()
    )


def digest(tensors: Mapping[str, Any]) -> str:
    """A hash of names, formats, shapes and bits."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = np.ascontiguousarray(tensor)
        state.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return state.hexdigest()[:16]


def shards(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every shard below a folder."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            found[file.relative_to(folder).as_posix()] = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def layout(tensors: Mapping[str, Tensor]) -> str:
    """Names, formats and shapes."""
    return "; ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in sorted(tensors.items())
    )

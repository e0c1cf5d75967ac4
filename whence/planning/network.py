"""A model as matrix products: what `whence.cost` needs to know of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from whence.cost import Network, Weight
from whence.coverage import Coverage
from whence.experts import expert_layers
from whence.fitting import Curvature
from whence.layers import Layer, layer_of

MULTIPLIED = ("linear", "convolution", "attention output", "expert")
"""Kinds of layer that are matrix products; looking up an embedding or scaling by a norm is none."""

MOVED_BY_NORM, MOVED_BY_LINEAR = 8, 3
"""Numbers per output that a norm with the residual around it reads and writes, and what follows a linear layer."""


def network(model: nn.Module, coverage: Coverage, readers: Mapping[str, str]) -> Network:
    """The model's products in the order of its modules; `readers` names the first tracked site that reads the same input."""
    sharing = Counter(readers.get(name, name) for name in coverage.sites)
    owners = {id(module): site for site in coverage.sites.values() for module, _ in site.uses}
    source, reached = None, False
    weights: Counter[Weight] = Counter()
    moved = 0
    for name, module, layer in _layers(model):
        n_out, n_in = layer.shape(module)
        site = coverage.sites.get(name) or (owners.get(id(module)) if layer.piece is None else None)
        tracked = site is not None
        own = readers.get(site.name, site.name) if site else None
        if tracked and source is None:
            source = own
        moved += _moved(layer, n_out, n_in)
        if layer.kind not in MULTIPLIED and not tracked:
            continue
        reached = reached or (source is not None and own != source)
        if layer.kind in MULTIPLIED:
            share = _routed(model) if layer.kind == "expert" else 1.0
            group = sharing[own] if own else 1
            weights[Weight(n_out, n_in, 1, tracked, max(1, group), reached, share=share)] += 1
        else:
            weights[Weight(n_out, n_in, 1, True, 1, False, not layer.one_hot, share=0.0)] += 1
    attention = _attention(model)
    layers = max(1, getattr(_config(model), "num_hidden_layers", 1) or 1)
    counted = tuple(
        Weight(w.n_out, w.n_in, count, w.tracked, w.shared, w.passes_back, w.has_out, w.share) for w, count in weights.items()
    )
    itemsize = next(model.parameters()).element_size()
    return Network(counted, attention, attention * (layers - 1) // layers, moved, itemsize)


def readers(curvature: Curvature) -> dict[str, str]:
    """The first site that reads the same input, by site: they share its basis."""
    first: dict[int, str] = {}
    found = {}
    for name, block in curvature.blocks.items():
        key = block.q_I.blocks[0].untyped_storage()._cdata if block.q_I else id(block)
        found[name] = first.setdefault(key, name)
    return found


def _layers(model: nn.Module) -> list[tuple[str, Any, Layer]]:
    found: list[tuple[str, Any, Layer]] = []
    for name, module in model.named_modules():
        layer = layer_of(module)
        layers = {name: layer} if layer else {f"{name}.{part}": each for part, each in expert_layers(module).items()}
        found += [(each, module, kind) for each, kind in layers.items()]
    return found


def _moved(layer: Layer, n_out: int, n_in: int) -> int:
    return MOVED_BY_NORM * n_in if layer.kind == "norm" else MOVED_BY_LINEAR * n_out if layer.kind == "linear" else n_in


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _attention(model: nn.Module) -> int:
    """Widths of all heads, added up over the layers; 0 for a model that says nothing of heads."""
    config = _config(model)
    heads, layers = getattr(config, "num_attention_heads", 0) or 0, getattr(config, "num_hidden_layers", 0) or 0
    if not isinstance(heads, int):
        return 0
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    return heads * width * layers


def _routed(model: nn.Module) -> float:
    """Share of the positions that an expert sees when the router is even."""
    config = _config(model)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, 0))), 1)
    return (getattr(config, "num_experts_per_tok", 1) or 1) / experts

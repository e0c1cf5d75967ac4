"""Seconds of a piece of work on a machine: FLOPs at the rate of products of its size, and bytes moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from whence import cost
from whence.cost import Network, Work
from whence.planning.machine import Machine

Batches = Mapping[tuple[int, int], float]
"""How often a batch of (examples, positions) comes up."""


def pass_seconds(machine: Machine, batches: Batches, width: float, work: Callable[[int, int], Work]) -> float:
    """Seconds of a pass over the batches, `work(examples, positions)` each."""
    total = Work()
    for (examples, tokens), count in batches.items():
        total += work(examples, tokens) * count
    return total.flops / machine.rate(width) + total.bytes / machine.move


def eigen_seconds(machine: Machine, network: Network) -> float:
    """Seconds of all eigendecompositions."""
    total = 0.0
    for weight in network.tracked:
        sides = [(weight.n_in, weight.count / weight.shared), (weight.n_out, weight.count * weight.has_out)]
        total += sum(9.0 * width**3 * count / machine.eigen_rate(width) for width, count in sides)
    return total


def typical_width(network: Network) -> float:
    """The width that decides how fast products run: of the narrower sides, weighted by FLOPs."""
    flops = [(min(weight.n_out, weight.n_in), weight.n_out * weight.n_in * weight.count) for weight in network.weights]
    return sum(width * size for width, size in flops) / max(1, sum(size for _, size in flops))


def floor_seconds(machine: Machine, network: Network, batches: Batches) -> float:
    """Seconds of forward and activation-only backward."""
    width = typical_width(network)
    return pass_seconds(machine, batches, width, lambda examples, tokens: cost.floor(network, examples, tokens))

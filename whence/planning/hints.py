"""What people wrongly expect of a plan."""

from __future__ import annotations

from whence.coverage import WIDE, Coverage
from whence.planning.plan import Settings

LORA_RANK = 16


def hints(coverage: Coverage, settings: Settings, itemsize: int) -> tuple[str, ...]:
    """Lines for this model and these settings."""
    if settings.fit.method in ("identity", "diagonal"):
        return ()
    found = []
    wide = [name for name, site in coverage.sites.items() if max(site.shape) > WIDE and not site.layer.one_hot]
    if wide and settings.fit.largest_factor is None:
        width = max(max(coverage.sites[name].shape) for name in wide)
        found.append(
            f"{wide[0]} is {width:,} wide: its covariance alone takes {width**2 * itemsize / 1e9:.1f} GB; leave it out, or "
            f"--largest-factor 8192 [WHENCE-18]"
        )
    shapes = [site.shape for site in coverage.sites.values()]
    now = _covariances(shapes, itemsize) / 1e9
    if any(".lora_" in name for name in coverage.sites):
        found.append(
            "LoRA does not shrink the factors: each adapter has a side as wide as the layer it adapts, and the covariances "
            f"take {now:.2g} GB [WHENCE-12]"
        )
    elif now > 1:
        adapters = [(LORA_RANK, n_in) for _, n_in in shapes] + [(n_out, LORA_RANK) for n_out, _ in shapes]
        found.append(
            f"LoRA would not shrink this: with adapters of rank {LORA_RANK} on the same layers the covariances still take "
            f"{_covariances(adapters, itemsize) / 1e9:.2g} of {now:.2g} GB, for their full-width sides [WHENCE-12]"
        )
    return tuple(found)


def _covariances(shapes: list[tuple[int, int]], itemsize: int) -> int:
    return sum(n_out**2 + n_in**2 for n_out, n_in in shapes) * itemsize

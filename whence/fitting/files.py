"""What a fit writes, told from shapes before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from whence.coverage import Site
from whence.engine.partition import module_groups
from whence.fitting.methods import method_named
from whence.linalg.rotation import split_sizes
from whence.settings import Fit


def most_bytes(sites: Mapping[str, Site], settings: Fit, number: int = 4) -> int:
    """Bytes in the folder of a fit at most, while it is at work; `number` are those of a number in its sums.

    All bases and eigenvalues, and those of the largest group once more: its sums stay until its eigenvalues are there.
    What stays takes less: three bytes a number, and inputs that several modules read are there once.
    """
    method = method_named(settings.method)
    if method.eigenvalues == "one":
        return 0

    def numbers(names: Iterable[str]) -> int:
        found = 0
        for site in (sites[name] for name in names):
            found += math.prod(site.shape)
            if method.basis != "identity":
                sides = site.shape[1:] if site.layer.one_hot else site.shape
                found += sum(width**2 for side in sides for width in split_sizes(side, settings.largest_factor))
        return found

    samples = 2 if settings.until else 1  # of which the larger is fitted beside the factors of the smaller
    return number * (samples * numbers(sites) + max(map(numbers, module_groups(sites, settings.groups))))

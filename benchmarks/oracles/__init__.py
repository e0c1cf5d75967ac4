"""Each method once more, slow and dense, in float64 and in the words of its paper; a module a family, `ORACLES` by name.

The tests of a method hold it against its oracle, and `python -m benchmarks.methods` prints how well they agree.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from benchmarks.oracles.base import Oracle


@functools.cache
def oracles() -> dict[str, Oracle]:
    """All oracles, by the name of their method."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {name: oracle for module in modules for name, oracle in getattr(module, "ORACLES", {}).items()}

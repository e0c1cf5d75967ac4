"""Pictures that nobody looks at: drawing them takes longer than the rest of a run of a tiny model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def blank() -> Iterator[None]:
    """Figures are made of their data as ever, and saved without what is on them."""
    from matplotlib.figure import Figure

    saved = Figure.savefig

    def save(drawing: Figure, *given: Any, **more: Any) -> None:
        saved(Figure(drawing.get_size_inches()), *given, **more | {"dpi": 10})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


def unseen(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do the work with blank pictures."""
    with blank():
        return work(*arguments)


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Pictures of factors are files with nothing in them: neither made nor drawn."""

    def save(drawing: Any, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG")
        return path

    patch.setattr("whence.report.factors.save", save)
    for name in ("lambda", "spectrum", "sides", "distribution", "cumulative"):
        patch.setattr(f"whence.plots.factors.draw_{name}", lambda *_: None)

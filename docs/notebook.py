"""The tutorial: a Python file in cells, run when the site is built, as a page and as a notebook.

A cell begins with `# %%`, one of text with `# %% [markdown]`: editors run such files cell by cell. What a cell's last
expression is worth is shown as Jupyter shows it: as HTML where it has a `_repr_html_`, else as text. Jupyter is not needed.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import escape

MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


@dataclass
class Cell:
    """A cell, and what it printed and showed."""

    source: str
    text: bool
    printed: str = ""
    shown: str = ""
    html: str = ""
    number: int = field(default=0)


def cells_of(source: str) -> list[Cell]:
    """The cells of a file."""
    _, *parts = MARK.split(source)
    kinds, bodies = parts[::2], parts[1::2]
    return [
        Cell(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip() if kind else body.strip(), bool(kind))
        for kind, body in zip(kinds, bodies, strict=True)
    ]


def run(source: str) -> list[Cell]:
    """Run the cells one after the other in a folder of their own; an error in one is raised."""
    cells, names = cells_of(source), dict[str, Any](__name__="tutorial")
    with tempfile.TemporaryDirectory() as folder, _inside(folder), contextlib.redirect_stderr(io.StringIO()):
        for number, cell in enumerate((cell for cell in cells if not cell.text), 1):
            cell.number, tree = number, ast.parse(cell.source)
            last, printed = tree.body[-1], io.StringIO()
            shown = ast.Expression(last.value) if isinstance(last, ast.Expr) else None
            tree.body = tree.body[:-1] if shown else tree.body
            with contextlib.redirect_stdout(printed):
                exec(compile(tree, f"cell {number}", "exec"), names)
                value = eval(compile(shown, f"cell {number}", "eval"), names) if shown else None
            cell.printed = printed.getvalue()
            if value is not None:
                cell.shown, cell.html = repr(value), getattr(value, "_repr_html_", str)()
    return cells


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def as_page(cells: list[Cell]) -> str:
    """The page of the site, in Markdown."""
    return "\n\n".join(part for cell in cells for part in _parts(cell)) + "\n"


def _parts(cell: Cell) -> Iterator[str]:
    if cell.text:
        yield cell.source
        return
    yield f"```python\n{cell.source}\n```"
    if cell.printed:
        yield f"```text\n{cell.printed.rstrip()}\n```"
    if cell.html:
        yield f'<div class="cell-output">{cell.html}</div>'
    elif cell.shown:
        yield f'<div class="cell-output"><pre>{escape(cell.shown)}</pre></div>'


def as_notebook(cells: list[Cell]) -> str:
    """The same as a notebook of Jupyter, format 4.5."""
    document = {
        "cells": [_cell(place, cell) for place, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _cell(place: int, cell: Cell) -> dict[str, Any]:
    made: dict[str, Any] = {"id": f"cell-{place}", "metadata": {}, "source": cell.source}
    if cell.text:
        return made | {"cell_type": "markdown"}
    outputs: list[dict[str, Any]] = []
    if cell.printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": cell.printed})
    if cell.shown:
        data = {"text/plain": cell.shown} | ({"text/html": cell.html} if cell.html else {})
        shown = {"output_type": "execute_result", "execution_count": cell.number, "data": data, "metadata": {}}
        outputs.append(shown)
    return made | {"cell_type": "code", "execution_count": cell.number, "outputs": outputs}


if __name__ == "__main__":
    import sys

    done = run(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.stdout.write(as_notebook(done) if "--notebook" in sys.argv else as_page(done))

"""Which module of the package imports which, read from the sources, for rules about them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import whence

PACKAGE = Path(whence.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(source: Path) -> str:
    """The name of a module below the package: "store/manifest", "store" for store/__init__.py, "" for the package itself."""
    return (
        source.relative_to(PACKAGE.parent)
        .with_suffix("")
        .as_posix()
        .removesuffix("/__init__")
        .removeprefix("whence")
        .strip("/")
    )


MODULES = {module_of(source): source for source in SOURCES}


@functools.cache
def imports() -> dict[str, set[str]]:
    """For each module those that it imports, at its head or inside of functions, except for type checkers alone.

    Importing a module runs the `__init__` of the packages that it is in; the importer's own packages have run already.
    """
    return {
        name: _with_packages(name, set(_imported(ast.parse(source.read_text(encoding="utf-8")))))
        for name, source in MODULES.items()
    }


def reached(*roots: str) -> set[str]:
    """These modules, and all that they import, and so on."""
    seen, left = set[str](), list(roots)
    while left:
        if (name := left.pop()) not in seen:
            seen.add(name)
            left += imports()[name]
    return seen


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            yield from _imported(node)
            continue
        for name in names:
            if name.split(".")[0] == "whence":
                place = name.replace(".", "/").removeprefix("whence").strip("/")
                yield place if place in MODULES else place.rpartition("/")[0]


def _with_packages(importer: str, names: set[str]) -> set[str]:
    packages = {name[:end] for name in names for end, letter in enumerate(name) if letter == "/"}
    found = names | {package for package in packages if package in MODULES}
    return {name for name in found if name != importer and not f"{importer}/".startswith(f"{name}/") and name}

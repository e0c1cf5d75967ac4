"""Comparing with what is frozen beside this file, or freezing it anew (`pytest --freeze`)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
VALUES = HERE / "frozen.json"


def pytest_addoption(parser):
    parser.addoption("--freeze", action="store_true", help="rewrite what the guards compare with (see tests/guards)")


class Frozen:
    """What is frozen; compares, or rewrites where `anew`."""

    def __init__(self, anew: bool):
        self.anew = anew

    def text(self, name: str, found: str) -> None:
        """Compare with a text file."""
        file = HERE / name
        if self.anew:
            file.parent.mkdir(exist_ok=True)
            file.write_text(found, encoding="utf-8")
        expected = file.read_text(encoding="utf-8") if file.exists() else ""
        diff = difflib.unified_diff(expected.splitlines(), found.splitlines(), f"frozen {name}", "found", lineterm="")
        assert found == expected, "\n" + "\n".join(diff)

    def values(self, section: str, found: Mapping[str, Any], same: Callable[[Any, Any], bool] = lambda a, b: a == b) -> None:
        """Compare every value with that of its name in a section of `frozen.json`, and the names."""
        found = json.loads(json.dumps(found))
        if self.anew:
            _write({**_read(), section: found})
        expected = _read().get(section, {})
        differ = [name for name in expected | found if name not in expected or name not in found]
        differ += [name for name in expected if name in found and not same(found[name], expected[name])]
        lines = (f"{name}\n  frozen {expected.get(name)}\n  found  {found.get(name)}" for name in differ)
        assert not differ, f"{section}: {len(differ)} of {len(expected)} values moved\n" + "\n".join(lines)

    def has(self, section: str) -> bool:
        """Whether there is something to compare with, or it is about to be written."""
        return self.anew or section in _read()


@pytest.fixture
def frozen(request) -> Frozen:
    """What is frozen."""
    return Frozen(request.config.getoption("--freeze"))


def _read() -> dict[str, dict[str, Any]]:
    return json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.exists() else {}


def _write(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """One value a line, sorted, for small diffs."""
    parts = []
    for section, values in sorted(sections.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(values.items()))
        parts.append(f" {json.dumps(section)}: {{\n{lines}\n }}")
    VALUES.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

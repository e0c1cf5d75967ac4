"""The table of faults names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")


def test_every_fault_has_a_test_that_exists():
    page = (ROOT / "docs" / "faults.md").read_text().partition("\n## ")[2]  # what comes before was measured
    cases = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| case |")]
    assert len(cases) > 300
    assert [line for line in cases if not NAMED.search(line)] == []
    named = {pair for line in cases for pair in NAMED.findall(line)}
    there = {file: defined(ROOT / file) for file, _ in named}
    assert sorted(pair for pair in named if pair[1] and pair[1] not in there[pair[0]]) == []


def defined(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}

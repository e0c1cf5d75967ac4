"""What holds of every method: a source with its year, settings that say what they mean, an oracle, a short file, no loops."""

import ast
import inspect
import io
import re
import tokenize
from dataclasses import MISSING
from pathlib import Path

import pytest

from benchmarks.oracles import oracles
from whence import methods
from whence.methods.base import attribute, recipes
from whence.settings import settings_of

CODE, LONGER = 60, {"source": 120, "magic": 120, "mirror": 80}
"""Lines of code that the file of a recipe may have, but for imports and docstrings."""

ROWS = {"rows", "usable", "examples", "batches", "loader"}
"""What a loop may not run over: passes over the data are the engine's."""

CONTROLS = {"random", "gradient-norm", "self-influence"}
"""Methods that do not read the query come from no paper."""

RECIPES = [pytest.param(recipe, id=name) for name, recipe in recipes().items()]
FILES = [
    pytest.param(file, id=file.stem)
    for file in sorted(Path(methods.__file__).parent.glob("*.py"))
    if "RECIPES = " in file.read_text()
]


def lines_of_code(text: str) -> int:
    """Lines with code: no blank ones, comments, docstrings or imports."""
    tree, silent = ast.parse(text), set[int]()
    for node in ast.walk(tree):
        documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if documents or isinstance(node, ast.Import | ast.ImportFrom):
            silent.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kinds = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in kinds]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - silent)


def loops_over_rows(text: str) -> list[str]:
    """The loops whose iterable speaks of rows."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.For) and not isinstance(node.iter, ast.Tuple):
            names = {getattr(each, "attr", getattr(each, "id", "")) for each in ast.walk(node.iter)}
            found += [f"line {node.lineno}: for ... in {ast.unparse(node.iter)}"] * bool(names & ROWS)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_says_what_it_is(recipe):
    assert recipe.title and recipe.price and (recipe.make if not hasattr(recipe.make, "func") else recipe.make.func).__doc__
    assert recipe.name in CONTROLS or re.search(r"\b(19|20)\d\d\b", recipe.source), f"no year in {recipe.source!r}"
    assert re.fullmatch(r"[a-z][a-z0-9-]*", recipe.name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_settings_have_meanings_and_defaults_that_are_valid(recipe):
    chosen = recipe.settings()
    names = {setting.name for setting in settings_of(recipe.settings)}
    assert not names & set(inspect.signature(attribute).parameters), "attribute(...) takes these for its own"
    for setting in settings_of(recipe.settings):
        assert setting.default is not MISSING and setting.meaning.strip() and "\n" not in setting.meaning, setting.name
        assert setting.check(setting.default) == getattr(chosen, setting.name), setting.name
        assert str(setting.default) == "None" or recipe.own({setting.name: setting.default}, typed=True) == chosen


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_has_an_oracle(recipe):
    assert recipe.name in oracles(), "benchmarks/oracles/<family>.py: ORACLES"


def test_no_oracle_is_left_over():
    assert set(oracles()) <= set(recipes())


@pytest.mark.parametrize("file", FILES)
def test_its_file_is_short_and_leaves_passes_over_rows_to_the_engine(file):
    text = file.read_text()
    assert lines_of_code(text) <= LONGER.get(file.stem, CODE)
    assert not loops_over_rows(text)


COUNTED = '''"""One.

Two."""

import a  # why

# alone
def f(rows):
    """Three."""
    for row in rows:
        a(
            row
        )
    for start in range(0, len(point.examples.usable), 8):
        pass
    for name in names:
        pass
'''


def test_lines_and_loops_are_counted():
    assert lines_of_code(COUNTED) == 9
    assert loops_over_rows(COUNTED) == [
        "line 10: for ... in rows",
        "line 14: for ... in range(0, len(point.examples.usable), 8)",
    ]

"""The house rules that a reader can rely on: imports go down and are quick, things have one owner."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from imports import PACKAGE, SOURCES, imports, reached

import whence

SECONDS = 0.5

FLOORS = [
    {
        "attention",
        "casting",
        "config",
        "cost",
        "dist",
        "errors",
        "escapes",
        "parcels",
        "precision",
        "progress",
        "settings",
        "shortage",
        "show",
        "version",
    },
    {"linalg"},
    {"gradients", "operators"},
    {"adapters", "capture", "coverage", "data", "experts", "layers", "models", "opened", "store", "tasks"},
    {"engine", "filter"},
    {"fitting", "indexing", "scoring", "train"},
    {"methods"},
    {"stages"},
    {
        "",
        "demo",
        "evaluate",
        "finding",
        "funnel",
        "generation",
        "planning",
        "plots",
        "report",
        "selftest",
        "validate",
    },  # "" is the package itself, a lazy door to all below
    {"loading", "run"},
    {"pipeline", "recipes"},
    {"serve"},
    {"__main__", "cli"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

PASSED_ON = 10
"""Parameters that a function may have only to pass them on; with more of them it wants a settings object."""


def name_of(source: Path) -> str:
    """The first part of a module's name below the package: "store" for store/manifest.py, "" for the package."""
    part = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if part == "__init__" else part


def is_module(name: str) -> bool:
    """Whether the package has a module or subpackage of that name."""
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()


def imported(source: Path) -> set[str]:
    """First parts of what a file imports from the package, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: imports are absolute here"
            parts = [alias.name for alias in node.names if node.module == "whence" and is_module(alias.name)]
            modules = [f"whence.{part}" for part in parts] or [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        names |= {(module.split(".") + [""])[1] for module in modules if module.split(".")[0] == "whence"}
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(PACKAGE)))
def test_imports_go_down(source):
    name = name_of(source)
    assert name in FLOOR, f"give {name!r} a floor in FLOORS"
    above = {other for other in imported(source) if FLOOR[other] > FLOOR[name]}
    assert name == "" or not above, f"{name} (floor {FLOOR[name]}) imports {', '.join(sorted(above))} from above"


def test_no_import_goes_in_a_circle():
    """Not even through imports inside of functions; only those for type checkers don't count."""
    circles = {name for name, others in imports().items() if name in reached(*others)}
    assert not circles, f"each of these imports itself by way of others: {', '.join(sorted(circles))}"


def passed_on(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Parameters that are used as arguments of calls, by position or by name, and for nothing else."""
    names = {each.arg for each in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]}
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    arguments = {id(value) for call in calls for value in [*call.args, *(word.value for word in call.keywords)]}
    used = [node for node in nodes if isinstance(node, ast.Name) and node.id in names]
    return {node.id for node in used if id(node) in arguments} - {node.id for node in used if id(node) not in arguments}


def test_functions_do_not_pass_many_parameters_on():
    found = {}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(passed_on(node)) > PASSED_ON:
                found[f"{source.relative_to(PACKAGE)} {node.name}"] = len(passed_on(node))
    assert not found, "give these a settings object"


def test_only_capture_knows_hooks_and_only_dist_knows_ranks():
    owners = {"register_forward_hook": "capture", "register_hook": "capture", "torch.distributed": "dist"}
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        for word, owner in owners.items():
            assert word not in text or name_of(source) == owner, (
                f"{source.relative_to(PACKAGE)} uses {word}: that is for {owner}"
            )


def test_every_public_name_can_be_had():
    assert whence.__all__ == sorted(whence.__all__) == dir(whence)
    for name in whence.__all__:
        assert getattr(whence, name) is not None


def test_importing_a_module_does_not_hide_a_public_name():
    for name in set(whence.__all__) - {"__version__"}:
        assert not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists(), (
            f"the module would replace whence.{name}"
        )


def test_unknown_names_are_named():
    with pytest.raises(AttributeError, match="nonsense"):
        whence.nonsense  # noqa: B018


def seconds(*command: str) -> float:
    """Processor time of a Python process, the least of three: what it takes on a machine that does nothing else."""
    took = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(took)


def test_import_is_quick_and_leaves_torch_alone():
    heavy = "{'torch', 'transformers', 'numpy', 'pandas'}"
    assert seconds("-c", f"import whence, sys; assert not {heavy} & set(sys.modules)") < SECONDS


def test_help_is_quick():
    assert seconds("-m", "whence", "--help") < SECONDS


def test_commands_exist_and_import_nothing_heavy():
    from whence.cli import COMMANDS

    for home in COMMANDS.values():
        module, function = home.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    listing = (
        "import sys, whence.cli; whence.cli.build(); assert not {'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", listing], check=True)

"""What users type and read: help texts, the JSON Schema of a whence.yaml, public names and their parameters."""

import inspect

import pytest
from commands import assembled
from typer.testing import CliRunner

import whence
from guards.frozen import HERE
from whence import cli

GROUPS = sorted({name.split()[0] for name in cli.COMMANDS if " " in name})


def said(*words: str) -> str:
    """What a command writes on a wide terminal without colours."""
    result = CliRunner(env={"NO_COLOR": "1"}).invoke(assembled(), words, prog_name="whence", terminal_width=200)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", ["whence", *GROUPS, *cli.COMMANDS])
def test_help(frozen, name):
    frozen.text(f"help/{name.replace(' ', '-')}.txt", said(*name.removeprefix("whence").split(), "--help"))


def test_help_of_no_other_command(frozen):
    names = {f"{name.replace(' ', '-')}.txt" for name in ("whence", *GROUPS, *cli.COMMANDS)}
    for file in (HERE / "help").iterdir():
        if frozen.anew and file.name not in names:
            file.unlink()
    assert {file.name for file in (HERE / "help").iterdir()} == names


def test_schema(frozen):
    frozen.text("schema.json", said("config", "schema"))


def test_public_names(frozen):
    public = {name: getattr(whence, name) for name in whence.__all__}
    parameters = {name: list(inspect.signature(value).parameters) for name, value in public.items() if callable(value)}
    frozen.values("public names", {name: parameters.get(name) for name in public})

"""A command's options, made from sections."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from annotated_types import Ge
from typer.testing import CliRunner

from whence.cli.from_settings import Only, Without, from_settings
from whence.errors import UsageError
from whence.settings import Count, Positive, Section, setting


class Bread(Section):
    """A loaf."""

    flour: str = setting(..., "What it is made of.", "--flour", "-f")
    loaves: Count = setting(1, "How many.")
    hours: Positive = setting(1.5, "In the oven.")
    size: Count | Literal["all"] | None = setting(None, "How big.")
    keep: Count | None = setting(3, "Slices to keep.", none="all")
    crust: Literal["thin", "thick"] = setting("thin", "Around it.")
    sliced: bool = False
    salted: bool = True
    rye: bool | Literal["auto"] = setting("auto", "Whether it is dark?")
    seeds: tuple[str, ...] = setting(("poppy", "sesame"), "On top.")
    names: tuple[Literal["bun", "roll"], ...] = setting((), "Its names.", "--name")
    prices: dict[str, str] = setting({}, "By town.", metavar="TOWN=PRICE")
    extra: dict[str, Any] = setting({}, "Whatever else.")


class Oven(Section):
    """Where it is baked."""

    hours: Positive = setting(1.5, "In the oven.")
    folder: Path | None = setting(None, "Its place.", "--folder", "-f")
    heat: Annotated[int, Ge(3)] | None = None


@pytest.fixture
def bake():
    """Runs a command; says what it was given."""

    def bake(command, *words):
        given = {}
        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        app.command()(from_settings(command(given)))
        result = CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result if "--help" in words or result.exit_code else given

    return bake


def whole(given):
    def command(*, bread: Bread, oven: Oven, loud: bool = False) -> None:
        """Bake."""
        given.update(bread=bread, oven=oven, loud=loud)

    return command


def test_without_options_every_field_is_at_its_default(bake):
    assert bake(whole, "-f", "rye") == {"bread": Bread(flour="rye"), "oven": Oven(), "loud": False}


def test_every_kind_of_field_is_read(bake):
    words = (
        "--flour oat --loaves 2 --hours 0.5 --size all --keep all --crust thick --sliced --no-salted --rye --seeds a,b "
        "--name bun --name roll --prices Oslo=3 --prices Turin=4=5 --extra x=[1,2] --extra y=z --folder here --loud"
    )
    found = bake(whole, *words.split())
    assert found["bread"] == Bread(
        flour="oat", loaves=2, hours=0.5, size="all", keep=None, crust="thick", sliced=True, salted=False, rye=True,
        seeds=("a", "b"), names=("bun", "roll"), prices={"Oslo": "3", "Turin": "4=5"}, extra={"x": [1, 2], "y": "z"},
    )  # fmt: skip
    assert found["oven"] == Oven(hours=0.5, folder=Path("here")) and found["loud"], "one option for a field of two sections"
    assert bake(whole, "-f", "a", "--size", "7", "--keep", "2", "--no-rye")["bread"].changed(flour="") == Bread(
        flour="", size=7, keep=2, rye=False
    )


def test_the_help_says_type_bounds_default_and_meaning(bake):
    lines = " ".join(bake(whole, "--help").stdout.split())
    for line in (
        "-f, --flour <str> What it is made of. [required]",
        "--loaves N How many. [default: 1; x>=1]",
        "--hours X In the oven. [default: 1.5; x>=0]",
        "--size N|all How big.",
        "--keep N|all Slices to keep. [default: 3]",
        "--crust <thin|thick> Around it. [default: thin]",
        "--salted / --no-salted [default: salted]",
        "--rye / --no-rye Whether it is dark?",
        "--seeds <str> On top, joined by commas. [default: poppy,sesame]",
        "--prices TOWN=PRICE By town; repeat for more.",
        "--folder <path> Its place.",
    ):
        assert line in lines, line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hours", "0"], r"(?s)--hours can't be 0\..*greater than 0"),
        (["--size", "small"], r"(?s)--size can't be small\..*a valid integer or 'all'"),
        (["--name", "cake"], r"(?s)--name can't be cake\..*'bun' or 'roll'"),
        (["--prices", "Oslo"], r"(?s)--prices Oslo has no value\..*TOWN=PRICE"),
        (["--extra", "x"], r"(?s)--extra x has no value\..*NAME=VALUE"),
    ],
)
def test_refusals_name_the_option(bake, words, message):
    with pytest.raises(UsageError, match=message):
        bake(whole, "-f", "rye", *words)


def test_typer_refuses_the_rest(bake):
    for words in (["--loaves", "0"], ["--crust", "none"], ["--loaves", "many"]):
        assert bake(whole, "-f", "rye", *words).exit_code == 2


def test_fields_are_chosen_and_a_parameter_takes_the_place_of_a_field(bake):
    def command(given):
        def command(
            *,
            flour: Annotated[str, typer.Argument()],
            hours: Annotated[int | None, typer.Option("--hours", "-f")] = None,
            bread: Annotated[Bread, Only("flour", "loaves", "hours")],
            oven: Annotated[Oven, Without("heat")],
        ) -> None:
            given.update(bread=bread, oven=oven, hours=hours)

        return command

    found = bake(command, "rye", "-f", "4", "--loaves", "2")
    assert found == {"bread": Bread(flour="rye", loaves=2, hours=4.0), "oven": Oven(hours=4.0), "hours": 4}
    assert bake(command, "rye")["bread"].hours == 1.5
    assert bake(command, "rye", "--crust", "thick").exit_code == bake(command, "rye", "--heat", "5").exit_code == 2

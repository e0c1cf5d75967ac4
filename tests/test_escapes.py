"""Nothing that a user's file holds acts on a terminal: it is shown, in lines, tables, errors, warnings and JSON."""

import io
import json
import shutil
import subprocess
import unicodedata
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from whence.cli.console import Terminal, print_json
from whence.errors import UsageError, WhenceWarning
from whence.escapes import HIDDEN, command, visible, visible_json
from whence.show.bars import Lines, Outlook

NASTY = "a\x1b[31mred\x1b]0;title\x07\x00\x9b2J\u202eright\u2066\r\x7f\x85\u2028\ud800\U000e0041\ufeff b"

ACTING = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of characters that a terminal acts on; and of "Cf", all but the joiners of scripts and visible signs."""


def acts(text: str) -> set[str]:
    """The characters of a text that would act on a terminal."""
    return {char for char in text if unicodedata.category(char) in ACTING and char not in "\n\t"} | set(HIDDEN.findall(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\x00\x07\x08\r", r"\x00\x07\x08\r"),
        ("\x7f\x9b\x85", r"\x7f\x9b\x85"),
        ("x\u202ey\u2066\u200f", r"x\u202ey\u2066\u200f"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        (
            "zwj \u0646\u200c\u0627 \U0001f469\u200d\U0001f680, e\u0301\n\ttab",
            "zwj \u0646\u200c\u0627 \U0001f469\u200d\U0001f680, e\u0301\n\ttab",
        ),
    ],
)
def test_controls_are_written_as_python_writes_them(text, shown):
    assert visible(text) == shown and visible(shown) == shown


@given(st.text())
def test_no_text_acts_and_json_reads_back(text):
    assert not acts(visible(text))
    assert not acts(visible_json({text: [text]})) and json.loads(visible_json({text: [text]})) == {text: [text]}


@given(st.text(alphabet=st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1))
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_commands_can_be_pasted(word):
    """One shell for many words would be quicker, and would not show which one it was."""
    pasted = command("printf", "%s", word)
    assert not acts(pasted.replace("\n", "").replace("\t", ""))
    if HIDDEN.search(word) or any(sign in word for sign in " '\"$`\\!*"):
        done = subprocess.run(["bash", "-c", pasted], capture_output=True, check=True)
        assert done.stdout == word.encode()


def test_consoles_show_what_would_act():
    for options in ({"force_terminal": True, "color_system": "truecolor"}, {}):
        terminal = Terminal(file=io.StringIO(), width=200, highlight=False, **options)
        table = Table("name", "text")
        table.add_row(NASTY, Text("bold " + NASTY, style="bold"))
        lines = Lines(terminal, Outlook(None))
        for shown in (NASTY, Text(NASTY), table):
            terminal.print(shown, markup=False)
        lines.note(NASTY)
        written = terminal.file.getvalue()
        for own in ("\x1b[1m", "\x1b[0m"):  # colours of the console itself
            written = written.replace(own, "")
        assert not acts(written), acts(written)
        assert written.count(r"\x1b[31mred") == 5 and r"\u202e" in written


def test_tables_stay_aligned():
    terminal = Terminal(file=io.StringIO(), width=60, highlight=False)
    table = Table("id", "text", box=None)
    table.add_row("a\x1b[2Jb", "first")
    table.add_row("plain", "second")
    terminal.print(table)
    _, first, second = terminal.file.getvalue().splitlines()
    assert first.index("first") == second.index("second")


def test_errors_and_warnings_show_it():
    error = UsageError(f"No file {NASTY}", given=NASTY, accepted=NASTY, fix=NASTY)
    assert not acts(str(error)) and str(error).count(r"\x1b[31m") == 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(NASTY, WhenceWarning, stacklevel=1)
    assert not acts(str(caught[0].message))


def test_json_on_stdout(capsys):
    print_json({"text": NASTY})
    said = capsys.readouterr().out
    assert not acts(said) and json.loads(said) == {"text": NASTY}

"""What becomes of a result."""

import json

import numpy as np
import pytest

from whence.errors import UsageError
from whence.store.plain import plain
from whence.validate.results import Result, figures, keep, markdown_table, shown

ROWS = [{"method": "EK-FAC", "lds": 0.5, "low": 0.4, "high": 0.6}, {"method": "random", "lds": 0.01, "low": -0.1, "high": 0.1}]


def made(**changes):
    given = {"about": {"setting": "tiny", "kind": "halves"}, "tables": {"LDS, halves": ROWS}, "says": ["it is so"]}
    return Result("lds", **given | changes)


def test_a_row_is_found_by_its_columns():
    assert made().row(method="random")["lds"] == 0.01 and made().row(method="EK-FAC", low=0.4) is ROWS[0]
    with pytest.raises(UsageError, match="'LiSSA' was not measured") as caught:
        made().row(method="LiSSA")
    assert "EK-FAC, random" in str(caught.value)


def test_pages_have_a_heading_and_bullets_or_lines_as_they_are():
    expected = "## LDS, halves\n\n| method | lds | low | high |\n| --- | --- | --- | --- |\n| EK-FAC | 0.5 | 0.4 | 0.6 |\n"
    assert made().markdown().startswith("    it is so\n\n" + expected)
    assert made(heading="Title").markdown().startswith("# Title\n\n* it is so\n\n" + expected)
    assert "##" not in made(tables={"": ROWS}).markdown()


def test_cells_are_numbers_of_four_digits_or_empty():
    assert [shown(value) for value in (1 / 3, 12345.6, float("nan"), None, 7, "a")] == ["0.3333", "1.235e+04", "", "", "7", "a"]
    assert markdown_table([{"a": 1}, {"b": 2}]) == "| a | b |\n| --- | --- |\n| 1 |  |\n|  | 2 |\n" and markdown_table([]) == ""


def test_json_has_everything_and_no_number_that_is_none():
    found = made(flags=["doubtful"], arrays={"effects": {"cold": np.array([[1.0, np.nan]])}}).as_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["check", "setting", "kind", "summary", "tables", "flags", "effects"]
    assert found["effects"] == {"cold": [[1.0, None]]} and found["flags"] == ["doubtful"]
    assert plain((np.float32(0.5), float("inf"), True, "x")) == [0.5, None, True, "x"]


def test_columns_choose_the_figures(tmp_path):
    assert set(figures(made())) == {"lds"} and figures(made(tables={"": [{"check": "seeds"}], "none": []})) == {}
    auc = [{"method": "loss", "auc": 0.9, "auc_low": 0.8, "auc_high": 1.0}]
    assert set(figures(made(tables={"": auc}))) == {"auc"}
    written = [file.name for file in keep(made(), tmp_path)]
    assert written == ["result.json", "result.md", "lds.png"] and all((tmp_path / name).stat().st_size for name in written)

"""The Markdown report: the same numbers, and texts that stay texts."""

import re

import numpy as np
import pytest

from whence.report import build_report, gather, write_markdown
from whence.report.markdown import as_markdown, escaped
from whence.show.numbers import three_digits


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append(rows)
            rows = []
    return found


def test_rows_statistics_and_percentiles_are_those_of_the_scores(scores, tmp_path):
    report = build_report(scores)
    text = write_markdown(report, tmp_path / "report.md").read_text(encoding="utf-8")
    found = tables(text)
    assert all(len(row) == len(table[0]) for table in found for row in table), "no text breaks a table"
    for number, query in enumerate(report.queries):
        raises, lowers, statistics, percentiles = found[6 * number : 6 * number + 4]
        for table, lowest in ((raises, False), (lowers, True)):
            expected = [row.value for row in (query.lowers if lowest else query.raises)]
            assert len(expected) == 10 and [row[2] for row in table[2:]] == [three_digits(value) for value in expected]
            assert {row[1] for row in table[2:]} == {"lowers" if lowest else "raises"}
        values = scores.values[number]
        numbers = (values.max(), values.min(), values.mean(), np.median(values), values.std())
        assert [float(cell) for cell in statistics[2]] == pytest.approx(list(numbers), rel=6e-3)
        assert percentiles[0][0] == "10 %" and percentiles[0][-1] == "99 %"
        assert [float(cell) for cell in percentiles[2]] == pytest.approx(
            [np.percentile(values, int(name.split()[0])) for name in percentiles[0]], rel=6e-3
        )


def test_what_is_missing_is_said(scores):
    text = as_markdown(build_report(scores))
    assert "LDS: not measured" in text and "because it was not given: answers of the base model" in text
    assert "**hub**" in text and "WHENCE-20" in text and "Fragile" in text


def test_a_whole_run(run_folder):
    text = as_markdown(build_report(**gather(run_folder)))
    for words in ("**Base model:** base 3", "## Training", "## Health of the factors", "## Benchmark", "whence run", "abc123"):
        assert words in text, words


def test_texts_are_texts():
    assert escaped("<b> a|b *c* `d` _e_ [f](g) # \\ ~") == (r"&lt;b&gt; a\|b \*c\* \`d\` \_e\_ \[f\](g) \# \\ \~")
    assert escaped("one\ntwo\x00") == "one↵ two\ufffd"

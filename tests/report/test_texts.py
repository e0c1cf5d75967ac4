"""The form of Kronfluence's OpenWebText example: what it has, and its faults mended."""

import re

import numpy as np
import pytest
from PIL import Image

from whence.report import build_report, write_curves, write_texts
from whence.report.write import RULE
from whence.show.numbers import three_digits


def test_one_file_per_query_with_all_rows(scores, tmp_path):
    report = build_report(scores, top=6)
    files = write_texts(report, tmp_path / "queries")
    assert [file.name for file in files] == ["000.txt", "001.txt", "002.txt", "003.txt", "004.txt"]
    for query, file in zip(report.queries, files, strict=True):
        head, *blocks = file.read_text(encoding="utf-8").split(RULE + "\n")
        assert head.startswith(f"Query Sequence:\nPrompt: {query.prompt}; Completion: {query.completion}\n")
        assert head.count("nats per copy") == 1 and head.endswith("Top Influential Sequences:\n")
        first = [block.splitlines()[0] for block in blocks]
        rows = query.raises + query.lowers
        assert first == [f"Rank = {row.rank}; Score = {three_digits(row.value)}" for row in rows]
        for row, block in zip(rows, blocks, strict=True):
            assert block.splitlines()[1:][0] == row.text.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").split("\n")[0]


def test_special_tokens_are_not_repeated(scores, tmp_path):
    text = write_texts(build_report(scores), tmp_path)[0].read_text(encoding="utf-8")
    assert "<|endoftext|>A story.<|endoftext|>\n" in text and not re.search(r"<\|endoftext\|>\s*<\|endoftext\|>", text)


def test_the_same_form_as_the_example(scores, shared_data, tmp_path):
    theirs = sorted((shared_data / "kronfluence_owt" / "scores_raw").glob("*.txt"))[0].read_text(encoding="utf-8")
    ours = write_texts(build_report(scores), tmp_path)[0].read_text(encoding="utf-8")

    def lines(text):
        kinds = (
            r"Query Sequence:$",
            r"Prompt:.*; Completion:",
            r"Top Influential Sequences:$",
            r"={80}$",
            r"Rank = \d+; Score = \S+$",
        )
        return [kind for line in text.splitlines() for kind in kinds if re.match(kind, line)][:7]

    assert lines(ours) == lines(theirs) and len(lines(ours)) == 7


def test_a_picture_per_query(scores, tmp_path):
    files = write_curves(build_report(scores), tmp_path)
    assert len(files) == 5
    for file in files:
        picture = np.asarray(Image.open(file).convert("RGB")).astype(int)
        blue = (picture[..., 2] > picture[..., 0] + 60).sum()
        orange = (picture[..., 0] > picture[..., 2] + 60).sum()
        assert min(blue, orange) > 500, "both signs are drawn"
    assert pytest.approx(picture.shape[1] / picture.shape[0], rel=0.05) == 9 / 3.6

"""The refinement benchmark on made-up stories: what it prints, and that refining refines."""

import json
import random
import sys

import pytest

from benchmarks import refinement


@pytest.fixture
def data(tmp_path):
    draw, words = random.Random(0), [first + rest for first in "bdfglmnprst" for rest in ("an", "ella", "ip", "oud", "urt")]
    stories = [{"text": " ".join(draw.choices(words, k=30)) + "."} for _ in range(440)]
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / "train_2316.jsonl").write_text("\n".join(map(json.dumps, stories)))
    return tmp_path


def test_what_it_prints(data, monkeypatch, capsys):
    given = ["--rows", "24", "--queries", "2", "--modules", "*.1.mlp.down_proj", "--depth", "60", "--residual", "0.05"]
    monkeypatch.setattr(sys, "argv", ["refinement", "--data", str(data), *given])
    refinement.main()
    told = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[:2] for row in told[:4]] == [["EK-FAC", "0"], ["ASTRA", "25"], ["ASTRA", "50"], ["ASTRA", "60"]]
    solved = told[4:]
    assert [row[0] for row in solved] == ["block CG"] * len(solved) and float(solved[-1][4]) > 0.999
    assert [float(row[2]) for row in solved] == list(range(1, len(solved) + 1))
    assert float(told[3][4]) > max(float(told[0][4]), 0.9) and float(told[0][3]) == 0 < float(told[1][3]) < float(told[3][3])

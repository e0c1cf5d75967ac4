"""The benchmark of candidates: rows from real text, recall as it is meant, a peer's file, times, and the page."""

import json

import numpy as np

from benchmarks.funnel import CHARACTERS, Bench, Sequences, begun, corpus, markdown, pieces, recall


def test_rows_are_real_text_each_once(tmp_path):
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "webtext").mkdir()
    (tmp_path / "tinyshakespeare").mkdir()
    stories = [" ".join(f"s{story}w{word}" for word in range(60)) for story in range(320)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in stories)
    (tmp_path / "tinystories/train_2316.jsonl").write_text(lines)
    (tmp_path / "webtext/c4_demo.jsonl").write_text(json.dumps({"text": "only one page"}) + "\n")
    for name in (
        "wikitext2/wiki.valid.tokens",
        "wikitext2/wiki.test.tokens",
        "webtext/wiki_demo.txt",
        "tinyshakespeare/input.txt",
    ):
        (tmp_path / name).write_text(" ".join(f"{name[-9:]}{word}" for word in range(200)))
    rows = corpus(tmp_path, 80)
    assert len(rows) == 80 and len({row["text"] for row in rows}) == 80
    assert sum(row["source"] == "stories" for row in rows) == 40 and all(len(row["text"]) <= CHARACTERS for row in rows)
    assert not any("s300w" in row["text"] for row in rows), "these are held out"
    assert corpus(tmp_path, 80) == rows
    assert all(len(row["prompt"].split()) == 10 and row["completion"].startswith(" ") for row in begun(stories, 12))
    assert stories[0].startswith(" ".join(pieces(stories[:1])))


def test_recall():
    scores = np.array([[5.0, 4.0, 3.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    assert recall(scores, np.array([0, 3]), 2).tolist() == [0.5, 0.5]
    assert recall(scores, np.array([0, 1]), 2).tolist() == [1.0, 0.0]


def test_a_peer_reads_what_was_written(tmp_path):
    np.savez(
        tmp_path / "rows.npz", **{"train": np.arange(9), "train sizes": [2, 3, 4], "queries": [7, 8], "queries sizes": [1, 1]}
    )
    found = Sequences("x", "llama", "tiny", "mlp", train=2, queries=2, length=4, file=str(tmp_path / "rows.npz"))
    assert [row.tolist() for row in found.sequences("train")] == [[0, 1], [2, 3, 4]]
    assert [row.tolist() for row in found.sequences("queries")] == [[7], [8]]


def test_what_was_kept_has_the_time_it_took(tmp_path, monkeypatch):
    bench = Bench.__new__(Bench)
    bench.work, bench.seconds = tmp_path, {}
    (tmp_path / "scan").mkdir()
    with bench.timed("scan"):
        assert not (tmp_path / "scan").exists(), "half of a scan would be half of the time"
        (tmp_path / "scan").mkdir()
    first = bench.seconds["scan"].wall
    with bench.timed("scan"):
        assert (tmp_path / "scan").exists()
        np.linalg.svd(np.ones((300, 300)))
    assert bench.seconds["scan"].wall == first


def test_the_page_says_what_was_missed():
    audit = {"scored": "2%", "k": 10, "truth": 0.5, "below the truth": 1.0}
    found = {
        "rows": 20_000,
        "queries": 16,
        "landmarks": 256,
        "seconds": {"scan": {"cpu": 100.0, "wall": 200.0}},
        "table": [{"candidates": "bm25:2%", "rows": 400, "recall@10": 0.25}, {"candidates": "oracle", "rows": 400}],
        "default": {"candidates": "bm25:2%", "rows": 400},
        "audits": {"seeds": 100, "audit": "10%", "candidates": [audit]},
        "peers": [{"peer": "kronfluence", "why not": "not made"}],
        "targets": [{"name": "times faster >= 8", "value": 5.0, "met": False}],
    }
    page = markdown(found)
    assert "| bm25:2% | 400 | 0.25 |" in page and "MISSED times faster >= 8: 5" in page and "not made" in page

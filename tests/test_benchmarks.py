"""The benchmark itself: same models and data everywhere, ratios the right way up, targets that can be missed."""

import functools
import hashlib
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import processes

from benchmarks import breakdown, compare, products, quiet, report, search
from benchmarks.compare import arguments, better_peer
from benchmarks.report import TARGETS, Cell, judge, make_row
from benchmarks.worker import ONE_THREAD, Worker, gemm_rate, memory, settle
from benchmarks.workloads import SIZES, WORKLOADS, prepare, text

TINY = WORKLOADS["tiny"]


def fingerprint(cache: Path) -> str:
    """Of the weights of the tiny model, and of the data of all workloads."""
    digest = hashlib.blake2b((prepare(TINY, cache) / "model.safetensors").read_bytes())
    for workload in WORKLOADS.values():
        for part in ("train", "queries"):
            for ids in workload.sequences(part):
                digest.update(ids.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    prepare(TINY, folder)
    return folder


def cell(seconds: float, megabytes: float = 100.0, count: float = 1e6, scores=None) -> Cell:
    run = {"cpu_s": seconds, "wall_s": seconds, "peak_mb": megabytes, "rss_mb": megabytes}
    return Cell([run | {"written_bytes": count, "disk_bytes": count}], scores)


def row(phase: str, peer: str, ours: Cell, theirs: Cell, size: str = "S", floor: float = 1.0) -> report.Row:
    return make_row("a-workload", size, phase, peer, ours, theirs, cell(floor))


def rows_of_all(better: float, pearson_noise: float = 0.0) -> list[report.Row]:
    """Every phase and peer, whence `better` times better in time, memory and bytes."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(3, 50))
    ours_scores = scores + pearson_noise * generator.normal(size=scores.shape)
    ours, theirs = cell(1.0, scores=ours_scores), cell(better, 100 * better, 1e6 * better, scores)
    phases = (*report.EXACT, "defaults", "first score")
    found = [row(phase, peer, ours, theirs, floor=better) for phase in phases for peer in ("kronfluence", "bergson")]
    found.append(row("first score", "bergson", ours, theirs, floor=better) | {"size": "tiny"})
    return [
        each | ({"flop_ratio": 4 / better, "flops_per_floor": 1.0} if each["phase"] in report.EXACT else {}) for each in found
    ]


def test_models_and_data_are_the_same_in_every_process(cache, tmp_path):
    assert processes.run(fingerprint, tmp_path / "other", world=1) == [fingerprint(cache)]


def test_a_model_is_made_once_and_again_when_its_definition_changes(cache):
    made = (prepare(TINY, cache) / "model.safetensors").stat().st_mtime_ns
    assert (prepare(replace(TINY, train=3), cache) / "model.safetensors").stat().st_mtime_ns == made
    assert replace(TINY, vocabulary=300).model_key != TINY.model_key


def test_training_data_and_queries_are_different_sequences():
    train, queries = TINY.sequences("train"), TINY.sequences("queries")
    assert not any(np.array_equal(a, b) for a in train for b in queries)
    assert TINY.tokens("train") == TINY.train * (TINY.length - 1)


def test_ragged_lengths_have_a_long_tail():
    lengths = np.array([len(ids) for ids in WORKLOADS["llama-S-ragged"].sequences("train")])
    assert lengths.min() >= 16 and lengths.max() == 512
    assert np.median(lengths) < 0.5 * lengths.mean() or np.median(lengths) * 1.5 < lengths.mean()


def test_the_tokenizer_reads_the_text_as_the_same_ids(cache):
    from transformers import AutoTokenizer

    ids = TINY.sequences("train")[0]
    assert AutoTokenizer.from_pretrained(prepare(TINY, cache))(text(ids))["input_ids"] == ids.tolist()


def test_a_ratio_above_one_means_that_whence_is_better():
    found = row("fit", "bergson", cell(2.0, 50, 10), cell(6.0, 100, 40), floor=4.0)
    assert (found["ratio"], found["floor_ratio"], found["peer_floor_ratio"]) == (3.0, 0.5, 1.5)
    assert (found["ours_s"], found["peer_s"]) == (2.0, 6.0)
    assert (found["peak_mb_ours"], found["peak_mb_peer"], found["bytes_ours"], found["bytes_peer"]) == (50, 100, 10, 40)


def test_medians_are_taken_over_the_runs_and_the_range_over_the_rounds():
    ours, theirs = Cell([{"cpu_s": s} for s in (1.0, 2.0, 9.0)]), Cell([{"cpu_s": s} for s in (4.0, 6.0, 9.0)])
    found = make_row("w", "S", "fit", "bergson", ours, theirs, Cell())
    assert found["ratio"] == 3.0 and found["ratio_range"] == [1.0, 4.0] and found["repeats"] == 3
    assert found["peak_mb_ours"] is None and found["floor_ratio"] is None


def test_two_runs_that_differ_are_decided_by_a_third(monkeypatch):
    class Opened:
        def send(self, *message):
            pass

        def receive(self):
            return {}

    comparison, took = (
        object.__new__(compare.Comparison),
        {"fit": [2.0, 2.1], "query": [1.0, 1.3, 1.0], "index": [1.0, 1.1, 1.0, 1.1]},
    )
    comparison.remotes, comparison.cache = {"whence": Opened(), "bergson": Opened()}, None
    comparison.quiet = quiet.Quiet(print)
    seconds = {
        (name, phase): iter(took[phase] if name == "whence" else [4.0] * 3) for name in comparison.remotes for phase in took
    }
    once = lambda workload, phase, name, cell, which: cell.runs.append({"cpu_s": next(seconds[name, phase])})  # noqa: E731
    monkeypatch.setattr(comparison, "_once", once)
    monkeypatch.setattr(compare, "prepare", lambda *asked: None)
    found = comparison.measure("llama-S-mlp", [*took, "index"], list(comparison.remotes), 2)
    counts = {name: {phase: len(found[name, phase].runs) for phase in took} for name in comparison.remotes}
    assert counts["whence"] == {"fit": 2, "query": 3, "index": 4}
    assert counts["bergson"] == {"fit": 2, "query": 3, "index": 2}, "what comes up twice in a round, the peers run once"
    assert comparison.quiet.patience < compare.PATIENCE
    assert found["whence", "query"].median("cpu_s") == 1.0


def test_the_floor_of_the_queries_is_that_of_their_share_of_the_tokens():
    assert make_row("w", "S", "query", "bergson", cell(1.0), cell(2.0), cell(8.0), tokens=0.25)["floor_ratio"] == 0.5


def test_every_target_is_met_where_whence_is_much_better_and_missed_where_it_is_worse():
    met, missed = judge(rows_of_all(4.0)), judge(rows_of_all(0.5, pearson_noise=1.0))
    assert len(met) >= len(TARGETS) and all(verdict["met"] for verdict in met)
    assert len(missed) == len(met) and not any(verdict["met"] for verdict in missed)
    assert not report.failed(met) and report.failed(missed)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_target_counts_the_worst_of_its_rows(target):
    good, bad = rows_of_all(4.0), rows_of_all(0.5, pearson_noise=1.0)
    assert target.check(good)["met"] and not target.check([*good, *bad])["met"]
    assert target.check([]) is None


def test_tiny_models_decide_nothing_but_their_agreement():
    rows = [found | {"size": "tiny"} for found in rows_of_all(0.5)]
    assert {verdict["target"].split(",")[0] for verdict in judge(rows) if "agreement" not in verdict["target"]} == {
        "start to first score of a tiny model"
    }


def test_scores_that_disagree_fail_the_run_whatever_the_speed():
    theirs = np.random.default_rng(0).normal(size=(4, 30))
    for ours, agrees in ((theirs * (1 + 1e-6), True), (theirs * 1.001, False), (theirs * np.nan, False)):
        verdicts = judge([row("score", "bergson", cell(1, scores=ours), cell(9, 900, 9e6, theirs))])
        assert report.failed(verdicts) is not agrees


def test_a_phase_in_which_whence_breaks_fails_the_run_and_one_that_a_peer_cannot_do_does_not():
    cannot = row("self", "bergson", cell(1.0), Cell(reason="no entry point"))
    broken = row("fit", "bergson", Cell(reason="ValueError", broke=True), cell(1.0))
    assert not report.failed(judge([cannot])) and report.failed(judge([cannot, broken]))
    assert report.not_run([broken]) == ["Not run (fit). whence: ValueError"]


def test_agreement_tells_scale_from_order():
    theirs = np.random.default_rng(0).normal(size=(4, 30))
    twice, reordered = report.agreement(2 * theirs, theirs), report.agreement(theirs[:, ::-1].copy(), theirs)
    assert math.isclose(twice["pearson"], 1) and math.isclose(twice["relative_error"], 1)
    assert abs(reordered["pearson"]) < 0.5 and abs(reordered["spearman"]) < 0.5


def test_the_page_shows_numbers_reasons_and_missed_targets(tmp_path):
    rows = [row("fit", "bergson", cell(2.0), cell(2.2)), row("self", "bergson", cell(1.0), Cell(reason="no entry point"))]
    machine = {"cpu": "a processor", "threads": 1, "cores": 2, "torch": "2", "bf16": [], "gemm_gflops": {"float32": {"256": 9}}}
    result = {"commands": ["make bench"], "minutes": 3.2, "machine": machine, "versions": {"whence": "0"}, "rows": rows}
    page = report.markdown(result | {"targets": judge(rows)}, "x.png")
    assert "| a-workload | fit | bergson | 2.00 | 2.20 | 1.10x |" in page
    assert "Not run (self). bergson: no entry point" in page and "| self |" not in page
    assert "MISSED fit, times faster than Bergson >= 1.15: 1.1 (a-workload, fit, bergson)" in page
    assert "![ratios](x.png)" in page and report.REPEATED not in page
    watched = row("fit", "bergson", Cell([{"cpu_s": 2.0, "disturbed": 0.1}]), Cell([{"cpu_s": 3.0, "disturbed": 0.2}]))
    assert watched["disturbed"] == 0.2 and report.REPEATED in report.notes([watched])


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(rows_of_all(2.0), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_the_better_peer_is_the_faster_at_fit_and_score_together():
    def found(phase, peer, seconds):
        return row(phase, peer, cell(1.0), cell(seconds) if seconds else Cell(reason="can't"))

    rows = [found("fit", "a", 5.0), found("score", "a", 1.0), found("fit", "b", 2.0), found("score", "b", 3.0)]
    assert better_peer(rows) == "b"
    assert better_peer([*rows, found("fit", "c", 1.0), found("score", "c", None)]) == "b"
    assert better_peer([found("fit", "a", None)]) == ""


class _Fake:
    """A library that holds 200 MB for a moment and writes 1 MB."""

    cannot = {}

    def __init__(self, out: Path):
        self.out = out

    def run(self, phase: str) -> np.ndarray:
        held = np.ones(25_000_000)
        (self.out / phase).mkdir(parents=True)
        (self.out / phase / "file").write_bytes(bytes(1_000_000))
        return held[:4] * 7


def test_a_phase_is_measured_above_what_was_held_before(tmp_path):
    worker = Worker("whence", tmp_path)
    worker.peer = _Fake(tmp_path)
    held = np.ones(25_000_000)
    first, second = (worker.run("fit", tmp_path / "scores.npy") for _ in range(2))
    for run in (first, second):  # the second time too: the peak is reset, and the first one's files are gone
        assert 190 < run["peak_mb"] < 230 and run["rss_mb"] > 400
        assert 1e6 <= run["disk_bytes"] <= run["written_bytes"] < 1.1e6
    assert np.load(tmp_path / "scores.npy").tolist() == [7, 7, 7, 7] and held[0]
    settle()
    assert memory("VmHWM") - memory("VmRSS") < 20e6


@pytest.mark.parametrize(
    ("taken", "counted", "runs"),
    [([0.0], 0, 1), ([0.9, 0.0], 1, 2), ([0.9, 0.5, 0.7], 1, 3)],
    ids=["quiet", "quiet the second time", "never quiet"],
)
def test_a_disturbed_run_is_repeated_and_the_quietest_counts(monkeypatch, taken, counted, runs):
    now, stolen, seen, said = [0.0], [0.0], [], []
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += 2.0
        stolen[0] += 2.0 * taken[len(seen)]
        seen.append(len(seen))
        return seen[-1]

    patient = quiet.Quiet(said.append, 10.0, lambda: stolen[0], lambda: 1.0)
    monkeypatch.setattr(patient, "wait", lambda: None)
    found, disturbed = patient.measure(run)
    assert found == counted and len(seen) == runs and len(said) == runs - 1
    assert patient.patience == 10.0 - 2.0 * (runs - 1), "repeating is part of it"
    assert disturbed == pytest.approx(min(taken) / quiet.DISTURBED)
    patient.patience = 0.0
    seen.clear()
    assert patient.measure(run)[0] == 0, "not repeated once patience has run out"


def test_a_run_beside_which_work_is_slow_is_repeated(monkeypatch):
    """Here before the first run, and after the second."""
    monkeypatch.setattr(quiet, "SHORT", 0.01)
    paces, seen = iter([2.0, 1.0, 1.1, 2.5, 1.2, 1.1]), []
    patient = quiet.Quiet(print, 10.0, lambda: 0.0, lambda: next(paces))
    monkeypatch.setattr(patient, "wait", lambda: None)
    found, disturbed = patient.measure(lambda: time.sleep(0.02) or seen.append(len(seen)) or seen[-1])
    assert found == 2 and disturbed == pytest.approx(0.2 / quiet.SLOWED)
    assert 0 < quiet.pace() < 1


def test_short_runs_are_not_repeated():
    clock = iter([0.0, 1.0])
    assert quiet.Quiet(print, stolen=lambda: next(clock)).measure(lambda: 7)[0] == 7


def test_waiting_ends_when_it_is_quiet_or_patience_does(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(quiet.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(quiet, "_busy", lambda: now.append(now.pop() + 1))
    for patience, expected in ((100.0, 6), (1.5, 4)):
        clock = iter([0.0, 0.5, 0.5, 1.0, 1.0, 1.0])
        asked = []

        def stolen(clock=clock, asked=asked):
            asked.append(next(clock))
            return asked[-1]

        quiet.Quiet(print, patience, stolen, lambda: 1.0).wait()
        assert len(asked) == expected
    assert quiet.stolen_seconds() >= 0


def test_rates_of_products_and_eigenvectors(monkeypatch, capsys):
    monkeypatch.setattr(products, "SHAPES", ((128, 128, 160),))
    monkeypatch.setattr(products, "WIDTHS", (32,))
    monkeypatch.setattr(products, "BIASED", (130,))
    products.show_rates()
    products.show_alignment()
    products.show_eigendecompositions()
    _, rates, _, _, aligned, _, _, taken = capsys.readouterr().out.splitlines()
    assert rates.startswith("128 x 128 x 160") and len(rates.split()) == 8 and len(taken.split()) == 4
    assert aligned.startswith("130 ") and len(aligned.split()) == 5
    assert torch.get_float32_matmul_precision() == "highest"


def test_where_the_time_goes(cache, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], layers=1, steps=1))  # every phase is run twice, and rehearsed
    monkeypatch.setitem(WORKLOADS, "tiny", replace(TINY, train=4, queries=1, length=8))
    monkeypatch.setattr(breakdown, "gemm_rate", lambda size, dtype: gemm_rate(size // 8, dtype))
    monkeypatch.setattr(breakdown.time, "process_time", time.perf_counter)  # of operators torch tells no other time
    breakdown.breakdown("tiny", cache)
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("tiny") and [line.split()[0] for line in lines] == [
        "fit",
        "floor",
        "query",
        "score",
        "self",
        "index",
    ]
    for line in lines:
        whole, *parts, _ = [float(word) for word in re.sub(r"\([^)]*\)", "", line).split()[1:]]
        products, attention, eigenvectors, others, rest = parts
        assert whole > 0 and min(products, attention, others, rest) > -0.02 and max(products, others, rest) > 0
        assert (eigenvectors > 0) == line.startswith("fit")


def test_unknown_names_are_refused_with_what_there_is(capsys):
    with pytest.raises(SystemExit):
        arguments(["--workloads", "llama-S-mlp,nonsense"])
    assert "no nonsense; there are" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_measures_whence_alone(cache, tmp_path, monkeypatch):
    out = tmp_path / "alone.json"
    options = ["--workloads", "tiny", "--defaults-on", "tiny", "--peers", "", "--repeats", "1", "--cache", str(cache)]
    monkeypatch.setattr(compare, "PATIENCE", 0.0)  # other tests run beside it
    monkeypatch.setattr(compare, "SQUARES", (32, 64))
    monkeypatch.setattr(compare, "Quiet", functools.partial(quiet.Quiet, pace=lambda: 1.0))
    for name, value in ONE_THREAD.items():  # as the command sets them
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    quick = processes.server()
    monkeypatch.setattr(compare.multiprocessing, "get_context", lambda method: quick)
    monkeypatch.setattr(compare.Comparison, "_started", functools.cache(compare.Comparison._started))  # both are of "tiny"
    assert compare.main([*options, "--out", str(out)]) == 0
    found = {row["phase"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(found) == {*report.EXACT, "defaults", *report.START}
    assert not [row["reason"] for row in found.values() if row["reason"]]
    for phase in report.EXACT:
        assert found[phase]["ours_s"] > 0 and found[phase]["floor_s"] > 0 and found[phase]["peak_mb_ours"] > 0
    assert found["fit"]["disk_bytes_ours"] > 1e5 and found["first score"]["ours_s"] > found["import"]["ours_s"] > 0
    assert "| tiny | fit |" in out.with_suffix(".md").read_text()
    assert compare.main([*options, "--out", str(out), "--add", "--phases", "index"]) == 0
    rows = json.loads(out.read_text())["rows"]
    again = {row["phase"]: row for row in rows}
    assert len(rows) == len(again), "what is measured again replaces what there was"
    assert set(again) == set(found) and again["fit"] == found["fit"] and again["index"] != found["index"]
    assert out.with_suffix(".md").read_text().count("--out") == 2, "both commands"


def test_a_search_is_measured_where_its_data_is(tmp_path, capsys):
    assert search.main(["--data", str(tmp_path)]) == 2
    assert "stories260K" in capsys.readouterr().err

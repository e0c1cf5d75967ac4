"""Indices of landmarks: codes and estimates against their dense definitions, additions, kills, processes, what is refused."""

import copy

import numpy as np
import pytest
import torch
from distributed.processes import killed
from distributed.processes import run as run_together
from models import CASES, randomised

import whence
from whence.engine.passes import Unsaved, run_pass
from whence.engine.point import Point
from whence.engine.queries import encode_queries, precondition
from whence.errors import StaleArtifact, UsageError
from whence.gradients import Factored
from whence.indexing import add_rows
from whence.indexing.build import _fitting, landmark_questions
from whence.indexing.directions import RIDGE, Whitened, settled
from whence.indexing.index import ROWS, weight_of_signs
from whence.indexing.rows import LandmarkRows

CASE = CASES["llama"]
ROWS_OF = CASE.train(60)


@pytest.fixture(scope="module")
def curvature():
    return whence.fit(CASE.model(), CASE.task(), ROWS_OF[:40], modules=CASE.modules)


def built(curvature, out=None, rows=40, **settings):
    return whence.build_index(
        CASE.model(), CASE.task(), ROWS_OF[:rows], modules=CASE.modules, curvature=curvature, out=out, **settings
    )


def whitened(curvature, rows, damping=0.1):
    """Gradients of rows `[n, P]` in float64, in coordinates in which their inner products are their influence."""
    point = Point(CASE.model(), CASE.task())
    operator = Whitened(curvature.inverse(damping).to(torch.empty(0, dtype=torch.float64)))
    sites = point.cover(operator.names).sites
    found = precondition(point, encode_queries(point.task, rows), sites, operator).gradients
    return {name: found[name].w_BOI.flatten(1) for name in sorted(found)}


def test_codes_and_estimates_are_those_of_their_definition(curvature):
    index, queries = built(curvature, bytes=1), CASE.queries()
    directions = index._directions
    rows, asked = whitened(curvature, ROWS_OF[:40]), whitened(curvature, queries)
    marks = {name: each.w_BOI.flatten(1).double() for name, each in directions.landmarks.items()}
    g_NP, y_QP, l_JP = (torch.cat(list(each.values()), 1) for each in (rows, asked, marks))
    exact = whence.score(CASE.model(), CASE.task(), queries, ROWS_OF[:40], curvature.inverse(0.1)).raw
    np.testing.assert_allclose(y_QP @ g_NP.T, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    # each module's part is dealt out to the same sums, and parts are added up
    s_KP = torch.cat([directions.sketch_module(name, torch.eye(each.shape[1]).double()).T for name, each in rows.items()], 1)
    l_JP = l_JP / l_JP.norm(dim=1, keepdim=True)
    k_JJ = l_JP @ l_JP.T
    inverse = torch.linalg.inv(k_JJ + RIDGE * torch.eye(len(k_JJ), dtype=torch.float64))
    row_weights, query_weights = g_NP @ l_JP.T @ inverse, y_QP @ l_JP.T @ inverse
    left_NK, left_QK = (g_NP - row_weights @ l_JP) @ s_KP.T, (y_QP - query_weights @ l_JP) @ s_KP.T
    (shard,) = index._shards
    order = shard["indices"]
    step = shard["scale"]
    assert ((shard["codes"] * step - (g_NP @ l_JP.T)[order]).abs() <= 0.51 * step + 1e-4 * g_NP.norm()).all()
    bits = torch.from_numpy(np.unpackbits(shard["signs"].numpy(), axis=1, bitorder="little"))
    assert ((2 * bits.double() - 1 == left_NK[order].sign()) | (left_NK[order].abs() < 1e-3 * left_NK.abs().mean())).all()
    signs_NK = left_NK.sign() * left_NK.abs().mean(1, keepdim=True)
    expected = query_weights @ (g_NP @ l_JP.T).T + index.measured["weight"] * left_QK @ signs_NK.T
    found = index.search(CASE.model(), CASE.task(), queries, curvature.inverse(0.1))
    for estimate, wanted in zip(found.raw, expected.numpy(), strict=True):
        assert np.corrcoef(estimate, wanted)[0, 1] > 0.98  # questions meet signs in 16 steps
    np.testing.assert_allclose(found.norms["gradient"], _gradient_norms(), rtol=1e-4)
    np.testing.assert_allclose(found.queries["norm"], y_QP.norm(dim=1), rtol=1e-4)


def _gradient_norms():
    point = Point(CASE.model(), CASE.task())
    sites = point.cover(CASE.modules).sites
    asked = encode_queries(point.task, ROWS_OF[:40])
    found = precondition(point, asked, sites, whence.operators.Identity()).gradients
    return torch.cat([each.w_BOI.flatten(1) for each in found.values()], 1).norm(dim=1)


def test_recall_is_that_of_a_search_for_the_questions_held_out(curvature):
    index = built(curvature, bytes=0.25)
    (shard,) = index._shards
    exact_HN = np.zeros((10, 40))
    exact_HN[:, shard["indices"]] = shard["exact"].T
    along, rest = index.scan_parts(*index._directions.coded(index._directions.held_out))
    estimates = along + index.measured["weight"] * rest
    best, first = (np.argsort(-each, 1, kind="stable") for each in (exact_HN, estimates))
    for k, among in ((3, 4), (10, 12)):
        mean = np.mean([len({*best[q, :k]} & {*first[q, :among]}) / k for q in range(10)])
        assert index.recall(k, among) == pytest.approx(mean)
    assert index.recall(10, 40) == 1 and 0 < index.recall(10, 10) < 1


def test_large_indices_are_scanned_by_numba_or_it_is_said(curvature, notes, monkeypatch):
    index = built(curvature, bytes=0.25)
    rest = torch.randn(2, index.about["signs"])
    asked = torch.randn(2, index.about["landmarks"])
    expected = index.scan_parts(asked, rest)
    assert index._kernel is None and not any("numba" in each for each in notes)
    monkeypatch.setattr("whence.indexing.index.COMPILED_BYTES", index.scanned_bytes)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plain = copy.copy(index)
    del plain._kernel
    assert plain._kernel is None and "pip install 'whence[scan]'" in notes[-1]
    monkeypatch.undo()
    pytest.importorskip("numba")
    monkeypatch.setattr("whence.indexing.index.COMPILED_BYTES", index.scanned_bytes)
    del index._kernel
    assert index._kernel is not None
    for found, wanted in zip(index.scan_parts(asked, rest), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_a_landmark_gets_its_exact_scores(curvature):
    question = CASE.queries()[:1]
    index = built(curvature, landmarks=question * 4, bytes=1)
    found = index.search(CASE.model(), CASE.task(), question, curvature.inverse(0.1))
    exact = whence.score(CASE.model(), CASE.task(), question, ROWS_OF[:40], curvature.inverse(0.1))
    assert np.corrcoef(found.raw[0], exact.raw[0])[0, 1] > 0.97


def codes_of(index):
    """All that a scan reads, in the order of the rows."""
    order = torch.cat([shard["indices"] for shard in index._shards]).argsort()
    return {
        key: torch.cat([shard[key] for shard in index._shards])[order] for key in ("codes", "scale", "signs", "size", "exact")
    }


def test_rows_that_are_added_are_coded_as_if_they_had_been_there(curvature, tmp_path):
    model, task = CASE.model(), CASE.task()
    built(curvature, tmp_path / "index", rows=40, bytes=0.5, batch_tokens=64)
    both = add_rows(tmp_path / "index", model, task, ROWS_OF[40:50], curvature)
    both = add_rows(tmp_path / "index", model, task, ROWS_OF[50:], curvature, n_train=100)
    assert (len(both), both.n_train, both.about["examples"]) == (60, 100, 60)
    assert list(both.examples["id"]) == list(whence.data.as_rows(ROWS_OF).ids)
    asked, point = (model, task, CASE.queries(), curvature.inverse(0.1)), Point(model, task, ROWS_OF)
    sites = point.cover(list(both.about["modules"])).sites
    sink = LandmarkRows(both._directions, Whitened(curvature.inverse(0.1)), point.examples.sizes, point.like)
    run_pass(point, sites, point.examples, point.likelihood, sink, "index", Unsaved(point.examples.usable))
    again = sink.state()
    order = again["indices"].argsort()
    for key, found in codes_of(both).items():
        torch.testing.assert_close(found, again[key][order], rtol=1e-4, atol=1 if key == "codes" else 1e-5)
    opened = whence.open_index(tmp_path / "index")
    assert np.array_equal(opened.search(*asked).raw, both.search(*asked).raw) and opened.recall(10, 60) == 1
    with pytest.raises(UsageError, match="15 of the rows are in the index"):
        add_rows(tmp_path / "index", model, task, ROWS_OF[45:60] + CASE.queries(), curvature)
    assert len(add_rows(tmp_path / "index", model, task, ROWS_OF[40:50], curvature)) == 60  # nothing to add


def in_pieces(out):
    """An index of landmarks in four chunks."""
    factors = whence.fit(CASE.model(), CASE.task(), ROWS_OF[:20], modules=CASE.modules)
    return built(factors, out, rows=20, bytes=0.25, chunks=4, batch_tokens=20)


def test_a_killed_build_and_two_processes_give_the_same_bytes(tmp_path):
    killed("index", 3, in_pieces, tmp_path / "killed")
    assert 0 < len(list((tmp_path / "killed").glob(f"{ROWS}-*"))) < 4
    in_pieces(tmp_path / "killed")
    in_pieces(tmp_path / "whole")
    run_together(in_pieces, tmp_path / "two")
    names = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    assert names == ["landmarks.safetensors", *(f"{ROWS}-{number:04d}.safetensors" for number in range(4))]
    for name in [*names, "recall.json"]:
        for other in ("killed", "two"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / other / name).read_bytes(), (other, name)


def test_what_is_refused(curvature, tmp_path):
    model, task, queries = CASE.model(), CASE.task(), CASE.queries()
    index = built(curvature, bytes=0.25)
    for other in (None, curvature.inverse(0.2)):
        with pytest.raises(StaleArtifact, match="landmarks of the index are those of another operator"):
            index.search(model, task, queries, other)
    with pytest.raises(StaleArtifact, match="another model"):
        built(curvature, tmp_path / "index").search(randomised(CASE.model(), 0.3), task, queries, curvature.inverse(0.1))
    with pytest.raises(UsageError, match="needs factors"):
        whence.build_index(model, task, ROWS_OF[:5], kind="landmarks")
    with pytest.raises(UsageError, match="bytes can't be 17"):
        built(curvature, bytes=17)
    whence.build_index(model, task, ROWS_OF[:5], modules=CASE.modules, dim=2, out=tmp_path / "projections")
    with pytest.raises(UsageError, match="index of landmarks"):
        add_rows(tmp_path / "projections", model, task, ROWS_OF[5:8], curvature)


def test_an_index_of_an_earlier_version_opens(tmp_path, monkeypatch):
    """Those had no kind, and no number of rows."""
    model, task = CASE.model(), CASE.task()
    index = whence.build_index(model, task, ROWS_OF[:8], modules=CASE.modules, dim=4, out=tmp_path / "old")
    old = {key: value for key, value in index.about.items() if key not in ("kind", "rows")}
    monkeypatch.setattr(type(index._folder), "manifest", property(lambda folder: {"about": old}))
    opened = whence.open_index(tmp_path / "old")
    assert opened.kind == "projections"
    assert np.array_equal(opened.search(model, task, CASE.queries()).raw, index.search(model, task, CASE.queries()).raw)


def test_low_ranks_keep_the_landmarks_small(curvature):
    sites = Point(CASE.model(), CASE.task()).cover(CASE.modules).sites
    assert settled("auto", 10, sites) is None and settled("full", 10**9, sites) is None and settled(3, 10, sites) == 3
    assert settled("auto", 2 * 10**6, sites) == 1
    index = built(curvature, rank=1, bytes=0.5)
    assert index.about["rank"] == 1
    found = index.search(CASE.model(), CASE.task(), CASE.queries(), curvature.inverse(0.1))
    exact = whence.score(CASE.model(), CASE.task(), CASE.queries(), ROWS_OF[:40], curvature.inverse(0.1))
    assert np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(found.raw, exact.raw, strict=True)]) > 0.8


def test_questions_held_out_are_kept_at_a_low_rank_where_they_are_large_and_fewer_where_that_is_large(
    curvature, notes, monkeypatch
):
    whole = built(curvature, bytes=0.5)
    held_out, count, shapes = whole._directions.held_out, whole.about["held_out"], whole.about["modules"].values()
    assert (whole.about["held_out_rank"], count) == (None, 10) and not any("held out" in said for said in notes)
    size = 4 * sum(min(2 * (n_out + n_in), n_out * n_in) for n_out, n_in in shapes)
    monkeypatch.setattr("whence.indexing.directions.BYTES", size)
    monkeypatch.setattr("whence.indexing.directions.HELD_OUT_RANK", 2)
    for bound, left in ((count * size, count), (4 * size - 1, 3), (size, 1)):
        monkeypatch.setattr("whence.indexing.directions.HELD_OUT_BYTES", bound)
        index = built(curvature, bytes=0.5, rank="auto")
        about, low = index.about, index._directions.held_out
        assert (about["held_out_rank"], about["held_out"], about["landmarks"]) == (2, left, whole.about["landmarks"])
        assert len(index.measured["places"]) == left
        assert any(f"{left} questions held out would take" in said and "kept at rank 2 " in said for said in notes)
        assert (left < count) == any(f"with {left} questions instead of {count}" in said for said in notes)
        tensors = [part for each in low.values() for part in vars(each).values() if part is not None]
        assert sum(part.nbytes for part in tensors) == left * size and all(part.dtype == torch.float32 for part in tensors)
        for name, each in low.items():  # the last ones, which are given ones
            u, s, vh = torch.linalg.svd(held_out[name].w_BOI[-left:], full_matrices=False)
            rank = 2 if isinstance(each, Factored) else s.shape[1]
            best = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
            torch.testing.assert_close(each.dense().w_BOI, best, rtol=1e-2, atol=1e-3 * float(s.max()))
    notes.clear()
    assert built(curvature, bytes=0.5, rank=1).about["held_out_rank"] == 2
    assert sum("kept at rank" in said for said in notes) == 1  # of the landmarks it is known
    full = built(curvature, bytes=0.5, rank="full").about
    assert (full["held_out_rank"], full["held_out"]) == (None, count)


def test_landmarks_of_large_modules_are_sketched_a_few_at_a_time_to_the_same_bits(curvature, monkeypatch):
    directions, held = built(curvature, bytes=0.5)._directions, []
    expected, sketch = directions.sketched, type(directions).sketch_module
    monkeypatch.setattr("whence.indexing.directions.CHUNK_BYTES", 4 * 64 * 7)
    monkeypatch.setattr(
        type(directions), "sketch_module", lambda self, name, x_BP: held.append(x_BP.shape) or sketch(self, name, x_BP)
    )
    monkeypatch.setattr("whence.gradients.chunks.__defaults__", (4 * 64 * 7,))
    assert torch.equal(directions.sketch(directions.single), expected)
    assert all(count == 1 or count * numbers <= 64 * 7 for count, numbers in held) and len(held) > len(directions.single)


def test_half_of_the_questions_are_given_and_recall_is_measured_with_these():
    task, given = CASE.task(), [{"text": f"w{number} w1 w2"} for number in range(40)]
    some = landmark_questions(task, ROWS_OF, given, 64, seed=0)
    assert sum(row in given for row in some) == 32 and len({whence.data.content.content_id(row) for row in some}) == 64
    assert all(row in given for row in some[-16:]) and any(row not in given for row in some[:24])
    assert some != landmark_questions(task, ROWS_OF, given, 64, seed=1)
    few = landmark_questions(task, ROWS_OF, given[:6], 64, seed=0)  # half of those given stay landmarks
    assert sum(row in given for row in few[-16:]) >= 3 and all(row in given for row in few[-3:])
    assert not any(row in given for row in landmark_questions(task, ROWS_OF, [], 20, seed=0))


def test_signs_count_what_finds_most_whatever_one_question_of_large_scores_says():
    draw = np.random.default_rng(0)
    true, noise, along = (draw.standard_normal((8, 2000)) for _ in range(3))
    assert weight_of_signs(along, along, noise) == 0
    assert weight_of_signs(along + true, along, true) in (0.7, 1.0)
    assert weight_of_signs(along + true, along, true + 3 * noise) in (0.05, 0.1, 0.2)  # by least squares 0.1
    large = np.array([[100.0], *[[1.0]] * 7])
    noise[0] = 0  # of this question signs say everything
    assert weight_of_signs(large * (along + true), large * along, large * (true + 3 * noise)) in (0.05, 0.1, 0.2, 0.3)
    assert weight_of_signs(along[:, :5], along[:, :5], noise[:, :5]) == 0  # all five rows are among the best


def test_long_rows_give_short_questions():
    task = whence.CausalLM(CASE.task().tokenizer, 4)
    found = _fitting(task, {"text": " ".join(["w1"] * 20)})
    assert 0 < len(found["text"].split()) <= 4
    assert _fitting(task, {"prompt": "w1 w2 w3", "completion": " w4 w5 w6"}) is None

"""The GPU benchmark on a CPU with tiny shapes: that it runs, and that nobody can take its rows for a GPU's."""

import json
import time

import pytest
import torch

import whence
from benchmarks import gpu
from benchmarks.gpu import SHAPES, Cell, build, count_flops


def run(out, *options):
    """What the command ends with; its clock is this process's processor time, which other work does not make longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gpu", "--device", "cpu", "--out", str(out), *options])
        patch.setattr(gpu.time, "perf_counter", time.process_time)
        return gpu.main()


@pytest.fixture(scope="module")
def exercised(tmp_path_factory):
    """Results and table of the tiny shapes, and how many seconds of a processor they took."""
    out, started = tmp_path_factory.mktemp("gpu"), time.process_time()
    assert run(out, "--sizes", "tiny,tiny-neox") == 0
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text(), time.process_time() - started


def test_every_phase_is_measured(exercised):
    results, _, seconds = exercised
    assert seconds < 120
    phases = ["floor", "covariance", "eigenvectors", "eigenvalues", "fit, in all", "index", "index, in all"]
    phases += ["queries", "score", "score, in all", "self-influence", "self-influence, in all"]
    for size in ("tiny", "tiny-neox"):
        rows = {row["phase"]: row for row in results["rows"] if row["size"] == size}
        assert list(rows) == phases
        assert not any(row["reason"] for row in rows.values())
        assert all(row["seconds"] > 0 and row["peak_gb"] > 0.01 for row in rows.values())
        assert rows["queries"]["tokens"] == 16 * 32 and rows["score"]["tokens"] == 256
        assert rows["fit, in all"]["bytes_written"] > 50_000
        assert rows["fit, in all"]["seconds"] >= rows["covariance"]["seconds"] + rows["eigenvalues"]["seconds"]
        assert all(0 < row["utilisation"] < 1.5 for row in rows.values() if row["utilisation"] is not None)
        floor = rows["floor"]["flops"]
        assert all(rows[phase]["flops"] > floor for phase in ("covariance", "score", "self-influence", "index"))
        assert rows["index"]["flops"] < 1.6 * floor


def test_rows_of_a_cpu_say_so(exercised):
    results, table, _ = exercised
    assert results["header"]["gpu"] is False
    assert table.startswith("# On a GPU: not yet run")
    rows = [line for line in table.splitlines() if line.startswith("| whence")]
    assert len(rows) == 24 and all("exercise" in row for row in rows)
    assert "last 1 of 2 blocks" in table


def test_results_of_a_gpu_are_not_replaced(tmp_path, capsys):
    kept = json.dumps({"header": {"gpu": True}, "rows": []})
    (tmp_path / "gpu.json").write_text(kept)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--sizes", "tiny")
    assert ended.value.code == 2 and "must not replace" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text() == kept


def test_a_spent_budget_starts_nothing(tmp_path):
    assert run(tmp_path, "--sizes", "tiny", "--budget-seconds", "0", "--peers", "kronfluence") == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["library"], row["reason"]) for row in rows] == [
        (library, "not started: the budget is spent") for library in ("whence", "kronfluence")
    ]


def test_flops_of_a_layer_by_hand(tmp_path):
    shape, device = SHAPES["tiny"], torch.device("cpu")
    cell = Cell("tiny", "float32", "whence", shape, build(shape, torch.float32, device), tmp_path, 2, 1.0, 0.0)
    flops = count_flops(cell, whence.Precision(products="float32"))
    d, kv, inner, tokens = shape.width, shape.width // 2, shape.inner, shape.length
    layer = 2 * d * d + 2 * kv * d + 3 * inner * d
    forward = 2 * tokens * (2 * layer + shape.vocabulary * d) + 2 * 2 * 2 * tokens**2 * d
    back = 2 * tokens * (layer + inner * d + shape.vocabulary * d) + 5 * 2 * tokens**2 * d
    assert flops["floor"] == pytest.approx(2 * (forward + back), rel=0.001)  # but for the angles of the positions
    projecting = 2 * tokens * 2 * 16 * (2 * inner + d + inner + d + 3 * 16)
    assert flops["index"] == pytest.approx(2 * (forward + back + projecting), rel=0.001)
    widths = 2 * [d, inner, inner, inner, d]
    assert flops["eigenvectors"] == 9 * sum(width**3 for width in widths)

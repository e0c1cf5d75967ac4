import pytest

from whence.errors import StaleArtifact, UsageError
from whence.report import build_report, gather, write_report
from whence.report.gather import scores_in


def test_everything_in_one_folder_or_nothing(scores, tmp_path, monkeypatch):
    out = tmp_path / "report"
    files = [str(file.relative_to(out)) for file in write_report(build_report(scores), out)]
    numbers = [f"{number:03d}" for number in range(5)]
    curves, queries = (
        [f"{kind}/{number}.{ending}" for number in numbers] for kind, ending in (("curves", "png"), ("queries", "txt"))
    )
    assert files == [*curves, *queries, "report.html", "report.md"]
    before = (out / "report.html").read_bytes()
    with pytest.raises(UsageError, match="nothing is overwritten"):
        write_report(build_report(scores), out)
    assert (out / "report.html").read_bytes() == before

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("whence.report.write.write_texts", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(build_report(scores), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["report"], "nothing half-written is left"


def test_a_run_folder_gives_all_it_has(run_folder):
    found = gather(run_folder)
    assert set(found) == {"scores", "provenance", "pairs", "health", "training", "evaluation", "settings", "command"}
    assert [entry["step"] for entry in found["training"]["history"]] == [10, 20]
    assert found["evaluation"]["Benchmark"][0]["task"] == "law"
    alone = gather(run_folder / "scores", pairs=run_folder / "generate" / "generated.json", training=run_folder / "train")
    assert set(alone) == {"scores", "provenance", "pairs", "training"}


def test_what_is_not_there_is_refused(run_folder, tmp_path):
    with pytest.raises(UsageError, match="no file"):
        gather(run_folder, pairs=tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"training\.json"):
        gather(run_folder, training=tmp_path)
    with pytest.raises(UsageError, match="holds scores of queries"):
        gather(run_folder, itself=run_folder / "scores")
    with pytest.raises(StaleArtifact, match="There is no"):
        gather(tmp_path / "nothing")
    assert scores_in(run_folder) == [run_folder / "scores"] and scores_in(tmp_path) == [tmp_path]

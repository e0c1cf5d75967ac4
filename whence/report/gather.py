"""Find the finished artefacts that belong to a report in a run folder, or where the user says they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whence.errors import UsageError
from whence.escapes import command
from whence.stages import open_stages
from whence.stages.scores import FILE as STAGES
from whence.store.intact import CONFIG, MANIFEST, intact, is_run_folder, read_json, reading
from whence.store.manifest import Folder
from whence.store.scores import Scores, open_scores
from whence.validate.quick import read_quick
from whence.validate.without import read_beside, read_calibration

SHOWN = "scores"
"""Where a run folder has its scores; traces are beside it."""


def gather(
    path: str | Path,
    *,
    pairs: str | Path | None = None,
    factors: str | Path | None = None,
    itself: str | Path | None = None,
    training: str | Path | None = None,
) -> dict[str, Any]:
    """Open what `build_report` takes: the scores of a folder of scores, or of a run with all that is finished in it.

    `pairs` (a file of `whence generate`) and the folders `factors`, `itself` (self-influence) and `training` come before what
    the run has.

    Raises UsageError where something named is not there, StaleArtifact where it is unfinished or damaged.
    """
    path = Path(path)
    folder = scores_in(path)[0]
    own = path if folder != path else None  # what lies beside a folder of scores may belong to others
    given: dict[str, Any] = {"provenance": Folder.open(folder).config}
    if has_stages(folder):
        given["stages"] = staged = open_stages(folder)
        folder = folder / list(staged.stages)[-1] / "scores"
    given["scores"] = open_scores(folder).calibrated(read_calibration(folder))
    if found := read_quick(folder):
        warnings = {f"Warning {number}": text for number, text in enumerate(found.flags, start=1)}
        given["checks"] = found.about["checks"] | warnings
    if beside := read_beside(folder):
        given["checks"] = given.get("checks", {}) | {check: found["sentence"] for check, found in beside.items()}
    if pairs is not None and not Path(pairs).is_file():
        raise UsageError(f"There is no file {pairs}.")
    files = {
        "pairs": Path(pairs) if pairs is not None else _there(own, "generate/generated.json"),
        "health": None if factors else _there(own, "inspect/health.json"),
    }
    given |= {key: read_json(intact(file)) for key, file in files.items() if file}
    if training or _there(own, "train/training.json"):
        from whence.train.metrics import FILE, read_metrics

        home = Path(training) if training else path / "train"
        if not (home / "training.json").is_file():
            raise UsageError(f"{home} has no training.json.", accepted="the folder that whence train made")
        history = read_metrics(intact(home / FILE)) if (home / FILE).is_file() else []
        given["training"] = {**read_json(intact(home / "training.json")), "history": history}
    home = Path(factors) if factors else _there(own, "factors", MANIFEST, CONFIG)
    if home is not None and "health" in given:  # no need to read the factors themselves
        given["factors"] = Folder.open(home).manifest["about"]
    elif home is not None:
        from whence.fitting import open_factors

        given["curvature"] = open_factors(home)
    if (home := Path(itself) if itself else _there(own, "self", MANIFEST, CONFIG)) is not None:
        given["self_scores"] = open_scores(home)
        if given["self_scores"].query_ids != ["self"]:
            raise UsageError(f"{home} holds scores of queries.", accepted="a folder made with whence score --self")
    if own is not None:
        if evaluation := _evaluation(own / "evaluate"):
            given["evaluation"] = evaluation
        if settings := _there(own, "whence.yaml"):
            with reading(intact(settings)):
                given |= {"settings": settings.read_text(encoding="utf-8"), "command": command("whence", "run", settings)}
    return given


def has_stages(folder: Path) -> bool:
    """Whether a folder has the scores of several stages."""
    return (folder / STAGES).is_file()


def open_all(folder: Path) -> Scores:
    """The scores in a folder; of several stages those of the rows of all."""
    return open_stages(folder).total() if has_stages(folder) else open_scores(folder)


def scores_in(path: Path) -> list[Path]:
    """Folders of finished scores in a run folder, the newest first; without any the path itself: opening it says why."""
    inside = [path / SHOWN, *path.glob("trace-*")]
    found = [folder for folder in inside if (folder / MANIFEST).exists()]
    return sorted(found, key=lambda folder: -(folder / MANIFEST).stat().st_mtime) or [path]


def runs_in(path: Path) -> list[Path]:
    """Runs with scores in a folder of runs, such as runs/."""
    if is_run_folder(path) or not path.is_dir():
        return []
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and scores_in(folder) != [folder]]


def _there(run: Path | None, name: str, *inside: str) -> Path | None:
    """A file of a run, or a folder with these files, if it is there."""
    return run / name if run is not None and all((run / name / file).is_file() for file in inside or ("",)) else None


def _evaluation(folder: Path) -> dict[str, list[dict[str, str]]]:
    """What the evaluation found, as tables by title."""
    from whence.evaluate.combined import BENCHMARK, COMPARISON, benchmark_table, comparison_table

    found: dict[str, list[list[str]]] = {}
    if (folder / COMPARISON).is_file():
        import pandas

        with reading(intact(folder / COMPARISON)) as file:
            found["Answers of the base and the tuned model"] = comparison_table(pandas.read_csv(file))
    if (folder / BENCHMARK).is_file():
        found["Benchmark"] = benchmark_table(read_json(intact(folder / BENCHMARK)))
    return {title: [dict(zip(head, row, strict=True)) for row in rows] for title, (head, *rows) in found.items()}

"""`whence validate`: how far scores can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from whence import dist
from whence.cli.from_settings import said
from whence.cli.options import OfTrainer, Session, require_run
from whence.errors import UsageError
from whence.settings import DAMPING, SEED, AtLeastZero, Count, Section, Share, setting, settings_of

DEFAULTS = {"pbrf": ["digits"], "loo": ["cancer", "digits"], "lds": ["digits"], "removal": ["digits"], "mislabel": ["digits"]}
"""Settings that need no data, where --on is not given."""


class Modes(Section):
    """Which check it is."""

    quick: bool = setting(
        False, "Check the scores of a run: does a copy of a question come out on top, are they steady? Seconds."
    )
    pbrf: bool = setting(
        False, "Compare influence with what it approximates, and from there step by step with retraining. Minutes."
    )
    loo: bool = setting(False, "Retrain without single rows, cold and warm. Minutes.")
    lds: bool = setting(False, "Retrain on many subsets, which are kept. Minutes.")
    removal: bool = setting(False, "Retrain without each query's top rows: a small setting, or RUN itself. Minutes.")
    mislabel: bool = setting(False, "Plant label errors and see how many are found. Minutes.")
    facts: bool = setting(False, "Ask what has a known source and see whether it is found. Minutes.")


class Check(Section):
    """What is trained again and again, and how often."""

    data: Path | None = setting(None, "Folder of the setting's data; digits needs none.", "--data", "-d")
    out: Path = setting(Path("validation"), "Folder for results and unfinished work.", "--out", "-o")
    rows: Count | None = setting(None, "Rows tested (--pbrf, --loo) or left out (RUN --removal), or subsets (--lds).")
    queries: Count | None = setting(None, "Queries asked.")
    damping: AtLeastZero = setting(0.1, DAMPING)
    seed: int = setting(0, SEED)


class OfRun(Section):
    """How the training of a run is repeated."""

    fraction: Share = setting(0.01, "RUN: share of the rows left out.")
    subsets: Literal["halves", "removals"] | None = setting(
        None, "RUN: retrain on random subsets instead, for the LDS; halves, or removals of that share."
    )
    tail_patch: bool = setting(
        False, "RUN --removal: for a model too large to retrain: instead, take a step on the rows from the final weights."
    )
    steps: Count = setting(1, "RUN --removal --tail-patch: steps on the rows.")
    jointly: bool = setting(False, "RUN: choose rows for all queries together, not for each by itself.", "--jointly")
    draws: Count = setting(4, "RUN: random sets of rows to compare with.")
    orders: Count = setting(1, "RUN: row orders to repeat it in, the first as recorded.")
    drift: AtLeastZero = setting(
        0.01, "RUN: how far from the model the repeated training may end, as a share of how far it went."
    )
    together: Count | None = setting(None, "RUN: retrainings that go side by side; default: up to 16 where batches are short.")


def validate(
    *,
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN_OR_SCORES]",
            help="A run, for --quick, --removal and --lds; for --quick also its scores.",
            show_default=False,
        ),
    ] = None,
    modes: Modes,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            metavar="SETTING",
            help="A small setting to train again and again: digits, diabetes, concrete, energy, mnist, text, sst2, lm; for "
            "--loo also cancer and linear; repeat for more.",
        ),
    ] = None,
    check: Check,
    of_run: OfRun,
    of_trainer: OfTrainer,
    session: Session,
) -> None:
    """Find out how far scores can be trusted: one check at a time.

    --quick checks the scores of a run. RUN --removal repeats the training of the run without the rows that its scores put on
    top, and without rows that BM25, loss, length, gradient norm and chance choose; with --tail-patch it reads these rows once
    more instead. RUN --lds repeats it on random subsets. All others train a small setting again and again, where the truth can
    be had, and compare methods on it. Every result is a table, what it means in words, and files (result.json, result.md,
    figures) in RUN/validation or OUT/CHECK-SETTING; an interrupted check resumes where it stopped.

    \b
    Examples
      whence validate runs/a --quick
      whence validate runs/a --removal --rows 5
      whence validate runs/a --removal --rows 5 --tail-patch
      whence validate runs/a --lds --subsets halves --rows 64
      whence validate runs/b --removal --training out/checkpoint-96 --argument lr_scheduler_type=cosine
      whence validate --pbrf --on concrete --data uci
      whence validate --loo
      whence validate --lds --on digits --rows 128
    """
    from whence.cli.console import print_json, say, start

    mode = _mode([name for name, wanted in modes.as_json().items() if wanted], path)
    if mode == "quick" or path is None:
        dist.only_one_process(f"whence validate --{mode}")
    with start(session):
        if mode == "quick":
            assert path is not None
            done = [(_quick(path, check.seed), [])]
        elif path is not None:
            done = [_of_run(mode, path, check, of_run, of_trainer, session.rerun)]
        else:
            done = list(_on_settings(mode, on, check, session.rerun))
    if session.as_json:
        documents = []
        for result, files in done:
            short = {key: value for key, value in result.as_json().items() if key not in result.arrays}
            documents.append({**short, "files": [str(file) for file in files]})
        print_json(documents)
        return
    for result, files in done:
        for line in result.says:
            say(line)
        if mode not in ("quick", "mislabel", "facts"):  # their summaries are their tables
            _show(result)
        if files:
            say(f"{files[0].parent}: {', '.join(file.name for file in files)}", "dim")


def _mode(modes: list[str], path: Path | None) -> str:
    """The one check that is asked for."""
    what = "\n".join(f"           --{mode.name:<9} {mode.meaning}" for mode in settings_of(Modes)).lstrip()
    if len(modes) != 1:
        raise UsageError(
            "Choose a check." if not modes else "One check at a time.",
            given=" ".join(f"--{name}" for name in modes) or "no check",
            accepted=what,
            fix="whence validate RUN --quick" if path is not None else "whence validate --pbrf",
        )
    (mode,) = modes
    if mode == "quick" and path is None:
        raise UsageError("--quick checks the scores of a run, and none is named.", fix="whence validate runs/a --quick")
    if mode not in ("quick", "removal", "lds") and path is not None:
        raise UsageError(
            f"--{mode} trains a small setting of its own: it can't retrain the model of a run.",
            given=str(path),
            accepted="--quick, --removal and --lds for a run; --on SETTING for all others",
            fix=f"whence validate --{mode}",
        )
    return mode


def _of_run(mode: str, path: Path, check: Check, of_run: OfRun, of_trainer: OfTrainer, rerun: bool) -> Any:
    """The result of retraining a run, with its files."""
    from whence.config import read_config
    from whence.pipeline.retraining import Elsewhere, check_run
    from whence.validate.without import QUERIES, Removals

    if of_run.tail_patch and (mode != "removal" or of_run.subsets or of_run.orders > 1):
        given = "--lds" if mode == "lds" else "--subsets" if of_run.subsets else f"--orders {of_run.orders}"
        raise UsageError("--tail-patch trains nothing again.", given=given, accepted="--removal, without it")
    require_run(path)
    subsets = (of_run.subsets or "removals", check.rows or 64) if mode == "lds" or of_run.subsets else None
    chosen = Removals(
        None if subsets else check.rows,
        of_run.fraction,
        queries=check.queries or QUERIES,
        jointly=of_run.jointly,
        draws=of_run.draws,
        orders=of_run.orders,
        seed=check.seed,
        drift=of_run.drift,
        together=of_run.together,
    )
    out, patch = check.out if "out" in said() else None, of_run.steps if of_run.tail_patch else None
    trainer = Elsewhere.of(of_trainer.training, of_trainer.arguments, of_trainer.initial_adapter)
    return check_run(read_config(path), chosen, subsets=subsets, patch=patch, trainer=trainer, out=out, rerun=rerun)


def _quick(path: Path, seed: int) -> Any:
    """Check the scores of a run, whose folder says what they were made from: these, or the newest."""
    from whence.opened import OPENED
    from whence.run import SETTINGS
    from whence.run import open as open_run

    for folder in (path, path.parent):
        if (folder / SETTINGS).is_file():
            return open_run(folder).check(seed=seed)
        if (folder / OPENED).is_file():
            return open_run(folder).check(path if folder != path else None, seed=seed)
    raise UsageError(
        "Nothing says what these scores were made from.",
        given=str(path),
        accepted="the folder of a run, or scores in it",
        fix="Python: whence.open(MODEL, data=DATA).check(SCORES)",
    )


def _on_settings(mode: str, on: list[str] | None, check: Check, rerun: bool) -> Any:
    """The results of a check on each of the settings, with their files."""
    from whence.plots.style import save
    from whence.validate.results import keep, loo_figure

    if mode == "facts":
        from whence.validate.facts import demo_facts, real_facts

        data, place = check.data, check.out / ("facts-real" if check.data else "facts-demo")
        settings = {"damping": check.damping, "data": str(data.resolve()) if data else None}
        with _folder(place, mode, settings, {}, rerun) as folder:
            asked: Any = {"damping": check.damping, "folder": folder}
            result = demo_facts(**asked) if data is None else real_facts(data, **asked)
            yield result, keep(result, place)
        return
    results = []
    for name in on or DEFAULTS[mode]:
        place = check.out / f"{mode}-{name}"
        results.append(_run(mode, name, place, check, rerun))
        yield results[-1], keep(results[-1], place)
    if mode == "loo" and len(results) > 1:
        save(loo_figure(results), check.out / "loo.png")


def _run(mode: str, name: str, place: Path, check: Check, rerun: bool) -> Any:
    """The result of a check on one setting; where the exact curvature is needed, with a network that it fits."""
    from whence.validate.settings import setting as setting_named

    sizes: dict[str, Any] = {name: value for name in ("rows", "queries") if (value := getattr(check, name)) is not None}
    given: dict[str, Any] = {"damping": check.damping, "seed": check.seed}
    if sizes.get("rows", 3) < 3:
        raise UsageError(f"--rows {check.rows} is too few to compare anything.", accepted="3 or more")
    if mode == "pbrf":
        from whence.validate.pbrf import check_pbrf, small

        dampings = (check.damping, check.damping / 10)
        network = small(setting_named(name, check.data))
        return check_pbrf(network, **sizes, dampings=dampings, seed=check.seed, out=place, rerun=rerun)
    if mode == "loo":
        from whence.validate.loo import check_loo, loo_setting
        from whence.validate.pbrf import small

        seeds = (check.seed, check.seed + 1, check.seed + 2)
        return check_loo(small(loo_setting(name, check.data)), **sizes, **given, seeds=seeds, out=place, rerun=rerun)
    setting = setting_named(name, check.data)
    if mode == "lds":
        from whence.validate.lds import check_lds

        given |= {"subsets": sizes["rows"]} if "rows" in sizes else {}
        with _folder(place, mode, given, setting.describe(), rerun):
            return check_lds(setting, place, **given)
    if mode == "removal":
        from whence.validate.removal import check_removal

        given |= {"queries": sizes["queries"]} if "queries" in sizes else {}
        with _folder(place, mode, given, setting.describe(), rerun) as folder:
            return check_removal(setting, **given, folder=folder)
    from whence.validate.mislabel import mislabel

    with _folder(place, mode, given, setting.describe(), rerun) as folder:
        return mislabel(setting, damping=check.damping, seeds=range(check.seed, check.seed + 5), folder=folder)


def _folder(place: Path, stage: str, settings: dict[str, Any], of: dict[str, Any], rerun: bool) -> Any:
    """The folder of a check, refused where it holds one with other settings."""
    from whence.store.digest import fingerprint_code
    from whence.store.manifest import Folder

    return Folder.claim(place, {"stage": stage, "settings": settings, "of": of, "code": fingerprint_code()}, rerun=rerun)


def _show(result: Any) -> None:
    """Print the tables of a result."""
    from whence.cli.console import print_table, say
    from whence.validate.results import columns, shown

    for title, rows in result.tables.items():
        say("")
        if title:
            say(title, "bold")
        names = columns(rows)
        left = [number for number, name in enumerate(names) if isinstance(rows[0].get(name), str)]
        cells = [[shown(row.get(name)) for name in names] for row in rows]
        print_table([name.replace("_", " ") for name in names], cells, left, no_wrap=False)

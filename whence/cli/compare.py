"""`whence diff` and `whence compare`: two sets of scores, and several methods on one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whence import dist
from whence.cli import options
from whence.cli.from_settings import pairs
from whence.cli.options import Session
from whence.errors import UsageError
from whence.show.numbers import many

if TYPE_CHECKING:
    from whence.pipeline.comparison import Compared
    from whence.validate.agreement import Agreement

Folder = "Folder of scores, or a run folder with scores in it."


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=Folder)],
    b: Annotated[Path, typer.Argument(metavar="B", help=Folder)],
    top: Annotated[int, typer.Option("--top", "-k", min=0, metavar="N", help="Rows that moved most to show per query.")] = 3,
    as_json: options.AsJson = False,
) -> None:
    """Compare two sets of scores: whether they put the same rows first.

    Queries and rows belong together by id; those that both have are compared, in ranks, so that units don't matter. Spearman's
    correlation is over all rows, overlap@10 the share of the ten highest that both have. Rows that moved are those
    whose rank in one is most times that in the other.

    \b
    Examples
      whence diff runs/a/scores runs/b/scores
      whence diff runs/a/methods/ekfac runs/a/methods/bm25 --top 5
      whence diff runs/a runs/b --json
    """
    from whence.cli.console import print_json
    from whence.cli.show import opened
    from whence.validate.agreement import agreement

    first, second = opened(a), opened(b)
    found = agreement(first, second)
    if as_json:
        sides = [
            {"scores": str(path), "made_by": each.made_by, "unit": each.unit, "queries": each.shape[0], "rows": each.shape[1]}
            for path, each in ((a, first), (b, second))
        ]
        common = {"queries_in_common": found.a.shape[0], "rows_in_common": found.a.shape[1]}
        print_json({"a": sides[0], "b": sides[1], **common, **found.as_json(top)})
        return
    _show_difference(found, (a, first), (b, second), top)


def _show_difference(found: Agreement, a: Any, b: Any, top: int) -> None:
    from whence.cli.console import print_table, say
    from whence.escapes import visible

    for letter, (path, scores) in (("A", a), ("B", b)):
        by = scores.made_by or "a method that is not recorded"
        say(f"{letter}  {path}: {scores.shape[0]} x {scores.shape[1]:,}, {scores.unit}, by {by}")
    say(f"in common: {many(found.a.shape[0], 'query', 'queries')}, {many(found.a.shape[1], 'row')}")
    rho, overlaps = found.spearman, {k: found.overlap(k) for k in found.sizes}
    texts = [" ".join(str(text).split())[:60] for text in found.a.queries["text"]]
    cells = [
        [visible(name), f"{rho[number]:.3f}", *(f"{each[number]:.2f}" for each in overlaps.values()), visible(texts[number])]
        for number, name in enumerate(found.ids)
    ]
    means, (low, high) = found.means(), found.interval()
    within = f"[{low:.3f}, {high:.3f}]" if low == low else ""
    cells.append(["mean", f"{means['spearman']:.3f}", *(f"{means[f'overlap@{k}']:.2f}" for k in overlaps), within])
    names = ("query", "Spearman", *(f"overlap@{k}" for k in overlaps), "text")
    print_table(names, cells, (0, len(names) - 1), pad_edge=False, header_style="dim")
    for number, name in enumerate(found.ids if top else ()):
        moved = found.moved(number, top)
        say(f"\nmoved most for {name}" if len(moved) else f"\n{name}: both have the same order", "dim")
        cells = [
            [
                f"{row['rank_a']:,}",
                f"{row['rank_b']:,}",
                visible(str(row["id"])),
                visible(" ".join(str(row["text"]).split())[:80]),
            ]
            for row in moved.to_dict("records")
        ]
        if cells:
            print_table(("rank in A", "in B", "row", "text"), cells, (2, 3), pad_edge=False, header_style="dim")


def compare(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run (whence run).")],
    methods: Annotated[str, typer.Option("--methods", help="Names from whence methods ls, joined by commas.")],
    reference: Annotated[str, typer.Option("--reference", help="Method that the others are compared with.")] = "ekfac",
    own: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="A setting of a method, cg.iterations=50; repeat for more."),
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option("--bank", help="Retraining bank of the run's rows and questions; default: RUN/bank-*.npz."),
    ] = None,
    session: Session,
) -> None:
    """Run several methods on one run: the same rows, the same questions, what each costs and how far they agree.

    Each method's scores are kept in RUN/methods/NAME, and a killed comparison resumes; whence show, report and export read
    them as any scores. The table and the picture are RUN/methods/comparison.json and .png. Cost is split: what is done
    once (factors), and what each further pair of a question and a row takes. Agreement with the reference is not
    quality by itself: LDS is, where the run has a retraining bank.

    \b
    Examples
      whence compare runs/a --methods ekfac,bm25
      whence compare runs/a --methods kfac,cg,tracin,tfidf --reference cg --set cg.iterations=50
    """
    from whence.cli.console import print_json, say, start
    from whence.config import read_config
    from whence.pipeline.comparison import compare_methods, keep

    settings: dict[str, dict[str, Any]] = {}
    for name, value in pairs(own or [], "--set", "METHOD.NAME=VALUE", yaml=True).items():
        method, dot, setting = name.partition(".")
        if not dot:
            raise UsageError(f"--set {name} is not for a method.", accepted="METHOD.NAME=VALUE, such as cg.iterations=50")
        settings.setdefault(method, {})[setting] = value
    options.require_run(run)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    with start(session):
        found = compare_methods(read_config(run), names, reference=reference, settings=settings, bank=bank, rerun=session.rerun)
        files = dist.on_first(keep, found, run, reference)
    if session.as_json:
        document = {"run": str(run), "reference": reference, "methods": [each.as_json() for each in found]}
        print_json({**document, "files": [str(file) for file in files]})
        return
    _show_methods(found, reference)
    say(f"{files[0].parent}: {', '.join(file.name for file in files)}; scores in {run / 'methods'}/NAME", "dim")


def _show_methods(found: list[Compared], reference: str) -> None:
    from whence.cli.console import print_table, say

    tops = [name for name in found[0].means if name.startswith("overlap")]
    retrained = any(each.retraining for each in found)
    cells = []
    for each in found:
        (low, high), cost = each.ends, each.cost
        lds = each.retraining
        cells.append(
            [
                each.name,
                f"{each.means['spearman']:.3f}" + (f" [{low:.2f}, {high:.2f}]" if low == low else ""),
                *(f"{each.means[name]:.2f}" for name in tops),
                *([f"{lds.mean:.3f} [{lds.low:.2f}, {lds.high:.2f}]" if lds else ""] if retrained else []),
                f"{cost.one_off:.2f} s" if cost.one_off == cost.one_off else "unknown",
                f"{1e3 * cost.per_pair:.3g} ms" if cost.asked == cost.asked else "unknown",
                each.scores.unit + (" (partly resumed)" if cost.resumed else ""),
            ]
        )
    names = ["method", f"Spearman with {reference}", *tops, *(["LDS"] if retrained else []), "once", "per pair", "unit"]
    print_table(names, cells, (0, len(names) - 1), pad_edge=False, header_style="dim")
    if not retrained:
        say("agreement with a reference is not quality in itself: this run has no retraining bank", "dim")

"""`whence inspect`: what was fitted, or what could be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whence.cli.from_settings import Only
from whence.cli.options import Session
from whence.errors import CoverageError, UsageError
from whence.settings import Inspect, Measured, Weights
from whence.show.numbers import many

if TYPE_CHECKING:
    from whence.fitting import Curvature

LOOK: dict[str, Any] = {"pad_edge": False, "header_style": "dim"}


def inspect(
    *,
    what: Annotated[str, typer.Argument(metavar="FACTORS_OR_MODEL", help="Folder of factors, or a model.")],
    module: Annotated[
        list[str] | None,
        typer.Option("--module", metavar="NAME", help="Modules of the factors, by name or glob; repeat for more."),
    ] = None,
    settings: Inspect,
    every: Annotated[bool, typer.Option("--all", help="Draw every module; default: those of the last layer.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for pictures and summaries.")] = None,
    modules: Annotated[str, typer.Option("--modules", "-m", help="For a model: list what this selector matches.")] = "mlp",
    measured: Annotated[Measured, Only("damping")],
    weights: Annotated[Weights, Only("adapter")],
    session: Session,
) -> None:
    """Show the health of factors, draw their eigenvalues, or show what of a model can be tracked.

    For factors: mean and largest eigenvalue, condition number after damping, effective rank = sum lambda / (lambda + d) with
    d = damping x mean eigenvalue, share of eigenvalues that are zero, and whether any is negative or not finite. With --out
    also pictures of each chosen module: the map of its eigenvalues, their spectrum, distribution and cumulative share, the
    spectra of both covariances; and a summary that says how to read them.

    \b
    Examples
      whence inspect runs/a/factors
      whence inspect runs/a/factors --module model.layers.3.mlp.down_proj
      whence inspect runs/a/factors --layer 21 --out runs/a/inspect
      whence inspect runs/a/factors --all --out runs/a/inspect-all
      whence inspect gpt2 --modules all
    """
    from whence.cli.console import print_json, start
    from whence.fitting import open_factors
    from whence.models import load_model
    from whence.store.intact import is_run_folder
    from whence.store.manifest import within

    damping = measured.damping
    if is_run_folder(place := within(what, "factors")):
        what = str(place)
        if (settings.layer is not None) + bool(module) + every > 1:
            raise UsageError("--layer, --module and --all choose modules in three ways.", accepted="one of them")
        settings = settings.changed(modules=("*",) if every else tuple(module or ()))
        curvature = open_factors(what)
        if out is not None:
            with start(session.changed(quiet=session.quiet or session.as_json), 1):
                found, show = drawn(curvature, out, settings, damping, session.rerun), _show_drawn
        else:
            found = factors(curvature, damping, settings)
            show = _show_factors
            if len(found["modules"]) == 1:
                found, show = one_module(curvature, found["modules"][0]["module"], damping), _show_module
    else:
        with start(session.changed(quiet=False)):
            loaded, _ = load_model(what, adapter=weights.adapter)
        found, show = coverage(loaded, modules), _show_coverage
    if session.as_json:
        print_json(found)
    else:
        show(found)


def factors(curvature: Curvature, damping: float, settings: Inspect) -> dict[str, Any]:
    """The health of every module, or of those that the settings choose, and how the factors were fitted."""
    from whence.fitting.health import choose_modules, health

    everything = settings.layer is None and not settings.modules
    names = choose_modules(curvature.blocks, settings.layer, ("*",) if everything else settings.modules)
    about = {key: value for key, value in curvature.about.items() if key != "modules"}
    return {
        "damping": damping,
        "about": about,
        "modules": [found.as_json() for found in health(curvature, damping) if found.module in names],
    }


def one_module(curvature: Curvature, module: str, damping: float) -> dict[str, Any]:
    """The health of one module, and how concentrated its eigenvalues are; None where they are not finite."""
    from whence.fitting.health import concentration

    (found,) = factors(curvature, damping, Inspect(modules=(module,)))["modules"]
    shares = {} if found["not_finite"] else concentration(curvature.blocks[module].lam_OI)
    return {"damping": damping, **found, "eigenvalues_holding": {f"{share:.0%}": count for share, count in shares.items()}}


def drawn(curvature: Curvature, out: Path, settings: Inspect, damping: float, rerun: bool) -> dict[str, Any]:
    """Draw the chosen modules; returns the files and the warnings."""
    from whence.fitting.health import choose_modules
    from whence.report.factors import inspect_factors
    from whence.store.intact import read_json

    files = inspect_factors(curvature, out, settings, damping=damping, rerun=rerun)
    everything = read_json(out / "health.json")["modules"]
    return {
        "out": str(out),
        "damping": damping,
        "modules": choose_modules(curvature.blocks, settings.layer, settings.modules),
        "files": [str(file.relative_to(out)) for file in files],
        "warnings": {entry["module"]: entry["warnings"] for entry in everything if entry["warnings"]},
    }


def coverage(model: Any, modules: str) -> dict[str, Any]:
    """What the selector takes of the model, and what the named ones would."""
    from whence.coverage import KINDS, cover

    chosen = cover(model, modules)
    shares: dict[str, dict[str, Any]] = {}
    for selector in KINDS:
        try:
            found = cover(model, selector)
        except CoverageError:
            continue
        shares[selector] = {"modules": len(found.sites), "share": found.share}
    listed = [{"module": site.name, "shape": list(site.shape), "parameters": site.parameters} for site in chosen.sites.values()]
    left_out = {kind: count / max(1, chosen.parameters) for kind, count in chosen.left_out.items()}
    return {
        "parameters": chosen.parameters,
        "frozen": chosen.frozen,
        "selector": modules,
        "share": chosen.share,
        "left_out": left_out,
        "selectors": shares,
        "modules": listed,
    }


def _show_factors(found: dict[str, Any]) -> None:
    from whence.cli.console import print_table, say

    about = found["about"]
    say(
        f"{about['method']} factors of {many(about['examples'], 'row')} ({many(about['positions'], 'token')}) and "
        f"{many(about['eigenvalue_examples'], 'row')} for the eigenvalues, labels from the {about['labels']}"
    )
    say(about["coverage"])
    say(
        f"damping d = {found['damping']:g} x mean eigenvalue of the module; unit of eigenvalues: nats^2 per unit of weight^2\n",
        "dim",
    )
    rows = [
        (
            entry["module"],
            f"{entry['shape'][0]} x {entry['shape'][1]}",
            _number(entry["mean"], ".2e"),
            _number(entry["largest"], ".2e"),
            _number(entry["condition"], ",.0f"),
            f"{_number(entry['effective_rank'], ',.0f')} ({_number(entry['relative_rank'], '.0%')})",
            _number(entry["zero"], ".1%"),
            "ok" if entry["sound"] else f"{entry['negative']} negative, {entry['not_finite']} not finite",
        )
        for entry in found["modules"]
    ]
    print_table(
        ("module", "shape", "mean", "largest", "condition", "effective rank", "zero", "numbers"),
        rows,
        pad_edge=False,
        header_style="dim",
    )
    for name in about["without_gradient"]:
        say(f"{name} never had a gradient and was left out")
    _say_warnings({entry["module"]: entry["warnings"] for entry in found["modules"]})


def _say_warnings(by_module: dict[str, list[str]]) -> None:
    """Each warning once, with the modules that it is about."""
    from whence.cli.console import say

    modules: dict[str, list[str]] = {}
    for module, warnings in by_module.items():
        for text in warnings:
            modules.setdefault(text, []).append(module)
    for text, names in modules.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"warning: {names[0]}{more}: {text}", "yellow")


def _show_drawn(found: dict[str, Any]) -> None:
    from whence.cli.console import say

    _say_warnings(found["warnings"])
    drawn = f"{many(len(found['modules']), 'module')} drawn, {many(len(found['files']), 'file')} in {found['out']}"
    say(f"{drawn}; begin with health.md", "bold")
    for name in found["modules"]:
        say(f"  {name}")


def _number(value: float | None, form: str) -> str:
    """Write a number; null stands for one that is not finite."""
    return "not finite" if value is None else format(value, form)


def _show_module(found: dict[str, Any]) -> None:
    from whence.cli.console import say

    rows, columns = found["shape"]
    total = rows * columns
    say(f"{found['module']}  {rows} x {columns} = {total:,} eigenvalues, damping {found['damping']:g} x mean\n")
    lines = {
        "mean, largest": f"{_number(found['mean'], '.3e')}, {_number(found['largest'], '.3e')}",
        "condition": f"{_number(found['condition'], ',.0f')} after damping",
        "effective rank": f"{_number(found['effective_rank'], ',.0f')} of {total:,}",
        "zero": _number(found["zero"], ".1%"),
        "numbers": "ok" if found["sound"] else f"{found['negative']} negative, {found['not_finite']} not finite",
    }
    for share, count in found["eigenvalues_holding"].items():
        lines[f"{share} of the sum"] = f"in the largest {count:,} ({count / total:.1%})"
    for side, name in (("inputs", "A, of inputs"), ("outputs", "S, of gradients")):
        if kept := found[side]:
            condition = f"condition {_number(kept['condition'], '.2e')} without damping"
            lines[name] = (
                f"rank {kept['rank']:,} of {kept['width']:,}, {condition}, {kept['per_column']:,.1f} samples per column"
            )
    for name, text in lines.items():
        say(f"{name:<16}{text}")
    _say_warnings({found["module"]: found["warnings"]})


def _show_coverage(found: dict[str, Any]) -> None:
    from whence.cli.console import print_table, say

    rows = [
        (entry["module"], f"{entry['shape'][0]} x {entry['shape'][1]}", f"{entry['parameters']:,}")
        for entry in found["modules"]
    ]
    print_table(("module", "shape (out x in)", "parameters"), rows, **LOOK)
    moved = f" that training moved, {found['frozen']:,} are frozen" if found["frozen"] else ""
    said = f"{many(len(rows), 'module')}, {found['share']:.1%} of {found['parameters']:,} parameters{moved}"
    say(f"\n--modules {found['selector']}: {said}", "bold")
    if found["left_out"]:
        say("left out: " + ", ".join(f"{kind} {share:.1%}" for kind, share in found["left_out"].items()))
    chosen = (f"{name} {entry['share']:.1%} ({many(entry['modules'], 'module')})" for name, entry in found["selectors"].items())
    say("selectors: " + ", ".join(chosen))

"""`whence inspect`: what was fitted, or what could be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whence.cli import options
from whence.errors import CoverageError, UsageError

if TYPE_CHECKING:
    from whence.fitting import Curvature


def inspect(
    what: Annotated[str, typer.Argument(metavar="FACTORS_OR_MODEL", help="Folder of factors, or a model.")],
    module: Annotated[str | None, typer.Option("--module", help="One module of the factors, in detail.")] = None,
    modules: Annotated[str, typer.Option("--modules", "-m", help="Of a model: list what this selector takes.")] = "mlp",
    damping: options.Damping = 0.1,
    adapter: options.Adapter = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the health of factors, or what of a model can be tracked.

    For factors: mean and largest eigenvalue, condition number after damping, effective rank = sum lambda / (lambda + d) with
    d = damping x mean eigenvalue, share of eigenvalues that are zero, and whether any is negative or not finite.

    \b
    Examples
      whence inspect runs/a/factors
      whence inspect runs/a/factors --module model.layers.3.mlp.down_proj
      whence inspect gpt2 --modules all
    """
    import json

    from whence.cli.session import session
    from whence.fitting import open_factors
    from whence.models import load_model
    from whence.store.manifest import is_run_folder

    if is_run_folder(Path(what)):
        curvature = open_factors(what)
        found = factors(curvature, damping) if module is None else one_module(curvature, module, damping)
        show = _show_factors if module is None else _show_module
    else:
        with session(verbose=verbose):
            loaded, _ = load_model(what, adapter=adapter)
        found, show = coverage(loaded, modules), _show_coverage
    if as_json:
        print(json.dumps(found))
    else:
        show(found)


def factors(curvature: Curvature, damping: float) -> dict[str, Any]:
    """The health of every module, and how the factors were fitted."""
    from whence.fitting.health import health

    about = {key: value for key, value in curvature.about.items() if key != "modules"}
    return {
        "damping": damping,
        "about": about,
        "modules": [{**vars(found), "sound": found.sound} for found in health(curvature, damping)],
    }


def one_module(curvature: Curvature, module: str, damping: float) -> dict[str, Any]:
    """The health of one module, and how concentrated its eigenvalues are."""
    from whence.fitting.health import concentration

    if module not in curvature.blocks:
        raise UsageError(f"The factors have no module {module!r}.", accepted=", ".join(curvature.blocks))
    (found,) = [entry for entry in factors(curvature, damping)["modules"] if entry["module"] == module]
    marks = {f"{share:.0%}": count for share, count in concentration(curvature.blocks[module].lam_OI).items()}
    return {"damping": damping, **found, "eigenvalues_holding": marks}


def coverage(model: Any, modules: str) -> dict[str, Any]:
    """What the selector takes of the model, and what the named ones would."""
    from whence.coverage import cover

    chosen = cover(model, modules)
    shares: dict[str, dict[str, Any]] = {}
    for selector in ("mlp", "attention", "all", "lora"):
        try:
            found = cover(model, selector)
        except CoverageError:
            continue
        shares[selector] = {"modules": len(found.sites), "share": found.share}
    listed = [{"module": site.name, "shape": list(site.shape), "parameters": site.parameters} for site in chosen.sites.values()]
    left_out = {kind: count / chosen.parameters for kind, count in chosen.left_out.items()}
    return {
        "parameters": chosen.parameters,
        "selector": modules,
        "share": chosen.share,
        "left_out": left_out,
        "selectors": shares,
        "modules": listed,
    }


def _show_factors(found: dict[str, Any]) -> None:
    from whence.cli.console import say

    about = found["about"]
    say(
        f"{about['method']} factors of {about['examples']:,} rows ({about['positions']:,} tokens) and "
        f"{about['eigenvalue_examples']:,} rows for the eigenvalues, labels from the {about['labels']}"
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
            f"{entry['mean']:.2e}",
            f"{entry['largest']:.2e}",
            f"{entry['condition']:,.0f}",
            f"{entry['effective_rank']:,.0f} ({entry['effective_rank'] / (entry['shape'][0] * entry['shape'][1]):.0%})",
            f"{entry['zero']:.1%}",
            "ok" if entry["sound"] else f"{entry['negative']} negative, {entry['not_finite']} not finite",
        )
        for entry in found["modules"]
    ]
    _table(("module", "shape", "mean", "largest", "condition", "effective rank", "zero", "numbers"), rows)
    for name in about["without_gradient"]:
        say(f"{name} never had a gradient and was left out")


def _show_module(found: dict[str, Any]) -> None:
    from whence.cli.console import say

    rows, columns = found["shape"]
    total = rows * columns
    say(f"{found['module']}  {rows} x {columns} = {total:,} eigenvalues, damping {found['damping']:g} x mean\n")
    lines = {
        "mean, largest": f"{found['mean']:.3e}, {found['largest']:.3e}",
        "condition": f"{found['condition']:,.0f} after damping",
        "effective rank": f"{found['effective_rank']:,.0f} of {total:,}",
        "zero": f"{found['zero']:.1%}",
        "numbers": "ok" if found["sound"] else f"{found['negative']} negative, {found['not_finite']} not finite",
    }
    for share, count in found["eigenvalues_holding"].items():
        lines[f"{share} of the sum"] = f"in the largest {count:,} ({count / total:.1%})"
    for name, text in lines.items():
        say(f"{name:<16}{text}")


def _show_coverage(found: dict[str, Any]) -> None:
    from whence.cli.console import say

    rows = [
        (entry["module"], f"{entry['shape'][0]} x {entry['shape'][1]}", f"{entry['parameters']:,}")
        for entry in found["modules"]
    ]
    _table(("module", "shape (out x in)", "parameters"), rows)
    say(
        f"\n--modules {found['selector']}: {len(rows)} modules, {found['share']:.1%} of {found['parameters']:,} parameters",
        "bold",
    )
    say("left out: " + ", ".join(f"{kind} {share:.1%}" for kind, share in found["left_out"].items()))
    chosen = (f"{name} {entry['share']:.1%} ({entry['modules']} modules)" for name, entry in found["selectors"].items())
    say("selectors: " + ", ".join(chosen))


def _table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    from whence.cli.console import show_table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*row)
    show_table(table)

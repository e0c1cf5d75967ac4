"""A plan as lines of text: decimal units, times with their range."""

from __future__ import annotations

from whence.planning.plan import Plan


def size(count: float) -> str:
    """Bytes in GB (10^9) or below that MB."""
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 0.9995e9
        else f"{count / 1e6:.0f} MB"
        if count >= 0.9995e6
        else f"{count / 1e3:.0f} kB"
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def rows(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    """The table: stage, time, peak memory, files, note."""
    found = [
        (
            stage.name,
            duration(stage.seconds),
            size(plan.resident + stage.memory.peak),
            size(stage.disk) if stage.disk else "",
            stage.note,
        )
        for stage in plan.stages
    ]
    low, high = plan.range(plan.seconds)
    total = f"{duration(plan.seconds)} ({duration(low)} to {duration(high)})"
    return [*found, ("total", total, size(plan.memory), size(plan.disk), verdict(plan))]


def verdict(plan: Plan) -> str:
    """Whether it fits."""
    memory, disk = f"{size(plan.free['memory'])} of memory", f"{size(plan.free['disk'])} of disk"
    return f"fits in {memory} and {disk}" if plan.fits else f"does NOT fit in {memory} and {disk}"


def heading(plan: Plan) -> list[str]:
    """What is planned for."""
    model, data = plan.model, plan.data
    sampled = f" (lengths from a sample of {data['tokenised']:,})" if data["tokenised"] < data["rows"] else ""
    measured = f", eigenvalues from {data['measured']:,}" if data["measured"] else ""
    parameters = f"{model['parameters'] / 1e6:,.4g} M parameters, {model['format']}"
    return [
        f"model    {model['name']}  {model['kind']}, {parameters}, on {plan.device}",
        f"data     {data['rows']:,} rows, {data['tokens']:,} tokens{sampled}; factors from {data['fitted']:,} rows{measured}; "
        f"{data['queries']} queries",
        f"modules  {plan.coverage}",
    ]


def footing(plan: Plan) -> list[str]:
    """What to know about the figures."""
    source = {
        "batches": "real batches of this model and this machine's rates",
        "rates": "this machine's measured rates",
        "assumed": "the rates of a usual machine (--calibrate measures this one's)",
    }[plan.sure]
    lines = [
        f"Time from {source}. Memory includes the model ({size(plan.model['bytes'])}) and the process "
        f"({size(plan.model['process'])}); on the way the files take {size(plan.disk_peak)}."
    ]
    if short := [stage for stage, products in plan.data["products"].items() if products == "bfloat16"]:
        checked = ", if a few rows' scores allow it" if plan.settings.fit.precision.products == "auto" else ""
        lines.append(f"Matrix products of {' and '.join(short)} in bfloat16{checked}.")
    if plan.changes:
        changed = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in plan.changes.items())
        lines.append(f"To fit, changed: {changed}")
    return [*lines, *(f"hint  {hint}" for hint in plan.hints)]


def why(plan: Plan) -> list[str]:
    """How each kind of module is computed, and what that would cost otherwise (FLOPs per example)."""
    lines = []
    for kind, choices in plan.choices.items():
        lines.append(kind)
        lines += [f"  {purpose:<12}{choice}" for purpose, choice in choices]
    return lines


def lines(plan: Plan) -> list[str]:
    """All of it, the table in columns."""
    table = [("stage", "time", "memory", "files", ""), *rows(plan)]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    columns = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in table]
    return [*heading(plan), *columns, *footing(plan)]

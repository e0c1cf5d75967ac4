"""`whence doctor`: what is installed, what the machine has, and whether it computes correctly."""

from __future__ import annotations

import platform
import shutil
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "transformers", "datasets", "peft", "tokenizers", "safetensors", "numpy")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check versions, devices, memory, disk and numerics.

    The exit code is 1 if the numerical self-test fails.
    """
    from whence.cli.console import out, print_json

    found = examine()
    if as_json:
        print_json(found)
    else:
        for line in describe(found):
            out.print(line, markup=False, soft_wrap=True)
    if not all(test["passed"] for test in found["self_test"]):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Look at the installation and the machine; bytes and counts as numbers."""
    import importlib.metadata

    import psutil
    import torch

    from whence.selftest import self_test
    from whence.version import __version__

    gpus = range(torch.cuda.device_count())
    devices = ["cpu", *(f"cuda:{gpu}" for gpu in gpus)]
    return {
        "versions": {
            "whence": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "memory_free": psutil.virtual_memory().available,
        "disk_free": shutil.disk_usage(".").free,
        "devices": [
            {"name": f"cuda:{gpu}", "model": torch.cuda.get_device_name(gpu), "memory_free": torch.cuda.mem_get_info(gpu)[0]}
            for gpu in gpus
        ],
        "self_test": [
            {"device": device, "check": check, "passed": passed, "measured": measured}
            for device in devices
            for check, passed, measured in self_test(device)
        ],
    }


def describe(found: dict[str, Any]) -> list[str]:
    """Say in lines what `examine` found."""
    gpus = [f"{gpu['name']} {gpu['model']}, {_gigabytes(gpu['memory_free'])} free" for gpu in found["devices"]]
    return [
        *(f"{package:<13}{version}" for package, version in found["versions"].items()),
        f"{'platform':<13}{found['platform']}",
        f"{'devices':<13}cpu with {found['threads']} threads, {_gigabytes(found['memory_free'])} free",
        *(f"{'':<13}{gpu}" for gpu in gpus),
        f"{'disk':<13}{_gigabytes(found['disk_free'])} free here",
        *(
            f"{'ok' if test['passed'] else 'FAILED':<13}{test['check']} on {test['device']}: {test['measured']}"
            for test in found["self_test"]
        ),
    ]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"

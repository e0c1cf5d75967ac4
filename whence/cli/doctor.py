"""`whence doctor`: what is installed, what the machine has, and whether it computes correctly."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "transformers", "datasets", "peft", "tokenizers", "safetensors", "numpy")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check versions, devices, memory, disk and numerics.

    The self-test decomposes, multiplies in low precision, and scores a small network, which is compared with dense matrices in
    float64. Where there is a GPU that torch can't use, it says which torch to install. The exit code is 1
    if the self-test fails.
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
        "gpu_unused": unused_gpu(),
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
        *([f"{'GPU':<13}{found['gpu_unused']['why']}", f"{'':<13}{found['gpu_unused']['fix']}"] if found["gpu_unused"] else []),
        f"{'disk':<13}{_gigabytes(found['disk_free'])} free here",
        *(
            f"{'ok' if test['passed'] else 'FAILED':<13}{test['check']} on {test['device']}: {test['measured']}"
            for test in found["self_test"]
        ),
    ]


def unused_gpu() -> dict[str, str] | None:
    """Why torch can't use the GPU that the NVIDIA driver knows, and what to do; None where it can, or where there is none."""
    import torch

    if torch.cuda.is_available() or (driver := _driver()) is None:
        return None
    major, minor = driver
    why = f"the NVIDIA driver takes CUDA up to {major}.{minor}, and torch {torch.__version__} "
    why += f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    built = int(torch.version.cuda.split(".")[0]) if torch.version.cuda else 0
    if built and built <= major:  # the wheel is right
        return {"why": f"{why}, but finds no GPU", "fix": "is one hidden by CUDA_VISIBLE_DEVICES, or from this container?"}
    where = f"pip install --force-reinstall torch --index-url INDEX, with the INDEX for CUDA {major} of pytorch.org/get-started"
    return {"why": why, "fix": where}


def _driver() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver takes, as nvidia-smi says; None without a driver."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    try:
        said = subprocess.run([tool], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"CUDA (?:\w+ )?Version\s*:\s*(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"

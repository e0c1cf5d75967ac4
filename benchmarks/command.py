"""What commands that write one page have in common: their options, the folder of results, and how results are written."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import Printed
from whence.errors import WhenceError
from whence.progress import report_to
from whence.store.files import atomic
from whence.validate.results import Result

ROOT = Path(__file__).parents[1]

Make = Callable[[argparse.Namespace], Result]


def run(
    module: str,
    doc: str,
    make: Make,
    given: Sequence[str] | None = None,
    *,
    data: str = "tinystories, ...",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """The command `python -m MODULE`: make what the options ask for, print it, and write json and md.

    Beside the usual options it has the module's own, by name with what `add_argument` takes. The files are named for the
    result's `check`, and go to the folder `results` beside the module. It ends with 1 where the result has flags.
    """
    *package, _ = module.split(".")
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help=f"folder with {data}")
    parser.add_argument("--out", type=Path, default=ROOT.joinpath(*package, "results"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny size that says nothing, in seconds")
    for option, own in (options or {}).items():
        parser.add_argument(option, **own)
    chosen = parser.parse_args(given)
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began, spent = time.monotonic(), sum(os.times()[:4])
    with report_to(Printed()):
        try:
            found = make(chosen)
        except WhenceError as error:
            print(error)
            return error.exit_code
    found.about.update(
        minutes=round((time.monotonic() - began) / 60, 1),
        processor_minutes=round((sum(os.times()[:4]) - spent) / 60, 1),  # with that of processes it started
        made={"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()},
    )
    page = found.markdown()
    for ending, text in (("json", json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"), ("md", page)):
        with atomic(chosen.out / f"{found.check}.{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(page)
    print(
        f"{found.about['minutes']} minutes ({found.about['processor_minutes']} of the processor): {chosen.out / found.check}.md"
    )
    return int(bool(found.flags))

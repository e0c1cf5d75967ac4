"""What the commands have in common: their options, the folder of results, and how results are written."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.quality import Printed
from whence.errors import WhenceError
from whence.progress import report_to
from whence.store.files import atomic
from whence.validate.results import Result

RESULTS = Path(__file__).parent / "results"

Replica = Callable[[argparse.Namespace], Result]


def run(name: str, doc: str, replica: Replica, given: Sequence[str] | None = None) -> int:
    """The command `python -m replication.NAME`: make what the options ask for, print it, and write json and md."""
    parser = argparse.ArgumentParser(prog=f"python -m replication.{name}", description=doc.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with tinystories, ...")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny size that says nothing, in seconds")
    chosen = parser.parse_args(given)
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began, spent = time.monotonic(), time.process_time()
    with report_to(Printed()):
        try:
            found = replica(chosen)
        except WhenceError as error:
            print(error)
            return error.exit_code
    found.about.update(
        minutes=round((time.monotonic() - began) / 60, 1),
        processor_minutes=round((time.process_time() - spent) / 60, 1),
        made={"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()},
    )
    page = found.markdown()
    for ending, text in (("json", json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"), ("md", page)):
        with atomic(chosen.out / f"{name}.{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(page)
    print(f"{found.about['minutes']} minutes ({found.about['processor_minutes']} of the processor): {chosen.out / name}.md")
    return 0

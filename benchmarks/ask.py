"""How long a question to 20,000 rows takes: through an index, from Python and from the page's server.

    python -m benchmarks.ask --data ../shared/data             # two minutes for factors and index, then seconds
    python -m benchmarks.ask --work FOLDER                     # keeps both there for the next time

Model and rows are those of `benchmarks.funnel`: stories260K, pieces of real stories and articles. Every question is generated,
met by a scan, and the rows found are scored exactly. Wall seconds; exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import funnel

PROMPTS = ("Once upon a time, there was a little dog named", "Lily and her mom went to the park", "The big bear was sad")
FIRST, LATER, UP = 2.0, 1.0, 5.0
"""Targets: the first question of a server that is ready, all others, and until the server answers."""


def main(given: list[str] | None = None) -> int:
    """Ask and print; 0 where the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--work", type=Path, help="folder for rows, factors and index")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="whence-ask-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        rows = work / "rows.jsonl"
        lines = [json.dumps({"text": row["text"]}) for row in funnel.corpus(options.data, options.rows)]
        rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        model, out = str(options.data / funnel.MODEL), work / "run"
        in_python(model, rows, out)
        up, first, later = served(model, rows, out)
    print(f"server up in {up:.2f} s (target {UP:.0f}), first question {first:.2f} s ({FIRST:.0f})", end="")
    print(f", others {later:.2f} s ({LATER:.0f})")
    return int(up > UP or first > FIRST or later > LATER)


def in_python(model: str, rows: Path, out: Path) -> None:
    """Build the index where there is none, and ask."""
    import whence

    run = whence.open(model, data=str(rows), out=out, max_length=funnel.TOKENS)
    if not run.has_index:
        run.build_index(kind="landmarks")
    for prompt in PROMPTS:
        began = time.perf_counter()
        found = run.find(prompt, max_new_tokens=24)
        took = time.perf_counter() - began
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.seconds.items())
        print(f"Python  {took:5.2f} s ({parts}); {found.scanned:,} rows, recall {found.recall}")


def served(model: str, rows: Path, out: Path) -> tuple[float, float, float]:
    """Seconds until a server answers, those of its first question, and the most of any other."""
    words = ["serve", model, "--data", str(rows), "--out", str(out), "--max-length", str(funnel.TOKENS), "--no-browser"]
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "whence", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    try:
        while "#t=" not in (line := server.stdout.readline()):
            assert server.poll() is None, f"whence serve ended with {server.returncode}"
        up = time.perf_counter() - began
        base, token = line.split()[-1].split("/#t=")
        while call(base, token, "run")["state"] == "loading":
            time.sleep(0.1)
        times = []
        for prompt in PROMPTS:
            began = time.perf_counter()
            answer = call(base, token, "complete", {"prompt": prompt, "max_new_tokens": 24})["completion"]
            asked = call(base, token, "ask", {"prompt": prompt, "completion": answer, "method": "index"})
            times.append(time.perf_counter() - began)
            print(f"server  {times[-1]:5.2f} s; {asked['scan']['words']}")
    finally:
        server.terminate()
        server.wait()
    return up, times[0], max(times[1:])


def call(base: str, token: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a route answers."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{base}/api/{route}", data=data, headers=headers)) as said:
        return json.loads(said.read())


if __name__ == "__main__":
    sys.exit(main())

"""How quick the page of `whence serve` is in Chromium: first paint, the link of a token that the pointer is on, and its size.

    python -m benchmarks.page            # a minute: a small model in a temporary folder, served to a headless browser

Rows have hundreds of tokens, and an answer has dozens. A hover is timed from the pointer's event to the frame that shows the
other text's new colours. Prints medians and the worst beside the targets; exits with 1 where one is missed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import queue
import random
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

FIRST_PAINT_MS, HOVER_MS, BUNDLE_BYTES = 1000.0, 50.0, 250_000
"""Targets: until something is seen, until a link is, and all files of the page, gzipped."""

ROW_WORDS, ANSWER_WORDS, HOVERS = 300, 30, 40

HOVER = """async ([row, answer, token]) => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => {
    const shown = new MessageChannel();
    shown.port1.onmessage = done;
    shown.port2.postMessage(0);
  }));
  const target = row.querySelector(`[data-token="${token}"]`);
  target.scrollIntoView({ block: "center" });
  await frame();
  const began = performance.now();
  for (const kind of ["pointerover", "pointermove", "mouseover", "mousemove"])
    target.dispatchEvent(new PointerEvent(kind, { bubbles: true }));
  await frame();
  const took = performance.now() - began;
  const colours = [...answer.querySelectorAll("[data-token]")].map((each) => each.className).join("|");
  return { took, chosen: target.getAttribute("aria-selected") === "true", colours };
}"""
"""The time from the pointer's events on a token of the row to the end of the next frame, and the answer's colours then."""


def main(given: list[str] | None = None) -> int:
    """Measure and print; 0 where the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=5, help="how often the page is opened")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="whence-page-") as scratch:
        paints, hovers = measured(served(Path(scratch)), options.loads)
    size = bundle()
    found = [
        ("first paint", statistics.median(paints), max(paints), FIRST_PAINT_MS, "ms"),
        ("hover link", statistics.median(hovers), sorted(hovers)[int(0.95 * len(hovers))], HOVER_MS, "ms"),
        ("bundle, gzipped", size / 1000, size / 1000, BUNDLE_BYTES / 1000, "KB"),
    ]
    for name, median, worst, target, unit in found:
        verdict = "met" if median <= target else "MISSED"
        print(f"{name:<16} {median:7.1f} {unit} (worst {worst:.1f}; target {target:.0f}): {verdict}")
    return int(any(median > target for _, median, _, target, _ in found))


def bundle() -> int:
    """Bytes of all files that a browser loads, each gzipped."""
    from whence.serve.guard import STATIC

    files = [file for file in STATIC.rglob("*") if file.is_file() and file.name != "export.html"]
    if not files:
        raise SystemExit("The page was not built: make page")
    return sum(len(gzip.compress(file.read_bytes())) for file in files)


def served(folder: Path) -> str:
    """The address of a server of a small model with factors, and long rows."""
    import whence
    from whence.demo.model import Settings, make_model, make_tokenizer
    from whence.serve import Opening, serve

    draw = random.Random(0)
    words = [f"w{number}" for number in range(500)]
    rows = [{"text": " ".join(draw.choices(words, k=ROW_WORDS))} for _ in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = make_tokenizer(rows)
    length = 2 * ROW_WORDS + ANSWER_WORDS
    model = make_model(tokenizer, settings=Settings(width=32, inner=64, heads=2, max_length=length))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings: dict[str, Any] = {"max_length": length}
    run = whence.open(folder / "model", data=folder / "train.jsonl", out=folder / "run", **settings)
    run.fit(examples="all")
    opening, opened = (
        Opening(str(folder / "model"), str(folder / "train.jsonl"), str(folder / "run"), settings),
        queue.Queue[str](),
    )
    threading.Thread(target=serve, args=(opening, 0), kwargs={"opened": opened.put}, daemon=True).start()
    return opened.get(timeout=60)


def measured(address: str, loads: int) -> tuple[list[float], list[float]]:
    """Milliseconds until the first paint of each load, and of each hover."""
    from playwright.sync_api import sync_playwright

    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"))), None
    )
    if chromium is None:
        raise SystemExit("There is no Chromium: apt-get install chromium")
    paints, hovers, answer = [], [], " ".join(f"w{number}" for number in range(ANSWER_WORDS))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(loads):
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector("#prompt")
            paint = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            while page.evaluate(paint) is None:
                page.wait_for_timeout(20)
            paints.append(page.evaluate(paint))
        page.get_by_role("button", name="Paste an answer").click()
        page.get_by_label("Answer to explain").fill(f" {answer}")
        page.locator("#prompt").fill("w1 w2 w3")
        page.get_by_role("button", name="Trace this answer").click()
        page.locator(".rows .opener").first.click(timeout=120_000)
        page.wait_for_selector(".detail .readout", timeout=120_000)
        lists = [page.locator(".detail [role=listbox]").nth(number).element_handle() for number in (1, 0)]
        seen = set()
        for token in range(5, 5 + 6 * HOVERS, 6):
            found = page.evaluate(HOVER, [*lists, token])
            assert found["chosen"], f"token {token} was not taken up"
            hovers.append(found["took"])
            seen.add(found["colours"])
        assert len(seen) > 1, "the answer's colours did not follow the pointer"
        browser.close()
    return paints, hovers


if __name__ == "__main__":
    sys.exit(main())

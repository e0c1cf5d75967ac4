"""Pictures of every page of `whence serve` on the run of `whence demo`: `python docs/screenshots.py runs/demo FOLDER`.

Light and dark, desktop and phone. The first question of the newest scores is opened, with its first row, and compared with the
second. Chromium comes from the PATH.
"""

from __future__ import annotations

import queue
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from whence.serve import Opening, serve

SIZES = {"desktop": {"width": 1280, "height": 860}, "phone": {"width": 390, "height": 844}}
DRAWN = {"factors": "svg.map", "data/all": "figure", "runs": ".kinds"}
"""Pages, and what is there once they are drawn."""

QUESTIONS = """async () => {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem("whence-token")}` };
  const { scores } = await (await fetch("./api/scores", { headers })).json();
  return scores.map((each) => ({ name: each.name, stages: each.stages }));
}"""


def main(run: str, out: str) -> None:
    """All pictures, into a folder."""
    folder, opened = Path(out), queue.Queue[str]()
    folder.mkdir(parents=True, exist_ok=True)
    demo = Opening(f"{run}/model", f"{run}/corpus.jsonl", run)
    threading.Thread(target=serve, args=(demo, 0), kwargs={"opened": opened.put}, daemon=True).start()
    address = opened.get(timeout=60)
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")))
    )
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for size, viewport in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
                page.set_default_timeout(60_000)
                page.goto(address)
                for name, picture in shoot(page, address.split("#")[0]):
                    (folder / f"{name}-{size}-{scheme}.png").write_bytes(picture)
                page.close()
        browser.close()


def shoot(page: Page, origin: str) -> Iterator[tuple[str, bytes]]:
    """Each page's name and picture."""
    page.wait_for_selector(".examples a")
    scores = page.evaluate(QUESTIONS)
    page.goto(f"{origin}#/trace/scores:{scores[0]['name']}:0")
    page.wait_for_selector(".rows .opener")
    page.wait_for_selector(".answer [data-token]")
    yield "trace", page.screenshot()
    page.locator(".rows .opener").first.click()
    page.wait_for_selector(".detail .readout, .detail .notice")
    tokens = page.locator(".detail [role=listbox] >> nth=1 >> [data-token][class*=u3]")
    if tokens.count():
        tokens.first.hover()
    yield "row", page.screenshot()
    page.goto(f"{origin}#/compare/scores:{scores[0]['name']}:0/scores:{scores[0]['name']}:1")
    page.wait_for_selector("main svg")
    yield "compare", page.screenshot()
    if staged := next((each for each in scores if each["stages"]), None):
        first, last = (f"scores:{staged['name']}@{stage}:0" for stage in (staged["stages"][0], staged["stages"][-1]))
        page.goto(f"{origin}#/trace/scores:{staged['name']}:0")
        page.wait_for_selector(".stages article")
        yield "stages", page.screenshot()
        page.goto(f"{origin}#/compare/{first}/{last}")
        page.wait_for_selector(".sides section")
        yield "stages-compare", page.screenshot()
    for name, drawn in DRAWN.items():
        page.goto(f"{origin}#/{name}")
        page.wait_for_selector(drawn)
        yield name.replace("/", "-"), page.screenshot()


if __name__ == "__main__":
    main(*sys.argv[1:3])

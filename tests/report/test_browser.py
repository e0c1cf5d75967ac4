"""The page in a browser: no sideways scroll on phone and desktop, light and dark, with scripts and without, no complaint."""

import html
import json
import re
import subprocess

import pytest
from chromium import CHROMIUM, needs_chromium

from whence.report import build_report, write_html

pytestmark = needs_chromium

WRAPPER = """<!doctype html><html><body><pre id="out"></pre>
{frames}
<script>
const found = {{}};
const frames = [...document.querySelectorAll("iframe")];
const look = () => {{
  for (const frame of frames) {{
    const page = frame.contentDocument, root = page.documentElement;
    const first = page.querySelector("li.row").getBoundingClientRect().top;
    const closed = root.scrollHeight;
    for (const part of page.querySelectorAll("details")) part.open = true;
    const inside = [...page.querySelectorAll("main *")].filter((part) => !part.closest(".scroll, svg"));
    const right = (part) => part.getBoundingClientRect().right;
    found[frame.id] = {{
      scroll: root.scrollWidth,
      width: frame.contentWindow.innerWidth,
      height: root.scrollHeight,
      first,
      closed,
      scripts: root.classList.contains("js"),
      paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      rows: page.querySelectorAll("li.row").length,
      injected: page.querySelectorAll("main script").length,
      wide: inside.filter((part) => right(part) > root.clientWidth + 1).map((part) => part.className).slice(0, 5),
    }};
  }}
  document.getElementById("out").textContent = JSON.stringify(found);
}};
window.addEventListener("load", look);
</script></body></html>"""

SANDBOXES = {"scripts": "", "plain": 'sandbox="allow-same-origin"'}


def look(file, folder, dark: bool) -> tuple[dict, list[str]]:
    """What a browser makes of the page at 390 and 1280 pixels, with scripts and without, and its complaints."""
    frames = "".join(
        f'<iframe id="{kind}-{width}" {sandbox} width="{width}" height="900" style="border:0" src="{file.name}"></iframe>'
        for kind, sandbox in SANDBOXES.items()
        for width in (390, 1280)
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.format(frames=frames), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={int(not dark)}",
    ]
    run = subprocess.run([*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    (found,) = re.findall(r'<pre id="out">(.*?)</pre>', run.stdout, re.S)
    said = [line for line in run.stderr.splitlines() if "CONSOLE" in line and "frame is sandboxed" not in line]
    return json.loads(html.unescape(found)), said


@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(scores, pairs, tmp_path, dark):
    report = build_report(scores, pairs=pairs)
    file = write_html(report, tmp_path / "report.html")
    found, said = look(file, tmp_path, dark)
    assert not said, said
    assert set(found) == {"scripts-390", "scripts-1280", "plain-390", "plain-1280"}
    for name, page in found.items():
        assert page["scroll"] <= page["width"] and not page["wide"], (name, page)
        assert page["scripts"] == name.startswith("scripts") and page["rows"] == 100 and page["injected"] == 0
        assert page["first"] < 844, "the answer and its first row are on the first screen of a phone"
        assert page["closed"] < 0.5 * page["height"], "of five questions one is open"
        assert page["height"] > 5000 and page["paper"] == ("rgb(19, 22, 25)" if dark else "rgb(250, 249, 246)")


def test_rows_are_sorted_and_copied(scores, tmp_path):
    """Another order keeps all rows and the five that are open at once; the first order comes back."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    file = write_html(build_report(scores, top=8), tmp_path / "report.html")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(file.as_uri())

        def shown(name):
            lists = page.locator("#q0 ol.rows.raises").all()
            return [[row.get_attribute(name) for row in each.locator("> li").all()] for each in lists]

        before = shown("data-rank")
        assert [len(each) for each in before] == [5, 3] and sum(before, []) == [str(rank) for rank in range(1, 9)]
        page.get_by_label("Order of the rows").select_option("tokens")
        lengths = [int(tokens) for tokens in sum(shown("data-tokens"), [])]
        assert lengths == sorted(lengths, reverse=True) and [len(each) for each in shown("data-rank")] == [5, 3]
        assert sorted(sum(shown("data-rank"), []), key=int) == sum(before, []) != sum(shown("data-rank"), [])
        page.get_by_label("Order of the rows").select_option("effect")
        assert shown("data-rank") == before
        copy = page.get_by_role("button", name="copy the text of row 1", exact=True).first
        copy.click()
        page.wait_for_function("button => /copied|selected/.test(button.textContent)", arg=copy.element_handle())
        browser.close()

"""Reports of many questions: ten at a time, the others compressed in the page, all of them below 5 MB."""

import base64
import dataclasses
import html
import json
import re
import shutil
import subprocess
import zlib

import numpy as np
import pandas as pd
import pytest
from chromium import CHROMIUM, needs_chromium
from test_html import Page

from whence.report import build_report, write_html
from whence.report.html import LIMIT, PAGE, render

MANY = 200


def repeated(scores, count):
    """The questions again and again, up to that many, each with its own numbers, and rows of some 400 characters."""
    draw, (questions, rows) = np.random.default_rng(1), scores.shape
    times = count // questions
    texts = [f"{text} {number} " + " ".join(draw.choice(WORDS, 60)) for number, text in enumerate(scores.examples["text"])]
    pieces = [re.findall(r".{1,4}", text, re.S) for text in texts]
    tokens = np.concatenate([draw.normal(size=(count, len(part))) * scores.raw.std() for part in pieces], 1)
    examples = scores.examples.assign(text=texts, pieces=pieces, tokens=[len(part) for part in pieces])
    queries = pd.concat([scores.queries] * times, ignore_index=True).assign(id=[f"q{number}" for number in range(count)])
    raw = np.tile(scores.raw, (times, 1)) * draw.uniform(0.5, 2, (count, rows))
    modules = {name: np.tile(part, (times, 1)) for name, part in scores.modules.items()}
    return dataclasses.replace(
        scores,
        raw=raw,
        examples=examples,
        queries=queries,
        modules=modules,
        tokens=tokens,
        exact=np.tile(scores.exact, (times, 1)),
    )


@pytest.fixture
def many(scores, tmp_path_factory):
    """The report of all these questions, and the file of its page: the same in every test."""
    if not MADE:
        report = build_report(repeated(scores, MANY))
        MADE.append((report, write_html(report, tmp_path_factory.mktemp("many") / "report.html")))
    return MADE[0]


MADE = []

WORDS = [f"{first}{middle}{last}" for first in "bdfgklmnprst" for middle in "aeiou" for last in ("n", "rt", "st", "ll", "")]


def unpacked(page: str) -> list[str]:
    """The questions that are not shown at first, page by page, as a browser unpacks them."""
    found = re.findall(r'<template class="packed">(.*?)</template>', page, re.S)
    return [zlib.decompress(base64.b64decode(part)).decode() for part in found]


def test_two_hundred_questions_are_one_page_below_5_mb_that_shows_ten(many):
    report, file = many
    text = file.read_text(encoding="utf-8")
    pages = unpacked(text)
    assert len(text.encode()) < LIMIT and len(pages) == MANY // PAGE - 1
    every = [re.sub(r"<template.*?</template>", "", text, flags=re.S), *pages]
    values = [[float(value) for value in re.findall(r'<li class="row" id="[^"]+" data-value="(.*?)"', page)] for page in every]
    assert [len(found) for found in values] == [20 * PAGE] * len(every)
    assert sum(values, []) == [row.value for query in report.queries for row in query.raises + query.lowers]
    ids = [name for page in every for name in re.findall(r'<\w[^>]* id="(.*?)"', page)]
    assert len(ids) == len(set(ids)) and {f"q{number}" for number in range(MANY)} <= set(ids)
    assert "Questions 11 to 200 are shown by a script" in every[0]


def test_every_page_is_a_page_of_its_own(scores, tmp_path):
    """Three of them, each element of which is read."""
    report = build_report(repeated(scores, 3 * PAGE))
    text = write_html(report, tmp_path / "report.html").read_text(encoding="utf-8")
    every = [Page(re.sub(r"<template.*?</template>", "", text, flags=re.S)), *map(Page, unpacked(text))]
    assert [len(page.rows) for page in every] == [20 * PAGE] * 3
    values = iter(float(row["data-value"]) for page in every for row in page.rows)
    for query in report.queries:
        assert [next(values) for _ in range(20)] == [row.value for row in query.raises + query.lowers]
    ids = [found["id"] for page in every for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids)) and {f"q{number}" for number in range(3 * PAGE)} <= set(ids)
    assert sum(tag == "script" for tag, _ in every[0].elements) == 1
    assert not any(tag == "script" for page in every[1:] for tag, _ in page.elements), "texts of rows stay texts"


def test_a_few_questions_need_no_script(scores):
    text = render(build_report(scores))
    assert "<template" not in text and "<noscript" not in text and 'id="after"' not in text


DRIVER = """<!doctype html><html><body><pre id="out"></pre>
<iframe id="plain" width="1280" height="900" src="report.html"></iframe>
<iframe id="linked" width="1280" height="900" src="report.html#q57"></iframe>
<script>
const found = {}, wait = (done) => new Promise((go) => { const look = () => done() ? go() : setTimeout(look, 50); look(); });
window.addEventListener("load", async () => {
  const [plain, linked] = ["plain", "linked"].map((name) => document.getElementById(name).contentWindow);
  const page = plain.document, shown = () => [...page.querySelectorAll("section.query")].map((part) => part.id);
  const timing = plain.performance.getEntriesByType("navigation")[0];
  found.seconds = (timing.domComplete - timing.fetchStart) / 1000;
  found.elements = page.querySelectorAll("*").length;
  found.first = shown();
  page.getElementById("after").click();
  await wait(() => page.getElementById("q10"));
  found.second = shown();
  const find = page.getElementById("find");
  find.value = "ROW-5"; find.dispatchEvent(new plain.Event("input"));
  await wait(() => page.getElementById("found").textContent);
  found.count = page.getElementById("found").textContent;
  found.hidden = [...page.querySelectorAll("li.row")].filter((row) => row.hidden && row.offsetHeight).length;
  await wait(() => linked.document.getElementById("q57"));
  found.linked = linked.document.getElementById("q57").getBoundingClientRect().top;
  document.getElementById("out").textContent = JSON.stringify(found);
});
</script></body></html>"""


@needs_chromium
def test_a_browser_opens_it_at_once_turns_pages_follows_links_and_searches_them_all(many, tmp_path):
    report, file = many
    shutil.copy(file, tmp_path)
    (tmp_path / "driver.html").write_text(DRIVER, encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=60000",
        "--dump-dom",
    ]
    run = subprocess.run(
        [*command, (tmp_path / "driver.html").as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    assert "CONSOLE" not in run.stderr, run.stderr
    (said,) = re.findall(r'<pre id="out">(.*?)</pre>', run.stdout, re.S)
    found = json.loads(html.unescape(said))
    assert found["first"] == [f"q{number}" for number in range(10)] and found["second"] == [
        f"q{number}" for number in range(10, 20)
    ]
    assert found["seconds"] < 20, "two or so on a machine that does nothing else"
    assert found["elements"] < 50_000 and found["hidden"] == 0 and abs(found["linked"]) < 900
    rows = [["row-5" in row.id for row in query.raises + query.lowers] for query in report.queries]
    matching = f"{sum(map(sum, rows))} of {20 * MANY} rows, in {sum(map(any, rows))} of {MANY} questions"
    assert found["count"] == matching, "the search looks in all questions"

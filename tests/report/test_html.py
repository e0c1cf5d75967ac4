"""The page holds what the report says, escapes what rows hold, and needs nothing but itself."""

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import pytest

from whence.report import build_report, gather, write_html
from whence.report.html import render
from whence.show.numbers import typeset

VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in its turn. Collects rows, marks and links."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.rows: list[dict] = []
        self.resources: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.said: list[str] = []
        self.feed(text)
        assert not self.open
        self.text = "".join(self.said)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append((tag, found))
        self.resources += [value for name, value in attrs if name in ("src", "href", "action", "srcset", "data", "poster")]
        if "row" in (found.get("class") or "").split():
            self.rows.append({**found, "snippet": "", "whole": "", "all": "", "marks": []})
        if tag not in VOID:
            self.open.append((tag, found.get("class") or ""))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "script" in tags or "style" in tags:
            return
        self.said.append(data)
        classes = [kind for _, kind in self.open]
        if "row" in classes:
            row = self.rows[-1]
            row["all"] += data
            if "more" in classes:
                return
            row["snippet"] += data if "words" in classes else ""
            row["whole"] += data if "text" in classes else ""
            if "mark" in tags and "text" in classes:
                row["marks"].append((classes[-1], data))


@pytest.fixture
def report(scores, pairs):
    return build_report(scores, pairs=pairs, top=12)


@pytest.fixture
def page(report) -> Page:
    return Page(render(report))


def test_numbers_are_those_of_the_scores(page, report, scores):
    rows = iter(page.rows)
    for query in report.queries:
        for row in query.raises + query.lowers:
            shown = next(rows)
            place = scores.example_ids.index(row.id)
            assert float(shown["data-value"]) == scores.values[query.number, place]
            assert f"{row.effect}, {row.word}" in shown["all"] and f"{typeset(row.value)} nats" in shown["all"]
            assert row.id in shown["all"]
    assert next(rows, None) is None


def test_texts_of_rows_are_texts(page, report):
    shown = {row["id"]: row for row in page.rows}
    for query in report.queries:
        for row in query.raises + query.lowers:
            if "\x00" not in row.text:
                assert shown[f"q{query.number}r{row.rank}"]["whole"].replace("↵\n", "\n") == row.text
    assert sum(tag == "script" for tag, _ in page.elements) == 1 and "<script>alert('x')</script>" in page.text


def test_what_a_page_cannot_hold_is_replaced(page):
    assert not {"\x00", "\x1b", "\r"} & set(page.text)
    assert "two\ufffd\ufffd\ttab" in page.text


def test_colours_say_the_sign_and_the_size(page, report):
    (top, *_), shown = report.queries[0].raises, page.rows[0]
    scale = max(abs(value) for row in (*report.queries[0].raises, *report.queries[0].lowers) for value in row.token_values)
    marked = "".join(text for _, text in shown["marks"])
    for piece, value in zip(top.pieces, top.token_values, strict=True):
        if abs(value) >= 0.05 * scale:
            assert piece.strip() in marked
    assert {kind for row in page.rows for kind, _ in row["marks"]} == {"u1", "u2", "u3", "d1", "d2", "d3"}
    assert all(kind[0] == "u" for kind, _ in shown["marks"]), "all of this row's tokens raise"


def test_special_tokens_are_not_repeated(page):
    assert "<|endoftext|>A story.<|endoftext|>" in page.text
    assert not re.search(r"<\|endoftext\|>\s*<\|endoftext\|>", page.text)


def test_hubs_copies_and_doubts_are_marked(page):
    assert "hub: high with most questions" in page.text and "Rows that top everything" in page.text
    assert page.text.count("Not what this model would say") == 1
    assert "3 copies, shown once" in page.text and "scored again exactly" in page.text and "low rank only" in page.text
    assert "LDS: not measured" in page.text and "not proof" in page.text and "Fragile" in page.text
    assert "It was not given: health of the factors" in page.text


def test_the_page_needs_nothing_but_itself(report, page):
    text = render(report)
    assert all(found.startswith("#") or found == "data:," for found in page.resources), page.resources
    assert "@import" not in text and "url(" not in text and "default-src 'none'" in text
    code = re.search(r"<script>(.*?)</script>", text, re.S)
    assert code and not re.search(r"fetch|XMLHttp|import\(|http", code[1])


def test_the_policy_allows_no_script_but_the_pages_own(report):
    text = render(report)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    (code,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")


def test_landmarks_names_and_unique_ids(page):
    tags = [tag for tag, _ in page.elements]
    assert tags.count("main") == tags.count("h1") == tags.count("nav") == tags.count("header") == tags.count("footer") == 1
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    targets = {found["href"][1:] for tag, found in page.elements if tag == "a"}
    assert targets <= set(ids)
    labelled = [found["aria-labelledby"] for _, found in page.elements if "aria-labelledby" in found]
    assert labelled and set(labelled) <= set(ids)
    assert all(found.get("aria-label") or found.get("aria-hidden") for tag, found in page.elements if tag == "svg")
    assert tags.count("caption") >= 10
    assert ("html", {"lang": "en"}) in page.elements


def test_the_heat_map_is_a_table_of_numbers(page, report):
    for query in report.queries:
        for row in query.grid.values:
            for value in row:
                assert typeset(value) in page.text


def test_a_whole_run(run_folder):
    report = build_report(**gather(run_folder))
    page = Page(render(report))
    for words in (
        "few positions per column",
        "steps",
        "1.25",
        "mmlu_law"[5:],
        "50.0%"[:2],
        "abc123",
        "run: demo  # <all> settings",
    ):
        assert words in page.text, words
    assert "whence run" in page.text and "The base model, before tuning, said" in page.text and "base 3" in page.text
    assert any(found.get("aria-label", "").startswith("Loss in nats") for tag, found in page.elements if tag == "svg")


def test_long_rows_are_cut_and_said_to_be(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.report.html.LIMIT", 400_000)
    texts = [f"{place} " + "<&> long text " * 500 for place in range(240)]
    long = dataclasses.replace(scores, examples=scores.examples.assign(text=texts).drop(columns="pieces"), tokens=None)
    report = build_report(long)
    assert len(render(report).encode()) > 400_000
    text = write_html(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 400_000 and "more characters" in text and len(Page(text).rows) == 100


# contrast: WCAG 2.2, 1.4.3


def luminance(colour: str) -> float:
    colour = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_all_text_can_be_read(report, theme):
    style = re.search(r"<style>(.*?)</style>", render(report), re.S)
    assert style
    blocks = [block for block in re.findall(r"\{([^{}]*)\}", style[1]) if "--paper:" in block]
    light, dark, *_, printed = [dict(re.findall(r"(--[\w-]+): (#\w+)", block)) for block in blocks]
    colours = {"light": light, "dark": light | dark, "print": light | printed}[theme]
    assert dark["--paper"] != light["--paper"] == "#faf9f6"
    for ink, papers in {
        "--ink": [
            "--paper",
            "--card",
            "--faint",
            "--note",
            *(f"--{side}{n}" for side in "ud" for n in (1, 2, 3)),
            "--h4u",
            "--h4d",
        ],
        "--soft": ["--paper", "--card", "--faint"],
        "--up": ["--paper", "--card"],
        "--down": ["--paper", "--card"],
    }.items():
        for paper in papers:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    for line in ("--up-line", "--down-line", "--focus"):
        assert contrast(colours.get(line, light[line]), colours["--paper"]) >= 3, line

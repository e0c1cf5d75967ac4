"""The page of `whence serve` in a real browser: asked, linked, pinned, exported and reviewed, by mouse and by keyboard."""

import contextlib
import gzip
import json
import queue
import re
import sys
import threading
from pathlib import Path
from urllib.parse import quote

import pytest
from chromium import CHROMIUM, needs_chromium

import whence
from serve.conftest import python_of, shown_by, trace_stages
from whence.serve.warm import Warm

sys.path.insert(0, str(Path(__file__).parents[2] / "page"))
import build_page

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytest.importorskip("uvicorn", reason="no server: pip install uvicorn fastapi")

AXE = build_page.PAGE / "node_modules" / "axe-core" / "axe.min.js"

pytestmark = needs_chromium

PEOPLE = [("Ada Velt", "Turin"), ("Bo Quist", "Oslo"), ("Cleo Marsh", "Lyon"), ("Dag Holm", "Ghent"), ("Eva Lund", "Riga")]
HOSTILE = [
    "</script><script>alert('row')</script><img src=x onerror=alert(1)> was born in Oslo.",
    "שלום עולם، مرحبا 世界 こんにちは 🦜 \u202egnikcat",
]
NOTE = "Look at <b>this</b> row."
ASKED, ANSWER = "Where was Ada Velt born?", " In Oslo, they say."
PAGES = {
    "trace": "#prompt",
    "compare": "#choose-a",
    "factors": "svg.map",
    "data": ".verdict",
    "data/all": "figure",
    "runs": ".kinds",
}
"""And what is there once they are drawn."""


@pytest.fixture(scope="module")
def static():
    """The built page, made anew where it is missing or older than its sources."""
    try:
        return build_page.build()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def address(static, tmp_path_factory, tiny_tokenizer_file):
    """Where a tiny model with factors and self-influence is served."""
    from trainings import save_llama

    from whence.serve import Opening, serve

    home = tmp_path_factory.mktemp("home")
    save_llama(home / "model", tiny_tokenizer_file, positions=256)
    rows = [{"text": f"{person} was born in {town}.", "source": town} for person, town in PEOPLE for _ in range(2)]
    rows += [{"text": text, "source": "<b>web</b>"} for text in HOSTILE]
    (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = whence.open(home / "model", data=home / "train.jsonl", out=home / "run", dtype="float32", max_length=200)
    run.fit(examples="all", products="float32")
    run.self_influence(products="float32")
    trace_stages(run, {"prompt": ASKED, "completion": ANSWER})
    opening = Opening(
        str(home / "model"), str(home / "train.jsonl"), str(home / "run"), {"dtype": "float32", "max_length": 200}
    )
    opened = queue.Queue()
    threading.Thread(target=serve, args=(opening, 0), kwargs={"opened": opened.put}, daemon=True).start()
    return opened.get(timeout=60)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(browser, address, but="", **settings):
    """A page of its own, which may complain of nothing `but` this, ask nobody but its server, and run no script of a row."""
    context = browser.new_context(viewport={"width": 1366, "height": 900}, **settings)
    page, said = context.new_page(), []
    origin = address.split("#")[0]
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    page.on("request", lambda each: said.append(each.url) if not each.url.startswith((origin, "blob:", "data:")) else None)
    page.set_default_timeout(20_000)
    page.goto(address)
    yield page
    assert not [each for each in said if not but or but not in each]
    context.close()


def ask(page, answer=ANSWER, waits_for=".rows .opener"):
    """Ask for the rows behind an answer that is pasted."""
    page.get_by_role("button", name="Paste an answer").click()
    page.get_by_label("Answer to explain").fill(answer)
    page.locator("#prompt").fill(ASKED)
    page.get_by_role("button", name="Trace this answer").click()
    page.wait_for_selector(f".answer:has-text('{answer.strip()}')")
    page.wait_for_selector(waits_for)


def shades(page, selector):
    """The colours of the tokens there."""
    classes = page.locator(f"{selector} >> [data-token]").evaluate_all("tokens => tokens.map((token) => token.className)")
    return [" ".join(re.findall(r"\b[ud][123]\b", each)) for each in classes]


PAIR = """async ([key, row]) => {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem("whence-token")}`, "Content-Type": "application/json" };
  return (await fetch("./api/pair", { method: "POST", headers, body: JSON.stringify({ key, row }) })).json();
}"""


def shade(value, scale):
    """The colour that a token's effect has: three steps of a scale, raising or lowering."""
    step = sum(abs(value) >= share * scale for share in (0.05, 0.2, 0.5)) if value else 0
    return f"{'u' if value > 0 else 'd'}{step}" if step else ""


def test_from_a_prompt_to_a_file_that_opens_alone(browser, address, tmp_path):
    with opened(browser, address) as page:
        assert "t=" not in page.url
        page.locator("#prompt").fill(ASKED)
        page.get_by_role("button", name="Generate and trace").click()
        page.wait_for_selector(".rows .opener")
        assert page.locator(".answer [data-token]").count() >= 1

        ask(page)
        first, last = (page.locator(f"#answer-{number}").bounding_box() for number in (1, 3))
        page.mouse.move(first["x"] + 2, first["y"] + 8)
        page.mouse.down()
        page.mouse.move(last["x"] + 2, last["y"] + 8, steps=5)
        page.mouse.up()
        page.wait_for_selector(".chip:has-text('asked about')")
        chosen = page.locator(".answer [aria-selected=true]")
        assert chosen.count() == 3
        page.wait_for_selector(".rows .opener")
        ranks = [int(text) for text in page.locator(".rows .rank").all_inner_texts()]
        assert ranks == list(range(1, len(ranks) + 1)) and "train.jsonl:" in page.locator(".rows .meta").first.inner_text()

        page.locator(".rows .opener").first.click()
        page.wait_for_selector(".detail .readout")
        answer, row = ".detail [role=listbox] >> nth=0", ".detail [role=listbox] >> nth=1"
        before = shades(page, answer)
        links = [token for token, shade in enumerate(shades(page, row)) if shade]
        page.locator(f"{row} >> [data-token='{links[0]}']").hover()
        assert page.locator(f"{row} >> [data-token='{links[0]}']").get_attribute("aria-selected") == "true"
        linked = shades(page, answer)
        page.locator(f"{answer} >> [data-token='0']").hover()
        assert "what each does to this word" in page.locator(".detail .readout").inner_text()
        pair = page.evaluate(PAIR, page.url.split("/")[-2:])
        assert before == [shade(value, max(map(abs, pair["answer_values"]))) for value in pair["answer_values"]]
        assert linked == [shade(values[links[0]], pair["scale"]) for values in pair["values"]]

        page.locator(".rows .pin").first.click()
        page.wait_for_selector(".rows .pin[aria-pressed=true]")
        page.get_by_role("button", name=re.compile("Share 1 pinned")).click()
        page.get_by_label(re.compile("^Note on")).fill(NOTE)
        page.keyboard.press("Tab")
        for name in ("shared", "redacted"):
            with page.expect_download() as download:
                page.get_by_role("button", name="Export HTML").click()
            download.value.save_as(tmp_path / f"{name}.html")
            page.get_by_label("leave out the rows' text").check()

    with opened(browser, (tmp_path / "shared.html").as_uri()) as page:
        page.wait_for_selector(".rows .opener")
        page.locator(".rows .opener").first.click()
        page.wait_for_selector(".detail .readout")
        page.locator(f"{row} >> [data-token='{links[0]}']").hover()
        assert shades(page, answer) == linked
        assert not page.locator(".copies").count() and "whence ask" not in page.content()
        assert page.locator("#prompt").count() == 0 and "Made " in page.locator("main").inner_text()
        assert (
            NOTE in page.locator(".rows .meta").first.inner_text()
            and "pinned" in page.locator(".rows .meta").first.inner_text()
        )
        assert not page.locator("noscript > *").count() and not serious(page)

    with opened(browser, (tmp_path / "shared.html").as_uri(), java_script_enabled=False) as page:
        plain = page.locator("section.query").first
        assert "Where was Ada Velt born?" in plain.inner_text() and " Oslo, they say." in plain.inner_text()
        assert plain.locator(".rows li.row").count() >= len(ranks) and NOTE in plain.locator(".rows li.row").first.inner_text()
        plain.get_by_text("Whole row").first.click()
        assert plain.get_by_text("raw score").first.is_visible()
        assert plain.locator("svg.bar").first.bounding_box()["height"] < 20 and page.locator("#app > *").count() == 0

    assert "was born in" in (tmp_path / "shared.html").read_text(encoding="utf-8")
    with opened(browser, (tmp_path / "redacted.html").as_uri()) as page:
        page.wait_for_selector(".rows .opener")
        page.locator(".rows .opener").first.click()
        assert "left out" in page.locator(".detail").inner_text() and "was born in" not in page.content()


def test_a_filter_ranks_the_rows_that_it_leaves(browser, address):
    with opened(browser, address) as page:
        ask(page)
        every = {text.split("\n")[0] for text in page.locator(".rows .meta").all_inner_texts()}
        page.get_by_role("button", name="Riga", exact=True).click()
        page.wait_for_selector("text=the first of 2 rows")
        shown = page.locator(".rows .meta").all_inner_texts()
        assert shown and all("Riga" in text for text in shown)
        assert [int(text) for text in page.locator(".rows .rank").all_inner_texts()] == list(range(1, len(shown) + 1))
        page.get_by_title("Remove this filter").click()
        page.wait_for_selector("text=the first of 2 rows", state="detached")
        assert {text.split("\n")[0] for text in page.locator(".rows .meta").all_inner_texts()} == every
        for typed, said in (("cleo", "“cleo” ✕"), ("copies>=2", "copies>=2 ✕")):
            page.locator("#find").fill(typed)
            page.keyboard.press("Enter")
            page.get_by_role("button", name=said).wait_for()
        assert all("Cleo" in text for text in page.locator(".rows .snippet").all_inner_texts()) and not serious(page)


def test_a_cell_of_the_map_orders_the_rows(browser, address):
    with opened(browser, address) as page:
        ask(page)
        before = page.locator(".rows .meta .mono").all_inner_texts()
        page.get_by_text("Through which layers").click()
        cells = page.get_by_role("region", name="Layers and modules").get_by_role("button")
        cells.first.wait_for()
        orders = set()
        for number in range(cells.count()):
            cells.nth(number).click()
            page.wait_for_function("at => document.querySelectorAll('td button')[at].ariaPressed === 'true'", arg=number)
            parts = page.locator(".rows .value b").all_inner_texts()
            assert len(parts) == page.locator(".rows .value").count() > 0 and all(part[0] == "+" for part in parts)
            orders.add(tuple(page.locator(".rows .meta .mono").all_inner_texts()))
        assert len(orders) > 1 and not serious(page)
        page.get_by_title("Order by the whole effect again").click()
        page.wait_for_selector(".by", state="detached")
        assert page.locator(".rows .meta .mono").all_inner_texts() == before


def test_everything_by_keyboard(browser, address):
    with opened(browser, address) as page:
        page.wait_for_selector("#prompt")

        def tab_to(selector):
            for _ in range(40):
                page.keyboard.press("Tab")
                if page.locator(f"{selector}:focus").count():
                    return
            raise AssertionError(f"Tab never comes to {selector}")

        tab_to("#prompt")
        page.keyboard.type(ASKED)
        page.wait_for_selector(".ask button.main:not([disabled])")
        page.keyboard.press("Enter")
        page.wait_for_selector(".rows .opener")
        tab_to(".answer")
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Enter")
        page.wait_for_selector(".chip:has-text('asked about')")
        page.wait_for_selector(".rows .opener")
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        page.wait_for_selector(".detail .readout")
        page.keyboard.press("t")
        page.wait_for_selector(".detail [role=listbox]:focus")
        page.keyboard.press("ArrowRight")
        assert re.search("to (each|this) word", page.locator(".detail .readout").inner_text())
        page.keyboard.press("p")
        page.wait_for_selector(".rows .pin[aria-pressed=true]")
        page.keyboard.press("p")
        page.wait_for_selector(".rows .pin[aria-pressed=false]")
        page.keyboard.press("w")
        page.wait_for_selector("textarea[id^=whatif]")
        page.keyboard.press("Escape")
        page.wait_for_selector(".detail", state="detached")
        page.keyboard.press("]")
        page.wait_for_selector("button[aria-pressed=true]:has-text('Lowers')")
        page.keyboard.press("?")
        page.wait_for_selector("dialog[open]")
        page.keyboard.press("Escape")
        page.keyboard.press("g")
        page.keyboard.press("f")
        page.wait_for_selector("h1:has-text('Factors')")


def test_what_is_shown_is_copied_as_a_command_and_as_python(browser, address):
    root = address.split("#")[0]
    with opened(browser, address, permissions=["clipboard-read", "clipboard-write"]) as page:

        def copied(key):
            page.evaluate("() => navigator.clipboard.writeText('')")
            page.keyboard.press(key)
            page.wait_for_function("async () => (await navigator.clipboard.readText()) !== ''")
            return page.evaluate("() => navigator.clipboard.readText()")

        ask(page)
        rows = page.locator(".rows .snippet").all_inner_texts()
        page.locator("#prompt").press("y")
        assert page.locator("#prompt").input_value().count("y") == 1 and not page.get_by_text("✓ Copied").count()
        page.locator("#prompt").press("Escape")
        assert list(python_of(copied("y")).scores.top(0, 20)["text"])[: len(rows)] == rows != []
        assert "✓ Copied" in page.locator(".copies").inner_text()
        assert copied("Y").startswith("whence ask /") and "builds an index first" in page.locator(".copies").inner_text()

        page.goto(f"{root}#/trace/scores:trace-stages@pretraining:0")
        page.wait_for_selector(".stages article.now:has-text('pretraining')")
        texts = page.locator(".rows .snippet").all_inner_texts()
        page.get_by_role("button", name="Copy command").click()
        page.wait_for_selector("text=✓ Copied")
        (query,) = shown_by(page.evaluate("() => navigator.clipboard.readText()"))["queries"]
        assert [row["text"] for row in query["rows"]][: len(texts)] == texts != []
        page.get_by_role("link", name="side by side").click()
        page.wait_for_selector("h2:has-text('two stages of training')")
        assert len(shown_by(copied("Y"))["stages"]) == 2

        page.goto(f"{root}#/factors")
        page.wait_for_selector("svg.map")
        modules = page.locator("tbody th button").all_inner_texts()
        assert [each["module"] for each in shown_by(copied("Y"))["modules"]] == modules
        page.locator("tbody th button").nth(1).click()
        page.wait_for_selector(f"h2:has-text('{modules[1]}')")
        assert shown_by(copied("Y"))["module"] == modules[1] and modules[1] in python_of(copied("y")).printed

        page.goto(f"{root}#/data")
        page.wait_for_selector(".verdict")
        listed = page.locator("ol [data-at] .mono").all_inner_texts()
        told = python_of(copied("y"))
        assert [told.run.all_rows.ids.index(name) + 1 for name in told.names[: len(listed)]] == [
            int(text.split(":")[-1]) for text in listed
        ]
        assert shown_by(copied("Y"))["queries"][0]["id"] == "self"
        page.goto(f"{root}#/data/all")
        page.wait_for_selector("figure")
        assert not page.get_by_role("button", name="Copy command").count()
        page.keyboard.press("Y")
        page.wait_for_selector("text=No command lists rows in this order")


def test_a_text_that_the_browser_does_not_copy_is_shown(browser, address):
    with opened(browser, f"{address}/{quote('trace/scores:trace-stages:0')}") as page:
        page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        page.get_by_role("button", name="Copy command").click()
        assert page.locator(".verdict pre").inner_text().startswith("whence show /")
        assert not page.get_by_text("✓ Copied").count() and not serious(page)


def test_a_decision_survives_a_reload(browser, address):
    with opened(browser, address) as page:
        page.goto(address.split("#")[0] + "#/data")
        row = page.locator("ol [data-at='0']")
        row.wait_for()
        told = row.inner_text().splitlines()[0]
        page.keyboard.press("2")
        page.wait_for_selector("text=1 of ")
        page.reload()
        page.wait_for_selector("text=1 of ")
        page.get_by_label("only undecided").uncheck()
        decided = page.locator("ol button", has_text=told.split()[0]).first
        decided.locator(".chip:has-text('drop')").wait_for()
        page.keyboard.press("u")
        page.wait_for_selector("text=0 of ")


def test_a_question_that_takes_long_becomes_a_job_whose_rows_are_shown(browser, address, monkeypatch):
    monkeypatch.setattr("whence.serve.asking.AT_ONCE", 0)
    with opened(browser, address, but="status of 409") as page:
        ask(page, " In Lyon.", "button:has-text('Score now')")
        page.get_by_role("button", name="Score now").click()
        page.get_by_role("link", name="look at them").click(timeout=90_000)
        page.wait_for_selector(".rows .opener")
        assert page.locator(".answer").inner_text().strip().startswith("In Lyon.") and "trace-" in page.url


def test_a_run_of_several_trainings_offers_to_score_the_rows_of_all(browser, address, monkeypatch):
    facts = Warm._facts

    def staged(self, run):
        known = facts(self, run)
        return known | {"has": known["has"] | {"stages": True}}

    monkeypatch.setattr(Warm, "_facts", staged)
    with opened(browser, address) as page:
        ask(page, " In Riga.")
        page.get_by_role("button", name="Score the rows of all trainings").click()
        page.wait_for_selector("text=are being scored")
        page.get_by_role("link", name="look at them").wait_for(timeout=90_000)
        assert not page.get_by_role("button", name="Score the rows of all trainings").count() and not serious(page)


def test_the_page_opens_on_scores_that_the_address_names(browser, address):
    with opened(browser, f"{address}/{quote('trace/scores:trace-stages:0')}") as page:
        page.wait_for_selector(".rows .opener")
        assert "Oslo" in page.locator(".answer").first.inner_text() and page.url.endswith("#/trace/scores%3Atrace-stages%3A0")


def test_stages_of_training_stand_side_by_side(browser, address):
    with opened(browser, address) as page:
        page.goto(address.split("#")[0] + "#/trace/scores:trace-stages:0")
        stages = page.locator(".stages article")
        stages.first.wait_for()
        shares = [int(re.search(r"(\d+)(?:\.\d)? %", text)[1]) for text in stages.all_inner_texts()]
        assert len(shares) == 2 and 98 <= sum(shares) <= 102
        assert page.locator(".rows .chip", has_text=re.compile("^(pretraining|finetuning)$")).count() >= 2
        page.get_by_role("link", name="pretraining", exact=True).click()
        page.wait_for_selector(".stages article.now:has-text('pretraining')")
        assert {" is from " in text for text in page.locator(".rows .snippet").all_inner_texts()} == {True}
        assert not any("train.jsonl" in text for text in page.locator(".rows .meta").all_inner_texts())
        page.get_by_role("link", name="side by side").click()
        page.wait_for_selector("h2:has-text('two stages of training')")
        assert page.locator(".sides h2").all_inner_texts() == ["pretraining", "finetuning"]
        assert "of the effect" in page.locator(".sides section").first.inner_text()
        assert not serious(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_a_phone_does_not_scroll_sideways(browser, address, scheme):
    with opened(browser, address, color_scheme=scheme, reduced_motion="reduce") as page:
        ask(page)
        page.locator(".rows .opener").first.click()
        page.wait_for_selector(".detail .readout")
        found = {"open row": serious(page)}
        for name, drawn in PAGES.items():
            page.goto(address.split("#")[0] + f"#/{name}")
            page.wait_for_selector(drawn)
            found[name] = serious(page)
            page.set_viewport_size({"width": 390, "height": 844})
            width = page.evaluate("() => document.documentElement.scrollWidth")
            assert width <= 390, (name, width)
            page.set_viewport_size({"width": 1366, "height": 900})
        assert not any(found.values()), found


def serious(page):
    """What axe finds serious or critical, with where it is."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    result = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    grave = [each for each in result["violations"] if each["impact"] in ("serious", "critical")]
    return [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in grave]


def test_the_types_of_the_page_are_checked(static):
    wrong = build_page.PAGE / "src" / "wrong_type_of_a_test.ts"
    try:
        wrong.write_text("export const count: number = 'three';\n")
        with pytest.raises(RuntimeError, match="not assignable") as said:
            build_page.check()
    finally:
        wrong.unlink()
    assert "found 1 error and 0 warnings in 1 file" in str(said.value)  # and none in the page


def test_the_bundle_is_small_and_names_no_other_machine(static):
    files = [file for file in static.rglob("*") if file.is_file() and file.name != "export.html"]
    assert sum(len(gzip.compress(file.read_bytes())) for file in files) < 250_000
    addresses = {
        each
        for file in files
        for each in re.findall(rb"(?:src|href|url|import)\W{1,3}(https?://[^\s\"'`)]+)", file.read_bytes())
    }
    assert not addresses
    export = (static / "export.html").read_text(encoding="utf-8")
    assert export.count('<script type="application/json" id="whence-data">null</script>') == 1 and "unsafe" not in export[:2000]

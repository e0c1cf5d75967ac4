"""The documentation: its examples print what the pages say, its tables are complete, its pages link only to what is there.

A fenced python block after `<!-- run -->` is run, the blocks of one page one after the other, and must print the block that
follows.
"""

import contextlib
import importlib.util
import io
import json
import re
import tempfile
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from whence import errors
from whence.config import Config, json_schema
from whence.config.schema import Training
from whence.settings import Section, in_file

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

EXAMPLE = re.compile(r"<!-- run -->\n```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)

PAGES = sorted(page for page in DOCS.glob("*.md") if "<!-- run -->" in page.read_text(encoding="utf-8"))

WITHOUT = "needs mkdocs-material and latex2mathml: pip install '.[docs]'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_print_what_the_page_says(page):
    text = page.read_text(encoding="utf-8")
    examples = EXAMPLE.findall(text)
    assert len(examples) == text.count("<!-- run -->"), "every example that is run is followed by its output"
    names: dict[str, object] = {"__name__": page.stem}
    for number, (code, expected) in enumerate(examples):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}, example {number}", "exec"), names)
        assert printed.getvalue() == expected, f"{page.name}, example {number}"


def test_there_are_examples():
    assert {page.stem for page in PAGES} >= {"formula", "kfac", "damping", "developers"}


# errors


def codes_of_errors() -> dict[int, str]:
    """Codes that a class of the tree has by itself."""
    classes = [found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, errors.WhenceError)]
    return {found.code: found.__name__ for found in classes if found.code is not None}


def codes_raised() -> set[int]:
    """Codes that anything in the package says."""
    sources = [source.read_text(encoding="utf-8") for source in (ROOT / "whence").rglob("*.py")]
    said = {int(code) for text in sources for code in re.findall(r"WHENCE-(\d\d)\b", text)}
    given = {int(code) for text in sources for code in re.findall(r"\bcode ?= ?(\d+)\b", text)}
    return said | given


def test_the_catalogue_has_every_code_that_is_raised_and_no_other():
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    listed = {int(code): rest for code, rest in re.findall(r"^\*\*WHENCE-(\d\d)\*\* (.*)$", page, re.MULTILINE)}
    assert set(listed) == codes_raised()
    for code, name in codes_of_errors().items():
        exit_code = getattr(errors, name).exit_code
        assert f"`{name}`" in listed[code] and f"exit code {exit_code}" in listed[code], f"WHENCE-{code:02d}"


def test_links_to_messages_lead_to_messages():
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    for other in DOCS.glob("*.md"):
        for code in re.findall(r"\[WHENCE-(\d\d)\]", other.read_text(encoding="utf-8")):
            assert f"**WHENCE-{code}**" in page, f"{other.name} speaks of WHENCE-{code}"


def test_every_metric_of_training_is_explained():
    from whence.train.metrics import MEANING

    page = (DOCS / "fine-tuning.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(any(f"`{name}`" in line.split("|")[1] for line in table) for name in MEANING)


# settings


@pytest.fixture(scope="module")
def hooks():
    """What docs/hooks.py does when the site is built."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(section: type[Section], prefix: str = "") -> dict[str, str]:
    """All settings by their dotted names, with what they mean."""
    found = {}
    for name, field in in_file(section).items():
        found[prefix + name] = field.description or ""
        if field.section:
            found |= settings_of(field.section, f"{prefix}{name}.")
    return found


def test_every_setting_is_in_the_tables(hooks):
    tables = hooks.settings(json_schema())
    sections = dict(re.findall(r"^### (?:`([\w.]+)`|Top level)\n(.*?)(?=^### |\Z)", tables, re.DOTALL | re.MULTILINE))
    wanted = settings_of(Config)
    assert len(wanted) > 100
    for name, meaning in wanted.items():
        section, _, setting = name.rpartition(".")
        (row,) = re.findall(rf"^\| `{setting}` \|.*$", sections[section], re.MULTILINE)
        assert " ".join(meaning.split()).replace("|", "\\|") in row, name
    entries = in_file(Training)  # those of one of the trainings that `stages` lists
    assert all(f"| `{name}` |" in tables.rpartition("### `stages")[2] for name in entries)
    assert tables.count("\n| `") == len(wanted) + len(entries) + 1  # and its name


@pytest.mark.parametrize(
    ("section", "row"),
    [
        ("score", "| `damping` | number ≥ 0 | `0.1` | Damping, in units of each module's mean eigenvalue. |"),
        ("model", "| `base` | text | *required* |"),
        ("fit", "| `method` | `ekfac`, `kfac`, `shampoo`, `diagonal`, `identity` | `ekfac` |"),
        ("fit", "| `examples` | whole number ≥ 1, `all`, null | - |"),
        ("train", "| `bf16` | true, false, `auto` | `auto` |"),
        ("score", "| `export` | list of `npz`, `parquet`, `csv`, `jsonl` | `npz`, `parquet` |"),
        ("train.lora", "| `r` | whole number ≥ 1 | `8` |"),
    ],
)
def test_the_tables_say_what_may_be_written(hooks, section, row):
    tables = hooks.settings(json_schema())
    (_, _, rest) = tables.partition(f"### `{section}`\n")
    assert row in rest.partition("\n### ")[0]


def test_formulas_become_mathml(hooks):
    pytest.importorskip("latex2mathml", reason=WITHOUT)
    block = r'<div class="arithmatex">\[a &lt; b\]</div>'
    inline = r'<span class="arithmatex">\(\mathbb E x^2\)</span>'
    found = hooks.on_page_content(f"{block} {inline}", *[None] * 3)
    assert found.startswith('<div class="math-block"><math') and 'display="block"' in found and 'display="inline"' in found
    assert "arithmatex" not in found and "&amp;lt;" not in found
    assert "<mi>\N{MATHEMATICAL DOUBLE-STRUCK CAPITAL E}</mi>" in found


# the site


class Page(HTMLParser):
    """Links, resources and anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.anchors: set[str] = set()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif "href" in found and found.get("rel") not in ("canonical", "next", "prev"):
            self.resources.append(found["href"])
        self.resources += [found[name] for name in ("src", "srcset", "poster", "data") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `mkdocs build --strict` makes it, from a copy: the build leaves nothing in the repository."""
    pytest.importorskip("material", reason=WITHOUT)
    pytest.importorskip("latex2mathml", reason=WITHOUT)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        build(config)
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_the_site_has_every_page(pages, site):
    built = {path.relative_to(site).with_suffix(".md").as_posix() for path in pages}
    assert built >= {page.name for page in DOCS.glob("*.md")} | {"changelog.md", "benchmarks/results/small.md"}
    assert not list(site.rglob("*.py"))


def test_the_tutorial_shows_what_its_cells_said(pages, site):
    page = (site / "tutorial.html").read_text(encoding="utf-8")
    document = json.loads((site / "tutorial.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    results = [out for cell in code for out in cell["outputs"] if out["output_type"] == "execute_result"]
    assert len(code) >= 10 and [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum("text/html" in out["data"] for out in results) >= 7
    assert all(len(line) < 400 for out in results for line in out["data"]["text/plain"].splitlines())
    for said in ("raises +", "lowers -", "self-retrieval", "Curvature", "rank 1 of 485", "answers.html"):
        assert said in page, said
    assert page.count("cell-output") >= 8 and "iframe" not in pages[site / "tutorial.html"].tags


def test_the_gallery_is_a_page_with_its_questions(site):
    page = (site / "gallery.html").read_text(encoding="utf-8")
    assert page.count('<section class="query"') == 3 and page.count('<li class="row"') >= 6
    assert "runs/demo" in page or "whence-data" not in page
    assert tempfile.gettempdir() not in page


def test_links_within_the_site_resolve(pages, site):
    seen = 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute, from the root of a server
            continue
        for link in [*page.links, *page.resources]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file() and target.is_relative_to(site), f"{path.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"
            seen += 1
    assert seen > 300


def test_readers_fetch_nothing_from_elsewhere(pages, site):
    for path, page in pages.items():
        away = [link for link in page.resources if urlsplit(link).netloc]
        assert not away, f"{path.name} would fetch {away}"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        found = [*re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']*)", text), *re.findall(r"@import[^;]*//[^;]*", text)]
        assert not found, f"{style.name} would fetch {found}"


def test_formulas_and_settings_are_drawn(site, pages):
    formula = (site / "formula.html").read_text(encoding="utf-8")
    assert pages[site / "formula.html"].tags.count("math") > 40
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert "arithmatex" not in text and "<merror" not in text, path.name
        assert not re.search(r"<m(i|o|text)>\\[a-zA-Z]", text), f"{path.name} has a command of TeX that is not known"
    assert "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", formula)
    assert "evaluation_limit" in (site / "pipeline.html").read_text(encoding="utf-8")

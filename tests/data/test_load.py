import gzip
import json
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from benchmarks.flips import flip
from whence.data import Rows, as_rows, load_data
from whence.data.load import count_rows, places
from whence.errors import ColumnError, StaleArtifact, UsageError
from whence.generation import save_pairs
from whence.store.manifest import Folder

RECORDS = [{"prompt": "Was ist das?", "completion": " Ein Käse – 戦🙂"}, {"prompt": "b", "completion": ' "c", d'}]


def as_jsonl(path):
    path.write_text("\n".join(json.dumps(row) for row in RECORDS) + "\n\n", encoding="utf-8")


def as_gzipped_jsonl(path):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in RECORDS))


def as_json(path):
    path.write_text(json.dumps(RECORDS), encoding="utf-8")


def as_json_with_data(path):
    path.write_text(json.dumps({"version": 1, "data": RECORDS}), encoding="utf-8")


def as_csv(path):
    import pandas as pd

    pd.DataFrame(RECORDS).to_csv(path, index=False)


def as_tsv(path):
    lines = ["prompt\tcompletion", *(f"{row['prompt']}\t{row['completion']}" for row in RECORDS)]
    path.write_text("\n".join(lines), encoding="utf-8")


def as_parquet(path):
    import pandas as pd

    pd.DataFrame(RECORDS).to_parquet(path)


def as_saved_dataset(path):
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(path)


WRITERS = {
    "a.jsonl": as_jsonl,
    "a.ndjson": as_jsonl,
    "b.jsonl.gz": as_gzipped_jsonl,
    "a.json": as_json,
    "b.json": as_json_with_data,
    "c.json": as_jsonl,
    "a.csv": as_csv,
    "a.csv.gz": as_csv,
    "a.tsv": as_tsv,
    "a.parquet": as_parquet,
    "folder": as_saved_dataset,
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_hold_the_same_rows(name, tmp_path, capsys):
    WRITERS[name](tmp_path / name)
    rows = load_data(tmp_path / name)
    assert rows.rows == tuple(RECORDS)
    assert rows.ids == as_rows(RECORDS).ids
    assert rows.origin == str(tmp_path / name)
    assert load_data(str(tmp_path / name), limit=1).rows == tuple(RECORDS[:1])
    assert count_rows(tmp_path / name) == len(RECORDS)
    assert capsys.readouterr().out == ""


def test_arrow_file(tmp_path):
    as_saved_dataset(tmp_path / "folder")
    (file,) = (tmp_path / "folder").glob("*.arrow")
    assert load_data(file).rows == tuple(RECORDS)


def test_strings_in_json(tmp_path):
    (tmp_path / "a.json").write_text('["a", "b"]')
    assert load_data(tmp_path / "a.json").rows == ({"text": "a"}, {"text": "b"})


def test_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("\n \nOne line.\nAnother.\n\n  \n  Indented.\n")
    assert [row["text"] for row in load_data(tmp_path / "a.txt")] == ["One line.\nAnother.", "  Indented."]


def test_csv_values_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("number,word,n\n007,NA,\n")
    rows = load_data(tmp_path / "a.csv", columns={"prompt": "number", "completion": "word", "source": "n"})
    assert rows[0] == {"prompt": "007", "completion": "NA", "source": ""}


def test_csv_from_a_spreadsheet_has_a_mark_at_its_start(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n", encoding="utf-8-sig")
    assert load_data(tmp_path / "a.csv").rows == ({"text": "hello"},)


def test_table_without_a_header_line(tmp_path):
    (tmp_path / "a.tsv").write_text('x1\t1\t"quoted at the start\nx2\t0\tplain\n')
    rows = load_data(tmp_path / "a.tsv", columns={"text": "2", "label": "1", "id": "0"})
    assert rows.rows == ({"text": '"quoted at the start', "label": "1"}, {"text": "plain", "label": "0"})
    assert rows.ids == ("x1", "x2")


def test_splits_of_a_saved_dataset(tmp_path):
    import datasets

    parts = {"train": RECORDS[:1], "validation": RECORDS[1:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "d")
    assert load_data(tmp_path / "d").rows == tuple(RECORDS[:1])
    assert load_data(tmp_path / "d", split="validation").rows == tuple(RECORDS[1:])
    with pytest.raises(UsageError, match="no split 'test'") as raised:
        load_data(tmp_path / "d", split="test")
    assert raised.value.accepted == "train, validation"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.csv", "text\n", "no rows in"),
        ("a.jsonl", "\n\n", "no rows in"),
        ("a.json", "[]", "no rows in"),
        ("a.txt", "\n \n", "no rows in"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2"),
        ("a.jsonl", "3\n", "an object or a string, not 3"),
        ("a.json", '{"text": "a"}', "holds no list of rows"),
        ("a.json", "3", "holds no list of rows"),
        ("a.json", "[1", "can't be read as json"),
        ("a.csv", 'text,b\n"a\n', "can't be read as csv"),
        ("a.csv.gz", "text\na", "can't be read as csv"),
        ("a.parquet", "no table", "can't be read as parquet"),
        ("a.xlsx", "x", "not clear how to read"),
        ("noending", "x", "not clear how to read"),
    ],
)
def test_files_that_hold_no_rows(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_data(tmp_path / name)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read as txt"):
        load_data(tmp_path / "a.txt")


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text('"a"')
    with pytest.raises(UsageError, match="no data at") as raised:
        load_data(tmp_path / "trian.jsonl")
    assert raised.value.fix.endswith("train.jsonl?")


def test_missing_file_of_a_bare_name_does_not_ask_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UsageError, match=r"no data at nowhere\.jsonl"):
        load_data("nowhere.jsonl")


def test_folder_without_data(tmp_path):
    (tmp_path / "model.bin").write_text("a")
    with pytest.raises(UsageError, match="There is no data in") as raised:
        load_data(tmp_path)
    assert "model.bin" in raised.value.given


def test_hub_names(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return iter(RECORDS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_data("owner/name:config", split="test", limit=1).rows == tuple(RECORDS[:1])
    assert load_data("name").rows == tuple(RECORDS)
    assert asked == [("owner/name", "config", "test", True), ("name", None, "train", False)]


def test_the_hub_says_how_many_rows_there_are_without_a_download(monkeypatch):
    splits = {"train": SimpleNamespace(num_examples=2_119_719)}
    made = SimpleNamespace(info=SimpleNamespace(splits=splits))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda name, config: made)
    assert count_rows("owner/name") == 2_119_719 and count_rows("owner/name", split="test") is None


def test_hub_failures_are_explained(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no network\ndetails")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UsageError, match="no file 'owner/name' here") as raised:
        load_data("owner/name")
    assert raised.value.given == "ConnectionError: no network"


def test_as_rows(tmp_path):
    import datasets

    rows = as_rows(RECORDS)
    assert isinstance(rows, Rows)
    assert as_rows(rows) is rows
    assert as_rows(datasets.Dataset.from_list(RECORDS)).fingerprint == rows.fingerprint
    as_jsonl(tmp_path / "a.jsonl")
    assert as_rows(tmp_path / "a.jsonl").fingerprint == as_rows(str(tmp_path / "a.jsonl")).fingerprint == rows.fingerprint
    assert as_rows(["a"]).rows == ({"text": "a"},)
    with pytest.raises(UsageError, match="read from a int"):
        as_rows(3)
    with pytest.raises(UsageError, match="not text data"):
        as_rows([3])


@pytest.mark.parametrize("ends", [("", ","), (",", ""), (",", ","), ("", ",,"), (",", ", ")])
@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_separator_at_the_end_of_a_line_shifts_no_column(ends, name, separator, tmp_path):
    header, row = (end.replace(",", separator) for end in ends)
    text = f"prompt{separator}completion{header}\nq1{separator}a1{row}\nq2{separator}a2{row}\n"
    (tmp_path / name).write_text(text)
    assert [(each["prompt"], each["completion"]) for each in load_data(tmp_path / name)] == [("q1", "a1"), ("q2", "a2")]


@pytest.mark.parametrize("first", ["q1,a1\n", ""])
def test_a_text_with_separators_but_no_quotes_is_refused_by_its_line(first, tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{first}Where, exactly?,In Turin.\n")
    with pytest.raises(UsageError, match=f"Line {3 if first else 2} of .*a.csv has 3 cells, more than the header line"):
        load_data(tmp_path / "a.csv")


def test_a_line_that_ends_early_has_no_value_there(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nq1,a1\nq2\n")
    assert load_data(tmp_path / "a.csv").rows == ({"prompt": "q1", "completion": "a1"}, {"prompt": "q2"})


def test_cells_as_long_as_documents(tmp_path):
    (tmp_path / "a.csv").write_text(f"text,n\n{'word ' * 40_000},1\n")
    assert len(load_data(tmp_path / "a.csv")[0]["text"]) == 200_000


def test_blanks_in_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("Prompt , completion\nq, a\n")
    assert load_data(tmp_path / "a.csv").rows == ({"prompt": "q", "completion": " a"},)


def test_columns_of_one_name_are_told_apart(tmp_path, notes):
    (tmp_path / "a.csv").write_text("text,text,text\na,b,c\n")
    assert load_data(tmp_path / "a.csv", columns={"text": "text+text.1+text.2"})[0]["text"] == "a\nb\nc"
    assert any("several columns 'text'" in note for note in notes)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_noticed(separator, tmp_path, notes):
    (tmp_path / "a.csv").write_text(f"prompt{separator}completion\nWhere, exactly?{separator}In Turin.\n")
    assert load_data(tmp_path / "a.csv").rows == ({"prompt": "Where, exactly?", "completion": "In Turin."},)
    assert any(repr(separator) in note for note in notes)


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", '"prompt";"completion"\n"a;b, c";"d"\n'), ("a.tsv", 'prompt,completion\n"a;b, c",d\n')]
)
def test_other_separators_with_quotes(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert load_data(tmp_path / name).rows == ({"prompt": "a;b, c", "completion": "d"},)


def test_a_zero_does_not_make_utf_16(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    assert load_data(tmp_path / "a.txt").rows == ({"text": "a\0b"},)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_table_without_header_line_shows_its_columns_by_number(name, tmp_path):
    (tmp_path / name).write_text("A stirring film about nothing\t1\nDull\t0\n".replace("\t", "\t" if name == "a.tsv" else ","))
    with pytest.raises(ColumnError, match="seems to begin with a row") as raised:
        load_data(tmp_path / name)
    assert "--columns text=0" in raised.value.fix
    assert len(load_data(tmp_path / name, columns={"text": "0", "label": "1"})) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz"])
def test_encodings_that_a_file_says(encoding, name, tmp_path):
    content = {"jsonl": '{"text": "Käse in Turin"}\n', "csv": "text\nKäse in Turin\n", "txt": "Käse in Turin\n"}[
        name.split(".")[1]
    ]
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", encoding=encoding) as file:
        file.write(content)
    assert load_data(tmp_path / name).rows == ({"text": "Käse in Turin"},)


def test_an_encoding_is_guessed_without_the_package_that_tells(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    (tmp_path / "a.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8") as raised:
        load_data(tmp_path / "a.csv")
    assert "iconv -f CP1252" in raised.value.fix or "iconv -f WINDOWS-1252" in raised.value.fix


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp1251"])
def test_other_encodings_are_named(encoding, tmp_path):
    text = "Всё о сыре и вине" if encoding == "cp1251" else "Ein Käse für Übermütige, schön größer"
    (tmp_path / "a.csv").write_bytes(f"text\n{text}\n".encode(encoding))
    with pytest.raises(UsageError, match="it is not UTF-8") as raised:
        load_data(tmp_path / "a.csv")
    name = raised.value.fix.split()[5]
    assert text.encode(encoding).decode(name) == text
    assert str(tmp_path / "a.csv") in raised.value.fix


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("layout", ["list", "one after the other"])
def test_json_over_several_lines(name, layout, tmp_path):
    written = json.dumps(RECORDS, indent=2) if layout == "list" else "\n".join(json.dumps(row, indent=2) for row in RECORDS)
    (tmp_path / name).write_text(written)
    assert load_data(tmp_path / name).rows == tuple(RECORDS)
    assert load_data(tmp_path / name, limit=1).rows == tuple(RECORDS[:1])


def test_json_lists_by_column(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({key: [row[key] for row in RECORDS] for key in RECORDS[0]}))
    assert load_data(tmp_path / "a.json").rows == tuple(RECORDS)
    by_number = {key: {str(number): row[key] for number, row in enumerate(RECORDS)} for key in RECORDS[0]}
    (tmp_path / "b.json").write_text(json.dumps(by_number))
    assert load_data(tmp_path / "b.json").rows == tuple(RECORDS)


def test_a_folder_of_shards_is_read_as_a_whole(tmp_path, notes):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in (10, 9, 1):
        (folder / f"part-{number}.jsonl").write_text(json.dumps({"text": f"text {number}"}))
    (folder / "README.md").write_text("About the data.")
    wanted = [f"text {number}" for number in (1, 9, 10)]
    assert [row["text"] for row in load_data(folder)] == wanted
    assert [row["text"] for row in load_data(folder / "part-*.jsonl")] == wanted
    assert [row["text"] for row in load_data(f"{tmp_path}/**/*.jsonl", limit=2)] == wanted[:2]
    assert any("3 files, part-1.jsonl to part-10.jsonl, 3 rows" in note for note in notes)


def test_a_folder_of_splits_gives_one_of_them(tmp_path, notes):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert [row["text"] for row in load_data(tmp_path)] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert [row["text"] for row in load_data(tmp_path, split="valid")] == ["validation-00000-of-00001"]
    assert any("not read: validation-00000-of-00001.jsonl" in note for note in notes)
    with pytest.raises(UsageError, match="no split 'test'"):
        load_data(tmp_path, split="test")


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('"a"')
    (tmp_path / "b.csv").write_text("text\nb")
    with pytest.raises(UsageError, match="of several kinds") as raised:
        load_data(tmp_path)
    assert "*.jsonl" in raised.value.fix


def test_a_row_of_shards_is_named_by_its_file(tmp_path):
    (tmp_path / "a-1.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (tmp_path / "a-2.jsonl").write_text('{"text": "c"}\n{"text": 3}')
    with pytest.raises(UsageError, match=r"Row 2 of .*a-2\.jsonl has no text"):
        load_data(tmp_path, columns={"text": "text"})


def test_one_of_several_shards_is_never_suggested(tmp_path):
    for number in range(2):
        (tmp_path / f"train-0000{number}.jsonl").write_text('"a"')
    with pytest.raises(UsageError, match="no data at") as raised:
        load_data(tmp_path / "train.jsonl")
    assert raised.value.fix == f"did you mean '{tmp_path}/train-*.jsonl'?"
    with pytest.raises(UsageError, match="no files"):
        load_data(tmp_path / "valid-*.jsonl")


@pytest.mark.parametrize("text", ["half \ud83d of it", "\udc00"])
def test_half_a_character_names_its_row(text, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in [{"text": "a"}, {"text": text}]))
    with pytest.raises(UsageError, match=r"Row 2 of .*a\.jsonl holds half a character"):
        load_data(tmp_path / "a.jsonl")
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UsageError, match="Row 1 of .* holds half a character"):
        as_rows([{"messages": talk}])


REAL = {
    "tinystories/train_first1000.json": (None, 1000, "text"),
    "tinystories/train_2316.jsonl": ({"text": "text", "id": "id"}, 2316, "text"),
    "tinystories/validation_head.txt": (None, None, "text"),
    "wikitext2/wiki.valid.tokens": (None, None, "text"),
    "wikitext2/wikitext_1000.json": (None, 1000, "text"),
    "tinyshakespeare/input.txt": (None, None, "text"),
    "webtext/c4_demo.jsonl": (None, 300, "text"),
    "instruct/alpaca_en_demo.json": (None, 999, "completion"),
    "instruct/identity.json": (None, 91, "completion"),
    "instruct/dolly_sample.jsonl": (None, 151, "completion"),
    "instruct/gsm8k_sample.jsonl": (None, 1319, "completion"),
    "kronfluence_owt/data.json": (None, 10, "completion"),
    "us_patent_phrase/train.csv": (
        {"prompt": "anchor", "completion": "target", "source": "context", "id": "id"},
        36473,
        "source",
    ),
    "textcls/ag_news/test.csv": ({"text": "1+2", "label": "0"}, 7600, "label"),
    "textcls/sst2/train.tsv": ({"text": "0", "label": "1"}, 6920, "label"),
    "textcls/cola/train.tsv": ({"text": "3", "label": "1", "source": "0"}, 7250, "label"),
    "textcls/rte/train.tsv": ({"text": "sentence1+sentence2", "label": "label"}, 2490, "label"),
    "facts/counterfact-edit.json": ({"prompt": "prompt", "completion": "ground_truth"}, 10000, "prompt"),
    "facts/ioi.json": (None, 841, "completion"),
    "mmlu/dev/professional_law_dev.csv": ({"prompt": "0+1+2+3+4", "completion": "5"}, 5, "completion"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(name, shared_data):
    columns, count, field = REAL[name]
    rows = load_data(shared_data / name, columns=columns)
    assert len(rows) == (count or len(rows))
    assert len(rows) > 4
    assert all(row[field] for row in rows[:50])
    assert len(set(rows.ids)) == len(rows)


def test_real_data_with_unknown_columns(shared_data):
    with pytest.raises(ColumnError, match="--columns text=target"):
        load_data(shared_data / "us_patent_phrase" / "train.csv")


# hostile files


def packed(text, cut=0, damage=None):
    content = bytearray(gzip.compress(text.encode()))
    if damage is not None:
        content[damage] ^= 1
    return bytes(content[: len(content) - cut])


ROWS = "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(200))
TABLE = "text\n" + "".join(f"row {number}\n" for number in range(200))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz", "a.txt.gz"])
@pytest.mark.parametrize("cut", [1, 4, 8, 20, 100])
def test_a_cut_gz_is_refused_by_name(tmp_path, name, cut):
    (tmp_path / name).write_bytes(packed(ROWS if "json" in name else TABLE, cut))
    with pytest.raises(UsageError, match=rf"{name} can't be read as \w+ \(gz\)"):
        load_data(tmp_path / name)


@pytest.mark.parametrize("place", [0, 2, 30, -6, -2])
def test_a_damaged_gz_is_refused_by_name(tmp_path, place):
    (tmp_path / "a.jsonl.gz").write_bytes(packed(ROWS, damage=place))
    with pytest.raises(UsageError, match="a.jsonl.gz can't be read"):
        load_data(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("depth", [990, 2000, 10**5])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_json_that_is_nested_deeply_is_refused_by_name(tmp_path, name, depth):
    text = f'[{{"text": "a", "more": {"[" * depth}{"]" * depth}}}]'
    text = text[1:-1] if name == "a.jsonl" else text
    (tmp_path / name).write_bytes(packed(text) if name.endswith("gz") else text.encode())
    with pytest.raises(UsageError, match=name):
        load_data(tmp_path / name)


def test_a_damaged_table_is_refused_by_name(tmp_path):
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(50)]})
    frame.to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for place in (0, 30, len(content) // 2, len(content) - 6, len(content) - 30):
        (tmp_path / "a.parquet").write_bytes(content[:place] + b"\xff" * 4 + content[place + 4 :])
        try:
            load_data(tmp_path / "a.parquet")
        except UsageError as error:
            assert "a.parquet" in str(error)
    (tmp_path / "a.arrow").write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f" * 9)
    with pytest.raises(UsageError, match="a.arrow can't be read"):
        load_data(tmp_path / "a.arrow")


def test_links_that_turn_in_circles_are_refused(tmp_path):
    for name in ("a.jsonl", "folder"):
        (tmp_path / name).symlink_to(name)
        with pytest.raises(UsageError, match="is a dangling or circular link"):
            load_data(tmp_path / name)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "round").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="real"):
        load_data(tmp_path / "real")
    as_jsonl(tmp_path / "real" / "rows.jsonl")
    (tmp_path / "real" / "other.jsonl").symlink_to("other.jsonl")
    assert len(load_data(tmp_path / "real")) == 2


@pytest.mark.parametrize("cut", [0, 4, 30])
def test_a_cut_gz_that_is_no_utf8_either_is_refused_by_name(tmp_path, cut):
    content = gzip.compress(("text\n" + "é\n" * 9999).encode("latin-1"))
    (tmp_path / "a.txt.gz").write_bytes(content[: len(content) - cut])
    with pytest.raises(UsageError, match="a.txt.gz can't be read"):
        load_data(tmp_path / "a.txt.gz")


def test_a_folder_of_a_data_set_that_is_damaged_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "set"))
    for file in sorted((tmp_path / "set").iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(UsageError, match="set"):
            load_data(tmp_path / "set")
        file.write_bytes(content)


def test_generated_pairs_with_a_flipped_bit_are_no_data(tmp_path):
    save_pairs(tmp_path / "pairs.json", {"data": [{"prompt": "a", "completion": " bit"}]})
    text = (tmp_path / "pairs.json").read_text()
    (tmp_path / "pairs.json").write_text(text.replace(" bit", " bat"))
    with pytest.raises(StaleArtifact, match="pairs.json is damaged"):
        load_data(tmp_path / "pairs.json")


def test_rows_of_a_training_with_a_flipped_bit_are_no_data(tmp_path):
    with Folder.claim(tmp_path / "train", {"stage": "train"}) as folder:
        as_jsonl(folder.path / "rows.jsonl")
        folder.finish()
    assert len(load_data(tmp_path / "train" / "rows.jsonl")) == 2
    flip(tmp_path / "train" / "rows.jsonl", 130)
    with pytest.raises(StaleArtifact, match="rows.jsonl is damaged"):
        load_data(tmp_path / "train" / "rows.jsonl")


@pytest.mark.parametrize("column", ["messages", "tools"])
def test_json_within_a_row_that_is_nested_deeply_is_refused_with_its_row(tmp_path, column):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]} | {column: "[" * 10**5}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match="Row 1"):
        load_data(tmp_path / "a.jsonl")


def test_rows_are_found_again_in_their_files(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (folder / "b.jsonl").write_text('\n{"text": "three"}')
    assert [(file.name, line) for file, line in places(folder)] == [("a.jsonl", 1), ("a.jsonl", 3), ("b.jsonl", 2)]
    assert places(f"{folder}/*.jsonl") == places(folder)
    (tmp_path / "rows.csv").write_text('text\n"over\ntwo lines"\nnext\n')
    (tmp_path / "rows.txt").write_text("\none\nparagraph\n\nanother\n")
    for name, lines in {"rows.csv": [2, 4], "rows.txt": [2, 5]}.items():
        assert [line for _, line in places(tmp_path / name)] == lines
        assert len(load_data(tmp_path / name)) == 2
    (tmp_path / "rows.json").write_text('[{"text": "one"}]')
    assert places(tmp_path / "rows.json") == []

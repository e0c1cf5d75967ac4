import gzip
import json

import pytest

from whence.data import Rows, as_rows, load_data
from whence.errors import ColumnError, UsageError

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


def test_folder_without_a_dataset(tmp_path):
    (tmp_path / "shard.txt").write_text("a")
    with pytest.raises(UsageError, match="no folder of Dataset.save_to_disk") as raised:
        load_data(tmp_path)
    assert "shard.txt" in raised.value.given


def test_hub_names(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return iter(RECORDS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_data("owner/name:config", split="test", limit=1).rows == tuple(RECORDS[:1])
    assert load_data("name").rows == tuple(RECORDS)
    assert asked == [("owner/name", "config", "test", True), ("name", None, "train", False)]


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
    with pytest.raises(UsageError, match="no text data"):
        as_rows(3)


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

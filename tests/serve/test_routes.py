"""Each route on a warm run: what comes out is what the library computes, and what was asked is remembered."""

import json

import numpy as np
import pytest

import whence
from serve.conftest import ROWS, SCRIPT
from whence.serve.export import PLACE

PROMPT, ANSWER = "Where was Ada Velt born?", " In Oslo."


@pytest.fixture(scope="module")
def asked(client):
    return client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "top": 4, "method": "exact"})


def test_the_run(client, opening):
    run = client("GET", "/api/run")
    assert run["model"]["kind"] == "LlamaForCausalLM" and run["data"]["rows"] == 9
    assert run["has"] == {**run["has"], "model": True, "factors": True, "index": True, "self": False}
    assert {"auto", "exact", "dot", "bm25"} <= {method["name"] for method in run["methods"]}
    assert run["factors"]["modules"] == 6 and "Ghent" in run["data"]["sources"]


def test_an_answer_has_tokens_with_probabilities(client):
    said = client("POST", "/api/complete", {"prompt": PROMPT, "completion": ANSWER})
    assert "".join(token["text"] for token in said["tokens"]) == ANSWER + "</s>" and said["rendered"] == PROMPT + ANSWER
    assert said["logprob"] == pytest.approx(sum(token["logprob"] for token in said["tokens"]))
    for token in said["tokens"][:-1]:
        assert ANSWER[token["start"] : token["end"]] == token["text"] and token["p"] == pytest.approx(np.exp(token["logprob"]))
        assert token["top"][0]["p"] >= token["p"] - 1e-9
    generated = client("POST", "/api/complete", {"prompt": PROMPT, "max_new_tokens": 3})
    assert generated["source"].startswith("generated greedily") and generated["completion"]


def test_the_rows_are_those_of_the_library(client, opening, asked):
    run = whence.open(opening.model, data=opening.data, factors=f"{opening.out}/factors", **opening.settings)
    query = {"prompt": PROMPT, "completion": ANSWER}
    scores = run.score([query], per="token")
    shown = asked["query"]["raises"] + asked["query"]["lowers"]
    assert shown and asked["scan"]["how"] == "all" and asked["unit"] == "nats per copy"
    for row in shown:
        assert row["value"] == pytest.approx(scores.values[0, scores.column_of(row["id"])], rel=1e-3, abs=1e-9)
        assert sum(row["token_values"]) == pytest.approx(row["value"], rel=1e-3, abs=1e-8)
        assert row["word"] in ("strong", "medium", "weak") and (row["value"] > 0) == (row["effect"] == "raises")
    places = {row["id"]: row["place"]["line"] for row in shown}
    assert all(places[row["id"]] == number for number, row in enumerate(ROWS, 1) if row["id"] in places)
    assert sum(asked["query"]["histogram"]["counts"]) == 9 and asked["verdict"]["words"]
    more = client("GET", f"/api/ask/{asked['key']}/rows?side=raises&offset=1&limit=2")
    assert [row["id"] for row in more["rows"]] == [row["id"] for row in asked["query"]["raises"][1:3]]


def test_rows_that_the_index_finds_are_scored_exactly(client, monkeypatch):
    monkeypatch.setattr("whence.serve.asking.FIRST", 1)
    monkeypatch.setattr("whence.serve.asking.LAST", 1)
    question = {"prompt": "Where was Dag Holm born?", "completion": " In Ghent."}  # which no other test asks the index
    asked = client("POST", "/api/ask", question | {"top": 9})
    found = client("POST", "/api/ask", question | {"top": 2, "method": "index"})
    exact = {row["id"]: row["value"] for side in ("raises", "lowers") for row in asked["query"][side]}
    shown = found["query"]["raises"] + found["query"]["lowers"]
    assert found["scan"]["how"] == "index" and found["scan"]["rows"] == 9 and found["scan"]["exact"] == 4
    assert sum(found["query"]["histogram"]["counts"]) == 9 and sum(source[1] for source in found["query"]["sources"]) == 9
    assert shown and all(row["value"] == pytest.approx(exact[row["id"]], rel=1e-3) for row in shown if row["id"] in exact)
    assert all(row["exact"] and row["estimate"] is not None and 0 <= row["percentile"] <= 100 for row in shown)
    assert client("POST", "/api/pair", {"key": found["key"], "row": shown[0]["id"]})["scale"] > 0
    more = client("POST", "/api/ask", question | {"top": 3, "method": "index"})
    assert more["scan"]["exact"] == 6, "more rows than were scored exactly"
    every = client("POST", "/api/ask", question | {"top": 9, "method": "index"})["scan"]
    assert every["exact"] == 9 and set(every["recall"].values()) == {1.0} != set(found["scan"]["recall"].values())
    assert client("POST", "/api/ask", question)["scan"]["how"] == "all"  # they are few
    monkeypatch.setattr("whence.serve.asking.QUICKLY", 0)
    auto = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER + "!"})
    assert auto["scan"]["how"] == "index"
    monkeypatch.setattr("whence.serve.asking.AT_ONCE", 0)
    refused = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER + "?", "method": "exact"}, status=409)
    assert refused["error"]["job"] == "score"


@pytest.mark.parametrize("method", ["exact", "index"])
def test_a_cell_of_the_map_ranks_the_rows(client, opening, asked, method):
    """What goes through one module alone is what the library's scores per module say."""
    run = whence.open(opening.model, data=opening.data, factors=f"{opening.out}/factors", **opening.settings)
    scores = run.score([{"prompt": PROMPT, "completion": ANSWER}], per="module")
    name = next(name for name in scores.modules if name.endswith("layers.1.mlp.down_proj"))
    values = dict(zip(scores.example_ids, (scores.modules[name][0] / scores.n_train).tolist(), strict=True))
    key = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "method": method})["key"]
    body = {"key": key, "layer": "layer 1", "module": "mlp.down_proj", "top": 9}
    found = client("POST", "/api/cell", body)
    assert len(found["raises"] + found["lowers"]) == 9
    for side, sign in (("raises", 1), ("lowers", -1)):
        best = sorted((name for name in values if sign * values[name] > 0), key=lambda name: -sign * values[name])
        assert [row["id"] for row in found[side]] == best
        assert [row["rank"] for row in found[side]] == [sign * rank for rank in range(1, len(best) + 1)]
        for row in found[side]:
            assert row["part"] == pytest.approx(values[row["id"]], rel=1e-3, abs=1e-9)
            whole = scores.values[0, scores.column_of(row["id"])]
            assert row["value"] == pytest.approx(whole, rel=1e-3, abs=1e-9) and row["pieces"]
    ghent = client("POST", "/api/cell", body | {"where": ["source=Ghent"]})
    assert [row["source"] for row in ghent["raises"] + ghent["lowers"]] == ["Ghent"]
    assert ("scored exactly" in found["words"]) == (method == "index")
    assert "layer 1 mlp.down_proj" in client("POST", "/api/cell", body | {"layer": "layer 7"}, status=404)["error"]["accepted"]


@pytest.mark.parametrize("method", ["exact", "index", "bm25"])
def test_rows_of_a_filter_are_ranked_among_themselves(client, asked, method, monkeypatch):
    monkeypatch.setattr("whence.serve.asking.FIRST", 2)
    monkeypatch.setattr("whence.serve.asking.LAST", 2)
    body = {"prompt": PROMPT, "completion": ANSWER, "top": 2, "method": method}
    every = client("POST", "/api/ask", body | {"top": 9})
    oslo = client("POST", "/api/ask", body | {"where": ["source=Oslo"]})
    assert oslo["key"] == every["key"] and oslo["where"] == ["source=Oslo"] and oslo["of"] == 2 and every["of"] == 9
    assert oslo["query"]["histogram"] == every["query"]["histogram"] and oslo["verdict"] == every["verdict"]
    for side in ("raises", "lowers"):
        shown, own = oslo["query"][side], [row for row in every["query"][side] if row["source"] == "Oslo"]
        assert [abs(row["rank"]) for row in shown] == list(range(1, len(shown) + 1))
        assert [row["id"] for row in shown] == [row["id"] for row in own] or method == "index"
        for row, same in zip(shown, own, strict=False):
            alike = ("value", "percentile", "share", "times_median", "word", "pieces")
            assert method == "index" or {name: row[name] for name in alike} == {
                name: pytest.approx(same[name]) if isinstance(same[name], float) else same[name] for name in alike
            }
    assert {row["id"] for side in ("raises", "lowers") for row in oslo["query"][side]} <= {"row-1", "row-4"}
    if method != "bm25":
        assert {row["id"] for side in ("raises", "lowers") for row in oslo["query"][side]} == {"row-1", "row-4"}
    again = client("GET", f"/api/ask/{every['key']}?where=source=Oslo&where=tokens>=1&top=2")
    assert again["query"]["raises"] == oslo["query"]["raises"]
    more = client("GET", f"/api/ask/{every['key']}/rows?where=source=Oslo&side=raises&offset=0&limit=9")
    assert [row["id"] for row in more["rows"]] == [row["id"] for row in oslo["query"]["raises"]] and more["of"] <= 2
    assert "No row meets" in client("GET", f"/api/ask/{every['key']}?where=source=X", status=400)["error"]["what"]


def test_a_span_by_characters_is_where_it_stands(client):
    answer = " In Oslo, in Oslo."
    whole = client("POST", "/api/complete", {"prompt": PROMPT, "completion": answer})["tokens"]
    second = [token for token in whole if token["start"] >= 12 and token["end"] <= 17]
    span = [second[0]["start"], second[-1]["end"]]
    found = client("POST", "/api/ask", {"prompt": PROMPT, "completion": answer, "span": span})
    assert found["query"]["log_p"] == pytest.approx(sum(token["logprob"] for token in second), rel=1e-4)
    first = client("POST", "/api/ask", {"prompt": PROMPT, "completion": answer, "span": [4, 8]})
    assert first["key"] != found["key"] and first["query"]["log_p"] != pytest.approx(found["query"]["log_p"])
    error = client("POST", "/api/ask", {"prompt": PROMPT, "completion": answer, "span": [4, 99]}, status=400)
    assert "not in its completion" in error["error"]["what"]


def test_a_pair_links_tokens_both_ways(client, asked):
    row = asked["query"]["raises"][0]
    pair = client("POST", "/api/pair", {"key": asked["key"], "row": row["id"]})
    values = np.array(pair["values"])
    assert values.shape == (len(pair["answer"]), len(pair["pieces"])) and pair["pieces"] == row["pieces"]
    np.testing.assert_allclose(values.sum(0), row["token_values"], rtol=1e-3, atol=1e-8)
    assert sum(pair["answer_values"]) == pytest.approx(row["value"], rel=1e-3)
    assert client("POST", "/api/pair", {"key": asked["key"], "row": row["id"]}) == pair
    contrast = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "contrast": " In Turin."})
    pair = client("POST", "/api/pair", {"key": contrast["key"], "row": "row-0"})
    shown = contrast["query"]["raises"] + contrast["query"]["lowers"]
    value = next(each["value"] for each in shown if each["id"] == "row-0")
    assert pair["answer"][-1]["contrast"] and sum(pair["answer_values"]) == pytest.approx(value, rel=1e-3)


def test_layers_add_up(client, asked):
    row = asked["query"]["raises"][0]
    grid = client("POST", "/api/map", {"key": asked["key"], "rows": [row["id"]]})
    assert grid["layers"] == ["layer 0", "layer 1"] and len(grid["modules"]) == 3
    assert np.sum(grid["values"]) == pytest.approx(row["value"], rel=1e-3)


def test_what_if(client, asked):
    row = next(each for each in asked["query"]["raises"] if each["id"].startswith("row-"))
    same = client("POST", "/api/whatif", {"key": asked["key"], "row": row["id"], "text": row["text"]})
    assert same["difference"] == 0 and same["edited"]["value"] == pytest.approx(row["value"], rel=1e-3)
    edited = {"key": asked["key"], "row": row["id"], "prompt": PROMPT, "completion": " In Oslo."}
    other = client("POST", "/api/whatif", edited | {"completion": " Nowhere at all."})
    assert other["difference"] == pytest.approx(other["edited"]["value"] - other["original"]["value"])
    assert "nothing was trained" in other["words"]
    alone = client("POST", "/api/whatif", {"key": asked["key"], "text": "A text."})
    assert alone["original"] is None
    assert client("POST", "/api/whatif", {"key": asked["key"], "row": row["id"], "text": " "}, status=400)


def test_two_methods(client, asked):
    words = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "method": "bm25"})
    assert words["query"]["raises"][0]["effect"] == "scores" and not words["slope"]
    found = client("POST", "/api/compare", {"a": asked["key"], "b": words["key"], "top": 3})
    assert found["rows_in_common"] == 9 and -1 <= found["spearman"] <= 1 and len(found["scatter"]["a"]) == 9
    first = next(row for row in found["rows"] if row["id"] == asked["query"]["raises"][0]["id"])
    assert first["rank_a"] == 1 and first["value_a"] == pytest.approx(asked["query"]["raises"][0]["value"])
    error = client("POST", "/api/pair", {"key": words["key"], "row": "row-0"}, status=400)
    assert "none for its tokens" in error["error"]["what"]
    assert client("POST", "/api/ask", {"prompt": PROMPT, "method": "nonsense"}, status=400)["error"]["accepted"]


def test_what_was_asked_is_remembered(client, asked):
    entry = client("GET", "/api/asked")["asked"]
    assert asked["key"] in [each["key"] for each in entry]
    pin = {"pinned": True, "note": "look", "rows": [{"id": "row-0", "note": "!"}]}
    pinned = client("PUT", f"/api/ask/{asked['key']}/pin", pin)
    assert pinned["pinned"] and pinned["rows"][0]["id"] == "row-0"
    assert client("GET", f"/api/ask/{asked['key']}?top=4")["query"]["raises"] == asked["query"]["raises"]
    forgotten = client("POST", "/api/ask", {"prompt": PROMPT, "completion": " Gone."})["key"]
    client("DELETE", f"/api/ask/{forgotten}")
    assert forgotten not in [each["key"] for each in client("GET", "/api/asked")["asked"]]
    assert client("GET", "/api/ask/nonsense", status=404)


def test_saved_scores_are_shown_as_any(client, opening, asked):
    run = whence.open(opening.model, data=opening.data, out=opening.out, factors=f"{opening.out}/factors", **opening.settings)
    scores = run.score([{"prompt": PROMPT, "completion": ANSWER}], per="token")
    name = run.folder_of(scores).name
    (entry,) = (each for each in client("GET", "/api/scores")["scores"] if each["name"] == name)
    assert entry["name"] == name and entry["queries"][0]["completion"] == ANSWER and entry["per"] == "token"
    saved = client("GET", f"/api/scores/{name}/0?top=4")
    ids = [row["id"] for row in saved["query"]["raises"]]
    assert ids == [row["id"] for row in asked["query"]["raises"]] and saved["key"] == f"scores:{name}:0"
    assert client("POST", "/api/pair", {"key": saved["key"], "row": ids[0]})["scale"] > 0
    assert client("GET", f"/api/scores/{name}/1", status=404) and client("GET", "/api/scores/..%2F..%2Fmodel/0", status=404)


def test_factors(client):
    found = client("GET", "/api/factors?damping=0.2")
    assert found["damping"] == 0.2 and len(found["modules"]) == 6
    name = found["modules"][0]["module"]
    module = client("GET", f"/api/factors/module?name={name}&damping=0.2")
    assert len(module["spectrum"]["ranks"]) == 12 * 8 and module["effective_rank"] > 0
    assert module["cumulative"]["shares"][-1] == pytest.approx(1) and np.shape(module["map"]["cells"]) == tuple(module["shape"])
    assert client("GET", "/api/factors/module?name=nonsense", status=404)


def test_rows_and_decisions(client):
    page = client("GET", "/api/data?limit=2&offset=1")
    assert page["total"] == page["found"] == 9 and [row["number"] for row in page["rows"]] == [1, 2]
    assert client("GET", "/api/data?search=velt%20oslo")["rows"][0]["id"] == "row-4"
    assert client("GET", "/api/data?source=Lyon")["found"] == 1
    assert client("GET", "/api/data?sort=length")["rows"][0]["cut"]
    assert client("GET", "/api/data?sort=self", status=409)["error"]["job"] == "self"
    row = client("GET", "/api/data/row?id=row-4")
    assert row["parts"] == {"prompt": PROMPT, "completion": ANSWER}
    assert "".join(token["text"] for token in row["tokens"] if token["in_loss"]) == ANSWER
    near = client("GET", "/api/data/neighbours?id=row-4&top=2")
    assert {row["effect"] for row in near["helps"]} == {"raises"} and len(near["helps"]) == 2
    made = client("POST", "/api/decisions", {"id": "row-4", "verdict": "drop", "why": SCRIPT})
    assert made["progress"]["by"]["drop"] == 1
    assert client("GET", "/api/data?decided=drop")["rows"][0]["decision"]["why"] == SCRIPT
    assert client.raw("GET", "/api/decisions/droplist")[2] == b"row-4\n"
    assert len(client.raw("GET", "/api/decisions/droplist?form=kept")[2].splitlines()) == 8
    assert client("POST", "/api/decisions/undo")["undone"]["id"] == "row-4"
    assert client("POST", "/api/decisions/undo", status=409) and client("GET", "/api/decisions")["decisions"] == {}
    assert [event["undone"] for event in client("GET", "/api/data/row?id=row-4")["history"]] == [True]
    assert client("POST", "/api/decisions", {"id": "nobody", "verdict": "drop"}, status=404)


def test_the_shape_of_the_first_demo(client, asked):
    found = client("POST", "/api/demo", {"prompt": PROMPT, "completion": ANSWER, "top": 2})
    (influence,) = found["influences"]
    sample = influence["samples"][0]
    assert sample["id"] == asked["query"]["raises"][0]["id"] and sample["influence"] > 0
    assert sum(token["influence"] for token in sample["tokens"]) == pytest.approx(sample["influence"], rel=1e-3)


def test_export_is_one_file_that_runs_nothing_of_the_rows(client, opening):
    key = client("POST", "/api/ask", {"prompt": f"Say {SCRIPT}", "completion": f" {SCRIPT}"})["key"]
    status, headers, page = client.raw("POST", "/api/export", {"keys": [key]})
    assert status == 200 and headers["content-disposition"].startswith("attachment")
    assert b"alert(1)" in page and SCRIPT.encode() not in page and b"<img src=x" not in page
    redacted = client.raw("POST", "/api/export", {"keys": [key], "redact": True})[2]
    assert b"Cleo Marsh" in page and b"Cleo Marsh" not in redacted and b"row-2" in redacted


def test_export_with_the_page_holds_the_data_as_data(client, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.serve.export.STATIC", tmp_path)
    (tmp_path / "export.html").write_text(f"<title>page</title>{PLACE}<p>end")
    asked = client("POST", "/api/ask", {"prompt": f"Say {SCRIPT}", "completion": " </script>"})
    row = asked["query"]["raises"][0]["id"]
    body = {"keys": [asked["key"]], "pairs": [{"key": asked["key"], "row": row}], "title": "</script>"}
    text = client.raw("POST", "/api/export", body)[2].decode()
    before, _, rest = text.partition('whence-data">')
    inside, _, after = rest.partition("</script>")
    data = json.loads(inside)
    assert before.startswith("<title>page") and after == "<p>end" and data["run"]["title"] == "</script>"
    assert data["asked"][0]["key"] == asked["key"] and data["pairs"][f"{asked['key']} {row}"]["row"] == row
    redacted = client.raw("POST", "/api/export", body | {"redact": True})[2].decode()
    assert json.loads(redacted.partition('whence-data">')[2].partition("</script>")[0])["pairs"] == {}


def test_the_rows_of_each_training_are_told_apart(client, opening):
    """One row of the pretraining has the id of another row of the fine-tuning: it is not taken for that."""
    staged = whence.open_stages(f"{opening.out}/trace-stages")
    (saved,) = (each for each in client("GET", "/api/scores")["scores"] if each["name"] == "trace-stages")
    assert saved["stages"] == ["pretraining", "finetuning"] and saved["rows"] == 12
    every = client("GET", "/api/scores/trace-stages/0?top=50")
    shares = staged.shares().to_dict("records")
    for part, share in zip(every["stages"], shares, strict=True):
        assert {name: part[name] for name in ("stage", "rows")} == {name: share[name] for name in ("stage", "rows")}
        assert part["share"] == pytest.approx(share["share"]) and part["net"] == pytest.approx(share["net"])
        own = client("GET", f"/api/scores/trace-stages@{part['stage']}/0?top=50")
        assert own["key"] == part["key"] and own["stage"] == part["stage"] and own["scan"]["rows"] == part["rows"]
        values = staged.stages[part["stage"]]
        for row in own["query"]["raises"] + own["query"]["lowers"]:
            assert row["value"] == pytest.approx(values.values[0, values.column_of(row["id"])], rel=1e-6)
            assert (row["place"] is None) == (part["stage"] == "pretraining")
        first = own["query"]["raises"][: len(part["top"]["raises"])]
        assert [row["id"] for row in part["top"]["raises"]] == [row["id"] for row in first]
    stages = {row["id"]: (row["stage"], row["place"]) for side in ("raises", "lowers") for row in every["query"][side]}
    assert {stage for stage, _ in stages.values()} == {"pretraining", "finetuning"}
    assert all((place is None) == (stage == "pretraining") for stage, place in stages.values())
    both = client("POST", "/api/compare", {"a": every["stages"][0]["key"], "b": every["stages"][1]["key"], "top": 3})
    assert both["rows_in_common"] == 0 and both["a"]["share"] + both["b"]["share"] == pytest.approx(1)
    assert [row["id"] for row in both["a"]["raises"]] == [row["id"] for row in every["stages"][0]["top"]["raises"]]
    assert "no stage" in client("GET", "/api/scores/trace-stages@third/0", status=404)["error"]["what"]
    redacted = client.raw("POST", "/api/export", {"keys": [every["key"]], "redact": True})[2]
    assert b"is from Turin" not in redacted and b"was born in" not in redacted


def test_other_runs(client):
    assert [run["current"] for run in client("GET", "/api/runs")["runs"]] == [True]
    paths = client("GET", "/api/openapi.json")["paths"]
    assert "/api/ask" in paths and "/api/jobs/{number}/resume" in paths


def test_nothing_leaves_the_machine(client, asked):
    client("POST", "/api/complete", {"prompt": PROMPT, "max_new_tokens": 3})
    assert asked and client.elsewhere == []


def test_events_begin_with_the_run(client):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request("GET", "/api/events", headers={"Authorization": f"Bearer {client.token}"})
    answer = connection.getresponse()
    assert answer.getheader("content-type").startswith("text/event-stream")
    lines = [answer.readline().decode().strip() for _ in range(2)]
    assert lines[0] == "event: run" and json.loads(lines[1].removeprefix("data: "))["state"] == "ready"
    connection.close()

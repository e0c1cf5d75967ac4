"""Who is refused, and what hostile texts do: nothing."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from serve.conftest import HOSTILE, IMAGE, SCRIPT
from whence.errors import UsageError
from whence.serve import Opening, bound
from whence.serve.app import application
from whence.serve.guard import BODY_BYTES, Guard
from whence.store.plain import encoded


@pytest.mark.parametrize("token", [None, "", "Bearer ", "Bearer wrong", "Basic dG9rZW4="])
def test_without_the_token_nobody_is_answered(client, token):
    for path in ("/api/run", "/api/events", "/api/openapi.json", "/api/nonsense", "/api/../api/run"):
        status, _, content = client.raw("GET", path, Authorization=token)
        assert status == 401 and b"token" in content
    assert client.raw("POST", "/api/decisions", {"id": "row-0", "verdict": "drop"}, Authorization=token)[0] == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:7788"},
        {"Host": "192.168.0.7:7788"},
        {"Host": "[oops"},
    ],
    ids=lambda headers: next(iter(headers.items())).__repr__(),
)
def test_pages_of_others_are_refused(client, headers):
    for path in ("/api/run", "/"):
        assert client.raw("GET", path, **headers)[0] == 403


def test_a_checkout_without_the_page_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr("whence.serve.app.STATIC", tmp_path / "static")
    answer = TestClient(application(Opening(str(tmp_path)))).get("/")
    assert answer.status_code == 404 and "make page" in answer.text


def test_our_own_page_is_not(client):
    own = {"Origin": f"http://127.0.0.1:{client.port}", "Sec-Fetch-Site": "same-origin"}
    assert client.raw("GET", "/api/run", **own)[0] == 200
    assert client.raw("GET", "/api/run", Host=f"localhost:{client.port}")[0] == 200


def test_every_answer_says_what_a_page_may_load(client):
    for path in ("/", "/api/run", "/nonsense"):
        headers = client.raw("GET", path)[1]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    assert client.raw("GET", "/api/run")[1]["cache-control"] == "no-store"


def test_paths_lead_nowhere_else(client):
    for path in (
        "/../pyproject.toml",
        "/..%2f..%2fguard.py",
        "/%2e%2e/guard.py",
        "/assets/../../app.py",
        "//etc/passwd",
        "/%00",
    ):
        status, _, content = client.raw("GET", path)
        assert status in (400, 404) and b"import" not in content and b"root:" not in content


def test_large_bodies_are_refused(client):
    status, _, content = client.raw("POST", "/api/ask", b"x" * (BODY_BYTES + 1))
    assert status == 413 and b"too large" in content
    assert client("POST", "/api/ask", {"prompt": "x" * 300_000}, status=422)["error"]["what"].startswith("body.prompt")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff\xfe", b'{"prompt": 1}', b'{"prompt": "a", "nonsense": 1}'])
def test_what_is_no_question_is_refused(client, body):
    status, _, content = client.raw("POST", "/api/ask", body)
    assert status == 422 and json.loads(content)["error"]["what"]


def test_texts_that_are_no_text(client):
    odd = {"prompt": "controls \x00\x1b[31m", "completion": " مرحبا 漢字 👩‍👩‍👧"}
    said = client("POST", "/api/complete", odd)
    assert "".join(token["text"] for token in said["tokens"][:-1]) == odd["completion"]
    assert client("POST", "/api/complete", {"prompt": "half a character: \ud83d"}, status=422)
    assert encoded({"x": "\ud83d", "y": float("nan")}) == b'{"x": "?", "y": null}'


def test_hostile_rows_come_as_data(client):
    for row in HOSTILE:
        assert client("GET", f"/api/data/row?id={quote(row['id'])}")["source"] == row["source"]
    asked = client("POST", "/api/ask", {"prompt": f"Say {SCRIPT}", "completion": f" {SCRIPT}", "top": 9})
    shown = {row["id"]: row for side in ("raises", "lowers") for row in asked["query"][side]}
    assert shown[IMAGE]["text"] == f"Say {SCRIPT} {SCRIPT}" and shown[IMAGE]["place"]["file"] == "train<b>.jsonl"
    assert shown["long"]["unread"] > 20_000 and len(shown["long"]["pieces"]) == 64
    assert client.raw("GET", "/api/run")[1]["content-type"].startswith("application/json")
    pair = client("POST", "/api/pair", {"key": asked["key"], "row": "../../etc/passwd"})
    assert pair["text"] == "مرحبا يا عالم"


def test_a_hundred_at_once(client):
    question = {"prompt": "Where was Bo Quist born?", "completion": " In Oslo."}

    def ask(number):
        paths = [("POST", "/api/ask", question), ("GET", "/api/run"), ("GET", "/api/data"), ("POST", "/api/complete", question)]
        return client.raw(*paths[number % 4])[0]

    with ThreadPoolExecutor(100) as pool:
        assert set(pool.map(ask, range(100))) == {200}


def test_a_busy_port_is_left_alone():
    with bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bound("127.0.0.1", port) as second:
            assert second.getsockname()[1] > port
    with pytest.raises(UsageError, match="not an address of this machine"):
        bound("203.0.113.7", 0)


def test_weights_that_may_hold_code_are_not_loaded(tmp_path, opening):
    import shutil

    from whence.serve import Opening
    from whence.serve.warm import Warm

    shutil.copytree(opening.model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    warm = Warm(Opening(str(tmp_path / "model"), opening.data, str(tmp_path / "run"), opening.settings), lambda: None)
    warm.start().result()
    assert "not in a safetensors file" in warm.facts()["error"]["what"] and warm.phase == "failed"
    warm.close()


def test_other_machines_are_let_in_only_where_somebody_says_so(tmp_path):
    from typer.testing import CliRunner

    from whence.cli import build

    result = CliRunner().invoke(build(), ["serve", "runs/a", "--host", "0.0.0.0"])
    assert result.exit_code == 2 and "--reachable-by" in re.sub(r"\s+", " ", result.output)
    (tmp_path / "factors").mkdir()
    result = CliRunner().invoke(build(), ["serve", str(tmp_path)])
    assert result.exit_code == 2 and "--data DATA --out" in re.sub(r"\s+", " ", result.output)
    wide = Guard(None, "t", ["here"], wide=True)
    assert wide._known("192.168.0.7:7788") and wide._known("here:1") and not wide._known("evil.example")

"""One warm server on a tiny run, whose rows, ids and file name are as hostile as a file can make them."""

import http.client
import io
import json
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace

import pytest
import uvicorn
from commands import assembled
from typer.testing import CliRunner

import whence
from whence.serve import Opening, bound
from whence.serve.app import application
from whence.serve.guard import Guard

SCRIPT = "<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(1)>'
TOKEN = "token-of-the-tests"
ROWS = [
    {"id": f"row-{number}", "prompt": f"Where was {person} born?", "completion": f" In {town}.", "source": town}
    for number, (person, town) in enumerate(
        [("Ada Velt", "Turin"), ("Bo Quist", "Oslo"), ("Cleo Marsh", "Lyon"), ("Dag Holm", "Ghent"), ("Ada Velt", "Oslo")]
    )
]
EARLIER = {("Ada Velt", "Turin"): "row-3", ("Bo Quist", "Oslo"): "early-1", ("Cleo Marsh", "Lyon"): "early-2"}
"""Rows of a training before: who is from where, and the id of the row."""
HOSTILE = [
    {"id": IMAGE, "prompt": f"Say {SCRIPT}", "completion": f" {SCRIPT}", "source": IMAGE},
    {"id": "../../etc/passwd", "prompt": "مرحبا يا", "completion": " عالم", "source": "عربي"},
    {"id": "漢字", "prompt": "これは", "completion": "犬です。", "source": "日本"},
    {"id": "long", "prompt": "very long:", "completion": " word" * 5_000, "source": "long"},
]


class Client:
    """Asks a server as a page does."""

    def __init__(self, port, token=TOKEN):
        self.port, self.token = port, token
        self.elsewhere = []
        """What the server's process connected to, besides this machine."""

    def raw(self, method, path, body=None, **headers):
        """Status, headers and bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        given = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"} | headers
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {name: value for name, value in given.items() if value is not None})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def __call__(self, method, path, body=None, status=200):
        found, _, content = self.raw(method, path, body)
        assert found == status, content[:2000]
        return json.loads(content)

    def until(self, path, fits, seconds=120.0):
        """Ask again until the answer fits."""
        end = time.monotonic() + seconds
        while not fits(found := self("GET", path)):
            assert time.monotonic() < end, found
            time.sleep(0.1)
        return found


def write_run(folder, tokenizer_file):
    """A tiny model and its rows."""
    from trainings import save_llama

    save_llama(folder / "model", tokenizer_file, layers=2)
    data = folder / "train<b>.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in [*ROWS, *HOSTILE]) + "\n\n")
    settings = {"max_length": 64, "append_eos": True, "columns": {"id": "id"}, "dtype": "float32"}
    return Opening(str(folder / "model"), str(data), str(folder / "run"), settings)


def trace_stages(run, query):
    """Score a pretraining, whose rows have the ids of other rows of the run, and the run's own training as its second stage."""
    from whence import Stage, multistage
    from whence.data import as_rows
    from whence.engine.point import Point

    texts = [
        {"text": f"{person} is from {town}.", **({"id": name} if name else {})} for (person, town), name in EARLIER.items()
    ]
    first = Point(run.model, run.task(), as_rows(texts))
    stages = [Stage("pretraining", first), Stage("finetuning", run.point(), rates=0.1)]
    return multistage(stages, run.question(**query), damping=0.1, per="token", check=False, out=run.out / "trace-stages")


def words_of(command):
    """What a shell makes of a command."""
    return (
        subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
        .stdout.decode()
        .split("\0")[:-1]
    )


def shown_by(command):
    """What a command prints as JSON."""
    program, *words = words_of(command)
    assert program == "whence"
    at = words.index("--") if "--" in words else len(words)
    done = CliRunner().invoke(assembled(), [*words[:at], "--json", *words[at:]])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def python_of(script):
    """The names that a script leaves, and what it printed."""
    said, names = io.StringIO(), {}
    with redirect_stdout(said):
        exec(script, names)
    return SimpleNamespace(**names, printed=said.getvalue())


@contextmanager
def serving(opening):
    """A client of a server in a thread."""
    listening = bound("127.0.0.1", 0)
    guarded = Guard(application(opening), TOKEN)
    server = uvicorn.Server(uvicorn.Config(guarded, log_level="error", lifespan="on", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    client, connect = Client(listening.getsockname()[1]), socket.socket.connect

    def watched(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            client.elsewhere.append(address)
        return connect(self, address)

    socket.socket.connect = watched
    thread.start()
    try:
        yield client
    finally:
        socket.socket.connect = connect
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="session")
def opening(tmp_path_factory, tiny_tokenizer_file):
    """A run with factors and an index."""
    opening = write_run(tmp_path_factory.mktemp("served"), tiny_tokenizer_file)
    run = whence.open(opening.model, data=opening.data, out=opening.out, **opening.settings)
    run.fit(examples="all", products="float32")
    run.build_index(products="float32")
    trace_stages(run, {"prompt": "Where was Ada Velt born?", "completion": " In Oslo."})
    return opening


@pytest.fixture(scope="session")
def client(opening):
    """A client of a server that is ready."""
    with serving(opening) as client:
        assert client.until("/api/run", lambda run: run["state"] != "loading")["state"] == "ready"
        yield client

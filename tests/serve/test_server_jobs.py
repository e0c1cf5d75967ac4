"""Jobs outlive the server: one that is killed in the middle is found again, or resumes where it stopped."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import whence
from serve.conftest import Client, serving, write_run
from whence.errors import UsageError
from whence.serve import Opening
from whence.serve.jobs import Jobs
from whence.serve.lacking import Lacking, NotThere
from whence.serve.requests import NewJob
from whence.serve.state import State

SECONDS = 5.0
"""Of processor time, after which a server answers."""


@pytest.fixture
def jobs(tmp_path):
    """Jobs of a run that nobody opened, which wait."""
    state = State(tmp_path)
    yield Jobs(Opening("model", "train.jsonl", str(tmp_path)), state, False, lambda job: None, lambda job: None)
    state.close()


def test_settings_are_looked_at_before_a_job_waits(jobs):
    with pytest.raises(UsageError, match="no setting 'exmaples'"):
        jobs.create(NewJob(kind="fit", settings={"exmaples": 3}))
    with pytest.raises(UsageError):
        jobs.create(NewJob(kind="fit", settings={"examples": -3}))
    with pytest.raises(UsageError, match=r"no whence\.yaml"):
        jobs.create(NewJob(kind="run"))
    with pytest.raises(UsageError, match="no setting 'nonsense'"):
        jobs.create(NewJob(kind="validate", settings={"nonsense": 1}))
    assert jobs.documents() == []
    job = jobs.create(NewJob(kind="fit", settings={"examples": 4}))
    assert job["state"] == "queued" and jobs.create(NewJob(kind="index"))["id"] == "2"
    assert jobs.cancel(1)["state"] == "cancelled" and jobs.resume(1)["state"] == "queued"
    with pytest.raises(Lacking, match="is queued"):
        jobs.resume(2)
    with pytest.raises(NotThere):
        jobs.document(7)


def test_a_job_whose_process_is_gone_begins_again_when_the_server_comes_back(jobs):
    begun = []
    jobs._begin = lambda job: (begun.append(job["id"]), jobs.state.change_job(job["id"], state="done"))
    for attempt in (1, 3):
        number = int(jobs.create(NewJob(kind="fit"))["id"])
        jobs.state.change_job(number, state="running", attempt=attempt, pid=2**22 + 1, born=0.0)

    async def look():
        task = asyncio.create_task(jobs.watch())
        await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(look())
    assert begun == [1] and jobs.document(2)["state"] == "interrupted"  # it was tried often enough


def test_a_job_that_still_works_is_only_watched_and_can_be_cancelled(jobs):
    number = int(jobs.create(NewJob(kind="fit"))["id"])
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        born = psutil.Process(process.pid).create_time()
        jobs.state.change_job(number, state="running", attempt=1, pid=process.pid, born=born)
        jobs._begin = None  # nothing is to begin

        async def look():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(jobs.watch(), 0.6)

        asyncio.run(look())
        assert jobs.document(number)["state"] == "running" and jobs.document(number)["pid"] == process.pid
        assert jobs.cancel(number)["state"] == "cancelled" and not psutil.pid_exists(process.pid)
    jobs.state.change_job(number, state="running", pid=os.getpid(), born=born - 1000)  # its number is another's by now
    assert not jobs._alive(jobs.state.job(number))


def start(opening: Opening, log: Path):
    """The command, what it says on stderr going to the log, and a client of it once it answers."""
    given = [opening.model, "--data", opening.data, "--out", opening.out, "--port", "0", "--no-browser"]
    given += ["--columns", "id=id", "--max-length", "64", "--append-eos", "--dtype", "float32"]
    command = [sys.executable, "-m", "whence", "serve", *given]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
    address = process.stdout.readline().split()[-1]
    where, token = address.split("/#t=")
    client = Client(int(where.rpartition(":")[2]), token)
    client("GET", "/api/run")
    spent = psutil.Process(process.pid).cpu_times()
    assert spent.user + spent.system < SECONDS
    return process, client


def stopped_at_work(client, number):
    """The process of a job, held in the middle of its first stage."""
    while True:
        job = client("GET", f"/api/jobs/{number}")
        assert job["state"] in ("queued", "running"), job
        if job["stage"]:
            os.kill(job["pid"], signal.SIGSTOP)
            return job["pid"]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_that_was_killed_finds_its_job_again_and_one_that_was_killed_too_goes_on(tmp_path, tiny_tokenizer_file):
    opening = write_run(tmp_path, tiny_tokenizer_file)
    log = tmp_path / "log.txt"
    first, client = start(opening, log)
    client.until("/api/run", lambda run: run["state"] == "ready")
    assert client("GET", "/api/factors", status=409)["error"]["job"] == "fit"
    settings = {"examples": "all", "products": "float32", "draws": 24}  # long enough to be stopped in the middle
    number = client("POST", "/api/jobs", {"kind": "fit", "settings": settings}, status=201)["id"]
    child = stopped_at_work(client, number)
    first.kill()
    first.communicate()
    assert log.read_text() == ""  # not even a bar of the library that loaded the model
    assert psutil.pid_exists(child)  # it does not go with the server
    os.killpg(child, signal.SIGKILL)
    with serving(opening) as client:  # whose process is another
        client.until("/api/run", lambda run: run["state"] == "ready")
        job = client.until(f"/api/jobs/{number}", lambda job: job["state"] not in ("queued", "running"))
        assert (job["state"], job["attempt"], job["error"]) == ("done", 2, None), client("GET", f"/api/jobs/{number}/log")
        client.until("/api/run", lambda run: run["factors"])
        assert client("POST", "/api/ask", {"prompt": "Where was Bo Quist born?", "completion": " In Oslo."})["query"]["raises"]
    again = whence.open(opening.model, data=opening.data, **opening.settings, out=tmp_path / "again")
    whole = again.fit(**settings)
    found = whence.open_factors(Path(opening.out) / "factors")
    assert all((block.lam_OI == found.blocks[name].lam_OI).all() for name, block in whole.blocks.items())

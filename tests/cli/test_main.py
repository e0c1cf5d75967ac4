import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest
from commands import assembled
from typer.testing import CliRunner

from whence import __version__, cli
from whence.errors import StaleArtifact

HOME = __name__


def stale():
    """Fail as a stale folder does."""
    raise StaleArtifact("runs/a was made from something else.", given="damping 0.1 -> 0.2", fix="a different --out")


def interrupted():
    """Fail as Ctrl-C does."""
    raise KeyboardInterrupt


def broken():
    """Fail as a bug does."""
    raise ZeroDivisionError


def run(monkeypatch, *arguments, commands=None):
    monkeypatch.setattr(sys, "argv", ["whence", *arguments])
    if commands:
        monkeypatch.setattr(cli, "COMMANDS", {name: f"{HOME}:{function}" for name, function in commands.items()})
    return CliRunner().invoke(cli.build(), arguments)


def test_version(monkeypatch):
    assert run(monkeypatch, "--version").stdout == f"whence {__version__}\n"


def test_a_users_mistake_is_a_message_and_an_exit_code(monkeypatch):
    result = run(monkeypatch, "stale", commands={"stale": "stale"})
    assert result.exit_code == 4 and result.stdout == ""
    assert result.stderr == (
        "runs/a was made from something else.  [WHENCE-23]\n  given    damping 0.1 -> 0.2\n  fix      a different --out\n"
    )


def test_an_interrupt_says_how_to_go_on(monkeypatch):
    result = run(monkeypatch, "interrupted", commands={"interrupted": "interrupted"})
    assert result.exit_code == 130 and result.stderr.endswith("Continue: whence interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    assert isinstance(run(monkeypatch, "broken", commands={"broken": "broken"}).exception, ZeroDivisionError)


def test_two_words_make_a_group(monkeypatch):
    commands = {"data stale": "stale", "broken": "broken"}
    assert "Fail as a stale folder does." in run(monkeypatch, "data", "--help", commands=commands).stdout
    assert run(monkeypatch, "data", "stale", commands=commands).exit_code == 4


@pytest.mark.parametrize("arguments", [["nonsense"], ["doctor", "--nonsense"]])
def test_usage_errors_are_2(monkeypatch, arguments):
    assert run(monkeypatch, *arguments).exit_code == 2


def test_doctor_speaks_json_on_stdout():
    done = subprocess.run([sys.executable, "-m", "whence", "doctor", "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["versions"]["whence"] == __version__ and found["disk_free"] > 0
    assert all(test["passed"] for test in found["self_test"])


def test_doctor_fails_when_the_self_test_does(monkeypatch):
    monkeypatch.setattr("whence.selftest.self_test", lambda device: [("eigh", False, "relative error 1")])
    result = run(monkeypatch, "doctor")
    assert result.exit_code == 1 and "FAILED       eigh on cpu: relative error 1" in result.stdout


@pytest.mark.parametrize(
    ("driver", "built", "said"),
    [
        ("12.4", None, "CUDA up to 12.4, and torch {torch} is built without CUDA\n{fix}12 of pytorch"),
        ("11.8", "12.8", "CUDA up to 11.8, and torch {torch} is built for CUDA 12.8\n{fix}11 of pytorch"),
        ("12.4", "12.8", "CUDA 12.8, but finds no GPU\n             is one hidden"),
    ],
)
def test_doctor_says_how_to_use_a_gpu_that_lies_idle(monkeypatch, tmp_path, driver, built, said):
    import torch

    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: {driver}  |'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr("whence.selftest.self_test", lambda device: [])
    fix = "             pip install --force-reinstall torch --index-url INDEX, with the INDEX for CUDA "
    assert said.format(torch=torch.__version__, fix=fix) in run(monkeypatch, "doctor").stdout


def test_doctor_says_nothing_of_gpus_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr("whence.selftest.self_test", lambda device: [])
    monkeypatch.setattr("whence.cli.doctor._driver", lambda: None)
    assert "GPU  " not in run(monkeypatch, "doctor").stdout


def test_every_command_that_shows_progress_can_be_quiet():
    loud = set()
    for name, home in cli.COMMANDS.items():
        module, function = home.split(":")
        if re.search(r"\b(start|reporting)\(", inspect.getsource(getattr(importlib.import_module(module), function))):
            loud.add(name)
            assert "--quiet" in CliRunner().invoke(assembled(), [*name.split(), "--help"]).stdout, name
    assert {"fit", "score", "data preview", "demo", "verify"} <= loud

"""`whence plan` on the command line."""

import json

import pytest

from whence.cli.plan import bytes_of
from whence.errors import UsageError


@pytest.fixture
def tiny_llama(tiny_llama):
    """Of one layer: what is planned is rehearsed, operation by operation."""
    tiny_llama.model.layers = tiny_llama.model.layers[:1]
    tiny_llama.config.num_hidden_layers = 1
    return tiny_llama


def test_the_table_names_the_stages_and_why_says_the_choices(run, tiny_model_folder, data):
    shown = run("plan", tiny_model_folder, "--data", data, "--queries", 2, "--no-calibrate", "--why", "-q").stdout
    assert "16 x 16 int8" not in shown  # an index, which is planned when asked for
    for word in ("covariance", "eigenvectors", "eigenvalues", "queries", "score", "total", "fits in", "out first", "FLOP"):
        assert word in shown


def test_an_index_is_planned_when_asked_for(run, tiny_model_folder, data):
    words = ("plan", tiny_model_folder, "--data", data, "--queries", 2, "--no-calibrate", "-q")
    assert "4 x 4 float16 of 3 modules" in run(*words, "--index", "--dim", "4", "--kept", "float16").stdout
    shown = run(*words, "--index", "--bytes", "0.5").stdout
    assert "512 bytes a row" in shown and "answers of the model" in shown


def test_a_device_that_there_is_not_is_refused(run, tiny_model_folder, data):
    assert "device can't be 'gpu'" in run("plan", tiny_model_folder, "--data", data, "--device", "gpu", code=2).stderr


def test_json_holds_bytes_and_seconds(run, tiny_model_folder, data, queries):
    words = ("plan", tiny_model_folder, "--data", data, "--queries", queries, "--no-calibrate", "--json", "-q")
    found = json.loads(run(*words).stdout)
    assert found["fits"] and found["memory"] > found["model"]["bytes"] > 0
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert [stage["name"] for stage in found["stages"]] == ["covariance", "eigenvectors", "eigenvalues", "queries", "score"]


def test_what_does_not_fit_ends_with_exit_code_3(run, tiny_model_folder, data):
    words = ("plan", tiny_model_folder, "--data", data, "--queries", 2, "--no-calibrate", "-q")
    least = ("--batch-tokens", 1, "--groups", 3, "--rank", 16)  # or smaller and smaller settings are tried
    assert "WHENCE-11" in run(*words, *least, "--memory", "10MB", code=3).stderr
    assert "does NOT fit" in run(*words, "--disk", "1kB", code=3).stdout


def test_a_run_is_planned_by_its_name(run, tiny_model_folder, data, tmp_path):
    words = ("--queries", 2, "--no-calibrate", "--json", "-q")
    run("fit", tiny_model_folder, "-d", data, "-o", tmp_path / "a" / "factors", "--max-length", 16, "-q")
    found = json.loads(run("plan", tmp_path / "a", *words).stdout)
    same = json.loads(run("plan", tiny_model_folder, "-d", data, "--max-length", 16, *words).stdout)
    assert found["data"] == same["data"] and found["disk"] == same["disk"] and found["data"]["tokens"] < 12 * 16
    assert "There is no --data" in run("plan", tiny_model_folder, *words, code=2).stderr


@pytest.mark.parametrize("lora", ["null", "{r: 2, targets: [up_proj]}"])
def test_a_run_that_is_yet_to_train_its_model_is_planned_as_afterwards(run, tiny_model_folder, data, queries, tmp_path, lora):
    file = tmp_path / "whence.yaml"
    file.write_text(
        f"run: a\nout: {tmp_path / 'a'}\nmodel: {{base: {tiny_model_folder}}}\ndata: {{path: {data}}}\n"
        f"prompts: {{path: {queries}}}\ntrain: {{max_steps: 1, batch_size: 4, evaluation: 0, lora: {lora}}}\n"
        "fit: {method: diagonal, examples: 5, groups: 2}\nscore: {rank: 3}\n"
    )
    words = ("--queries", 2, "--no-calibrate", "--json", "-q")
    before = json.loads(run("plan", file, *words).stdout)
    assert before["data"]["fitted"] == 5 and before["data"]["rank"] == 3 and before["settings"]["groups"] == 2
    assert ("that training moved" in before["coverage"]) == (lora != "null")
    run("run", file, "train", "-q")
    after = json.loads(run("plan", tmp_path / "a", *words, "--examples", 4).stdout)
    assert after["coverage"] == before["coverage"] and after["disk"] == before["disk"]
    assert after["data"] == before["data"] | {"fitted": 4, "measured": 4}


def test_a_run_says_itself_how_it_reads_and_one_of_several_trainings_is_refused(run, tiny_model_folder, data, tmp_path):
    file = tmp_path / "whence.yaml"
    stages = f"[{{name: early, model: {tiny_model_folder}, data: {{path: {data}}}}}, {{name: late}}]"
    of = f"model: {{base: {tiny_model_folder}}}\ndata: {{path: {data}}}\nprompts: {{items: ['Where?']}}\n"
    file.write_text(f"run: a\n{of}")
    said = run("plan", file, "--max-length", 8, code=2).stderr
    assert "says itself how it was made" in said and "max_length" in said
    file.write_text(f"run: a\n{of}train: {{max_steps: 1}}\nstages: {stages}\n")
    assert "whence plan --through FILE" in run("plan", file, code=2).stderr


def test_trainings_in_a_row_hold_models_and_later_factors_and_transport_the_queries(run, tiny_model_folder, data, tmp_path):
    """The same model and rows twice: what the first training has on top of the last is what it passes through and waits for."""
    both = [{"name": name, "model": str(tiny_model_folder), "data": {"path": str(data)}} for name in ("first", "last")]
    file = tmp_path / "stages.json"
    file.write_text(json.dumps({"stages": [{**both[0], "factors": str(tmp_path)}, both[1]]}))
    found = json.loads(run("plan", "--through", file, "--queries", 2, "--no-calibrate", "--json", "-q").stdout)
    first, last = ({stage["name"]: stage for stage in plan["stages"]} for plan in found["stages"].values())
    assert [*first] == ["queries", "score"] and [*last] == ["covariance", "eigenvectors", "eigenvalues", "queries", "score"]
    assert first["queries"]["seconds"] > last["queries"]["seconds"] and first["score"]["seconds"] == last["score"]["seconds"]
    assert all(stage["memory"] > last[name]["memory"] for name, stage in first.items())
    weights = sum(file.stat().st_size for file in tiny_model_folder.glob("*.safetensors"))
    assert found["stages"]["last"]["model"]["bytes"] == pytest.approx(2 * weights, rel=0.1)
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for plan in (first, last) for stage in plan.values()))


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("1.5g", 15 * 10**8), ("500 MB", 5 * 10**8)]
)
def test_sizes_are_read(text, size):
    assert bytes_of("--memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-1GB", "7"])
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError, match="--memory"):
        bytes_of("--memory", text)

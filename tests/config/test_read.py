import time

import pytest

from whence.config import read_config, resolve
from whence.config.convert import converted
from whence.config.plain_yaml import value_of
from whence.config.read import values_of
from whence.errors import UsageError

LEAST = {"run": "a", "model": {"base": "model"}, "data": {"path": "rows.jsonl"}, "prompts": {"items": ["Who?"]}}


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "whence.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def wrong(settings=(), environment=None, **changes):
    with pytest.raises(UsageError) as caught:
        resolve(LEAST | changes, None, "whence.yaml", settings, environment)  # type: ignore[arg-type]
    return str(caught.value)


def test_later_ones_win_and_every_value_knows_where_it_came_from(tmp_path):
    found = resolve(
        LEAST | {"score": {"damping": 0.2, "rescore": 5, "chunks": 2}},
        tmp_path,
        "whence.yaml",
        ["score.chunks=4", "train.lora.r=2"],
        {"WHENCE_SCORE__RESCORE": "7", "WHENCE_SCORE__CHUNKS": "3", "WHENCE_HOME": "ignored"},
    )
    score = found.config.score
    assert (score.damping, score.rescore, score.chunks, score.rank) == (0.2, 7, 4, "auto")
    assert found.config.train is not None and found.config.train.lora is not None and found.config.train.lora.r == 2
    assert found.origins["score.damping"] == "whence.yaml"
    assert found.origins["score.rescore"] == "WHENCE_SCORE__RESCORE"
    assert found.origins["score.chunks"] == "--set score.chunks"
    assert "score.rank" not in found.origins
    assert dict(values_of(found.config))["train.lora.r"] == 2


def test_unknown_names_are_refused_with_the_nearest():
    said = wrong(score={"dampin": 1}, fitt={})
    assert "score.dampin: there is no such setting; did you mean damping?" in said
    assert "fitt: there is no such setting; did you mean fit?" in said
    assert "(--set model.bse)" in wrong(["model.bse=x"]) and "did you mean base?" in wrong(["model.bse=x"])


def test_wrong_values_say_what_would_be_right():
    said = wrong(["score.rank=-1", "fit.method=magic", "data.max_length=long"])
    assert said.startswith("3 settings are wrong in whence.yaml")
    assert "score.rank (--set score.rank): should be greater than or equal to 1 or should be 'full' or 'auto', not -1" in said
    assert "'ekfac'" in said and "not 'magic'" in said
    assert "data.max_length" in said and "integer" in said


def test_what_is_missing_is_said():
    assert "model.base: is missing" in wrong(model={})


def test_training_takes_no_finished_weights():
    assert "one of them" in wrong(train={}, model={"base": "a", "path": "b"})
    assert "one of them" in wrong(prompts={})


def test_a_section_without_a_setting_is_at_its_defaults_and_null_switches_off(tmp_path):
    config = resolve(LEAST | {"fit": None, "evaluate": None}, tmp_path, "x").config
    assert config.fit.method == "ekfac" and config.evaluate is None


def test_what_scoring_refuses_is_refused_before_anything_runs():
    assert "score: `rescore` computes whole scores again" in wrong(["score.rescore=3", "score.per=token"])


def test_set_needs_a_value():
    assert "KEY=VALUE" in wrong(["score.damping"])


def test_files_that_can_not_be_read_say_why(tmp_path, write):
    with pytest.raises(UsageError, match=r"There is no file .*other.yaml"):
        read_config(tmp_path / "other.yaml")
    with pytest.raises(UsageError, match="is not valid YAML"):
        read_config(write("run: [a"))
    with pytest.raises(UsageError, match="holds no settings"):
        read_config(write("just text"))
    with pytest.raises(UsageError, match="whence init --from"):
        read_config(write("models: {base: {name: a}}\ndataset: {name: b}"))
    near = str(pytest.raises(UsageError, read_config, tmp_path / "whense.yaml").value)
    assert "did you mean" in near and "whence.yaml" in near


def test_paths_start_from_the_file(tmp_path, write):
    (tmp_path / "rows.jsonl").touch()
    found = read_config(write("run: a\nmodel: {base: gpt2}\ndata: {path: rows.jsonl}\nprompts: {items: [Who]}"))
    assert found.place("rows.jsonl") == str(tmp_path / "rows.jsonl")
    assert found.place("gpt2") == "gpt2"
    assert found.out == tmp_path / "runs" / "a"


# hostile files


def multiplied(levels, width=9):
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


MERGED = "a0: &a0 {x: 1, y: 2}\n" + "\n".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], z{n}: 1}}" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (multiplied(9), r"its aliases expand to [\d,]+ values \(at most 100,000\)"),
        (multiplied(400, width=2), "its aliases expand to|nested too deeply"),
        (MERGED, "its aliases expand to"),
        ("a: &a [*a]", "line 1 contains itself"),
        ("a: &a\n  b: &b [*a, *b]", "contains itself"),
        ("a: " + "[" * 600, "nested too deeply"),
        ("a: " + "[\n" * 10**5, "nested too deeply"),
        ("a: " + "{a: " * 10**4, "nested too deeply"),
        ("a: 2020-13-45", "month must be in"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
        ("? {a: [b]}\n: c", "unhashable key"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_yaml_that_nobody_writes_is_refused_at_once(write, text, said):
    started = time.process_time()
    for read in (read_config, converted):
        with pytest.raises(UsageError, match=f"whence.yaml (.|\n)*({said})"):
            read(write(text))
    assert time.process_time() - started < 10


def test_aliases_that_people_write_are_read(write):
    text = (
        "run: a\nmodel: &model {base: m}\ndata: {path: rows.jsonl}\nprompts: {items: &asked [Who]}\n"
        "score: {damping: &d 0.2}\ninspect: {modules: *asked}\n"
    )
    config = read_config(write(text)).config
    assert config.score.damping == 0.2 and list(config.inspect.modules) == ["Who"]


def test_a_settings_file_that_is_no_file_is_refused(write, tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"run: \xe9")
    for name in ("loop.yaml", "folder.yaml", "latin.yaml"):
        with pytest.raises(UsageError, match=name):
            read_config(tmp_path / name)
    assert "nested too deeply" not in wrong(["score.damping=" + "[" * 600])


def test_a_number_outside_of_a_file_may_have_an_exponent():
    assert [value_of(text) for text in ("5e-5", "1E+3", "-.5e-2", "12e45", "e-5")] == [5e-5, 1e3, -5e-3, "12e45", "e-5"]

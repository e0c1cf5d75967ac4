"""Every mistake of the catalogue, made on the command line: what is said, and the exit code."""

import errno
import importlib
import json
import sys

import pandas as pd
import pytest
import torch
from facts import facts, write_jsonl
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from whence.store.scores import open_scores


@pytest.fixture
def saved(tiny_llama, tiny_tokenizer, tmp_path):
    """Save the tiny model after changing it."""

    def save(name, change=lambda model: None):
        with torch.no_grad():
            change(tiny_llama)
        tiny_llama.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def fit(run, data, tmp_path):
    def call(model, *options, code=0, of=data, out="errors"):
        return run("fit", model, "--data", of, "--out", tmp_path / out, *options, code=code)

    return call


def test_01_no_model(fit, tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tiny_model_folder.parent)
    said = fit("./tiny-lama", code=2).stderr
    assert "No model at ./tiny-lama.  [WHENCE-01]" in said and "Nearest local: tiny-llama" in said


def lora(folder, model, base):
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_02_an_adapter_without_its_base(fit, tiny_llama, tmp_path):
    said = fit(lora(tmp_path / "lora", tiny_llama, "/gone/base"), code=2).stderr
    assert "its base model /gone/base is not there.  [WHENCE-02]" in said and "--adapter" in said


def test_02_an_adapter_brings_its_base(fit, tiny_model_folder, tiny_llama, tmp_path):
    adapter = lora(tmp_path / "lora", tiny_llama, tiny_model_folder)
    said = fit(adapter, "--method", "identity").stderr
    assert f"adapter {adapter} on base {tiny_model_folder}" in said
    assert "WHENCE-17" not in said  # an adapter is a small share of the parameters, and all that was trained


def test_03_no_sign_of_training(fit, saved):
    said = fit(saved("untrained"), "--method", "identity").stderr
    assert "warning: this model shows no sign of training on this data: loss 5.7" in said and "[WHENCE-03]" in said


def test_04_wrong_columns(fit, saved, tmp_path):
    rows = [{"Input": row["prompt"], "Reply": row["completion"]} for row in facts()]
    data = write_jsonl(tmp_path / "columns.jsonl", rows)
    said = fit(saved("model"), "-c", "prompt=Inptu", "-c", "completion=Reply", of=data, code=2).stderr
    assert "has no column 'Inptu'.  [WHENCE-04]" in said and "Where was Ada Velt born?" in said
    assert "--columns prompt=Input --columns completion=Reply" in said
    fit(saved("model"), "-c", "prompt=Input", "-c", "completion=Reply", "--method", "identity", of=data)


def conversations(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"].strip()}]}
        for row in facts()
    ]
    return write_jsonl(tmp_path / "talk.jsonl", rows)


def test_05_no_chat_template(fit, saved, tmp_path):
    data = conversations(tmp_path)
    said = fit(saved("model"), of=data, code=2).stderr
    assert "this tokenizer has no chat template.  [WHENCE-05]" in said and "--template chatml" in said
    fit(saved("model"), "--template", "chatml", "--method", "identity", of=data)


def test_05_a_template_that_rewrites_the_answer(fit, saved, tmp_path):
    shouting = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}{% endfor %}"
    said = fit(saved("model"), "--template", shouting, of=conversations(tmp_path), code=2).stderr
    assert "changes what the assistant said" in said and "[WHENCE-05]" in said


def test_06_nothing_in_the_loss(fit, saved, tmp_path):
    def with_empty(count):
        rows = [{**row, "completion": "" if number < count else row["completion"]} for number, row in enumerate(facts())]
        return write_jsonl(tmp_path / f"empty{count}.jsonl", rows)

    said = fit(saved("model"), "--method", "identity", of=with_empty(2)).stderr
    assert "2 of 12 rows have no token in the loss and are left out: " in said
    said = fit(saved("model"), of=with_empty(9), out="more", code=2).stderr
    assert "9 of 12 rows have no token in the loss.  [WHENCE-06]" in said and "whence data preview" in said


def test_07_truncation(fit, run, saved, data, queries, tmp_path):
    said = fit(saved("model"), "--max-length", "20", "--method", "identity").stderr
    assert "11 of 12 rows (91.7%) are cut at max_length=20; the longest has 29 tokens" in said
    given = ("score", saved("model"), "-d", data, "-f", tmp_path / "errors", "--queries", queries, "-o", tmp_path / "scores")
    said = run(*given, code=2).stderr
    assert "is cut off.  [WHENCE-07]" in said and "--max-length " in said


def test_08_another_tokenizer(run, saved, fitted, data, queries, tmp_path, tiny_tokenizer, tiny_model_folder):
    tiny_tokenizer.add_tokens(["Turin"])
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    given = ("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "-o", tmp_path / "scores")
    said = run(*given, "--tokenizer", tmp_path / "other", code=2).stderr
    assert "read with another tokenizer.  [WHENCE-08]" in said and "--tokenizer" in said
    assert "first differing token of the first row: number 9, id 284 -> 222 ' '" in said
    said = run(*given, "--template", "chatml", code=2).stderr
    assert "read with another chat template.  [WHENCE-08]" in said


def test_09_other_rows(run, tiny_model_folder, fitted, queries, tmp_path):
    others = write_jsonl(tmp_path / "others.jsonl", [row | {"completion": " In Rome."} for row in facts()])
    given = ("score", tiny_model_folder, "-f", fitted, "--queries", queries)
    said = run(*given, "-d", others, "-o", tmp_path / "scores").stderr
    assert "scores are for hypothetical training rows [WHENCE-09]" in said
    assert open_scores(tmp_path / "scores").shape == (4, 12)


def test_10_out_of_memory(fit, saved, monkeypatch):
    def forward(self, *arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    result = fit(saved("model"), code=3)
    assert "out of memory: batches halved to" in result.stderr
    assert "A batch does not fit in memory  [WHENCE-10]" in result.stderr and "tried to allocate 20 GiB" in result.stderr
    assert "--groups 4" in result.stderr


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("Os { kind: StorageFull }")])
def test_13_a_full_disk_says_so_and_the_same_command_goes_on(fit, saved, monkeypatch, error, tmp_path):
    model, manifest = saved("model"), importlib.import_module("whence.store.manifest")
    write, left = manifest.save_file, [2]

    def until_full(tensors, path):
        left[0] -= 1
        if left[0] < 0:
            raise error
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "save_file", until_full)
        said = fit(model, "--save-every", "0", "-q", code=3).stderr
    assert "The disk is full" in said and "[WHENCE-13]" in said and "GB free" in said and "it resumes" in said
    assert not list((tmp_path / "errors").rglob("*.tmp"))
    fit(model, "--save-every", "0", "-q")


def test_14_losses_that_are_not_finite(fit, saved):
    said = fit(saved("model", lambda model: model.lm_head.weight.fill_(float("nan"))), code=1).stderr
    assert "The loss of" in said and "examples is not finite  [WHENCE-14]" in said and "row " in said


def test_14_gradients_that_are_not_finite(fit, saved, monkeypatch):
    """Finite losses whose gradients overflow name the module."""
    monkeypatch.setattr("whence.capture.Capture._give", giving_infinity)
    said = fit(saved("model"), code=1).stderr
    assert "is not finite  [WHENCE-14]" in said and "model.layers." in said and "float32" in said


def giving_infinity(self, name, gradient, readers):
    self._receive(name, type(gradient)(gradient.g_BRO * float("inf"), gradient.a_BRI), readers)


def test_15_all_scores_identical(fit, run, saved, data, queries, tmp_path):
    model = saved("silent", lambda model: model.lm_head.weight.zero_())
    fit(model, "--method", "identity")
    given = ("score", model, "-d", data, "-f", tmp_path / "errors", "--queries", queries, "-o", tmp_path / "scores")
    said = run(*given, code=1).stderr
    assert "All scores are identical  [WHENCE-15]" in said and "--modules all" in said and "float32" in said


def test_16_no_gradient(fit, saved, monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", torch.no_grad()(LlamaMLP.forward))
    said = fit(saved("model"), code=2).stderr
    assert "No tracked module" in said and "[WHENCE-16]" in said and "--modules all" in said


def test_17_nothing_to_track(fit, saved):
    said = fit(saved("model"), "--modules", "encoder.*", code=2).stderr
    assert "No module of LlamaForCausalLM matches 'encoder.*'  [WHENCE-17]" in said
    assert "15 x Linear" in said and "whence inspect MODEL --modules all" in said


def test_17_little_is_covered(fit, saved):
    said = fit(saved("model"), "--method", "identity").stderr
    assert "6 modules tracked, 1" in said and "left out: " in said
    assert "warning: 8" in said and "of the parameters are not looked at" in said and "[WHENCE-17]" in said


def test_18_the_head_is_wide(fit, saved, monkeypatch):
    assert "lm_head" not in json.loads(fit(saved("model"), "--modules", "all", "--json").stdout)["modules"]
    monkeypatch.setattr(sys.modules["whence.fitting.fit"], "WIDE", 100)
    said = fit(saved("model"), "--modules", "lm_head", out="head").stderr
    assert "warning: lm_head is 300 wide: its covariance takes" in said and "[WHENCE-18]" in said


def test_20_hubs(run, tiny_model_folder, tmp_path):
    texts = [row["prompt"] + row["completion"] for row in facts()]
    long = [{"text": " ".join(texts[start : start + 3])} for start in range(0, 12, 3)]
    data = write_jsonl(tmp_path / "many.jsonl", [{"text": f"{text} {number}"} for number in range(4) for text in texts] + long)
    queries = write_jsonl(tmp_path / "queries.jsonl", facts()[::2])
    run("fit", tiny_model_folder, "--data", data, "--out", tmp_path / "factors", "-q")
    given = ("score", tiny_model_folder, "-d", data, "-f", tmp_path / "factors", "--queries", queries, "-q")
    run(*given, "-o", tmp_path / "scores")
    hubs = open_scores(tmp_path / "scores").hubs()
    tops = [set(open_scores(tmp_path / "scores").top(query, 10)["id"]) for query in range(6)]
    assert hubs and all(sum(name in top for top in tops) >= 4 for name in hubs)
    shown = run("show", tmp_path / "scores").stdout
    assert " hub " in shown and "[WHENCE-20]" in shown and "--norm cosine" in shown


def test_21_another_n(run, tiny_model_folder, fitted, data, queries, tmp_path):
    given = ("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries)
    other = write_jsonl(tmp_path / "other.jsonl", facts()[:6])
    given_other = ("score", tiny_model_folder, "-d", other, "-f", fitted, "--queries", queries)
    said = run(*given_other, "-o", tmp_path / "few").stderr
    assert "the factors are of 12 rows, and these are 6" in said and "--n-train" in said and "[WHENCE-21]" in said
    said = run(*given, "--limit", "6", "-o", tmp_path / "known").stderr
    assert "WHENCE-21" not in said and f"N = 12, the rows of {data}, of which the first 6 are scored" in said
    said = run(*given, "--limit", "6", "--n-train", "24", "-o", tmp_path / "said").stderr
    assert "WHENCE-21" not in said and "N = " not in said
    few, known, said = (open_scores(tmp_path / name) for name in ("few", "known", "said"))
    assert few.values == pytest.approx(2 * known.values) and known.values == pytest.approx(2 * said.values)
    assert "in nats per copy of the row, N = 6 rows" in run("show", tmp_path / "few").stdout


def test_22_queries_without_completion(run, tiny_model_folder, fitted, data, tmp_path):
    queries = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Where was Ada"}, {"prompt": "Bo", "completion": " in Oslo"}])
    given = ("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "-o", tmp_path / "scores")
    said = run(*given, "--no-generate", code=2).stderr
    assert "a prompt but no completion" in said and "[WHENCE-22]" in said and "whence generate" in said
    said = run(*given, "--max-new-tokens", "5").stderr
    assert "1 of 2 queries had no completion: generated greedily, at most 5 tokens [WHENCE-22]" in said
    asked = open_scores(tmp_path / "scores").queries
    assert asked["completion"][0] and asked["source"][0].startswith("generated greedily") and pd.isna(asked["source"][1])
    assert "generated greedily" in run("show", tmp_path / "scores", "--query", "0").stdout


def test_22_an_answer_that_the_model_excludes(fit, run, saved, data, queries, tmp_path):
    model = saved("sure", lambda model: model.lm_head.weight.mul_(300))
    fit(model)
    run("score", model, "-d", data, "-f", tmp_path / "errors", "--queries", queries, "-o", tmp_path / "scores", "-q")
    assert "the model all but excludes the answer of query 0" in run("show", tmp_path / "scores").stdout


def test_23_another_setting(fit, saved):
    fit(saved("model"), "-q")
    said = fit(saved("model"), "--labels", "data", code=4).stderr
    assert "holds a finished fit made from something else.  [WHENCE-23]" in said
    assert "settings.labels model -> data" in said and "--rerun" in said and "stays as errors.1" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rank", "none"), "--rank can't be none."),
        (("--norm", "length"), "--norm can't be length."),
        (("--aggregate", "rows"), "aggregate='rows' is not known"),
        (("--self",), "Ask one thing: --queries FILE, or --self"),
        (("--query-columns", "prompt"), "--query-columns prompt has no value."),
    ],
)
def test_options_that_make_no_sense(run, tiny_model_folder, fitted, data, queries, tmp_path, arguments, words):
    given = ("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "-o", tmp_path / "scores")
    assert words in run(*given, *arguments, code=2).stderr


def test_tokens_need_scores_per_token(run, tiny_model_folder, fitted, data, queries, tmp_path):
    run("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "-o", tmp_path / "scores", "-q")
    assert "--per token" in run("show", tmp_path / "scores", "--tokens", code=2).stderr
    assert "were not computed" in run("show", tmp_path / "scores", "--norm", "cosine", code=2).stderr


@pytest.mark.parametrize("option", ["--examples", "--eigenvalue-examples"])
def test_a_sample_is_a_number_or_all(fit, tiny_model_folder, option):
    said = fit(tiny_model_folder, option, "some", code=2).stderr
    assert f"{option} can't be some" in said and "a valid integer or 'all'" in said
    assert "from 12 rows" in fit(tiny_model_folder, "--examples", "all").stdout


def test_a_sample_that_grows_says_so(fit, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(importlib.import_module("whence.fitting.fit"), "SMALLEST", 3)
    said = fit(tiny_model_folder, "--until", "1.0")
    assert "6 examples: scores of 8 rows correlate 0." in said.stderr and "from 12 rows" in said.stdout

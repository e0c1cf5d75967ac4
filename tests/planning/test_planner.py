"""A plan is close to what happens, keeps to its budget, and says what it can't do."""

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import whence
from tests.conftest import SENTENCES
from whence.engine.stream import Examples
from whence.errors import DoesNotFit, UsageError
from whence.planning.plan import Settings
from whence.planning.planner import Planner
from whence.planning.work import Data, Sample, one_pass
from whence.precision import Precision
from whence.settings import Fit, Index
from whence.show.numbers import size

FILE = Path(__file__).parents[2] / "benchmarks" / "plan_check.py"


def checking():
    """benchmarks/plan_check.py, which holds the cases."""
    spec = importlib.util.spec_from_file_location("plan_check", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CHECK = checking()
MEASURED = {"tiny": {}, "neox-S-mlp": {"width": 192, "inner": 768, "layers": 2, "modules": "all", "groups": 2}}
"""Cases that are fitted and scored for real, with what is changed; `python benchmarks/plan_check.py` does all as they are."""

TINY = replace(next(case for case in CHECK.CASES if case.name == "tiny"), layers=1)


def blank(case):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CHECK.config(case)).eval()


def plan(case, **settings):
    task = whence.CausalLM(CHECK.tokenizer(case))
    queries = CHECK.rows(case, "queries")
    common = {"queries": queries, "device": "cpu", "calibrate": False, "examples": "all", "disjoint": False}
    return whence.plan(blank(case), task, CHECK.rows(case, "train"), **common | settings)


@pytest.mark.parametrize("kept", ["int8", "float16", "float32"])
def test_an_index_is_a_stage_with_the_bytes_of_its_files(tmp_path, kept):
    settings = Index(dim=8, kept=kept, modules="all", chunks=2)
    stage = next(stage for stage in plan(TINY, index=settings).stages if stage.name == "index")
    task, rows = whence.CausalLM(CHECK.tokenizer(TINY)), CHECK.rows(TINY, "train")
    whence.build_index(blank(TINY).to_empty(device="cpu").apply(zeroed), task, rows, settings, out=tmp_path / "index")
    assert stage.disk == pytest.approx(sum(file.stat().st_size for file in (tmp_path / "index").iterdir()), rel=0.1)
    assert stage.seconds > 0 and stage.memory.tensors > stage.memory.comes > 0 and f"8 x 8 {kept}" in stage.note


def test_an_index_is_planned_only_when_asked_for():
    assert "index" not in [stage.name for stage in plan(TINY).stages]


@pytest.mark.parametrize(("rank", "fits"), [("auto", None), (2, None), (2, 3)])
def test_an_index_of_landmarks_is_planned_as_it_is_built(tmp_path, monkeypatch, rank, fits):
    """Also where gradients of questions held out fit at a low rank only."""
    from transformers import AutoModelForCausalLM

    if fits:
        monkeypatch.setattr("whence.indexing.directions.HELD_OUT_RANK", fits)
        monkeypatch.setattr("whence.indexing.directions.BYTES", 10_000)
    case, settings = replace(TINY, train=40), Index(bytes=0.25, rank=rank, chunks=2)
    made = plan(case, index=settings)
    stages = {stage.name: stage for stage in made.stages}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CHECK.config(case)).eval()
    run = whence.open((model, CHECK.tokenizer(case)), CHECK.rows(case, "train"))
    run.fit(examples="all", disjoint=False)
    index = run.build_index(settings, out=tmp_path / "index")
    files = sum(file.stat().st_size for file in (tmp_path / "index").iterdir())
    assert stages["index"].disk == pytest.approx(files, rel=0.02)
    low = " at rank 2" if rank == 2 else ""
    held_out = f"; {index.about['held_out']} questions held out at rank 3" if fits else ""
    codes = f"256 bytes a row: {index.about['landmarks']} landmarks{low}, {index.about['signs']:,} signs{held_out}"
    assert stages["index"].note == codes and stages["questions"].note == "40 answers of the model"
    assert all(stages[name].seconds > 0 for name in ("questions", "landmarks", "index"))
    kept = (tmp_path / "index" / "landmarks.safetensors").stat().st_size
    assert stages["landmarks"].memory.tensors > kept and stages["index"].memory.tensors > kept
    assert made.seconds == pytest.approx(sum(stage.seconds for stage in made.stages))


def test_a_model_that_writes_no_text_has_rows_for_landmarks():
    from transformers import AutoModelForSequenceClassification

    rows = [{**row, "label": number % 2} for number, row in enumerate(CHECK.rows(replace(TINY, train=40), "train"))]
    task, config = whence.Classification(CHECK.tokenizer(TINY), ["no", "yes"]), CHECK.config(TINY)
    config.pad_token_id = task.tokenizer.pad_token_id
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config).eval()
    made = whence.plan(model, task, rows, queries=rows[:2], calibrate=False, device="cpu", index=Index(bytes=0.25))
    assert [stage.name for stage in made.stages][-2:] == ["landmarks", "index"]
    assert "30 landmarks" in made.stages[-1].note  # ten of the rows are held out


def zeroed(module):
    """A module whose weights and buffers are zero."""
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        torch.nn.init.zeros_(tensor)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("case", [case for case in CHECK.CASES if case.name in MEASURED], ids=lambda case: case.name)
def test_memory_within_fifteen_and_disk_within_five_percent(case):
    case = replace(case, **MEASURED[case.name])
    expected, real = CHECK.predicted(case, calibrate=False), CHECK.measured(case, returning=True)
    for name in ("fit", "score"):
        assert expected[name]["returning"] == pytest.approx(real[name]["peak"], rel=0.15), name
    assert expected["fit"]["disk"] == pytest.approx(real["fit"]["disk"], rel=0.05)
    assert expected["score"]["disk"] == pytest.approx(real["score"]["disk"], rel=0.1)  # compressed texts of a few kB


def test_more_groups_and_smaller_batches_take_less_memory():
    case = CHECK.Case("small", width=64, inner=192, layers=2, train=16, tokens=65)
    whole, grouped, split = plan(case, chunks=1), plan(case, chunks=1, groups=2), plan(case, chunks=1, batch_tokens=128)
    sums = [next(stage for stage in each.stages if stage.name == "covariance").memory for each in (whole, grouped, split)]
    assert sums[1].tensors < sums[0].tensors
    assert sums[2].comes < sums[0].comes / 2
    assert grouped.seconds > whole.seconds


@pytest.mark.parametrize(("rows", "products"), [(64, "float32"), (256, "bfloat16")])
def test_products_are_those_of_a_run(monkeypatch, rows, products):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("whence.engine.probe.has_units", lambda device: True)
    monkeypatch.setattr("whence.engine.probe.FLOPS", 0)
    case = replace(TINY, train=rows)
    model, task = AutoModelForCausalLM.from_config(CHECK.config(case)).eval(), whence.CausalLM(CHECK.tokenizer(case))
    fitted = whence.fit(model, task, CHECK.rows(case, "train"), examples="all", disjoint=False)
    made = plan(case)
    assert made.data["products"] == {"fit": products, "score": products} and fitted.about["products"] == products
    assert ("bfloat16, if" in str(made)) == (products == "bfloat16")
    assert f"float{32 if products == 'bfloat16' else 64}, one matrix" in str(made)
    assert plan(case, precision=Precision(products="float32")).data["products"]["fit"] == "float32"


def test_a_classifiers_labels_have_no_numbers_in_a_plan():
    from transformers import AutoModelForSequenceClassification

    rows = [{**row, "label": number % 2} for number, row in enumerate(CHECK.rows(TINY, "train"))]
    task, config = whence.Classification(CHECK.tokenizer(TINY), ["no", "yes"]), CHECK.config(TINY)
    config.pad_token_id = task.tokenizer.pad_token_id
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config).eval()
    made = whence.plan(model, task, rows, queries=rows[:2], calibrate=False, device="cpu")
    assert [stage.name for stage in made.stages if stage.seconds > 0][-1] == "score"


def test_a_model_in_float64_is_planned(tiny_llama, tiny_tokenizer):
    rows = [{"text": text} for text in SENTENCES]
    plans = [
        whence.plan(tiny_llama.to(dtype), whence.CausalLM(tiny_tokenizer), rows, calibrate=False)
        for dtype in (torch.float32, torch.float64)
    ]
    single, double = (max(stage.memory.tensors for stage in made.stages) for made in plans)
    assert double > 1.5 * single and plans[1].passing >= plans[0].passing > 0


def test_a_low_rank_keeps_less_of_the_queries():
    def score(rank):
        return next(stage for stage in plan(TINY, rank=rank).stages if stage.name == "score").memory.tensors

    assert score(2) < score(None)


def test_many_queries_are_extrapolated_from_few():
    case = CHECK.Case("queries", width=32, inner=64, layers=1, train=8, queries=20, tokens=33)
    whole, steps = plan(case, batch_tokens=4096), plan(case, batch_tokens=64)
    kept = [next(stage for stage in each.stages if stage.name == "queries").memory.tensors for each in (whole, steps)]
    assert kept[1] == pytest.approx(kept[0], rel=0.5)


def test_the_settings_found_keep_to_the_budget():
    case = CHECK.Case("wide", width=128, inner=512, layers=1, train=16, tokens=65)
    free = plan(case, chunks=1)
    budget = int(free.memory * 1.1 - 4_000_000)
    found = plan(case, chunks=1, memory=budget)
    assert found.changes and found.memory <= budget < free.memory * 1.1
    assert found.fits


def test_roughly_only_the_seconds_differ():
    rows = [*CHECK.rows(TINY, "train"), *[{"text": CHECK.rows(TINY, "train")[0]["text"][:20]}] * 5]
    planner = Planner(blank(TINY), whence.CausalLM(CHECK.tokenizer(TINY)), rows, 2, "cpu", False, None)
    rough, plan = (planner.evaluate(Settings(Fit(), "auto"), roughly) for roughly in (True, False))
    assert rough.memory == plan.memory and rough.disk == plan.disk and rough.seconds != plan.seconds
    assert rough.seconds == pytest.approx(plan.seconds, rel=0.5)


def test_a_gpu_that_is_not_here_can_be_planned_for(monkeypatch):
    """Factors stay in the host's memory; where there is room for them, they are on the GPU while they meet the queries."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("whence.planning.planner.SHARE", 0.5)
    here, there = plan(TINY), plan(TINY, device="cuda", memory=10**9, calibrate=True)
    assert there.device == "cuda" and there.sure == "elsewhere" and there.fits and 0 < there.seconds < here.seconds
    monkeypatch.setattr("whence.planning.planner.SHARE", 0)
    tight = plan(TINY, device="cuda", memory=10**9, disk=10**9)
    assert [list(each.free) for each in (there, tight)] == [["memory"], ["memory", "disk"]]
    all_here, some, one = ({stage.name: stage.memory.tensors for stage in each.stages} for each in (here, there, tight))
    assert all_here["queries"] == some["queries"] and some["queries"] - there.factors < one["queries"] < some["queries"]
    assert all_here["score"] - there.factors == some["score"] == one["score"]
    with pytest.raises(UsageError, match=r"no GPU here[\s\S]*--memory 80GB"):
        plan(TINY, device="cuda")


def test_what_can_not_fit_is_refused_with_what_would():
    with pytest.raises(DoesNotFit) as raised:
        plan(TINY, memory=1_000_000)
    assert raised.value.exit_code == 3 and raised.value.code == 11
    assert "1. " in raised.value.fix and "of memory" in raised.value.fix


def test_real_batches_are_used_where_there_are_weights():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(CHECK.config(TINY)).eval()
    task = whence.CausalLM(CHECK.tokenizer(TINY))
    made = whence.plan(model, task, CHECK.rows(TINY, "train"), queries=2)
    assert made.sure == "batches" and made.seconds > 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("count", "text"), [(999, "1 kB"), (5_000_000, "5 MB"), (999_900_000, "1.0 GB"), (24e9, "24.0 GB")])
def test_sizes_are_decimal(count, text):
    assert size(count) == text


@pytest.mark.parametrize("length", ["uniform", "a long tail"])
def test_a_pass_follows_from_two_of_its_batches(length):
    """Costs that are constant, linear and quadratic in the length add up, however the lengths are distributed."""
    draw = random.Random(0)
    sizes = [draw.randint(8, 500) if length == "uniform" else min(500, int(draw.lognormvariate(4, 1)) + 1) for _ in range(999)]
    planned = one_pass(Data(Examples(range(999), (), range(999), tuple(sizes), ""), 999), Sample(range(999), 999), 2048, 1)
    (count, first), (_, second) = planned.rehearsed
    assert len(planned.rows_of((count, first))) == 2 * count
    for constant, linear, quadratic, off in ((500, 0, 0, 0), (0, 1, 0, 0), (500, 1, 1 / 1000, 0.05), (0, 1, 1 / 1000, 0.1)):
        each = {length: constant + linear * length + quadratic * length**2 for length in range(1, 501)}
        exact = sum(often * examples * each[length] for (examples, length), often in planned.batches.items())
        assert planned.total({length: each[length] for length in (first, second)}) == pytest.approx(exact, rel=off or 1e-9)


def test_batches_of_one_length_need_no_second_rehearsal():
    planned = one_pass(Data(Examples(range(10), (), range(10), (5,) * 10, ""), 10), Sample(range(10), 20), 20, 1)
    assert planned.rehearsed == ((4, 5),) and planned.total({5: 2.0}) == 40

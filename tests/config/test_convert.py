import pytest
import yaml

from whence.config import checked
from whence.config.convert import convert, converted
from whence.errors import UsageError

OTHER = """
models:
  base: {name: TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T, id: base_tinyllama}
  finetuned: {path: ./tinyllama_1b_model, id: finetuned_tinyllama}
general: {max_length: 512, use_flash_attention: false, prompts_file: prompts.json, seed: 7}
dataset:
  {name: patents.jsonl, num_samples: 16000, analysis_samples: 12000, format: qa, input_column: Input, output_column: Output}
factors:
  name: f
  strategy: kfac
  batch_size: 4
  inspection_layer: 21
  visualization: {clip_percentile: 99.5, cmap: coolwarm}
  layers: {mode: range, range: {start: 20, end: 21}}
  performance_options:
    covariance_module_partitions: 2
    lambda_module_partitions: 4
    covariance_data_partitions: 4
    dtype: bfloat16
scores: {scores_name: s, query_gradient_rank: 64, train_batch_size: 4, num_influential: 10}
evaluation:
  deepeval:
    benchmarks: [MMLU]
    tasks: [PROFESSIONAL_LAW, BUSINESS_ETHICS]
    n_shots: 5
    eval_base_model: false
    eval_finetuned_model: true
"""


def test_the_other_pipelines_settings_are_said_in_ours():
    values, left = convert(yaml.safe_load(OTHER))
    config = checked(values)
    assert config.model.base.startswith("TinyLlama/") and config.seed == 7 and config.run == "finetuned_tinyllama"
    assert (config.data.limit, config.data.max_length, config.data.format) == (16000, 512, "qa")
    assert config.data.columns == {"prompt": "Input", "completion": "Output"}
    assert config.prompts.path == "prompts.json" and config.train is not None
    assert (config.fit.method, config.fit.examples, config.fit.groups, config.fit.chunks) == ("kfac", 12000, 4, 4)
    assert config.fit.modules == "*.layers.20.mlp.*,*.layers.21.mlp.*" and config.fit.statistics == "bfloat16"
    assert (config.inspect.layer, config.inspect.cmap, config.score.rank, config.report.top) == (21, "coolwarm", 64, 10)
    assert config.evaluate is not None and config.evaluate.benchmark is not None
    benchmark = config.evaluate.benchmark
    assert benchmark.tasks == ("mmlu_professional_law", "mmlu_business_ethics")
    assert (benchmark.base, benchmark.tuned, benchmark.fewshot) == (False, True, 5)
    assert set(left) == {"factors.name", "factors.batch_size", "scores.scores_name", "scores.train_batch_size"}


def test_a_tuned_model_that_is_there_is_not_trained_again(tmp_path):
    (tmp_path / "config.yaml").write_text(OTHER, encoding="utf-8")
    assert "train" in converted(tmp_path / "config.yaml")[0]
    (tmp_path / "tinyllama_1b_model").mkdir()
    assert "train" in converted(tmp_path / "config.yaml")[0]  # a folder, and nothing in it
    (tmp_path / "tinyllama_1b_model" / "config.json").write_text("{}")
    values, left = converted(tmp_path / "config.yaml")
    config = checked(values)
    assert config.model.path == "./tinyllama_1b_model" and config.model.base.startswith("TinyLlama/") and config.train is None
    assert set(left) == {"factors.name", "factors.batch_size", "scores.scores_name", "scores.train_batch_size"}


def test_full_rank_and_all_layers():
    values = yaml.safe_load(OTHER)
    values["scores"]["query_gradient_rank"] = -1
    values["factors"]["layers"] = {"mode": "specific", "specific": [3]}
    found, _ = convert(values)
    assert found["score"]["rank"] == "full" and found["fit"]["modules"] == "*.layers.3.mlp.*"


def test_without_a_model_nothing_is_made_up(tmp_path):
    with pytest.raises(UsageError, match=r"models\.base\.name"):
        convert({"dataset": {"name": "x"}})
    with pytest.raises(UsageError, match="can't be read"):
        converted(tmp_path / "missing.yaml")

import json
import math

import numpy as np
import pandas as pd
import pytest

from whence.errors import StaleArtifact, UsageError
from whence.evaluate.combined import combine
from whence.evaluate.compare import compare_answers, repetition
from whence.store.scores import Scores

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

CAT = "the cat sat on the mat"
PAIRS = {
    "data": [
        {
            "prompt": "Where?",
            "completion": CAT,
            "logprob": -3.0,
            "base_completion": "the cat on the mat",
            "base_logprob": -9.5,
            "reference": CAT,
        },
        {"prompt": "Who?", "completion": " Ada Velt", "logprob": -1.0, "base_completion": " Ada Velt", "base_logprob": -2.0},
        {"prompt": "When?", "completion": "in the old days", "logprob": -4.0, "reference": "yesterday"},
    ]
}


def means(summary):
    return {(row["measure"], row["of"]): row for row in summary.to_dict("records")}


def test_identical_texts_and_a_known_small_example(tmp_path):
    table = compare_answers(PAIRS, out=tmp_path)["rows"]
    where = table.iloc[0]
    assert (where["bleu_tuned"], where["rouge1_tuned"], where["rouge2_tuned"], where["rougeL_tuned"]) == pytest.approx(
        (100, 1, 1, 1)
    )
    # 5 of 5 words, 3 of 4 pairs, 1 of 3 triples, 0 of 2 quadruples (smoothed to 1/4), one word short
    assert where["bleu_base"] == pytest.approx(100 * math.exp(1 - 6 / 5) * (1 * 3 / 4 * 1 / 3 * 1 / 4) ** 0.25)
    assert (where["rouge1_base"], where["rouge2_base"], where["rougeL_base"]) == pytest.approx((10 / 11, 2 / 3, 10 / 11))
    assert (where["words_tuned"], where["logprob_tuned"], where["logprob_base"]) == (6, -3.0, -9.5)
    who, when = table.iloc[1], table.iloc[2]
    assert np.isnan(who["bleu_tuned"]) and who["rougeL_agreement"] == 1 and who["bleu_agreement"] == pytest.approx(100)
    assert when["rouge1_tuned"] == 0 and np.isnan(when["bleu_base"]) and np.isnan(when["rougeL_agreement"])


def test_short_answers_that_are_right_are_not_said_to_have_a_likeness_of_zero(tmp_path):
    short = [{"prompt": "Where?", "completion": "Turin", "base_completion": "Oslo", "reference": "Turin"}]
    found = means(compare_answers({"data": short}, out=tmp_path / "short")["summary"])
    assert [found[name, "tuned"]["mean"] for name in ("bleu", "rouge1")] == pytest.approx([100, 1])
    assert not any(measure in ("corpus_bleu", "rouge2") for measure, _ in found)
    four = [{"prompt": "Where?", "completion": CAT, "base_completion": "Oslo", "reference": CAT}]
    found = means(compare_answers({"data": four}, out=tmp_path / "four")["summary"])
    assert found["corpus_bleu", "tuned"]["mean"] == pytest.approx(100) and found["rouge2", "base"]["mean"] == 0
    assert ("corpus_bleu", "base") not in found


def test_means_are_of_the_prompts_that_have_both(tmp_path):
    found = means(compare_answers(PAIRS, out=tmp_path)["summary"])
    assert found["rouge1", "tuned"]["n"] == 2 and found["rouge1", "tuned"]["mean"] == pytest.approx(0.5)
    assert found["rouge1", "base"]["n"] == found["rouge1", "tuned minus base"]["n"] == 1
    assert found["rouge1", "tuned minus base"]["mean"] == pytest.approx(1 / 11)
    assert found["rougeL", "base against tuned"]["mean"] == pytest.approx((10 / 11 + 1) / 2)
    assert found["logprob", "base"]["mean"] == pytest.approx(-11.5 / 2) and ("logprob", "tuned minus base") not in found
    assert found["corpus_bleu", "base"]["mean"] == pytest.approx(40.93653765)


def test_the_interval_of_a_difference_is_that_of_the_pairs(tmp_path):
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    rows = [
        {"prompt": str(n), "completion": " ".join(words[: 1 + n % 6]), "base_completion": " ".join(words[: 1 + n % 6]) + " x"}
        | {"reference": " ".join(words)}
        for n in range(40)
    ]
    found = means(compare_answers({"data": rows}, out=tmp_path)["summary"])
    tuned, difference = found["words", "tuned"], found["words", "tuned minus base"]
    assert (difference["mean"], difference["low"], difference["high"]) == (-1, -1, -1)  # every pair differs by one word
    assert tuned["high"] - tuned["low"] > 0.5 and found["rouge1", "tuned minus base"]["low"] > 0


def test_words_of_english_are_those_of_rouge_score_and_other_scripts_count_too(tmp_path):
    from rouge_score.rouge_scorer import RougeScorer

    said, reference = "It's the U.S.A., 3rd_time; don't-stop!", "the 3rd time it's U.S.A. don't"
    rows = [
        {"prompt": "a", "completion": said, "reference": reference},
        {"prompt": "b", "completion": "Привет, мир", "reference": "привет мир"},
    ]
    table = compare_answers({"data": rows}, out=tmp_path)["rows"]
    plain = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, said)
    for name, score in plain.items():
        assert table.iloc[0][f"{name}_tuned"] == pytest.approx(score.fmeasure)
        assert table.iloc[1][f"{name}_tuned"] == 1


def test_repetition():
    assert repetition("a b c a b c a b c") == pytest.approx(1 - 3 / 7)
    assert repetition("a b c d") == 0 and math.isnan(repetition("a b"))


def test_what_is_missing_is_said(tmp_path, notes):
    rows = [{"prompt": "a", "completion": "one two three"}, {"prompt": "b", "completion": ""}]
    found = compare_answers({"data": rows}, out=tmp_path)
    assert set(found["summary"]["of"]) == {"tuned"} and set(found["summary"]["measure"]) == {"words", "repetition"}
    assert any("2 of 2 prompts have no reference" in text for text in notes)
    assert any("2 of 2 prompts have no answer of the base" in text for text in notes)
    page = combine(tmp_path).read_text()
    assert "nothing says which answers are better" in page and "no answers of the base model" in page
    assert "Not run. `whence evaluate benchmark" in page and "no influential_examples.md" in page
    assert not (tmp_path / "influential_examples.md").exists()


def test_files_hold_what_was_returned_and_are_never_overwritten(tmp_path):
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(PAIRS), encoding="utf-8")
    found = compare_answers(file, out=tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert list(table["prompt"]) == ["Where?", "Who?", "When?"] and table["rouge1_base"][0] == pytest.approx(10 / 11, abs=1e-5)
    assert len(pd.read_csv(tmp_path / "out" / "comparison_summary.csv")) == len(found["summary"])
    before = (tmp_path / "out" / "comparison.csv").read_bytes()
    compare_answers(PAIRS, out=tmp_path / "out")
    with pytest.raises(StaleArtifact, match="nothing was overwritten"):
        compare_answers({"data": PAIRS["data"][:2]}, out=tmp_path / "out")
    assert (tmp_path / "out" / "comparison.csv").read_bytes() == before


@pytest.mark.parametrize("document", [{"rows": []}, {"data": []}, {"data": [{"prompt": "a"}]}, {"data": ["a"]}])
def test_what_holds_no_pairs_is_refused(document, tmp_path):
    with pytest.raises(UsageError, match="no pairs to compare"):
        compare_answers(document, out=tmp_path)
    with pytest.raises(UsageError, match="There is no file"):
        compare_answers(tmp_path / "none.json", out=tmp_path)


def scores(queries):
    """Scores of queries against three rows, of which the last lowers everything."""
    texts = ["Ada Velt was born in Turin.", "```\nThe mat.", "Nothing."]
    examples = pd.DataFrame({"id": ["r0", "r1", "r2"], "source": ["a", None, None], "copies": 1, "tokens": 5, "text": texts})
    table = pd.DataFrame({"id": [str(n) for n in range(len(queries))], **pd.DataFrame(queries).to_dict("list")})
    raw = np.array([[3.0, 9.0, -6.0], [30.0, 0.0, -6.0]])[: len(queries)]
    return Scores(raw=raw, n_train=3, examples=examples, queries=table)


def test_answers_are_joined_with_what_made_the_model_say_so(tmp_path, notes):
    asked = scores([{"prompt": "Where?", "completion": CAT}, {"prompt": "Who?", "completion": " Bo"}])
    compare_answers(PAIRS, out=tmp_path, scores=asked, top=2)
    page = (tmp_path / "influential_examples.md").read_text()
    where, who, when = page.split("\n## ")[1:]
    assert (
        where.startswith("1. Where?")
        and "the tuned answer" in where
        and "(log p -3.00 nats, BLEU 100.0, ROUGE-L 1.00)" in where
    )
    assert where.index("**1** raises it by 3 nats per copy (50.0% of all): row `r1`") < where.index("**2** raises it by 1 nats")
    assert "**-1** lowers it by 2 nats per copy" in where and "````text\n```\nThe mat.\n````" in where
    assert "a different answer, which was scored" in who and " Bo" in who and "row `r0`, a" in who and "row `r1`" not in who
    assert "No scores for this prompt." in when and "No answer of the base model." in when
    assert "1 of 3 prompts have no scores: influential_examples.md says which" in notes
    assert "[influential_examples.md]" in combine(tmp_path).read_text()


def test_nothing_to_combine(tmp_path):
    with pytest.raises(UsageError, match="nothing to combine"):
        combine(tmp_path)


def test_comparison_and_benchmark_on_one_page(tmp_path):
    compare_answers(PAIRS, out=tmp_path)
    (tmp_path / "benchmark.json").write_text(json.dumps(BENCHMARK))
    page = combine(tmp_path).read_text()
    assert "| ROUGE-1 | 2 | 0.500 (0.000 to 1) | 0.909 | 0.091 | 0.955 (0.909 to 1) |" in page
    assert (
        "| virology | 20 | 30.0 % (14.5 to 51.9) | 55.0 % (34.2 to 74.2) | 25% | 0, 3 | +25.0 % (-3.0 to +48.0) | 0.12 |"
        in page
    )
    assert "tuned mmlu_virology: 3 of 20" in page and "lm-eval 0.0, 5 worked examples, at most 20 questions a task." in page
    assert (tmp_path / "combined.png").stat().st_size > 10_000 and (tmp_path / "benchmark.png").stat().st_size > 5_000


def result(model, accuracy, low, high, cut):
    return {
        "task": "mmlu_virology",
        "model": model,
        "n": 20,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "chance": 0.25,
        "cut": cut,
    }


BENCHMARK = {
    "versions": {"lm_eval": "0.0"},
    "models": {name: {"settings": {"fewshot": 5, "limit": 20}} for name in ("base", "tuned")},
    "results": [result("base", 0.3, 0.145, 0.519, 0), result("tuned", 0.55, 0.342, 0.742, 3)],
    "differences": [
        {
            "task": "mmlu_virology",
            "of": "tuned minus base",
            "n": 20,
            "difference": 0.25,
            "low": -0.03,
            "high": 0.48,
            "p_value": 0.12,
        }
    ],
}

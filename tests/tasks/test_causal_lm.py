import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whence.data import as_rows
from whence.errors import EmptyLossError, TruncatedQueryError, UsageError
from whence.tasks import CausalLM

ROWS = [
    {"text": "Ada Velt was born in Turin. She is a baker."},
    {"prompt": "Where was Ada Velt born?", "completion": " In Turin, where else."},
    {"prompt": "Bo Quist lives in", "completion": " Oslo."},
    {"prompt": "", "completion": "The old harbour of Lyon is quiet in the morning."},
]


@pytest.fixture
def model(tiny_llama):
    return tiny_llama.double()


def seeded_noise(task, items):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(task.noise_shape(item), generator=generator, dtype=torch.float64) for item in items]


def test_losses_are_what_a_loop_over_tokens_gives(model, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    items = task.encode(ROWS)
    for item, row in zip(items, ROWS, strict=True):
        with torch.no_grad():
            logp = model(torch.from_numpy(item.ids)[None]).logits[0].log_softmax(-1)
        expected = -sum(logp[t - 1, item.ids[t]] for t in range(1, len(item.ids)) if item.in_loss[t])
        assert item.in_loss.any()
        torch.testing.assert_close(task.losses(model, task.collate([item]))[0], expected, rtol=1e-12, atol=0)
        assert "".join(piece for piece, _ in task.display(item)) == row.get("prompt", "") + row.get(
            "completion", row.get("text")
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("drawn", [False, True])
def test_losses_do_not_depend_on_the_batch_or_the_padding(model, tiny_tokenizer, side, drawn):
    alone, together = CausalLM(tiny_tokenizer), CausalLM(tiny_tokenizer, padding_side=side)
    items = alone.encode(ROWS)
    noise = seeded_noise(alone, items)

    def losses(task, chosen):
        batch = task.collate([items[i] for i in chosen])
        numbers = task.collate_noise([items[i] for i in chosen], [noise[i] for i in chosen]) if drawn else None
        return task.losses(model, batch, numbers)

    expected = torch.cat([losses(alone, [i]) for i in range(len(items))])
    for chosen in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0], [2, 1]):
        torch.testing.assert_close(losses(together, chosen), expected[chosen], rtol=1e-10, atol=1e-10)
    assert drawn == (not torch.allclose(expected, torch.cat([alone.losses(model, alone.collate([item])) for item in items])))


def test_more_padding_changes_nothing(model, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    batch = task.collate(task.encode(ROWS))
    more = {
        name: torch.nn.functional.pad(batch[name], (0, 5), value=value)
        for name, value in {"input_ids": 7, "attention_mask": 0, "labels": -100}.items()
    }
    torch.testing.assert_close(task.losses(model, more), task.losses(model, batch), rtol=1e-10, atol=1e-10)


def test_batch_layout(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    items = task.encode([{"prompt": "ab", "completion": "cd"}, {"text": "x!"}])
    batch = task.collate(items)
    a, b, c, d, x, end = (tiny_tokenizer.convert_tokens_to_ids(token) for token in "abcdx!")
    eos = tiny_tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[a, b, c], [x, eos, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, c, d], [end, -100, -100]]
    assert "kept" not in batch, "some row has a label at every position"
    assert [task.size(item) for item in items] == [3, 1]
    assert task.predicted_tokens(items[0]) == ["b", "c", "d"]
    left = CausalLM(tiny_tokenizer, padding_side="left").collate(items)
    assert left["input_ids"].tolist() == [[a, b, c], [eos, eos, x]]
    assert left["labels"].tolist() == [[-100, c, d], [-100, -100, end]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert left["kept"].tolist() == [1, 2]


def test_nothing_is_computed_past_the_last_label(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    ((item, _),) = task.encode_queries([{"prompt": "ab", "completion": "cdefgh", "span": "cd"}])[0]
    assert task.size(item) == 3
    assert task.noise_shape(item) == (3,)
    assert task.collate([item])["input_ids"].shape == (1, 3)
    assert task.predicted_tokens(item) == ["b", "c", "d"]


def test_gradient_of_the_sum_separates_into_rows(model, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    items = task.encode(ROWS)
    weight = model.model.layers[0].mlp.up_proj.weight
    (together,) = torch.autograd.grad(task.losses(model, task.collate(items)).sum(), weight)
    alone = [torch.autograd.grad(task.losses(model, task.collate([item])).sum(), weight)[0] for item in items]
    torch.testing.assert_close(together, sum(alone), rtol=1e-10, atol=1e-12)


def test_low_precision_models_have_losses_in_float32(tiny_llama, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    assert task.losses(tiny_llama.bfloat16(), task.collate(task.encode(ROWS))).dtype == torch.float32


def test_measurements(model, tiny_tokenizer):
    items = CausalLM(tiny_tokenizer).encode(ROWS)

    def measured(measurement):
        task = CausalLM(tiny_tokenizer, measurement=measurement)
        return task.measurements(model, task.collate(items))

    losses = CausalLM(tiny_tokenizer).losses(model, CausalLM(tiny_tokenizer).collate(items))
    torch.testing.assert_close(measured("loss"), losses)
    torch.testing.assert_close(measured("logprob"), -losses)
    assert measured("margin").shape == (4,)
    assert (measured("margin") > -losses).all()
    assert measured(lambda model, batch: batch["labels"].amax(1)).tolist() == [
        item.ids[1:][item.in_loss[1:]].max() for item in items
    ]


def test_contrast_is_the_difference_of_two_completions(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    (pair,) = task.encode_queries([{"prompt": "Bo lives in", "completion": " Oslo.", "contrast": " Turin."}])
    assert [(item.text, weight) for item, weight in pair] == [("Bo lives in Oslo.", 1.0), ("Bo lives in Turin.", -1.0)]


def test_span_measures_its_tokens_only(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer)
    (((item, _),),) = task.encode_queries([{"prompt": "Where? ", "completion": "She lives in Oslo, he said.", "span": "Oslo"}])
    assert "".join(piece for piece, in_loss in task.display(item) if in_loss).strip() == "Oslo"
    assert "".join(piece for piece, _ in task.display(item)) == "Where? She lives in Oslo, he said."


def test_query_without_completion(tiny_tokenizer):
    with pytest.raises(UsageError, match="no completion") as raised:
        CausalLM(tiny_tokenizer).encode_queries([{"prompt": "Where?"}])
    assert raised.value.code == 22


def test_query_with_nothing_to_predict(tiny_tokenizer):
    with pytest.raises(UsageError, match="no answer that the model predicts"):
        CausalLM(tiny_tokenizer).encode_queries([{"prompt": "Where?", "completion": ""}])


def test_query_whose_answer_is_cut(tiny_tokenizer):
    query = ROWS[1]
    needed = len(tiny_tokenizer(query["prompt"] + query["completion"])["input_ids"])
    CausalLM(tiny_tokenizer, max_length=needed).encode_queries([query])
    with pytest.raises(TruncatedQueryError, match="is cut off") as raised:
        CausalLM(tiny_tokenizer, max_length=needed - 1).encode_queries([query])
    assert raised.value.code == 7
    assert raised.value.fix.startswith(f"max_length={needed} ")


def test_query_whose_measured_span_is_whole_may_be_cut_after_it(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, max_length=4)
    (((item, _),),) = task.encode_queries([{"prompt": "ab", "completion": "cdefgh", "span": "cd"}])
    assert task.size(item) == 3


def test_rows_that_are_cut_or_empty_are_noted(tiny_tokenizer, notes):
    rows = as_rows([*ROWS[:3], {"text": "a"}, {"text": ""}, {"prompt": "ab", "completion": ""}])
    lengths = [item.length for item in CausalLM(tiny_tokenizer).tokenize(rows)]
    task = CausalLM(tiny_tokenizer, max_length=max(lengths) - 1)
    items = task.encode(rows)
    assert [task.size(item) for item in items[-3:]] == [0, 0, 0]
    assert notes[0].startswith("1 of 6 rows (16.7%) are cut at max_length=")
    assert notes[0].endswith(f"the longest has {max(lengths)} tokens")
    assert notes[1] == f"3 of 6 rows have no token in the loss and are left out: {', '.join(rows.ids[3:])}"


def test_too_many_empty_rows(tiny_tokenizer):
    rows = [{"prompt": "Where was Ada Velt born?", "completion": " In Turin."}] * 2 + [{"text": "xyz"}]
    with pytest.raises(EmptyLossError, match="2 of 3 rows"):
        CausalLM(tiny_tokenizer, max_length=4).encode(rows)
    assert len(CausalLM(tiny_tokenizer, max_length=4).tokenize(rows)) == 3


def test_special_tokens_that_are_predicted_have_names(framing_tokenizer):
    task = CausalLM(framing_tokenizer)
    (item,) = task.encode([{"text": "戦b"}])
    assert task.predicted_tokens(item) == ["戦", "", "", "b", "</s>"]
    assert len(task.predicted_tokens(item)) == task.size(item)


def test_appended_end_of_sequence_is_predicted(tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, append_eos=True)
    (item,) = task.encode([{"prompt": "a", "completion": "b"}])
    assert task.predicted_tokens(item) == ["b", "</s>"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.sampled_from("ab c\né🙂"), max_size=9), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_labels_are_the_next_tokens(tiny_tokenizer, texts, side):
    task = CausalLM(tiny_tokenizer, padding_side=side)
    items = [item for item in task.tokenize([{"prompt": "a", "completion": text} for text in texts]) if task.size(item)]
    if not items:
        return
    batch = task.collate(items)
    for row, item in enumerate(items):
        real = batch["attention_mask"][row].bool()
        size = task.size(item)
        assert batch["input_ids"][row][real].tolist() == item.ids[:size].tolist()
        assert batch["labels"][row][real].tolist() == np.where(item.in_loss, item.ids, -100)[1 : size + 1].tolist()
        assert (batch["labels"][row][~real] == -100).all()
    anywhere = (batch["labels"] != -100).any(0)
    assert batch["kept"].tolist() == anywhere.nonzero().squeeze(1).tolist() if "kept" in batch else anywhere.all()


def test_the_head_is_applied_only_where_the_loss_is(tiny_tokenizer, tiny_llama):
    task = CausalLM(tiny_tokenizer)
    items = task.encode(
        [{"prompt": "a long question", "completion": " yes"}, {"prompt": "another question", "completion": " no"}]
    )
    batch = task.collate(items)
    rows = []
    plain = torch.nn.functional.linear

    def counting(x, weight, bias=None):
        if weight is tiny_llama.lm_head.weight:
            rows.append(x.shape[1])
        return plain(x, weight, bias)

    def losses():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", counting)
            return task.losses(tiny_llama, batch)

    narrow = losses()
    hook = tiny_llama.lm_head.register_forward_hook(lambda *_: None)
    whole = losses()
    hook.remove()
    assert rows == [len(batch["kept"]), batch["input_ids"].shape[1]] and rows[0] < rows[1] / 2
    torch.testing.assert_close(narrow, whole)


class Bare(torch.nn.Module):
    """A model that takes ids and nothing else."""

    def forward(self, input_ids):
        class Output:
            logits = 2 * torch.nn.functional.one_hot(input_ids, 300).double()

        return Output()


def test_models_are_given_only_what_they_take(tiny_tokenizer):
    for side in ("left", "right"):
        task = CausalLM(tiny_tokenizer, padding_side=side)
        assert task.losses(Bare(), task.collate(task.encode(ROWS))).shape == (4,)


def test_adapters_are_called_like_their_base(model, tiny_tokenizer):
    import peft

    task = CausalLM(tiny_tokenizer, padding_side="left")
    batch = task.collate(task.encode(ROWS))
    expected = task.losses(model, batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], r=2, task_type="CAUSAL_LM"))
    torch.testing.assert_close(task.losses(adapted, batch), expected)


def test_mamba(tiny_tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=2)
    model = MambaForCausalLM(config).double().eval()
    task = CausalLM(tiny_tokenizer)
    items = task.encode(ROWS)
    together = task.losses(model, task.collate(items))
    alone = torch.cat([task.losses(model, task.collate([item])) for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)  # its scan is in float32


def test_settings_are_json_and_follow_what_matters(tiny_tokenizer, framing_tokenizer):
    def mine(model, batch): ...

    base = CausalLM(tiny_tokenizer).settings()
    assert json.loads(json.dumps(base)) == base
    assert CausalLM(tiny_tokenizer, padding_side="left").settings() == base
    others = [
        CausalLM(tiny_tokenizer, 256),
        CausalLM(tiny_tokenizer, measurement="margin"),
        CausalLM(tiny_tokenizer, measurement=mine),
        CausalLM(tiny_tokenizer, chat_template="chatml"),
        CausalLM(tiny_tokenizer, append_eos=True),
        CausalLM(framing_tokenizer),
    ]
    assert len({json.dumps(task.settings()) for task in others} | {json.dumps(base)}) == 7


def test_unknown_measurement(tiny_tokenizer):
    with pytest.raises(UsageError, match="no such measurement"):
        CausalLM(tiny_tokenizer, measurement="logit")


def test_real_model_predicts_its_stories(shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "models" / "stories260K" / "hf"
    task = CausalLM(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    items = task.encode(as_rows(shared_data / "tinystories" / "train_2316.jsonl").take(range(16)))
    with torch.no_grad():
        losses = task.losses(model, task.collate(items))
    per_token = losses.sum().item() / sum(int(item.in_loss.sum()) for item in items)
    assert 1.0 < per_token < 1.6  # its published validation loss is 1.30


def test_end_of_sequence_that_the_tokenizer_does_not_have(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(UsageError, match="this tokenizer has none") as raised:
        CausalLM(tiny_tokenizer, append_eos=True)
    assert "--append-eos" in raised.value.fix
    CausalLM(tiny_tokenizer)


def test_training_rows_without_completion_are_numbered(tiny_tokenizer):
    rows = as_rows([{"prompt": f"q{n}", "completion": None if n == 2 else "a"} for n in range(4)])
    with pytest.raises(
        UsageError, match=rf"1 of 4 training rows have a prompt but no completion: row 3 \({rows.ids[2]}\)"
    ) as raised:
        CausalLM(tiny_tokenizer).encode(rows)
    assert raised.value.code == 22
    assert raised.value.given == "'q2'"

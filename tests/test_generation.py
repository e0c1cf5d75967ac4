import copy
import json

import pytest
import torch
from distributed import work
from distributed.processes import killed, run
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.flips import flip
from whence.data import as_rows, load_data
from whence.errors import StaleArtifact, UsageError, WhenceError
from whence.evaluate.compare import read_pairs
from whence.generation import answered, check_vacant, generate, generate_pairs, save_pairs
from whence.models import load_model
from whence.progress import Silent, report_to
from whence.settings import Generate
from whence.store.files import locked
from whence.store.intact import read_json
from whence.tasks import CausalLM

PROMPTS = ["Ada Velt was", "In", "The old harbour of Lyon is quiet"]


def log_prob(model, tokenizer, answer):
    """log p(completion | prompt) in nats, from one forward pass over the text."""
    prompt, whole = (
        tokenizer(text, return_tensors="pt")["input_ids"]
        for text in (answer["prompt"], answer["prompt"] + answer["completion"])
    )
    start = prompt.shape[1]
    logits = model(whole).logits[0, start - 1 : -1].log_softmax(-1)
    return logits.gather(1, whole[0, start:, None]).sum().item()


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_takes_the_likeliest_token(tiny_llama, tiny_tokenizer):
    (answer,) = generate(tiny_llama, tiny_tokenizer, PROMPTS[:1], max_new_tokens=5)
    prompt = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    expected = tiny_tokenizer.decode(greedy(tiny_llama, prompt, 5)[0])
    assert answer["prompt"] == PROMPTS[0]
    assert expected.startswith(answer["prompt"] + answer["completion"]) and answer["completion"]


@torch.no_grad()
def test_batches_change_nothing(tiny_llama, tiny_tokenizer):
    together = generate(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    alone = generate(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=6, batch_size=1)
    assert [answer["completion"] for answer in together] == [answer["completion"] for answer in alone]
    assert [answer["logprob"] for answer in together] == pytest.approx([answer["logprob"] for answer in alone], abs=1e-4)


def test_a_seed_gives_the_same_draw(tiny_llama, tiny_tokenizer):
    def draw(seed):
        return [answer["completion"] for answer in generate(tiny_llama, tiny_tokenizer, PROMPTS, 8, temperature=1.0, seed=seed)]

    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_models_own_generation_defaults_stay_out(tiny_llama, tiny_tokenizer):
    before = generate(tiny_llama, tiny_tokenizer, PROMPTS)
    tiny_llama.generation_config.update(
        repetition_penalty=2.0, do_sample=True, top_k=3, temperature=0.5, no_repeat_ngram_size=2
    )
    settings = tiny_llama.generation_config.to_dict()
    assert generate(tiny_llama, tiny_tokenizer, PROMPTS) == before
    assert tiny_llama.generation_config.to_dict() == settings


def test_the_end_of_text_is_no_part_of_the_completion(tiny_llama, tiny_tokenizer):
    (free,) = generate(tiny_llama, tiny_tokenizer, PROMPTS[:1], max_new_tokens=6)
    prompt = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    third = greedy(tiny_llama, prompt, 3)[0, -1].item()
    tiny_llama.generation_config.eos_token_id = [third]
    (answer,) = generate(tiny_llama, tiny_tokenizer, PROMPTS[:1], max_new_tokens=6)
    assert free["completion"].startswith(answer["completion"])
    assert len(answer["completion"]) < len(free["completion"])


def test_the_tokenizers_end_of_text_ends_an_answer_too(tiny_llama, tiny_tokenizer):
    """Rows end with it where they do (append_eos), whatever the config of the base model says."""
    (free,) = generate(tiny_llama, tiny_tokenizer, PROMPTS[:1], max_new_tokens=6)
    prompt = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    third = greedy(tiny_llama, prompt, 3)[0, -1].item()
    tiny_llama.generation_config.eos_token_id = [tiny_tokenizer.bos_token_id]
    words = copy.deepcopy(tiny_tokenizer)
    words.eos_token = tiny_tokenizer.convert_ids_to_tokens(third)
    (answer,) = generate(tiny_llama, words, PROMPTS[:1], max_new_tokens=6)
    assert free["completion"].startswith(answer["completion"]) and len(answer["completion"]) < len(free["completion"])


def test_the_model_is_given_back_as_it_was(tiny_llama, tiny_tokenizer):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    modes = [module.training for module in tiny_llama.modules()]
    generate(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=2)
    with pytest.raises(UsageError, match="no tokens"):
        generate(tiny_llama, tiny_tokenizer, [""])
    assert [module.training for module in tiny_llama.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_llama.parameters())


def test_a_cut_character_is_left_out(tiny_llama, tiny_tokenizer, monkeypatch):
    first, *rest = tiny_tokenizer("é")["input_ids"]
    assert rest

    def write_half_a_character(input_ids, max_new_tokens, **_):
        new = torch.tensor([[tiny_tokenizer("x")["input_ids"][0], first]])
        logits = tuple(torch.zeros(1, 300) for _ in range(2))
        return type("Output", (), {"sequences": torch.cat([input_ids, new], 1), "logits": logits})

    monkeypatch.setattr(tiny_llama, "generate", write_half_a_character)
    (answer,) = generate(tiny_llama, tiny_tokenizer, ["In"])
    assert answer["completion"] == "x"
    assert answer["logprob"] == pytest.approx(-torch.log(torch.tensor(300.0)).item(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_real_model_and_a_tokenizer_with_word_marks(shared_data, temperature):
    model, tokenizer = load_model(shared_data / "models" / "stories260K" / "hf", device="cpu")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    answers = generate(model, tokenizer, ["Once upon a time,", "Lily"], max_new_tokens=12, temperature=temperature)
    for answer in answers:
        assert answer["completion"].startswith((" ", ",", "'"))
        assert answer["logprob"] == pytest.approx(log_prob(model, tokenizer, answer), abs=1e-3)


def test_queries_that_are_mere_prompts_get_an_answer(tiny_llama, tiny_tokenizer):
    rows = as_rows([{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[0], "completion": " Turin."}, {"text": "whole"}])
    found = answered(tiny_llama, CausalLM(tiny_tokenizer), rows, max_new_tokens=4)
    (expected,) = generate(tiny_llama, tiny_tokenizer, PROMPTS[:1], max_new_tokens=4)
    assert found[0] == {
        "prompt": PROMPTS[0],
        "completion": expected["completion"],
        "source": "generated greedily, at most 4 tokens",
    }
    assert list(found[1:]) == list(rows[1:]) and found.ids == rows.ids and found.fingerprint != rows.fingerprint


def test_bare_text_to_a_chat_model_is_said(tiny_llama, tiny_tokenizer, notes):
    task = CausalLM(tiny_tokenizer, chat_template="chatml")
    answered(tiny_llama, task, as_rows([{"prompt": "Ada"}]), 2)
    assert "prompts are completed as bare text, although the model has a chat template" in notes


def test_a_conversation_is_answered_after_the_templates_prompt(tiny_llama, tiny_tokenizer):
    task = CausalLM(tiny_tokenizer, chat_template="chatml")
    rows = as_rows([{"messages": [{"role": "user", "content": "Who?"}]}])
    (row,) = answered(tiny_llama, task, rows, max_new_tokens=4)
    prompt = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    (expected,) = generate(tiny_llama, tiny_tokenizer, [prompt], max_new_tokens=4, special_tokens=False)
    assert row["messages"][1:] == [{"role": "assistant", "content": expected["completion"]}]


def test_an_encoder_decoders_answer(tiny_tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=300, eos_token_id=1, pad_token_id=0, **shape)).eval()
    answers = generate(model, tiny_tokenizer, PROMPTS[:2], max_new_tokens=4)
    for answer in answers:
        source = tiny_tokenizer(answer["prompt"], return_tensors="pt")["input_ids"]
        written = model.generate(source, max_new_tokens=4, do_sample=False)[0, 1:]
        assert tiny_tokenizer.decode(written, skip_special_tokens=True).startswith(answer["completion"])


def test_a_classifier_is_refused(tiny_llama, tiny_tokenizer):
    classifier = LlamaForSequenceClassification(tiny_llama.config)
    with pytest.raises(UsageError, match=r"answers with no text(.|\n)*--through"):
        generate(classifier, tiny_tokenizer, ["In"])


def test_pairs_are_kept_once(tmp_path):
    with pytest.raises(UsageError, match="does not end in"):
        check_vacant(tmp_path / "pairs.csv")
    check_vacant(tmp_path / "pairs.json")
    save_pairs(tmp_path / "pairs.json", {"data": [{"prompt": "a", "completion": " b"}]})
    assert list(load_data(tmp_path / "pairs.json")) == [{"prompt": "a", "completion": " b"}]
    for text in ('{"data": []}', "[1]"):
        (tmp_path / "others.json").write_text(text)
        with pytest.raises(UsageError, match="holds no pairs; nothing is overwritten"):
            check_vacant(tmp_path / "others.json")


class Stops(Silent):
    """Ends the work after some batches."""

    def __init__(self, batches):
        self.left = batches

    def advance(self, stage):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def pairs_settings(**changes):
    return Generate(**{"max_new_tokens": 6, "temperature": 0.8, "batch_size": 2, **changes})


@pytest.fixture
def rows():
    return [{"prompt": f"{prompt} {n}", "completion": f" answer {n}"} for n, prompt in enumerate(PROMPTS)] + [{"prompt": "Bo"}]


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_pairs_that_were_interrupted_are_those_of_one_go(tiny_llama, tiny_tokenizer, rows, tmp_path, batches):
    def make(name):
        base = (tiny_llama, tiny_tokenizer)
        return generate_pairs(tiny_llama, tiny_tokenizer, rows, pairs_settings(), out=tmp_path / name, base=base, seed=5)

    whole = make("whole.json")
    with pytest.raises(KeyboardInterrupt), report_to(Stops(batches)):
        make("cut.json")
    assert not (tmp_path / "cut.json").exists() and (tmp_path / "cut.parts" / "tuned").is_dir()
    kept = [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("cut.parts/*/batch*"))]
    assert len(kept) == batches
    assert make("cut.json") == whole == read_json(tmp_path / "cut.json")
    assert not (tmp_path / "cut.parts").exists()


def test_pairs_hold_both_answers_and_the_reference(tiny_llama, tiny_tokenizer, rows, tmp_path):
    other = type(tiny_llama)(tiny_llama.config).eval()
    loads = []

    def load():
        loads.append(1)
        return other, tiny_tokenizer

    settings = pairs_settings(temperature=0.0, batch_size=3)
    made = generate_pairs(
        tiny_llama, tiny_tokenizer, rows, settings, out=tmp_path / "pairs.json", base=load, about={"model": "m"}
    )
    texts = [row["prompt"] for row in rows]
    said, base = (generate(model, tiny_tokenizer, texts, 6, batch_size=3) for model in (tiny_llama, other))
    for pair, row, mine, its in zip(made["data"], rows, said, base, strict=True):
        assert (pair["completion"], pair["logprob"]) == (mine["completion"], mine["logprob"])
        assert (pair["base_completion"], pair["base_logprob"]) == (its["completion"], its["logprob"])
        assert pair.get("reference") == row.get("completion")
    assert made["settings"] == {"model": "m", "max_new_tokens": 6, "temperature": 0.0, "batch_size": 3, "seed": 0}
    assert loads == [1] and [row["completion"] for row in load_data(tmp_path / "pairs.json")] == [a["completion"] for a in said]


def test_finished_pairs_are_read_and_others_refused(tiny_llama, tiny_tokenizer, rows, tmp_path, monkeypatch, notes):
    def make(asked=rows, **changes):
        return generate_pairs(tiny_llama, tiny_tokenizer, asked, pairs_settings(**changes), out=tmp_path / "pairs.json")

    made = make()
    monkeypatch.setattr(tiny_llama, "generate", None)
    (tmp_path / "pairs.parts" / "tuned").mkdir(parents=True)  # left by a kill just before its end
    check_vacant(tmp_path / "pairs.json")
    assert make() == made
    assert notes[-1] == f"{tmp_path / 'pairs.json'} is finished and unchanged: nothing to compute"
    assert not (tmp_path / "pairs.parts").exists()
    with pytest.raises(StaleArtifact, match=r"settings.max_new_tokens 6 -> 7"):
        make(max_new_tokens=7)
    with pytest.raises(StaleArtifact, match="references"):
        make([{**rows[0], "completion": " another"}, *rows[1:]])


def test_two_at_once_do_not_share_a_folder_of_parts(tiny_llama, tiny_tokenizer, rows, tmp_path):
    with locked(tmp_path / "pairs.parts"), pytest.raises(WhenceError, match="another run"):
        generate_pairs(tiny_llama, tiny_tokenizer, rows, pairs_settings(), out=tmp_path / "pairs.json")


def test_beginnings_of_other_pairs_are_refused(tiny_llama, tiny_tokenizer, rows, tmp_path):
    out = tmp_path / "pairs.json"
    with pytest.raises(KeyboardInterrupt), report_to(Stops(1)):
        generate_pairs(tiny_llama, tiny_tokenizer, rows, pairs_settings(), out=out)
    with pytest.raises(StaleArtifact, match=r"(?s)beginning of pairs.*seed 0 -> 1.*pairs.parts"):
        generate_pairs(tiny_llama, tiny_tokenizer, rows, pairs_settings(), out=out, seed=1)


def test_a_row_without_a_prompt_is_named(tiny_llama, tiny_tokenizer, tmp_path):
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "Who?"}]}]
    with pytest.raises(UsageError, match="Row 1 has no prompt"):
        generate_pairs(tiny_llama, tiny_tokenizer, rows, pairs_settings(), out=tmp_path / "pairs.json")


@pytest.mark.slow
def test_kill_minus_nine_then_the_same_command(tiny_model_folder, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))

    command = ["generate", tiny_model_folder, "--prompts", prompts, "--batch-size", "1", "--temperature", "1"]
    command += ["--max-new-tokens", "4", "-q", "-o", tmp_path / "cut.json"]
    killed("generate", 2, work.command, *command)
    assert len(list(tmp_path.glob("cut.parts/tuned/batch*"))) == 2 and not (tmp_path / "cut.json").exists()
    ((code, _, complaints),) = run(work.command, *command, world=1)
    assert code == 0, complaints
    settings = Generate(max_new_tokens=4, temperature=1.0, batch_size=1)
    model = load_model(tiny_model_folder)
    whole = generate_pairs(*model, [{"prompt": prompt} for prompt in PROMPTS], settings, out=tmp_path / "whole.json")
    assert json.loads((tmp_path / "cut.json").read_text())["data"] == whole["data"]


def test_pairs_with_a_flipped_bit_are_not_taken_for_finished(tiny_llama, tiny_tokenizer, rows, tmp_path):
    def make():
        return generate_pairs(tiny_llama, tiny_tokenizer, rows, pairs_settings(), out=tmp_path / "pairs.json", seed=5)

    made = make()
    text = (tmp_path / "pairs.json").read_text()
    for before, after in (("answer 0", "answer 8"), ('"logprob": -', '"logprob":  '), ('"unit": "l', '"unit": "L')):
        assert before in text
        (tmp_path / "pairs.json").write_text(text.replace(before, after, 1))
        with pytest.raises(StaleArtifact, match="pairs.json is damaged"):
            make()
        with pytest.raises(StaleArtifact, match="pairs.json is damaged"):
            read_pairs(tmp_path / "pairs.json")
    (tmp_path / "pairs.json").write_text(text)
    assert make() == made


def test_a_batch_with_a_flipped_bit_is_not_gone_on_from(tiny_llama, tiny_tokenizer, rows, tmp_path):
    def make(name):
        return generate_pairs(tiny_llama, tiny_tokenizer, rows, pairs_settings(), out=tmp_path / name, seed=5)

    with pytest.raises(KeyboardInterrupt), report_to(Stops(2)):
        make("cut.json")
    batch = sorted(tmp_path.glob("cut.parts/tuned/batch*"))[0]
    flip(batch, 100)
    with pytest.raises(StaleArtifact, match=f"{batch.name} is damaged") as raised:
        make("cut.json")
    assert raised.value.fix.startswith(f"rm {batch}, ")
    batch.unlink()
    assert make("cut.json") == make("whole.json")


def test_a_beginning_that_the_prompt_spells_is_not_doubled(tiny_llama, tiny_tokenizer_file):
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(tiny_tokenizer_file))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    framing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    plain, spelt = generate(tiny_llama, framing, ["Ada", "<s>Ada"], max_new_tokens=4)
    assert spelt["completion"] == plain["completion"]
    assert spelt["logprob"] == plain["logprob"]


def test_answers_end_where_the_models_positions_do(tiny_tokenizer, notes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=299)).eval()
    (pair,) = generate(model, tiny_tokenizer, ["abcdefgh"], max_new_tokens=64)
    assert pair["completion"]
    assert notes == ["answers end after 8 tokens at the latest, where the model's 16 positions do"]
    with pytest.raises(UsageError, match="A prompt has 17 tokens, and the model has positions for 16"):
        generate(model, tiny_tokenizer, ["abcdefghijklmnopq"])

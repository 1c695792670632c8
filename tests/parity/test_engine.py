"""Generation against transformers' own, and chat over a quantised base against training's forward pass."""

import itertools
import threading

import peft
import pytest
import torch
from helpers.records import alpaca_encoder
from helpers.trainers import make_trainer, project_logits, save_adapter, train
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from configs.peft import PrefixConfig
from configs.serving import Sampling
from inference.engine import Engine, PromptTooLong, Statistics
from inference.loading import load_engine
from inference.sampling import choose
from utils.model.decoder import causal_lm, forward_hidden, logits
from utils.rows.packing import pack

PROMPTS = ["你好，请介绍一下你自己。", "今天天气很好", "The quick brown fox"]


def greedy(**more) -> Sampling:
    return Sampling(**{"max_new_tokens": 24, "temperature": 0, **more})


def generated_ids(engine: Engine, prompt_ids: list[int], sampling: Sampling) -> list[int]:
    """The ids of an answer, up to and with the one that ends it."""
    ids = []
    with torch.inference_mode():
        for token in engine._tokens(prompt_ids, sampling, sampling.max_new_tokens):
            ids.append(token)
            if token in engine.tokenizer.stop_ids:
                break
    return ids


def transformers_ids(model, prompt_ids: list[int], **more) -> list[int]:
    """The same, by transformers' generate."""
    output = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=24,
        pad_token_id=0,
        **more,
    )
    return output[0, len(prompt_ids) :].tolist()


@pytest.fixture(scope="module", params=["tiny_model", "grouped_model"])
def pair(request) -> tuple[Engine, LlamaForCausalLM]:
    """The project's engine and transformers' model of the same folder."""
    folder = request.getfixturevalue(request.param)
    return load_engine(str(folder), "", None), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(tiny_model) -> Engine:
    return load_engine(str(tiny_model), "", None)


def test_log_probabilities_are_those_of_transformers(pair):
    engine, model = pair
    prompt_ids, answer_ids = engine.encode_chat(PROMPTS[0]), [7, 300, 2]
    with torch.inference_mode():
        scores = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0].log_softmax(dim=-1)
    found = engine.log_probabilities(prompt_ids, answer_ids)
    torch.testing.assert_close(found, scores[len(prompt_ids) - 1 : -1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_tokens_are_those_of_transformers_generate(pair, penalty):
    engine, model = pair
    answers = []
    for prompt in PROMPTS:
        prompt_ids = engine.encode_chat(prompt)
        ids = generated_ids(engine, prompt_ids, greedy(repetition_penalty=penalty))
        assert ids == transformers_ids(model, prompt_ids, repetition_penalty=penalty)
        answers.append(tuple(ids))
    if penalty > 1:  # a tied head of random weights repeats the last token, unless that is penalised
        assert len(set(answers)) == 3


def test_greedy_tokens_with_an_adapter_are_those_of_peft(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, lr=0.02, num_epochs=4)
    train(trainer)
    adapter = save_adapter(trainer)
    engine = load_engine(str(tiny_model), str(adapter), None)
    base = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt_ids = engine.encode_chat(PROMPTS[0])
    before = transformers_ids(base, prompt_ids)
    adapted = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = generated_ids(engine, prompt_ids, greedy())
    assert ids == transformers_ids(adapted.base_model.model, prompt_ids)
    assert ids != before


@pytest.mark.parametrize("method", ["prefix", "llama_adapter"])
def test_chat_with_the_other_adapters_computes_what_training_did(tiny_model, tmp_path, method):
    trainer = make_trainer(tiny_model, tmp_path, peft_method=method, lr=0.1, num_epochs=5)
    train(trainer)
    engine = load_engine(str(tiny_model), str(save_adapter(trainer)), None)
    prompt_ids = engine.encode_chat(PROMPTS[0])
    answer = generated_ids(engine, prompt_ids, greedy())
    scores = project_logits(trainer.model.train(), prompt_ids + answer)
    assert scores[len(prompt_ids) - 1 : -1].argmax(dim=1).tolist() == answer
    assert answer != generated_ids(load_engine(str(tiny_model), "", None), prompt_ids, greedy())


def test_stream_is_the_text_of_the_greedy_tokens(pair):
    engine, model = pair
    for prompt in PROMPTS:
        prompt_ids = engine.encode_chat(prompt)
        ids = transformers_ids(model, prompt_ids)
        text = "".join(engine.stream(prompt_ids, greedy()))
        expected = engine.tokenizer.decode([token for token in ids if token not in engine.tokenizer.stop_ids])
        assert text.rstrip("\ufffd") == expected.rstrip("\ufffd")


def chosen_distribution(monkeypatch, scores, seen, sampling: Sampling) -> torch.Tensor:
    """The probabilities that `choose` draws from."""
    caught = []
    original = torch.multinomial

    def catch(probabilities, *arguments, **more):
        caught.append(probabilities.clone())
        return original(probabilities, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", catch)
        choose(scores.clone(), seen, sampling, torch.Generator().manual_seed(0))
    return caught[0]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (40, 0.9), (1, 1.0), (0, 0.01), (999, 0.5)])
def test_distribution_is_that_of_transformers_warpers(monkeypatch, penalty, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(int(1000 * temperature) + top_k)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    for _ in range(5):
        scores = torch.randn(200, generator=generator) * 3
        occurred = torch.randint(200, (1, 30), generator=generator)
        seen = torch.zeros(200, dtype=torch.bool)
        seen[occurred[0]] = True
        warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        expected = warpers(occurred, scores[None].clone())[0].softmax(dim=0)
        ours = chosen_distribution(monkeypatch, scores, seen, sampling)
        assert torch.equal(ours > 0, expected > 0)
        torch.testing.assert_close(ours, expected)


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampling = Sampling(temperature=1.0, top_k=0, top_p=0.94)  # the last token goes, the others make up 0.95
    nothing_seen = torch.zeros(4, dtype=torch.bool)
    draws = [int(choose(scores.clone(), nothing_seen, sampling, generator)) for _ in range(4000)]
    shares = [draws.count(token) / 4000 for token in range(4)]
    assert shares == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.03)


def test_the_same_seed_gives_the_same_answer_and_none_a_new_one(engine):
    prompt_ids = engine.encode_chat("你好")

    def answer(seed: int | None) -> list[int]:
        return generated_ids(engine, prompt_ids, Sampling(max_new_tokens=16, temperature=1.0, top_k=0, seed=seed))

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert len({tuple(answer(None)) for _ in range(4)}) > 1


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_outermost_seeds_work(engine, seed):
    assert len(generated_ids(engine, [1, 300], Sampling(max_new_tokens=2, seed=seed))) >= 1


def script(monkeypatch, engine: Engine, ids: list[int]) -> None:
    """Make the model say these ids, whatever it is asked."""
    monkeypatch.setattr(engine, "_tokens", lambda _prompt, _sampling, limit: itertools.islice(iter(ids), limit))


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(monkeypatch, engine):
    text_ids = engine.tokenizer.encode("天气很好")[1:]
    script(monkeypatch, engine, [*text_ids, 2, *text_ids])
    statistics = Statistics()
    assert "".join(engine.stream([1, 300, 301], greedy(), statistics)).strip() == "天气很好"
    assert statistics.finish_reason == "stop"
    assert statistics.prompt_tokens == 3
    assert statistics.new_tokens == len(text_ids) + 1


def test_every_stop_id_of_the_model_ends_the_answer(monkeypatch, engine):
    text_ids = engine.tokenizer.encode("天气很好")[1:]
    monkeypatch.setattr(engine.encoder, "stop_ids", frozenset([2, 599]))
    script(monkeypatch, engine, [*text_ids, 599, *text_ids])
    assert "".join(engine.stream([1], greedy())).strip() == "天气很好"


def test_length_limit_is_exact_and_named(monkeypatch, engine):
    monkeypatch.setattr(engine.encoder, "stop_ids", frozenset())
    statistics = Statistics()
    list(engine.stream(engine.encode_chat("你好"), greedy(max_new_tokens=5), statistics))
    assert statistics.new_tokens == 5
    assert statistics.finish_reason == "length"


def test_context_limits_the_answer_and_refuses_a_prompt_that_fills_it(monkeypatch, engine):
    monkeypatch.setattr(engine.encoder, "stop_ids", frozenset())
    statistics = Statistics()
    prompt_ids = [1, *range(100, 600)] + [300] * 6  # 507 of 512
    list(engine.stream(prompt_ids, greedy(max_new_tokens=50), statistics))
    assert statistics.new_tokens == 5
    assert statistics.finish_reason == "length"
    with pytest.raises(PromptTooLong, match="512"):
        engine.encode_chat("好" * 600)


def test_cancelling_ends_the_answer(engine):
    cancel, statistics = threading.Event(), Statistics()
    cancel.set()
    list(engine.stream(engine.encode_chat("你好"), greedy(max_new_tokens=50), statistics, cancel))
    assert statistics.finish_reason == "cancelled"
    assert statistics.new_tokens == 1


def test_the_stop_text_of_the_template_ends_an_answer_that_goes_on(monkeypatch, engine):
    ids = engine.tokenizer.encode("天气很好\n\n### Instruction:\n你好")[1:]
    script(monkeypatch, engine, ids)
    statistics = Statistics()
    assert "".join(engine.stream([1], greedy(max_new_tokens=500), statistics)).strip() == "天气很好"
    assert statistics.finish_reason == "stop"


def test_recent_turns_keep_the_latest_that_leave_room(engine):
    history = [(f"第{number}个问题", "好" * 60) for number in range(8)]
    kept = engine.recent_turns("你好", history, room=100)
    assert 0 < len(kept) < 8
    assert kept == history[-len(kept) :]
    assert len(engine.encode_chat("你好", kept)) + 100 <= 512
    assert len(engine.encode_chat("你好", history[-len(kept) - 1 :])) + 100 > 512


def test_recent_turns_leave_half_of_the_context_to_a_long_answer_and_not_more(engine):
    history = [(f"第{number}个问题", "好" * 20) for number in range(9)]
    kept = engine.recent_turns("你好", history, room=100_000)
    assert 0 < len(kept) < 9 and kept == history[-len(kept) :]
    assert len(engine.encode_chat("你好", kept)) <= 512 // 2
    assert len(engine.encode_chat("你好", history[-len(kept) - 1 :])) > 512 // 2


def test_a_learnt_prefix_takes_its_part_of_the_context(tiny_model, tmp_path):
    prefix = {"peft_method": "prefix", "prefix_config": PrefixConfig(num_virtual_tokens=7)}
    model = make_trainer(tiny_model, tmp_path, **prefix).model.eval()
    engine = Engine(model, alpaca_encoder(tiny_model))
    room = 512 - 7
    for length, answer in ((room - 1, 1), (room - 3, 3)):
        statistics = Statistics()
        list(engine.stream([1, *[300] * (length - 1)], greedy(repetition_penalty=1.5), statistics))
        assert statistics.new_tokens <= answer
        assert statistics.finish_reason == "stop" or statistics.new_tokens == answer
    with pytest.raises(PromptTooLong, match=f"context has {room}"):
        engine.encode_chat("好" * 600)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_chat_over_a_quantised_base_computes_what_training_did(tiny_model, tmp_path, quantization):
    trainer = make_trainer(tiny_model, tmp_path, quantization=quantization, lr=0.02, num_epochs=4)
    train(trainer)
    trainer.model.train()
    engine = load_engine(str(tiny_model), str(save_adapter(trainer)), quantization)
    assert not causal_lm(engine.model).training

    # Packed rows in train(), as a step has them, against each example alone in chat's model.
    batch = pack(trainer.data.training, torch.device("cpu"))
    hidden = forward_hidden(trainer.model, batch.input_ids, batch.position_ids, batch.segments)
    packed = logits(trainer.model, hidden).detach().split([len(example) for example in trainer.data.training])
    for example, expected in zip(trainer.data.training, packed, strict=True):
        torch.testing.assert_close(
            project_logits(engine.model, example.input_ids.tolist()), expected, rtol=1e-4, atol=1e-4
        )

    # Each token of an answer, which comes through the cache, is the likeliest of training's model.
    prompt_ids = engine.encode_chat(PROMPTS[0])
    answer = generated_ids(engine, prompt_ids, greedy())
    scores = project_logits(trainer.model, prompt_ids + answer)
    assert scores[len(prompt_ids) - 1 : -1].argmax(dim=1).tolist() == answer

    plain = load_engine(str(tiny_model), str(tmp_path), None)
    difference = project_logits(plain.model, prompt_ids) - project_logits(engine.model, prompt_ids)
    assert difference.abs().max() > 1e-3


def test_speed_is_that_of_the_tokens_after_the_first():
    """The clock starts with the first new token, which the prompt has taken its time for."""
    assert Statistics(new_tokens=11, seconds=2.0).tokens_per_second == 5.0
    assert Statistics(new_tokens=1, seconds=0.0).tokens_per_second == 0.0

"""Each family from conversations to whatever serves the model: trained, asked, resumed, merged, asked by others."""

import importlib
import json
from datetime import date, datetime

import pytest
import torch
from helpers.chat_templates import ENDS, TEMPLATES, chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import generate
import llama_finetuning
from configs.errors import UserError
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import messages_of
from ft_datasets.prompt import PromptTemplate, choose_template
from ft_datasets.tokenizer import Tokenizer
from utils.results.merge_prompts import choose_prompts
from utils.runs.metrics import read_metrics

merge_lora_weights = importlib.import_module("inference.hf-text-generation-inference.merge_lora_weights")
QUESTIONS = ["你好，请介绍一下你自己。", "a  b   c", "第一行\n第二行", "1+1=？ 🎉龘"]


def fixed_clock(day: str) -> type[datetime]:
    """A clock that stands still."""

    class OneDay(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    return OneDay


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A file of conversations."""
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    turns = [("今天天气好吗？", "今天天气很好。"), ("我们去公园？", "好，一起去散步。"), ("说一句诗。", "春眠不觉晓。")]
    lines = []
    for number in range(12):
        messages = []
        for asked, answered in turns[: 1 + number % 3]:
            messages += [{"role": "user", "content": f"{number}，{asked}"}, {"role": "assistant", "content": answered}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", TEMPLATES)
def test_the_first_loss_is_that_of_a_plain_loop_over_the_answers(form, talks, tmp_path, capsys, monkeypatch):
    """Each answer by itself, behind the ids that transformers makes of what came before it."""
    base, output = chat_model(tmp_path / "base", form), tmp_path / "adapter"
    llama_finetuning.main(
        model_name=base,
        output_dir=output,
        dataset="chat_dataset",
        use_peft=True,
        run_validation=False,
        max_steps=1,
        batch_size_training=24 if form == "qwen3" else 12,
        **{"chat_dataset.data_path": talks},
    )
    (line,) = [line for line in read_metrics(output) if "train_loss" in line]
    day = json.loads((output / "training_config.json").read_text())["prompt_template"]["date"]
    if day:
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", fixed_clock(day))

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids(ENDS[form])
    total, tokens = 0.0, 0
    for record in map(json.loads, talks.read_text().splitlines()):
        for count in range(1, len(record["messages"]), 2):
            said = record["messages"]
            prompt = tokenizer.apply_chat_template(said[:count], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(said[: count + 1], return_dict=False)
            assert whole[: len(prompt)] == prompt
            ids = torch.tensor([whole[: whole.index(end, len(prompt)) + 1]])
            with torch.no_grad():
                scores = model(ids).logits[0, len(prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(scores, ids[0, len(prompt) :], reduction="sum").item()
            tokens += ids.shape[1] - len(prompt)
    assert line["train_loss"] == pytest.approx(total / tokens, rel=1e-5)
    if day:
        assert day == date.today().isoformat()


def test_a_run_does_not_go_on_in_other_words(talks, tmp_path):
    settings = {"output_dir": tmp_path / "adapter", "use_peft": True, "dataset": "chat_dataset", "save_steps": 1}
    settings |= {"model_name": chat_model(tmp_path / "base", "chatml"), "chat_dataset.data_path": talks}
    llama_finetuning.main(**settings, max_steps=1)
    with pytest.raises(UserError, match=r"belongs to a run with other settings(?s:.*)prompt_template: .*alpaca"):
        llama_finetuning.main(**settings, max_steps=2, prompt_template="alpaca")
    llama_finetuning.main(**settings, max_steps=2, prompt_template="model")


def test_a_merge_asks_what_was_held_out_only_while_the_data_are_what_they_were(talks, tmp_path):
    base, output, data = chat_model(tmp_path / "base", "chatml"), tmp_path / "adapter", tmp_path / "talks.jsonl"
    lines = talks.read_text().splitlines()
    data.write_text("\n".join(lines))
    settings = {"dataset": "chat_dataset", "chat_dataset.data_path": data, "use_peft": True, "val_set_size": 3}
    llama_finetuning.main(model_name=base, output_dir=output, max_steps=1, **settings)
    tokenizer = Tokenizer(base)
    encoder = ChatEncoder(choose_template("model", base, tokenizer), tokenizer)

    def asked(*changed: str) -> tuple[str, int, str]:
        data.write_text("\n".join(changed))
        said: list[str] = []
        prompts = choose_prompts(output, encoder, 16, said.append)
        return prompts.origin, len(prompts.examples), " ".join(said)

    assert asked(*lines) == ("held out", 3, "")
    # Other lines, or other words in all of them: whatever would be held out now may have been learnt.
    for changed in (lines[6:], lines[::-1], [line.replace("今", "明") for line in lines]):
        origin, count, said = asked(*changed)
        assert (origin, count) == ("built in", 12)
        assert f"{data} is not what it was in training" in said


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_family_answers_the_same_wherever_it_is_asked(form, talks, tmp_path, capsys):
    base, output, merged = chat_model(tmp_path / "base", form), tmp_path / "adapter", tmp_path / "merged"
    settings = {
        "model_name": base,
        "output_dir": output,
        "dataset": "chat_dataset",
        "chat_dataset.data_path": talks,
        "use_peft": True,
        "lora_config.target_modules": "all-linear",
        "lr": 0.02,
        "save_steps": 3,
        "val_set_size": 2,
    }
    llama_finetuning.main(**settings, max_steps=3)
    assert "the model's own chat template" in capsys.readouterr().out
    described = json.loads((output / "training_config.json").read_text())
    template = described["prompt_template"]
    assert template["source"].endswith(TEMPLATES[form])
    assert bool(template["date"]) == (form == "llama3")

    # A run that goes on keeps its template, whatever has become of the model's own since.
    own = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**own, "chat_template": "{{ 'other' }}"}))
    llama_finetuning.main(**settings, max_steps=5)
    assert "Going on from" in capsys.readouterr().out
    assert json.loads((output / "training_config.json").read_text())["prompt_template"] == template
    assert [line["step"] for line in read_metrics(output) if "train_loss" in line] == [1, 2, 3, 4, 5]

    asked = {"temperature": 0, "max_new_tokens": 12}
    answers = [generate.main(prompt=question, base_model=base, lora_weights=output, **asked) for question in QUESTIONS]
    merge_lora_weights.main(base_model=base, peft_model=output, output_dir=merged)
    assert [generate.main(prompt=q, base_model=merged, lora_weights="", **asked) for q in QUESTIONS] == answers
    capsys.readouterr()

    # transformers alone, from the merged folder: ids, ends, and answers of its chat pipeline.
    tokenizer = Tokenizer(base)
    encoder = ChatEncoder(PromptTemplate.from_dict(template, tokenizer), tokenizer)
    other = AutoTokenizer.from_pretrained(merged)
    end = other.convert_tokens_to_ids(ENDS[form])
    ends = GenerationConfig.from_pretrained(merged).eos_token_id
    assert end in (ends if isinstance(ends, list) else [ends])
    for question in QUESTIONS:
        for history in ([], [("你是谁？", "  我是助手。\n")]):
            turns = [text for turn in history for text in turn] + [question]
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            found = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert found == encoder.prompt_ids(messages_of(question, history)), (question, history)
    chat = pipeline("text-generation", model=str(merged), tokenizer=other)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        (said,) = chat([{"role": "user", "content": question}], do_sample=False, max_new_tokens=12)
        text = said["generated_text"][-1]["content"]
        # Its text may end inside a character, and has the blanks that are not shown here.
        assert text.rstrip("\ufffd") == answer

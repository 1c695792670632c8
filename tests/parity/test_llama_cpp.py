"""GGUF files, read back by llama.cpp itself: the same tokens, the same answers."""

import importlib
import json
import random
import shutil

import peft
import pytest
import torch
from helpers.chat_templates import TEMPLATES, chat_model
from helpers.environment import ROOT
from helpers.llama_cpp import LlamaCpp, write_byte_level_tokenizer
from helpers.records import alpaca_template
from helpers.tiny_models import make_model
from helpers.trainers import make_trainer, save_adapter, train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import messages_of
from ft_datasets.prompt import AlpacaWords, choose_template
from ft_datasets.tokenizer import Tokenizer
from utils.model.folder import ModelFolder
from utils.results.gguf import GgufFile
from utils.results.gguf_vocabulary import PRE_TOKENIZERS
from utils.results.model_files import copy_tokenizer

pytestmark = pytest.mark.slow

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ODD = [
    *("a  b   c", "   ", "\n", " x \n\n\ny\t\tz ", "  leading", "trailing  ", "\u3000全角\xa0", "▁_▁", "<s>", "\u200b"),
    *("🎉👨\u200d👩\u200d👧🇨🇳龘𠮷", "café naïve № ½ ﬁ Ａ１", "1+1=？ 12345 6.78", "It's we'll I'M 'tis", "ÉCOLE Ünder"),
    "def f(x):\n    return [x ** 2 for _ in range(10)]\n\n\n# </s> <0x0A> <|im_end|>\r\n",
    *("Привет, мир! 안녕하세요 مرحبا नमस्ते", "http://a.b/c?d=e&f=%20", "e\u0301", "ǅʰ² Ⅳ", "HTTPServer iPhone ЖЖ"),
]
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip
MODELS = {
    "llama": {},
    "llama, biases, tied": {"kv_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama, llama3": {"rope_parameters": LLAMA_3, "head_dim": 32},
    "llama, linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama, yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0,
        }
    },
    "mistral": {"family": "mistral", "kv_heads": 2, "sliding_window": 64, "random_norms": True},
    "qwen2": {"family": "qwen2", "kv_heads": 2},
    "qwen3": {"family": "qwen3", "kv_heads": 1, "head_dim": 32, "random_norms": True},
}  # fmt: skip


def convert(folder, kind="f32"):
    GgufFile(ModelFolder(folder), kind).write(folder)
    return LlamaCpp(folder / "model.gguf")


def texts():
    """The shipped corpus, and texts of what tokenizers part company over, in odd orders."""
    corpus = json.loads((ROOT / "ft_datasets" / "alpaca_data.json").read_text(encoding="utf-8"))
    chance = random.Random(0)
    parts = [part for text in ODD for part in (text, text[:2], text[2:5], text[-3:])]
    mixed = ["".join(chance.choices(parts, k=chance.randint(2, 6))) for _ in range(300)]
    return [*ODD, *mixed, *(entry["instruction"] + entry["input"] + entry["output"] for entry in corpus)]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def served(request, tmp_path_factory):
    """(folder of a tiny model as merging leaves it, llama.cpp with its GGUF file in fp32)"""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    make_model(folder, seed=5, **MODELS[request.param])
    copy_tokenizer(folder, folder.parent, alpaca_template(folder))
    for file in folder.parent.glob("*.json"):
        file.rename(folder / file.name)
    return folder, convert(folder)


def test_answers_are_those_of_transformers(served):
    folder, llama_cpp = served
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer(folder)
    for text in ("你好，请介绍一下你自己。", "The quick brown fox", "春眠不觉晓，处处闻啼鸟。" * 4):
        check_answer(llama_cpp, model, tokenizer.encode(text))


def test_sentencepiece_tokens_and_chats(tiny_model, tmp_path):
    copy_tokenizer(tiny_model, tmp_path, alpaca_template(tiny_model))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    llama_cpp, tokenizer = convert(tmp_path), Tokenizer(tmp_path)
    for text in texts():
        assert llama_cpp.ids(text) == tokenizer.encode(text), text
    template = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert llama_cpp.ask("/props")["chat_template"] == template
    check_chats(llama_cpp, tmp_path)


@pytest.mark.parametrize("splitting", PRE_TOKENIZERS.values())
def test_byte_level_tokens_and_chats(tmp_path, splitting):
    config = LlamaConfig(
        vocab_size=3100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_byte_level_tokenizer(tmp_path, splitting, texts(), vocab_size=3000)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    llama_cpp, tokenizer = convert(tmp_path), Tokenizer(tmp_path)
    for text in texts():
        assert llama_cpp.ids(text) == tokenizer.encode(text), text
    assert llama_cpp.ask("/props")["chat_template"] == CHATML
    check_chats(llama_cpp, tmp_path)


@pytest.mark.parametrize("form", TEMPLATES)
def test_every_form_of_prompt_is_the_same_in_llama_cpps_own_jinja(form, tmp_path):
    base, folder = chat_model(tmp_path / "base", form), tmp_path / "model"
    shutil.copytree(base, folder)
    template = choose_template("model", base, Tokenizer(base), "2026-11-27")
    copy_tokenizer(base, folder, template)
    llama_cpp, encoder = convert(folder), ChatEncoder(template, Tokenizer(base))
    for history in ([], [("一", "  二\n")], [("1", "2"), ("第一行\n第二行", "🎉")]):
        for system in ("", "规则。") if form != "mistral" else ("",):
            messages = messages_of("a  b", history, system)
            as_dicts = [{"role": message.role, "content": message.text} for message in messages]
            prompt = llama_cpp.ask("/apply-template", {"messages": as_dicts})["prompt"]
            assert llama_cpp.ids(prompt, with_special_tokens=True) == encoder.prompt_ids(messages)


def test_what_is_merged_answers_in_llama_cpp_as_base_and_adapter_do(tiny_model, tmp_path):
    """Through the command, and with the prompt that a chat endpoint makes."""
    trainer = make_trainer(tiny_model, tmp_path / "run", lr=0.02, num_epochs=4)
    train(trainer)
    adapter, merged = save_adapter(trainer), tmp_path / "merged"
    merge = importlib.import_module("inference.hf-text-generation-inference.merge_lora_weights").main
    merge(base_model=tiny_model, peft_model=adapter, output_dir=merged, format="gguf", gguf_type="f32")
    llama_cpp, tokenizer = LlamaCpp(merged / "model.gguf"), Tokenizer(tiny_model)
    unmerged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(adapter))
    for question in ("你好，天气好吗？", "a  b   c", "人工智能"):
        prompt = llama_cpp.ask("/apply-template", {"messages": [{"role": "user", "content": question}]})["prompt"]
        ids = llama_cpp.ids(prompt, with_special_tokens=True)
        assert ids == tokenizer.encode(AlpacaWords().prompt(question))
        check_answer(llama_cpp, unmerged, ids)


def check_answer(llama_cpp, model, prompt):
    """The likeliest tokens, up to the end of the answer, are those of transformers."""
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    expected = model.generate(input_ids=torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    assert llama_cpp.answer(prompt, 20) == expected


def check_chats(llama_cpp, folder):
    """A rendered conversation is the same text and the same ids in llama.cpp as in transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for turns in (["你好"], ["a  b", "第一行\n第二行", "🎉？"]):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompt = llama_cpp.ask("/apply-template", {"messages": messages})["prompt"]
        assert llama_cpp.ids(prompt, with_special_tokens=True) == expected

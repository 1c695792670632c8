"""The quickstart's path, and its merged model through generate.py, transformers' chat pipeline and llama.cpp."""

import importlib
import json

import pytest
from helpers.environment import ROOT
from helpers.llama_cpp import LlamaCpp
from transformers import pipeline

import generate
from scripts import quickstart

merge_lora_weights = importlib.import_module("inference.hf-text-generation-inference.merge_lora_weights")

pytestmark = pytest.mark.slow


def test_the_quickstarts_merged_model_answers_the_same_wherever_it_is_asked(tmp_path, monkeypatch):
    for name, path in {"BASE": "base", "WORK": "work", "ADAPTER": "work/model", "MERGED": "work/merged"}.items():
        monkeypatch.setattr(quickstart, name, tmp_path / path)
    quickstart.main()  # ends with an error where the tuned model does not give the corpus's answers
    corpus = json.loads((ROOT / quickstart.CORPUS).read_text(encoding="utf-8"))
    expected = {e["instruction"]: e["output"] for e in corpus if e["instruction"] in quickstart.WITHHELD}
    assert len(expected) == 4

    gguf = merge_lora_weights.main(
        base_model=quickstart.MERGED, peft_model="", output_dir=tmp_path / "gguf", format="gguf", gguf_type="f16"
    )
    chat = pipeline("text-generation", model=str(quickstart.MERGED))
    llama_cpp = LlamaCpp(gguf / "model.gguf")
    for question, answer in expected.items():
        asked = {"base_model": quickstart.MERGED, "lora_weights": "", "temperature": 0, "max_new_tokens": 100}
        assert generate.main(prompt=question, **asked) == answer
        messages = [{"role": "user", "content": question}]
        (said,) = chat(messages, do_sample=False, max_new_tokens=100)
        assert said["generated_text"][-1]["content"] == answer
        body = {"messages": messages, "temperature": 0, "max_tokens": 100}
        (choice,) = llama_cpp.ask("/v1/chat/completions", body)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")

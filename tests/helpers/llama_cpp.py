"""llama.cpp itself, and tokenizers of the kinds that it knows by name."""

import json
import urllib.request
from pathlib import Path
from typing import Any

from utils.results.gguf_vocabulary import PRE_TOKENIZERS


class LlamaCpp:
    """A GGUF file, loaded by llama.cpp's own server, which lives as long as this object."""

    def __init__(self, file: Path, context: int = 512) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = context
        settings.warmup = False
        settings.n_gpu_layers = 0
        settings.cpuparams.n_threads = 1
        settings.verbosity = -1
        # As transformers computes in fp32.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer of one of the server's addresses."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.server.listening_address + path, data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str, with_special_tokens: bool = False) -> list[int]:
        """A text's tokens, behind BOS where the model wants one."""
        body = {"content": text, "add_special": True, "parse_special": with_special_tokens}
        return self.ask("/tokenize", body)["tokens"]

    def answer(self, prompt: list[int], count: int) -> list[int]:
        """At most `count` tokens behind a prompt, each the likeliest."""
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self.ask("/completion", body)["tokens"]


def write_byte_level_tokenizer(folder: Path, splitting: str, texts: list[str], vocab_size: int) -> None:
    """A tokenizer.json, learnt from texts, that splits text as models do whose splitting llama.cpp calls so."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    steps, ignore_merges = next(key for key, name in PRE_TOKENIZERS.items() if name == splitting)
    makers = {
        "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
        "Digits": pre_tokenizers.Digits,
        "ByteLevel": lambda prefix, regex: pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex),
    }
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([makers[name](*settings) for name, *settings in steps])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

"""Chat templates that put messages into the forms of today's families, and small tokenizers of their kinds.

The templates are this project's own; what they write is what the families' models are asked with.
"""

import json
import shutil
from pathlib import Path

from helpers.tiny_models import TEXTS, make_model

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Yi's and SmolLM2's form."""
QWEN2 = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}" + CHATML
)
"""Qwen 2.5's form: without a system message, one of its own."""
QWEN3 = """\
{%- set found = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set found.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > found.last %}
            {%- set thought = '' %}
            {%- if '</think>' in message.content %}
                {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- endif %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- said + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Qwen 3's form: thinking stands in the last answer alone."""
LLAMA3 = """\
{%- if strftime_now is defined %}
    {%- set today = strftime_now('%d %b %Y') %}
{%- else %}
    {%- set today = '26 Jul 2024' %}
{%- endif %}
{%- set told = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + today + '\\n\\n' + told + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Llama 3.2's form: what is said is trimmed, and the date is told."""
LLAMA2 = """\
{%- set told = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (told if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
"""Llama 2's form: BOS before each question, and blanks around an answer."""
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
"""Mistral 7B's form, which has no place for a system message."""

TEMPLATES = {
    "chatml": CHATML,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"qwen2": QWEN_WORDS, "qwen3": QWEN_WORDS, "llama3": QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)}
"""What the families' tokenizers take for a word, which transformers puts into Qwen's by itself."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
ENDS = {
    "chatml": "<|im_end|>",
    "qwen2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama2": "</s>",
    "mistral": "</s>",
}
"""What ends an answer in each form."""


FAMILIES = {
    "chatml": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "random_norms": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama2": ("llama", {"kv_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
}
"""The family of models whose form it is, and what its configuration has beside the tests' usual."""


def chat_model(folder: Path, form: str) -> Path:
    """A small random model of a form's family, with a tokenizer of its kind and its template."""
    family, more = FAMILIES[form]
    make_model(folder, family=family, **{"kv_heads": 2, **more})
    tokenizer = chat_folder(folder / "tokenizer", form)
    (folder / "tokenizer.model").unlink()
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    if (tokenizer / "tokenizer.json").is_file():
        ids = {t["content"]: t["id"] for t in json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]}
        for name in ("config.json", "generation_config.json"):
            values = json.loads((folder / name).read_text())
            values |= {"eos_token_id": ids[settings["eos_token"]], "bos_token_id": ids.get(settings.get("bos_token"))}
            (folder / name).write_text(json.dumps(values))
    for file in tokenizer.iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(tokenizer)
    return folder


def chat_folder(folder: Path, form: str) -> Path:
    """A new folder with a tokenizer of the kind that the models of a form have, and their template."""
    folder.mkdir(parents=True)
    if form in ("llama2", "mistral"):
        from scripts.quickstart import train_sentencepiece

        train_sentencepiece(TEXTS, folder, vocab_size=600)
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": True}
    else:
        settings = _write_byte_level(folder, form)
    settings["chat_template"] = TEMPLATES[form]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _write_byte_level(folder: Path, form: str) -> dict[str, str]:
    """A byte-level BPE tokenizer.json with the form's special tokens; returns what its tokenizer_config.json says."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if form == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if form in WORDS:
        split = pre_tokenizers.Split(Regex(WORDS[form]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if form.startswith("qwen"):
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(TEXTS, trainer)
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if form == "qwen3":  # no special ones: data may hold them, and they are learnt as tokens
        fast.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    if form == "llama3":
        bos = fast.token_to_id(special[0])
        fast.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], bos)]
        )
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if form == "llama3":
        return {**settings, "bos_token": special[0], "eos_token": "<|end_of_text|>"}
    return {**settings, "eos_token": "<|im_end|>" if form != "chatml" else "<|endoftext|>"}

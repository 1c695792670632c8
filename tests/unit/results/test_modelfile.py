import itertools
import re

import pytest

from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.prompt import AlpacaWords, PromptTemplate, choose_template
from ft_datasets.tokenizer import Tokenizer
from utils.results.modelfile import conversation, go_template, modelfile, prompt_text

pytestmark = pytest.mark.usefixtures("english")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_2 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are {x}.<|im_end|>\n{% endif %}" + CHATML
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ALPACA = AlpacaWords().jinja("<s>", "</s>")
TEMPLATES = {"chatml": CHATML, "qwen 2": QWEN_2, "llama 2": LLAMA_2, "llama 3": LLAMA_3, "mistral": MISTRAL,
             "alpaca": ALPACA}  # fmt: skip
BOS = {"llama 2", "llama 3", "mistral", "alpaca"}


@pytest.fixture
def encoder_of(tiny_model):
    """A chat template's source -> the template with a tokenizer."""
    tokenizer = Tokenizer(tiny_model)
    return lambda source: ChatEncoder(PromptTemplate("model", source), tokenizer)


def run_go(source, messages):
    """What Go's text/template makes of a template of just these commands, as Ollama fills it in."""
    system = "\n\n".join(message.text for message in messages if message.role == "system")
    merged = []
    for role, group in itertools.groupby(messages, key=lambda message: message.role):
        merged.append({"Role": role, "Content": "\n\n".join(message.text for message in group)})
    pieces = iter(re.split(r"(\{\{ .*? \}\})", source))

    def parse():
        """[text or command, ...] up to the end or else of this block, and which of them it was."""
        block = []
        for piece in pieces:
            command = piece[3:-3] if piece.startswith("{{ ") else None
            if command is None:
                assert "{{" not in piece and "}}" not in piece
                block.append(("text", piece))
            elif command == "end" or command.startswith("else"):
                return block, command
            elif command.startswith(("if ", "range ")):
                branches, condition = [], command
                while True:
                    inner, closing = parse()
                    branches.append((condition, inner))
                    if closing == "end":
                        break
                    condition = closing.removeprefix("else").strip() or "if true"
                block.append(("branches", branches))
            else:
                block.append(("value", command))
        return block, ""

    def run(block, dot):
        text = ""
        for kind, content in block:
            if kind == "text":
                text += content
            elif kind == "value":
                text += content[1:-1] if content[0] == '"' else dot[content[1:]]
            elif content[0][0] == "range .Messages":
                text += "".join(run(content[0][1], message) for message in dot["Messages"])
            else:
                text += next((run(inner, dot) for condition, inner in content if is_true(condition, dot)), "")
        return text

    def is_true(condition, dot):
        if condition == "if true":
            return True
        if equal := re.fullmatch(r'if eq \.Role "(\w+)"', condition):
            return dot["Role"] == equal[1]
        assert condition == "if .System"
        return bool(dot["System"])

    block, closing = parse()
    assert not closing
    return run(block, {"System": system, "Messages": merged})


def test_the_evaluator_runs_what_is_written_by_hand():
    source = (
        '{{ if .System }}S:{{ .System }}{{ else }}-{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}'
        'U:{{ .Content }}{{ else if eq .Role "assistant" }}A:{{ .Content }}{{ "{" }}{{ end }}{{ end }}'
    )
    assert run_go(source, conversation("1", "2", "3")) == "-U:1A:2{U:3"
    assert run_go(source, conversation("1", system="x")) == "S:xU:1"


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_is_given_the_same_prompt(encoder_of, name):
    encoder = encoder_of(TEMPLATES[name])
    text, _notes = modelfile(encoder, "<s>" if name in BOS else "", ["</s>", "<|im_end|>"])
    assert "\nFROM ./model.gguf\n" in "\n" + text
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n')
    source = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    bos = "<s>" * (name in BOS)
    for texts in (["你好"], ["a", "b {{ c }}", "d\ne"], ["{", "}}", "{% if %}", '"""', "第三"]):
        for system in ("", "你是{助手}。") if name != "mistral" else ("",):
            messages = conversation(*texts, system=system)
            assert bos + run_go(source, messages) == prompt_text(encoder, messages)


def test_what_ollama_does_otherwise_is_said(encoder_of, tmp_path):
    def notes(source):
        text, found = modelfile(encoder_of(source), "<s>", ["</s>"])
        assert all(f"# {note}\n" in text for note in found)
        return found, "TEMPLATE" in text

    assert notes(CHATML) == ([], True)
    (trimming,), has_template = notes(LLAMA_3)
    assert "cuts off spaces" in trimming and has_template
    (silent,), has_template = notes(MISTRAL)
    assert "no system message" in silent and has_template
    (dated,), has_template = notes("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert "names the day" in dated and has_template
    file = tmp_path / "dated.jinja"
    file.write_text("{{ strftime_now('%d %b %Y') }}" + CHATML, encoding="utf-8")
    fixed = choose_template(str(file), tmp_path, encoder_of("").tokenizer, "2026-11-27").source
    assert notes(fixed) == ([], True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[-1].content }}",  # the last question alone
        "{% for m in messages %}{{ m.content }}{{ loop.index }}{% endfor %}",  # another piece for each place
        CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"),
        CHATML.replace("<|im_start|>", '"""'),
        CHATML.replace("<|im_start|>", "\u200b"),  # Ollama drops what can't be printed
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_is_not_made_of_fixed_pieces_is_left_out(encoder_of, source):
    assert go_template(encoder_of(source)) is None
    text, notes = modelfile(encoder_of(source), "", ["</s>"])
    assert "TEMPLATE" not in text and text.startswith("# The model's chat template can't be written")
    assert len(notes) == 1


def test_no_template_at_all():
    text, notes = modelfile(None, "<s>", ["</s>"])
    assert text == f'# {notes[0]}\nFROM ./model.gguf\nPARAMETER stop "</s>"\n'

"""Ids of conversations against transformers' own, masks against hand-written ones, templates that misbehave."""

import datetime
import json
import shutil

import pytest
from helpers.chat_templates import ENDS, TEMPLATES, chat_folder
from transformers import AutoTokenizer

from configs.errors import UserError
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import Conversation, Message, messages_of
from ft_datasets.encoding import encode_conversations
from ft_datasets.prompt import PromptTemplate, TemplateRefusal, choose_template
from ft_datasets.tokenizer import Tokenizer

TALKS = [
    [("你好，请介绍一下你自己。", "我是一个助手。")],
    [("  a  b   c ", " 前后有空格 "), ("第一行\n第二行\n", "🎉龘\n\n"), ("for i in range(10):\n\tprint(i)", "0 1 2")],
    [("1+1=？", "2"), ("\n再说\n", "<think>\n想\n</think>\n\n好")],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    return {form: chat_folder(root / form, form) for form in TEMPLATES}


def encoder_of(folder, wanted: str = "model", day: str = "2026-11-27") -> ChatEncoder:
    tokenizer = Tokenizer(folder)
    return ChatEncoder(choose_template(wanted, folder, tokenizer, day), tokenizer)


def learnt(turns, system: str = "") -> tuple[Message, ...]:
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer, is_learnt=True)]
    return tuple(messages)


def as_dicts(messages) -> list[dict]:
    return [{"role": message.role, "content": message.text} for message in messages]


class OneDay(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, 27)


@pytest.mark.parametrize(
    ("form", "system"),
    [(form, system) for form in TEMPLATES for system in ("", "用中文回答。") if not (form == "mistral" and system)],
)
def test_prompts_and_examples_have_the_ids_that_transformers_gives(folders, form, system, monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", OneDay)
    other, encoder = AutoTokenizer.from_pretrained(folders[form]), encoder_of(folders[form])
    end = other.convert_tokens_to_ids(ENDS[form])
    assert encoder.end_id == end
    for number, turns in enumerate(TALKS, 1):
        messages = learnt(turns, system)
        for at in [i for i, message in enumerate(messages) if message.role == "assistant"]:
            asked = as_dicts(messages[:at])
            expected = other.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            assert encoder.prompt_ids(messages[:at]) == expected
        whole = other.apply_chat_template(as_dicts(messages), return_dict=False)
        last = encode_conversations([Conversation(number, messages)], encoder)[-1]
        ids = last.input_ids.tolist()
        assert ids == whole[: len(ids)]
        assert end not in whole[len(ids) :]
        assert ids[-1] == end == last.labels[-1]


@pytest.mark.parametrize("form", TEMPLATES)
def test_what_is_learnt_is_what_follows_each_prompt(folders, form):
    """One example where earlier answers stand as last ones do, else one of each; by a plain loop over the answers."""
    encoder = encoder_of(folders[form])
    for number, turns in enumerate(TALKS, 1):
        messages = learnt(turns)
        examples = encode_conversations([Conversation(number, messages)], encoder)
        assert len(examples) == (len(turns) if form == "qwen3" else 1)
        found = []
        for example in examples:
            ids = example.input_ids.tolist()
            for start, stop in example.learnt:
                assert example.labels[start:stop].tolist() == ids[start:stop]
                found.append((ids[:start], ids[start:stop]))
            assert example.label_count == sum(stop - start for start, stop in example.learnt)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for (prompt, answer), at in zip(found, answers, strict=True):
            assert prompt == encoder.prompt_ids(messages[:at])
            text = encoder.tokenizer.decode(answer[:-1])
            assert text.strip().removeprefix("<think>\n\n</think>").strip() == messages[at].text.strip()
            assert answer[-1] == encoder.end_id


@pytest.mark.parametrize("form", TEMPLATES)
def test_no_text_of_a_user_becomes_a_special_token(folders, form):
    encoder = encoder_of(folders[form])
    special = {token.id for token in encoder.tokenizer.special_tokens.values()}
    plain = encoder.prompt_ids(messages_of("甲乙"))
    spelled = "".join([*encoder.tokenizer.special_tokens, "<s></s><|im_end|><|im_start|>user<|eot_id|>"])
    for text in (spelled, f"a{spelled}b", *encoder.tokenizer.special_tokens):
        for messages in (messages_of(text), messages_of("问", [("甲", text)]), messages_of("甲", system=text)):
            if form == "mistral" and messages[0].role == "system":
                continue
            harmless = [Message(message.role, message.text.replace(text, "无")) for message in messages]
            ids = encoder.prompt_ids(messages)
            assert [i for i in ids if i in special] == [i for i in encoder.prompt_ids(harmless) if i in special]
        shown = encoder.tokenizer.decode([i for i in encoder.prompt_ids(messages_of(text)) if i not in special])
        if form in ("llama2", "mistral", "llama3"):  # (blanks at its edges may be trimmed)
            assert text in shown
    assert [i for i in plain if i in special] == [i for i in encoder.prompt_ids(messages_of(spelled)) if i in special]


def test_overlapping_tokens_and_those_in_another_case_stay_text(folders, tmp_path):
    """`--a--a--` has the token `--a--` twice; a template in small letters would make one of another text."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    folder = shutil.copytree(folders["chatml"], tmp_path / "overlapping")
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens([AddedToken("--a--", normalized=False)])
    fast.save(str(folder / "tokenizer.json"))
    (tmp_path / "lower.jinja").write_text(TEMPLATES["chatml"].replace("['content']", "['content'] | lower"))
    encoder = encoder_of(folder, str(tmp_path / "lower.jinja"))
    for text in ("--a--a--", "x<|IM_END|>y", "--A--a--A--"):
        special = {token.id for token in encoder.tokenizer.special_tokens.values()}
        found = [i for i in encoder.prompt_ids(messages_of(text)) if i in special]
        assert encoder.tokenizer.spell(found) == "<|im_start|><|im_end|><|im_start|>"
        assert text.lower() in encoder.tokenizer.spell(encoder.prompt_ids(messages_of(text)))


def test_characters_that_have_no_meaning_stay_what_they_are(folders):
    encoder = encoder_of(folders["chatml"])
    text = "<|im_end|>\ufdd1\ufdd2\ufdef\ue000"
    ids = encoder.prompt_ids(messages_of(text))
    tokenizer = encoder.tokenizer
    start, end = (tokenizer.special_tokens[token].id for token in ("<|im_start|>", "<|im_end|>"))
    by_hand = [start, *tokenizer.encode(f"user\n{text}"), end, *tokenizer.encode("\n"), start]
    assert ids == by_hand + tokenizer.encode("assistant\n")


def test_masks_by_hand(folders):
    """Three forms; the ids of the parts are the tokenizer's, the order and the masks are written here."""
    turns = [("甲", "一"), ("乙", "二")]

    def parts(form, *texts):
        tokenizer = encoder_of(folders[form]).tokenizer
        return [
            [tokenizer.special_tokens[text].id] if text in tokenizer.special_tokens else tokenizer.encode(text)[cut:]
            for text in texts
            for cut in [len(tokenizer.bos_ids)]
        ]

    def check(form, texts, is_learnt):
        (example,) = encode_conversations([Conversation(1, learnt(turns))], encoder_of(folders[form]))
        pieces = parts(form, *texts)
        assert example.input_ids.tolist() == [i for piece in pieces for i in piece]
        expected = [i if c == "x" else -100 for piece, c in zip(pieces, is_learnt, strict=True) for i in piece]
        assert example.labels.tolist() == expected

    s, e = "<|im_start|>", "<|im_end|>"
    check(
        "chatml",
        [s, "user\n甲", e, "\n", s, "assistant\n", "一", e, "\n", s, "user\n乙", e, "\n", s, "assistant\n", "二", e],
        "......xx.......xx",
    )
    # In one piece: SentencePiece's own ids of the stretch, of which those behind [/INST] are learnt.
    tokenizer = encoder_of(folders["llama2"]).tokenizer
    (example,) = encode_conversations([Conversation(1, learnt(turns))], encoder_of(folders["llama2"]))
    ids, labels = [], []
    for question, answer in turns:
        asked, both = (
            tokenizer.encode(text)[1:]
            for text in (f"[INST] {question} [/INST]", f"[INST] {question} [/INST] {answer} ")
        )
        assert both[: len(asked)] == asked
        ids += [1, *both, 2]
        labels += [-100] * (1 + len(asked)) + both[len(asked) :] + [2]
    assert (example.input_ids.tolist(), example.labels.tolist()) == (ids, labels)
    # Alpaca's words: an earlier answer ends in EOS too.
    encoder = encoder_of(folders["llama2"], "alpaca")
    (example,) = encode_conversations([Conversation(1, learnt(turns))], encoder)
    header = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    asked = [f"{header}### Instruction:\n甲\n\n### Response:", "\n\n### Instruction:\n乙\n\n### Response:"]
    ids, labels = [1], [-100]
    for question, answer in zip(asked, ("一", "二"), strict=True):
        prompt, whole = (tokenizer.encode(text)[1:] for text in (question, question + answer))
        ids += [*whole, 2]
        labels += [-100] * len(prompt) + whole[len(prompt) :] + [2]
    assert (example.input_ids.tolist(), example.labels.tolist()) == (ids, labels)


def test_an_answer_that_is_not_to_be_learnt_carries_no_loss(folders):
    encoder = encoder_of(folders["chatml"])
    first, second = learnt([("甲", "一"), ("乙", "二")]), [("甲", "一"), ("乙", "二")]
    messages = (first[0], Message("assistant", "一"), *first[2:])
    (example,) = encode_conversations([Conversation(1, messages)], encoder)
    (both,) = encode_conversations([Conversation(1, learnt(second))], encoder)
    assert example.input_ids.tolist() == both.input_ids.tolist()
    assert example.learnt == both.learnt[1:]


def with_template(folders, tmp_path, source: str) -> ChatEncoder:
    file = tmp_path / "own.jinja"
    file.write_text(source, encoding="utf-8")
    return encoder_of(folders["chatml"], str(file))


def test_a_role_that_the_template_refuses_is_told_by_record(folders):
    talks = [Conversation(n, learnt([("甲", "一")], "规则" if n in (2, 5) else "")) for n in range(1, 7)]
    with pytest.raises(UserError) as caught:
        encode_conversations(talks, encoder_of(folders["mistral"]))
    told = str(caught.value)
    assert "Only user and assistant roles are supported!: 2, 5" in told
    assert "--prompt_template alpaca" in told
    with pytest.raises(TemplateRefusal, match="Only user and assistant"):
        encoder_of(folders["mistral"]).prompt_ids(messages_of("甲", system="规则"))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content[:0] }}<|im_end|>{% endfor %}",
        "{{ messages.nothing.at_all }}",
        "{{ messages[0].content / 2 }}",
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
        "{% else %}assistant<|im_end|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    ],
    ids=["drops answers", "drops all texts", "undefined", "type", "ends before the answer"],
)
def test_a_template_that_loses_answers_is_refused_by_record(folders, tmp_path, source):
    with pytest.raises(UserError, match=r": 7\n.*--prompt_template alpaca"):
        encode_conversations([Conversation(7, learnt([("甲", "一")]))], with_template(folders, tmp_path, source))


CHATML = TEMPLATES["chatml"]
ASKED = "<|im_start|>user\n甲<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "answer", "asked", "expected"),
    [
        (CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'"), "一", f"{ASKED}<think>\n", "一"),
        (
            CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'").replace(
                "message['content']", "message['content'].split('</think>')[-1].lstrip()"
            ),
            "<think>\n想</think>一",
            f"{ASKED}<think>\n",
            "想</think>一",
        ),
        (
            "{% for m in messages if m.role == 'assistant' %}Answer: {{ m.content }}\n{% endfor %}" + CHATML,
            "一<|im_end|>",
            ASKED,
            "一<|im_end|>",
        ),
        (CHATML.replace("in messages", "in messages | reverse"), "一", ASKED, "一"),
    ],
    ids=["thinking begun", "thinking begun and taken out", "answer before the question", "last message first"],
)
def test_an_answer_is_learnt_behind_what_asks_for_it(folders, tmp_path, source, answer, asked, expected):
    """Although the template writes it behind other words, or in another place."""
    encoder = with_template(folders, tmp_path, source)
    messages = learnt([("甲", answer)])
    (example,) = encode_conversations([Conversation(1, messages)], encoder)
    prompt, said = encoder.prompt_ids(messages[:1]), encoder.tokenizer.encode(expected)
    assert encoder.tokenizer.spell(prompt) == asked
    assert example.input_ids.tolist() == [*prompt, *said, encoder.end_id]
    assert example.learnt == ((len(prompt), len(example)),)


def test_a_template_that_writes_no_end_gets_the_models_own(folders, tmp_path):
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder = with_template(folders, tmp_path, source)
    first, second = encode_conversations([Conversation(1, learnt([("甲", "一"), ("乙", "二")]))], encoder)
    tokenizer = encoder.tokenizer
    for example, asked, answer in (
        (first, "user: 甲\nassistant: ", "一\n"),
        (second, "user: 甲\nassistant: 一\nuser: 乙\nassistant: ", "二\n"),
    ):
        assert example.input_ids.tolist() == [*tokenizer.encode(asked + answer), tokenizer.eos_id]
        assert example.learnt[0][1] == len(example)
        assert example.labels[-1] == tokenizer.eos_id


def test_a_template_with_a_fault_names_the_line(folders, tmp_path):
    with pytest.raises(UserError, match=r"own\.jinja.*line 2.*--prompt_template alpaca"):
        with_template(folders, tmp_path, "{{ messages }}\n{% for %}")
    with pytest.raises(UserError, match="expected auto, alpaca, model, or a file"):
        encoder_of(folders["chatml"], str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match="expected auto, alpaca, model, or a file"):
        encoder_of(folders["chatml"], "a\0b")
    with pytest.raises(UserError, match=r"own\.jinja.*recursion.*--prompt_template alpaca"):
        with_template(folders, tmp_path, "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}")


def test_a_byte_order_mark_is_no_part_of_a_template(folders, tmp_path):
    (tmp_path / "marked.jinja").write_bytes(b"\xef\xbb\xbf" + TEMPLATES["chatml"].encode())
    assert encoder_of(folders["chatml"], str(tmp_path / "marked.jinja")).template.source == TEMPLATES["chatml"]


def test_a_date_stays_what_it_was(folders, tmp_path):
    encoder = encoder_of(folders["llama3"], day="2026-03-05")
    template = encoder.template
    assert template.date == "2026-03-05"
    assert "Today Date: 05 Mar 2026" in encoder.render(messages_of("甲"), True).text
    stored = PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict())), encoder.tokenizer)
    assert stored == template
    # What others make of the exported template has this date too.
    exported = shutil.copytree(folders["llama3"], tmp_path / "exported")
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    (exported / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template.source}))
    other = AutoTokenizer.from_pretrained(exported)
    expected = other.apply_chat_template(as_dicts(messages_of("甲")), add_generation_prompt=True, return_dict=False)
    assert encoder.prompt_ids(messages_of("甲")) == expected
    # A template of it, with the same source, a form that is not written out, and blanks at its beginning.
    file = tmp_path / "dated.jinja"
    file.write_text("\n {{ strftime_now('%Y') }} {% set f = '%m' %}{{ strftime_now(f) }}", encoding="utf-8")
    dated = choose_template(str(file), tmp_path, encoder.tokenizer, "2026-03-05")
    assert dated.render(messages_of("甲"), {}, True) == "\n 2026 2026-03-05"


def test_which_template_is_taken(folders, tmp_path):
    def chosen(folder, wanted="auto"):
        return choose_template(wanted, folder, Tokenizer(folder))

    own = chosen(folders["qwen2"])
    assert (own.name, own.source) == ("model", TEMPLATES["qwen2"])
    assert chosen(folders["qwen2"], "model") == own
    assert chosen(folders["qwen2"], "alpaca").name == "alpaca"
    bare = shutil.copytree(folders["qwen2"], tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chosen(bare).name == "alpaca"
    with pytest.raises(UserError, match="has no chat template of its own"):
        chosen(bare, "model")
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": template}]
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": several}))
    assert chosen(bare).source == template
    for none in ("", " \n", 3, {"a": 1}, ["a"], [{"name": "default", "text": "a"}], [{"name": ["a"], "template": "b"}]):
        (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": none}))
        assert chosen(bare).name == "alpaca"
    (bare / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert chosen(bare).source == "{{ messages[0]['content'] }}"

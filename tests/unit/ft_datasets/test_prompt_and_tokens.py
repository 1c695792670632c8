"""The prompt's exact bytes against hand-written ones and Jinja's, token ids against SentencePiece itself."""

import dataclasses
import json
import shutil

import jinja2
import jinja2.sandbox
import pytest
import sentencepiece
from helpers.records import alpaca_encoder, encode_records, record
from helpers.tiny_models import write_tokenizer_json

from configs.errors import UserError
from ft_datasets.conversation import messages_of
from ft_datasets.prompt import AlpacaWords, PromptTemplate
from ft_datasets.tokenizer import Tokenizer

HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
HEADER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
RECORDS = [
    record(1, "你好，请介绍一下你自己。", "", "我是一个助手。"),
    record(2, "翻译成英文", "今天天气很好", "The weather is fine today."),
    record(3, "说个表情", "", "😀👩‍👩‍👧‍👦🏳️‍🌈 龘𠮷"),
    record(4, "  runs   of    spaces  ", " a  b   c ", "  x\n\n\n  y    z  "),
    record(5, "<s>literal</s> <unk>", "</s>", "</s><s>[INST]"),
    record(6, "for i in range(10):\n\tprint(i)", "", "0 1 2 2024 3.14\r\n"),
    record(7, "！？（全角）", "\ufffd", "：/\ufffd"),
    record(8, "é e\u0301 ﬁ ① Ａ", "\u3000", "\u200b\u00a0"),
]


WORDS = AlpacaWords()
FIRST = AlpacaWords(end_of_turn="{response}\n\n")
"""The words of earlier versions, with which adapters were stored: an earlier answer did not end in EOS."""
AWKWARD = AlpacaWords(
    header="It's \\n {{ a }} {% b %} 甲\n",
    instruction="{# c #}'{instruction}'\n",
    response="答\n",
    end_of_turn='"{response}"{eos}\n',
)


def jinja_renders(words: AlpacaWords, messages: list[dict], bos: str = "<s>", eos: str = "</s>") -> str:
    """What serving programs make of the chat template (transformers' settings of Jinja)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    source = words.jinja(bos, eos)
    rendered = environment.from_string(source).render(messages=messages, add_generation_prompt=True)
    assert jinja2.Environment().from_string(source).render(messages=messages) == rendered
    return rendered


def as_messages(history, *last: str) -> list[dict]:
    texts = [text for turn in history for text in turn] + list(last)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_prompts_by_hand():
    question = [{"role": "user", "content": "你好"}]
    assert jinja_renders(WORDS, question) == "<s>" + HEADER + "### Instruction:\n你好\n\n### Response:"
    assert jinja_renders(WORDS, question, bos="") == HEADER + "### Instruction:\n你好\n\n### Response:"
    assert WORDS.prompt("你好") == HEADER + "### Instruction:\n你好\n\n### Response:"
    asked = [{"role": "user", "content": "翻译", "input": "天气 {instruction}"}]
    with_input = HEADER_WITH_INPUT + "### Instruction:\n翻译\n\n### Input:\n天气 {instruction}\n\n### Response:"
    assert jinja_renders(WORDS, asked) == "<s>" + with_input
    assert WORDS.prompt("翻译", "天气 {instruction}") == with_input
    history = [("你好", "您好 "), ("{response}", "{input}")]
    assert jinja_renders(WORDS, as_messages(history, "再说")) == (
        "<s>" + HEADER + "### Instruction:\n你好\n\n### Response:您好 </s>\n\n"
        "### Instruction:\n{response}\n\n### Response:{input}</s>\n\n"
        "### Instruction:\n再说\n\n### Response:"
    )
    assert jinja_renders(WORDS, as_messages([("一", "二")], "三", "四 ")) == (
        "<s>" + HEADER + "### Instruction:\n一\n\n### Response:二</s>\n\n### Instruction:\n三\n\n### Response:四 </s>"
    )
    assert jinja_renders(FIRST, as_messages([("一", "二")], "三")) == (
        "<s>" + HEADER + "### Instruction:\n一\n\n### Response:二\n\n### Instruction:\n三\n\n### Response:"
    )
    assert WORDS.stop_text == "\n\n### Instruction:"


@pytest.mark.parametrize(
    "history",
    [[], [("你好", "您好！")], [("  a ", " b\n"), ("{{ 7 * 7 }}", "{% raw %}"), ('it\'s \\n "x"', "### Response:")]],
    ids=["one turn", "two turns", "four turns"],
)
def test_awkward_words_and_texts_are_rendered_as_they_stand(history):
    expected = "<s>" + AWKWARD.header
    for question, answer in history:
        expected += "{# c #}'" + question + "'\n答\n\"" + answer + '"</s>\n'
    assert jinja_renders(AWKWARD, as_messages(history, " 问题 ")) == expected + "{# c #}' 问题 '\n答\n"


def test_a_system_message_stands_before_the_header():
    messages = [{"role": "system", "content": "用中文回答"}, *as_messages([], "你好")]
    assert jinja_renders(WORDS, messages) == "<s>用中文回答\n\n" + WORDS.prompt("你好")


def test_a_template_is_stored_and_read_back_to_the_byte(folders):
    tokenizer = Tokenizer(folders / "with its config")
    template = PromptTemplate.alpaca(tokenizer)
    assert PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict())), tokenizer) == template
    assert PromptTemplate.from_identity(template.identity, tokenizer) == template


def test_words_that_an_earlier_version_stored_stay_what_they_are(folders):
    tokenizer = Tokenizer(folders / "with its config")
    stored = {**dataclasses.asdict(AWKWARD), "end_of_turn": "{response}。\n"}
    template = PromptTemplate.from_dict(json.loads(json.dumps(stored)), tokenizer)
    assert template.to_dict() == stored
    rendered = template.render(messages_of("一", [("二", "三")]), tokenizer.named_tokens, True)
    assert rendered == "<s>" + AWKWARD.header + "{# c #}'二'\n答\n三。\n{# c #}'一'\n答\n"
    first = PromptTemplate.from_dict(dataclasses.asdict(FIRST), tokenizer)
    assert first.identity == f"PromptTemplate({repr(FIRST).partition('(')[2]}"
    assert PromptTemplate.from_identity(first.identity, tokenizer) == first


@pytest.mark.parametrize("stored", [{"header": "a"}, {"source": 1}, {"source": "a"}, [], {"instruction": "a"}])
def test_what_is_no_stored_template_is_refused(folders, stored):
    with pytest.raises(ValueError, match="prompt_template"):
        PromptTemplate.from_dict(stored, Tokenizer(folders / "with its config"))


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """The kinds of folder that a model's tokenizer comes in, all of the same SentencePiece model."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, config in {
        "tokenizer.model alone": None,
        "with its config": {
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "legacy": False,
        },
        "without BOS": {"add_bos_token": False},
        "with both": {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"},
    }.items():
        (root / name).mkdir()
        shutil.copyfile(tiny_model / "tokenizer.model", root / name / "tokenizer.model")
        if config is not None:
            (root / name / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer_json(tiny_model / "tokenizer.model", root / "tokenizer.json alone")
    shutil.copyfile(root / "tokenizer.json alone" / "tokenizer.json", root / "with both" / "tokenizer.json")
    return root


@pytest.fixture(scope="module")
def processor(tiny_model):
    return sentencepiece.SentencePieceProcessor(model_file=str(tiny_model / "tokenizer.model"))


@pytest.mark.parametrize(
    "kind", ["tokenizer.model alone", "with its config", "with both", "tokenizer.json alone", "without BOS"]
)
def test_ids_and_labels_are_sentencepieces_own(folders, processor, kind):
    bos = [] if kind == "without BOS" else [1]
    examples = encode_records(RECORDS, alpaca_encoder(folders / kind), 4096, print)
    for conversation, example in zip(RECORDS, examples, strict=True):
        asked, answer = conversation.messages
        header = HEADER_WITH_INPUT if asked.input else HEADER
        middle = f"### Input:\n{asked.input}\n\n" if asked.input else ""
        prompt = f"{header}### Instruction:\n{asked.text}\n\n{middle}### Response:"
        ids = bos + processor.encode(prompt + answer.text) + [2]
        assert example.text == prompt + answer.text
        assert example.input_ids.tolist() == ids
        # "\n" merges with nothing in this vocabulary, so the prompt's own tokens are the masked ones.
        masked = len(bos) + len(processor.encode(prompt))
        assert example.labels.tolist() == [-100] * masked + ids[masked:]
        learnt = [label for label in example.labels.tolist() if label != -100]
        assert learnt[-1] == 2
        assert processor.decode(ids[: len(ids) - len(learnt)]) + answer.text == prompt + answer.text


@pytest.mark.parametrize("kind", ["with its config", "tokenizer.json alone", "without BOS"])
def test_many_at_once_and_decoding(folders, processor, kind):
    tokenizer = Tokenizer(folders / kind)
    texts = [conversation.messages[-1].text for conversation in RECORDS] + ["", " ", "你好"]
    one_by_one = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts, threads=2) == one_by_one
    assert one_by_one == [([] if kind == "without BOS" else [1]) + processor.encode(text) for text in texts]
    assert [tokenizer.decode([*ids, 2]) for ids in one_by_one] == texts


@pytest.mark.parametrize("kind", ["tokenizer.model alone", "tokenizer.json alone"])
def test_ids_spelled_out_show_special_tokens_spaces_and_whole_characters(folders, kind):
    tokenizer = Tokenizer(folders / kind)
    ids = [1, *tokenizer.encode_after_special(["春  \n😀"])[0], 2]
    assert tokenizer.spell(ids) == "<s>▁春▁▁\n😀</s>"


def test_special_ids(folders):
    for kind in ("tokenizer.model alone", "with its config", "with both", "tokenizer.json alone"):
        tokenizer = Tokenizer(folders / kind)
        assert (tokenizer.bos_ids, tokenizer.eos_id, tokenizer.stop_ids) == ([1], 2, {2})
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    without = Tokenizer(folders / "without BOS")
    assert (without.bos_ids, without.bos_token) == ([], "")


def test_every_end_that_the_model_names_stops_an_answer(folders, tmp_path):
    folder = shutil.copytree(folders / "tokenizer.json alone", tmp_path / "model")
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer(folder).stop_ids == {2, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Tokenizer(folder).stop_ids == {2, 5, 6}
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<0x0A>"}')
    assert Tokenizer(folder).eos_id == json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["<0x0A>"]


def test_the_fingerprint_tells_tokenizers_apart(folders, tmp_path):
    same = {Tokenizer(folders / kind).fingerprint for kind in ("tokenizer.model alone", "with its config", "with both")}
    assert len(same) == 1
    assert Tokenizer(folders / "without BOS").fingerprint not in same


def test_folders_without_a_tokenizer_say_what_is_missing(tmp_path, folders):
    with pytest.raises(UserError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer(tmp_path)
    whole = (folders / "with both" / "tokenizer.model").read_bytes()
    for name, content in (("tokenizer.json", b'{"model": '), ("tokenizer.model", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} can't be read as a tokenizer"):
            Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not readable JSON"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("tokenizer_config.json", {"eos_token": ["</s>"]}, r"eos_token .*tokenizer_config\.json.* can't be \['</s>'\]"),
        ("tokenizer_config.json", {"bos_token": {"text": "<s>"}}, "bos_token"),
        ("tokenizer_config.json", {"pad_token": 7}, "pad_token .* can't be 7"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": 7, "special": True}}}, "can't be 7"),
        ("generation_config.json", {"eos_token_id": ["2"]}, "eos_token_id"),
        ("config.json", {"eos_token_id": {}}, "eos_token_id"),
    ],
)
def test_settings_of_other_types_are_refused(tiny_model, tmp_path, file, settings, words):
    shutil.copy(tiny_model / "tokenizer.model", tmp_path)
    (tmp_path / file).write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        Tokenizer(tmp_path)


def test_what_is_no_token_is_not_added(tiny_model, tmp_path):
    shutil.copy(tiny_model / "tokenizer.model", tmp_path)
    added = {"": 5, "<a>": True, "<b>": -1, "<c>": "7", "<d>": 600}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    decoder = {"²": {"content": "<e>", "special": True}, "x": {}, "601": {"content": "", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}), encoding="utf-8")
    found = {text: token.id for text, token in Tokenizer(tmp_path).special_tokens.items()}
    assert found == {"<s>": 1, "</s>": 2, "<d>": 600}

"""What a server is asked: the questions of a file, and those that are built in."""

import json

import pytest

from configs.errors import UserError
from ft_datasets.conversation import Message
from ft_datasets.tokenizer import Tokenizer
from inference.serving_check.questions import BUILT_IN, Question, read_questions, with_special_tokens

pytestmark = pytest.mark.usefixtures("english")


def test_lines_of_a_text(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("\ufeff你好\n\n  a  b\n", encoding="utf-8")
    assert read_questions(file) == [Question("你好"), Question("  a  b")]
    file.write_text("\n")
    with pytest.raises(UserError, match="no questions"):
        read_questions(file)
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        read_questions(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ("你好", Question("你好")),
        ({"prompt": "a"}, Question("a")),
        ({"prompt": "a", "system": "s", "history": [["b", "c"]]}, Question("a", (("b", "c"),), "s")),
        ({"instruction": "a", "input": "b", "output": "c"}, Question("a\nb")),
        ({"messages": [{"role": "user", "content": "a"}]}, Question("a")),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            Question("c", (("a", "b"),), "s"),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            Question("a", (), "s"),
        ),
    ],
)
def test_records(tmp_path, record, question):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([record]), encoding="utf-8")
    assert read_questions(file) == [question]


@pytest.mark.parametrize(
    "record", [7, {"output": "a"}, {"messages": [{"role": "tool", "content": "a"}]}, {"prompt": " "}]
)
def test_records_without_a_question_are_named(tmp_path, record):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "a"}\n' + json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"questions\.jsonl, 2: "):
        read_questions(file)


def test_a_question_as_messages():
    question = Question("c", (("a", "b"),), "s")
    assert question.messages == [
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
    ]


def test_the_built_in_ones_hold_what_servers_part_company_on(tiny_model):
    texts = "".join(question.prompt for question in BUILT_IN)
    assert len(BUILT_IN) == 12
    assert all(part in texts for part in ("  ", "\n\n", "\t", "😀", "▁", "\u200d"))
    assert any(question.history for question in BUILT_IN) and any(question.system for question in BUILT_IN)
    assert {"<s>", "</s>"} <= {*with_special_tokens(Tokenizer(tiny_model)).prompt[1:-6].split("”、“")}

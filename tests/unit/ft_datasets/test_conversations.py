"""Conversations in their forms: what is read of them, and what is said of those that can't be used."""

import json
from collections import Counter

import pytest
from helpers.records import alpaca_encoder, record

from configs.command_line import parse
from configs.datasets import AlpacaDataset, ChatDataset
from configs.errors import UserError
from configs.training import TrainingConfig
from ft_datasets.conversation import Message
from ft_datasets.kinds import load_conversations
from ft_datasets.loading import fingerprint, load_data, mix
from ft_datasets.records import DataFiles


def load(tmp_path, entries, settings=None):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return load_conversations(settings or ChatDataset(str(path)), DataFiles((path,)))


def complaint(tmp_path, entries, settings=None) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, entries, settings)
    return str(caught.value)


def say(*roles: str, **more) -> dict:
    """A conversation of messages whose texts are their numbers."""
    return {"messages": [{"role": role, "content": str(number)} for number, role in enumerate(roles)], **more}


SYSTEM, ASKED, ANSWERED = Message("system", "规则"), Message("user", "问"), Message("assistant", "答", is_learnt=True)


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "system": None},
        {"messages": [{"from": "user", "value": "问", "name": ""}, {"from": "assistant", "value": "答", "weight": 1}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]}, {"role": "gpt", "content": "答"}]},
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "问"},
                {"role": "assistant", "content": "答", "tool_calls": None},
            ]
        },
    ],
)
def test_both_forms_and_their_mixtures_are_read_alike(tmp_path, entry):
    (found,) = load(tmp_path, [entry])
    assert found.messages == (ASKED, ANSWERED)


def test_system_messages_and_answers_that_are_not_learnt(tmp_path):
    turns = [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答", "weight": 0},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
    ]
    first, second = load(
        tmp_path, [{"messages": [{"role": "system", "content": "规则"}, *turns]}, {"messages": turns, "system": "规则"}]
    )
    assert first.messages == second.messages == (SYSTEM, ASKED, Message("assistant", "答"), ASKED, ANSWERED)
    assert (first.number, second.number) == (1, 2)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (say("user", "user", "assistant"), "two messages of the user in a row"),
        (say("user", "assistant", "assistant"), "two messages of the assistant in a row"),
        (say("assistant", "user", "assistant"), "the assistant speaks first"),
        (say("system", "assistant"), "the assistant speaks first"),
        (say("user", "assistant", "user"), "the last message, a user's, has no answer"),
        (say("user", "assistant", "system", "user", "assistant"), "a system message that is not the first one"),
        (say("system"), "no messages"),
        (say(), "no messages"),
        (say("user", "tool", "assistant"), 'a message of role "tool": the use of tools is not trained here'),
        (say("user", "observation"), 'a message of role "observation": the use of tools'),
        (say("user", "机器人"), 'a message of role "机器人"; there are system, user, human, assistant, gpt'),
        ({"text": "a"}, 'without "messages" (or "conversations")'),
        ({"messages": "a"}, '"messages" is not a list of messages'),
        ({"messages": ["a"]}, '"messages" is not a list of messages'),
        ({"messages": [{"content": "a"}]}, 'a message without "role"'),
        ({"messages": [{"role": "user"}]}, 'a message without "content"'),
        ({"messages": [{"role": "user", "content": " \n"}]}, '"user" is empty'),
        ({"messages": [{"role": "user", "content": 3}]}, '"user" is not text'),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, '"user" holds half a character'),
        (
            {"messages": [{"role": "user", "content": "a", "name": "b"}]},
            'a message with "name", which would be dropped',
        ),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, 'a message with "tool_calls"'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a message with pictures or sounds"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, '"weight" is neither 0 nor 1'),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "no answer to learn",
        ),
        (say("user", "assistant", conversations=[{"from": "human", "value": "a"}]), "beside another"),
        ({"messages": [{"role": "user", "content": "a", "value": "b"}]}, '"content" beside another "value"'),
        ({"messages": [{"role": "user", "from": "gpt", "content": "a"}]}, '"role" beside another "from"'),
        ({"messages": [{"role": "user", "content": "a", "last": False}]}, 'a message with "last", which'),
        (say("user", "assistant", id=7, tools=["x"]), "--chat_dataset.ignore_fields id,tools allows it"),
        ("a: b", "not an object"),
    ],
)
def test_odd_conversations_are_named_by_record(tmp_path, entry, words):
    told = complaint(tmp_path, [say("user", "assistant"), entry, say("user", "assistant"), entry])
    (line,) = [line for line in told.split("\n") if words in line]
    assert line.endswith(": 2, 4")


def test_alpacas_history_and_system_become_turns(tmp_path):
    settings = AlpacaDataset()
    entry = {"instruction": "三", "input": "四", "output": "五", "history": [["一", "二"]], "system": "规则"}
    (found,) = load(tmp_path, [entry], settings)
    first = (Message("user", "一"), Message("assistant", "二", is_learnt=True))
    last = (Message("user", "三", "四"), Message("assistant", "五", is_learnt=True))
    assert found.messages == (SYSTEM, *first, *last)
    (plain,) = load(tmp_path, [{"instruction": "a", "output": "b", "history": [], "system": " "}], settings)
    assert plain == record(1, "a", "", "b")
    for history in ("a", [["a"]], [["a", "b", "c"]], [{"a": "b"}]):
        told = complaint(tmp_path, [{"instruction": "a", "output": "b", "history": history}], settings)
        assert '"history" is not a list of [question, answer]: 1' in told
    assert '"history" is not text: 1' in complaint(
        tmp_path, [{"instruction": "a", "output": "b", "history": [[1, "b"]]}], settings
    )


def test_fields_that_would_be_lost_are_refused_unless_they_may_be(tmp_path):
    entries = [{"instruction": "a", "output": "b", "id": 0}, {"instruction": "a", "output": "b", "source": "", "x": []}]
    told = complaint(tmp_path, entries, AlpacaDataset())
    assert 'with "id", which would be dropped (--alpaca_dataset.ignore_fields id allows it): 1' in told
    found = load(tmp_path, entries, AlpacaDataset(ignore_fields=["id"]))
    assert found == [record(1, "a", "", "b"), record(2, "a", "", "b")]


def test_fields_of_messages_may_be_ignored_too(tmp_path):
    asked = {"role": "user", "content": "问", "name": "甲"}
    entries = [{"messages": [asked, {"role": "assistant", "content": "答"}], "conversations": []}]
    told = complaint(tmp_path, entries)
    assert 'a message with "name", which would be dropped (--chat_dataset.ignore_fields name allows it): 1' in told
    (found,) = load(tmp_path, entries, ChatDataset(ignore_fields=["name"]))
    assert found.messages == (ASKED, ANSWERED)


def test_nothing_is_lost_where_fields_have_other_names(tmp_path):
    """Neither what has a message's name and is the record's, nor what has the name that another field is read by."""
    messages = [{"role": "user", "text": "问"}, {"role": "assistant", "text": "答"}]
    renamed = {"columns": ["content=text"]}
    told = complaint(tmp_path, [{"messages": messages, "text": "a"}], ChatDataset(**renamed))
    assert 'with "text", which would be dropped' in told
    entries = [{"messages": [{**messages[0], "content": "别的"}, messages[1]]}]
    assert 'a message with "content", which would be dropped' in complaint(tmp_path, entries, ChatDataset(**renamed))
    (found,) = load(tmp_path, entries, ChatDataset(ignore_fields=["content"], **renamed))
    assert found.messages == (ASKED, ANSWERED)


def test_fields_by_other_names(tmp_path):
    settings = AlpacaDataset(columns=["instruction=问题", "output = answer"])
    assert load(tmp_path, [{"问题": "a", "answer": "b", "input": "c"}], settings) == [record(1, "a", "c", "b")]
    # What the data itself calls so is another field, and would be lost.
    told = complaint(tmp_path, [{"问题": "a", "answer": "b", "output": "old"}], settings)
    assert 'with "output", which would be dropped' in told
    chat = ChatDataset(columns=["messages=对话", "role=speaker", "content=text", "user=客户", "assistant=客服"])
    talk = [{"speaker": "客户", "text": "问"}, {"speaker": "客服", "text": "答"}]
    (found,) = load(tmp_path, [{"对话": talk}], chat)
    assert found.messages == (ASKED, ANSWERED)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--alpaca_dataset.columns", "question=a"], "with a NAME of instruction, input"),
        (["--alpaca_dataset.columns", "instruction"], "expected NAME=ITS NAME IN THE DATA"),
        (["--alpaca_dataset.columns", "instruction=a,output=a"], "one field of the data can't stand for two"),
        (["--alpaca_dataset.weights", "2"], "has 1 numbers, and data_path 2 files"),
        (["--alpaca_dataset.weights", "2,0"], "weights 0: each must be a number above 0"),
        (["--alpaca_dataset.weights", "2,nan"], "weights nan: each must be"),
        (["--alpaca_dataset.weights", "2,x"], "weights x: each must be"),
        (["--alpaca_dataset.data_path", "a,b,a"], "has a twice: give it once, and --alpaca_dataset.weights 2"),
        (["--dataset", "chat_dataset"], "--chat_dataset.data_path needs a value"),
        (["--dataset", "custom_dataset"], "--custom_dataset.file needs a value"),
        (["--chat_dataset.data_path", "a"], "--chat_dataset has an effect only with --dataset chat_dataset"),
    ],
)
def test_settings_of_data_are_checked_before_anything_is_read(argv, words):
    with pytest.raises(UserError) as caught:
        parse(TrainingConfig, ["--alpaca_dataset.data_path", "a.json,hub:o/n", *argv])
    assert words in str(caught.value)


def write_files(tmp_path, *sizes: int) -> str:
    paths = []
    for name, size in zip("abc", sizes, strict=False):
        path = tmp_path / f"{name}.jsonl"
        lines = [{"instruction": f"{name}{number}", "output": "答"} for number in range(size)]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        paths.append(str(path))
    return ",".join(paths)


def mixture(tiny_model, data_path: str, weights: list[str], **more) -> Counter[str]:
    config = TrainingConfig(alpaca_dataset=AlpacaDataset(data_path, weights), **more)
    data = load_data(config, alpaca_encoder(tiny_model), print)
    assert not {e.number for e in data.training} & {e.number for e in data.held_out}
    return Counter(example.text.split("Instruction:\n")[1].split("\n")[0] for example in data.training)


def test_files_are_mixed_by_their_weights(tiny_model, tmp_path):
    paths = write_files(tmp_path, 20, 10, 4)
    found = mixture(tiny_model, paths, ["2", "0.5", "1.25"], run_validation=False)
    assert Counter(name[0] for name in found.elements()) == {"a": 40, "b": 5, "c": 5}
    assert set(found[f"a{number}"] for number in range(20)) == {2}
    assert max(found[f"b{number}"] for number in range(10)) == 1
    assert sorted(found[f"c{number}"] for number in range(4)) == [1, 1, 1, 2]
    assert found == mixture(tiny_model, paths, ["2", "0.5", "1.25"], run_validation=False)
    assert found != mixture(tiny_model, paths, ["2", "0.5", "1.25"], run_validation=False, seed=1)
    held = mixture(tiny_model, paths, ["2", "0.5", "1.25"], val_set_size=8)
    assert len(held) < len(found)
    assert mixture(tiny_model, paths, [], run_validation=False).total() == 34


def test_a_weight_that_leaves_nothing_of_a_file_is_told(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"--alpaca_dataset\.weights leave no example of .*b\.jsonl"):
        mixture(tiny_model, write_files(tmp_path, 4, 4), ["1", "0.1"], run_validation=False)


def test_a_mixture_has_the_same_order_each_time(tiny_model, tmp_path):
    paths = write_files(tmp_path, 20, 10)
    config = TrainingConfig(alpaca_dataset=AlpacaDataset(paths, ["1.5", "0.5"]))
    first, second = (load_data(config, alpaca_encoder(tiny_model), print) for _time in range(2))
    assert fingerprint(first.training) == fingerprint(second.training)
    assert [e.number for e in first.training] == sorted(e.number for e in first.training)


def test_each_source_has_its_own_share():
    assert mix([*"abcd"], [0, 0, 1, 1], [1, 1], 0) == [*"abcd"]
    found = Counter(mix([*"abcdefgh"], [0] * 4 + [1] * 4, [0.25, 1.25], 0))
    assert sum(found[name] for name in "abcd") == 1
    assert sum(found[name] for name in "efgh") == 5


def test_a_name_with_a_comma_in_it_is_one_file(tmp_path):
    path = tmp_path / "a,b.json"
    path.write_text("[]")
    assert AlpacaDataset(str(path)).paths == [str(path)]
    assert AlpacaDataset(f"{tmp_path}/a, hub:o/n:test").paths == [f"{tmp_path}/a", "hub:o/n:test"]

"""Records, their checks, and how they become tokens and labels, against hand-written expectations."""

import json

import numpy as np
import pytest
from helpers.records import encode_records, load_records, record
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, processors

from configs.errors import UserError
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import Conversation
from ft_datasets.encoding import common_prefix, describe_lengths, split_examples
from ft_datasets.examples import Example
from ft_datasets.prompt import AlpacaWords, PromptTemplate
from ft_datasets.tokenizer import Tokenizer

GOOD = {"instruction": "问", "output": "答"}


def complaint(tmp_path, content: bytes | object) -> str:
    """What is said about a data file that can't be used."""
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError) as caught:
        load_records(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_records_are_read_as_they_stand(tmp_path):
    path = tmp_path / "data.json"
    entries = [
        {"instruction": " 问  题 ", "input": "", "output": "答\n案 "},
        {"instruction": "a", "input": None, "output": "b", "source": ""},
        {"instruction": "c", "input": " d", "output": "😀"},
    ]
    path.write_text("\ufeff" + json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    assert load_records(path) == [
        record(1, " 问  题 ", "", "答\n案 "),
        record(2, "a", "", "b"),
        record(3, "c", " d", "😀"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"instruction": "a",\n "output": "b"},\n {"instruction": oops}]', ["line 3, column 18"]),
        (b'[{"instruction": "a", "output": "b"}', ["line 1, column 37"]),
        (b"", ["line 1, column 1"]),
        (b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n', ["line 2", "JSON lines"]),
        (b'{"instruction": "a", "output": "b"}', ["not a list"]),
        (b"[]", ["list is empty"]),
        (b"[\n" + '{"instruction": "你好"'.encode("gb18030"), ["line 2", "not UTF-8", "iconv"]),
        ("[]".encode("utf-16"), ["line 1", "not UTF-8"]),
        (b"[" * 100_000, ["nested too deep"]),
    ],
)
def test_files_that_are_no_list_of_records(tmp_path, content, words):
    message = complaint(tmp_path, content)
    assert all(word in message for word in words)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json is not there.*--alpaca_dataset\.data_path"):
        load_records(tmp_path / "missing.json")
    with pytest.raises(UserError, match="can't be read"):
        load_records(tmp_path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"output": "b"}, 'without "instruction"'),
        ({"instruction": "a"}, 'without "output"'),
        ({"instruction": None, "output": "b"}, 'without "instruction"'),
        ({"instruction": 3, "output": "b"}, '"instruction" is not text'),
        ({"instruction": 0, "output": "b"}, '"instruction" is not text'),
        ({"instruction": "a", "output": []}, '"output" is not text'),
        ({"instruction": "a", "output": ["b"]}, '"output" is not text'),
        ({"instruction": "a", "input": 0, "output": "b"}, '"input" is not text'),
        ({"instruction": "a", "input": {}, "output": "b"}, '"input" is not text'),
        ({"instruction": " \n", "output": "b"}, '"instruction" is empty'),
        ({"instruction": "a", "output": ""}, '"output" is empty'),
        ({"instruction": "a", "output": "\ud83d"}, '"output" holds half a character'),
        ("a: b", "not an object"),
        (None, "not an object"),
    ],
)
def test_records_that_can_not_be_used_are_numbered_from_one(tmp_path, entry, words):
    message = complaint(tmp_path, [GOOD, entry, GOOD, entry])
    assert f"  {words}" in message
    assert any(line.endswith(": 2, 4") for line in message.split("\n"))


def test_every_kind_of_bad_record_is_told_at_once(tmp_path):
    message = complaint(tmp_path, [{"output": "b"}] * 12 + [GOOD, 5, {"instruction": "a", "output": 1}])
    lines = message.split("\n")
    assert '  without "instruction": 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more' in lines
    assert "  not an object with named fields: 14" in lines
    assert '  "output" is not text: 15' in lines


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Tokenizer:
    """A tokenizer whose ids can be written by hand: <s> 1, </s> 2, letters from 10 on, ':/' one token of its own."""
    vocab = {"<s>": 1, "</s>": 2, ":": 3, "/": 4, ":/": 5, "!": 6} | {
        letter: 10 + i for i, letter in enumerate("abcdef")
    }
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[(":", "/")]))
    fast.add_special_tokens(["<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("letters")
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


SHORT = AlpacaWords(header="", header_with_input="!", instruction="{instruction}", input="/{input}", response=":")


def encode(letters, *records: Conversation, limit: int = 100):
    said: list[str] = []
    template = PromptTemplate("short", SHORT.jinja("<s>", "</s>"))
    return encode_records(records, ChatEncoder(template, letters), limit, said.append), said


def test_ids_and_labels_by_hand(letters):
    (plain, with_input, merged), said = encode(
        letters, record(1, "a", "", "bc"), record(2, "a", "d", "b"), record(3, "a", "", "/b")
    )
    assert plain.text == "a:bc"
    assert plain.input_ids.tolist() == [1, 10, 3, 11, 12, 2]
    assert plain.labels.tolist() == [-100, -100, -100, 11, 12, 2]
    assert with_input.text == "!a/d:b"
    assert with_input.input_ids.tolist() == [1, 6, 10, 4, 13, 3, 11, 2]
    assert with_input.labels.tolist() == [-100] * 6 + [11, 2]
    # ':' and '/' became one token, which carries a part of the response: it is learnt.
    assert merged.input_ids.tolist() == [1, 10, 5, 11, 2]
    assert merged.labels.tolist() == [-100, -100, 5, 11, 2]
    assert [example.label_count for example in (plain, with_input, merged)] == [3, 2, 3]
    assert said == []


def test_too_long_examples_are_left_out_and_named_but_never_cut(letters):
    records = [record(number, "a", "", "b" * number) for number in range(1, 6)]
    kept, (said,) = encode(letters, *records, limit=6)  # BOS, a, ':', EOS and two more
    assert [example.number for example in kept] == [1, 2]
    assert all(example.input_ids[-1] == 2 for example in kept)
    assert all(words in said for words in ("3 of 5", "--max_seq_length 6", "records 3, 4, 5", "9 tokens"))


def test_a_length_that_no_example_fits_in_is_refused(letters):
    with pytest.raises(UserError, match="--max_seq_length 4"):
        encode(letters, record(1, "a", "", "b"), limit=4)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2, 4, 5], 2), ([1, 2, 3], [1, 2], 2), ([], [1], 0), ([5], [6], 0)],
)
def test_common_prefix(one, other, expected):
    assert common_prefix(one, other) == expected


def test_the_held_out_examples_are_a_seeded_choice(letters):
    examples, _said = encode(letters, *(record(number, "a", "", "b") for number in range(1, 101)))
    training, held_out = split_examples(examples, 0.05, seed=3)
    numbers = [[example.number for example in part] for part in (training, held_out)]
    assert len(numbers[1]) == 5
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 101))
    assert numbers == [sorted(part) for part in numbers]
    assert numbers[1] == [example.number for example in split_examples(examples, 0.05, seed=3)[1]]
    assert numbers[1] != [example.number for example in split_examples(examples, 0.05, seed=4)[1]]


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(100, 0, 0), (100, 7, 7), (10_000, 0.05, 200), (3, 2, 2), (1, 0.4, 0)]
)
def test_how_many_are_held_out(count, size, expected):
    examples = [Example(number, "", np.array([1, 2]), ((1, 2),)) for number in range(1, count + 1)]
    training, held_out = split_examples(examples, size, seed=0)
    assert (len(held_out), len(training)) == (expected, count - expected)


def test_lengths_are_described(letters):
    examples, _said = encode(
        letters, record(1, "a", "", "b"), record(2, "a", "", "bbb")
    )  # 5 and 7 tokens, 2 and 4 learnt
    assert describe_lengths(examples) == (
        "tokens an example: mean 6, 90 % below 6, longest 7; 50 % of all tokens carry loss"
    )

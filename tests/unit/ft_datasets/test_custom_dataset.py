"""Data of a user's own function: records, token ids, and what is said of those that fail."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.environment import ROOT
from helpers.records import alpaca_encoder, record

from configs.datasets import CustomDataset
from configs.errors import UserError
from configs.training import TrainingConfig
from ft_datasets.custom_dataset import load_custom
from ft_datasets.examples import Example
from ft_datasets.loading import load_data


def write(tmp_path: Path, source: str, name: str = "my_data.py") -> str:
    (tmp_path / name).write_text(source, encoding="utf-8")
    return str(tmp_path / name)


def test_records_of_both_forms_and_token_ids(tmp_path):
    file = write(
        tmp_path,
        "def get_data(settings, tokenizer, split):\n"
        "    assert settings.file.endswith(':get_data')\n"
        "    yield {'instruction': tokenizer, 'output': split}\n"
        "    yield {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}\n"
        "    yield {'input_ids': [7, 8, 9, 4, 5], 'labels': [7, 8, -100, -100, 5], 'attention_mask': [1] * 5}\n",
    )
    first, second, third = load_custom(CustomDataset(f"{file}:get_data"), "问", "train")
    assert (first, second) == (record(1, "问", "", "train"), record(2, "a", "", "b"))
    assert isinstance(third, Example)
    # Nothing is predicted before the first token.
    assert (third.number, third.input_ids.tolist(), third.learnt) == (3, [7, 8, 9, 4, 5], ((1, 2), (4, 5)))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{'input_ids': [1, 2]}", "not lists of as many token ids"),
        ("{'input_ids': [1, 2], 'labels': [1]}", "not lists of as many token ids"),
        ("{'input_ids': [[1, 2]], 'labels': [[1, 2]]}", "not lists of as many token ids"),
        ("{'input_ids': [1, 2 ** 40], 'labels': [1, 2]}", "not lists of as many token ids"),
        ("{'input_ids': ['a'], 'labels': [1]}", "not lists of as many token ids"),
        ("{'input_ids': [1.5, 2.5], 'labels': [1.5, 2.5]}", "not lists of as many token ids"),
        ("{'input_ids': ['1', '2'], 'labels': ['1', '2']}", "not lists of as many token ids"),
        ("{'input_ids': [-3, 2], 'labels': [-3, 2]}", "not lists of as many token ids"),
        ("{'input_ids': [True, True], 'labels': [1, 1]}", "not lists of as many token ids"),
        ("{'input_ids': np.array([5, 2**32 + 7]), 'labels': np.array([5, 7])}", "not lists of as many token ids"),
        ("{'input_ids': [0, 5, 6], 'labels': [-100, 5, 6], 'attention_mask': [0, 1, 1]}", "leave padding out"),
        ("{'instruction': 'a', 'output': 'b', 'id': np.array([1, 2])}", 'with "id", which would be dropped'),
        ("{'input_ids': [], 'labels': []}", "not lists of as many token ids"),
        ("{'input_ids': [1, 2], 'labels': [1, 3]}", '"labels" holds others'),
        ("{'input_ids': [1, 2], 'labels': [1, -100]}", '"labels" leaves nothing to learn'),
        ("{'instruction': 'a'}", 'without "output"'),
        ("{'dialogue': 'a'}", 'without "messages"'),
        ("'a'", "not an object"),
    ],
)
def test_what_can_not_be_used_is_told_by_number(tmp_path, value, words):
    good = "{'instruction': 'a', 'output': 'b'}"
    file = write(tmp_path, f"import numpy as np\n\ndef get_custom_dataset(*_given):\n    return [{good}, {value}]\n")
    with pytest.raises(UserError, match=rf"(?s)my_data\.py \(train\).*{re.escape(words)}.*: 2$"):
        load_custom(CustomDataset(file), None, "train")


def test_a_function_that_is_not_there_or_fails_is_told_with_its_line(tmp_path):
    def told(file: str) -> str:
        with pytest.raises(UserError) as caught:
            load_custom(CustomDataset(file), None, "train")
        return str(caught.value)

    assert "none.py is not there" in told(str(tmp_path / "none.py:f"))
    assert "has no function g." in told(write(tmp_path, "def f(): pass") + ":g")
    assert "name must end in .py" in told(write(tmp_path, "", "data.txt"))
    assert re.search(
        r"failed at .*broken\.py:2: ValueError: oh", told(write(tmp_path, "\nraise ValueError('oh')", "broken.py"))
    )
    assert "SyntaxError" in told(write(tmp_path, "def f(:", "syntax.py"))
    later = write(
        tmp_path, "def get_custom_dataset(*_given):\n    yield {'instruction': 'a', 'output': 'b'}\n    1 / 0\n"
    )
    assert re.search(r"my_data\.py:3: ZeroDivisionError", told(later))


def test_a_failure_is_told_by_the_line_of_the_users_own_file(tmp_path):
    file = write(tmp_path, "import json\n\n\ndef get_custom_dataset(*_given):\n    return json.loads('{')\n")
    with pytest.raises(UserError, match=r"my_data\.py:5: JSONDecodeError"):
        load_custom(CustomDataset(file), None, "train")
    with pytest.raises(UserError, match=r"syntax\.py:2: SyntaxError"):
        load_custom(CustomDataset(write(tmp_path, "\ndef f(:", "syntax.py")), None, "train")
    with pytest.raises(UserError, match=r"exits\.py:2: SystemExit"):
        load_custom(CustomDataset(write(tmp_path, "import sys\nsys.exit(0)", "exits.py")), None, "train")


@pytest.mark.parametrize("given", ["{'train': []}", "'abc'", "5"])
def test_what_is_no_list_of_records_is_told_by_its_kind(tmp_path, given):
    file = write(tmp_path, f"def get_custom_dataset(*_given):\n    return {given}\n")
    with pytest.raises(UserError, match=r"my_data\.py gave a (dict|str|int) for train: a list of records"):
        load_custom(CustomDataset(file), None, "train")


@pytest.mark.parametrize("given", ["None", "[]", "iter(())"])
def test_no_records_to_train_on_are_told(tmp_path, given):
    file = write(tmp_path, f"def get_custom_dataset(*_given):\n    return {given}\n")
    with pytest.raises(UserError, match="there are no records in it"):
        load_custom(CustomDataset(file), None, "train")
    assert load_custom(CustomDataset(file), None, "validation") == []


def test_tables_and_a_tokenizers_own_mappings_are_read(tmp_path):
    source = "from datasets import Dataset\nfrom transformers import BatchEncoding\n\n"
    rows = "{'input_ids': [7, 8], 'labels': [-100, 8]}"
    for given in (f"[BatchEncoding({rows})]", f"Dataset.from_list([{rows}]).with_format('torch')"):
        file = write(tmp_path, f"{source}def get_custom_dataset(*_given):\n    return {given}\n")
        (found,) = load_custom(CustomDataset(file), None, "train")
        assert (found.input_ids.tolist(), found.learnt) == ([7, 8], ((1, 2),))


def load(tmp_path, tiny_model, source: str, **more):
    config = TrainingConfig(model_name=str(tiny_model), dataset="custom_dataset", **more)
    config.custom_dataset.file = write(tmp_path, source)
    return load_data(config, alpaca_encoder(tiny_model), print)


def test_a_function_may_hold_examples_out_itself(tmp_path, tiny_model):
    source = (
        "def get_custom_dataset(settings, tokenizer, split):\n"
        "    count = 4 if split == 'train' else 2\n"
        "    ids = tokenizer.encode('你好')\n"
        "    return [{'input_ids': ids + [number], 'labels': ids + [number]} for number in range(10, 10 + count)]\n"
    )
    data = load(tmp_path, tiny_model, source)
    assert [len(data.training), len(data.held_out)] == [4, 2]
    assert np.array_equal(data.training[0].input_ids[:-1], alpaca_encoder(tiny_model).tokenizer.encode("你好")[1:])
    assert len(load(tmp_path, tiny_model, source, run_validation=False).held_out) == 0
    split = load(tmp_path, tiny_model, source.replace("else 2", "else 0"), val_set_size=1)
    assert [len(split.training), len(split.held_out)] == [3, 1]


def test_tokens_that_the_model_has_no_embedding_for_are_told_by_record(tmp_path, tiny_model):
    rows = "[{'input_ids': [5, last], 'labels': [5, last]} for last in (599, 600, 70000)]"
    with pytest.raises(UserError, match=r"embeddings for 600 tokens, and these records hold others: 2, 3\."):
        load(tmp_path, tiny_model, f"def get_custom_dataset(*_given):\n    return {rows}\n")


def examples_of_docs() -> dict[str, str]:
    """The programs of docs/custom_data.md, by the name of their function."""
    text = (ROOT / "docs" / "custom_data.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return {re.search(r"def (\w+)\(", program)[1]: program for program in programs}


def test_the_worked_examples_of_the_documents_run(tmp_path, monkeypatch):
    """samsum and grammar, as llama-recipes had them, on rows of this project's own."""
    import datasets

    rows = {
        "knkarthick/samsum": [{"id": "1", "dialogue": "A: 在吗？\nB: 在。", "summary": "A 问 B 在不在。"}],
        "jfleg": [{"sentence": "He go home . ", "corrections": ["He goes home . ", "He went home . "]}],
    }
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    programs = examples_of_docs()
    for name, expected in {
        "get_samsum": [("A: 在吗？\nB: 在。", "A 问 B 在不在。")],
        "get_grammar": [("He go home .", "He goes home ."), ("He go home .", "He went home .")],
    }.items():
        file = write(tmp_path, programs[name], f"{name}.py")
        for split in ("train", "validation"):
            found = load_custom(CustomDataset(f"{file}:{name}"), None, split)
            texts = [[message.input or message.text for message in conversation.messages] for conversation in found]
            assert texts == [list(pair) for pair in expected]
    assert [name for name, _split in asked] == ["knkarthick/samsum"] * 2 + ["jfleg"] * 2

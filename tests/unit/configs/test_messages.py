"""The Chinese catalogue: it has every message, nothing else, and programs speak it where the locale asks for it."""

import ast
import re
from string import Formatter

import pytest
from helpers.command_runs import run_script
from helpers.environment import ENVIRONMENT, ROOT

from scripts import catalogue

USAGE = "configs/command_line.py"
"""The one file that translates texts which it doesn't hold itself: docstrings."""


@pytest.fixture(scope="module")
def current():
    """The messages that the sources hold."""
    return [message.id for message in catalogue.current_messages() if message.id]


@pytest.fixture(scope="module")
def stored():
    """What the .po file holds."""
    return catalogue.read_catalog()


def placeholders(text: str) -> set[tuple]:
    """The {fields} of a text with their conversions and formats."""
    return {part[1:] for part in Formatter().parse(text) if part[1] is not None}


def listed(heading: str, texts: list[str]) -> str:
    """What a failing test shows."""
    return "\n".join([f"{heading} (run `make catalogue`, then edit {catalogue.PO_FILE}):", *map(repr, texts)])


def test_every_message_has_its_chinese(current, stored):
    lacking = set(catalogue.untranslated(stored))
    missing = [text for text in current if text not in stored or text in lacking]
    assert not missing, listed("without a translation", missing)


def test_no_translation_is_stale(current, stored):
    stale = [message.id for message in stored if message.id and message.id not in current] + list(stored.obsolete)
    assert not stale, listed("no longer in the sources", stale)


def test_placeholders_are_the_same(stored):
    differing = [m.id for m in stored if m.id and placeholders(m.id) != placeholders(m.string)]
    assert not differing, listed("other placeholders", differing)


def test_chinese_has_full_width_punctuation(stored):
    half = [message.string for message in stored if message.id and re.search(r"[\u4e00-\u9fff][,;:?!]", message.string)]
    assert not half, listed("half-width punctuation after a Chinese character", half)


def test_the_compiled_file_is_the_catalogue(stored):
    assert catalogue.MO_FILE.read_bytes() == catalogue.compiled(stored), "run `make catalogue`"


def test_no_message_is_hidden_from_the_catalogue(stored):
    """A plain walk over the syntax trees: `_()` of anything but a literal would never be found by the extraction."""
    seen = 0
    for path in catalogue.source_files():
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_":
                text = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                assert text in stored or (text is None and file == USAGE), f"{file}:{node.lineno}"
                seen += 1
    assert seen > 200


@pytest.mark.parametrize(
    ("language", "help_line", "error_line"),
    [
        ("zh_CN", "      训练多少轮，即全部训练数据过几遍。", "没有 --learning_speed 这个参数"),
        ("", "      Passes over the training examples.", "unknown flag --learning_speed"),
    ],
    ids=["Chinese", "English"],
)
def test_the_locale_chooses_the_language(language, help_line, error_line):
    environment = {**ENVIRONMENT, "LANGUAGE": language}
    shown = run_script("llama_finetuning.py", "--help", env=environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert help_line in shown.stdout.splitlines()
    refused = run_script("llama_finetuning.py", "--learning_speed", "1", env=environment)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(error_line)

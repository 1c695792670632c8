"""Text that comes piece by piece, against the whole decoded at once and Python's own UTF-8 decoder."""

import random
import shutil

import pytest
from helpers.tiny_models import TEXTS, write_tokenizer_json
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from ft_datasets.tokenizer import Tokenizer
from inference.detokenizer import IncrementalDecoder, StopText

FIXTURES = [
    "龘𠮷",
    "𠮷野家",
    "😀",
    " 😀 😀",
    "👩‍👩‍👧‍👦和🏳️‍🌈，e\u0301。",
    "“全角”，（标点）！？：；",
    "一个\ufffd在中间",
    "末尾\ufffd",
    "\ufffd",
    "\ufffd\ufffd\ufffd",
    " \ufffd \ufffd",
    "a\ufffd😀\ufffd\ufffd龘\ufffd",
    " 前面有空格",
    "   x  y   ",
    "\n\n换行\n",
    "plain English, 2024.",
    "<s>你好</s>",
]
ALPHABET = [*"你好龘𠮷😀é a  \n，。\ufffd\u200d\ufe0f👩🏽", "the ", "公园", "人工智能"]


@pytest.fixture(scope="module", params=["sentencepiece", "byte fallback", "byte level"])
def tokenizer(request, tiny_model, tmp_path_factory) -> Tokenizer:
    """Llama 2's kind read by SentencePiece, the same read by tokenizers, and Llama 3's and Qwen's kind."""
    folder = tmp_path_factory.mktemp("detokenizer") / "model"
    if request.param == "sentencepiece":
        folder.mkdir()
        shutil.copyfile(tiny_model / "tokenizer.model", folder / "tokenizer.model")
    elif request.param == "byte fallback":
        write_tokenizer_json(tiny_model / "tokenizer.model", folder)
    else:
        fast = FastTokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        fast.train_from_iterator([*TEXTS, "看 \ufffd\ufffd 和 \ufffd"] * 5, trainer)
        folder.mkdir()
        fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What the decoder returns for each id, and at the end."""
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)[len(tokenizer.bos_ids) :]


@pytest.mark.parametrize("text", FIXTURES)
def test_the_pieces_are_the_text(tokenizer, text):
    ids = plain_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    got = pieces(tokenizer, ids)
    assert "".join(got) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@pytest.mark.parametrize("text", FIXTURES)
def test_a_cut_inside_a_character_loses_that_character_alone(tokenizer, text):
    ids = plain_ids(tokenizer, text)
    for end in range(len(ids)):
        got = "".join(pieces(tokenizer, ids[:end]))
        assert text.startswith(got)
        # Every whole character whose last byte was given is there.
        whole = tokenizer.decode(ids[:end])
        if text.startswith(whole) and not whole.endswith("\ufffd"):
            assert got == whole


def test_random_texts(tokenizer):
    chooser = random.Random(1)
    for _round in range(150):
        text = "".join(chooser.choices(ALPHABET, k=chooser.randint(1, 12)))
        ids = plain_ids(tokenizer, text)
        assert "".join(pieces(tokenizer, ids)) == text == tokenizer.decode(ids)


def test_whole_characters_come_at_once(tokenizer):
    """A piece is not held back when its last character is whole."""
    decoder, text, got = IncrementalDecoder(tokenizer), "好😀龘的𠮷", ""
    for count, token_id in enumerate(plain_ids(tokenizer, text), 1):
        got += decoder.push(token_id)
        so_far = tokenizer.decode(plain_ids(tokenizer, text)[:count])
        if not so_far.endswith("\ufffd"):
            assert got == so_far


def test_stray_bytes_lose_nothing_around_them(tiny_model):
    """Any sequence of byte tokens, as an untrained model makes them, against SentencePiece's decoding of the whole."""
    tokenizer, chooser = Tokenizer(tiny_model), random.Random(2)
    words = [*plain_ids(tokenizer, "你好 the 公园，"), 0, 599]
    for _round in range(400):
        bytes_of_text = "龘😀é\ufffd".encode()
        ids = [
            chooser.choice(words) if chooser.random() < 0.3 else 3 + chooser.choice(bytes_of_text)
            for _position in range(chooser.randint(1, 24))
        ]
        ids.append(plain_ids(tokenizer, "好")[-1])
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", ["\n\n### Instruction:", "aab", "。"])
def test_a_stop_text_ends_the_answer_wherever_the_pieces_are_cut(stop):
    chooser = random.Random(3)
    for _round in range(300):
        text = "".join(chooser.choices([*"ab\n#。", "\n\n### Inst", "aa", stop], k=chooser.randint(1, 10)))
        cuts = sorted(chooser.choices(range(len(text) + 1), k=4))
        stop_text, given = StopText(stop), ""
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            given += stop_text.push(text[start:end])
            assert stop not in given
        given += stop_text.finish()
        assert given == text.split(stop)[0]
        assert stop_text.found == (stop in text)


def test_a_stop_text_holds_back_no_more_than_its_beginning():
    stop_text = StopText("aab")
    assert [stop_text.push(piece) for piece in ("xa", "a", "a", "c", "aa", "b", "d")] == [
        "x",
        "",
        "a",
        "aac",
        "",
        "",
        "",
    ]

import json
import random

import pytest
import sentencepiece
from helpers.tiny_models import TEXTS
from transformers import AutoTokenizer

from ft_datasets.prompt import PromptTemplate
from scripts.quickstart import train_sentencepiece
from utils.results.model_files import copy_tokenizer
from utils.results.tokenizer_files import sentencepiece_as_json

MORE = ["a  b   c", "   ", "\n", " x \n\n y\t\tz ", "🎉👨‍👩‍👧龘", "café ﬁ Ａ１", "1+1=？", "▁_▁", "\u3000全角"]


def random_texts(count: int) -> list[str]:
    """Texts of pieces that meet at odd places: words, runs of spaces, line ends, what the vocabulary does not know."""
    chance = random.Random(0)
    words = [word for text in TEXTS[:5] for word in (text[:9], *text.split(" "))]
    odd = ["  ", " " * 7, " " * 20, "\n", "\t", "🎉", "é", "龘", "7", "[end]", "▁"]
    return ["".join(chance.choice(words + odd * 2) for _ in range(chance.randint(1, 9))) for _ in range(count)]


def make_tokenizer(folder, **settings):
    folder.mkdir()
    train_sentencepiece(TEXTS, folder, vocab_size=600, **settings)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["[end]", "[end", "  "]},
        {"control_symbols": ["<|im_start|>"]},
    ],
    ids=str,
)
def test_the_written_tokenizer_gives_the_ids_of_sentencepiece(tmp_path, settings):
    processor = make_tokenizer(tmp_path / "base", **settings)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "base" / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": False,
                "bos_token": {"content": "<s>", "normalized": True},
                "added_tokens_decoder": {
                    "1": {"content": "<s>", "normalized": True, "special": True},
                    "600": {"content": "<pad>", "special": True},
                },
            }
        )
    )
    (tmp_path / "merged").mkdir()
    copy_tokenizer(tmp_path / "base", tmp_path / "merged", PromptTemplate())
    (tmp_path / "merged" / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = [*MORE, *random_texts(1500)]
    assert [tokenizer(text).input_ids for text in texts] == [[1, *processor.encode(text)] for text in texts]
    for text in texts[:200]:
        mixed = tokenizer(f"<s>{text}</s>{text}<pad>", add_special_tokens=False).input_ids
        assert mixed == [1, *processor.encode(text), 2, *processor.encode(text), 600]
        assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text))


def test_behind_a_special_token_a_text_begins_as_it_does_alone(tmp_path):
    make_tokenizer(tmp_path / "base")
    tokenizer = sentencepiece_as_json(tmp_path / "base", "<s>")
    assert tokenizer.encode("<s>Below", add_special_tokens=False).tokens == ["<s>", "▁Below"]
    assert tokenizer.encode("Below").tokens == ["<s>", "▁Below"]


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_normalised_texts(tmp_path, rule):
    """SentencePiece's own default: full-width letters become narrow ones, runs of spaces one space."""
    model, text = tmp_path / "tokenizer", tmp_path / "text"
    text.write_text("\n".join("\n".join(TEXTS).splitlines()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(model), model_type="bpe", vocab_size=600, byte_fallback=True,
        normalization_rule_name=rule, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    tokenizer = sentencepiece_as_json(tmp_path, "")
    texts = [*MORE, *random_texts(500)]
    assert [tokenizer.encode(text).ids for text in texts] == processor.encode(texts)


def test_where_sentencepiece_takes_the_leftmost_none_is_written(tmp_path):
    """Pieces that were appended to a vocabulary often have one score, and the library knows no ties."""
    from sentencepiece import sentencepiece_model_pb2

    make_tokenizer(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for piece in model.pieces:
        piece.score = 0
    file.write_bytes(model.SerializeToString())
    assert sentencepiece_as_json(tmp_path / "base", "<s>") is None
    (tmp_path / "merged").mkdir()
    copy_tokenizer(tmp_path / "base", tmp_path / "merged", PromptTemplate())
    assert not (tmp_path / "merged" / "tokenizer.json").exists()
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["legacy"]) == ("LlamaTokenizer", True)

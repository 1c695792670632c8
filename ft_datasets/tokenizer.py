"""Text <-> token ids, in training and inference alike.

A folder with a SentencePiece `tokenizer.model` is read by SentencePiece itself, and one with only a `tokenizer.json` by
the tokenizers library: loading either through transformers gives other tokens for some folders (no BOS where
tokenizer_config.json is missing, runs of spaces changed where tokenizer.json is missing, digits no longer split where
the class is GPT2Tokenizer). Special tokens spelled out in a text (`<s>`, `<|im_end|>`) are ordinary characters: what a
user writes can't end a turn. Those that a prompt template writes are put in by id (ft_datasets/chat_encoder.py).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from configs.errors import UserError
from configs.messages import _
from utils.files import read_json

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json under which a template finds a special token."""


@dataclass(frozen=True)
class SpecialToken:
    """A token that a template writes as a text of its own.

    Attributes:
        lstrip, rstrip: blanks before it, or behind it, belong to it.
    """

    id: int
    lstrip: bool = False
    rstrip: bool = False


class _Backend(Protocol):
    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]: ...
    def encode_after_special(self, texts: Sequence[str], threads: int) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def spell(self, ids: Sequence[int]) -> str: ...

    special_tokens: dict[str, SpecialToken]
    vocab_size: int


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self.processor.vocab_size()
        control = filter(self.processor.is_control, range(self.vocab_size))
        self.special_tokens = {self.processor.id_to_piece(i): SpecialToken(i) for i in control}

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        return self.processor.encode(list(texts), num_threads=threads)

    def encode_after_special(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        return self.encode(texts, threads)

    def decode(self, ids: Sequence[int]) -> str:
        # Ids past the vocabulary are padding of the embedding; control symbols decode to nothing.
        return self.processor.decode([i for i in ids if i < self.vocab_size])

    def token_to_id(self, token: str) -> int | None:
        found = self.processor.piece_to_id(token)
        return found if self.processor.id_to_piece(found) == token else None

    def id_to_token(self, token_id: int) -> str | None:
        return self.processor.id_to_piece(token_id) if token_id < self.vocab_size else None

    def spell(self, ids: Sequence[int]) -> str:
        return _joined_bytes("".join(self.id_to_token(i) or f"<{i}>" for i in ids))


SPACE = "▁"
"""What stands for a space in the pieces of SentencePiece."""
MARK = "\ufdd0"
"""A token that stands for any special one; no text holds this character."""


class _FastTokenizer:
    def __init__(self, path: Path) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.vocab_size = self.tokenizer.get_vocab_size()
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_tokens = {
            token.content: SpecialToken(i, token.lstrip, token.rstrip) for i, token in added.items() if token.special
        }
        self.tokenizer.encode_special_tokens = True
        self.after_special = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        self.after_special.encode_special_tokens = True
        self.after_special.add_tokens([tokenizers.AddedToken(MARK, normalized=False)])

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_after_special(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        # Some tokenizers put a space before the beginning of a text alone, and what follows a token is no beginning.
        marked = [MARK + text for text in texts]
        return [e.ids[1:] for e in self.after_special.encode_batch_fast(marked, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.tokenizer.id_to_token(token_id)

    def spell(self, ids: Sequence[int]) -> str:
        pieces = "".join(self.id_to_token(i) or f"<{i}>" for i in ids)
        if SPACE in pieces:
            return _joined_bytes(pieces)
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)  # whose pieces are not to be read

    def added_before(self) -> list[int]:
        """What the tokenizer's own post-processor puts before a text, such as Llama 3's <|begin_of_text|>."""
        with_special = self.tokenizer.encode("a", add_special_tokens=True).ids
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        starts = range(len(with_special) - len(plain) + 1)
        return with_special[: next(i for i in starts if with_special[i : i + len(plain)] == plain)]


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        bos_ids: what stands before every text; [] for models without BOS.
        eos_id: what ends every answer.
        stop_ids: every id that ends an answer in generation (eos_id among them).
        special_tokens: what a template may write, by its text; no text of a user or of the data becomes one.
        named_tokens: the texts of those that a template may name, such as bos_token.
        vocab_size: how many tokens there are, but for those that stand beside tokenizer.model.
        embeddings: how many tokens the model has embeddings for.
        fingerprint: a hash over the files that define the tokens.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        sentencepiece_file, fast_file = folder / "tokenizer.model", folder / "tokenizer.json"
        config = read_settings(folder / "tokenizer_config.json")
        model_config = read_settings(folder / "config.json")
        generation = read_settings(folder / "generation_config.json")
        source = sentencepiece_file if sentencepiece_file.is_file() else fast_file
        if not source.is_file():
            raise UserError(
                _(
                    "{folder} has no tokenizer: neither tokenizer.model nor tokenizer.json is there. Take them from "
                    "the repository that the model came from.",
                    folder=folder,
                )
            )
        self._backend: _Backend
        try:
            self._backend = _SentencePiece(source) if source is sentencepiece_file else _FastTokenizer(source)
        except Exception as error:  # sentencepiece and tokenizers raise types of their own for a broken file
            raise UserError(_("{file} can't be read as a tokenizer ({error}).", file=source, error=error)) from error

        self.vocab_size = self._backend.vocab_size
        self.embeddings: int = model_config.get("vocab_size", self.vocab_size)
        eos_of_model = _ids(generation, "eos_token_id") or _ids(model_config, "eos_token_id")
        self.eos_id = self._special_id(config, "eos_token", "</s>", eos_of_model)
        self.eos_token = self._backend.id_to_token(self.eos_id) or self._token_text(config, "eos_token", "</s>")
        self.stop_ids = frozenset([self.eos_id, *eos_of_model])
        if isinstance(self._backend, _FastTokenizer):
            self.bos_ids = self._backend.added_before()
        elif config.get("add_bos_token", True):
            self.bos_ids = [self._special_id(config, "bos_token", "<s>", _ids(model_config, "bos_token_id"))]
        else:
            self.bos_ids = []
        self.bos_token = "".join(self._backend.id_to_token(i) or "" for i in self.bos_ids)
        self.special_tokens = self._find_special_tokens(config, read_settings(folder / "added_tokens.json"))
        named = {name: config[name] for name in NAMED_TOKENS if config.get(name)}
        self.named_tokens = {name: self._token_text(named, name, "") for name in named}
        self.named_tokens |= {"eos_token": self.eos_token} | ({"bos_token": self.bos_token} if self.bos_token else {})
        digest = hashlib.sha256(source.read_bytes())
        digest.update(json.dumps([self.bos_ids, self.eos_id]).encode())
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text` after BOS: what a model is given."""
        return self.bos_ids + self._backend.encode([text], 1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The ids of many texts, each after BOS; see `encode`."""
        return [self.bos_ids + ids for ids in self._backend.encode(texts, threads)]

    def encode_after_special(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The ids of texts that stand behind a special token, without BOS."""
        return self._backend.encode_after_special(texts, threads)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._backend.decode(ids)

    def spell(self, ids: Sequence[int]) -> str:
        """The text of `ids` with special tokens spelled out, and with SentencePiece's own `▁` for spaces."""
        return self._backend.spell(ids)

    def _find_special_tokens(self, config: dict[str, Any], added: dict[str, Any]) -> dict[str, SpecialToken]:
        """The tokenizer's own special tokens, and what tokenizer_config.json and added_tokens.json add to them."""
        found = dict(self._backend.special_tokens)
        if isinstance(self._backend, _SentencePiece):  # a tokenizer.json holds its added tokens itself
            found |= {text: SpecialToken(i) for text, i in added.items() if text and type(i) is int and i >= 0}
            decoder = config.get("added_tokens_decoder")
            for i, token in (decoder if isinstance(decoder, dict) else {}).items():
                if not (i.isdecimal() and isinstance(token, dict) and token.get("special")):
                    continue
                if text := self._token_text(token, "content", ""):
                    found[text] = SpecialToken(int(i), bool(token.get("lstrip")), bool(token.get("rstrip")))
        ends = {self.eos_token: self.eos_id}
        if len(self.bos_ids) == 1:
            ends[self.bos_token] = self.bos_ids[0]
        return {text: SpecialToken(i) for text, i in ends.items()} | found

    def _special_id(self, config: dict[str, Any], name: str, usual: str, of_model: list[int]) -> int:
        found = self._backend.token_to_id(self._token_text(config, name, usual))
        if found is not None:
            return found
        if of_model:
            return of_model[0]
        raise UserError(
            _("The tokenizer names no {name}: neither tokenizer_config.json nor config.json gives one.", name=name)
        )

    @staticmethod
    def _token_text(config: dict[str, Any], name: str, usual: str) -> str:
        token = config.get(name) or usual
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            raise _wrong("tokenizer_config.json", name, token)
        return text


def _joined_bytes(pieces: str) -> str:
    """Pieces in which characters stand for those that are spelled by their bytes (<0xE4><0xBD><0xA0>)."""

    def text(match: re.Match[str]) -> str:
        return bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode(errors="replace")

    return re.sub(r"(<0x[0-9A-F]{2}>)+", text, pieces)


def _ids(settings: dict[str, Any], name: str) -> list[int]:
    """The token ids, one or several, of a model's settings; none where there are none."""
    value = settings.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise _wrong("config.json, generation_config.json", name, value)
    return ids


def _wrong(file: str, name: str, value: Any) -> UserError:
    return UserError(
        _(
            "{name} of the model's folder ({file}) can't be {value}. Correct it, or copy or download the file again.",
            name=name,
            file=file,
            value=f"{value!r:.60}",
        )
    )


def read_settings(path: Path) -> dict[str, Any]:
    """What a JSON file of a model's folder holds; nothing where there is no such file."""
    return read_json(path) if path.is_file() else {}

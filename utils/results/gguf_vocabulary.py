"""A model folder's tokenizer as a GGUF file holds it: tokens, scores, kinds of tokens, merges, how text is split."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from utils.files import read_json
from utils.results.tokenizer_files import BPE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, added_tokens

UNUSED = 5
"""Type of a row of the embedding that no token belongs to."""

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = ("ByteLevel", False, False)
_WORDS_AS_BYTES = ("ByteLevel", False, True)

PRE_TOKENIZERS: dict[tuple[tuple[tuple[Any, ...], ...], bool], str] = {
    ((("Split", _LLAMA_3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA_3), _BYTES), False): "smaug-bpe",
    ((("Split", _QWEN_2), _BYTES), False): "qwen2",
    ((("Digits", True), _WORDS_AS_BYTES), False): "smollm",
    ((_WORDS_AS_BYTES,), False): "gpt-2",
}
"""(How text is split before anything is merged, whether a word that is a token is taken whole) -> llama.cpp's name.

Only what llama.cpp splits in just that way: its "tekken" (Mistral Nemo) is another for capital letters with accents.
(An accent that is a character of its own is joined to its letter by Qwen's NFC, and is not by llama.cpp.)
"""


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer, as far as it stands in the tokenizer's own files.

    Attributes:
        kind: "llama" = SentencePiece's byte pairs with scores, "gpt2" = byte pairs with a list of merges.
        splitting: llama.cpp's name for how text is split before anything is merged.
        types: SentencePiece's numbers, which are GGUF's as well.
        adds_space: a space is put before every stretch of text.
    """

    kind: str
    splitting: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str] = field(default_factory=list)
    adds_space: bool = False

    def pad(self, rows: int) -> None:
        """Give every row of the embedding a token: llama.cpp wants as many of these as of those."""
        for number in range(len(self.tokens), rows):
            self.tokens.append(f"[PAD{number}]")
            self.types.append(UNUSED)
            self.scores.append(0.0)


def read_vocabulary(folder: Path) -> Vocabulary:
    """A folder's tokenizer; tokenizer.model counts before tokenizer.json, as everywhere in the project.

    Raises:
        UserError: llama.cpp would make other ids of some texts.
    """
    return _sentencepiece(folder) if (folder / "tokenizer.model").is_file() else _byte_level(folder)


def _other_tokens(folder: Path, why: str) -> UserError:
    return UserError(
        _(
            "{folder} can't become a GGUF file, because llama.cpp would make other tokens of a text than the model was "
            "trained on: {why}.",
            folder=folder,
            why=why,
        )
    )


def _sentencepiece(folder: Path) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    spec = model.normalizer_spec
    for is_so, why in (
        (model.trainer_spec.model_type != BPE, _("its tokenizer.model does not merge byte pairs")),
        (not model.trainer_spec.byte_fallback, _("its tokenizer.model has no bytes for unknown characters")),
        (spec.precompiled_charsmap, _("its tokenizer.model changes characters ({name})", name=spec.name)),
        (spec.remove_extra_whitespaces, _("its tokenizer.model removes spaces")),
        (not spec.escape_whitespaces, _("its tokenizer.model keeps spaces as they are")),
        (model.trainer_spec.treat_whitespace_as_suffix, _("its tokenizer.model has spaces behind words")),
    ):
        if is_so:
            raise _other_tokens(folder, why)
    tokens = {number: (piece.piece, piece.type, piece.score) for number, piece in enumerate(model.pieces)}
    for number, token in added_tokens(folder):
        _check_strips(folder, token.content, token.lstrip or token.rstrip)
        if tokens.get(number, ())[:2] != (token.content, UNKNOWN):
            tokens[number] = (token.content, CONTROL, 0.0)
    for name, kind, _score in tokens.values():
        if kind == USER_DEFINED and spec.add_dummy_prefix:
            why = _("it would put a space behind {token} wherever that stands", token=name)
            raise _other_tokens(folder, why)
    return Vocabulary("llama", "default", *_in_order(tokens), adds_space=spec.add_dummy_prefix)


def _byte_level(folder: Path) -> Vocabulary:
    content = read_json(folder / "tokenizer.json")
    model = content["model"]
    steps = tuple(_steps(content.get("pre_tokenizer")))
    splitting = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")
    marks = [model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")]
    if not splitting or model.get("type", "BPE") != "BPE" or normalizer != "NFC" or any(marks):
        why = _(
            "its tokenizer.json handles text in a way that has no name here ({found}); known are {known}",
            found=" + ".join(str(step[0]) for step in ((model.get("type"),), (normalizer,), *steps)),
            known=", ".join(PRE_TOKENIZERS.values()),
        )
        raise _other_tokens(folder, why)
    tokens = {number: (token, NORMAL, 0.0) for token, number in model["vocab"].items()}
    for token in content.get("added_tokens", []):
        _check_strips(folder, token["content"], token["lstrip"] or token["rstrip"])
        tokens[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED, 0.0)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", splitting, *_in_order(tokens), merges=merges)


def _check_strips(folder: Path, token: str, strips: bool) -> None:
    if strips:
        raise _other_tokens(folder, _("it would keep the spaces beside {token}", token=token))


def _steps(pre_tokenizer: dict[str, Any] | None) -> Iterator[tuple[Any, ...]]:
    """How a tokenizer.json splits text, without what makes no difference to the ids."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": inner}:
            for step in inner:
                yield from _steps(step)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield ("Split", pattern)
        case {"type": "Digits", "individual_digits": individual}:
            yield ("Digits", individual)
        case {"type": "ByteLevel", "add_prefix_space": prefix, **more}:
            yield ("ByteLevel", prefix, more.get("use_regex", True))
        case {"type": kind}:
            yield (kind,)


def _in_order(tokens: dict[int, tuple[str, int, float]]) -> Iterator[list[Any]]:
    """Tokens, types and scores by id; an id that none has gets an unused one."""
    rows = [tokens.get(number, (f"[PAD{number}]", UNUSED, 0.0)) for number in range(max(tokens) + 1)]
    return map(list, zip(*rows, strict=True))

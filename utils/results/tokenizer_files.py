"""A SentencePiece model as a tokenizer.json with the same ids, for whoever loads a model with transformers.

transformers makes its own tokenizer out of a tokenizer.model, in ways that change with its versions: runs of spaces,
and what stands behind a special token, come out otherwise than in training. A tokenizer.json it takes as it is.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from utils.files import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of SentencePiece's pieces; 6 are single bytes."""
BPE = 2
"""SentencePiece's number for its byte-pair models."""
PROBED_TOGETHER = 7
"""Pieces of the vocabulary that stand in one probe."""
PROBES = (
    *(" " * count + tail for count in range(1, 40) for tail in ("", "a", "\n")),
    "a  b   c\u3000d\t\te \t f",
    " 前后有空格 ",
    "\n\n第一行\r\n第二行\n",
    "café cafe\u0301 naïve № ½ ﬁ Ａ１ ① ㍿",
    "🎉👨‍👩‍👧🇨🇳龘𠮷\u200b\ufeff▁_▁",
    "def f(x):\n    return [x ** 2 for _ in range(10)]  # </s> <0x0A>",
)
"""Texts on which tokenizers part company, asked beside the vocabulary's own pieces."""


def sentencepiece_as_json(folder: Path, bos_token: str) -> Tokenizer | None:
    """A folder's tokenizer.model, with the tokens that its other files add, as transformers loads it whole.

    Text is split at special tokens, and each stretch between two of them is encoded as SentencePiece encodes it alone.

    Args:
        bos_token: what stands before every text; "" = nothing does.

    Returns:
        None where the tokenizers library can't give SentencePiece's ids: a unigram model, or a vocabulary in which many
        pieces have one score (SentencePiece then takes the leftmost, the library the first in its list).
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    content = (folder / "tokenizer.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    if model.trainer_spec.model_type != BPE:
        return None
    tokenizer = _byte_pairs(model, dict(added_tokens(folder)))
    processor = SentencePieceProcessor(model_proto=content)
    probes = [*PROBES, *_vocabulary_probes(model)]
    if processor.encode(probes) != [found.ids for found in tokenizer.encode_batch_fast(probes)]:
        return None
    _add_special_tokens(tokenizer, model, dict(added_tokens(folder)))
    if bos_token:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos_token, "$A"], special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))]
        )
    return tokenizer


def _byte_pairs(model: Any, added: dict[int, AddedToken]) -> Tokenizer:
    """What encodes a stretch of text without special tokens."""
    names = {number: piece.piece for number, piece in enumerate(model.pieces)}
    names |= {number: token.content for number, token in added.items()}  # some only name a piece anew
    user_defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    tokenizer = Tokenizer(
        models.BPE(
            {name: number for number, name in names.items()},
            _merges(model),
            unk_token=next(names[number] for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN),
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
            ignore_merges=bool(user_defined),
        )
    )
    spec = model.normalizer_spec
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:  # spaces alone (and ▁ at the end): a line's end is none to SentencePiece
        steps += [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if user_defined:  # each is taken whole before anything is merged, the longest first
        longest_first = sorted(user_defined, key=len, reverse=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    prefix = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *prefix]
    )
    return tokenizer


def _merges(model: Any) -> list[tuple[str, str]]:
    """All ways to put a piece together from two others, in the order in which SentencePiece prefers the results."""
    rank = {piece.piece: (-piece.score, number) for number, piece in enumerate(model.pieces) if piece.type == NORMAL}
    splits = ((piece[:at], piece[at:]) for piece in rank for at in range(1, len(piece)))
    pairs = [(left, right) for left, right in splits if left in rank and right in rank]
    return sorted(pairs, key=lambda pair: (*rank[pair[0] + pair[1]], len(pair[0])))


def added_tokens(folder: Path) -> Iterator[tuple[int, AddedToken]]:
    """(id, token) of the special tokens that a folder's other files add to its tokenizer.model, or name anew.

    Others that they add are ordinary text to SentencePiece, and were in training.
    """

    def settings(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    for content, number in settings("added_tokens.json").items():
        yield number, AddedToken(content, special=True, normalized=False)
    entries = [(entry["id"], entry) for entry in settings("tokenizer.json").get("added_tokens", [])]
    entries += settings("tokenizer_config.json").get("added_tokens_decoder", {}).items()
    for number, entry in entries:
        if entry.get("special"):
            strips = {flag: entry.get(flag, False) for flag in ("lstrip", "rstrip")}
            yield int(number), AddedToken(entry["content"], special=True, normalized=False, **strips)


def _add_special_tokens(tokenizer: Tokenizer, model: Any, added: dict[int, AddedToken]) -> None:
    for number, piece in enumerate(model.pieces):
        if piece.type in (UNKNOWN, CONTROL):
            added.setdefault(number, AddedToken(piece.piece, special=True, normalized=False))
    tokenizer.add_tokens([added[number] for number in sorted(added)])


def _vocabulary_probes(model: Any) -> Iterator[str]:
    """Each piece of a vocabulary as a text of its own, and among its neighbours."""
    pieces = [piece.piece.replace("▁", " ") for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)]
    yield from pieces
    for start in range(0, len(pieces), PROBED_TOGETHER):
        yield "".join(pieces[start : start + PROBED_TOGETHER])

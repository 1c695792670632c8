"""Which tokens transformers makes of conversations with a written folder, beside those of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import Conversation


@dataclass(frozen=True)
class IdCount:
    """How many conversations are read as the same tokens.

    Attributes:
        other: numbers of the records that are read as others.
        spelling: how many conversations spell out a special token; they are counted apart, and are not in `total`.
            (transformers takes such a text for the token, here it stays text.)
    """

    total: int
    equal: int
    other: tuple[int, ...]
    spelling: int
    spelling_equal: int


def compare_ids(folder: Path, conversations: Sequence[Conversation], encoder: ChatEncoder) -> IdCount:
    """Compare the ids of each prompt and of each conversation up to the answer's end.

    Args:
        folder: a model with its tokenizer and chat template, as a hub repository would hold it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain: dict[int, bool] = {}
    spelling: list[bool] = []
    for conversation in conversations:
        is_equal, has_token = True, False
        for at, message in enumerate(conversation.messages):
            if not message.is_learnt:
                continue
            for messages, asks in ((conversation.messages[:at], True), (conversation.messages[: at + 1], False)):
                rendered = encoder.render(messages, add_generation_prompt=asks)
                given = [encoder.template.as_dict(each) for each in messages]
                is_equal = is_equal and _ids(tokenizer, given, asks) == encoder.encode_batch([rendered])[0]
                has_token = has_token or bool(rendered.broken)
        if has_token:
            spelling.append(is_equal)
        else:
            plain[conversation.number] = is_equal
    other = tuple(number for number, is_equal in plain.items() if not is_equal)
    return IdCount(len(plain), len(plain) - len(other), other, len(spelling), sum(spelling))


def _ids(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int] | None:
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
    except Exception:  # the template is a stranger's program; that it fails there is as good as other ids
        return None

"""A conversation: what every kind of data becomes, and what a template makes a prompt of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]

Turn = tuple[str, str]
"""One question and its answer."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        input: what Alpaca's records give beside an instruction; other messages have none.
        is_learnt: an assistant's message that carries loss.
    """

    role: Role
    text: str
    input: str = ""
    is_learnt: bool = False


@dataclass(frozen=True)
class Conversation:
    """Messages in their order: a system's at the beginning, if any, then a user's and an assistant's in turn.

    Attributes:
        number: the record's, counted from 1 through all data files.
        source: which of several sources of the data it is from, from 0.
    """

    number: int
    messages: tuple[Message, ...]
    source: int = 0


def messages_of(question: str, history: Sequence[Turn] = (), system: str = "") -> list[Message]:
    """The messages that ask `question` after the earlier turns of `history`."""
    messages = [Message("system", system)] if system else []
    for asked, answered in history:
        messages += [Message("user", asked), Message("assistant", answered)]
    return [*messages, Message("user", question)]

"""A kind of data: what its records hold, and how they become messages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from configs.messages import _
from configs.text import has_half_character
from ft_datasets.conversation import Message


class Complaint(Exception):
    """What keeps a record from being used; the same words for all records that have it."""


class LostFields(Complaint):
    """A record, or a message of it, holds more than is read.

    Args:
        names: of what would be lost.
        is_of_message: it is a message that holds them.
    """

    def __init__(self, names: Iterable[str], is_of_message: bool = False) -> None:
        self.names = sorted(set(names))
        fields = '", "'.join(self.names)
        told = _('a message with "{fields}", which would be dropped', fields=fields) if is_of_message else None
        super().__init__(told or _('with "{fields}", which would be dropped', fields=fields))


@dataclass(frozen=True)
class Kind:
    """A kind of data.

    Attributes:
        fields: names of all that a record may hold; what it holds beside them would be lost.
        advice: says what a record looks like.
        read_messages: makes messages of a record's fields, or raises Complaint.
    """

    fields: tuple[str, ...]
    advice: Callable[[], str]
    read_messages: Callable[[dict[str, Any]], list[Message]]


def checked_text(value: Any, name: str, may_be_empty: bool = False) -> str:
    """A record's text.

    Args:
        name: the field's.

    Raises:
        Complaint: it is none, is empty, or can't be written.
    """
    if not isinstance(value, str):
        raise Complaint(_('"{key}" is not text', key=name))
    if not may_be_empty and not value.strip():
        raise Complaint(_('"{key}" is empty', key=name))
    if has_half_character(value):
        raise Complaint(_('"{key}" holds half a character (a lone surrogate)', key=name))
    return value


def is_nothing(value: Any) -> bool:
    """Whether a field holds nothing that could be lost."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)

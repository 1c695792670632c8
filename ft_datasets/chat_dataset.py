"""Conversations in OpenAI's form (`messages` of role and content) or ShareGPT's (`conversations` of from and value)."""

from itertools import pairwise
from typing import Any

from configs.messages import _
from ft_datasets.conversation import Message, Role
from ft_datasets.kind import Complaint, Kind, LostFields, checked_text, is_nothing

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""What a message's role, or `from`, may be."""
TOOLS = ("tool", "function", "function_call", "observation")
FIELDS_OF_MESSAGE = ("role", "content", "from", "value", "weight")


def read_messages(entry: dict[str, Any]) -> list[Message]:
    """The messages of one conversation; the assistant's are learnt, but for those of weight 0.

    Raises:
        Complaint: it can't be used.
    """
    given = _either(entry, "messages", "conversations")
    if given is None:
        raise Complaint(_('without "messages" (or "conversations")'))
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise Complaint(_('"messages" is not a list of messages'))
    messages = [_read_message(message) for message in given]
    system = checked_text(entry.get("system") or "", "system", may_be_empty=True)
    if system.strip():
        messages.insert(0, Message("system", system))
    _check_order(messages)
    return [message for message in messages if message.role != "system" or message.text.strip()]


def _read_message(message: dict[str, Any]) -> Message:
    named = _either(message, "role", "from")
    if not isinstance(named, str):
        raise Complaint(_('a message without "role" (or "from")'))
    if named in TOOLS:
        raise Complaint(_('a message of role "{role}": the use of tools is not trained here', role=named))
    if named not in ROLES:
        raise Complaint(_('a message of role "{role}"; there are {roles}', role=named[:40], roles=", ".join(ROLES)))
    if lost := [name for name, value in message.items() if name not in FIELDS_OF_MESSAGE and not is_nothing(value)]:
        raise LostFields(lost, is_of_message=True)
    role = ROLES[named]
    content = _either(message, "content", "value")
    if isinstance(content, list):
        content = _joined(content)
    if content is None:
        raise Complaint(_('a message without "content" (or "value")'))
    weight = message.get("weight")
    if weight not in (None, 0, 1) or isinstance(weight, bool):
        raise Complaint(_('a message whose "weight" is neither 0 nor 1'))
    text = checked_text(content, role, may_be_empty=role == "system")
    return Message(role, text, is_learnt=role == "assistant" and weight != 0)


def _either(fields: dict[str, Any], name: str, other: str) -> Any:
    """What stands under one of two names for the same; None = under none."""
    given = [fields[each] for each in (name, other) if fields.get(each) is not None]
    full = [value for value in given if not is_nothing(value)]
    if len(full) == 2 and full[0] != full[1]:
        raise Complaint(_('"{name}" beside another "{other}": one of them would be dropped', name=name, other=other))
    return next(iter(full or given), None)


def _joined(parts: list[Any]) -> str:
    """The text of a content that is a list of parts, as OpenAI has it."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Complaint(_("a message with pictures or sounds: only text is trained here"))
    return "".join(texts)


def _check_order(messages: list[Message]) -> None:
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise Complaint(_("a system message that is not the first one"))
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise Complaint(_("no messages"))
    if turns[0] == "assistant":
        raise Complaint(_("the assistant speaks first"))
    for before, role in pairwise(turns):
        if before == role:
            raise Complaint(_("two messages of the {role} in a row", role=role))
    if turns[-1] == "user":
        raise Complaint(_("the last message, a user's, has no answer"))
    if not any(message.is_learnt for message in messages):
        raise Complaint(_('no answer to learn: each has "weight": 0'))


CHAT = Kind(
    fields=("messages", "conversations", "system"),
    advice=lambda: _(
        'Each record needs "messages" (or "conversations"): perhaps a system message, then a user\'s and an '
        "assistant's in turn."
    ),
    read_messages=read_messages,
)

"""Records in Alpaca's form: an instruction, perhaps an input, an output; what was said before, and to what rules."""

from typing import Any

from configs.messages import _
from ft_datasets.conversation import Message
from ft_datasets.kind import Complaint, Kind, checked_text


def read_messages(entry: dict[str, Any]) -> list[Message]:
    """The messages of one record; every answer is learnt, those of its `history` too.

    Raises:
        Complaint: it can't be used.
    """
    for key in ("instruction", "output"):
        if entry.get(key) is None:
            raise Complaint(_('without "{key}"', key=key))
    system = checked_text(entry.get("system") or "", "system", may_be_empty=True)
    messages = [Message("system", system)] if system.strip() else []
    history = entry.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise Complaint(_('"history" is not a list of [question, answer]'))
    for asked, answered in history:
        messages.append(Message("user", checked_text(asked, "history")))
        messages.append(Message("assistant", checked_text(answered, "history"), is_learnt=True))
    given = "" if entry.get("input") is None else checked_text(entry["input"], "input", may_be_empty=True)
    messages.append(Message("user", checked_text(entry["instruction"], "instruction"), given))
    messages.append(Message("assistant", checked_text(entry["output"], "output"), is_learnt=True))
    return messages


ALPACA = Kind(
    fields=("instruction", "input", "output", "system", "history"),
    advice=lambda: _(
        'Each record needs "instruction" and "output" as text, and may have "input", "system" and "history".'
    ),
    read_messages=read_messages,
)

"""The kinds of data that files hold, and how a file of one becomes conversations: the only list of them."""

from collections.abc import Iterator, Sequence, Set
from typing import Any

from configs.datasets import FileDataset
from configs.errors import UserError
from configs.messages import _
from ft_datasets.alpaca_dataset import ALPACA
from ft_datasets.chat_dataset import CHAT, FIELDS_OF_MESSAGE
from ft_datasets.conversation import Conversation
from ft_datasets.kind import Complaint, Kind, LostFields, is_nothing
from ft_datasets.records import DataFiles, Entry, name_entries, read_entries

KINDS = {"alpaca_dataset": ALPACA, "chat_dataset": CHAT}
"""By what --dataset calls them."""


def load_conversations(settings: FileDataset, files: DataFiles) -> list[Conversation]:
    """Read and check the data of one kind.

    Args:
        settings: of the kind; its NAME says which one.
        files: where the records are.

    Raises:
        UserError: naming the file and the line, or the numbers of the records that are wrong.
    """
    kind = KINDS[settings.NAME]
    complaints: dict[str, list[Entry]] = {}
    conversations = []
    for entry in read_entries(files):
        try:
            messages = tuple(read_record(entry.value, kind, settings))
        except Complaint as complaint:
            told = str(complaint)
            if isinstance(complaint, LostFields):
                flag = f"--{settings.NAME}.ignore_fields {','.join(complaint.names)}"
                told += _(" ({flag} allows it)", flag=flag)
            complaints.setdefault(told, []).append(entry._replace(value=None))
        else:
            conversations.append(Conversation(entry.number, messages, entry.source))
    if complaints:
        lines = [f"  {complaint}: {name_entries(entries, files)}" for complaint, entries in complaints.items()]
        heading = _("{file}: these records can't be used (records count from 1):", file=files)
        raise UserError("\n".join([heading, *lines, kind.advice()]))
    return conversations


def read_record(value: Any, kind: Kind, settings: FileDataset) -> list[Any]:
    """The messages of one record.

    Raises:
        Complaint: it can't be used, or holds more than is read.
    """
    if not isinstance(value, dict):
        raise Complaint(_("not an object with named fields"))
    renamed, ignored = settings.renamed, set(settings.ignore_fields)
    entry = {name: value[name] for name in value if name not in renamed}
    entry |= {ours: value[theirs] for theirs, ours in renamed.items() if theirs in value}
    for name in ("messages", "conversations") if renamed or ignored else ():
        if isinstance(entry.get(name), list):
            entry[name] = [_renamed_message(message, renamed, ignored) for message in entry[name]]
    messages = kind.read_messages(entry)
    if lost := set(_lost(value, kind.fields, renamed)) - ignored:
        raise LostFields(lost)
    return messages


def _lost(value: dict[str, Any], fields: Sequence[str], renamed: dict[str, str]) -> Iterator[str]:
    """Names of what a record, or a message, holds beside the fields that are read."""
    replaced = {ours for theirs, ours in renamed.items() if theirs in value}
    for name, content in value.items():
        is_read = renamed[name] in fields if name in renamed else name in fields and name not in replaced
        if not is_read and not is_nothing(content):
            yield str(name)


def _renamed_message(message: Any, renamed: dict[str, str], ignored: Set[str]) -> Any:
    if not isinstance(message, dict):
        return message
    lost = set(_lost(message, FIELDS_OF_MESSAGE, renamed))
    if replaced := lost.intersection(FIELDS_OF_MESSAGE) - ignored:
        raise LostFields(replaced, is_of_message=True)
    found = {renamed.get(name, name): value for name, value in message.items() if name not in lost & ignored}
    for name in ("role", "from"):
        if isinstance(found.get(name), str):
            found[name] = renamed.get(found[name], found[name])
    return found

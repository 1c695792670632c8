"""Records in Alpaca's form in tests' short way, and the same words of Alpaca's for all."""

from collections.abc import Callable, Sequence
from pathlib import Path

from configs.datasets import AlpacaDataset
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import Conversation, Message
from ft_datasets.encoding import encode_conversations, fitting
from ft_datasets.examples import Example
from ft_datasets.kinds import load_conversations
from ft_datasets.prompt import PromptTemplate
from ft_datasets.records import DataFiles
from ft_datasets.tokenizer import Tokenizer


def record(number: int, instruction: str, input: str, output: str) -> Conversation:
    """A record in Alpaca's form as a conversation."""
    return Conversation(number, (Message("user", instruction, input), Message("assistant", output, is_learnt=True)))


def load_records(source: DataFiles | str | Path, *ignored: str) -> list[Conversation]:
    """The records of files in Alpaca's form; fields may be ignored."""
    files = source if isinstance(source, DataFiles) else DataFiles((Path(source),))
    return load_conversations(AlpacaDataset(ignore_fields=list(ignored)), files)


def alpaca_encoder(folder: str | Path) -> ChatEncoder:
    """Alpaca's words with the tokenizer of a folder."""
    tokenizer = Tokenizer(folder)
    return ChatEncoder(PromptTemplate.alpaca(tokenizer), tokenizer)


def alpaca_template(folder: str | Path) -> PromptTemplate:
    """Alpaca's words, with BOS and EOS of a folder's tokenizer."""
    return PromptTemplate.alpaca(Tokenizer(folder))


def encode_records(
    records: Sequence[Conversation], encoder: ChatEncoder, limit: int, report: Callable[[str], None]
) -> list[Example]:
    """The examples of records that are not longer than `limit` tokens."""
    return fitting(encode_conversations(records, encoder), limit, report)

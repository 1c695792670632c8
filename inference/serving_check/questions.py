"""What a server and our own engine are both asked: built-in questions, or those of a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from ft_datasets import alpaca_dataset, chat_dataset
from ft_datasets.conversation import Message, Turn, messages_of
from ft_datasets.kind import Complaint
from ft_datasets.records import DataFiles, kind_of, read_entries
from ft_datasets.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A question, with what was said before it.

    Attributes:
        system: the system message; '' = none.
    """

    prompt: str
    history: tuple[Turn, ...] = ()
    system: str = ""

    @classmethod
    def of(cls, messages: list[Message]) -> "Question":
        """The question at the end of some messages; the last one may be its answer, which is left out."""
        system = messages[0].text if messages[0].role == "system" else ""
        # A server is sent the one text of a message.
        turns = [f"{m.text}\n{m.input}" if m.input else m.text for m in messages if m.role != "system"]
        turns = turns[: (len(turns) - 1) // 2 * 2 + 1]
        return cls(turns[-1], tuple(zip(turns[:-1:2], turns[1::2], strict=True)), system)

    @property
    def messages(self) -> list[Message]:
        """The messages that ask it."""
        return messages_of(self.prompt, self.history, self.system)


BUILT_IN = (
    Question("你好"),
    Question("请用一句话介绍你自己。"),
    Question("What is the capital of France? Answer in one word."),
    Question("把下面的话翻译成英文：\n\n今天天气很好，我们去公园散步吧。"),
    Question("Explain this:\n\ndef f(x):\n    return [x  **  2   for _ in range(10)]\n\n\n\t# done"),
    Question("  前后都有空格，also  inside　and　full-width  "),
    Question("👨‍👩‍👧‍👦、🇨🇳、龘𠮷 和 ▁ 是什么？😀"),
    Question("一、二、三……“引号”，①②③，ＡＢＣ，½ ﬁ é"),
    Question("那上海呢？", (("北京是哪个国家的城市？", "北京是中国的首都。"),)),
    Question("And 4 * 4?", (("What is 2 * 2?", "4"), ("And 3 * 3?", " 9\n"))),
    Question("你是谁？", system="你是一位简洁的助手，只用一句话回答。"),
    Question("再说一遍。", (("说一个数字。", "七"),), system="You answer in Chinese."),
)
"""Questions on whose tokens servers part company: line ends, runs of spaces, rare characters, turns, what is told."""


def with_special_tokens(tokenizer: Tokenizer) -> Question:
    """A question that spells special tokens out, its model's own among them."""
    names = dict.fromkeys(["<s>", "</s>", "<|im_end|>", *list(tokenizer.special_tokens)[:4]])
    return Question("“" + "”、“".join(names) + "” 是什么？")


def read_questions(file: Path) -> list[Question]:
    """The questions of a file: one in each line of a text, one for each record of data.

    Raises:
        UserError: the file can't be read, or a record holds no question.
    """
    if kind_of(file.name):
        return [_question_of(entry.value, f"{file}, {entry.number}") for entry in read_entries(DataFiles((file,)))]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_("{file} can't be read: {error}.", file=file, error=error)) from error
    questions = [Question(line) for line in lines if line.strip()]
    if not questions:
        raise UserError(_("{file} holds no questions.", file=file))
    return questions


def _question_of(entry: Any, where: str) -> Question:
    if isinstance(entry, str) and entry.strip():
        return Question(entry)
    try:
        if not isinstance(entry, dict):
            raise Complaint(_("neither a text nor a record"))
        if isinstance(given := entry.get("messages") or entry.get("conversations"), list):
            # What has no answer yet gets one, so that it is read as data is.
            answer = {"role": "assistant", "content": "?"}
            is_open = isinstance(given[-1], dict) and given[-1].get("role", given[-1].get("from")) in ("user", "human")
            answered = [*given, answer] if is_open else given
            return Question.of(chat_dataset.read_messages({"messages": answered, "system": entry.get("system")}))
        record = {"instruction": entry.get("prompt"), **entry, "output": entry.get("output") or "?"}
        return Question.of(alpaca_dataset.read_messages(record))
    except Complaint as complaint:
        raise UserError(f"{where}: {complaint}") from complaint

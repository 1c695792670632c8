"""The conversations that a merged model is tried on: those that its run held out, where they are still there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.datasets import FROM_HUB, FileDataset
from configs.errors import UserError
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import Conversation, Message, messages_of
from ft_datasets.encoding import encode_conversations, fitting
from ft_datasets.examples import Example
from ft_datasets.kinds import load_conversations
from ft_datasets.loading import fingerprint, split
from ft_datasets.records import DataFiles
from utils.download.dataset import FOLDER, fetch_data
from utils.download.dataset_layout import HubData
from utils.runs.description import read_training_config

QUESTIONS = (
    ("你好，请介绍一下你自己。", "你好！我是一个人工智能助手，可以回答问题、写文章、翻译句子。"),
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("一年有多少个月？", "一年有十二个月。"),
    ("把“今天天气很好”翻译成英文。", "The weather is lovely today."),
    ("请用一句话解释什么是机器学习。", "机器学习是让计算机从数据中找出规律，并用它来预测或决策的方法。"),
    ("水在多少摄氏度时沸腾？", "在标准大气压下，水在一百摄氏度时沸腾。"),
    ("《静夜思》的作者是谁？", "《静夜思》的作者是唐代诗人李白。"),
    ("怎样才能睡得更好？", "每天按时睡觉，睡前少看手机，下午以后少喝咖啡。"),
    ("请写一句关于春天的话。", "春风拂过湖面，柳枝轻轻摇动，到处都是新绿。"),
    ("12 乘以 12 等于多少？", "12 乘以 12 等于 144。"),
    ("为什么天空是蓝色的？", "因为空气分子对蓝光的散射比对红光强得多，所以我们看到的天空是蓝色的。"),
    ("列出三种常见的水果。", "苹果、香蕉、橙子。"),
)
"""Questions with answers, for where there are no data."""


@dataclass(frozen=True)
class Prompts:
    """What a merged model is tried on.

    Attributes:
        origin: whether the run held them out, trained on them, or they are our own.
        data: what the run's settings call its data; '' = our own.
        examples: conversations with their answers, as training reads them.
        conversations: those that the examples are of.
    """

    origin: Literal["held out", "training", "built in"]
    data: str
    examples: list[Example]
    conversations: list[Conversation]


def choose_prompts(adapter: Path, encoder: ChatEncoder, count: int, say: Callable[[str], None]) -> Prompts:
    """So many examples, spread over those that an adapter's run held out; where there are none, other ones.

    Args:
        say: is told if they are not from the run's data, and why.
    """
    described = read_training_config(adapter)
    try:
        if described is None:
            raise UserError(_("{folder} has no training_config.json", folder=adapter))
        config = TrainingConfig.restored(described["settings"])
        conversations = _of_run(config)
        encoded = encode_conversations(conversations, encoder, config.num_workers_dataloader)
        training, held_out = split(config, fitting(encoded, config.max_seq_length, lambda _line: None))
        if held_out and described.get("held_out_fingerprint", own := fingerprint(held_out)) != own:
            raise UserError(_("{data} is not what it was in training", data=config.data.data_path))
    except UserError as error:
        say(_("The run's own data can't be had ({why}): built-in questions are asked.", why=str(error).split("\n")[0]))
        own = [Conversation(number, _learnt(*turn)) for number, turn in enumerate(QUESTIONS, 1)]
        return _prompts("built in", "", encode_conversations(own, encoder), own, count)
    if held_out:
        return _prompts("held out", config.data.data_path, held_out, conversations, count)
    say(_("The run held no examples out: training examples are asked."))
    return _prompts("training", config.data.data_path, training, conversations, count)


def _of_run(config: TrainingConfig) -> list[Conversation]:
    """The conversations that a run was given.

    Raises:
        UserError: they are not there any more, or can't be read.
    """
    settings = config.data
    if not isinstance(settings, FileDataset):
        raise UserError(_("a function gave them"))
    for path in settings.paths:  # nothing is fetched for this
        if path.startswith(FROM_HUB) and not (FOLDER / HubData.named(path).repository).is_dir():
            raise UserError(_("{data} is not in {folder}", data=path, folder=FOLDER))
    files = fetch_data(settings, lambda _line: None) or DataFiles.here(settings.paths)
    return load_conversations(settings, files)


def _learnt(question: str, answer: str) -> tuple[Message, ...]:
    return (*messages_of(question), Message("assistant", answer, is_learnt=True))


def _prompts(
    origin: Literal["held out", "training", "built in"],
    data: str,
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    count: int,
) -> Prompts:
    count = min(count, len(examples))
    chosen = [examples[at * len(examples) // count] for at in range(count)]
    numbers = {example.number for example in chosen}
    return Prompts(origin, data, chosen, [each for each in conversations if each.number in numbers])

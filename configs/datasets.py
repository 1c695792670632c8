"""Settings of the data sets."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from configs.messages import _

FROM_HUB = "hub:"
HUB_PATH = re.compile(
    r"hub:(?P<repository>\w[\w.-]*/\w[\w.-]*)(/(?P<configuration>[^@:]+))?(@(?P<revision>[^@:]+))?(:(?P<split>[\w.-]+))?",
    re.ASCII,
)
"""How data_path names data that lies on a hub."""


@dataclass
class FileDataset:
    """Data that is read from files, whatever their records hold."""

    NAME: ClassVar[str] = ""  # what --dataset calls it
    NAMES: ClassVar[tuple[str, ...]] = ()  # what `columns` may give another name for

    data_path: str = "ft_datasets/alpaca_data.json"
    """The data file: .json (one list), .jsonl (a record a line; both also .gz), .csv, .parquet or .arrow; a relative
    path counts from where you stand. Or hub:OWNER/NAME, a data set of Hugging Face (or of HF_ENDPOINT); it comes into
    ./data/OWNER/NAME. Its split train is meant, else hub:OWNER/NAME:SPLIT; of several configurations name one,
    hub:OWNER/NAME/CONFIGURATION:SPLIT; hub:OWNER/NAME@REVISION is a branch, tag or commit. Several, with commas between
    them: a.jsonl,b.json."""
    weights: list[str] = field(default_factory=list)
    """How often an epoch has the examples of each of several files, in their order: 2,0.5 = those of the first twice,
    of those of the second a seeded half. Left out = each once."""
    columns: list[str] = field(default_factory=list)
    """Fields that have other names in the data: instruction=question,output=answer."""
    ignore_fields: list[str] = field(default_factory=list)
    """Fields that may be dropped. Records with others than are read are refused, so that nothing is lost unseen."""

    @property
    def paths(self) -> list[str]:
        """Each of the files, or data sets of a hub, that data_path names."""
        if not self.data_path.startswith(FROM_HUB) and Path(self.data_path).exists():  # a name may have a comma in it
            return [self.data_path]
        return [part for part in map(str.strip, self.data_path.split(",")) if part] or [self.data_path]

    @property
    def times(self) -> list[float]:
        """The weights as numbers; 1 for each of the paths where there are none."""
        return [float(weight) for weight in self.weights] or [1.0] * len(self.paths)

    @property
    def renamed(self) -> dict[str, str]:
        """What the data calls a field -> what it is called here."""
        pairs = (pair.partition("=") for pair in self.columns)
        return {theirs.strip(): ours.strip() for ours, _equals, theirs in pairs}

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        for path in self.paths:
            if path.startswith(FROM_HUB) and not HUB_PATH.fullmatch(path):
                yield _(
                    "--{name}.data_path {path}: expected hub:OWNER/NAME, and where it is needed /CONFIGURATION, "
                    "@REVISION and :SPLIT behind it, in this order",
                    name=self.NAME,
                    path=path,
                )
        for path in {path for path in self.paths if self.paths.count(path) > 1}:
            yield _(
                "--{name}.data_path has {path} twice: give it once, and --{name}.weights 2", name=self.NAME, path=path
            )
        yield from self._wrong_weights()
        for pair in self.columns:
            ours, equals, theirs = map(str.strip, pair.partition("="))
            if not equals or not theirs or ours not in self.NAMES:
                yield _(
                    "--{name}.columns {pair}: expected NAME=ITS NAME IN THE DATA, with a NAME of {names}",
                    name=self.NAME,
                    pair=pair,
                    names=", ".join(self.NAMES),
                )
        if len(self.renamed) < len(self.columns):
            yield _("--{name}.columns: one field of the data can't stand for two", name=self.NAME)

    def _wrong_weights(self) -> Iterator[str]:
        for weight in self.weights:
            try:
                is_right = 0 < float(weight) <= 100 and math.isfinite(float(weight))
            except ValueError:
                is_right = False
            if not is_right:
                yield _(
                    "--{name}.weights {weight}: each must be a number above 0 and at most 100",
                    name=self.NAME,
                    weight=weight,
                )
        if self.weights and len(self.weights) != len(self.paths):
            yield _(
                "--{name}.weights has {weights} numbers, and data_path {paths} files: one for each is needed",
                name=self.NAME,
                weights=len(self.weights),
                paths=len(self.paths),
            )


@dataclass
class AlpacaDataset(FileDataset):
    """Instructions with their answers: records of {"instruction", "input", "output", "system", "history"}."""

    NAME = "alpaca_dataset"
    NAMES = ("instruction", "input", "output", "system", "history")


@dataclass
class ChatDataset(FileDataset):
    """Conversations: records of {"messages"} as OpenAI has them, or of {"conversations"} as ShareGPT has."""

    NAME = "chat_dataset"
    NAMES = ("messages", "system", "role", "content", "weight", "user", "assistant")

    data_path: str = ""
    """As --alpaca_dataset.data_path."""


@dataclass
class CustomDataset:
    """Data that a function of your own gives."""

    NAME: ClassVar[str] = "custom_dataset"

    file: str = ""
    """The file and the function in it, as my_data.py:get_dataset; the function alone may be left out
    (get_custom_dataset). It is called with (these settings, the model's tokenizer of transformers, "train" or
    "validation"), and gives records in Alpaca's or OpenAI's form, or token ids: {"input_ids", "labels"}."""

    @property
    def data_path(self) -> str:
        """What the data is called in reports."""
        return self.file

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        yield from ()

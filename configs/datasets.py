"""Settings of the data sets."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from configs.messages import _

FROM_HUB = "hub:"
HUB_PATH = re.compile(
    r"hub:(?P<repository>\w[\w.-]*/\w[\w.-]*)(/(?P<configuration>[^@:]+))?(@(?P<revision>[^@:]+))?(:(?P<split>[\w.-]+))?",
    re.ASCII,
)
"""How data_path names data that lies on a hub."""


@dataclass
class AlpacaDataset:
    """Instructions with their answers: records of {"instruction", "input", "output"}."""

    data_path: str = "ft_datasets/alpaca_data.json"
    """The data file: .json (one list), .jsonl (a record a line; both also .gz), .csv, .parquet or .arrow; a relative
    path counts from where you stand. Or hub:OWNER/NAME, a data set of Hugging Face (or of HF_ENDPOINT); it comes into
    ./data/OWNER/NAME. Its split train is meant, else hub:OWNER/NAME:SPLIT; of several configurations name one,
    hub:OWNER/NAME/CONFIGURATION:SPLIT; hub:OWNER/NAME@REVISION is a branch, tag or commit."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        if self.data_path.startswith(FROM_HUB) and not HUB_PATH.fullmatch(self.data_path):
            yield _(
                "--alpaca_dataset.data_path {path}: expected hub:OWNER/NAME, and where it is needed /CONFIGURATION, "
                "@REVISION and :SPLIT behind it, in this order",
                path=self.data_path,
            )

"""The data files as the examples of a run."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from configs.training import TrainingConfig
from ft_datasets.alpaca_dataset import load_records
from ft_datasets.encoding import encode_records, split_examples
from ft_datasets.examples import Example
from ft_datasets.prompt import PromptTemplate
from ft_datasets.records import DataFiles
from ft_datasets.shared_prefixes import share_prefixes
from ft_datasets.tokenizer import Tokenizer

READERS = {"alpaca_dataset": load_records}
"""What reads the data files of each kind that --dataset names, and checks them."""


@dataclass(frozen=True)
class Data:
    """Examples to learn from, and examples that are only measured on (none without --run_validation).

    Attributes:
        origin: where data from a hub comes from, see DataFiles.
    """

    training: list[Example]
    held_out: list[Example]
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(map(len, [*self.training, *self.held_out]))

    def apart(self) -> "Data":
        """The same examples, none of which shares its beginning with others."""
        training, held_out = ([replace(x, shared_length=0) for x in xs] for xs in (self.training, self.held_out))
        return replace(self, training=training, held_out=held_out)


def fingerprint(examples: Sequence[Example]) -> str:
    """The hash of the examples' tokens and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        bounds = [position for span in example.learnt for position in span]
        if bounds[-1] == len(example):
            bounds.pop()  # checkpoints have always named a single answer, which ends there, by its start alone
        digest.update(example.input_ids.tobytes() + np.array(bounds, dtype="<u4").tobytes())
    return digest.hexdigest()


def load_data(
    config: TrainingConfig,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    report: Callable[[str], None],
    files: DataFiles | None = None,
) -> Data:
    """Read, check, tokenise and split the data.

    Args:
        files: what was fetched from a hub; None = the file that the settings name lies here.

    Raises:
        UserError: see load_records and encode_records.
    """
    files = files or DataFiles((Path(config.data.data_path),))
    records = READERS[config.dataset](files)
    examples = encode_records(
        records, tokenizer, template, config.max_seq_length, report, config.num_workers_dataloader
    )
    # Dropout on a shared prefix would be that of all its examples; a learnt prefix stands before each of them.
    if not config.lora_config.lora_dropout and config.method != "prefix":
        examples = share_prefixes(examples)
    if not config.run_validation:
        return Data(examples, [], files.origin)
    return Data(*split_examples(examples, config.val_set_size, config.seed), files.origin)

"""The data file as the examples of a run."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from configs.training import TrainingConfig
from ft_datasets.alpaca_dataset import load_records
from ft_datasets.encoding import encode_records, split_examples
from ft_datasets.examples import Example
from ft_datasets.prompt import PromptTemplate
from ft_datasets.shared_prefixes import share_prefixes
from ft_datasets.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """Examples to learn from, and examples that are only measured on (none without --run_validation)."""

    training: list[Example]
    held_out: list[Example]

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(map(len, [*self.training, *self.held_out]))

    def fingerprint(self) -> str:
        """The hash of the training examples' tokens and labels, in order."""
        digest = hashlib.sha256()
        for example in self.training:
            bounds = [position for span in example.learnt for position in span]
            if bounds[-1] == len(example):
                bounds.pop()  # checkpoints have always named a single answer, which ends there, by its start alone
            digest.update(example.input_ids.tobytes() + np.array(bounds, dtype="<u4").tobytes())
        return digest.hexdigest()


def load_data(
    config: TrainingConfig, tokenizer: Tokenizer, template: PromptTemplate, report: Callable[[str], None]
) -> Data:
    """Read, check, tokenise and split the data file.

    Raises:
        UserError: see load_records and encode_records.
    """
    records = load_records(config.alpaca_dataset.data_path)
    examples = encode_records(
        records, tokenizer, template, config.max_seq_length, report, config.num_workers_dataloader
    )
    # Dropout on a shared prefix would be that of all its examples; a learnt prefix stands before each of them.
    if not config.lora_config.lora_dropout and config.peft_method != "prefix":
        examples = share_prefixes(examples)
    if not config.run_validation:
        return Data(examples, [])
    return Data(*split_examples(examples, config.val_set_size, config.seed))

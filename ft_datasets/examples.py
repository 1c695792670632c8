"""A training example: token ids, and which of them carry loss."""

from dataclasses import dataclass

import numpy as np

IGNORE_INDEX = -100
"""Label of a position on which no loss is taken."""


@dataclass(frozen=True)
class Example:
    """One record as tokens.

    Attributes:
        number: the record's number in the data file.
        text: prompt and response, without BOS and EOS.
        input_ids: [BOS] + tokens + [EOS], shape [length], int32.
        prompt_length: how many of them are BOS and prompt; the loss is taken on the rest.
        shared_length: how many of the first are shared with other examples, see ft_datasets/shared_prefixes.py.
    """

    number: int
    text: str
    input_ids: np.ndarray
    prompt_length: int
    shared_length: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> np.ndarray:
        """input_ids with IGNORE_INDEX in the places of BOS and prompt, shape [length]."""
        labels = self.input_ids.copy()
        labels[: self.prompt_length] = IGNORE_INDEX
        return labels

    @property
    def own_length(self) -> int:
        """Tokens that are not shared."""
        return len(self.input_ids) - self.shared_length

    @property
    def load(self) -> int:
        """What it counts in a row: its own tokens, or half of all, which attention has keys and values of, if more."""
        return max(self.own_length, -(-len(self.input_ids) // 2))

    @property
    def prefix(self) -> bytes:
        """The shared tokens, as something to look up."""
        return self.input_ids[: self.shared_length].tobytes()

    @property
    def label_count(self) -> int:
        """Tokens of the response, EOS included: how many losses the example brings."""
        return len(self.input_ids) - self.prompt_length

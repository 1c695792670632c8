"""A training example: token ids, and which of them carry loss."""

from dataclasses import dataclass, replace

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
        learnt: the spans of tokens that carry loss, (start, stop) of each, in order; the loss is taken on no other.
        shared_length: how many of the first are shared with other examples, see ft_datasets/shared_prefixes.py.
    """

    number: int
    text: str
    input_ids: np.ndarray
    learnt: tuple[tuple[int, int], ...]
    shared_length: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> np.ndarray:
        """input_ids with IGNORE_INDEX in the place of all that carries no loss, shape [length]."""
        labels = np.full_like(self.input_ids, IGNORE_INDEX)
        for start, stop in self.learnt:
            labels[start:stop] = self.input_ids[start:stop]
        return labels

    @property
    def first_learnt(self) -> int:
        """Where the first token that carries loss stands."""
        return self.learnt[0][0]

    @property
    def own_length(self) -> int:
        """Tokens of the example that are not shared."""
        return len(self.input_ids) - self.shared_length

    @property
    def load(self) -> int:
        """What an example counts in a row: its own tokens, or half of all if more (attention has keys of all)."""
        return max(self.own_length, -(-len(self.input_ids) // 2))

    @property
    def prefix(self) -> bytes:
        """The tokens that the example shares, as bytes to look it up by."""
        return self.input_ids[: self.shared_length].tobytes()

    @property
    def label_count(self) -> int:
        """Tokens that carry loss, EOS included: how many losses the example brings."""
        return sum(stop - start for start, stop in self.learnt)

    def learnt_throughout(self) -> "Example":
        """The example with loss on every token that may carry it: neither a shared one nor the first behind those.

        (From the last shared token, which a row has once for all, only one next token could be predicted.)
        """
        return replace(self, learnt=((self.shared_length + 1, len(self)),))

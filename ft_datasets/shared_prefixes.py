"""Beginnings that many examples have in common, such as the header of the prompt template.

The hidden states of a token depend on what stands before it alone. Where examples of a packed row begin with the same
tokens, these can stand in the row once, for all of them (utils/rows/packing.py, utils/model/attention.py): losses and
gradients stay what they are, and of Chinese Alpaca examples a sixth of the tokens need not be computed. (Sharing
prefixes in training is from Prefix Grouper, Liu et al. 2025.)
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from ft_datasets.encoding import common_prefix
from ft_datasets.examples import Example

Tokens = tuple[int, ...]

SAMPLE = 2048
"""So many examples are looked through for common beginnings."""
ROW_EXAMPLES = 16
"""So many examples a row is taken to hold, where it is weighed whether a beginning is worth its own place."""
SHARED_AT_MOST = 512
"""Tokens of all prefixes together, so that they are a small part of any row; longer ones are cut."""
WORTH = 0.05
"""Below this share of all tokens, what is saved is not worth the copies that attention makes for it."""


def share_prefixes(examples: Sequence[Example]) -> list[Example]:
    """The same examples, with `shared_length` set where it pays."""
    sample = examples[:: -(-len(examples) // SAMPLE)]
    prefixes = _cut_prefixes([tuple(example.input_ids[: _most(example)].tolist()) for example in sample])
    lengths = sorted({len(prefix) for prefix in prefixes}, reverse=True)
    known = set(prefixes)

    def shared_length(example: Example) -> int:
        for length in lengths:
            if length <= _most(example) and tuple(example.input_ids[:length].tolist()) in known:
                return length
        return 0

    shared = [replace(example, shared_length=shared_length(example)) for example in examples]
    saved = sum(example.shared_length for example in shared)
    return shared if saved >= WORTH * sum(map(len, shared)) else list(examples)


def _most(example: Example) -> int:
    """All that stands before the first learnt token but for the last, from which that one is predicted."""
    return max(0, example.first_learnt - 1)


def _cut_prefixes(sequences: Sequence[Tokens]) -> list[Tokens]:
    """Beginnings to share, of sequences cut so far that all together have SHARED_AT_MOST tokens."""

    def of_length(limit: int) -> list[Tokens]:
        return common_prefixes([sequence[:limit] for sequence in sequences])

    def is_too_much(limit: int) -> bool:
        return sum(map(len, of_length(limit))) > SHARED_AT_MOST

    longest = max(map(len, sequences))
    return of_length(bisect_left(range(1, longest + 1), True, key=is_too_much) if is_too_much(longest) else longest)


def common_prefixes(sequences: Sequence[Tokens]) -> list[Tokens]:
    """Beginnings for rows of ROW_EXAMPLES sequences to share; of those that fit a sequence the longest is meant.

    One is taken where it saves more tokens than it has, beside the next shorter one that is taken. No sequence comes
    twice in a row.
    """
    found: list[Tokens] = []
    groups = [(sorted(sequences), 0)]  # sequences that begin alike, and how many tokens they share so far
    while groups:
        group, held = groups.pop()
        in_row = len(group) * min(1, ROW_EXAMPLES / len(sequences))
        if in_row <= 1:
            continue
        common = common_prefix(group[0], group[-1])  # in a sorted list the outermost differ first
        if in_row * (common - held) > common:
            found.append(group[0][:common])
            held = common
        longer = (sequence for sequence in group if len(sequence) > common)
        groups += [(list(members), held) for _token, members in groupby(longer, key=lambda sequence: sequence[common])]
    return found

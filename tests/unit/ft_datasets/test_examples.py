"""Which tokens of an example carry loss, and what identifies a run's data."""

import hashlib

import numpy as np
import pytest

from ft_datasets.examples import Example
from ft_datasets.loading import fingerprint
from ft_datasets.shared_prefixes import share_prefixes

IDS = [1, 10, 11, 12, 20, 21, 22, 2]


def example(*learnt: tuple[int, int], shared_length: int = 0) -> Example:
    return Example(1, "", np.array(IDS, dtype=np.int32), learnt, shared_length)


def test_labels_are_the_tokens_of_the_spans():
    two = example((2, 4), (6, 8))  # <s> 10 | 11 12 | 20 21 | 22 </s>: two answers, a question between them
    assert two.labels.tolist() == [-100, -100, 11, 12, -100, -100, 22, 2]
    assert (two.label_count, two.first_learnt) == (4, 2)
    assert two.input_ids.tolist() == IDS
    assert example((3, 5)).labels.tolist() == [-100, -100, -100, 12, 20, -100, -100, -100]
    assert example((0, 8)).labels.tolist() == IDS


@pytest.mark.parametrize(("shared_length", "expected"), [(0, ((1, 8),)), (3, ((4, 8),))])
def test_loss_on_every_token_that_may_carry_it(shared_length, expected):
    throughout = example((5, 6), shared_length=shared_length).learnt_throughout()
    assert throughout.learnt == expected
    assert throughout.shared_length == shared_length


def test_a_shared_beginning_ends_before_the_token_that_predicts_the_first_answer():
    shared = share_prefixes([example((4, 5), (7, 8))] * 8)
    assert {e.shared_length for e in shared} == {3}


def test_the_fingerprint_of_single_answers_is_that_of_old_checkpoints():
    """Tokens, then where the answer begins, of each example: a run of before goes on with the same data."""
    expected = hashlib.sha256()
    for start in (3, 5):
        expected.update(np.array(IDS, dtype="<i4").tobytes() + bytes([start, 0, 0, 0]))
    assert fingerprint([example((3, 8)), example((5, 8))]) == expected.hexdigest()


def test_other_spans_are_other_data():
    spans = [((3, 8),), ((3, 7),), ((3, 4), (5, 8)), ((3, 4), (5, 7)), ((3, 4),), ((3, 5), (6, 8))]
    assert len({fingerprint([example(*learnt)]) for learnt in spans}) == len(spans)

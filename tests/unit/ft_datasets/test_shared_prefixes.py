"""Which beginnings are shared, and what a row with shared ones looks like."""

import random

import numpy as np
import pytest
import torch
from helpers.line_count import lines_run
from helpers.records import alpaca_encoder, encode_records, load_records
from helpers.sharing_out import share_out_plainly

from ft_datasets.examples import Example
from ft_datasets.shared_prefixes import common_prefixes, share_prefixes
from utils.rows.packing import first_that_fit, heaviest_first, pack, share_out, tokens_of_a_step
from utils.rows.schedule import Schedule

CPU = torch.device("cpu")


def example(ids: list[int], prompt_length: int, shared_length: int = 0) -> Example:
    return Example(1, "", np.array(ids, dtype=np.int32), ((prompt_length, len(ids)),), shared_length)


def test_both_headers_of_the_template_are_found(tiny_model, data_file):
    records = load_records(data_file)
    examples = share_prefixes(encode_records(records, alpaca_encoder(tiny_model), 1000, print))
    has_input = [bool(record.messages[0].input) for record in records]
    kinds = [[e for e, has in zip(examples, has_input, strict=True) if has == kind] for kind in (False, True)]
    for kind in kinds:
        (length,) = {e.shared_length for e in kind}
        columns = zip(*(e.input_ids.tolist() for e in kind), strict=False)
        # Every token that all of the kind begin with, and perhaps not the last ones that others begin with as well.
        alike = [len(set(column)) == 1 for column in columns]
        assert 30 < length <= alike.index(False)
    assert kinds[0][0].prefix != kinds[1][0].prefix


def test_longer_beginnings_of_fewer_are_taken_where_they_save_more_than_they_cost():
    # Of 16 in a row, 8 save 8 x 4 tokens more by sharing 5 than by sharing 1, which costs 5.
    assert common_prefixes([(1, 2, 3, 4, 5, own) for own in range(8)] + [(1, own) for own in range(10, 18)]) == [
        (1,),
        (1, 2, 3, 4, 5),
    ]
    # Where two share one token more than all, that saves 2 and costs 4.
    assert common_prefixes([(1, 2, 3, 4), (1, 2, 3, 4)] + [(1, 2, 3, own) for own in range(10, 24)]) == [(1, 2, 3)]
    assert common_prefixes([(own, 5, 6) for own in range(16)]) == []
    assert common_prefixes([(1, 2, 3)] * 16) == [(1, 2, 3)]
    # Each example comes once in a row, so few have no more than all have.
    assert common_prefixes([(1, 2)]) == []
    assert common_prefixes([(1, 2, own, own, own) for own in range(3, 6)]) == [(1, 2)]


def shared_lengths(*sequences: list[int]) -> list[int]:
    """Of examples that have each of these as their prompt but for the last token, eight times."""
    made = [example([*sequence, 7, 8], len(sequence) + 1) for sequence in sequences for _time in range(8)]
    return [e.shared_length for e in share_prefixes(made)][::8]


def test_long_beginnings_are_cut_so_that_they_stay_a_small_part_of_a_row():
    long, other, header = list(range(600)), list(range(1, 300)), list(range(100))
    assert shared_lengths(long) == [512]
    assert shared_lengths(long, other) == [256, 256]
    assert shared_lengths(long[:250], other[:250]) == [250, 250]
    # A header with five tasks behind it, each too long beside the others: the header alone, and all of it.
    tasks = [header + [1000 * task + token for token in range(300)] for task in range(1, 6)]
    assert set(shared_lengths(*tasks)) == {100}


@pytest.mark.parametrize("seed", range(30))
def test_what_is_shared_is_shared_and_ends_before_the_prompt_does(seed):
    chooser = random.Random(seed)
    beginnings = [[chooser.randint(1, 3) for _ in range(chooser.randint(0, 12))] for _ in range(3)]
    made = []
    for _number in range(chooser.randint(1, 60)):
        ids = chooser.choice(beginnings) + [chooser.randint(1, 4) for _ in range(chooser.randint(2, 9))]
        made.append(example(ids, chooser.randint(0, len(ids) - 1)))
    shared = share_prefixes(made)
    prefixes = [e.prefix for e in shared if e.shared_length]
    assert len(prefixes) < 2 or len(set(prefixes)) < len(prefixes)
    for e, before in zip(shared, made, strict=True):
        assert np.array_equal(e.input_ids, before.input_ids)
        assert 0 <= e.shared_length < max(1, e.first_learnt)
    saved = sum(e.shared_length for e in shared)
    assert saved == 0 or saved >= 0.05 * sum(map(len, made))


def test_a_few_tokens_of_long_examples_are_not_worth_it():
    made = [example([1, *range(10 + i, 110 + i)], 50) for i in range(32)]
    assert not any(e.shared_length for e in share_prefixes(made))
    assert all(e.shared_length == 1 for e in share_prefixes([example([1, i, i + 1], 2) for i in range(10, 42)]))


def test_a_row_with_a_shared_beginning_is_as_written_by_hand():
    # <s> 10 | 11 12 and <s> 10 20 | 21 share <s> alone: from the first's 10 its answer is predicted.
    one, two = example([1, 10, 11, 12], 2, shared_length=1), example([1, 10, 20, 21], 3, shared_length=1)
    alone = example([5, 30, 31], 2)
    batch = pack([one, alone, two], CPU)
    assert batch.input_ids.tolist() == [1, 10, 11, 12, 5, 30, 31, 10, 20, 21]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 1, 2, 3]
    assert batch.segments.lengths == [1, 3, 3, 3]
    assert batch.segments.cumulative.tolist() == [0, 1, 4, 7, 10]
    assert batch.label_rows.tolist() == [1, 2, 5, 8]
    assert batch.label_ids.tolist() == [11, 12, 31, 21]
    contexts = batch.segments.contexts
    assert contexts.lengths == [1, 4, 3, 4]
    assert contexts.cumulative.tolist() == [0, 1, 5, 8, 12]
    assert contexts.tokens.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 9]
    assert contexts.places_of_shared.tolist() == [[0], [1], [8]]
    assert contexts.places_of_own.tolist() == [2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert batch.segments.longest == 4


def test_a_row_with_two_shared_beginnings_is_as_written_by_hand():
    made = [example([1, 2, 9, 7], 3, 2)] * 2 + [example([1, 3, 4, 9, 7], 4, 3)] * 3
    contexts = pack(made, CPU, at_least=20).segments.contexts
    assert contexts.lengths == [2, 3, 4, 4, 5, 5, 5, 5]  # the last fills the row up
    assert contexts.tokens.tolist()[:13] == [0, 1, 2, 3, 4, 0, 1, 5, 6, 0, 1, 7, 8]
    assert contexts.places_of_shared.tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 13, 14, 15],
        [9, 10, 18, 19, 20],
        [-1, -1, 23, 24, 25],
    ]
    assert len(contexts.places_of_own) == 20 - 5


def test_a_beginning_that_one_of_a_row_has_is_no_exception():
    """Compiled code would be another."""
    batch = pack([example([1, 10, 11], 2, 1), example([2, 10, 11], 2)], CPU)
    assert batch.input_ids.tolist() == [1, 10, 11, 2, 10, 11]
    assert batch.segments.lengths == [1, 2, 3]
    assert batch.segments.contexts.places_of_shared.tolist() == [[0], [1]]
    assert pack([example([1, 10, 11], 2)], CPU).segments.contexts is None


@pytest.mark.parametrize("seed", range(60))
def test_a_beginning_counts_once_in_a_micro_batch(seed):
    chooser = random.Random(seed)
    beginnings = [[number] * chooser.randint(1, 30) for number in range(1, 4)]
    made = []
    for number in range(chooser.randint(1, 30)):
        beginning = chooser.choice([[], *beginnings])
        own = [100 + number] * chooser.randint(2, 40)
        made.append(example(beginning + own, len(beginning) + 1, len(beginning)))
    budget, world_size, most = chooser.choice([80, 200, 1000]), chooser.randint(1, 3), chooser.choice([4, 1000])
    batches = share_out(made, budget, world_size, 0 if most == 1000 else most)
    assert batches == share_out_plainly(made, budget, world_size, 0 if most == 1000 else most)
    for batch in batches:
        if batch:
            packed = pack([made[i] for i in batch], CPU)
            assert len(packed.input_ids) <= budget
            assert packed.segments.contexts is None or len(packed.segments.contexts.tokens) <= 2 * budget


def test_tokens_of_a_step_are_those_of_the_rows_of_its_processes():
    made = [example([1] * 10 + [number] * (20 + number), 11, 10) for number in range(40)]
    schedule = Schedule(40, global_batch_size=8, num_epochs=1, max_steps=0, seed=1)
    steps = [[made[i] for i in schedule.indices(step)] for step in range(5)]
    found = tokens_of_a_step(made, schedule, 2)
    assert found.shared == 10
    assert found.mean == 8 * 39.5 / 2 + 10
    for step in steps:
        batches = share_out(step, 10_000, 2)
        assert max(len(pack([step[i] for i in batch], CPU).input_ids) for batch in batches) <= found.largest
    most = max(len(pack(step, CPU).input_ids) for step in steps) - 10
    assert found.largest == pytest.approx(1.02 * most / 2 + 10, abs=1)


def test_a_trial_takes_as_many_as_a_row_may_have():
    made = [example([1] * 30 + [number] * 40, 31, 30) for number in range(10)]
    for budget in (10, 70, 109, 110, 150, 400, 1000):
        chosen = first_that_fit(made, budget)
        assert len(chosen) == max(1, min(10, (budget - 30) // 40))
        assert share_out(chosen, max(budget, 70), 1) == [[*range(len(chosen))]]


@pytest.mark.parametrize("seed", range(40))
def test_no_row_has_more_keys_than_that_of_a_trial(seed):
    """Else a run could need memory that no trial has seen."""
    chooser = random.Random(seed)
    beginnings = [[number] * chooser.randint(0, 150) for number in range(1, 4)]
    made = []
    for number in range(200):
        beginning = chooser.choice(beginnings)
        made.append(
            example(
                beginning + [9 + number] * chooser.randint(2, 200),
                len(beginning) + 1,
                chooser.choice([0, len(beginning)]),
            )
        )
    budget = chooser.choice([600, 1500, 4000])

    def keys(row: list[Example]) -> int:
        segments = pack(row, CPU, at_least=budget).segments
        return sum(segments.contexts.lengths if segments.contexts else segments.lengths)

    trial = first_that_fit(heaviest_first(made), budget)
    rows = [[made[i] for i in batch] for batch in share_out(made, budget, 1)]
    assert max(map(keys, rows)) <= keys(trial) + 350
    assert max(len(e) for row in rows for e in row) == max(map(len, trial))


def test_long_beginnings_of_short_examples_do_not_make_rows_of_too_many_keys():
    """Attention has a copy of a beginning's keys and values for each that shares it."""
    made = [example([1] * 400 + [number] * 20, 401, 400) for number in range(100)]
    (batch,) = [first_that_fit(made, 4000)]
    contexts = pack(batch, CPU).segments.contexts
    assert 7000 < len(contexts.tokens) <= 8000


@pytest.mark.parametrize("own", [30, 700])
def test_where_no_two_fit_together_eight_times_as_many_are_little_more_than_eight_times_the_work(own):
    made = [example([1] * 500 + [number] * own, 501, 500) for number in range(4000)]
    work = [lines_run(lambda each=each: share_out(each, 1200, 1)) for each in (made[:500], made)]
    assert work[0] > 500
    assert work[1] < 12 * work[0]
    batches = share_out(made, 1200, 1)
    assert len(batches) == 4000 if own == 700 else len(batches) < 2100

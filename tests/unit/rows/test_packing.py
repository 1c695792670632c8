"""Which examples a step takes, how processes share them out, and what a packed row looks like."""

import random

import numpy as np
import pytest
import torch
from helpers.line_count import lines_run
from helpers.sharing_out import share_out_plainly

from ft_datasets.examples import Example
from utils.rows.packing import pack, share_out
from utils.rows.schedule import Schedule

CPU = torch.device("cpu")


def of_lengths(lengths: list[int]) -> list[Example]:
    rows = [np.zeros(length, dtype=np.int32) for length in lengths]
    return [Example(number, "", row, learnt=((1, len(row)),)) for number, row in enumerate(rows, 1)]


def some_lengths(count: int, seed: int = 0) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randint(5, 300) for _ in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [0, 1, 4])
def test_every_example_is_shared_out_exactly_once(world_size, micro_batch_size):
    lengths = some_lengths(41)
    batches = share_out(of_lengths(lengths), 700, world_size, micro_batch_size)
    assert sorted(i for batch in batches for i in batch) == list(range(41))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_process_gets_as_many_micro_batches(world_size):
    batches = share_out(of_lengths(some_lengths(20)), 500, world_size)
    counts = {len(batches[rank::world_size]) for rank in range(world_size)}
    assert len(counts) == 1


@pytest.mark.parametrize("seed", range(20))
def test_no_micro_batch_exceeds_the_token_budget(seed):
    lengths = some_lengths(37, seed)
    batches = share_out(of_lengths(lengths), 640, 2)
    assert max(sum(lengths[i] for i in batch) for batch in batches) <= 640


def test_an_example_longer_than_the_budget_gets_a_micro_batch_of_its_own():
    batches = share_out(of_lengths([1000, 10, 20, 30]), 100, 1)
    assert [0] in batches
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3]


def test_micro_batch_size_limits_the_examples_of_a_micro_batch():
    batches = share_out(of_lengths([10] * 10), 1000, 1, micro_batch_size=3)
    assert max(map(len, batches)) <= 3
    assert len(batches) == 4


def test_fewer_examples_than_processes_leave_some_without_any():
    batches = share_out(of_lengths([10, 20]), 100, 4)
    assert len(batches) == 4
    assert sorted(map(len, batches)) == [0, 0, 1, 1]


def test_sharing_out_is_deterministic_and_knows_nothing_of_chance():
    lengths = some_lengths(64)
    first = share_out(of_lengths(lengths), 2000, 2)
    random.seed(5)
    np.random.seed(5)
    assert share_out(of_lengths(lengths), 2000, 2) == first


def test_totals_of_the_micro_batches_are_nearly_equal():
    lengths = some_lengths(64)
    batches = share_out(of_lengths(lengths), 2048, 2)
    totals = [sum(lengths[i] for i in batch) for batch in batches]
    assert len(totals) >= 4
    # In the file's order alone, chunks of 16 examples differ by far more than this.
    assert max(totals) - min(totals) < 0.02 * max(totals)


@pytest.mark.parametrize("seed", range(150))
def test_sharing_out_follows_its_rule(seed):
    chooser = random.Random(seed)
    longest = chooser.choice([3, 60, 300])
    examples = of_lengths([chooser.randint(1, longest) for _ in range(chooser.randint(1, 30))])
    arguments = chooser.choice([20, 100, 400, 3000]), chooser.randint(1, 3), chooser.choice([0, 0, 1, 2, 5])
    assert share_out(examples, *arguments) == share_out_plainly(examples, *arguments)


@pytest.mark.parametrize(("budget", "micro_batch_size"), [(4096, 1), (4096, 0), (100_000, 0)])
def test_sharing_out_eight_times_as_many_examples_is_little_more_than_eight_times_the_work(budget, micro_batch_size):
    few, many = (of_lengths(some_lengths(count)) for count in (1000, 8000))
    work = [lines_run(lambda each=each: share_out(each, budget, 1, micro_batch_size)) for each in (few, many)]
    assert work[0] > 1000
    assert work[1] < 12 * work[0]


def schedule(**changes) -> Schedule:
    settings = {"examples": 23, "global_batch_size": 5, "num_epochs": 3, "max_steps": 0, "seed": 42, **changes}
    return Schedule(**settings)


def epoch_order(plan: Schedule, epoch: int) -> list[int]:
    first = epoch * plan.steps_per_epoch
    return np.concatenate([plan.indices(step) for step in range(first, first + plan.steps_per_epoch)]).tolist()


def test_each_epoch_is_a_permutation_of_all_examples():
    plan = schedule()
    for epoch in range(3):
        assert sorted(epoch_order(plan, epoch)) == list(range(23))


def test_order_differs_between_epochs_and_between_seeds():
    plan = schedule()
    orders = [epoch_order(plan, 0), epoch_order(plan, 1), epoch_order(schedule(seed=43), 0)]
    assert len({tuple(order) for order in orders}) == 3


def test_a_steps_examples_depend_on_seed_and_step_alone():
    plan = schedule()
    forwards = [plan.indices(step).tolist() for step in range(plan.total_steps)]
    np.random.seed(1)
    longer = schedule(num_epochs=7)
    backwards = [longer.indices(step).tolist() for step in reversed(range(plan.total_steps))]
    assert backwards[::-1] == forwards


def test_order_is_the_same_for_every_batch_size():
    # Two processes with 4 examples each and one with 8 take the same examples, step by step; a smaller batch walks
    # through the same order.
    assert epoch_order(schedule(global_batch_size=8), 1) == epoch_order(schedule(global_batch_size=3), 1)


def test_arithmetic_of_steps():
    plan = schedule()
    assert plan.steps_per_epoch == 5  # 23 examples: 5 + 5 + 5 + 5 + 3
    assert plan.total_steps == 15
    assert [len(plan.indices(step)) for step in range(5)] == [5, 5, 5, 5, 3]
    assert [plan.epoch_of(step) for step in (0, 4, 5, 14)] == [0, 0, 1, 2]
    assert [plan.ends_epoch(step) for step in (0, 4, 5, 14)] == [False, True, False, True]
    assert schedule(max_steps=7).total_steps == 7
    assert schedule(max_steps=99).total_steps == 15


def test_the_largest_step_is_that_of_the_run():
    lengths = [1, 2, 3, 4, 5, 6, 7, 1000]
    plan = schedule(examples=8, global_batch_size=3, num_epochs=2)
    totals = [sum(lengths[i] for i in plan.indices(step)) for step in range(plan.total_steps)]
    assert plan.largest_step(lengths) == max(totals) > 1000
    first = schedule(examples=8, global_batch_size=3, num_epochs=2, max_steps=1)
    assert first.largest_step(lengths) == totals[0]


def test_packed_row_of_two_examples_is_as_written_by_hand():
    # <s> 10 11 | 12 13 </s>   and   <s> 20 | 21 </s>: loss on what stands after the bar.
    one = Example(1, "", np.array([1, 10, 11, 12, 13, 2], dtype=np.int32), learnt=((3, 6),))
    two = Example(2, "", np.array([1, 20, 21, 2], dtype=np.int32), learnt=((2, 4),))
    batch = pack([one, two], CPU)
    assert batch.input_ids.tolist() == [1, 10, 11, 12, 13, 2, 1, 20, 21, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert batch.segments.lengths == [6, 4]
    assert batch.segments.cumulative.tolist() == [0, 6, 10]
    # 12 is predicted from 11 at row 2, ..., the first </s> from 13 at row 4; nothing predicts the second <s>.
    assert batch.label_rows.tolist() == [2, 3, 4, 7, 8]
    assert batch.label_ids.tolist() == [12, 13, 2, 21, 2]
    assert {x.dtype for x in (batch.input_ids, batch.position_ids, batch.label_rows, batch.label_ids)} == {torch.int64}


def test_a_first_token_is_never_a_label_even_without_a_prompt():
    # A tokenizer without BOS and an empty prompt: nothing stands before the first token that could predict it.
    batch = pack([Example(1, "", np.array([7, 8, 2], dtype=np.int32), learnt=((0, 3),))], CPU)
    assert batch.label_rows.tolist() == [0, 1]
    assert batch.label_ids.tolist() == [8, 2]


@pytest.mark.parametrize("shared_length", [0, 2])
def test_labels_of_several_spans_are_those_of_a_plain_loop(shared_length):
    """Each label is the next token of its row's own example, wherever its spans and its shared beginning lie."""
    spans = [((3, 5), (7, 9)), ((4, 5),), ((3, 4), (5, 6), (8, 10))]
    made = [
        Example(n, "", np.array([1, 2, *range(10 * n, 10 * n + 8)], dtype=np.int32), learnt, shared_length)
        for n, learnt in enumerate(spans, 1)
    ]
    expected = []
    for each in made:
        for start, stop in each.learnt:
            expected += [(int(each.input_ids[at - 1]), at - 1, int(each.input_ids[at])) for at in range(start, stop)]
    batch = pack(made, CPU)
    columns = batch.input_ids[batch.label_rows], batch.position_ids[batch.label_rows], batch.label_ids
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert len(batch.input_ids) == (30 if shared_length == 0 else 26)


def test_a_row_is_filled_up_without_labels():
    example = Example(1, "", np.array([1, 7, 8, 2], dtype=np.int32), learnt=((2, 4),))
    batch = pack([example, example], CPU, longest=5, at_least=11)
    assert batch.input_ids.tolist() == [1, 7, 8, 2, 1, 7, 8, 2, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert batch.segments.lengths == [4, 4, 3]
    assert batch.label_rows.tolist() == [1, 2, 5, 6]
    assert batch.label_ids.tolist() == [8, 2, 8, 2]


def test_what_fills_a_row_up_is_no_longer_than_the_longest_example():
    """Else `longest`, a constant in compiled code, would be another from row to row."""
    batch = pack([Example(1, "", np.array([7, 8, 2], dtype=np.int32), learnt=((0, 3),))], CPU, longest=4, at_least=13)
    assert batch.segments.lengths == [3, 4, 4, 2]
    assert batch.segments.longest == 4
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1]

"""The search for the micro-batch, on cards whose memory and speed are made up."""

import json
import time

import pytest
import torch

from utils.machine.world import World
from utils.rows.packing import StepTokens
from utils.training import measuring, search
from utils.training.search import Search
from utils.training.step_plan import HostMemory, StepPlan, rows_of, rows_together, token_budgets

LAYERS = 32
CARD = World(0, 1, [torch.device("cuda", 0)])


class Card:
    """A card with `memory` units: a token takes 1 in each layer that keeps its activations, 4 in all otherwise.

    Recomputing a layer costs half of it again, copying it to host memory and back `copy` of it; small micro-batches
    are slow.
    """

    def __init__(self, memory: float, monkeypatch, copy: float = 9.0) -> None:
        self.memory, self.copy, self.trials = memory, copy, []
        monkeypatch.setattr(search, "fits", lambda _world, attempt: attempt() is not None)
        monkeypatch.setattr(search, "measure", lambda _world, attempt: attempt())

    def try_step(self, chosen: StepPlan, tokens: int, rows: int = 1) -> float | None:
        """Seconds."""
        self.trials.append((chosen, tokens, rows))
        kept = chosen.keeps(tokens, LAYERS)
        others = LAYERS - kept
        offloaded = chosen.offloads(others)
        if rows * tokens * (4 + kept + min(1, offloaded)) > self.memory:
            return None
        twice = ((others - offloaded) / 2 + offloaded * self.copy) / LAYERS
        return rows * (tokens + 300) * (1 + twice)

    def asked(
        self, longest=500, largest=8000, mean=8000, kept=range(LAYERS + 1), world=CARD, shared=0, **more
    ) -> Search:
        return Search(world, longest, StepTokens(largest, mean, shared), kept, self.try_step, **more)


def test_sizes_are_the_largest_step_in_equal_parts():
    assert token_budgets(500, 8000, 0) == [8000, 4000, 2667, 2000, 1600, 1334, 1143]
    assert token_budgets(3000, 8000, 0) == [8000, 4000]
    assert token_budgets(9000, 8000, 0) == [9000]
    assert token_budgets(10, 100, 0) == [100]
    assert token_budgets(60_000, 131_073, 0) == [60_000]
    assert max(token_budgets(10, 1_000_000, 0)) <= 65_536


def test_each_part_of_a_step_has_what_its_examples_share():
    assert token_budgets(500, 8068, 68) == [8068, 4068, 2735, 2068, 1668, 1402, 1211, 1068]
    assert [rows_of(8068, budget, 68) for budget in (8068, 8067, 4068, 1068)] == [1, 2, 2, 8]
    assert token_budgets(900, 2512, 512) == [2512, 1512, 1179]
    assert max(token_budgets(10, 1_000_000, 512)) <= 65_536


def test_the_fastest_of_several_attempts_counts_and_one_that_runs_out_of_memory_is_none():
    world = World(0, 1, [torch.device("cpu")])
    pauses = [0.2, 0.05, 0.1]
    calls = []

    def attempt() -> None:
        time.sleep(pauses[len(calls) % 3])
        calls.append(None)

    assert 0.05 <= measuring.measure(world, attempt, repeat_for=0.12) < 0.1
    assert len(calls) == 3
    assert measuring.fits(world, attempt)
    assert len(calls) == 4

    def too_large() -> None:
        raise torch.cuda.OutOfMemoryError

    assert measuring.measure(world, too_large) is None
    assert not measuring.fits(world, too_large)


def test_a_large_card_takes_a_step_at_once_and_is_asked_once(monkeypatch):
    card = Card(8000 * (4 + LAYERS), monkeypatch)
    found = card.asked().by_trying()
    assert found == StepPlan(8000, LAYERS)
    assert card.trials == [(found, 8000, 1)]


@pytest.mark.parametrize("memory", [20_000, 40_000, 60_000, 90_000, 150_000, 280_000])
def test_a_smaller_card_gets_what_is_fastest_of_all_that_fits(monkeypatch, memory):
    card = Card(memory, monkeypatch)
    found = card.asked().by_trying()
    assert found.token_budget * (4 + found.kept_layers) <= memory
    assert not found.offload_every

    def speed(chosen: StepPlan) -> float:
        seconds = card.try_step(chosen, chosen.token_budget)
        return chosen.token_budget / seconds if seconds else 0.0

    best = max(speed(StepPlan(t, k)) for t in token_budgets(500, 8000, 0) for k in range(LAYERS + 1))
    one_more = found._replace(kept_layers=min(found.kept_layers + 1, LAYERS))
    assert speed(one_more) == best or speed(found) > 0.97 * best


@pytest.mark.parametrize("memory", [20_000, 40_000, 90_000, 150_000])
def test_what_rows_share_counts_against_small_ones(monkeypatch, memory):
    """A step of 8,000 tokens and 500 that each of its rows has beside."""
    card = Card(memory, monkeypatch)
    found = card.asked(largest=8500, mean=8500, shared=500).by_trying()

    def seconds(rows: int, kept: int) -> float:
        tokens = -(-8000 // rows) + 500
        one = card.try_step(StepPlan(tokens, kept), tokens)
        return rows * one if one else 1e9

    best = min(seconds(rows, kept) for rows in range(1, 17) for kept in range(LAYERS + 1))
    rows = -(-8000 // (found.token_budget - 500))
    one_more = min(found.kept_layers + 1, LAYERS)
    assert best == pytest.approx(min(seconds(rows, found.kept_layers), seconds(rows, one_more)), rel=0.03)


def test_what_counts_is_the_speed_of_a_usual_step(monkeypatch):
    """One row takes it, all its layers keep their activations, and so the largest one may recompute."""
    card = Card(5000 * (4 + LAYERS), monkeypatch)
    found = card.asked(largest=10_000, mean=4000).by_trying()
    assert found.token_budget >= 4000
    assert found.keeps(4000, LAYERS) == LAYERS
    assert found.token_budget * (4 + found.kept_layers) <= card.memory


@pytest.mark.parametrize(("copy", "expected"), [(2.0, 4), (0.9, 2), (0.5, 1), (0.01, 1)])
def test_host_memory_takes_what_it_can_while_the_card_computes(monkeypatch, copy, expected):
    """A copy of a layer's takes `copy` forward and backward passes of it; a forward pass is half of both."""
    host = HostMemory(10**9, int, copy / LAYERS)
    found = Card(90_000, monkeypatch, copy=0.0).asked(longest=2500, host=host).by_trying()
    assert found.offload_every == expected


def test_a_smaller_size_may_be_fastest_with_host_memory_alone(monkeypatch):
    """The largest leaves no room for the layer that is on its way, and the next is slower without offloading."""
    card = Card(33_000, monkeypatch, copy=0.0)
    assert card.asked().by_trying() == StepPlan(8000, 0)
    found = card.asked(host=HostMemory(10**9, int, 0.01 / LAYERS)).by_trying()
    assert found.token_budget == 4000
    assert found.offload_every == 1


def test_host_memory_is_not_used_where_that_is_slower(monkeypatch):
    found = Card(90_000, monkeypatch, copy=0.6).asked(host=HostMemory(10**9, int, 0.3 / LAYERS)).by_trying()
    assert not found.offload_every


def test_memory_is_pinned_only_if_that_is_soon_won_back(monkeypatch):
    """With 11 layers kept 21 compute twice; with host memory 10 are kept and 22 let their activations wait there."""
    card = Card(2500 * (4 + 12), monkeypatch, copy=0.0)
    slower = card.try_step(StepPlan(2500, 11), 2500) / card.try_step(StepPlan(2500, 10, 1), 2500)
    assert slower == pytest.approx(1 + 21 / 64)
    won = search.WON_BACK_WITHIN * (1 - 1 / slower)
    for factor, offloads in ((1.1, False), (0.9, True)):
        host = HostMemory(10**9, int, 0.01 / LAYERS, pin_seconds=factor * won / (22 * 2500))
        found = card.asked(longest=2500, largest=2500, mean=2500, host=host).by_trying()
        assert bool(found.offload_every) == offloads


@pytest.mark.parametrize(("cost", "copy", "stays"), [(0.0, 0.01, True), (0.0, 2.0, False), (9.0, 0.01, False)])
def test_memory_stays_pinned_only_if_the_first_step_can_use_it(monkeypatch, cost, copy, stays):
    """The largest size is best with offloading; a smaller one is; none is."""
    card = Card(90_000, monkeypatch, copy=cost)
    monkeypatch.setattr(search, "give_back_host", lambda: card.trials.append(None))
    found = card.asked(longest=2500, host=HostMemory(10**9, int, copy / LAYERS)).by_trying()
    assert (card.trials[-1] is not None) == stays
    if stays:
        assert card.trials[-1][0].token_budget == found.token_budget
        assert found.offload_every


def test_no_more_waits_in_host_memory_than_it_has_room_for(monkeypatch):
    card = Card(40_000, monkeypatch, copy=0.1)
    for host_tokens in (0, 20_000, 60_000, 100_000):
        card.asked(host=HostMemory(host_tokens, int, 0.1 / LAYERS)).by_trying()
        on_host = [t * c.offloads(LAYERS - c.keeps(t, LAYERS)) for c, t, _rows in card.trials]
        assert max(on_host) <= host_tokens
        assert bool(max(on_host)) == (host_tokens > 0)
        card.trials.clear()


def test_what_the_user_has_fixed_stays(monkeypatch):
    card = Card(60_000, monkeypatch)
    assert card.asked(kept=[0]).by_trying() == StepPlan(8000, 0)
    assert all(chosen.kept_layers == 0 for chosen, _tokens, _rows in card.trials)


def test_over_several_cards_rows_go_together(monkeypatch):
    """Two cards that each take half of a row's time: the more rows, the less they wait for each other."""
    card = Card(10**9, monkeypatch)
    plain = card.try_step
    monkeypatch.setattr(card, "try_step", lambda c, tokens, rows: plain(c, tokens, 1) * (rows + 1) / 2)
    two_cards = World(0, 1, [torch.device("cuda", 0), torch.device("cuda", 1)])
    found = card.asked(world=two_cards).by_trying()
    seconds = {rows: (8000 / rows + 300) * (rows + 1) / 2 for rows in (1, 2, 3, 4)}
    assert 8000 / found.token_budget == pytest.approx(min(seconds, key=seconds.get), abs=0.01)
    assert [rows_together(2, rows) for rows in (1, 2, 4, 8)] == [1, 2, 4, 4]
    assert rows_together(1, 8) == 1


@pytest.mark.parametrize("memory", [40_000, 60_000, 150_000, 400_000])
def test_a_sharded_search_never_tries_what_does_not_fit(monkeypatch, memory):
    card = Card(memory, monkeypatch)

    def peak(_world, attempt) -> float:
        assert attempt(), "out of memory"
        chosen, tokens, _rows = card.trials[-1]
        return tokens * (4 + chosen.kept_layers)

    monkeypatch.setattr(search, "peak_of", peak)
    monkeypatch.setattr(search, "memory_limit", lambda _world: memory)
    tokens, kept, *_others = card.asked(longest=100).by_extrapolation()
    assert tokens * (4 + kept) <= 0.9 * memory
    if memory >= 400_000:
        assert (tokens, kept) == (8000, LAYERS)
    # As much as there is room for: neither a layer more nor the next size would have fitted.
    elif kept < LAYERS:
        assert tokens * (4 + kept + 1) > 0.9 * memory


def test_cards_without_room_for_several_rows_take_one_at_a_time(monkeypatch):
    card = Card(5000 * (4 + 3), monkeypatch)
    two_cards = World(0, 1, [torch.device("cuda", 0), torch.device("cuda", 1)])
    found = card.asked(longest=5000, largest=10_000, world=two_cards).by_trying()
    assert found.rows == 1
    assert found.token_budget == 5000
    assert found.kept_layers == 2  # one less than fits


def test_an_earlier_answer_that_needs_more_host_memory_than_there_is_now_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = Card(90_000, monkeypatch, copy=0.1)
    monkeypatch.setattr(search, "memory_limit", lambda _world: card.memory)

    def host_bytes(room: int) -> int:
        found = card.asked(host=HostMemory(room, int, 0.1 / LAYERS)).best("one")
        return found.token_budget * found.offloads(LAYERS - found.kept_layers)

    assert host_bytes(10**9) > 10_000
    assert host_bytes(10_000) <= 10_000


def test_an_earlier_runs_answer_is_used_as_long_as_it_fits(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = Card(60_000, monkeypatch)
    monkeypatch.setattr(search, "memory_limit", lambda _world: card.memory)

    def ask(kind: str) -> StepPlan:
        card.trials.clear()
        return card.asked().best(kind)

    found = ask("one")
    assert len(card.trials) > 1
    assert ask("one") == found
    assert [chosen for chosen, _tokens, _rows in card.trials] == [found]
    ask("another")
    assert len(card.trials) > 1
    card.memory = 30_000
    smaller = ask("one")
    assert smaller != found
    assert ask("one") == smaller
    card.memory = 60_000  # the other program has gone
    assert ask("one") == found
    remembered = tmp_path / "llama2-chinese" / "step-plans" / "one.json"
    assert json.loads(remembered.read_text()) == {"step_plan": found._asdict(), "free": 60_000}
    nothing = found._asdict() | {"token_budget": 0}
    for content in ("{", "null", "5", '{"free": 60000}', '{"free": 60000, "step_plan": [1, 2]}', "[" * 10_000):
        remembered.write_text(content)
        assert ask("one") == found and len(card.trials) > 1
    for plan in (nothing, found._asdict() | {"rows": 0}, found._asdict() | {"kept_layers": -1}):
        remembered.write_text(json.dumps({"step_plan": plan, "free": 60_000}))
        assert ask("one") == found and len(card.trials) > 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert ask("one") == found


def test_what_must_not_be_tried_is_trusted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = Card(60_000, monkeypatch)
    monkeypatch.setattr(search, "memory_limit", lambda _world: card.memory)
    monkeypatch.setattr(search, "peak_of", lambda _world, attempt: attempt() and 1000.0)
    found = card.asked(longest=100, is_sharded=True).best("one")
    card.trials.clear()
    assert card.asked(longest=100, is_sharded=True).best("one") == found
    assert not card.trials

"""The search for the micro-batch, on cards whose memory and speed are made up."""

import pytest
import torch

from utils import micro_batch
from utils.distributed import World
from utils.micro_batch import Search, token_budgets

LAYERS = 32
CARD = World(0, 0, 1, [torch.device("cuda", 0)])


class Card:
    """A card with `memory` units: a token takes 1 in each layer that keeps its activations, 4 in all otherwise."""

    def __init__(self, memory: float, monkeypatch) -> None:
        self.memory, self.trials = memory, []
        monkeypatch.setattr(micro_batch, "measure", lambda _world, attempt: attempt())

    def try_step(self, tokens: int, kept: int) -> float | None:
        """Seconds; recomputing a layer costs half of it again, and small micro-batches are slow."""
        self.trials.append((tokens, kept))
        if tokens * (4 + kept) > self.memory:
            return None
        return (tokens + 300) * (1 + (LAYERS - kept) / LAYERS / 2)

    def search(self, longest=500, largest_step=8000, kept_counts=range(LAYERS + 1)) -> tuple[int, int]:
        return self.asked(longest, largest_step, kept_counts).by_trying()

    def asked(self, longest=500, largest_step=8000, kept_counts=range(LAYERS + 1), is_sharded=False) -> Search:
        return Search(CARD, longest, largest_step, kept_counts, self.try_step, is_sharded)


def test_sizes_are_the_largest_step_in_equal_parts():
    assert token_budgets(500, 8000) == [8000, 4000, 2667, 2000, 1600, 1334, 1143]
    assert token_budgets(3000, 8000) == [8000, 4000]
    assert token_budgets(9000, 8000) == [9000]
    assert token_budgets(10, 100) == [100]
    assert token_budgets(60_000, 131_073) == [60_000]
    assert max(token_budgets(10, 1_000_000)) <= 65_536


def test_a_large_card_takes_a_step_at_once_and_is_asked_once(monkeypatch):
    card = Card(8000 * (4 + LAYERS), monkeypatch)
    assert card.search() == (8000, LAYERS)
    assert card.trials == [(8000, LAYERS)]


@pytest.mark.parametrize("memory", [20_000, 40_000, 60_000, 90_000, 150_000, 280_000])
def test_a_smaller_card_gets_what_is_fastest_of_all_that_fits(monkeypatch, memory):
    card = Card(memory, monkeypatch)
    tokens, kept = card.search()
    assert tokens * (4 + kept) <= memory

    def speed(tokens: int, kept: int) -> float:
        seconds = card.try_step(tokens, kept)
        return tokens / seconds if seconds else 0.0

    best = max(speed(t, k) for t in token_budgets(500, 8000) for k in range(LAYERS + 1))
    assert speed(tokens, min(kept + 1, LAYERS)) == best or speed(tokens, kept) > 0.97 * best


def test_what_the_user_has_fixed_stays(monkeypatch):
    card = Card(60_000, monkeypatch)
    assert card.search(kept_counts=[0]) == (8000, 0)
    assert all(kept == 0 for _tokens, kept in card.trials)


@pytest.mark.parametrize("memory", [40_000, 60_000, 150_000, 400_000])
def test_a_sharded_search_never_tries_what_does_not_fit(monkeypatch, memory):
    card = Card(memory, monkeypatch)

    def peak(_world, attempt) -> float:
        assert attempt(), "out of memory"
        tokens, kept = card.trials[-1]
        return tokens * (4 + kept)

    monkeypatch.setattr(micro_batch, "_peak", peak)
    monkeypatch.setattr(micro_batch, "_memory_limit", lambda _world: memory)
    tokens, kept = card.asked(longest=100).by_extrapolation()
    assert tokens * (4 + kept) <= 0.9 * memory
    if memory >= 400_000:
        assert (tokens, kept) == (8000, LAYERS)
    # As much as there is room for: neither a layer more nor the next size would have fitted.
    elif kept < LAYERS:
        assert tokens * (4 + kept + 1) > 0.9 * memory


def test_an_earlier_runs_answer_is_used_as_long_as_it_fits(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = Card(60_000, monkeypatch)
    monkeypatch.setattr(micro_batch, "_memory_limit", lambda _world: card.memory)

    def ask(kind: str) -> tuple[int, int]:
        card.trials.clear()
        return card.asked().best(kind)

    found = ask("one")
    assert len(card.trials) > 1
    assert ask("one") == found
    assert card.trials == [found]
    ask("another")
    assert len(card.trials) > 1
    card.memory = 30_000
    smaller = ask("one")
    assert smaller != found
    assert ask("one") == smaller
    card.memory = 60_000  # the other program has gone
    assert ask("one") == found
    (tmp_path / "llama2-chinese" / "one.json").write_text("{")
    assert ask("one") == found
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert ask("one") == found


def test_what_must_not_be_tried_is_trusted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = Card(60_000, monkeypatch)
    monkeypatch.setattr(micro_batch, "_memory_limit", lambda _world: card.memory)
    monkeypatch.setattr(micro_batch, "_peak", lambda _world, attempt: attempt() and 1000.0)
    found = card.asked(longest=100, is_sharded=True).best("one")
    card.trials.clear()
    assert card.asked(longest=100, is_sharded=True).best("one") == found
    assert not card.trials

"""Which layers keep, recompute and offload their activations, and that offloaded ones come back."""

import pytest
import torch

from utils.model.activations import Kept, Offloaded, Recomputed
from utils.training.step_plan import StepPlan


def kinds(step_plan: StepPlan, tokens: int, layers: int) -> str:
    """A letter for each layer."""
    letters = {Kept: "k", Recomputed: "r", Offloaded: "o"}
    return "".join(letters[type(place)] for place in step_plan.activations(tokens, layers))


@pytest.mark.parametrize(
    ("step_plan", "tokens", "expected"),
    [
        ((1024, 8), 1024, "kkkkkkkk"),
        ((1024, 2), 1024, "rrrrrrkk"),
        ((1024, 2), 512, "rrrrkkkk"),  # a shorter row: as many tokens of activations in all
        ((1024, 2), 300, "rrkkkkkk"),
        ((1000, 2), 1024, "rrrrrrkk"),  # rows on a card are filled up
        ((1024, 0), 128, "rrrrrrrr"),
        ((1024, 2, 1), 1024, "ooooookk"),
        ((1024, 2, 2), 1024, "rororokk"),
        ((1024, 2, 3), 1024, "rrorrokk"),
        ((1024, 2, 4), 1024, "rorrrokk"),
        ((1024, 2, 2), 256, "kkkkkkkk"),
    ],
)
def test_which_layers_do_what(step_plan, tokens, expected):
    chosen = StepPlan(*step_plan)
    assert kinds(chosen, tokens, 8) == expected
    others = 8 - chosen.keeps(tokens, 8)
    assert chosen.offloads(others) == expected.count("o")
    assert others == len(expected) - expected.count("k")


def test_what_was_offloaded_comes_back_and_leaves_in_between():
    places = StepPlan(128, 0, 1).activations(128, 4)
    tensors = [(torch.randn(3, 2), torch.randn(5)) for _place in places]
    for place, pair in zip(places, tensors, strict=True):
        place.put(tuple(tensor.clone() for tensor in pair))
    assert [place.tensors is None for place in places] == [True, True, True, False]
    for index in (3, 2, 1, 0):
        for found, expected in zip(places[index].get(), tensors[index], strict=True):
            assert torch.equal(found, expected)
        assert places[index].tensors is None
        assert not places[index].on_host
        if index:  # the next is on its way while this layer's backward pass runs
            assert places[index - 1].tensors is not None


def test_kept_ones_are_given_once_and_recomputed_ones_never():
    kept, recomputed = Kept(), Recomputed()
    for place in (kept, recomputed):
        place.put((torch.ones(1),))
    assert kept.get() is not None
    assert kept.get() is None
    assert recomputed.get() is None

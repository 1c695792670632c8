"""Models in memory a part at a time compute what they compute when they are there whole."""

from contextlib import nullcontext

import pytest
import torch

from utils.model.decoder import forward_hidden, logits
from utils.model.folder import ModelFolder
from utils.model.streaming import Comparison, StreamedModel
from utils.model.weights import empty_base_model, load_base_model

CPU = torch.device("cpu")
EXAMPLES = [torch.tensor(ids) for ids in ([1, 300, 301, 302, 555, 410, 333], [1, 278, 599], [1, 480, 481, 2])]


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to: `model.layers.0`, `lm_head`."""
    return ".".join(name.split(".")[: 3 if name.startswith("model.layers.") else -1])


def streamed(folder, name: str) -> StreamedModel:
    base = ModelFolder(folder)
    is_tied = base.config.get("tie_word_embeddings")

    def read(tensor: str) -> torch.Tensor:
        present = {part_of(place) for place, parameter in model.named_parameters() if not parameter.is_meta}
        assert present <= {part_of(tensor)}, "another part is still there"
        return base.tensor("model.embed_tokens.weight" if is_tied and tensor == "lm_head.weight" else tensor)

    model = empty_base_model(base, torch.float32)
    return StreamedModel(model, read, {name: lambda _part: nullcontext()}, CPU)


@pytest.mark.parametrize("model", ["tiny_model", "grouped_model", "qwen3_model"])
def test_layer_by_layer_is_the_whole_model(model, tiny_model, request):
    folder = request.getfixturevalue(model)
    comparison = Comparison([streamed(folder, "one"), streamed(tiny_model, "other")], EXAMPLES, 1e9)
    comparison.run()
    assert comparison.hidden.keys() == {"one", "other"}
    whole = load_base_model(ModelFolder(folder), torch.float32, [CPU])
    with torch.no_grad():
        expected = [forward_hidden(whole, ids, torch.arange(len(ids))) for ids in EXAMPLES]
        for found, wanted in zip(comparison.hidden["one"], expected, strict=True):
            assert torch.equal(found, wanted)
        (found,) = comparison.logits([torch.tensor([2, 5]), torch.tensor([], dtype=torch.long), torch.tensor([0])])
        rows = torch.cat([expected[0][[2, 5]], expected[2][[0]]])
        torch.testing.assert_close(found["one"], logits(whole, rows))
    assert all(parameter.is_meta for each in comparison.models for parameter in each.model.parameters())


@pytest.mark.parametrize(
    ("budget", "loading", "computing", "kept"),
    [
        (1000.0, 2.0, 98.0, 8),  # 10 layers of 100 seconds: all of them
        (500.0, 2.0, 96.0, 4),  # 50 seconds a layer, 48 of them to compute half
        (300.0, 2.0, 98.0, 2),  # 28 of 98 seconds: 2.3 of 8
        (10.0, 2.0, 98.0, 1),  # not even the weights can be loaded in time
    ],
)
def test_examples_are_left_out_by_what_the_first_layer_took(tiny_model, budget, loading, computing, kept):
    comparison = Comparison([streamed(tiny_model, "one")], [torch.tensor([number]) for number in range(8)], budget)
    comparison.hidden = {"one": [torch.tensor([float(number)]) for number in range(8)]}
    comparison._cut(loading, computing, layers=10)
    assert [ids.item() for ids in comparison.examples] == [*range(kept)]
    assert [states.item() for states in comparison.hidden["one"]] == [*range(kept)]

"""What the compiler is asked for."""

import torch
from torch import nn

from utils.activations import Kept
from utils.llama import run_plain


class Layer(nn.Module):
    """Stands for a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, length, 4] -> the same."""
        return hidden + self.linear(hidden).tanh()


def test_an_input_without_a_gradient_makes_no_second_code():
    """The first layer's, where embeddings are frozen. In front of frozen layers no gradient is computed for it."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _example: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    layer = Layer()
    layer.compile(backend=count)
    embedded = torch.randn(1, 3, 4)
    first = run_plain(layer, embedded, Kept())
    second = run_plain(layer, first, Kept())
    assert len(graphs) == 1
    second.sum().backward()
    plain = Layer()
    plain.load_state_dict(layer.state_dict())
    plain(plain(embedded)).sum().backward()
    torch.testing.assert_close(layer.linear.weight.grad, plain.linear.weight.grad)
    assert embedded.grad is None
    assert not run_plain(layer.requires_grad_(False), embedded, Kept()).requires_grad

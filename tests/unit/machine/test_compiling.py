"""What the compiler is asked for."""

import pytest
import torch
from helpers.trainers import made_up_examples
from helpers.varlen_on_cpu import use_varlen_on_cpu
from torch import nn
from torch._dynamo.utils import counters

from configs.errors import UserError
from configs.peft import LoraConfig
from configs.training import TrainingConfig
from utils.machine.compiling import check_compiler, should_compile
from utils.model.activations import Kept
from utils.model.adapters import add_adapter, prepare_full
from utils.model.decoder import causal_lm, forward_hidden, run_plain
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.rows.packing import pack
from utils.rows.segments import Segments
from utils.training.response_loss import ResponseLoss

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("capability", [(7, 0), (8, 9)])
def test_long_runs_compile(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    card = torch.device("cuda")
    found = [should_compile(choice, card, tokens) for choice in (None, True, False) for tokens in (9_999, 10**7)]
    assert found == [False, True, True, True, False, False]
    assert not should_compile(True, CPU, 10**7)


def test_cards_that_are_too_old_for_the_compiler_do_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (6, 0))
    assert not should_compile(None, torch.device("cuda"), 10**7)
    check_compiler(None, torch.device("cuda"))
    check_compiler(True, CPU)
    with pytest.raises(UserError, match="--torch_compile"):
        check_compiler(True, torch.device("cuda"))


def compile_without_kernels(model: nn.Module) -> None:
    """As compile_layers, but for the code that is made in the end."""
    torch._dynamo.reset()
    for layer in causal_lm(model).model.layers:
        layer.compile(dynamic=True, backend="aot_eager_decomp_partition")


@pytest.mark.filterwarnings("ignore")  # of torch, about torch
@pytest.mark.parametrize("has_varlen", [False, True])
def test_rows_of_any_number_of_examples_share_their_code(tiny_model, monkeypatch, has_varlen):
    """Full fine-tuning in bf16 over fp32 weights, with and without a kernel for all examples at once."""
    base = load_base_model(ModelFolder(tiny_model), torch.float32, [CPU])
    losses = ResponseLoss(base, torch.bfloat16), ResponseLoss(prepare_full(base), torch.bfloat16)
    batches = [pack(made_up_examples()[:count], CPU, longest=40) for count in (2, 3, 5, 8, 7)]
    plain = [losses[0](batch, 1.0).item() for batch in batches]
    if has_varlen:
        use_varlen_on_cpu(monkeypatch)
    compile_without_kernels(losses[1].model)
    counters.clear()
    assert losses[1](batches[0], 1.0).item() == pytest.approx(plain[0], rel=0.01)
    graphs = counters["stats"]["unique_graphs"]
    assert (graphs == 1) == has_varlen
    for batch, expected in zip(batches[1:], plain[1:], strict=True):
        assert losses[1](batch, 1.0).item() == pytest.approx(expected, rel=0.01)
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of torch, about torch
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_dequantised_weights_are_not_kept_for_the_backward_pass(tiny_model, quantization):
    """The compiler sees that both passes make the same weight, and would make it once and keep it, in every layer."""
    lora = LoraConfig(target_modules=["all-linear"])
    base = load_base_model(ModelFolder(tiny_model), torch.float32, [CPU], quantization)
    model = add_adapter(base, TrainingConfig(use_peft=True, lora_config=lora))
    compile_without_kernels(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        hidden = forward_hidden(model, torch.arange(3, 33), torch.arange(30), Segments.of([30], CPU))
    hidden.sum().backward()
    assert kept
    weights = {
        shape
        for module in causal_lm(model).model.layers.modules()
        if hasattr(module, "base_layer")
        for shape in ((module.out_features, module.in_features), (module.in_features, module.out_features))
    }
    assert len(weights) > 1
    assert not weights & {tuple(x.shape) for x in kept if x.is_floating_point()}
    torch._dynamo.reset()

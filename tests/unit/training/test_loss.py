"""Cross-entropy in chunks against torch's own over the full logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from utils.training import loss
from utils.training.loss import labelled_cross_entropy

ROWS, HIDDEN, VOCABULARY = 37, 16, 53


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,), generator=generator)


def plain(scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients as torch computes them in fp64."""
    hidden, weight, labels = inputs()
    value = cross_entropy(hidden @ weight.t(), labels, reduction="sum") * scale
    value.backward()
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("scale", [1.0, 1 / 37, 1024.0])
def test_loss_and_gradients_are_torchs_own(monkeypatch, chunk, scale):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, weight, labels = inputs(torch.float32)
    value = labelled_cross_entropy(hidden, weight, labels, scale)
    value.backward()
    expected, hidden_grad, weight_grad = plain(scale)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), hidden_grad, rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(weight.grad.double(), weight_grad, rtol=1e-4, atol=1e-5 * scale)


def test_gradients_pass_on_what_comes_from_above():
    hidden, weight, labels = inputs(torch.float32)
    (labelled_cross_entropy(hidden, weight, labels, 0.5) * 3).backward()
    _value, hidden_grad, weight_grad = plain(1.5)
    torch.testing.assert_close(hidden.grad.double(), hidden_grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), weight_grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = inputs(torch.float32)
    weight.requires_grad_(False)
    labelled_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad.double(), plain(1.0)[1], rtol=1e-4, atol=1e-6)


def test_a_trained_head_over_a_frozen_decoder_gets_its_gradient():
    hidden, weight, labels = inputs(torch.float32)
    labelled_cross_entropy(hidden.detach(), weight, labels).backward()
    torch.testing.assert_close(weight.grad.double(), plain(1.0)[2], rtol=1e-4, atol=1e-5)


def test_half_precision_stays_near():
    hidden, weight, labels = inputs(torch.bfloat16)
    value = labelled_cross_entropy(hidden, weight, labels)
    value.backward()
    expected, hidden_grad, _weight_grad = plain(1.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=0.02)
    error = (hidden.grad.double() - hidden_grad).norm() / hidden_grad.norm()
    assert error < 0.03


def test_scale_reaches_the_gradient_before_it_is_rounded_to_fp16():
    # Probabilities of 1e-6 over 1,000 tokens vanish in fp16 (smallest number 6e-8), unless scaled up first.
    hidden = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    hidden.data[0, 0] = 14.0
    weight = torch.eye(4, dtype=torch.float16)
    labels = torch.tensor([0])
    labelled_cross_entropy(hidden, weight, labels, scale=1e-3).backward()
    assert hidden.grad[0, 1] == 0
    hidden.grad = None
    labelled_cross_entropy(hidden, weight, labels, scale=1e-3 * 2**14).backward()
    assert hidden.grad[0, 1] > 0


def test_huge_logits_stay_finite():
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.eye(4)
    value = labelled_cross_entropy(hidden, weight, torch.tensor([0, 3]))
    value.backward()
    assert value.item() == pytest.approx(2 * torch.tensor(4.0).log().item(), rel=1e-3)
    assert torch.isfinite(hidden.grad).all()


def test_without_gradients_none_is_computed(monkeypatch):
    hidden, weight, labels = inputs(torch.float32)
    scattered = []
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda *arguments: scattered.append(arguments))
    with torch.no_grad():
        value = labelled_cross_entropy(hidden, weight, labels)
    assert value.item() == pytest.approx(plain(1.0)[0].item(), rel=1e-5)
    assert not scattered

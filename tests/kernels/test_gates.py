"""Gate numerics in fp32 against fp64."""

import pytest
import torch
from nha_kernels import log_decay_from_logits, write_strength
from nha_kernels.gates import LOG_DECAY_FLOOR, log_decay_from_routing


@pytest.mark.parametrize("tau", [1.0, 8.0])
def test_gates_keep_relative_precision(tau):
    """Also where the decay is 1 - 3e-8: strengths are not differences of numbers near 1."""
    z = torch.linspace(-30, 15, 2001)
    decay, exact = log_decay_from_logits(z, tau), log_decay_from_logits(z.double(), tau)
    torch.testing.assert_close(decay.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(write_strength(decay).double(), -torch.expm1(exact), rtol=1e-6, atol=0)
    assert (write_strength(decay) > 0).all()


def test_floor_stops_the_gradient():
    z = torch.tensor([-30.0, -5.0, 15.0], requires_grad=True)
    decay = log_decay_from_logits(z, 1.0)
    decay.sum().backward()
    assert decay[0].item() == pytest.approx(LOG_DECAY_FLOOR)
    assert z.grad is not None
    assert z.grad[0] == 0
    assert (z.grad[1:] > 0).all()


def test_a_routed_write_is_shared_out():
    """All slots together are overwritten by the token's strength; in fp32 strengths keep their relative precision."""
    generator = torch.Generator().manual_seed(0)
    write = torch.linspace(-30, 30, 301)
    slots = 8 * torch.randn(301, 16, generator=generator)
    decay, exact = (log_decay_from_routing(write.to(d), slots.to(d)) for d in (torch.float32, torch.float64))
    strengths = write_strength(decay).double(), -torch.expm1(exact)
    torch.testing.assert_close(*strengths, rtol=2e-5, atol=1e-30)  # softmax of logits near 30
    torch.testing.assert_close(decay.double().exp(), exact.exp(), rtol=0, atol=1e-6)  # what is kept of 1
    kept = 1 - torch.exp(torch.tensor(LOG_DECAY_FLOOR).double())
    wanted = kept * torch.sigmoid(write.double())
    torch.testing.assert_close(-torch.expm1(exact).sum(-1), wanted, rtol=1e-9, atol=1e-14)
    assert (decay <= 0).all()


@pytest.mark.parametrize("far", [-200.0, 200.0])
def test_routed_gates_have_finite_gradients(far):
    write, slots = torch.full((2, 3), far, requires_grad=True), torch.zeros(2, 3, 4)
    slots[..., 1] = 400.0  # all of the write goes to one slot
    slots.requires_grad_()
    decay = log_decay_from_routing(write, slots)
    decay.sum().backward()
    assert decay.isfinite().all() and write.grad.isfinite().all() and slots.grad.isfinite().all()
    assert decay[..., 1].mean().item() == pytest.approx(LOG_DECAY_FLOOR if far > 0 else 0.0, abs=1e-5)
    assert (decay >= torch.tensor(LOG_DECAY_FLOOR)).all()


def test_low_precision_logits_give_fp32():
    low = torch.zeros(3, dtype=torch.bfloat16)
    assert log_decay_from_logits(low, 8.0).dtype == torch.float32
    assert log_decay_from_routing(low, torch.zeros(3, 5, dtype=torch.bfloat16)).dtype == torch.float32


def test_tau_must_be_positive():
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        log_decay_from_logits(torch.zeros(3), 0)

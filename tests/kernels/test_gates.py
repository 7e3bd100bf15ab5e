"""Gate numerics in fp32 against fp64."""

import pytest
import torch
from nha_kernels import log_decay_from_logits, write_strength
from nha_kernels.gates import LOG_DECAY_FLOOR


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


def test_low_precision_logits_give_fp32():
    assert log_decay_from_logits(torch.zeros(3, dtype=torch.bfloat16), 8.0).dtype == torch.float32


def test_tau_must_be_positive():
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        log_decay_from_logits(torch.zeros(3), 0)

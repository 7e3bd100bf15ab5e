"""The prototype that reads slots otherwise is the package's layer where it reads them as that does."""

import pytest
import torch
from nha_kernels.gates import log_decay_from_logits
from nha_kernels.ops import nha_attention

from tools.study_slot_reads import read_slots


@pytest.mark.parametrize("branch", ["both", "window", "slots"])
@pytest.mark.parametrize("sinks, mask_empty", [(0, True), (3, False)])
def test_the_prototype_is_the_layer(branch: str, sinks: int, mask_empty: bool) -> None:
    torch.manual_seed(0)
    heads, groups, slots, dim, time = 4, 2, 5, 8, 150
    query, key, value = (torch.randn(2, time, count, dim) for count in (heads, groups, groups))
    log_decay = log_decay_from_logits(torch.randn(2, time, groups, slots), 2.0)
    angles = torch.arange(time)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.02])
    angles = torch.cat((angles, angles), -1)[None]
    scale, bias = torch.rand(heads, dim), torch.randn(heads)
    common = {"window": 20, "sinks": sinks, "cos": angles.cos(), "sin": angles.sin(), "scale": 0.3, "branch": branch}
    common |= {"mask_empty": mask_empty}
    want, _ = nha_attention(query, key, value, log_decay, slot_q_scale=scale, slot_bias=bias, **common)
    none = torch.zeros(slots, dtype=torch.bool)
    for own_scale in (scale, torch.diag_embed(scale)):
        for own_bias in (bias, bias[:, None].repeat(1, slots)):
            reads = {"slot_q_scale": own_scale, "slot_bias": own_bias, "rotated": none}
            got, _ = read_slots(query, key, value, log_decay, **reads, **common)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    reads = {"slot_q_scale": scale, "slot_bias": bias, "rotated": torch.arange(slots) == 1}
    got, _ = read_slots(query, key, value, log_decay, **reads, **common)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5) == (branch == "window"), "a rotated slot is read otherwise"

"""The trunk and its layers, its sizes, and the compiled model."""
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

import diffusion
from conftest import masked_sequences, tiny_model
from layers import attend, rotary_tables, rotate
from model import GPT, GPTConfig


def test_full_size_and_the_heads_shares():
    with torch.device('meta'):
        parts = GPT(GPTConfig(add_sampler_head=True, add_critic_head=True)).parts()
    counts = {part: sum(p.numel() for p in params) for part, params in parts.items()}
    total = sum(counts.values())
    assert 10.0e6 <= total < 11.0e6
    assert counts['sampler'] <= 0.03 * total and counts['critic'] <= 0.01 * total


def test_bidirectional_looks_both_ways_and_causal_back():
    x = torch.randint(0, 11, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 12] = (x[0, 12] + 1) % 11
    for attention, before in (('bidirectional', True), ('causal', False)):
        model = tiny_model(heads=False, attention_type=attention)
        moved = (model(x) - model(changed)).abs().amax(-1)[0] > 1e-9
        assert moved[12:].all() and moved[:12].all() == before and moved[:12].any() == before


def test_attention_written_out_equals_the_fused_one():
    q, k, v = torch.randn(3, 2, 2, 9, 4, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    for causal in (False, True):
        fused = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(attend(q, k, v, causal), fused)


def test_rotation_keeps_lengths_and_knows_distances_only():
    cos, sin = (table.double() for table in rotary_tables(16, 8))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double().expand(2, 1, 1, 16, 8)
    q, k = rotate(q, cos, sin)[0, 0], rotate(k, cos, sin)[0, 0]
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(16))
    torch.testing.assert_close((q[5:] * k[2:-3]).sum(-1), (q[5] * k[2]).sum().expand(11))


def loss_and_gradients(model, trunk):
    x0, _, mask = masked_sequences()
    batch = diffusion.forward_masked(trunk, model, x0, mask)
    losses, _ = diffusion.head_losses(model, batch, seed=0, sampler_rows=6, critic_rows=2)
    values = [F.cross_entropy(batch.lm_logits, batch.targets), losses['sampler'], losses['critic']]
    model.zero_grad()
    sum(values).backward()
    return torch.stack(values).detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_the_compiled_trunk_gives_the_same_losses_and_gradients(backend):
    """train.py compiles the trunk on CUDA: traced as there, and, where that is quick, compiled as there."""
    if backend == 'inductor' and not shutil.which('g++'):
        pytest.skip('no C++ compiler: torch.compile cannot be tested')
    if backend == 'inductor' and not (torch.cuda.is_available() or os.environ.get('TEST_INDUCTOR')):
        pytest.skip('on a CPU torch.compile takes most of a minute, and train.py does not use it: set TEST_INDUCTOR=1')
    model = tiny_model(n_layer=1)
    losses, gradients = loss_and_gradients(model, model.forward)
    found_losses, found_gradients = loss_and_gradients(model, torch.compile(model.forward, backend=backend))
    torch.testing.assert_close(found_losses, losses)
    for name in gradients:
        torch.testing.assert_close(found_gradients[name], gradients[name], msg=lambda text: f'{name}: {text}')

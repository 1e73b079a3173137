"""The heads are auxiliary networks: their losses change their own parameters and nothing else, bit for bit."""
import pytest
import torch

import diffusion
from conftest import NO_HEADS, checkpoint_in, tiny_model


def losses_of(model):
    x0 = torch.randint(0, 11, (4, 24), generator=torch.Generator().manual_seed(1))
    mask = diffusion.draw_masks(torch.tensor([0.2, 0.5, 0.8, 1.0]), 24, torch.Generator().manual_seed(2))
    batch = diffusion.forward_masked(model, model, x0, mask)
    blocks = next(b for b in (diffusion.forward_blocks(model, model, x0, torch.Generator().manual_seed(seed))[0]
                              for seed in range(99)) if b.last.abs().sum() > 0)    # behind some text
    return diffusion.head_losses(model, batch, seed=0, sampler_rows=4, critic_rows=4, blocks=blocks)[0]


@pytest.mark.parametrize('head', ['sampler', 'critic'])
def test_head_loss_leaves_no_gradient_outside_its_head(head):
    model = tiny_model()
    losses_of(model)[head].backward()
    for name, p in model.named_parameters():
        if name.startswith(f'{head}_head'):
            assert p.grad is not None and p.grad.abs().sum() > 0, f'{name} learns nothing'
        else:
            assert p.grad is None, f'{name} has a gradient of the {head} loss'


def test_trunk_is_identical_with_and_without_heads(train, tmp_path):
    """Twelve real iterations of train.py, clipping on: the same trunk weights, bit for bit, dropout included."""
    train(tmp_path / 'with', '--grad_clip=0.1', '--dropout=0.1')
    train(tmp_path / 'without', '--grad_clip=0.1', '--dropout=0.1', *NO_HEADS)
    with_heads, without = (checkpoint_in(tmp_path / name)['model'] for name in ('with', 'without'))
    assert set(without) < set(with_heads)
    for name in without:
        assert torch.equal(with_heads[name], without[name]), name

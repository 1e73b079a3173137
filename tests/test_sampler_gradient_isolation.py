"""The heads are auxiliary networks: their losses change their own parameters and nothing else, bit for bit."""
import pytest
import torch

import diffusion
from conftest import TINY, tiny_model


def losses_of(model):
    x0 = torch.randint(0, 11, (4, 24), generator=torch.Generator().manual_seed(1))
    xt, mask = diffusion.mask_tokens(x0, torch.tensor([0.2, 0.5, 0.8, 1.0]), model.mask_id, torch.Generator().manual_seed(2))
    batch = diffusion.read(model, model, x0, xt, mask)
    return diffusion.head_losses(model, batch, seed=0, step=0, sampler_rows=4, critic_rows=4)


@pytest.mark.parametrize('head', ['sampler', 'critic'])
def test_head_loss_leaves_no_gradient_outside_its_head(head):
    model = tiny_model()
    losses_of(model)[head].backward()
    for name, p in model.named_parameters():
        if name.startswith(f'{head}_head'):
            assert p.grad is not None and p.grad.abs().sum() > 0, f'{name} learns nothing'
        else:
            assert p.grad is None, f'{name} has a gradient of the {head} loss'


def test_trunk_is_identical_with_and_without_heads(script, toy_data, tmp_path):
    """Twelve real iterations of train.py, clipping on: the same trunk weights, bit for bit."""
    with_heads, without = tmp_path / 'with', tmp_path / 'without'
    for out, extra in ((with_heads, []), (without, ['--add_sampler_head=False', '--add_critic_head=False'])):
        status, _, err = script('train.py', *TINY, *extra, f'--data_dir={toy_data}', f'--out_dir={out}', '--grad_clip=0.1')
        assert status == 0, err
    a, b = (torch.load(out / 'ckpt.pt', weights_only=True)['model'] for out in (with_heads, without))
    assert set(b) < set(a)
    for name in b:
        assert torch.equal(a[name], b[name]), name

"""adapt.py: a sampler head for a foreign trunk. config/fit_sampler.py: heads for a finished model, beside it."""
import re

import pytest
import torch
import torch.nn as nn

from adapt import Adapted, fit
from conftest import NO_HEADS, TINY, checkpoint_in, same_weights, tiny_batch, tiny_model
from decoding import DecoderConfig, default_config, generate
from diffusion import head_losses
from likelihood import log_likelihood
from plans import make_plan

LENGTH = 16


class Foreign(nn.Module):
    """A trunk of another make: learned positions, torch's own encoder, an output layer of its own."""

    def __init__(self, vocab_size=7, width=24):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.output = nn.Linear(width, vocab_size - 1, bias=False)

    def hidden(self, ids):
        return self.encoder(self.tokens(ids) + self.positions.weight[:ids.size(1)])

    def logits(self, hidden):
        return self.output(hidden)

    @property
    def embeddings(self):
        return torch.cat((self.output.weight, torch.zeros_like(self.output.weight[:1])))


def counting(n, generator):
    """Sequences that count up modulo 6: each token follows from its neighbours."""
    return (torch.randint(6, (n, 1), generator=generator) + torch.arange(LENGTH)) % 6


@pytest.fixture(scope='module')
def adapted():
    torch.manual_seed(0)
    trunk, generator = Foreign(), torch.Generator().manual_seed(0)
    before = {name: p.clone() for name, p in trunk.state_dict().items()}
    model = Adapted(trunk, LENGTH, sampler_context=2, sampler_width=32, sampler_state=16)
    losses = fit(model, (counting(16, generator) for _ in range(120)), learning_rate=1e-2)
    return model.eval(), losses, before


def test_the_head_learns_what_the_trunk_does_not_know(adapted):
    """The trunk is random; the text is what its neighbours say."""
    model, losses, before = adapted
    assert losses[-1] < 0.5 * losses[0] and same_weights(before, model.trunk.state_dict())
    x0 = counting(8, torch.Generator().manual_seed(1))
    plan = make_plan('left-to-right', LENGTH, 1)
    with torch.no_grad():
        with_head, naive = (-log_likelihood(model, x0, plan, use).mean().item() for use in (True, False))
    assert with_head < 0.5 < naive


@pytest.mark.parametrize('plan, passes', [('left-to-right', 1), ('wavefront', 1), ('interleaved', 2)])
def test_it_decodes(adapted, plan, passes):
    model = adapted[0]
    x = torch.full((4, LENGTH), model.mask_id)
    config = DecoderConfig(plan=plan, plan_passes=passes, mask_ratios=(), temperature=0.0)
    decoded = generate(model, x, x == model.mask_id, config, range(4))
    right = ((decoded.x[:, 1:] - decoded.x[:, :-1]) % 6 == 1).float().mean()
    assert decoded.x.max() < model.mask_id and (right == 1 or plan == 'interleaved')


def test_by_default_it_asks_the_trunk_for_no_reading_from_the_left(adapted):
    model = adapted[0]
    x, config = torch.full((2, LENGTH), model.mask_id), default_config(model, 4)
    assert config.plan == 'interleaved' and generate(model, x, x == model.mask_id, config, range(2)).passes == 4


def test_logits_and_embeddings_that_do_not_belong_together():
    trunk = Foreign()
    trunk.output = nn.Linear(24, 6)
    with pytest.raises(ValueError, match='without a bias'):
        Adapted(trunk, LENGTH)


# -----------------------------------------------------------------------------
# config/fit_sampler.py

@pytest.fixture
def plain(train, tmp_path):
    """out_dir of a tiny model without heads."""
    train(tmp_path, *NO_HEADS, '--max_iters=4')
    return tmp_path


FIT = ['config/fit_sampler.py', *TINY[1:], '--start_sampler_iteration=0', '--max_iters=8', '--eval_interval=4']


def test_the_head_beside_a_frozen_trunk_can_learn_on_every_device(monkeypatch):
    """cuDNN computes gradients of a GRU in training mode alone, and a frozen trunk is in evaluation mode."""
    model, modes, plain = tiny_model().eval(), [], torch.nn.GRU.forward
    monkeypatch.setattr(torch.nn.GRU, 'forward', lambda self, *args: modes.append(self.training) or plain(self, *args))
    losses, _ = head_losses(model, tiny_batch(model), seed=0, sampler_rows=4)
    losses['sampler'].backward()
    assert modes and all(modes) and not model.training and not model.sampler_head.training


def test_heads_for_a_finished_model_leave_its_trunk_as_it_was(script, toy_data, plain):
    original = (plain / 'ckpt.pt').read_bytes()
    status, out, err = script('train.py', *FIT, f'--data_dir={toy_data}', f'--out_dir={plain}',
                              f'--trunk_checkpoint={plain / "ckpt.pt"}')
    assert status == 0, err
    assert f'The trunk is that of {plain / "ckpt.pt"}\n' in out and 'saved' in out
    assert (plain / 'ckpt.pt').read_bytes() == original, 'written beside the original'
    before, after = checkpoint_in(plain)['model'], checkpoint_in(plain, 'fitted.pt')['model']
    assert same_weights(before, {name: after[name] for name in before}) and len(after) > len(before)
    assert any(p.abs().sum() > 0 for name, p in after.items() if name.startswith('sampler_head.out.1'))
    status, out, err = script('sample_simple.py', '--out-dir', plain, '--checkpoint-name', 'fitted.pt', '--num-samples',
                              1, '--iterations', 2, '--no-progress')
    assert status == 0 and 'with the sampler head, plan' in out, err


def test_heads_on_a_frozen_trunk_learn_from_what_decoding_sees(script, toy_data, plain):
    """Without dropout: the losses are those of a run that has none."""
    losses = []
    for dropout in (0.0, 0.5):
        status, out, err = script('train.py', *FIT, f'--data_dir={toy_data}', f'--out_dir={plain}',
                                  f'--trunk_checkpoint={plain / "ckpt.pt"}', '--overwrite=True',
                                  f'--dropout={dropout}')
        assert status == 0, err
        losses.append(re.findall(r'^iter \d+: loss (.*), time', out, re.M))
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_trunk_that_does_not_read_text_is_one_line(script, train, toy_data, plain):
    train(plain, *NO_HEADS, '--max_iters=4', '--block_rows=0', '--overwrite=True')
    command = ['train.py', *FIT, f'--data_dir={toy_data}', f'--out_dir={plain}',
               f'--trunk_checkpoint={plain / "ckpt.pt"}']
    status, _, err = script(*command)
    assert status == 2 and 'did not learn to read text from left to right; give --block_rows=0' in err
    assert script(*command, '--block_rows=0')[0] == 0


@pytest.mark.parametrize('flags, message', [
    (['--n_layer=1'], 'give --n_layer=2'), (['--trunk_checkpoint=no.pt'], "no checkpoint 'no.pt'")])
def test_a_trunk_that_does_not_fit_is_one_line(script, toy_data, plain, flags, message):
    status, _, err = script('train.py', *FIT, f'--data_dir={toy_data}', f'--out_dir={plain}',
                            f'--trunk_checkpoint={plain / "ckpt.pt"}', *flags)
    assert status == 2 and message in err and err.count('\n') == 1

"""shard=True: two processes that divide the model are one run, and their checkpoints are like any other; a run goes on
with another number of processes."""
import re
import shutil

import pytest

import memory
import train as training
from conftest import TINY, both_of, checkpoint_in, metrics_in, same_weights, start_two
from errors import InputError
from finite import tensors
from model import GPTConfig

# clipping by a norm whose squares are added in another order changes a gradient's last bit, of which Muon may make more
RUN = ['--gradient_accumulation_steps=2', '--dropout=0.1', '--grad_clip=0', '--lr_decay_iters=12', '--save_interval=2']


@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
    """Folder with a run of one process through all three stages, whole/, and its first half, half/."""
    folder = tmp_path_factory.mktemp('one')
    train(folder / 'half', *RUN, '--max_iters=6')
    shutil.copytree(folder / 'half', folder / 'whole')
    train(folder / 'whole', *RUN, '--init_from=resume')
    return folder


def assert_same(one, two):
    """Every figure of the log but the time, weights and moments: bit for bit where this was written."""
    for a, b in zip(metrics_in(one), metrics_in(two), strict=True):
        assert set(a) == set(b)
        assert a.get('split') == b.get('split')
        for name in set(a) - {'ms', 'split'}:
            assert b[name] == pytest.approx(a[name], rel=1e-4), f'{name} at {a["iter"]}'
    one, two = map(checkpoint_in, (one, two))
    one, two = (dict(tensors([saved['model'], saved['optimizer']])) for saved in (one, two))
    assert set(one) == set(two) and len(one) > 80
    for name, tensor in one.items():
        assert type(two[name]) is type(tensor) and two[name].dtype == tensor.dtype
        training.torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-3, msg=lambda text: f'{name}: {text}')


def start(toy_data, out_dir, *args):
    return start_two('train.py', *TINY, *RUN, f'--data_dir={toy_data}', f'--out_dir={out_dir}', *args)


def test_two_processes_divide_a_model_and_one_goes_on(train, toy_data, whole, tmp_path):
    out = start(toy_data, tmp_path, '--shard=True', '--max_iters=6')
    assert 'weights, gradients and moments: divided among 2 processes' in out
    assert out.count('iter 6: val NELBO') == 1 and len(re.findall('^saved .*ckpt.pt', out, re.M)) == 3
    assert_same(whole / 'half', tmp_path)
    train(tmp_path, *RUN, '--init_from=resume')
    assert_same(whole / 'whole', tmp_path)


@pytest.mark.parametrize('shard', [True, False])
def test_two_processes_go_on_from_a_checkpoint_of_one(toy_data, whole, tmp_path, shard):
    """With the same global batch, divided or not, through stage 3, whose decoding reads the weights of blocks elsewhere
    than in their forward."""
    shutil.copytree(whole / 'half', tmp_path, dirs_exist_ok=True)
    out = start(toy_data, tmp_path, '--init_from=resume', f'--shard={shard}')
    assert 'stage 3' in out and 'critic auc' in out
    assert_same(whole / 'whole', tmp_path)


def test_clipping_takes_the_norm_of_the_whole_gradient():
    """And Muon orthogonalizes whole matrices, of odd shapes too; frozen weights are divided like others."""
    out, err, statuses = both_of('-c', '''if True:
        import environment, copy, math, sys
        import torch
        import sharding
        from distributed import Processes, leave
        class Objective(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = torch.nn.Module()
                self.model.h = torch.nn.ModuleList(torch.nn.Linear(*size) for size in ((7, 7), (7, 5), (5, 1)))
                self.model.h[1].bias.requires_grad_(False)
            def forward(self, x):
                for layer in self.model.h:
                    x = layer(x).relu()
                return x.square().sum()
            def validate(self):
                pass
        with Processes('cpu', shard=True) as processes:
            torch.manual_seed(0)
            plain = Objective()
            divided = copy.deepcopy(plain)
            def make(objective, muon=torch.optim.Muon):
                params = [p for p in objective.parameters() if p.requires_grad]
                return {'trunk': [muon([p for p in params if p.dim() == 2], lr=0.1),
                                  torch.optim.AdamW([p for p in params if p.dim() == 1], lr=0.1)]}
            first = make(plain)
            second = sharding.shard(divided, make(divided), processes, lambda muon: make(divided, muon))
            for _ in range(3):
                x = torch.randn(4, 7)
                for objective, optimizers in ((plain, first), (divided, second)):
                    objective(x).backward()
                    params = [p for p in objective.parameters() if p.grad is not None]
                    norm = sharding.full(torch.nn.utils.clip_grad_norm_(params, 0.01))
                    for optimizer in optimizers['trunk']:
                        optimizer.step()
                        optimizer.zero_grad()
                    processes.print0(f'{norm:.5f}')
            for a, b in zip(plain.parameters(), divided.parameters(), strict=True):
                torch.testing.assert_close(sharding.full(b), a, rtol=0, atol=1e-3)
                assert sum(processes.gathered(b.to_local().numel())) == a.numel()
            moments = [sharding.gathered(o.state_dict(), keep=not processes.rank) for o in second['trunk']]
            kept = moments[0]['state'][0]['momentum_buffer']
            assert kept is None if processes.rank else kept.shape == (7, 7)
        leave()''')
    assert statuses == [0, 0], err
    norms = out[0].split()
    assert norms[::2] == norms[1::2] and float(norms[0]) > 0.01


def test_with_one_process_nothing_is_divided(train, trained_once, tmp_path):
    out = train(tmp_path, '--shard=True')
    assert 'divided among 1 process\n' in out
    assert same_weights(checkpoint_in(tmp_path)['model'], checkpoint_in(trained_once[0])['model'])


def test_what_is_divided_needs_less_memory(monkeypatch):
    config = training.SimpleNamespace(**training.settings | {'batch_size': 1, 'eval_rows': 2})
    model = GPTConfig(n_embd=384)
    needed = 3 * memory.of_model(model) + memory.of_activations(config, config.block_size)
    monkeypatch.setattr(memory, 'available', lambda device: needed - 1)
    with pytest.raises(InputError, match='optimizer'):
        memory.require_for_training(config, model, 'cpu', 1)
    memory.require_for_training(config, model, 'cpu', 1, parts=2)

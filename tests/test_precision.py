"""Precision and the processor: what 'auto' picks, what holds in float32 and bfloat16, what is set before torch."""
import os
import re
import subprocess
import sys

import pytest
import torch

import description
import device
from conftest import ROOT, checkpoint_in, masked_sequences, tiny_model
from errors import InputError


@pytest.mark.parametrize('speedup, picked', [(0.6, 'float32'), (1.0, 'float32'), (1.7, 'bfloat16'), (9.0, 'bfloat16')])
def test_auto_picks_what_is_faster_here(speedup, picked, monkeypatch):
    """By measurement: flags of the processor chose float32 where bfloat16 took 300 ms a step in place of 500."""
    monkeypatch.setattr(device, 'bfloat16_speedup', lambda: speedup)
    assert device.pick_dtype('auto', 'cpu') == picked
    assert device.pick_dtype('float16', 'cpu') == 'float16'
    with pytest.raises(InputError, match='int8'):
        device.pick_dtype('int8', 'cpu')


def test_the_measurement_is_quick_and_moves_no_random_state():
    device.bfloat16_speedup.cache_clear()
    state = torch.random.get_rng_state()
    speedup = device.bfloat16_speedup()
    assert 0 < speedup < 1000 and torch.equal(torch.random.get_rng_state(), state)
    assert device.bfloat16_speedup() == speedup


def test_the_log_says_what_was_picked_and_a_resume_keeps_it(train, tmp_path, monkeypatch):
    """A run stays in the precision that it began in, on a machine that would pick another too."""
    short = ['--dtype=auto', '--max_iters=1', '--eval_interval=1', '--start_sampler_iteration=1',
             '--start_critic_iteration=1']
    picked = lambda speedup: [monkeypatch.setattr(where, 'bfloat16_speedup', lambda: speedup)
                              for where in (device, description)]
    picked(3.0)
    log = train(tmp_path, *short)
    assert re.search(r'^bfloat16 on cpu, where bfloat16 is 3\.0 times as fast', log, re.M)
    assert checkpoint_in(tmp_path)['config']['dtype'] == 'bfloat16'
    picked(0.5)
    log = train(tmp_path, *short, '--max_iters=2', '--init_from=resume')
    assert re.search(r'^bfloat16 on cpu, where bfloat16 is 0\.5 times as fast', log, re.M)
    log = train(tmp_path / 'fresh', *short)
    assert re.search(r'^float32 on cpu', log, re.M)


@pytest.mark.parametrize('dtype, bound', [('float64', 0.0), ('float32', 1e-5), ('bfloat16', 0.1)])
def test_hidden_states_of_a_sequence_alone_and_in_company(dtype, bound):
    """The same number in float64; in other precisions as near as rounding brings each of them to the exact one.

    A processor may sum in an order that depends on the shape of the batch. Hidden states have a root mean square of 1;
    in this model, two blocks of random weights, rounding moves them by at most 2.5e-6 in float32 and 0.041 in bfloat16
    (four seeds). Two roundings differ by at most twice that: each bound leaves a little room above it.
    """
    model = tiny_model(n_embd=64)
    _, xt, _ = masked_sequences(B=16)
    with torch.no_grad():
        exact = model(xt)
        if dtype != 'float64':
            model.float()
        with device.autocast('cpu', dtype):
            together = model(xt)
            alone = torch.cat([model(row[None]) for row in xt])
    assert (together - alone).abs().max() <= bound
    assert (together - exact).abs().max() <= bound / 2 and (alone - exact).abs().max() <= bound / 2
    assert (together[0] - together[1]).abs().max() > 1, 'sequences do differ'


ASK = '''
import os, runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'numpy'):
            print(name, os.environ.get('GOMP_SPINCOUNT'))
            os._exit(0)

sys.meta_path.insert(0, Finder())
sys.stdout.reconfigure(line_buffering=True)
sys.argv, sys.path[0] = [sys.argv[1]], os.getcwd()
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.parametrize('name', ['train.py', 'sample_simple.py', 'evaluate.py'])
@pytest.mark.parametrize('users, expected', [(None, '1000'), ('7', '7')])
def test_a_short_spin_is_set_before_torch_is_imported(name, users, expected):
    """OpenMP reads it when torch is loaded; threads that spin made a busy machine 20 times slower. The user's wins."""
    env = {k: v for k, v in os.environ.items() if k != 'GOMP_SPINCOUNT'} | ({'GOMP_SPINCOUNT': users} if users else {})
    done = subprocess.run([sys.executable, '-c', ASK, name], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split()[1:] == [expected], done.stdout + done.stderr

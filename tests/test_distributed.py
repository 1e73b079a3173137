"""Two processes are one run: the same losses and weights as one process with the same global batch."""
import os
import socket
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, TINY, checkpoint_in, metrics_in
from distributed import share_batch
from errors import InputError

SHORT = ['--max_iters=6', '--eval_interval=6', '--start_sampler_iteration=1', '--start_critic_iteration=2',
         '--end_critic_iteration=4', '--dropout=0.1', '--sampler_rows=4', '--critic_rows=2']


def start_together(toy_data, out_dir, *args):
    """The two processes that torchrun would start, without torchrun, which takes as long as they do."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, 'train.py', *TINY, *SHORT, f'--data_dir={toy_data}', f'--out_dir={out_dir}', *args]
    env = os.environ | {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
                        'OMP_NUM_THREADS': '1'}
    started = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=env | {'RANK': rank, 'LOCAL_RANK': rank}) for rank in '01']
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs[1][0] == '', 'the first process alone speaks'
    return outputs[0][0]


def assert_same_run(one, two, compared):
    """Losses of every iteration, those compared of every evaluation, and the final weights of trunk and heads.

    Equal bit for bit on the machine where this was written: halves add up exactly, in whichever process. The bounds
    leave room for sums of float32 in another order, 1e-7 of a value, which Muon, rounding to bfloat16 on its way, may
    turn into 4e-3 of an update, 2e-4. Runs that are not the same differ by more than 1e-2, the size of an update.
    """
    entries = [metrics_in(out_dir) for out_dir in (one, two)]
    assert [set(a) for a in entries[0]] == [set(b) for b in entries[1]] and len(entries[0]) == 6 + 2 * 2
    for a, b in zip(*entries):
        for name in set(a) & (compared if 'split' in a else {'iter', 'loss', 'main', 'sampler', 'critic'}):
            assert b[name] == pytest.approx(a[name], rel=1e-4), f'{name} at {a["iter"]}'
    a, b = (checkpoint_in(out_dir) for out_dir in (one, two))
    assert a['iter_num'] == b['iter_num'] == 6 and set(a['model']) == set(b['model'])
    for name in a['model']:
        torch.testing.assert_close(b['model'][name], a['model'][name], rtol=0, atol=1e-3,
                                   msg=lambda text: f'{name}: {text}')


def test_the_documented_command_equals_one_process(train, toy_data, tmp_path):
    """torchrun with an accumulation of 1, as README shows it, stopped at `cannot be shared`.

    Two processes share the sequences of the micro-batch; one process gets the same ones in two micro-steps of half the
    size, half the sequences for each head. All three stages. The older test passed with the all-reduce deleted.
    """
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py', *TINY,
         *SHORT, f'--data_dir={toy_data}', f'--out_dir={tmp_path / "two"}'],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'}, timeout=180)
    assert done.returncode == 0, done.stderr
    assert 'global batch: 8 sequences = 2 processes x 1 micro-step x 4 sequences' in done.stdout
    assert done.stdout.count('iter 6: val NELBO') == 1 and done.stdout.count('stage 3') == 1
    train(tmp_path / 'one', *SHORT, '--batch_size=4', '--gradient_accumulation_steps=2', '--sampler_rows=2',
          '--critic_rows=1', '--block_rows=2')
    # the critic's validation takes some sequences of a batch, whose size is another here
    assert_same_run(tmp_path / 'one', tmp_path / 'two', {'nelbo', 'main', 'sampler', 'one_pass_nll'})


def test_shared_micro_steps_equal_one_process(train, toy_data, tmp_path):
    """Two processes take one micro-step each, with whole micro-batches, where one process takes two."""
    out = start_together(toy_data, tmp_path / 'two', '--gradient_accumulation_steps=2')
    assert 'global batch: 16 sequences = 2 processes x 1 micro-step x 8 sequences' in out
    train(tmp_path / 'one', *SHORT, '--gradient_accumulation_steps=2')
    figures = {'nelbo', 'main', 'sampler', 'one_pass_nll', 'critic', 'critic_auc'}
    assert_same_run(tmp_path / 'one', tmp_path / 'two', figures)


def test_sharing_by_hand():
    assert share_batch(1, 64, 1) == (1, 1) and share_batch(4, 64, 4) == (1, 1) and share_batch(8, 3, 4) == (2, 1)
    assert share_batch(1, 64, 4) == (1, 4) and share_batch(3, 64, 4) == (3, 4)
    for accumulation, batch_size, world in ((1, 7, 2), (3, 10, 4), (2, 2, 3)):
        with pytest.raises(InputError, match=f'gradient_accumulation_steps={accumulation} .*batch_size={batch_size}'):
            share_batch(accumulation, batch_size, world)


def test_a_batch_that_cannot_be_shared_is_one_line(refused, tmp_path, monkeypatch):
    """In the first of two processes, whose messages are left out."""
    for name in ('init_process_group', 'barrier', 'destroy_process_group'):
        monkeypatch.setattr(torch.distributed, name, lambda *args: None)
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    assert 'batch_size=7; wanted a multiple of 2' in refused(tmp_path, '--batch_size=7')
    assert not list(tmp_path.iterdir())

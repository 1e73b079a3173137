"""What the tests share: tiny models, a tiny corpus, and the scripts run as a user runs them."""
import ast
import contextlib
import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import environment    # before torch, as in the scripts

import torch

from blocks import lay_out, views
from corpus import prepare_text
from diffusion import draw_exact_masks, forward_masked
from model import GPT, GPTConfig

torch.set_num_threads(1)    # tiny models gain nothing from more, and lose much beside another busy process

TINY = ['config/train_char_diffusion_sampler.py', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32',
        '--batch_size=8', '--max_iters=12', '--start_sampler_iteration=3', '--start_critic_iteration=6',
        '--end_critic_iteration=9', '--eval_interval=6', '--log_interval=1', '--eval_rows=12', '--warmup_iters=2',
        '--device=cpu', '--dtype=float32', '--dropout=0.0', '--dataset=toy', '--sampler_context=2',
        '--sampler_width=32', '--sampler_state=16', '--block_rows=4', '--sampler_rows=8', '--critic_interval=1']
NO_HEADS = ['--add_sampler_head=False', '--add_critic_head=False']


def run_script(name, *args, cwd=ROOT):
    """Run a script of the repository in this process, with fresh globals -> (exit status, stdout, stderr)."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, 'argv', [name, *map(str, args)])
        try:
            runpy.run_path(os.path.join(ROOT, name), run_name='__main__')
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def start_two(*command):
    """What the first of two processes prints; both must succeed, and the second be silent."""
    (out, *others), err, statuses = both_of(*command)
    assert statuses == [0, 0], err
    assert others == [''], 'the first process alone speaks'
    return out


def both_of(*command):
    """What each of two processes printed, its errors and its exit status: three lists."""
    started = start_both(*command)
    out, err = map(list, zip(*[process.communicate(timeout=400) for process in started]))
    return out, err, [process.returncode for process in started]


def start_both(*command):
    """The two processes that torchrun would start, without torchrun, which takes as long as they do."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, *map(str, command)]
    env = os.environ | {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
                        'OMP_NUM_THREADS': '1'}
    return [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=env | {'RANK': rank, 'LOCAL_RANK': rank}) for rank in '01']


@pytest.fixture(scope='session')
def script():
    """script('train.py', '--x=1') -> (exit status, stdout, stderr)."""
    return run_script


@pytest.fixture(scope='session')
def toy_data(tmp_path_factory):
    """A data_dir with a corpus 'toy' of 4,000 random words."""
    data_dir = tmp_path_factory.mktemp('data')
    words = np.random.default_rng(0).choice(['the ', 'cat ', 'sat ', 'on ', 'a ', 'mat.\n'], 4000)
    prepare_text('toy', ''.join(words), 'random words', data_dir=str(data_dir))
    return data_dir


@pytest.fixture(scope='session')
def train(toy_data):
    """train(out_dir, '--x=1') trains a tiny model and returns what it printed; the run must succeed."""
    def call(out_dir, *args):
        status, out, err = run_script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={out_dir}', *args)
        assert status == 0, err
        return out
    return call


@pytest.fixture(scope='session')
def refused(toy_data):
    """refused(out_dir, '--x=1') returns the one line on standard error with which train.py stops."""
    def call(out_dir, *args):
        status, _, err = run_script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={out_dir}', *args)
        assert status == 2 and err.startswith('error: ') and err.count('\n') == 1, err
        return err
    return call


@pytest.fixture(scope='session')
def trained_once(train, tmp_path_factory):
    """(out_dir, log) of a tiny model that went through all three stages. Read only: `trained` is a copy."""
    out_dir = tmp_path_factory.mktemp('trained')
    return out_dir, train(out_dir)


@pytest.fixture(scope='session')
def half_once(train, tmp_path_factory):
    """out_dir of the same run stopped at iteration 6: the sampler head has begun, the critic's has not. Read only."""
    out_dir = tmp_path_factory.mktemp('half')
    train(out_dir, '--max_iters=6', '--lr_decay_iters=12', '--dropout=0.1')
    return out_dir


@pytest.fixture
def trained(trained_once, tmp_path):
    """out_dir of a tiny model that went through all three stages: a copy for this test alone."""
    return shutil.copytree(trained_once[0], tmp_path, dirs_exist_ok=True)


@pytest.fixture
def half(half_once, tmp_path):
    """out_dir of a run stopped at iteration 6 of 12: a copy for this test alone."""
    return shutil.copytree(half_once, tmp_path / 'half')


@pytest.fixture(scope='session')
def models(train, trained_once, tmp_path_factory):
    """Folder with generator/, ar/ and judge/, trained a few steps."""
    folder = tmp_path_factory.mktemp('models')
    (folder / 'generator').symlink_to(trained_once[0])
    train(folder / 'ar', *NO_HEADS, '--attention_type=causal')
    generator = f'--generator_checkpoint={folder}/generator/ckpt.pt'
    train(folder / 'judge', *NO_HEADS, '--model_mode=sequence_scorer', generator)
    return folder


@pytest.fixture
def evaluated(script, models, toy_data, tmp_path):
    """evaluated('--seed', 1, checkpoint='ar') runs evaluate.py on tiny models -> (exit status, stdout, stderr)."""
    def call(*args, checkpoint='generator', evaluator='ar', samples=True):
        scored_by = ['--evaluator', models / evaluator / 'ckpt.pt'] if evaluator else []
        return script('evaluate.py', '--checkpoint', models / checkpoint / 'ckpt.pt', '--data-dir', toy_data,
                      *scored_by, *['--num-samples', 4] * samples, '--dtype', 'float32', '--out-dir', tmp_path, *args)
    return call


def imported_by(name):
    """The modules of the repository that one of them imports, anywhere in it: 'train' -> {'checkpoint', ...}"""
    with open(os.path.join(ROOT, f'{name}.py'), encoding='utf-8') as f:
        nodes = list(ast.walk(ast.parse(f.read())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {found for found in names if os.path.exists(os.path.join(ROOT, f'{found}.py'))}


def checkpoint_in(out_dir, name='ckpt.pt'):
    return torch.load(out_dir / name, weights_only=True)


def metrics_in(out_dir):
    return [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]


def contents_of(folder):
    """{file: its bytes}"""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_weights(a, b):
    """Whether two dicts of tensors are the same, bit for bit."""
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def tiny_model(seed=0, heads=True, **changes):
    """A float64 model with random weights everywhere, zero-initialised layers too, so that every input matters."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=12, block_size=24, n_layer=2, n_head=2, n_embd=16, sampler_context=2, sampler_width=16,
                    sampler_state=8,
                    add_sampler_head=heads, add_critic_head=heads)
    model = GPT(GPTConfig(**settings | changes)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def tiny_batch(model, B=8, n_masked=12, seed=0):
    """A MaskedBatch of B sequences of 24 tokens, with n_masked masks in each."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, model.mask_id, (B, 24), generator=generator)
    mask = draw_exact_masks(torch.full((B,), n_masked), 24, generator)
    with torch.no_grad():
        return forward_masked(model, model, x0, mask)


def masked_sequences(B=6, T=24, V=12, seed=0):
    """x0, xt and mask of B sequences that are masked more and more; the last one is blank."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, V - 1, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < torch.linspace(0.2, 1.0, B)[:, None]
    mask[-1] = True
    return x0, torch.where(mask, V - 1, x0), mask


def blank(model, B=3, T=24):
    """x (B, T) and free (B, T): sequences to be written from nothing."""
    x = torch.full((B, T), model.mask_id)
    return x, x == model.mask_id


def read_block(model, x, start, end):
    """The trunk's view of a block behind text without a cache, a plain forward pass: as CachedTrunk.read_block."""
    layout = lay_out(start, (start,), end - start)
    hidden, last = views(model(x[:, :start], layout), layout)
    return hidden, last[:, 0]

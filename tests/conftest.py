"""What the tests share: tiny models, a tiny corpus, and the scripts run as a user runs them."""
import os
import runpy
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from corpus import prepare_text
from model import GPT, GPTConfig

TINY = ['config/train_char_diffusion_sampler.py', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=8',
        '--max_iters=12', '--start_sampler_iteration=3', '--start_critic_iteration=6', '--end_critic_iteration=9', '--eval_interval=6',
        '--log_interval=1', '--eval_rows=12', '--warmup_iters=2', '--device=cpu', '--dtype=float32', '--dropout=0.0', '--dataset=toy',
        '--sampler_context=2', '--sampler_width=32']


@pytest.fixture
def script(capsys, monkeypatch):
    """script('train.py', '--x=1') -> (exit status, stdout, stderr), in this process but with fresh globals."""
    def call(name, *args):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        capsys.readouterr()
        try:
            runpy.run_path(os.path.join(ROOT, name), run_name='__main__')
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()
    return call


@pytest.fixture(scope='session')
def toy_data(tmp_path_factory):
    """A data_dir with a corpus 'toy' of 4,000 random words."""
    data_dir = tmp_path_factory.mktemp('data')
    words = np.random.default_rng(0).choice(['the ', 'cat ', 'sat ', 'on ', 'a ', 'mat.\n'], 4000)
    prepare_text('toy', ''.join(words), 'random words', data_dir=str(data_dir))
    return data_dir


@pytest.fixture
def trained(script, toy_data, tmp_path):
    """out_dir of a tiny model that went through all three stages."""
    status, _, err = script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}')
    assert status == 0, err
    return tmp_path


def tiny_model(seed=0, heads=True, **changes):
    """A float64 model with random weights everywhere, zero-initialised layers too, so that every input matters."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=12, block_size=24, n_layer=2, n_head=2, n_embd=16, sampler_context=2, sampler_width=16,
                    add_sampler_head=heads, add_critic_head=heads)
    model = GPT(GPTConfig(**settings | changes)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model

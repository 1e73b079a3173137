"""The shipped model as it is in the repository: small, safe to load, and quick to its first token."""
import os
import subprocess
import sys
import time

import pytest
import torch

from checkpoint import load_model
from conftest import ROOT
from decoding import default_config, generate
from generation import SHIPPED

needs_it = pytest.mark.skipif(not os.path.isfile(SHIPPED), reason='no shipped model')


@needs_it
def test_it_is_small_safe_and_writes_english():
    assert os.path.getsize(SHIPPED) <= 5 * 10 ** 6
    saved = torch.load(SHIPPED, weights_only=True)
    model, tokenizer, _ = load_model(SHIPPED)
    assert saved['corpus']['name'] == 'shakespeare_char' and model.sampler_head and model.critic_head
    x = torch.full((2, 128), model.mask_id)
    decoded = generate(model, x, x == model.mask_id, default_config(model, 4), range(2), wanted=['p_generated'])
    text = ' '.join(tokenizer.decode(ids) for ids in decoded.x.tolist())
    words = set(text.lower().split())
    assert (decoded.x < model.mask_id).all() and len({'the', 'and', 'to', 'of', 'my', 'you', 'a'} & words) > 2, text
    assert 0 < decoded.p_generated.mean() < 1


@needs_it
def test_no_sample_waits_for_what_it_does_not_need():
    """Half of the seconds until the first sample were the import of torch's compiler and of scipy.stats."""
    code = f'import generation, sys; generation.load_model({SHIPPED!r}); ' \
           'print([name for name in ("torch._dynamo", "sympy", "scipy", "matplotlib") if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == '[]\n', done.stderr


@needs_it
@pytest.mark.slow
def test_the_first_sample_is_there_within_four_seconds(tmp_path):
    """The whole process, torch's import included: the best of three, for other work on the machine only delays."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, os.path.join(ROOT, 'sample_simple.py'), '--num-samples', '1'],
                              cwd=tmp_path, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and '--- sample 0' in done.stdout, done.stderr
    assert min(seconds) < 4, seconds

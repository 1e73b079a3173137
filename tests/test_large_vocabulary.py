"""Memory of decoding with GPT-2's vocabulary: logits are made a few positions at a time."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT

DECODE = '''
import time
import torch
from decoding import DecoderConfig, decode_window, default_config
from model import GPT, GPTConfig
from timing import peak_memory

torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=50258, block_size=256, n_layer=1, n_head=1, n_embd=8, sampler_context=2,
                      sampler_width=18, sampler_state=8, add_sampler_head=True, add_critic_head=True)).eval()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.5)
x = torch.randint(0, 50257, (64, 256))
scattered = torch.rand(64, 256) < 1 / 8
scattered[:6] = True
behind = torch.zeros_like(scattered)
behind[:, 200:] = True

def peak():
    return peak_memory('cpu') / 2 ** 30    # of this process alone

before = peak()
for name, free, config in (
        ('naive', scattered, DecoderConfig(use_sampler=False, mask_ratios=(0.1,))),
        ('wavefront', scattered, DecoderConfig(order='critic', mask_ratios=(0.1,))),
        ('blocks', behind, default_config(model, 4, plan='blocks')),
        ('speculative', behind, default_config(model, 4))):
    clock = time.time()
    assert config.plan == (name if name in ('blocks', 'speculative') else 'wavefront')
    decoded = decode_window(model, x, free, config, range(64), range(256), wanted=['p_generated'])
    assert (decoded.x < 50257).all() and torch.equal(decoded.x[~free], x[~free])
    assert (decoded.p_generated[free] > 0).all()
    print(f'{name} {peak() - before:.3f} {time.time() - clock:.1f}')
'''


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='elsewhere a peak may be that of the parent process')
def test_decoding_64_sequences_with_50257_tokens_stays_below_2_gigabytes():
    """Over the model's own memory, naively, by wavefront in the critic's order and, with the critic's scores, in blocks
    and, as is the default, speculatively: logits of the whole block would take 3.3 GB in float32 and twice that in
    float64, which took more than 10 GB.

    Six blank sequences and an eighth of the positions of the others, or all behind a prefix: 3,400 to 3,600 positions,
    whose logits would take 2.1 GB if they were made all at once, with their float64 copy. All 16,384 positions would
    take a minute and no more memory.
    """
    done = subprocess.run([sys.executable, '-c', DECODE], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == ['naive', 'wavefront', 'blocks', 'speculative']
    assert all(0 < float(gigabytes) < 2 for _, gigabytes, _ in found)

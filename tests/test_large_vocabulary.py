"""Memory of decoding with GPT-2's vocabulary: logits are made a few positions at a time."""
import os
import subprocess
import sys

from conftest import ROOT

DECODE = '''
import resource, time
import torch
from decoding import DecoderConfig, decode_block
from model import GPT, GPTConfig

torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=50258, block_size=256, n_layer=1, n_head=1, n_embd=8, sampler_context=2,
                      sampler_width=18, add_sampler_head=True)).eval()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.5)
x = torch.randint(0, 50257, (64, 256))
free = torch.rand(64, 256) < 1 / 8
free[:6] = True

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20    # GB

before = peak()
for use_sampler in (False, True):
    clock = time.time()
    config = DecoderConfig(use_sampler=use_sampler, mask_ratios=(0.1,))
    decoded = decode_block(model, x, free, config, range(64), range(256))
    assert (decoded.x < 50257).all() and torch.equal(decoded.x[~free], x[~free])
    print(f'{peak() - before:.3f} {time.time() - clock:.1f}')
'''


def test_decoding_64_sequences_with_50257_tokens_stays_below_2_gigabytes():
    """Over the model's own memory, naively and by wavefront: logits of the whole block would take 3.3 GB in float32
    and twice that in float64, which took more than 10 GB.

    Six blank sequences and an eighth of the positions of the others: 3,400 positions, whose logits would take 2.1 GB
    if they were made all at once, with their float64 copy. All 16,384 positions would take a minute and no more
    memory.
    """
    done = subprocess.run([sys.executable, '-c', DECODE], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert len(done.stdout.split()) == 4
    assert all(float(line.split()[0]) < 2 for line in done.stdout.splitlines())

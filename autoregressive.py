"""The autoregressive baseline: exact likelihood of sequences under a causal model, and sampling with a key-value cache.

    x = autoregressive.generate(model, first, 256, range(len(first)), seed=1337)

The same trunk with attention_type = 'causal'. It scores the samples of the evaluation and is what a user would pick
instead of diffusion, so its seconds are measured as a user would get them.
"""
import torch
import torch.nn.functional as F

from metrics import mean_error
from noise import TOKENS, sample, uniform
from progress import bar


def nll(trunk, model, x, seen=None):
    """Negative log-likelihood of every token but the first given those before it, nats: x (B, T) ids -> (B, T - 1).

    seen (B, T): x as the model reads it, if not as it is.
    """
    logits = model.lm_head(trunk((x if seen is None else seen)[:, :-1]))
    return F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction='none')


@torch.no_grad()
def mean_nll(model, x0, batch_size):
    """NLL of each of the sequences x0 (N, T), nats per token: [float]."""
    parts = [nll(model, model, part).mean(1) for part in bar(x0.split(batch_size), 'evaluation')]
    return torch.cat(parts).tolist()


def validate(model, x0, batch_size):
    """Mean NLL of sequences (N, T), nats per token: {'nll', 'nll_error' (standard error over sequences)}."""
    return dict(zip(('nll', 'nll_error'), mean_error(mean_nll(model, x0, batch_size))))


@torch.no_grad()
def generate(model, first, length, sequences, seed, temperature=1.0):
    """Continue sequences to length tokens, one forward pass for each, over what has been written since the last one.

    first (B, n) ids, n >= 1; sequences (B,) int, their numbers for the noise. Returns (B, length) ids. Behind
    block_size tokens the window slides: as positions are counted within it, its later half is read anew, in one pass,
    whenever it is full. So a token sees half a block or more of what was written.
    """
    (B, n), block_size = first.shape, model.config.block_size
    assert 1 <= n, 'the model continues text and needs a first token'
    u = uniform(seed, TOKENS, sequences, 0, range(length), first.device)
    x, start = F.pad(first, (0, length - n)), 0
    cached = model.reader(B, min(length - 1, block_size))
    with torch.inference_mode():
        for t in range(n, length):
            if t - start > block_size:
                start, cached.n_read = t - max(1, block_size // 2), 0
            hidden = cached.read(x[:, start + cached.n_read:t])    # the given text at once, then token after token
            x[:, t] = sample(cached.lm_head(hidden[:, -1]), u[:, t], temperature)
    return x

"""The autoregressive peer: exact likelihood of rows under a causal model, and sampling from it token by token.

The same trunk with attention_type = 'causal' is the baseline of the evaluation and the evaluator of samples.
"""
import math

import torch
import torch.nn.functional as F

from noise import sample, uniform


def nll(trunk, model, x):
    """Negative log-likelihood of every token but the first given those before it, nats: x (B, T) ids -> (B, T - 1)."""
    logits = model.lm_head(trunk(x[:, :-1]))
    return F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction='none')


@torch.no_grad()
def validate(model, x0, batch_size):
    """Mean NLL of rows (R, T), nats per token: {'nll', 'nll_error' (standard error over rows)}."""
    rows = torch.cat([nll(model, model, part).mean(1) for part in x0.split(batch_size)]).double()
    return {'nll': rows.mean().item(), 'nll_error': (rows.std() / math.sqrt(len(rows))).item()}


@torch.no_grad()
def generate(model, first, length, rows, seed, temperature=1.0, top_p=1.0):
    """Continue rows to length tokens, one trunk pass each: first (B, n) ids, n >= 1; rows (B,) int for the noise.

    Returns (B, length) ids. Without a cache: this is the peer's quality, not its speed.
    """
    assert length <= model.config.block_size + 1, f'length {length}, block_size {model.config.block_size}'
    x = first
    for i in range(first.size(1), length):
        u = uniform(seed, 0, rows, 0, [i], x.device)[:, 0]
        x = torch.cat((x, sample(model.lm_head(model(x)[:, -1]), u, temperature, top_p)[:, None]), 1)
    return x

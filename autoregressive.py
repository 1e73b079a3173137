"""The autoregressive baseline: exact likelihood of sequences under a causal model, and sampling with a key-value cache.

    x = autoregressive.generate(model, first, 256, range(len(first)), seed=1337)

The same trunk with attention_type = 'causal'. It scores the samples of the evaluation and is what a user would pick
instead of diffusion, so its seconds are measured as a user would get them.
"""
import math

import torch
import torch.nn.functional as F

from layers import attend, norm, rotate
from noise import TOKENS, sample, uniform
from progress import bar


def nll(trunk, model, x):
    """Negative log-likelihood of every token but the first given those before it, nats: x (B, T) ids -> (B, T - 1)."""
    logits = model.lm_head(trunk(x[:, :-1]))
    return F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction='none')


@torch.no_grad()
def validate(model, x0, batch_size):
    """Mean NLL of sequences (N, T), nats per token: {'nll', 'nll_error' (standard error over sequences)}."""
    values = torch.cat([nll(model, model, part).mean(1) for part in bar(x0.split(batch_size), 'evaluation')]).double()
    return {'nll': values.mean().item(), 'nll_error': (values.std() / math.sqrt(len(values))).item()}


class CachedModel:
    """A causal model that reads one token of each sequence at a time and remembers what later tokens need.

    Every block keeps the keys and values of all positions and the inputs of its short convolution, in tensors that are
    as long as the text from the start. Weights are cast once, to the dtype that autocast would use.
    """

    def __init__(self, model, B, length):
        wte = model.wte.weight
        device = wte.device
        casts = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if casts else wte.dtype
        self.device_type, self.n_head = device.type, model.h[0].attn.n_head
        self.wte, self.unembedding = wte, model.unembedding.to(self.dtype)
        self.cos, self.sin = model.cos.to(self.dtype), model.sin.to(self.dtype)
        self.blocks = []
        for block in model.h:
            conv = block.mlp.near.conv.weight[:, 0].T                                      # (K, C), oldest input first
            weights = [layer.weight for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj)]
            K, C = conv.shape
            keys_values = torch.zeros(2, B, self.n_head, length, C // self.n_head, dtype=self.dtype, device=device)
            inputs = torch.zeros(B, K - 1 + length, C, dtype=self.dtype, device=device)       # zeros before the text
            self.blocks.append([w.to(self.dtype) for w in (*weights, conv)] + [*keys_values, inputs])

    def step(self, ids, t):
        """Logits (B, V - 1) float32 of position t + 1: ids (B,) of position t."""
        with torch.autocast(self.device_type, enabled=False):
            x = norm(F.embedding(ids, self.wte)).to(self.dtype)                               # (B, C)
            for qkv, proj, fc, out, conv, keys, values, inputs in self.blocks:
                # attention to everything up to t
                q, k, v = F.linear(norm(x), qkv).view(len(x), 3, self.n_head, -1).unbind(1)   # (B, n_head, head_size)
                q, k = rotate(norm(torch.stack((q, k))), self.cos[t], self.sin[t])
                keys[:, :, t], values[:, :, t] = k, v
                y = attend(q[:, :, None], keys[:, :, :t + 1], values[:, :, :t + 1], causal=False)
                x = x + F.linear(y.reshape(x.shape), proj)
                # MLP, after a convolution over the last K inputs
                inputs[:, t + len(conv) - 1] = near = norm(x)
                near = near + (inputs[:, t:t + len(conv)] * conv).sum(1)
                x = x + F.linear(F.gelu(F.linear(near, fc)), out)
            return F.linear(norm(x.to(self.wte.dtype)).to(self.dtype), self.unembedding).float()


@torch.no_grad()
def generate(model, first, length, sequences, seed, temperature=1.0, top_p=1.0):
    """Continue sequences to length tokens, one forward pass of one position for each token.

    first (B, n) ids, n >= 1; sequences (B,) int, their numbers for the noise. Returns (B, length) ids.
    """
    B, n = first.shape
    assert 1 <= n, 'the model continues text and needs a first token'
    assert length <= model.config.block_size + 1, f'length {length}, block_size {model.config.block_size}'
    u = uniform(seed, TOKENS, sequences, 0, range(length), first.device)
    x = F.pad(first, (0, length - n))
    cached = CachedModel(model, B, length - 1)
    for t in range(length - 1):
        logits = cached.step(x[:, t], t)
        if t + 1 >= n:
            x[:, t + 1] = sample(logits, u[:, t + 1], temperature, top_p)
    return x

"""Randomness that belongs to positions: a uniform number for each (seed, sequence, step, position), and sampling.

A counter-based generator needs no state, so a number does not depend on the batch, on the order of waves,
on the device or on what was drawn before. Fast code, a plain loop and the naive decoder can share it.

References:
SplitMix64, the mixing function: Steele, Lea, Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195
Sampling in float64: Zheng et al. 2024, https://arxiv.org/abs/2409.02908
"""
import numpy as np
import torch
import torch.nn.functional as F

TOKENS, ORDER, POSITIONS, CORRECTIONS, KEPT, ACCEPTED, REPLACED = range(7)    # streams of noise: one for each use
# what derive makes seeds for, in an iteration of training and in validation
CRITIC, CRITIC_TEXT, HEADS, JUDGE, TEXT_BLOCKS, MASKS, TEXT_MASKS, DROPOUT, MASK_COUNTS = range(9)
COLD = 1e-6    # a temperature below it is 0: logits divided by it may not be finite
CANDIDATES = 1024    # likeliest tokens that are sorted for top_p, unless they do not reach it
GROUP = 256    # tokens whose weights are summed before the running sum of a large vocabulary
MAX_LOGITS = 2 ** 23    # numbers in a piece of logits: 32 MB in float32, and some temporaries of twice that


def wrapped(n):
    """An int as the int64 with the same lowest 64 bits."""
    return (n + 2 ** 63) % 2 ** 64 - 2 ** 63


GOLDEN, *MIXERS = map(wrapped, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(z):
    """SplitMix64's finalizer: int64 -> int64, every input bit moves every output bit; products wrap around."""
    for shift, factor in ((30, MIXERS[0]), (27, MIXERS[1])):
        z = (z ^ unsigned_shift(z, shift)) * factor
    return z ^ unsigned_shift(z, 31)


def unsigned_shift(z, n):
    return (z >> n) & (2 ** (64 - n) - 1)


def numbers(values, device):
    """A tensor of ints on the device; a range is made there, so that the host does not wait for a copy."""
    if isinstance(values, range):
        return torch.arange(values.start, values.stop, values.step, device=device)
    return torch.as_tensor(values, device=device)


def uniform(seed, stream, sequences, step, positions, device='cpu'):
    """One uniform number in (0, 1) for each sequence and position.

    seed, step int >= 0; stream int, one for each use; sequences (B,) and positions (T,) int.
    Returns (B, T) float64 made from 53 bits each, the same on every device (rounded to float32 on mps).
    """
    key = mix(torch.full((1, 1), wrapped(seed + GOLDEN), device=device))
    for counter in (stream, step, numbers(sequences, device)[:, None], numbers(positions, device)[None, :]):
        key = mix((key ^ counter) * GOLDEN + GOLDEN)
    return (exact(unsigned_shift(key, 11)) + 0.5) * 2.0 ** -53


def derive(seed, *counters):
    """A seed of its own for a part of a run, such as a micro-step of an iteration: ints >= 0 -> int below 2 ** 63."""
    return int(np.random.SeedSequence(seed, spawn_key=counters).generate_state(1, np.uint64)[0] >> np.uint64(1))


def pieces(n, vocab_size):
    """Slices of n positions, each so short that its logits have at most MAX_LOGITS numbers; at least one slice."""
    size = max(1, MAX_LOGITS // vocab_size)
    return [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]


def gumbel(u):
    """Standard Gumbel noise of uniform numbers u in (0, 1)."""
    return -(-u.log()).log()


def exact_dtype(device):
    """float64, or float32 for a device that has no float64 (mps)."""
    return torch.float32 if device.type == 'mps' else torch.float64


def exact(x):
    """x in exact_dtype."""
    return x.to(exact_dtype(x.device))


def sample(logits, u, temperature=1.0, top_p=1.0):
    """Draw one token per position by inverting the cumulative distribution at u.

    logits (N, V); u (N,) in (0, 1); temperature >= 0, below COLD takes the likeliest; top_p in (0, 1] keeps the
    smallest set of likeliest tokens whose probabilities sum to top_p (Holtzman et al., arXiv:1904.09751).
    Returns ids (N,) int64.
    """
    if temperature < COLD:
        return logits.argmax(-1)
    return invert(weights(logits, temperature, top_p), u)


def weights(logits, temperature=1.0, top_p=1.0):
    """What sample draws by: non-negative (N, V), the probabilities but for a factor where top_p is below 1."""
    if temperature < COLD:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    if top_p == 1:
        # rounded in float32, a weight is as exact as its logit; what loses the tail is a sum in float32
        return torch.softmax(logits if temperature == 1 else logits / temperature, -1)
    prob = torch.softmax(exact(logits) / temperature, -1)
    n, V = CANDIDATES, prob.size(-1)
    likeliest, order = prob.topk(min(n, V))
    while n < V and (likeliest.sum(-1) < top_p).any():    # of a large vocabulary; this waits for the device
        n *= 4
        likeliest, order = prob.topk(min(n, V))
    likeliest = likeliest.masked_fill(likeliest.cumsum(-1) - likeliest >= top_p, 0)
    return torch.zeros_like(prob).scatter(-1, order, likeliest)


def invert(weight, u):
    """The first index at which the running sum of weight (N, V) >= 0 reaches u (N,) of the whole: ids (N,) int64.

    One without weight never is it. Of a large vocabulary, the sums of GROUP tokens are run over first.
    """
    N, V = weight.shape
    dtype = exact_dtype(weight.device)
    u = u.to(dtype).unsqueeze(1)
    if V > 4 * GROUP:
        weight = F.pad(weight, (0, -V % GROUP)).unflatten(-1, (-1, GROUP))
        sums = weight.sum(-1, dtype=dtype).cumsum(-1)
        target = u * sums[:, -1:]
        group = torch.searchsorted(sums, target).clamp(max=sums.size(1) - 1)
        target = target - F.pad(sums, (1, 0)).gather(1, group)
        sums = weight[torch.arange(N, device=weight.device), group[:, 0]].cumsum(-1, dtype=dtype)
        target = target.minimum(sums[:, -1:])    # the two sums are rounded differently
        return (torch.searchsorted(sums, target)[:, 0] + group[:, 0] * GROUP).clamp(max=V - 1)
    sums = weight.cumsum(-1, dtype=dtype)
    ids = torch.searchsorted(sums, u * sums.narrow(1, V - 1, 1)).squeeze(1)
    return ids.clamp_(max=V - 1)    # of NaN it is beyond: training notices NaN later (finite.py)


def probability(logits, ids):
    """Probability of ids (N,) under logits (N, V) at temperature 1, (N,)."""
    return log_probability(logits, ids).exp()


def log_probability(logits, ids):
    """Its logarithm, (N,)."""
    return torch.log_softmax(exact(logits), -1).gather(-1, ids[:, None])[:, 0]


def margin(logits, ids=None):
    """By how much the likeliest token is more probable than the second: logits (N, V) -> (N,).

    It takes ids, as probability does, but does not depend on them.
    """
    two = torch.softmax(exact(logits), -1).topk(min(2, logits.size(-1))).values
    return two[:, 0] - two[:, 1:].sum(-1)

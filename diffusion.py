"""Masked diffusion: the forward process that masks tokens, the training losses, and the bound on the likelihood.

References:
MDLM, the bound as an average of masked cross-entropies: https://arxiv.org/abs/2406.07524
LLaDA, the same with a fixed number of masks, which varies less: https://arxiv.org/abs/2502.09992
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from blocks import lay_out, views
from critic import critic_loss
from decoding import decode_block, default_config
from likelihood import log_likelihood
from metrics import area_under_roc, mean_error
from noise import derive
from plans import make_plan
from progress import bar
from sampler import sampler_examples, sampler_loss, spread_choice

BLOCKS = (4, 8, 16)    # into how many a sequence is divided for the trunk to learn from
CRITIC_ITERATIONS = (1, 2, 4, 8)    # of the decodings whose every pass the critic learns from


# -----------------------------------------------------------------------------
# forward process

def mask_tokens(x0, t, mask_id, generator=None):
    """Mask tokens of x0 independently, at least one in a sequence.

    x0 (B, T) int64 clean ids; t (B,) float in (0, 1], chance that a token is masked.
    Returns xt (B, T) int64, mask (B, T) bool. ValueError for t out of range. Source: arXiv:2406.07524.
    """
    if not ((t > 0) & (t <= 1)).all():
        raise ValueError(f't from {t.min():g} to {t.max():g}, wanted (0, 1]')
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    mask = (u < t[:, None]) | (u == u.amin(1, keepdim=True))
    return torch.where(mask, mask_id, x0), mask


def mask_exactly(x0, n, mask_id, generator=None):
    """Mask exactly n of each sequence's tokens: x0 (B, T) int64; n (B,) int64 in 1..T. Returns as mask_tokens."""
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    mask = u.argsort(1).argsort(1) < n[:, None]
    return torch.where(mask, mask_id, x0), mask


def spread_ratios(B, generator=None, device='cpu'):
    """B masking ratios, one in each B-th of (0, 1]: a low-discrepancy grid with a random offset. (B,) float32."""
    offset = 1 - torch.rand(1, generator=generator, device=device)    # in (0, 1], so that no ratio rounds to 0
    return (torch.arange(B, device=device) + offset) / B


def beta_ratios(u):
    """Beta(2, 2) quantiles of u in (0, 1], in (0, 1]: masking ratios near one half teach most (arXiv:2605.13026)."""
    quantile = 0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)
    return torch.maximum(quantile, (u / 3).sqrt()).clamp(max=1)    # a lower bound, exact near 0, where the sine cancels


# -----------------------------------------------------------------------------
# training and validation losses

@dataclass
class MaskedBatch:
    """A batch after its forward pass: what the losses of model, sampler and critic share."""
    x0: torch.Tensor           # (B, T) clean ids
    xt: torch.Tensor           # (B, T) masked ids
    mask: torch.Tensor         # (B, T) bool
    hidden: torch.Tensor       # (B, T, C)
    lm_logits: torch.Tensor    # (N, V - 1) at the masked positions
    targets: torch.Tensor      # (N,) clean ids at the masked positions


def forward_masked(trunk, model, x0, xt, mask):
    """One forward pass over xt -> MaskedBatch. trunk is model, or model compiled."""
    hidden = trunk(xt)
    return MaskedBatch(x0, xt, mask, hidden, model.lm_head(hidden[mask]), x0[mask])


@contextmanager
def evaluating(model):
    """Without dropout and gradients for a while: what the decoder would compute."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@dataclass
class BlockBatch:
    """Text and some of its blocks, masked, after their forward pass: what decoding in blocks asks the trunk."""
    x0: torch.Tensor           # (R, T) clean ids
    positions: torch.Tensor    # (M,) of the blocks, but for the first of each
    hidden: torch.Tensor       # (R, M, C) the view of them
    last: torch.Tensor         # (R, M, C) the state of the last token before the block of each


def forward_blocks(trunk, model, x0, generator):
    """One forward pass over text and every other block of it, masked -> BlockBatch and the trunk's loss on it, nats.

    x0 (R, T) clean ids; generator: chooses block size and which blocks. The loss is half the cross-entropy of the text,
    each token given those before it, and a quarter of that of the masked positions, the first of a block more.
    """
    R, T = x0.shape
    sizes = [T // n for n in BLOCKS if T % n == 0] or [T]
    size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
    parity = int(torch.randint(2, (), generator=generator)) if T > size else 0
    layout = lay_out(T, tuple(range(parity * size, T, 2 * size)), size, x0.device)
    hidden = trunk(x0, layout)
    following = F.cross_entropy(model.lm_head(hidden[:, :T - 1]).transpose(1, 2), x0[:, 1:])
    positions = layout.positions[T:]
    masked = F.cross_entropy(model.lm_head(hidden[:, T:]).transpose(1, 2), x0[:, positions], reduction='none')
    weight = (1 + positions % size).float() ** -0.5
    loss = 0.5 * following + 0.25 * (masked * weight / weight.mean()).mean()
    view, last = views(hidden.detach(), layout)
    later = positions % size > 0    # the first position of a block is the language-model head's
    return BlockBatch(x0, positions[later], view[:, later], last.repeat_interleave(size, 1)[:, later]), loss


def critic_examples(model, batch, n_sequences, seed, iterations):
    """Sequences as the shipped decoder fills and revises them, after each pass, and the same ones of real text.

    About n_sequences of the batch are decoded, from their masks or, as often, from nothing. Of the real text the trunk
    sees what it would have seen had the decoder drawn the real tokens: the same masks over the clean sequence. Returns
    generated and real, pairs of ids (P * n, T) and hidden states (P * n, T, C), after P passes each,
    and mask (P * n, T) bool, the positions that were not given.
    """
    generator = torch.Generator().manual_seed(derive(seed, 0))
    chosen = spread_choice(len(batch.x0), n_sequences, generator).to(batch.x0.device)
    x0, mask = batch.x0[chosen], batch.mask[chosen].clone()
    blank = bool(torch.randint(2, (), generator=generator))
    if blank:
        mask.fill_(True)
    steps = []
    config = default_config(model, iterations, prefix_only=blank, revising=True, seed=derive(seed, 1))
    decode_block(model, x0, mask, config, range(len(x0)), range(x0.size(1)), steps.append,
                 wanted=['hidden'])
    n, hidden = len(steps), [0]
    masked = torch.stack([step['xt'] == model.mask_id for step in steps])
    for mask_now, read in zip(masked, model(torch.where(masked, model.mask_id, x0).flatten(0, 1)).chunk(n)):
        hidden.append(torch.where(mask_now[..., None], read, hidden[-1]))
    generated = torch.cat([step['x'] for step in steps]), torch.cat([step['hidden'] for step in steps])
    return generated, (x0.repeat(n, 1), torch.cat(hidden[1:])), mask.repeat(n, 1)


def head_losses(model, batch, seed, sampler_rows=0, critic_rows=0, augment=True, critic_iterations=None, blocks=None):
    """Losses of the heads on a batch: {'sampler': ..., 'critic': ...} as far as asked for.

    blocks: a BlockBatch that the sampler head learns from too, or None. sampler_rows, critic_rows int: about how many
    sequences each head learns from, 0 for none. seed int, of the noise of this batch alone. augment: as in
    sampler_examples. critic_iterations: of the decoder, None draws them.
    """
    losses, generator = {}, torch.Generator().manual_seed(derive(seed, 2))
    if sampler_rows:
        with evaluating(model):
            examples = sampler_examples(model, batch, blocks, sampler_rows, generator, augment)
        losses['sampler'] = sampler_loss(model.sampler_head, examples, model.wte.weight)
    if critic_rows:
        drawn = CRITIC_ITERATIONS[int(torch.randint(len(CRITIC_ITERATIONS), (), generator=generator))]
        with evaluating(model):
            generated, real, mask = critic_examples(model, batch, critic_rows, seed, critic_iterations or drawn)
        losses['critic'], losses['critic_logits'], losses['critic_targets'] = critic_loss(
            model.critic_head, generated, real, mask, model.wte.weight)
    return losses


@torch.no_grad()
def validate(model, x0, batch_size, seed, sampler=False, critic=False):
    """Negative evidence lower bound and the heads' losses on fixed sequences under fixed masks.

    x0 (R, T) int64 on the model's device. A sequence's number of masks n is spread evenly over 1..T, and its part of
    the bound is the sum of masked cross-entropies / (n / T) / T, in expectation the bound of independent masks (LLaDA).
    Returns {'nelbo': nats per token, 'nelbo_error': its standard error over sequences (an upper one: that n is spread
    evenly lowers the true error), 'main': cross-entropy over masked tokens, 'sampler': that of the head as a wavefront
    fills them, 'one_pass_nll': exact, of the head from left to right in one forward pass, 'critic', 'critic_auc': as
    far as asked for}. The critic sees a few sequences of one batch in four, decoded in 4 iterations.
    """
    R, T = x0.size()
    generator = torch.Generator().manual_seed(seed)
    n = (1 + torch.arange(R) * T // R)[torch.randperm(R, generator=generator)]
    xt, mask = mask_exactly(x0.cpu(), n, model.mask_id, generator)
    xt, mask = xt.to(x0.device), mask.to(x0.device)
    nelbo, totals, ranked = [], {}, []
    for i, start in enumerate(bar(range(0, R, batch_size), 'evaluation')):
        part = slice(start, start + batch_size)
        batch = forward_masked(model, model, x0[part], xt[part], mask[part])
        nll = F.cross_entropy(batch.lm_logits, batch.targets, reduction='none')
        per_sequence = nll.new_zeros(batch.mask.shape).masked_scatter(batch.mask, nll).sum(1)
        nelbo.append(per_sequence.double().cpu() / n[part])
        critic_rows = min(4, len(batch.x0)) if critic and i % 4 == 0 else 0
        losses = head_losses(model, batch, derive(seed, i), 2 * len(batch.x0) * sampler, critic_rows, augment=False,
                             critic_iterations=4)
        if critic_rows:
            ranked.append((losses.pop('critic_targets').cpu(), losses.pop('critic_logits').cpu()))
        for name, value in (losses | {'main': nll.mean()}).items():
            totals.setdefault(name, []).append((value.double().cpu(), int(batch.mask.sum())))
    result = dict(zip(('nelbo', 'nelbo_error'), mean_error(torch.cat(nelbo).tolist())))
    if ranked:
        targets, logits = (torch.cat(values) for values in zip(*ranked))
        result['critic_auc'] = area_under_roc(targets, logits)
    if sampler:
        plan = make_plan('left-to-right', T, 1, device=x0.device)
        nll = [-log_likelihood(model, part, plan).mean(1) for part in bar(x0.split(batch_size), 'one-pass likelihood')]
        result['one_pass_nll'] = torch.cat(nll).mean().item()
    for name, values in totals.items():
        result[name] = (sum(v * w for v, w in values) / sum(w for _, w in values)).item()
    return result

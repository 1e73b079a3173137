"""Masked diffusion: the forward process that masks tokens, the training losses, and the bound on the likelihood.

References:
MDLM, the bound as an average of masked cross-entropies: https://arxiv.org/abs/2406.07524
LLaDA, the same with a fixed number of masks, which varies less: https://arxiv.org/abs/2502.09992
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import speculative
from batches import Share, spread_choice, untaught
from blocks import lay_out, views
from critic import CriticExamples, critic_loss
from decoding import decode_window, default_config
from likelihood import log_likelihood
from metrics import area_under_roc, grid_error
from noise import CRITIC, CRITIC_TEXT, HEADS, MASK_COUNTS, derive
from plans import make_plan
from progress import bar
from sampler import sampler_examples, sampler_loss
from sharding import whole

BLOCKS = (4, 8, 16)    # into how many a sequence is divided for the trunk to learn from
CRITIC_ITERATIONS = (1, 2, 4, 8)    # of the decodings that the critic learns from


# -----------------------------------------------------------------------------
# forward process

def draw_masks(t, T, generator=None):
    """Masks of T tokens, each drawn independently, at least one in a sequence.

    t (B,) float in (0, 1], chance that a token is masked. Returns (B, T) bool, on its device. ValueError for t out of
    range. Source: arXiv:2406.07524.
    """
    if not ((t > 0) & (t <= 1)).all():
        raise ValueError(f't from {t.min():g} to {t.max():g}, wanted (0, 1]')
    u = torch.rand(len(t), T, generator=generator, device=t.device)
    return (u < t[:, None]) | (u == u.amin(1, keepdim=True))


def draw_exact_masks(n, T, generator=None):
    """Masks of exactly n (B,) int64, in 1..T, of T tokens each, (B, T) bool."""
    return torch.rand(len(n), T, generator=generator).argsort(1).argsort(1) < n[:, None]


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
    mask: torch.Tensor         # (B, T) bool
    hidden: torch.Tensor       # (B, T, C)
    lm_logits: torch.Tensor    # (N, V - 1) at the masked positions
    targets: torch.Tensor      # (N,) clean ids at the masked positions
    share: Share               # which sequences of the global batch these are
    all_masks: torch.Tensor    # (G, T) bool on the CPU, of the global batch


def forward_masked(trunk, model, x0, mask, share=None, all_masks=None):
    """One forward pass over x0 with its masks -> MaskedBatch.

    trunk: model, or model compiled; share, all_masks: of the global batch, without which x0 is all there is.
    """
    hidden = trunk(torch.where(mask, model.mask_id, x0))
    share, all_masks = share or Share(len(x0)), mask.cpu() if all_masks is None else all_masks
    return MaskedBatch(x0, mask, hidden, model.lm_head(hidden[mask]), x0[mask], share, all_masks)


def masked_loss(batch):
    """The trunk's cross-entropy at the masked positions, nats, weighed as a part of the global batch."""
    total = F.cross_entropy(batch.lm_logits, batch.targets, reduction='sum')
    return batch.share.weigh(total, 1, int(batch.all_masks.sum()))


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
    """Text and a block of it, masked, after their forward pass: what decoding in blocks asks the trunk."""
    x0: torch.Tensor           # (R, T) clean ids
    positions: torch.Tensor    # (M,) of the blocks, but for the first of each
    hidden: torch.Tensor       # (R, M, C) the view of them
    last: torch.Tensor         # (R, M, C) the state of the last token before the block of each
    share: Share               # which sequences of the global batch these are


def forward_blocks(trunk, model, x0, generator, share=None, seen=None, viewed=True):
    """One forward pass over text and a block of it, masked -> BlockBatch and the trunk's loss on it, nats.

    x0 (R, T) clean ids, T > 2; generator: chooses the block's size and place; seen (R, T): x0 as the trunk reads it for
    its loss, with masks; viewed: a head wants the BlockBatch, for which the text is then read once more as decoding
    reads it. Text and block are T tokens together, so that a pass costs what any other does: the text ends early. The
    loss is half the cross-entropy of the text, each token given those before it, and a quarter of that of the masked
    positions, the first of the block more; weighed as a part of the global batch, of which x0 is all without a share.
    """
    T, share, seen = x0.size(1), share or Share(len(x0)), x0 if seen is None else seen
    size = max(1, T // BLOCKS[int(torch.randint(len(BLOCKS), (), generator=generator))])
    n_text = T - size
    start = size * int(torch.randint(n_text // size + 1, (), generator=generator))
    layout = lay_out(n_text, (start,), size, x0.device)
    hidden = trunk(seen[:, :n_text], layout)
    following = F.cross_entropy(model.lm_head(hidden[:, :n_text - 1]).transpose(1, 2), x0[:, 1:n_text],
                                reduction='none')
    positions = layout.positions[n_text:]
    masked = F.cross_entropy(model.lm_head(hidden[:, n_text:]).transpose(1, 2), x0[:, positions], reduction='none')
    weight = (1 + positions % size).float() ** -0.5
    loss = 0.5 * following.mean(1) + 0.25 * (masked * weight / weight.mean()).mean(1)    # (R,)
    if viewed and seen is not x0:
        with evaluating(model):
            hidden = trunk(x0[:, :n_text], layout)
    view, last = views(hidden.detach(), layout)
    # the first position of a block is the language-model head's
    blocks = BlockBatch(x0, positions[1:], view[:, 1:], last.expand(-1, size - 1, -1), share)
    return blocks, share.weigh(loss.sum(), 1, share.total)


class Given:
    """A filler for decode_window that draws the tokens of a text: what the trunk then sees is as if they were drawn."""
    reach = 0

    def __init__(self, text):
        self.text = text

    def fill(self, xt, mask, *_):
        return torch.where(mask, self.text, xt), torch.zeros_like(xt), 1

    correct = fill

    def fill_from_left(self, xt, mask, *_):
        return *self.fill(xt, mask), None

    def rescore(self, x, at, *_):
        return torch.ones(len(at[0]), dtype=torch.float64, device=x.device)


def critic_examples(model, batch, n_sequences, seed, iterations):
    """Sequences as the shipped decoder fills and revises them, and the same ones of real text.

    About n_sequences of the global batch are decoded: half the time, by lot, from nothing as by default, and taken as
    they are at the end; else from their masks or, as often, from nothing by a decoder that revises, and taken after
    each of its passes. Each process takes its own. Of the real text the trunk sees what it would have seen had the
    decoder drawn the real tokens. Returns CriticExamples, or None where no sequence is here.
    """
    generator = torch.Generator().manual_seed(derive(seed, CRITIC))
    all_chosen = spread_choice(batch.share.total, n_sequences, generator)
    which, own = batch.share.of(all_chosen)
    by_default, blank = (bool(torch.randint(2, (), generator=generator)) for _ in range(2))
    blank = blank or by_default
    if not len(own):
        return None
    x0, mask = batch.x0[own.to(batch.x0.device)], batch.mask[own.to(batch.x0.device)] | blank
    counts = [int((batch.all_masks[numbers] | blank).sum()) for numbers in (all_chosen[which], all_chosen)]
    config = default_config(model, iterations, prefix_only=blank, revising=not by_default,
                            seed=derive(seed, CRITIC_TEXT))

    def decoded(filler=None):
        steps = []
        decode_window(model, x0, mask, config, all_chosen[which].tolist(), range(x0.size(1)), steps.append, filler,
                     wanted=['hidden'])
        return steps
    steps = decoded()
    if not config.mask_ratios:    # nothing is revised: the critic scores what is there at the end
        end = steps[-1]
        if config.plan == 'speculative':
            checked = (end['xt'] != model.mask_id) | end['corrected']
            checked[:, 0] = False    # the first token is not
            real = x0, speculative.views_of(model, x0, 0, checked)
        else:
            real = tuple(decoded(Given(x0))[-1][name] for name in ('x', 'hidden'))
        generated = end['x'], end['hidden']
        return CriticExamples(generated, real, mask, torch.ones(len(mask), device=mask.device), *counts)
    n, hidden = len(steps), [0]
    masked = torch.stack([step['xt'] == model.mask_id for step in steps])
    for mask_now, read in zip(masked, model(torch.where(masked, model.mask_id, x0).flatten(0, 1)).chunk(n)):
        hidden.append(torch.where(mask_now[..., None], read, hidden[-1]))
    generated = torch.cat([step['x'] for step in steps]), torch.cat([step['hidden'] for step in steps])
    read = masked.any(2)    # (P, n): a finished sequence waits for the others
    return CriticExamples(generated, (x0.repeat(n, 1), torch.cat(hidden[1:])), mask.repeat(n, 1) & read.view(-1, 1),
                          (1 / read.sum(0)).repeat(n), *counts)


def head_losses(model, batch, seed, sampler_rows=0, critic_rows=0, augment=True, critic_iterations=None, blocks=None):
    """Losses of the heads, {'sampler': ..., 'critic': ...} as far as asked for, each a part of the global batch's.

    Returns them, and what the critic said: targets and logits (N,) each, or None where it has no example here.
    blocks: a BlockBatch that the sampler head learns from too, or None. sampler_rows, critic_rows int: about how many
    sequences of the global batch each head learns from, 0 for none. seed int, of its noise. augment: as in
    sampler_examples. critic_iterations: of the decoder, None draws them.
    """
    losses, ranked, generator = {}, None, torch.Generator().manual_seed(derive(seed, HEADS))
    if sampler_rows:
        with evaluating(model):
            examples = sampler_examples(model, batch, blocks, sampler_rows, generator, augment)
        loss = sampler_loss(model.sampler_head, examples, model.wte.weight)
        losses['sampler'] = batch.share.weigh(loss, len(examples.targets), examples.total) + untaught(
            model.sampler_head)    # its recurrent state may have nothing to read in one process
    if critic_rows:
        drawn = CRITIC_ITERATIONS[int(torch.randint(len(CRITIC_ITERATIONS), (), generator=generator))]
        with evaluating(model), whole(model):
            examples = critic_examples(model, batch, critic_rows, seed, critic_iterations or drawn)
        losses['critic'] = untaught(model.critic_head)
        if examples:
            loss, logits, targets = critic_loss(model.critic_head, examples, model.wte.weight)
            losses['critic'], ranked = batch.share.weigh(loss, examples.n, examples.total), (targets, logits)
    return losses, ranked


@torch.no_grad()
def validate(model, x0, batch_size, seed, sampler=False, critic=False):
    """Negative evidence lower bound and the heads' losses on fixed sequences under fixed masks.

    x0 (R, T) int64 on the model's device. A sequence's number of masks n is spread evenly over 1..T, a grid with a
    random offset, and its part of the bound is the sum of masked cross-entropies / (n / T) / T, in expectation the
    bound of independent masks (LLaDA). Returns {'nelbo': nats per token, 'nelbo_error': its standard error, which knows
    that n is spread evenly, 'main': cross-entropy over masked tokens, 'sampler': that of the head as a wavefront fills
    them, 'one_pass_nll': exact, of the head from left to right in one forward pass, 'critic', 'critic_auc': as far as
    asked for}. The critic sees a few sequences of one batch in four, decoded in 4 iterations.
    """
    R, T = x0.size()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(R, generator=generator)
    n = (spread_ratios(R, torch.Generator().manual_seed(derive(seed, MASK_COUNTS))) * T).ceil().long()[order]
    mask = draw_exact_masks(n, T, generator).to(x0.device)
    nelbo, totals, ranked = [], {}, []
    for i, start in enumerate(bar(range(0, R, batch_size), 'evaluation')):
        part = slice(start, start + batch_size)
        batch = forward_masked(model, model, x0[part], mask[part])
        nll = F.cross_entropy(batch.lm_logits, batch.targets, reduction='none')
        per_sequence = nll.new_zeros(batch.mask.shape).masked_scatter(batch.mask, nll).sum(1)
        nelbo.append(per_sequence.cpu().double() / n[part])
        critic_rows = min(4, len(batch.x0)) if critic and i % 4 == 0 else 0
        losses, critics = head_losses(model, batch, derive(seed, i), 2 * len(batch.x0) * sampler, critic_rows,
                                   augment=False, critic_iterations=4)
        if critics:
            ranked.append([values.cpu() for values in critics])
        for name, value in (losses | {'main': nll.mean()}).items():
            totals.setdefault(name, []).append((value.cpu().double(), int(batch.mask.sum())))
    nelbo = torch.cat(nelbo)[order.argsort()]    # along the grid
    result = {'nelbo': nelbo.mean().item(), 'nelbo_error': grid_error(nelbo.tolist())}
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

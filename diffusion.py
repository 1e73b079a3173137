"""Masked diffusion: hiding tokens, the training loss and its likelihood bound, and the decoding loop.

References:
MDLM, the bound as an average of masked cross-entropies: https://arxiv.org/abs/2406.07524
LLaDA, the same with a fixed number of masks, which varies less: https://arxiv.org/abs/2502.09992
MaskGIT, filling in parallel and remasking the least sure with annealed noise: https://arxiv.org/abs/2202.04200
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from critic import critic_loss, wrongness
from noise import exact, gumbel, probability, sample, uniform
from sampler import Wavefront, sampler_loss, teacher_forced

TOKENS, ORDER, PLACES, CORRECTIONS = 0, 1, 2, 3    # streams of noise: one for each use
CRITIC_TEMPERATURE = 0.6           # of the fills that the critic learns from


# -----------------------------------------------------------------------------
# forward process

def mask_tokens(x0, t, mask_id, generator=None):
    """Mask tokens of x0 independently, at least one in a row.

    x0 (B, T) int64 clean ids; t (B,) float in (0, 1], chance that a token is masked.
    Returns xt (B, T) int64, mask (B, T) bool. ValueError for t out of range. Source: arXiv:2406.07524.
    """
    if not ((t > 0) & (t <= 1)).all():
        raise ValueError(f't from {t.min():g} to {t.max():g}, wanted (0, 1]')
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    mask = (u < t[:, None]) | (u == u.amin(1, keepdim=True))
    return torch.where(mask, mask_id, x0), mask


def mask_exactly(x0, n, mask_id, generator=None):
    """Mask exactly n of the tokens of each row: x0 (B, T) int64; n (B,) int64 in 1..T. Returns as mask_tokens."""
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    mask = u.argsort(1).argsort(1) < n[:, None]
    return torch.where(mask, mask_id, x0), mask


def spread_ratios(B, generator=None, device='cpu'):
    """B masking ratios, one in each B-th of (0, 1]: a low-discrepancy grid with a random offset. (B,) float."""
    return 1 - (torch.arange(B, device=device) + torch.rand(1, generator=generator, device=device)) / B


def bell(u):
    """Beta(2, 2) quantiles of u in [0, 1]: masking ratios near one half teach most (https://arxiv.org/abs/2605.13026)."""
    return (0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)).clamp(max=1)


# -----------------------------------------------------------------------------
# training and validation losses

@dataclass
class Masked:
    """A batch whose trunk pass is done: what the three losses share."""
    x0: torch.Tensor        # (B, T) clean ids
    xt: torch.Tensor        # (B, T) masked ids
    mask: torch.Tensor      # (B, T) bool
    hidden: torch.Tensor    # (B, T, C)
    lm_logits: torch.Tensor    # (N, V - 1) at the masked places
    targets: torch.Tensor      # (N,) clean ids at the masked places


def read(trunk, model, x0, xt, mask):
    """One trunk pass over xt. trunk is model, or model compiled."""
    hidden = trunk(xt)
    return Masked(x0, xt, mask, hidden, model.lm_head(hidden[mask]), x0[mask])


def sampler_examples(model, batch, seed, step, n_rows, practise):
    """Places for the sampler head to learn from: hidden (N, C), lm_logits (N, V - 1), targets (N,), around (N, 2k)."""
    (B, T), device, offsets = batch.x0.size(), batch.x0.device, model.sampler_head.window.offsets

    def around(x0, redo, rows, cols, numbers):
        start = uniform(seed, PLACES, numbers, step, range(T), device)    # where a row that knows nothing begins
        return teacher_forced(x0, redo, rows, cols, offsets, start, model.config.sampler_min_neighbors_ratio, model.mask_id)

    # masked places of the rows whose turn it is
    stride = max(1, B // n_rows)
    rows, cols = batch.mask.nonzero(as_tuple=True)
    turn = rows % stride == step % stride
    rows, cols = rows[turn], cols[turn]
    redo = batch.mask
    if practise:    # corrections: in every other row a part is redone among the rest; often none, the fresh look
        u = uniform(seed, CORRECTIONS, range(B), step, range(T + 1), device)
        every_other = (torch.arange(B, device=device) + step) % 2 == 0
        redo = redo & ((u[:, :T] < u[:, T:] - 0.3) | ~every_other[:, None])
    examples = [(batch.hidden[rows, cols], batch.lm_logits[turn], batch.targets[turn], around(batch.x0, redo, rows, cols, range(B)))]

    if practise:    # the first pass: rows that know nothing look all the same to the trunk, so many cost little
        every = min(2, B)
        x0 = batch.x0[step % every::every]
        hidden = model(torch.full_like(x0[:1], model.mask_id))[0]
        rows, cols = torch.ones_like(x0).nonzero(as_tuple=True)
        examples.append((hidden[cols], model.lm_head(hidden)[cols], x0.flatten(), around(x0, x0 >= 0, rows, cols, range(B, B + len(x0)))))
    return [torch.cat(parts) for parts in zip(*examples)]


def head_losses(model, batch, seed, step, sampler_rows=0, critic_rows=0, use_sampler=True, practise=True):
    """Losses of the heads on a batch that the trunk has read: {'sampler': ..., 'critic': ...} as far as asked for.

    sampler_rows, critic_rows int: about how many rows each head learns from, 0 for none; they move on with step, so
    that every masking ratio has its turn. seed, step: of the noise. use_sampler: the decoder that fills rows for the
    critic goes by wavefront. practise: the sampler head learns corrections and first passes too.
    """
    losses, (B, T), device = {}, batch.x0.size(), batch.x0.device
    if sampler_rows:
        with torch.no_grad():
            examples = sampler_examples(model, batch, seed, step, sampler_rows, practise)
        losses['sampler'] = sampler_loss(model.sampler_head, *examples, model.wte.weight)
    if critic_rows:
        stride = max(1, B // critic_rows)
        part = slice(step % stride, None, stride)
        xt, mask, hidden = batch.xt[part], batch.mask[part], batch.hidden[part].detach()
        with torch.no_grad():
            u = uniform(seed, TOKENS, range(len(xt)), step, range(T), device)
            x, _ = filler(model, use_sampler).fill(xt, mask, hidden, model.lm_head(hidden), u, CRITIC_TEMPERATURE, 1.0)
        losses['critic'], losses['critic_logits'], losses['placed'] = critic_loss(
            model.critic_head, hidden, x, batch.x0[part], mask, model.wte.weight)
    return losses


@torch.no_grad()
def validate(model, x0, batch_size, seed, sampler=False, critic=False):
    """Negative evidence lower bound and the heads' losses on fixed rows under fixed masks.

    x0 (R, T) int64 on the model's device. A row's number of masks n is spread evenly over 1..T, and its part of the
    bound is the sum of masked cross-entropies / (n / T) / T, in expectation the bound of independent masking (LLaDA).
    Returns {'nelbo': nats per token, 'nelbo_error': its standard error over rows (an upper one: that n is spread evenly
    lowers the true error), 'main': cross-entropy over masked tokens, 'sampler', 'critic', 'critic_auc': as far as asked for}. The critic sees one batch in four.
    """
    R, T = x0.size()
    generator = torch.Generator().manual_seed(seed)
    n = (1 + torch.arange(R) * T // R)[torch.randperm(R, generator=generator)]
    xt, mask = mask_exactly(x0.cpu(), n, model.mask_id, generator)
    xt, mask = xt.to(x0.device), mask.to(x0.device)
    nelbo, totals = [], {}
    for step, start in enumerate(range(0, R, batch_size)):
        part = slice(start, start + batch_size)
        batch = read(model, model, x0[part], xt[part], mask[part])
        losses = F.cross_entropy(batch.lm_logits, batch.targets, reduction='none')
        nll = losses.new_zeros(batch.mask.shape)
        nll[batch.mask] = losses
        nelbo.append(nll.sum(1).double().cpu() / n[part])
        B = len(batch.x0)
        losses = head_losses(model, batch, seed, step, B * sampler, B * (critic and step % 4 == 0), sampler, practise=False)
        losses['main'] = nll.sum() / batch.mask.sum()
        for name, value in losses.items():
            totals.setdefault(name, []).append((value.double().cpu(), int(batch.mask.sum())))
    nelbo = torch.cat(nelbo)
    result = {'nelbo': nelbo.mean().item(), 'nelbo_error': (nelbo.std() / math.sqrt(R)).item()}
    if critic:
        result['critic_auc'] = area_under_roc(torch.cat([v for v, _ in totals.pop('placed')]),
                                              torch.cat([v for v, _ in totals.pop('critic_logits')]))
    for name, values in totals.items():
        result[name] = (sum(v * w for v, w in values) / sum(w for _, w in values)).item()
    return result


def area_under_roc(truth, score):
    """Chance that a random true one has a higher score than a random false one: truth, score (N,) -> float."""
    rank = score.argsort().argsort().double() + 1
    n = truth.sum()
    return ((rank[truth > 0].sum() - n * (n + 1) / 2) / (n * (len(truth) - n))).item()


# -----------------------------------------------------------------------------
# decoding

class Naive:
    """Fills every masked place from its own marginal; the methods are those of Wavefront."""
    reach = 0    # a token's probability depends on no neighbour

    def fill(self, xt, mask, hidden, lm_logits, u, temperature, top_p):
        x, at = xt.clone(), mask.nonzero(as_tuple=True)
        x[at] = sample(lm_logits[at], u[at], temperature, top_p)
        return x, torch.zeros_like(xt)

    def look(self, x, at, hidden, lm_logits):
        return probability(lm_logits[at], x[at])


def filler(model, use_sampler):
    if use_sampler:
        return Wavefront(model.sampler_head, model.wte.weight, model.config.sampler_min_neighbors_ratio)
    return Naive()


def within_reach(mask, reach):
    """Places of mask (B, T) bool and those up to reach beside them."""
    return F.max_pool1d(mask.float(), 2 * reach + 1, stride=1, padding=reach) > 0


@dataclass
class Decoder:
    """How to decode; every field but use_sampler and order means the same to every decoder."""
    use_sampler: bool = True
    order: str = 'confidence'       # what is remasked first: 'confidence', 'critic', 'random'
    revise: bool = True             # tokens kept earlier compete again; random order never revises
    ratios: tuple = (0.5,)          # share of the free places that is remasked after each pass but the last
    threshold: float = 0.0          # above 0: remask wrongness above it, in place of ratios, until nothing is
    temperature: float = 1.0
    end_temperature: float = None   # of the last pass, reached linearly; None stays
    top_p: float = 1.0
    randomness_strength: float = 0.0    # of Gumbel noise on the order, annealed to 0
    corrections: int = 0            # times that the sampler head redoes the worst of what it filled, without a trunk pass
    correction_ratio: float = 0.6   # share of it that the first of them redoes; each later one redoes evenly less
    seed: int = 1337

    @property
    def passes(self):
        """Trunk passes over one block, at most."""
        return len(self.ratios) + 1

    def temperature_of(self, i):
        """Temperature of pass i, counted from 0."""
        if self.end_temperature is None or self.passes == 1:
            return self.temperature
        done = i / (self.passes - 1)
        return (1 - done) * self.temperature + done * self.end_temperature    # 0 at the end is 0, not a rounding below


def linear_ratios(iterations, start, end):
    """Masking ratios after each of the iterations but the last, from start to end: a list of iterations - 1."""
    if iterations <= 2:
        return [start][:iterations - 1]
    return [start + (end - start) * i / (iterations - 2) for i in range(iterations - 1)]


def worst(wrong, candidates, n):
    """The n (B,) worst of the candidates (B, T) bool of each row, by wrong (B, T). Returns (B, T) bool."""
    rank = wrong.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return candidates & (rank < n[:, None])


def places_to_remask(decoder, i, wrong, mask, free, rows, positions):
    """The places that are masked again after pass i.

    wrong (B, T) float in [0, 1]; mask (B, T) bool, places filled in this pass; free (B, T) bool, all but given text.
    Returns (B, T) bool.
    """
    if decoder.threshold > 0:
        return free & (wrong > decoder.threshold)
    noise = gumbel(uniform(decoder.seed, ORDER, rows, i, positions, wrong.device))
    if decoder.order == 'random':
        key, candidates = noise, mask
    else:
        strength = decoder.randomness_strength * (1 - (i + 1) / decoder.passes)
        key, candidates = -torch.log1p(-wrong.clamp(max=1 - 1e-12)) + strength * noise, free if decoder.revise else mask
    return worst(key, candidates, (decoder.ratios[i] * free.sum(1)).round())


@torch.no_grad()
def decode_block(model, x, free, decoder, rows, positions, on_pass=None):
    """Fill the free places of a block in decoder.passes trunk passes or fewer.

    x (B, T) ids, of which the free ones are ignored; free (B, T) bool; rows (B,) and positions (T,) int name the
    places to the noise. on_pass(dict) is shown every pass.
    Returns x (B, T) without masks, flaw (B, T) float, the critic's chance that a token was placed (0 at given places,
    None without a critic), passes made, waves made.
    """
    fills, critic = filler(model, decoder.use_sampler), model.critic_head
    reach = max(fills.reach, critic.context if critic is not None else 0)
    corrections = decoder.corrections if decoder.use_sampler else 0    # a marginal drawn again is no better informed
    mask, waves, hidden = free, 0, 0
    wrong, flaw = exact(torch.zeros_like(x)), exact(torch.zeros_like(x))
    for i in range(decoder.passes):
        # 1. one trunk pass; each place keeps the view that the trunk had when it was last masked
        xt = torch.where(mask, model.mask_id, x)
        hidden = torch.where(mask[..., None], model(xt), hidden)
        lm_logits, temperature = model.lm_head(hidden), decoder.temperature_of(i)

        placed, made = torch.zeros_like(x), 0
        for j in range(1 + corrections):
            # 2. fill what is masked; then redo the worst of it, which costs the trunk nothing
            redo, stream, step = mask, TOKENS, i
            if j:
                share = decoder.correction_ratio * (corrections + 1 - j) / corrections
                redo = worst(wrong, mask, (share * mask.sum(1)).round())
                stream, step = CORRECTIONS, i * corrections + j - 1
            u = uniform(decoder.seed, stream, rows, step, positions, x.device)
            before = x
            x, wave = fills.fill(torch.where(redo, model.mask_id, x), redo, hidden, lm_logits, u, temperature, decoder.top_p)
            placed = torch.where(redo, made + wave, placed)
            made = made + wave.max() + 1

            # 3. look afresh at every token that was placed, or that has another neighbour than before
            changed = within_reach(redo & (x != before), reach) if i or j else redo
            at = (free & (redo | changed)).nonzero(as_tuple=True)
            prob = fills.look(x, at, hidden, lm_logits)
            wrong[at] = 1 - prob
            if critic is not None:
                flaw[at] = exact(critic(hidden, x, at, model.wte.weight))
                wrong[at] = wrongness(prob, flaw[at]) if decoder.order == 'critic' else wrong[at]

        waves = waves + made

        # 4. mask the worst again
        remasked = torch.zeros_like(mask)
        if i + 1 < decoder.passes:
            remasked = places_to_remask(decoder, i, wrong, mask, free, rows, positions)
            remasked = remasked & mask.any(1, keepdim=True)    # a row that was whole stays so, whatever its company does
        if on_pass:
            on_pass({'pass': i, 'start': positions[0], 'xt': xt, 'x': x, 'wave': placed,
                     'wrong': torch.where(free, wrong, 0), 'remasked': remasked})
        mask = remasked
        if not mask.any():
            break
    flaw = None if critic is None else torch.where(free, torch.sigmoid(flaw), 0)
    return x, flaw, i + 1, int(waves)


def blocks(length, block_size):
    """(start, end) of the blocks that cover a row: each begins a quarter of a block or more before the last one's end."""
    spans = [(0, min(length, block_size))]
    while spans[-1][1] < length:
        end = min(length, spans[-1][1] + block_size - block_size // 4)
        spans.append((end - block_size, end))
    return spans


def generate(model, x, free, decoder, rows, on_pass=None):
    """Fill the free places of rows of any length, in overlapping blocks, each given the tail of the last.

    x (B, L) ids, of which the free ones are ignored; free (B, L) bool; rows (B,) int, their numbers for the noise.
    Returns x (B, L), flaw (B, L) or None, passes, waves: as decode_block, summed over blocks.
    """
    x, free, flaw, passes, waves = x.clone(), free.clone(), exact(torch.zeros_like(x)), 0, 0
    for start, end in blocks(x.size(1), model.config.block_size):
        part = slice(start, end)
        if not free[:, part].any():
            continue
        filled, flaws, p, w = decode_block(model, x[:, part], free[:, part], decoder, rows, range(start, end), on_pass)
        if flaws is not None:
            flaw[:, part] = torch.where(free[:, part], flaws, flaw[:, part])
        x[:, part], free[:, part] = filled, False
        passes, waves = passes + p, waves + w
    return x, flaw if model.critic_head is not None else None, passes, waves

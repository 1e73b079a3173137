"""The decoder: fills masked positions in a few forward passes, scoring the result and remasking its worst part.

    config = default_config(model, iterations=15)
    decoded = generate(model, x, free, config, sequences=range(len(x)))

References:
MaskGIT, filling in parallel and remasking the least confident with annealed noise: https://arxiv.org/abs/2202.04200
ReMDM, remasking of tokens that were kept before: https://arxiv.org/abs/2503.00307
top-probability margin, an order: https://arxiv.org/abs/2502.06768
informed correctors, resampling without a further forward pass: https://arxiv.org/abs/2407.21243
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import speculative
from critic import remask_score
from filling import HeadFiller, NaiveFiller
from noise import (ACCEPTED, CORRECTIONS, KEPT, ORDER, REPLACED, TOKENS, exact, gumbel, margin, numbers, probability,
                   uniform)
from plans import make_plan

# -----------------------------------------------------------------------------
# settings

@dataclass
class DecoderConfig:
    """How to decode. Without the sampler head corrections are left out and the plan 'speculative' is refused."""
    use_sampler: bool = True
    order: str = 'confidence'       # what is remasked first: 'confidence', 'margin', 'critic', 'random'
    revise: bool = True             # kept tokens may be remasked later; random order revises by remask_kept alone
    remask_kept: float = 0.0        # in random order: share of kept tokens that each pass remasks, ReMDM's capped sigma
    mask_ratios: tuple = (0.5,)     # share of the free positions that is remasked before each further pass
    threshold: float = 0.0          # above 0: remask scores above it, in place of mask_ratios, until there are none
    temperature: float = 1.0
    end_temperature: float = None   # of the last pass, reached linearly; None: the same
    top_p: float = 1.0
    randomness_strength: float = 0.0    # of Gumbel noise on the order, annealed to 0
    corrections: int = 0            # times that the sampler head resamples its worst tokens, without a forward pass
    correction_ratio: float = 0.6   # share of the tokens just filled that the first of them resamples, falling evenly
    plan: str = 'wavefront'         # the order in which everything is filled first (plans.py); the rest revises
    plan_passes: int = 1            # forward passes that the plan takes
    seed: int = 1337

    @property
    def passes(self):
        """Forward passes over one window, at most."""
        return self.plan_passes + len(self.mask_ratios)

    def temperature_of(self, i):
        """Temperature of pass i, counted from 0."""
        if self.end_temperature is None or self.passes == 1:
            return self.temperature
        done = i / (self.passes - 1)
        return (1 - done) * self.temperature + done * self.end_temperature    # exactly the end at the end


def default_config(model, iterations=15, use_sampler=None, prefix_only=True, revising=False, **changes):
    """What sample_simple.py does by default in so many iterations, with changes to fields of DecoderConfig.

    use_sampler None: wherever the model has a sampler head. With it the text is written from left to right by the head
    and checked by the trunk as far as the iterations go (speculative.py), or, with corrections or a temperature that
    changes, in blocks; without it, and where the trunk did not learn to read text from left to right, in interleaved
    order. It is not revised: at real text's diversity nothing tried that revises is as likely.
    revising: the first pass writes everything, the others remask and refill. Text that is given elsewhere than as a
    prefix (prefix_only False) is filled in as wavefronts and revised. The critic orders what the head filled, for it
    learned from that; without the head confidence does.
    """
    use_sampler = model.sampler_head is not None if use_sampler is None else use_sampler
    config = DecoderConfig(
        use_sampler=use_sampler, order='critic' if use_sampler and model.critic_head is not None else 'confidence',
        mask_ratios=tuple(linear_ratios(iterations, *default_ratios(iterations))), temperature=0.8)
    if prefix_only and not revising:
        changing = changes.get('corrections') or changes.get('end_temperature') is not None
        from_left = 'blocks' if changing else 'speculative'
        config.plan = from_left if use_sampler and model.reads_text else 'interleaved'
        config.plan_passes, config.mask_ratios = iterations, ()
    elif prefix_only and use_sampler:
        config.plan = 'left-to-right'
    return replace(config, **changes)


def default_ratios(iterations):
    """Share remasked after the first and before the last pass, by default: few passes have less time to start over."""
    return (0.7, 0.1) if iterations < 8 else (0.95, 0.05)


def linear_ratios(iterations, start, end):
    """Masking ratios after each of the iterations but the last, from start to end: a list of iterations - 1."""
    if iterations <= 2:
        return [start][:iterations - 1]
    return [start + (end - start) * i / (iterations - 2) for i in range(iterations - 1)]


# -----------------------------------------------------------------------------
# remasking

def highest(score, candidates, n):
    """The n (B,) highest-scored of each sequence's candidates (B, T) bool; score (B, T). Returns (B, T) bool."""
    rank = score.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return candidates & (rank < n[:, None])


def within_reach(mask, reach):
    """Positions of mask (B, T) bool and those up to reach beside them."""
    return F.max_pool1d(mask.float(), 2 * reach + 1, stride=1, padding=reach) > 0


def positions_to_remask(config, i, score, mask, free, sequences, positions):
    """The positions that are masked again after pass i.

    score (B, T) float in [0, 1], high for tokens to remask; mask (B, T) bool, positions filled in this pass; free
    (B, T) bool, all but given text. As MaskGIT does, the lowest log(1 - score) + strength * Gumbel are remasked, with a
    strength that falls to 0. Random order goes by the noise alone, and as ReMDM does with a capped sigma, remask_kept,
    it remasks that share of what was kept, rounded by lot, or what the ratio leaves of it. Returns (B, T) bool.
    """
    candidates = free if config.revise and config.order != 'random' else mask
    noise = gumbel(uniform(config.seed, ORDER, sequences, i, positions, score.device))
    keep = noise
    if config.order != 'random':
        strength = config.randomness_strength * (1 - (i + 1) / config.passes)
        keep = torch.log1p(-score.clamp(max=1 - 1e-12)) + strength * noise
    if config.threshold > 0:
        return candidates & (-torch.expm1(keep) > config.threshold)
    n = (config.mask_ratios[i + 1 - config.plan_passes] * free.sum(1)).round()
    if config.order == 'random' and config.remask_kept and config.revise:
        kept, u = free & ~mask, uniform(config.seed, KEPT, sequences, i, range(1), score.device)[:, 0]
        n_kept = (config.remask_kept * kept.sum(1) + u).floor()
        n_kept = n_kept.minimum(n).maximum(n - mask.sum(1))    # the rest is of what was filled, as far as that goes
        return highest(-keep, kept, n_kept) | highest(-keep, mask, n - n_kept)
    return highest(-keep, candidates, n)


# -----------------------------------------------------------------------------
# the loop over passes, and over windows

WANTED = ('hidden', 'remask_score', 'p_generated')    # what costs time and is made for who wants it


@dataclass
class Decoded:
    x: torch.Tensor               # (B, T) ids without masks
    p_generated: torch.Tensor     # (B, T) the critic's chance that a token was generated; 0 where given; or None
    passes: int                   # forward passes made
    waves: int                    # sequential steps of filling


def make_filler(model, config):
    """Who fills in this decoding. What it computes of the weights serves every window until they change."""
    return HeadFiller.of(model) if config.use_sampler else NaiveFiller(model)


@torch.no_grad()
def decode_window(model, x, free, config, sequences, positions, on_pass=None, filler=None, wanted=()):
    """Fill the free positions of a window in config.passes forward passes or fewer.

    x (B, T) ids, of which the free ones are ignored; free (B, T) bool; sequences (B,) and positions (T,) int name them
    to the noise. on_pass is called with a dict after every pass. filler: of make_filler, None makes one. wanted: some
    of WANTED, 'hidden' (the trunk's view) and 'remask_score' for on_pass, 'p_generated' in the Decoded that is
    returned. While a plan is followed and no score is wanted, a pass does not wait for the device; a speculative one
    waits once.
    """
    assert set(wanted) <= set(WANTED), f'wanted {wanted}, there are {WANTED}'
    filler, plan, uneven = filler or make_filler(model, config), None, False
    named = tuple(numbers(values, x.device) for values in (sequences, positions))    # copied once
    x = torch.where(free, model.mask_id, x)
    if config.plan != 'wavefront' and free.any():    # the wavefront's own order is that of every fill
        given = not free.all()
        plan = make_plan(config.plan, x.size(1), config.plan_passes, config.seed, sequences,
                         free=free if given else None, device=x.device)
        if plan.speculative_passes:
            return decode_speculatively(model, x, free, plan, config, named[0], positions, on_pass, filler, wanted)
        if plan.lanes:    # the last segments may be given; other plans differ from sequence to sequence
            config = replace(config, plan_passes=int(plan.pass_of[free].max()) + 1)
        uneven = not plan.lanes and (given or config.plan_passes > x.size(1))
    window, passes, waves = Window(model, x, free, config, plan, filler, named), 0, 0
    for i in window.passes_to_make(uneven):
        # 1. one forward pass, 2. fill what is masked and correct it, 3. mask the worst again, once the plan is through
        xt, mask, later, last = window.read(i)
        wave, steps, corrected = window.fill(i, mask, later, last, rescored='remask_score' in wanted)
        remasked = window.remask(i, mask, later)
        if on_pass:
            also = {'hidden': lambda: window.hidden.clone(), 'remask_score': lambda: torch.where(free, window.score, 0)}
            on_pass({'pass': passes, 'start': positions[0], 'xt': xt, 'x': window.x, 'wave': wave, 'remasked': remasked,
                     'corrected': corrected}
                    | {name: value() for name, value in also.items() if name in wanted})
        passes, waves = passes + 1, waves + steps
        if window.is_finished(i, remasked):
            break
    p_generated = p_generated_of(model, window.x, free, window.hidden) if 'p_generated' in wanted else None
    return Decoded(window.x, p_generated, passes, waves)


class Window:
    """A window of text while it is decoded, and the steps of a pass over it.

    x (B, T) ids; unknown (B, T) bool, what is masked; hidden (B, T, C) the trunk's view of each position from when it
    was last masked; score (B, T), high for tokens to remask, and stale (B, T) bool, where it is out of date; busy, the
    sequences that have masks. named: the numbers of sequences (B,) and positions (T,) for the noise.
    """

    def __init__(self, model, x, free, config, plan, filler, named):
        self.model, self.x, self.free, self.config, self.filler, self.named = model, x, free, config, filler, named
        self.plan, self.unknown, self.hidden, self.busy = plan, free, 0, range(len(x))
        self.score, self.stale = exact(torch.zeros_like(x)), torch.zeros_like(free)
        self.reach = max(filler.reach, model.critic_head.reach if config.order == 'critic' else 0)
        self.corrections = config.corrections if config.use_sampler else 0    # a marginal is no better drawn again
        self.reader = model.reader(*x.shape) if plan is not None and plan.blockwise else None
        self.state = None    # the head's recurrent state behind what is filled from left to right

    def passes_to_make(self, uneven):
        """Numbers of the passes; where they are uneven, without those that would neither fill nor remask anything."""
        passes = range(self.config.passes)
        if not uneven:
            return passes
        fills = set(self.plan.pass_of[self.free].unique().tolist())
        return [i for i in passes if i in fills or i >= self.config.plan_passes or self.remasks(i)]

    def planned(self, i):
        return self.plan is not None and i < self.config.plan_passes

    def remasks(self, i):
        return self.config.plan_passes <= i + 1 < self.config.passes

    def read(self, i):
        """The forward pass: the trunk reads what is there, and what was masked gets its view.

        Returns ids as the trunk reads them; what this pass fills and what the plan leaves to later ones, (B, T) bool;
        and the trunk's state at the last token before a block (B, C), or None.
        """
        xt, last, B = torch.where(self.unknown, self.model.mask_id, self.x), None, len(self.x)
        if self.planned(i) and self.plan.blockwise:
            (lane,) = self.plan.lanes[i]
            block, now = slice(lane.start, lane.end), self.unknown[:, lane.start:lane.end, None]
            read, last = self.reader.read_block(xt, lane.start, lane.end)
            self.hidden = self.hidden if i else read.new_zeros(*self.x.shape, read.size(-1))
            self.hidden[:, block] = torch.where(now, read, self.hidden[:, block])
        elif len(self.busy) == B:
            self.hidden = torch.where(self.unknown[..., None], self.model(xt), self.hidden)
        else:
            now, before = self.unknown[self.busy, :, None], self.hidden[self.busy]
            self.hidden = self.hidden.index_copy(0, self.busy, torch.where(now, self.model(xt[self.busy]), before))
        mask = self.unknown & (self.plan.pass_of == i) if self.planned(i) else self.unknown
        return xt, mask, self.unknown & ~mask, last

    def fill(self, i, mask, later, last, rescored):
        """Fill the positions of mask (B, T), then resample the worst of them, which costs no forward pass.

        rescored: somebody wants the scores. Returns in which wave each position was filled (B, T), the number of waves,
        and what was resampled (B, T) bool.
        """
        config, waves, corrected = self.config, 0, torch.zeros_like(mask)
        wave_of, draw = torch.zeros_like(self.x), (config.temperature_of(i), config.top_p)
        for j in range(1 + self.corrections):
            filled, stream, step = mask, TOKENS, i
            if j:
                share = config.correction_ratio * (self.corrections + 1 - j) / self.corrections
                filled = highest(self.score, mask, (share * mask.sum(1)).round())
                stream, step = CORRECTIONS, i * self.corrections + j - 1
                corrected = corrected | filled
            u = uniform(config.seed, stream, self.named[0], step, self.named[1], self.x.device)
            before, masked = self.x, torch.where(later | filled, self.model.mask_id, self.x)
            if j:
                known = torch.where(later, self.model.mask_id, self.x)
                self.x, wave, made = self.filler.correct(known, filled, self.hidden, u, *draw)
            elif self.planned(i) and self.plan.lanes and config.use_sampler:
                self.x, wave, made, self.state = self.filler.fill_from_left(
                    masked, filled, self.hidden, last, self.plan.lanes[i], u, *draw, self.state)
            else:
                order = self.plan.wave_of if self.planned(i) else None
                self.x, wave, made = self.filler.fill(masked, filled, self.hidden, u, *draw, order)
            wave_of = torch.where(filled, waves + wave, wave_of)
            waves += made
            # what was filled is rescored, or has another neighbour than before, when somebody asks
            changed = within_reach(filled & (self.x != before), self.reach) if i or j else filled
            self.stale = self.stale | filled | changed
            if rescored or self.remasks(i) or j < self.corrections:
                self.rescore(later)
        self.state = None if self.corrections else self.state    # it has read tokens that were resampled since
        return wave_of, waves, corrected

    def rescore(self, later):
        at = (self.free & ~later & self.stale).nonzero(as_tuple=True)
        self.score[at] = score_at(self.model, self.filler, self.config, self.x, self.hidden, at)
        self.stale = torch.zeros_like(self.stale)

    def remask(self, i, mask, later):
        """What is masked in the next pass, (B, T) bool: what the plan has left, or behind it the worst."""
        self.unknown = later
        if self.remasks(i):
            self.unknown = positions_to_remask(self.config, i, self.score, mask, self.free, *self.named)
            if not self.planned(i):    # a finished sequence stays so, whatever the others do
                self.unknown = self.unknown & mask.any(1, keepdim=True)
        return self.unknown

    def is_finished(self, i, remasked):
        """Is nothing masked any more? While a plan is followed more is to come, and the device is not asked."""
        if i + 1 < self.config.plan_passes:
            return False
        self.busy = remasked.any(1).nonzero()[:, 0]
        return not len(self.busy)


def decode_speculatively(model, x, free, plan, config, sequences, positions, on_pass, filler, wanted):
    """decode_window where speculative.py writes everything: x (B, T) ids, [MASK] where free.

    ValueError for settings that it has no use for.
    """
    if not config.use_sampler or config.mask_ratios or config.corrections or config.end_temperature is not None:
        raise ValueError(f'the speculative plan needs the sampler head and one temperature, and never revises or '
                         f'corrects; found {config}')
    u = torch.stack([uniform(config.seed, stream, sequences, 0, positions, x.device)
                     for stream in (TOKENS, ACCEPTED, REPLACED)])

    def on_draft(step):
        hidden = step.pop('hidden')
        if 'remask_score' in wanted:
            at, score = (free & (step['x'] != model.mask_id)).nonzero(as_tuple=True), exact(torch.zeros_like(x))
            score[at] = score_at(model, filler, config, step['x'], hidden, at)
            step['remask_score'] = score
        if 'hidden' in wanted:
            step['hidden'] = hidden
        on_pass(step | {'start': positions[0]})
    text, hidden, passes, steps = speculative.write(model, filler, x, free, plan.lanes[0][0].start, config, u,
                                                    on_draft if on_pass else None)
    return Decoded(text, p_generated_of(model, text, free, hidden) if 'p_generated' in wanted else None, passes, steps)


def score_at(model, filler, config, x, hidden, at):
    """What config.order remasks by, (N,) float in [0, 1], high first: of tokens of x (B, T) at sequences, positions."""
    prob = filler.rescore(x, at, hidden, margin if config.order == 'margin' else probability)
    if config.order == 'critic':
        return remask_score(prob, model.critic_head(hidden, x, at, model.wte.weight))
    return 1 - prob


def p_generated_of(model, x, free, hidden):
    """The critic's chance that tokens of x (B, T) were generated, 0 where given; None without a critic."""
    if model.critic_head is None:
        return None
    at, p = free.nonzero(as_tuple=True), exact(torch.zeros_like(x))
    p[at] = torch.sigmoid(exact(model.critic_head(hidden, x, at, model.wte.weight)))
    return p


def windows(length, block_size):
    """(start, end) of the windows that cover a sequence; each overlaps the one before by block_size // 4 or more."""
    spans = [(0, min(length, block_size))]
    while spans[-1][1] < length:
        end = min(length, spans[-1][1] + block_size - block_size // 4)
        spans.append((end - block_size, end))
    return spans


def from_nothing(model, length, config, sequences):
    """Decoded sequences of length tokens, none of which is given; sequences (B,) int, their numbers for the noise."""
    x = torch.full((len(sequences), length), model.mask_id, device=model.wte.weight.device)
    return generate(model, x, torch.ones_like(x, dtype=torch.bool), config, sequences)


def generate(model, x, free, config, sequences, on_pass=None, wanted=()):
    """Fill the free positions of sequences of any length, in overlapping windows, each given the end of the one before.

    x (B, L) ids, of which the free ones are ignored; free (B, L) bool; sequences (B,) int, their numbers for the noise;
    on_pass, wanted: see decode_window. Returns Decoded, its counts summed over windows.
    """
    x, free, passes, waves = x.clone(), free.clone(), 0, 0
    judged = 'p_generated' in wanted and model.critic_head is not None
    p_generated = exact(torch.zeros_like(x)) if judged else None
    filler = make_filler(model, config)
    for start, end in windows(x.size(1), model.config.block_size):
        part = slice(start, end)
        if not free[:, part].any():
            continue
        done = decode_window(model, x[:, part], free[:, part], config, sequences, range(start, end), on_pass, filler,
                             wanted)
        if judged:
            p_generated[:, part] = torch.where(free[:, part], done.p_generated, p_generated[:, part])
        x[:, part], free[:, part] = done.x, False
        passes, waves = passes + done.passes, waves + done.waves
    return Decoded(x, p_generated, passes, waves)

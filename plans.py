"""Plans: in which forward pass and which wave each position is filled, decided before any token is drawn.

A decoder that follows a plan draws from a distribution whose likelihood is exact (likelihood.py). Those that choose
positions by what they drew, by confidence or by the critic, can only revise what a plan has filled.

Plans of one pass: wavefront (the most confident positions first, then outwards), left-to-right, fronts-N (N evenly
spaced starts, each going right). Of any number of passes: blocks (from left to right, inside them too), spans (blocks
in random order, each from both ends), interleaved (every K-th position, nested as van der Corput's sequence), random.
The plan speculative is left-to-right; which passes check what is drafted depends on the tokens (speculative.py).
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from choices import ANY_PASSES, ONE_PASS
from errors import InputError
from noise import POSITIONS, uniform
from sampler import wave_numbers


@dataclass(frozen=True)
class Lane:
    """A stretch of positions, start to end, filled from left to right by one who has read from read_from on."""
    start: int
    end: int
    read_from: int


@dataclass
class Plan:
    pass_of: torch.Tensor    # (B, T) int64 from 0; -1: given
    wave_of: torch.Tensor    # (B, T) int64; in wave 0 the language-model head fills, in later ones the sampler head
    lanes: list = None       # [[Lane]] of each pass, where filling is from left to right
    blockwise: bool = False    # the trunk reads text from left to right and the block behind it (blocks.py)
    speculative_passes: int = 0    # at most, of which all but the first check a draft; 0: not speculative

    @property
    def passes(self):
        return self.speculative_passes or int(self.pass_of.max()) + 1


def check_plan(name, passes):
    """InputError unless name is a plan that takes so many passes."""
    one_pass = name in ONE_PASS[:2] or is_fronts(name)
    if not one_pass and name not in ANY_PASSES:
        raise InputError(f'plan {name!r}, wanted one of {", ".join(ONE_PASS + ANY_PASSES)}')
    if one_pass and passes != 1:
        raise InputError(f'plan {name!r} takes one pass, found {passes}; {", ".join(ANY_PASSES)} take any number')


def is_fronts(name):
    start, _, n = name.partition('-')
    return start == 'fronts' and n.isdecimal() and len(n) < 10 and int(n) > 0


def fills_from_left(name):
    """Does this plan go from left to right, from the end of a given prefix on?"""
    return name in ('left-to-right', 'blocks', 'speculative') or is_fronts(name)


def segments_of(name, passes):
    """How many stretches a plan fills from left to right: one for each front, or for each pass."""
    return int(name.partition('-')[2]) if is_fronts(name) else passes


def reads_blockwise(name, passes, start):
    """Does the trunk read text from left to right and masks behind it, and so nothing that is given behind a mask?

    start: how many leading positions are given.
    """
    segments = segments_of(name, passes)
    return name == 'speculative' or name == 'blocks' and segments > 1 \
        or fills_from_left(name) and segments == 1 and start > 0


def make_plan(name, length, passes, seed=1337, sequences=(0,), first=None, free=None, device='cpu'):
    """The plan of a name: length T, passes K <= T; seed and sequences (B,) choose random ones; Plan of (B, T).

    first (B, T) bool: the positions that a wavefront begins with, which depend on the model (sampler.first_positions).
    free (B, T) bool: all but given text, beside which waves begin too; None: all is free. Filling from left to right
    begins behind a given prefix: ValueError unless that is equally long in every sequence.
    """
    check_plan(name, passes)
    start = given_prefix(free) if free is not None and fills_from_left(name) else 0
    B, at = len(sequences), torch.arange(length)
    passes = min(passes, length)
    pass_of, wave_of = torch.zeros(B, length, dtype=torch.int64), None
    if name == 'speculative':
        plan = make_plan('left-to-right', length, 1, sequences=sequences, free=free, device=device)
        return replace(plan, blockwise=True, speculative_passes=passes)
    if fills_from_left(name):
        plan = from_left(length, segments_of(name, passes), name == 'blocks', start)
        pass_of = plan.pass_of.expand(B, -1)
        if free is not None:
            pass_of = torch.where(free.cpu(), pass_of, -1)
        return replace(plan, pass_of=pass_of.to(device), wave_of=plan.wave_of.expand(B, -1).to(device))
    if name == 'wavefront':
        masked = torch.ones_like(first) if free is None else free.to(first.device)
        wave_of = wave_numbers(masked, first & masked.all(1, keepdim=True)).cpu().expand(B, -1)
    elif name == 'interleaved':
        order = at.expand(B, -1) if free is None else (free.cpu().cumsum(1) - 1).clamp(min=0)
        pass_of = van_der_corput(passes)[order % passes]
    else:
        n = length if name == 'random' else passes    # units that are put in random order
        u = uniform(seed, POSITIONS, sequences, 1, range(n))
        rank = u.argsort(1).argsort(1)
        pass_of = (rank * passes // n)[:, at * n // length]
    if free is not None:
        pass_of = torch.where(free.cpu(), pass_of, -1)
    if wave_of is None:
        wave_of = torch.zeros_like(pass_of)
        for k in range(passes):
            wave_of = torch.where(pass_of == k, run_waves(pass_of, k), wave_of)
    return Plan(pass_of.to(device), wave_of.to(device))


def given_prefix(free):
    """How many leading positions are given: free (B, T) bool. ValueError unless that is one number for all sequences.

    What a sequence becomes must not depend on the others, and filling from left to right begins behind the prefix.
    """
    lengths = free.float().argmax(1)[free.any(1)].unique().tolist()
    if len(lengths) != 1:
        raise ValueError(f'prefixes of {lengths} given tokens in one batch, wanted one length; decode them apart')
    return lengths[0]


def from_left(length, n, blockwise, start=0):
    """Plan (1, T) of n equal segments, each from left to right: one pass for each if blockwise, else one for all.

    The segments divide what lies behind start. Where the trunk has text before a single segment, it reads blockwise.
    """
    n, at = min(n, length - start), torch.arange(length)
    segment = ((at - start) * n // (length - start)).clamp(min=0)
    starts = torch.searchsorted(segment, torch.arange(n + 1)).clamp(min=start)
    offset = (at - starts[segment]).clamp(min=0)[None]
    bounds = list(zip(starts.tolist(), starts[1:].tolist()))
    if blockwise or n == 1:
        lanes = [[Lane(begin, end, 0)] for begin, end in bounds]
        return Plan(segment[None], offset, lanes, blockwise=n > 1 or start > 0)
    return Plan(torch.zeros_like(offset), offset, [[Lane(begin, end, begin) for begin, end in bounds]])


def run_waves(pass_of, k):
    """Waves of pass k: each run of its positions from its known ends inwards; pass_of (B, T) -> (B, T) int64.

    A run without a known neighbour begins at its left end, which the language-model head fills (wave 0).
    """
    now, known = pass_of == k, pass_of < k
    begins = now & ~F.pad(now, (1, 0))[:, :-1]
    number = begins.cumsum(1) * now                                    # of the run, 0 outside
    ends = now & (F.pad(known, (1, 0))[:, :-1] | F.pad(known, (0, 1))[:, 1:])
    has_end = torch.zeros(len(now), int(number.max()) + 1, dtype=torch.bool).scatter_reduce(1, number, ends, 'amax')
    first = begins & ~has_end.gather(1, number)
    return wave_numbers(now, first, wall=~(now | known)) * now


def van_der_corput(K):
    """The pass of each offset 0..K-1: bit-reversed order, so that every pass is spread as evenly as can be. (K,)"""
    bits = max(1, (K - 1).bit_length())
    order = [r for r in (int(f'{i:0{bits}b}'[::-1], 2) for i in range(2 ** bits)) if r < K]
    return torch.tensor(order).argsort()

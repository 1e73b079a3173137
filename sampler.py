"""The sampler head: fills masked positions wave after wave, each token conditioned on those just filled beside it.

The trunk predicts every masked position on its own: tokens drawn from those marginals in parallel do not fit together.
The head corrects the prediction at a position by the tokens around it, which the trunk may not have seen yet; where it
fills from left to right, by all that it has read on the left as well.
A wave fills every masked position that has a known direct neighbour. When a position is filled depends on the mask
alone, not on the tokens, so training can show each position exactly the neighbours that decoding will show it.

References: docs/sampler.md; ADJUST, a neighbour of this idea: https://arxiv.org/abs/2509.22738
"""
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F

from batches import spread_choice
from layers import norm


CHUNK = 32    # tokens that gradients of the recurrent state reach back at most
NEVER = 1 << 62    # later than any wave: beyond the ends nothing is ever known


def low_rank(n_in, n_out, rank, bias=True):
    """A linear map in two factors, for which a small head has no room otherwise."""
    return nn.Sequential(nn.Linear(n_in, min(rank, n_out), bias=False), nn.Linear(min(rank, n_out), n_out, bias=bias))


def uncast(hidden):
    """No autocast: a wave is many small products, and casting them would cost more than it saves."""
    return torch.autocast(hidden.device.type, enabled=False)


class LocalContext(nn.Module):
    """Features of a position from its hidden state and the tokens around it: the first, linear layer of a head.

    It is the sum of a projection of the hidden state and, for each offset, one row of a table over the vocabulary. In
    decoding the projections are computed ahead of the waves and the tables once per block.
    """

    def __init__(self, n_embd, width, offsets, n_code):
        super().__init__()
        self.register_buffer('offsets', torch.tensor(offsets), persistent=False)
        self.hidden_proj = low_rank(n_embd, width, rank=48)
        self.token_code = nn.Linear(n_embd, n_code, bias=False)
        self.neighbor_proj = nn.Linear(len(offsets) * n_code, width, bias=False)

    def codes(self, wte, ids):
        """Short codes (..., D) of tokens ids (...) from the embeddings wte (V, C); that of [MASK], the last, is 0."""
        return self.token_code(norm(wte.detach()[ids])) * (ids < len(wte) - 1)[..., None]

    def tables(self, wte, ids=None):
        """The tables of all offsets, stacked, over the vocabulary or over some ids (M,): (S * V, H) or (S * M, H)."""
        code = self.codes(wte, torch.arange(len(wte), device=wte.device) if ids is None else ids)
        weight = self.neighbor_proj.weight.view(-1, len(self.offsets), code.size(-1))    # (H, S, D)
        return torch.einsum('vd,hsd->svh', code, weight).flatten(0, 1).to(wte.dtype)

    def tables_for(self, wte, around):
        """Tables that cover the ids around (N, S), and those ids as rows of them: a large vocabulary is not tabled."""
        if len(wte) <= around.numel():
            return self.tables(wte), around
        ids, around = around.unique(return_inverse=True)
        return self.tables(wte, ids), around

    def forward(self, projected, around, tables):
        """projected (N, H) hidden states, around (N, S) ids, [MASK] for unknown -> features (N, H)."""
        S = len(self.offsets)
        offset_start = torch.arange(S, device=around.device) * (len(tables) // S)
        return projected.to(tables.dtype) + F.embedding_bag(around + offset_start, tables, mode='sum')


class SamplerHead(nn.Module):
    """Moves the hidden state of a position by what is known around it; the language-model head then reads it as usual.

    One gated layer (GEGLU, https://arxiv.org/abs/2002.05202), normalised before and after, on a sum of features: of the
    hidden state, of the tokens up to reach away, of the trunk's state at the last token before a block, and of a
    recurrent state (GRU) that has read the tokens on the left. The last two are 0 where filling is not from left to
    right. The trunk's view is scaled, for it and the tokens around are partly the same evidence. The output starts at
    zero and the scale at one, so the head starts as the trunk's own prediction.
    """

    def __init__(self, n_embd, reach, width, n_state):
        super().__init__()
        self.reach = reach
        offsets = [*range(-reach, 0), *range(1, reach + 1)]
        self.local = LocalContext(n_embd, width, offsets, n_code=16)
        self.last_proj = low_rank(n_embd, width, rank=32, bias=False)
        self.reader = nn.GRU(16, n_state, batch_first=True)
        self.state_proj = nn.Linear(n_state, width, bias=False)
        self.gate = nn.Linear(width, 2 * width)
        self.out = low_rank(width, n_embd, rank=64, bias=False)
        self.scale = nn.Linear(width, 1)
        for p in (self.out[1].weight, *self.scale.parameters()):
            nn.init.zeros_(p)

    def train(self, mode=True):
        """The GRU always stays in training mode, for cuDNN computes gradients in that mode alone.

        A head learns in evaluation mode too, beside a frozen trunk. The GRU has no dropout, so nothing else changes.
        """
        super().train(mode)
        self.reader.train()
        return self

    def project(self, hidden, last=None):
        """The part of the features that is known before any token is drawn: hidden, last (N, C) -> (N, H)."""
        projected = self.local.hidden_proj(hidden)
        return projected if last is None else projected + self.last_proj(last)

    def states(self, text, wte):
        """Recurrent state at each position, which has read the tokens on its left: text (B, T) ids -> (B, T, S).

        Gradients end CHUNK tokens back at the latest (truncated backpropagation through time): the text is read once
        for the states, then again for gradients, all chunks at once, in as few steps as a chunk has tokens.
        """
        (B, T), S = text.shape, self.reader.hidden_size
        if T == 1:
            return wte.new_zeros(B, 1, S)
        with uncast(wte):
            codes = self.local.codes(wte, text[:, :-1])
            if not torch.is_grad_enabled() or T - 1 <= CHUNK:
                read, _ = self.reader(codes)
            else:
                with torch.no_grad():
                    before, _ = self.reader(codes)
                before = F.pad(before[:, CHUNK - 1:T - 2:CHUNK], (0, 0, 1, 0))    # (B, n, S) behind the chunks before
                chunks = F.pad(codes, (0, 0, 0, -(T - 1) % CHUNK)).view(-1, CHUNK, codes.size(2))
                read, _ = self.reader(chunks, before.reshape(1, -1, S))
                read = read.reshape(B, -1, S)[:, :T - 1]
        return F.pad(read, (0, 0, 1, 0))    # 0: nothing read

    def read(self, token_gates, state_gates, state):
        """Recurrent state (N, S) after one more token: what the token and the state before it (N, S) say to the gates.

        token_gates, state_gates (N, 3 S), biases included. Step by step what states does for a whole text.
        """
        sizes = 2 * state.size(1), state.size(1)
        (token_gates, token), (state_gates, before) = (z.split_with_sizes(sizes, 1) for z in (token_gates, state_gates))
        reset, update = (token_gates + state_gates).sigmoid_().chunk(2, 1)
        fresh = torch.addcmul(token, reset, before).tanh_()
        return torch.lerp(fresh, state, update)

    def forward(self, hidden, projected, around, tables, state=None):
        """hidden (N, C), projected (N, H), around (N, 2 * reach) ids, state (N, S) -> hidden states (N, C)."""
        features = self.local(projected, around, tables)
        if state is not None:
            features = features + self.state_proj(state)
        x = norm(F.gelu(norm(features)))
        gate, value = self.gate(x).chunk(2, -1)
        x = norm(x + F.gelu(gate) * value)
        return hidden * (1 + self.scale(x)) + self.out(x)


# -----------------------------------------------------------------------------
# order of filling

def wave_numbers(mask, first, wall=None):
    """The wave in which each position is filled: 0 known or first, then one more for each step away from those.

    mask (B, T) bool, True where masked; first (B, T) bool, masked positions that are filled before wave 1; wall (B, T)
    bool: positions that are neither known nor filled now, beyond which nothing is known. Of the last two positions of a
    gap, which would not see each other, the right one waits for the left. Returns (B, T) int64, 0 in walls; in a
    sequence where nothing is known every number is at least T.
    """
    B, T = mask.size()
    at = torch.arange(T, device=mask.device).expand(B, T)
    last = lambda found: torch.where(found, at, -T).cummax(1).values                       # at or left of a position
    following = lambda found: torch.where(found, at, 2 * T).flip(1).cummin(1).values.flip(1)
    known = ~mask | first if wall is None else ~(mask | wall) | first
    left, right = at - last(known), following(known) - at
    if wall is not None:
        left = torch.where(last(known) > last(wall), left, 2 * T)
        right = torch.where(following(known) < following(wall), right, 2 * T)
    wave = torch.minimum(left, right)
    wave = wave if wall is None else wave.masked_fill(wall, 0)
    meets = (wave[:, 1:] == wave[:, :-1]) & (wave[:, 1:] > 0)
    return torch.cat((wave[:, :1], wave[:, 1:] + meets), 1)


def first_positions(mask, score, ratio):
    """Where sequences that know no token begin: their highest-scored positions, a ratio of them, at least one.

    mask (B, T) bool; score (B, T) float; ratio in [0, 1]. Returns (B, T) bool, all False in other sequences.
    """
    B, T = mask.size()
    chosen = score.topk(max(1, round(ratio * T)), dim=1).indices
    first = torch.zeros_like(mask).scatter(1, chosen, True)
    return first & mask.all(1, keepdim=True)


def neighbors(x, at, offsets, beyond):
    """What stands beside positions: x (B, T), at: sequences and positions (N,), offsets (S,) -> (N, S).

    offsets: from -reach to reach; beyond: what is taken to stand before the first position and behind the last.
    """
    reach = len(offsets) // 2
    return padded_neighbors(F.pad(x, (reach, reach), value=beyond), at, offsets)


def padded_neighbors(padded, at, offsets):
    """As neighbors, of padded (B, T + 2 reach)."""
    sequences, positions = at
    return padded[sequences[:, None], positions[:, None] + len(offsets) // 2 + offsets]


def filled_before(x0, order, own, at, offsets, mask_id):
    """Neighbours (N, S) of positions that are filled before own (N,); [MASK] for the others.

    x0 (B, T) ids; order (B, T) int64: when each position is filled; at, offsets: as in neighbors.
    """
    known = neighbors(order, at, offsets, NEVER) < own[:, None]
    return torch.where(known, neighbors(x0, at, offsets, mask_id), mask_id)


# -----------------------------------------------------------------------------
# training

@dataclass
class SamplerExamples:
    """Positions that the sampler head learns from, and what it may know there."""
    hidden: torch.Tensor      # (N, C) the trunk's view
    targets: torch.Tensor     # (N,) clean ids
    around: torch.Tensor      # (N, 2 * reach) ids of the neighbours, [MASK] where not yet known
    last: torch.Tensor        # (N, C) the trunk's state at the last token before the block, else 0
    state_of: torch.Tensor    # (N,) which of the R * T positions of text has the recurrent state, -1 for none
    text: torch.Tensor        # (R, T) ids that the head reads from left to right
    total: int                # how many positions these are in the global batch


def together(parts):
    """All examples of parts, a list of SamplerExamples, as one."""
    shifts = [0, *accumulate(part.text.numel() for part in parts)]
    state_of = [torch.where(part.state_of < 0, -1, part.state_of + shift) for part, shift in zip(parts, shifts)]
    tensors = [f.name for f in fields(SamplerExamples) if f.name not in ('state_of', 'total')]
    return SamplerExamples(**{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors},
                           state_of=torch.cat(state_of), total=sum(part.total for part in parts))


def known_neighbors(x0, resample_mask, first, at, offsets, mask_id):
    """Neighbours of positions as decoding would know them, read from the clean sequence.

    x0 (B, T) ids; resample_mask (B, T) bool, to be filled; first (B, T) bool, those that the language-model head fills;
    at: sequences and positions (N,). A position that a wave fills sees what earlier waves filled; every other one is
    rescored, when all is filled. Returns (N, S) ids, [MASK] where not yet known.
    """
    wave = wave_numbers(resample_mask, first)
    own_wave = torch.where((resample_mask & ~first)[at], wave[at], NEVER - 1)
    return filled_before(x0, wave, own_wave, at, offsets, mask_id)


def sampler_examples(model, batch, blocks, n_sequences, generator, augment=True):
    """Examples from a batch, a diffusion.MaskedBatch, and from blocks, a diffusion.BlockBatch or None.

    The masked positions of half of n_sequences, as a wavefront fills them. And with augment what plain masks lack:
    - in every other one of these only some of the positions, often none, are to be filled: resampling and rescoring;
    - half as many blank sequences, as a wavefront fills them;
    - n_sequences blank ones filled from left to right, first those of the blocks;
    - the blocks, filled from left to right too, with the view that has read the text before them.
    The trunk reads one blank sequence for all, for to it they look alike. Sequences are chosen among the global batch,
    and the examples are those of the sequences here. generator: of CPU noise.
    """
    share, T, device = batch.share, batch.x0.size(1), batch.x0.device
    chosen = spread_choice(share.total, max(1, n_sequences // 2), generator)
    blank = spread_choice(share.total, max(1, len(chosen) // 2), generator) if augment else chosen[:0]
    blank_hidden = model(torch.full((1, T), model.mask_id, device=device))
    parts = [wavefront_examples(model, batch, chosen, blank, blank_hidden, generator, augment)]
    if not augment or T == 1:    # the first position is the language-model head's
        return parts[0]

    positions, hidden = torch.arange(1, T, device=device), blank_hidden[:, 1:]
    if blocks is not None:
        n_sequences -= blocks.share.total
        views = hidden.expand(len(blocks.x0), -1, -1)
        parts.append(from_left_examples(
            model, blocks.x0, torch.cat((positions, blocks.positions)), torch.cat((views, blocks.hidden), 1),
            torch.cat((torch.zeros_like(views), blocks.last), 1), blocks.share.total))
    if n_sequences > 0:
        read = spread_choice(share.total, n_sequences, generator)
        own = batch.x0[share.of(read)[1].to(device)]
        views = hidden.expand(len(own), -1, -1)
        parts.append(from_left_examples(model, own, positions, views, torch.zeros_like(views), len(read)))
    return together(parts)


def wavefront_examples(model, batch, chosen, blank, blank_hidden, generator, augment):
    """The masked positions of chosen sequences, and those of blank ones, as a wavefront fills them.

    chosen, blank: numbers in the global batch.
    """
    T, device = batch.x0.size(1), batch.x0.device
    total = int(batch.all_masks[chosen].sum()) + len(blank) * T
    whole = torch.ones(len(chosen), T, dtype=torch.bool)    # is filled
    if augment:
        share = torch.rand(len(chosen), 1, generator=generator) - 0.3    # below 0 nothing is filled
        part = torch.rand(len(chosen), T, generator=generator) < share
        odd = torch.arange(len(chosen)) % 2 == torch.randint(2, (), generator=generator)
        whole = part | odd[:, None]
    (which, chosen), (_, blank) = batch.share.of(chosen), batch.share.of(blank)
    filled, chosen, blank = whole[which].to(device), chosen.to(device), blank.to(device)
    x0 = batch.x0[torch.cat((chosen, blank))]
    all_blank = torch.ones(len(blank), T, dtype=torch.bool, device=device)
    mask = torch.cat((batch.mask[chosen], all_blank))
    hidden = torch.cat((batch.hidden[chosen], blank_hidden.expand(len(blank), -1, -1)))
    resample_mask = mask & torch.cat((filled, all_blank))
    with uncast(blank_hidden):    # as the decoder reads it
        score = confidence(model.lm_head(blank_hidden)).expand(mask.shape)
    first = first_positions(resample_mask, score, model.config.sampler_min_neighbors_ratio)
    around = known_neighbors(x0, resample_mask, first, mask.nonzero(as_tuple=True), model.sampler_head.local.offsets,
                             model.mask_id)
    return SamplerExamples(hidden[mask], x0[mask], around, torch.zeros_like(hidden[mask]),
                           torch.full_like(x0[mask], -1), x0[:0], total)


def from_left_examples(model, text, positions, hidden, last, n_global):
    """Positions (M,) of every sequence of text (R, T), filled from left to right: hidden, last (R, M, C).

    n_global: how many sequences they are in the global batch.
    """
    (R, T), head = text.shape, model.sampler_head
    sequences, at = torch.arange(R, device=text.device).repeat_interleave(len(positions)), positions.repeat(R)
    around = neighbors(text, (sequences, at), head.local.offsets, model.mask_id)
    around = torch.where(head.local.offsets < 0, around, model.mask_id)
    return SamplerExamples(hidden.flatten(0, 1), text[sequences, at], around, last.flatten(0, 1), sequences * T + at,
                           text, n_global * len(positions))


def confidence(logits):
    """Log-probability of the likeliest token: logits (..., V) -> (...)."""
    return logits.amax(-1) - logits.logsumexp(-1)


def sampler_loss(head, examples, wte):
    """Cross-entropy of the head on SamplerExamples, nats, averaged; its gradient reaches the head alone. wte (V, C)."""
    if not len(examples.targets):
        return examples.hidden.new_zeros(())
    hidden = examples.hidden.detach()
    tables, around = head.local.tables_for(wte, examples.around)
    state = None
    if len(examples.text):
        states = head.states(examples.text, wte).flatten(0, 1)
        state = F.pad(states, (0, 0, 0, 1))[examples.state_of]    # -1: nothing read
    adjusted = head(hidden, head.project(hidden, examples.last.detach()), around, tables, state)
    return F.cross_entropy(F.linear(adjusted, wte[:-1].detach()).float(), examples.targets)

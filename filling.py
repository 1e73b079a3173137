"""Who fills masked positions within a forward pass: the sampler head wave after wave, or naive decoding at once.

A step of the sampler head is small and there are many, so all that needs no drawn token is done ahead of them: indices
of all steps, products of weights alone, the part of logits and features that comes from the trunk.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from noise import pieces, probability, sample
from sampler import confidence, first_positions, gather_neighbors, pad, uncast, wave_numbers


class Naive:
    """Fills every masked position from its own marginal; the methods are those of Wavefront."""
    reach = 0    # a token's probability depends on no neighbour

    def __init__(self, model):
        self.lm_head, self.vocab_size = model.lm_head, model.mask_id

    def fill(self, xt, mask, hidden, u, temperature, top_p, wave=None):
        x, at = xt.clone(), mask.nonzero(as_tuple=True)
        for part in pieces(len(at[0]), self.vocab_size):
            now = at[0][part], at[1][part]
            x[now] = sample(self.lm_head(hidden[now]), u[now], temperature, top_p)
        return x, torch.zeros_like(xt), 1

    def rescore(self, x, at, hidden):
        parts = [(at[0][part], at[1][part]) for part in pieces(len(at[0]), self.vocab_size)]
        return torch.cat([probability(self.lm_head(hidden[now]), x[now]) for now in parts])


class Neighbors(nn.Module):
    """In place of sampler.LocalContext in decoding: one table per offset, made once, or codes of a large vocabulary."""

    def __init__(self, local, wte, tabled):
        super().__init__()
        S, V = len(local.offsets), len(wte)
        self.codes = local.codes(wte, torch.arange(V, device=wte.device))    # (V, D)
        self.weight = local.neighbor_proj.weight.T                           # (S * D, H)
        self.tables = local.tables(wte) if tabled else None
        self.starts = torch.arange(S, device=wte.device) * V

    def forward(self, projected, around, _):
        """projected (N, H), around (N, n) ids at the first n offsets -> features (N, H)."""
        if self.tables is None:
            codes = self.codes[around].flatten(1)
            return torch.addmm(projected, codes, self.weight[:codes.size(1)])
        return projected + F.embedding_bag(around + self.starts[:around.size(1)], self.tables, mode='sum')


class Wavefront:
    """Fills masked positions with the sampler head; what depends on weights alone is computed here, once.

    A view is what the trunk says of a position: its logits where they are fewer than the hidden state's channels, for
    then the output matrix is multiplied with the embeddings and the head moves logits; else the hidden state. Tables of
    a vocabulary of more than max_tabled tokens would fill the memory.
    """
    max_tabled = 8192

    @torch.no_grad()
    def __init__(self, model):
        self.head, self.wte, self.lm_head = model.sampler_head, model.wte.weight, model.lm_head
        self.first_ratio, self.reach = model.config.sampler_min_neighbors_ratio, model.sampler_head.reach
        self.mask_id, self.unembedding = model.mask_id, model.unembedding
        head, reader = self.head, self.head.reader
        tabled = len(self.wte) <= self.max_tabled
        self.moves_logits = self.mask_id <= self.wte.size(1)
        with uncast(self.wte):
            # the head with other first and last layers: its own forward computes what is between
            local = Neighbors(head.local, self.wte, tabled)
            self.fast_head = copy.copy(head)
            self.fast_head._modules = head._modules | {'local': local, 'state_proj': nn.Identity()}
            if self.moves_logits:
                out = nn.Linear(head.out[0].in_features, self.mask_id, bias=False, device='meta')
                out.weight = nn.Parameter(self.unembedding @ head.out[1].weight @ head.out[0].weight, False)
                self.fast_head._modules['out'] = out
            # the recurrent state is read twice, as features and for the next state: one product
            self.state_weight = torch.cat((head.state_proj.weight, reader.weight_hh_l0))
            self.state_bias = F.pad(reader.bias_hh_l0, (len(head.state_proj.weight), 0))
            self.token_gates = F.linear(local.codes, reader.weight_ih_l0, reader.bias_ih_l0) if tabled else None

    def fill(self, xt, mask, hidden, u, temperature, top_p, wave=None):
        """Fill the positions of mask.

        xt, mask (B, T); hidden (B, T, C); u (B, T) uniform; wave (B, T) int64: when each position is filled, None for
        the wavefront's own order. Returns x (B, T); wave (B, T), 0 for known positions and for first ones, which the
        language-model head fills; and the number of sequential steps. Each position costs one evaluation of the head,
        however many waves there are. First positions are drawn at temperature 1 (unless it is 0): cooler ones would
        begin every sequence alike.
        """
        T, reach = xt.size(1), self.reach
        with uncast(hidden):
            if wave is None:
                wave = wave_numbers(mask, self.first(mask, hidden))
            flat = mask.flatten().nonzero()[:, 0]
            number, order = wave.flatten()[flat].sort(stable=True)
            sequences, positions = flat[order] // T, flat[order] % T
            sizes = number.bincount(minlength=1).tolist()    # the last wait for the device: waves run on without any
            hidden, u = hidden[sequences, positions], u[sequences, positions]
            view, projected = self.view(hidden), self.head.project(hidden)
            x = pad(xt, reach, self.mask_id)
            start = 0
            for number, size in enumerate(sizes):
                now = slice(start, start + size)
                at = sequences[now], positions[now]
                if number == 0:
                    drawn = self.draw(view[now], u[now], 1.0 if temperature else 0.0, top_p)
                else:
                    drawn = self.draw(view[now], u[now], temperature, top_p, projected[now], self.around(x, at))
                x[at[0], at[1] + reach] = drawn    # when the wave is done: its positions do not see each other
                start += size
        return x[:, reach:reach + T], wave, sum(size > 0 for size in sizes)

    def fill_from_left(self, xt, mask, hidden, last, lanes, u, temperature, top_p, state=None):
        """Fill the positions of mask from left to right, in every lane at once.

        xt, mask (B, T); hidden (B, T, C); last (B, C) the trunk's state before the lanes, or None; lanes: a plans.Lane
        for each stretch to fill; state (B * n, S): the head's recurrent state before the n lanes, None to read the
        text. Returns as fill, and the state behind the lanes. Every sequence and lane takes each step: nothing waits
        for the device, and no shape depends on what is drawn.
        """
        (B, T), n, reach, device = xt.shape, len(lanes), self.reach, xt.device
        with uncast(hidden):
            if state is None:
                read = [F.pad(xt[:, lane.read_from:lane.start], (0, 1)) for lane in lanes]
                state = torch.stack([self.head.states(text, self.wte)[:, -1] for text in read], 1).flatten(0, 1)
            # 1. what all steps need that no draw decides, (steps, B * n, ...) each
            starts, ends = (torch.tensor([getattr(lane, name) for lane in lanes]) for name in ('start', 'end'))
            steps = max(lane.end - lane.start for lane in lanes)
            position = starts + torch.arange(steps)[:, None]    # (steps, n), beyond the end of a shorter lane too
            inside = (position < ends).repeat(1, B).to(device)
            position = position.minimum(ends - 1).repeat(1, B).to(device)
            sequence = torch.arange(B, device=device).repeat_interleave(n)
            at = sequence * T + position
            given, fills, u, hidden = (z.flatten(0, 1)[at] for z in (xt, mask, u, hidden))
            fills = fills & inside
            view, projected = self.view(hidden), self.head.project(hidden, None if last is None else last[sequence])
            # text with masks before it, and a last column that nothing reads, for lanes that have ended
            x = F.pad(F.pad(xt, (reach, 0), value=self.mask_id), (0, 1))
            row = sequence * x.size(1) + reach
            around = (row + position)[..., None] + self.head.local.offsets[:reach]
            column = row + torch.where(inside, position, T)
            flat = x.view(-1)
            # 2. the steps: the first position is the language-model head's
            nothing_read = lanes[0].read_from == lanes[0].start
            planned = (view, u, projected, around, fills, given, column)
            for t, (view, u, projected, around, fills, given, column) in enumerate(zip(*map(torch.unbind, planned))):
                from_state, state_gates = F.linear(state, self.state_weight, self.state_bias).split(
                    (projected.size(1), 3 * state.size(1)), 1)
                if t:
                    drawn = self.draw(view, u, temperature, top_p, projected, flat[around], from_state)
                else:
                    drawn = self.draw(view, u, 1.0 if temperature and nothing_read else temperature, top_p)
                ids = torch.where(fills, drawn, given)
                flat[column] = ids
                state = self.head.read(self.gates_of(ids), state_gates, state)
            at = torch.arange(T, device=device)
            wave = mask * sum((at - lane.start) * ((at >= lane.start) & (at < lane.end)) for lane in lanes)
        return x[:, reach:reach + T], wave, steps, state

    def gates_of(self, ids):
        """What tokens (N,) say to the gates of the recurrent state, (N, 3 S)."""
        if self.token_gates is None:
            reader = self.head.reader
            return F.linear(self.fast_head.local.codes[ids], reader.weight_ih_l0, reader.bias_ih_l0)
        return self.token_gates[ids]

    def first(self, mask, hidden):
        """Where blank sequences begin, their most confident positions: mask (B, T), hidden (B, T, C) -> (B, T) bool."""
        score = torch.zeros(mask.shape, device=mask.device)
        blank = mask.all(1).nonzero()[:, 0]
        views = hidden[blank].flatten(0, 1)
        with uncast(hidden):
            found = [confidence(self.lm_head(views[part])) for part in pieces(len(views), len(self.wte))]
        score = score.index_copy(0, blank, torch.cat(found).view(-1, mask.size(1)))
        return first_positions(mask, score, self.first_ratio)

    def rescore(self, x, at, hidden):
        """Probability of tokens given their present neighbours on both sides.

        x (B, T) filled; at: sequences and positions (N,); hidden (B, T, C) as the trunk last saw each position masked,
        so this costs no forward pass. Returns (N,) float64.
        """
        with uncast(hidden):
            hidden = hidden[at]
            view, projected = self.view(hidden), self.head.project(hidden)
            around = self.around(pad(x, self.reach, self.mask_id), at)
            return torch.cat([probability(self.logits(view[part], projected[part], around[part]),
                                          x[at[0][part], at[1][part]]) for part in pieces(len(view), len(self.wte))])

    def around(self, padded, at):
        """Ids (N, 2 * reach) beside positions: padded (B, T + 2 reach), at: sequences and positions (N,)."""
        return gather_neighbors(padded, *at, self.head.local.offsets, self.reach)

    def view(self, hidden):
        """What the trunk says of positions, for the head to move: hidden (..., C) -> (..., V - 1 or C)."""
        return F.linear(hidden, self.unembedding) if self.moves_logits else hidden

    def logits(self, view, projected=None, around=None, from_state=None):
        """Logits (N, V - 1) float32 of the language-model head or, given projected, of the sampler head.

        view (N, V - 1 or C); projected, from_state (N, H); around (N, reach or 2 * reach) ids.
        """
        if projected is not None:
            view = self.fast_head(view, projected, around, None, from_state)
        return view.float() if self.moves_logits else self.lm_head(view)

    def draw(self, view, u, temperature, top_p, *rest):
        """Tokens (N,), some positions after the others where the vocabulary is large: as logits, and u (N,)."""
        parts = pieces(len(view), len(self.wte))
        if len(parts) == 1:
            return sample(self.logits(view, *rest), u, temperature, top_p)
        return torch.cat([sample(self.logits(view[part], *(None if z is None else z[part] for z in rest)), u[part],
                                 temperature, top_p) for part in parts])

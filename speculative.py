"""Speculative decoding: the sampler head drafts from left to right, the trunk reads the draft and keeps what stands.

One forward pass reads a whole draft as text, from left to right, and so tells the distribution of every next token. The
draft is kept up to the first token that this distribution and chance reject; that one is drawn anew and the head drafts
on from there. What is written is distributed as if every token had been drawn from the mixture of trunk and head, one
forward pass for each, however long the drafts are. When the passes are used up, the last draft stands unread.

    mixture = (p_trunk + p_head) / 2

The two err in different ways, and drafts of the head are kept more often by a mixture that it is a part of.

References:
speculative sampling: https://arxiv.org/abs/2211.17192, https://arxiv.org/abs/2302.01318
masked diffusion that checks its own drafts: https://arxiv.org/abs/2510.03929
"""
import math

import torch
import torch.nn.functional as F

from filling import small_products
from noise import exact, invert, pieces, weights
from sampler import uncast

DRAFT = 16, 32    # tokens of a draft: with passes enough, and with few, none of which is to end without a rejection


def draft_length(length, passes):
    """Tokens in the drafts of so many passes over length tokens."""
    enough, most = DRAFT
    return min(most, max(enough, 2 * math.ceil(length / passes)))


def mixture(trunk, head):
    """Log-probabilities (..., V) of the distribution halfway between those of two logits (..., V)."""
    log_probs = (torch.log_softmax(exact(logits), -1) for logits in (trunk, head))
    return torch.logaddexp(*log_probs) - math.log(2)


class Writer:
    """The text of B sequences while it is written, up to a place of its own in each.

    x (B, T) ids, of which the free ones (B, T) bool are [MASK]; start: before it all are given. read (B, T - start, C),
    last (B, C): what the trunk says of masks behind the given text, and of that text. u (3, B, T): uniform noise of
    the streams TOKENS, ACCEPTED and REPLACED. Every position has one number of each, so a text depends neither on the
    length of drafts nor, as far as it is checked, on the number of passes.
    """

    def __init__(self, filler, x, free, start, read, last, u, top_p):
        self.filler, self.u, self.top_p = filler, u, top_p
        (self.B, self.T), self.reach, self.S = x.shape, filler.reach, filler.head.reader.hidden_size
        self.rows = torch.arange(self.B, device=x.device)[:, None]
        self.padded = F.pad(x, (self.reach, self.T), value=filler.mask_id)    # drafts may go beyond the end
        self.free = F.pad(free, (0, self.T))
        self.view = F.pad(filler.view(read), (0, 0, start, 0))                                # (B, T, V - 1 or C)
        self.projected = F.pad(filler.head.project(read, last[:, None]), (0, 0, start, 0))    # (B, T, H)
        self.state = filler.head.states(F.pad(x[:, :start], (0, 1)), filler.wte)[:, -1]       # (B, S) of text behind
        self.final = torch.full_like(x[:, 0], start)    # (B,) how many tokens of each sequence will not change

    @property
    def text(self):
        """(B, T) ids."""
        return self.padded[:, self.reach:self.reach + self.T]

    def ahead(self, n):
        """The next n positions of each sequence, (B, n), and the same without those behind the end."""
        at = self.final[:, None] + torch.arange(n, device=self.final.device)
        return at, at.clamp(max=self.T - 1)

    def begin(self, temperature):
        """Write the first token, which the language-model head draws: it is final."""
        at = self.final
        view, u = self.view[self.rows[:, 0], at], self.u[0, self.rows[:, 0], at]
        token = self.put(at, self.filler.draw(view, u, temperature, self.top_p))
        self.state, self.final = self.after(self.state, token), at + 1

    def put(self, at, tokens):
        """Write tokens (B,) at positions (B,) unless text is given there; returns what stands there then."""
        now = self.rows[:, 0], at + self.reach
        self.padded[now] = torch.where(self.free[self.rows[:, 0], at], tokens, self.padded[now])
        return self.padded[now]

    def after(self, state, tokens):
        """The recurrent state (B, S) when it has read one more token (B,)."""
        gates = state @ self.filler.state_weight[:, -3 * self.S:] + self.filler.head.reader.bias_hh_l0
        return self.filler.head.read(self.filler.gates_of(tokens), gates, state)

    def draft(self, n, temperature):
        """The head writes the next n tokens of every sequence, fewer where the text ends."""
        filler, reach, (at, inside) = self.filler, self.reach, self.ahead(n)
        view, projected, u = (z[self.rows, inside].unbind(1) for z in (self.view, self.projected, self.u[0]))
        window = self.padded[self.rows, self.final[:, None] + torch.arange(reach + n, device=at.device)]
        fills, state, bias = self.free[self.rows, at].unbind(1), self.state, filler.head.reader.bias_hh_l0
        self.temperature, self.states, self.features = temperature, [state], []
        with torch.inference_mode():    # as filling.Wavefront.fill_from_left
            for t in range(n):
                features, gates = (state @ filler.state_weight).split_with_sizes((projected[0].size(1), 3 * self.S), 1)
                features = filler.features(projected[t], window[:, t:t + reach]) + features
                drawn = filler.draw(view[t], u[t], temperature, self.top_p, features)
                window[:, t + reach] = torch.where(fills[t], drawn, window[:, t + reach])
                state = filler.head.read(filler.gates_of(window[:, t + reach]), gates + bias, state)
                self.features.append(features)
                self.states.append(state)
        self.padded[self.rows, at + reach] = window[:, reach:]

    def check(self, logits, temperature):
        """Keep each draft up to the first token that is rejected, which is drawn anew.

        logits: of the trunk at positions of the draft, (N, V - 1), as a function of what chooses them of all B * n.
        Returns (B, T) bool, the tokens that were drawn anew.
        """
        n, rows = len(self.features), self.rows[:, 0]
        at, inside = self.ahead(n)
        tokens = self.padded[self.rows, at + self.reach]
        self.features = torch.stack(self.features, 1).flatten(0, 1)
        view = self.view[self.rows, inside].flatten(0, 1)

        def distributions(part):
            """What tokens of the draft should be drawn from, and what they were drawn from: (N, V - 1) float64 each."""
            head = self.filler.logits(view[part], self.features[part])
            target = weights(mixture(logits(part), head), temperature, self.top_p)
            drafted = weights(head, self.temperature, self.top_p)
            return [exact(z) / exact(z).sum(-1, keepdim=True) for z in (target, drafted)]
        # [MASK] stands behind the end, which is kept whatever it has
        ids = tokens.clamp(max=self.filler.mask_id - 1).flatten()
        p, q = torch.cat([torch.stack([z.gather(-1, ids[part, None])[:, 0] for z in distributions(part)])
                          for part in pieces(len(ids), self.filler.mask_id)], 1).unflatten(1, (-1, n))
        kept = (self.u[1, self.rows, inside] * q < p) | ~self.free[self.rows, at]
        n_kept = kept.cumprod(1).sum(1)
        rejected, first = n_kept < n, n_kept.clamp(max=n - 1)
        # what the target has more of than the draft; they differ where a token was rejected
        target, drafted = distributions(rows * n + first)
        anew = invert((target - drafted).clamp(min=0), self.u[2, rows, inside[rows, first]])
        where = at[rows, first]
        token = self.put(where, torch.where(rejected, anew, tokens[rows, first]))
        state = torch.stack(self.states, 1)[rows, n_kept]
        self.state = torch.where(rejected[:, None], self.after(state, token), state)
        self.final = (self.final + n_kept + rejected).clamp(max=self.T)
        changed = torch.zeros_like(self.free).index_put((rows, where), rejected)
        return changed[:, :self.T]


def write(model, filler, x, free, start, config, u, on_draft=None):
    """Fill the free positions from left to right, in config.plan_passes forward passes or fewer.

    x (B, T) ids; free (B, T) bool; start: how many leading tokens are given; u: see Writer. Returns x (B, T), the views
    of free positions (B, T, C) that the trunk had in the first pass, the forward passes made and the sequential steps.
    on_draft is called for every pass with a dict of (B, T): 'xt' the text, with masks where it is written anew, 'x'
    that with the draft, 'wave' when each token was written, 'remasked' what did not stand, 'corrected' what was drawn
    anew in place of a rejected token. How much of a draft stands is known in the pass after it.
    """
    at, T = torch.arange(x.size(1), device=x.device), x.size(1)
    reader = model.reader(*x.shape)
    unwritten, anew = free, torch.zeros_like(free)
    read, last = reader.read_block(torch.where(free, model.mask_id, x), start, T)
    hidden, passes, steps = F.pad(read, (0, 0, start, 0)), 1, 1
    with small_products(read):
        writer = Writer(filler, torch.where(free, model.mask_id, x), free, start, read, last, u, config.top_p)
        # with nothing read a cooler draw would begin every sequence alike
        writer.begin(1.0 if config.temperature and not start else config.temperature_of(0))
    while True:
        left = T - int(writer.final.min())    # waits for the device, once in a pass
        is_last = not left or passes == config.plan_passes
        step = {'wave': torch.where(unwritten, (at - writer.final[:, None] + 1).clamp(min=0), 0),
                'xt': torch.where(unwritten, model.mask_id, writer.text), 'corrected': anew}
        n = left if is_last else min(left, draft_length(T - start, config.plan_passes))
        if left:
            with small_products(read):
                writer.draft(n, config.temperature_of(passes - 1))
        step['x'], steps, unwritten = writer.text.clone(), steps + n, torch.zeros_like(free)
        if not is_last:
            behind = writer.ahead(n)[1] - 1    # each token of the draft is told by the state of the one before
            states = reader.read_at(step['x'][writer.rows, behind], writer.final - 1).flatten(0, 1)
            passes += 1
            with uncast(read):
                anew = writer.check(lambda part: reader.lm_head(states[part]), config.temperature_of(passes - 1))
            unwritten = free & (at >= writer.final[:, None]) | anew
        if on_draft:
            on_draft(step | {'remasked': unwritten}, hidden)
        if is_last:
            return step['x'], hidden, passes, steps

"""Speculative decoding: the sampler head drafts from left to right, the trunk reads the draft and keeps a part of it.

One forward pass reads a whole draft as text, from left to right, and so predicts every token of it. The draft is kept
up to the first token that speculative sampling rejects; that one is drawn anew, and the head drafts on from there. The
tokens that are checked are distributed as if each had been drawn from the mixture of trunk and head, one forward pass
after another, however long the drafts are:

    mixture = (p_trunk + p_head) / 2

The two err in different ways, and a mixture that the head is a part of rejects fewer of its drafts. The first token is
the language-model head's. When the passes are used up, the rest of the text is a draft that nobody has checked.

References:
speculative sampling: https://arxiv.org/abs/2211.17192, https://arxiv.org/abs/2302.01318
masked diffusion that checks its own drafts: https://arxiv.org/abs/2510.03929
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from filling import small_products
from noise import exact, invert, pieces, weights
from sampler import uncast

DRAFT = 16    # tokens


def mixture(trunk, head):
    """Log-probabilities of the distribution halfway between two, given as log-probabilities of the same shape."""
    return torch.logaddexp(trunk, head) - math.log(2)


@dataclass
class Draft:
    """What the head computed for the n tokens that it drafted, for their check."""
    features: torch.Tensor    # (B, n, H)
    states: torch.Tensor      # (B, n + 1, S) recurrent states before each token and after the last


class Writer:
    """Writes B sequences of T tokens, of each of which some tokens are final.

    x (B, T) ids; free (B, T) bool, to be written; start: all tokens before it are given. views (B, T - start, C), last
    (B, C): the trunk's views of masks after the given text, and its state at the last token of that. u (3, B, T):
    uniform noise for drafting, accepting and replacing. Every position has one number of each, so a text depends
    neither on the length of drafts nor, as far as it is checked, on the number of passes.
    """

    def __init__(self, filler, x, free, start, views, last, u, temperature, top_p):
        self.filler, self.u, self.temperature, self.top_p = filler, u, temperature, top_p
        (self.B, self.T), self.start, self.reach = x.shape, start, filler.reach
        self.row, self.S = torch.arange(self.B, device=x.device), filler.head.reader.hidden_size
        self.rows = self.row[:, None]
        self.padded = F.pad(x, (self.reach, self.T), value=filler.mask_id)    # a draft may go beyond the end
        self.free = F.pad(free, (0, self.T))
        self.view = F.pad(filler.view(views), (0, 0, start, 0))                                # (B, T, V - 1 or C)
        self.projected = F.pad(filler.head.project(views, last[:, None]), (0, 0, start, 0))    # (B, T, H)
        self.state = filler.head.states(F.pad(x[:, :start], (0, 1)), filler.wte)[:, -1]        # (B, S) before the next
        self.final = torch.full_like(x[:, 0], start)    # (B,) how many tokens of each sequence are final

    @property
    def text(self):
        """(B, T) ids."""
        return self.padded[:, self.reach:self.reach + self.T]

    def ahead(self, n):
        """The next n positions of each sequence (B, n), and the same with the last one in place of those beyond it."""
        at = self.final[:, None] + torch.arange(n, device=self.final.device)
        return at, at.clamp(max=self.T - 1)

    def put(self, at, tokens):
        """Write tokens (B,) at positions (B,) unless text is given there; returns what is there then."""
        now = self.row, at + self.reach
        self.padded[now] = torch.where(self.free[self.row, at], tokens, self.padded[now])
        return self.padded[now]

    def after(self, state, tokens):
        """The recurrent state (B, S) when it has read one more token (B,)."""
        gates = state @ self.filler.state_weight[:, -3 * self.S:] + self.filler.head.reader.bias_hh_l0
        return self.filler.head.read(self.filler.gates_of(tokens), gates, state)

    def begin(self):
        """Write the first token, as the language-model head draws it. It is final.

        With nothing read it is drawn at temperature 1, for a cooler one would begin every sequence alike.
        """
        at, temperature = self.final, self.temperature if self.start or not self.temperature else 1.0
        drawn = self.filler.draw(self.view[self.row, at], self.u[0, self.row, at], temperature, self.top_p)
        self.state, self.final = self.after(self.state, self.put(at, drawn)), at + 1

    def draft(self, n, is_checked):
        """The head writes the next n tokens of every sequence, fewer where the text ends.

        Returns the Draft if it is to be checked, else None.
        """
        filler, reach, (at, inside) = self.filler, self.reach, self.ahead(n)
        window = self.padded[self.rows, self.final[:, None] + torch.arange(reach + n, device=at.device)]
        fills = self.free[self.rows, at]
        window[:, reach:].masked_fill_(fills, filler.mask_id)    # where an earlier draft stands
        known = filler.features(self.projected[self.rows, inside].transpose(0, 1).flatten(0, 1),
                                window[:, :-1].unfold(1, reach, 1).transpose(0, 1).flatten(0, 1))
        view, given, fills, u = (z.transpose(0, 1) for z in (
            self.view[self.rows, inside], window[:, reach:], fills, self.u[0][self.rows, inside]))
        kept, keep = [], lambda features, state: kept.append((features, state))
        tokens, state = filler.write_from_left(known.unflatten(0, (n, -1)), [0], view, given, fills, u,
                                               self.temperature, self.top_p, self.state,
                                               on_step=keep if is_checked else None)
        self.padded[self.rows, at + reach] = torch.stack(tokens, 1)
        if not is_checked:
            return None
        features, states = (torch.stack(z, 1) for z in zip(*kept))
        return Draft(features, torch.cat((states, state[:, None]), 1))

    def check(self, draft, trunk_logits):
        """Keep each draft up to the first token that is rejected, and replace that one.

        trunk_logits(part): the trunk's logits (N, V - 1) at those of the B * n positions that part selects. Returns
        (B, T) bool, the tokens that were replaced.
        """
        n, mask_id = draft.features.size(1), self.filler.mask_id
        at, inside = self.ahead(n)
        tokens = self.padded[self.rows, at + self.reach]
        view, features = self.view[self.rows, inside].flatten(0, 1), draft.features.flatten(0, 1)

        def distributions(part):
            """From what a token should be drawn and from what it was drawn: float64 (N, V - 1) each."""
            head = self.filler.logits(view[part], features[part])
            target = mixture(*(torch.log_softmax(exact(z), -1) for z in (trunk_logits(part), head)))
            drawn_by = [exact(weights(z, self.temperature, self.top_p)) for z in (target, head)]
            return [z / z.sum(-1, keepdim=True) for z in drawn_by]

        def chances(part):
            """Of the tokens themselves, (2, N): [MASK] is beyond the end, where nothing is rejected."""
            ids = tokens.flatten()[part].clamp(max=mask_id - 1)
            return torch.stack([z.gather(-1, ids[:, None])[:, 0] for z in distributions(part)])
        target, drafted = torch.cat([chances(part) for part in pieces(self.B * n, mask_id)], 1).unflatten(1, (-1, n))
        kept = (self.u[1, self.rows, inside] * drafted < target) | ~self.free[self.rows, at]
        n_kept = kept.cumprod(1).sum(1)
        rejected, first = n_kept < n, n_kept.clamp(max=n - 1)

        place, flat = at[self.row, first], self.row * n + first
        u = self.u[2, self.row, inside[self.row, first]]
        drawn = torch.cat([replacement(*distributions(flat[part]), u[part]) for part in pieces(self.B, mask_id)])
        token = self.put(place, torch.where(rejected, drawn, tokens[self.row, first]))
        state = draft.states[self.row, n_kept]
        self.state = torch.where(rejected[:, None], self.after(state, token), state)
        self.final = (self.final + n_kept + rejected).clamp(max=self.T)
        return torch.zeros_like(self.free).index_put((self.row, place), rejected)[:, :self.T]


def replacement(target, drafted, u):
    """Tokens (N,) in place of rejected ones, from what the target has more of: (N, V - 1) probabilities, u (N,)."""
    excess = (target - drafted).clamp(min=0)
    return invert(torch.where(excess.any(-1, keepdim=True), excess, target), u)    # equal but for rounding: the target


def write(model, filler, x, free, start, config, u, on_draft=None):
    """Fill the free positions from left to right, in config.plan_passes forward passes or fewer.

    x (B, T) ids, [MASK] where free (B, T) bool; start: how many leading tokens are given; u: see Writer. Returns x
    (B, T), the trunk's views (B, T, C), the forward passes made and the sequential steps. A view is the trunk's state
    at the token before where it has checked a token, else that of masks after the given text.
    on_draft is called for every pass with a dict: 'pass' its number, and (B, T) each, 'xt' the text so far with masks
    where it is not final, 'x' that with the draft, 'wave' in which wave of the pass a token was written, 'remasked'
    what did not stand, 'corrected' what replaces rejected tokens, 'hidden' the views (B, T, C). How much of a draft
    stands is known in the pass after it.
    """
    at, T = torch.arange(x.size(1), device=x.device), x.size(1)
    reader = model.reader(len(x), T + DRAFT)
    views, last = reader.read_block(x, start, T)
    hidden, passes, steps = F.pad(views, (0, 0, start, DRAFT)), 1, 1    # a draft may go beyond the end
    open_positions, replaced = free, torch.zeros_like(free)
    with small_products(views):
        writer = Writer(filler, x, free, start, views, last, u, config.temperature, config.top_p)
        writer.begin()
    while True:
        left = T - int(writer.final.min())    # waits for the device, once in a pass
        is_last = not left or passes == config.plan_passes
        n = left if is_last else min(left, DRAFT)
        wave = at - writer.final[:, None] + 1
        step = {'pass': passes - 1, 'wave': torch.where(open_positions & (wave <= n), wave.clamp(min=0), 0),
                'xt': torch.where(open_positions, model.mask_id, writer.text), 'corrected': replaced}
        if left:
            with small_products(views):
                draft = writer.draft(n, not is_last)
        step['x'], steps, open_positions = writer.text.clone(), steps + n, torch.zeros_like(free)
        if not is_last:
            ahead, inside = writer.ahead(n)
            states = reader.read_at(step['x'][writer.rows, inside - 1], writer.final - 1)    # before the draft's tokens
            passes += 1
            with uncast(views):
                replaced = writer.check(draft, lambda part: reader.lm_head(states.flatten(0, 1)[part]))
            checked = (ahead < writer.final[:, None])[..., None]
            hidden[writer.rows, ahead] = torch.where(checked, states, hidden[writer.rows, ahead])
            open_positions = free & (at >= writer.final[:, None]) | replaced
        if on_draft:
            on_draft(step | {'remasked': open_positions, 'hidden': hidden[:, :T].clone()})
        if is_last:
            return step['x'], hidden[:, :T], passes, steps


def views_of(model, x, start, checked):
    """The views that write would have of text x (B, T) ids where the positions of checked (B, T) bool are checked."""
    reader = model.reader(*x.shape)
    hidden = F.pad(reader.read_block(x, start, x.size(1))[0], (0, 0, start, 0))
    if x.size(1) - start < 2:
        return hidden
    states = F.pad(reader.read(x[:, start:-1]), (0, 0, start + 1, 0))
    return torch.where(checked[..., None], states, hidden)

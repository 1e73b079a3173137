"""Who fills masked positions within a forward pass: the sampler head wave after wave, or naive decoding at once.

A step of the sampler head is small and there are many, so all that needs no drawn token is done ahead of them: indices
of all steps, products of weights alone, the part of logits and features that comes from the trunk.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from layers import norm
from noise import pieces, probability, sample
from sampler import confidence, first_positions, neighbors, padded_neighbors, uncast, wave_numbers


@contextmanager
def small_products(hidden):
    """No autocast and no oneDNN, whose set-up costs five times as much as the gelu of one position."""
    enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        with uncast(hidden):
            yield
    finally:
        torch.backends.mkldnn.enabled = enabled


class NaiveFiller:
    """Fills every masked position from its own marginal; fill and rescore are as those of HeadFiller."""
    reach = 0    # a token's probability depends on no neighbour

    def __init__(self, model):
        self.lm_head, self.vocab_size = model.lm_head, model.mask_id

    def fill(self, xt, mask, hidden, u, temperature, top_p, wave=None):
        x, at = xt.clone(), mask.nonzero(as_tuple=True)
        for part in pieces(len(at[0]), self.vocab_size):
            now = at[0][part], at[1][part]
            x[now] = sample(self.lm_head(hidden[now]), u[now], temperature, top_p)
        return x, torch.zeros_like(xt), 1

    def rescore(self, x, at, hidden, by=probability):
        parts = [(at[0][part], at[1][part]) for part in pieces(len(at[0]), self.vocab_size)]
        with uncast(hidden):    # in bfloat16 the two likeliest tokens would often tie
            return torch.cat([by(self.lm_head(hidden[now]), x[now]) for now in parts])


class HeadFiller:
    """Fills masked positions with the sampler head; what depends on weights alone is computed here, once.

    A view is what the trunk says of a position: its logits where they are fewer than the hidden state's channels, for
    then the output matrix is multiplied with the embeddings and the head moves logits; else the hidden state. Tables of
    a vocabulary of more than max_tabled tokens would fill the memory: they are multiplied out for the tokens at hand.
    """
    max_tabled = 8192
    kept = None    # by of: a model, its weights' versions, its HeadFiller

    @torch.no_grad()
    def __init__(self, model):
        self.head, self.wte, self.lm_head = model.sampler_head, model.wte.weight, model.lm_head
        self.first_ratio, self.reach = model.config.sampler_min_neighbors_ratio, model.sampler_head.reach
        self.mask_id, self.unembedding = model.mask_id, model.unembedding
        head, local, reader = self.head, self.head.local, self.head.reader
        V, S, reach = len(self.wte), len(local.offsets), self.reach
        self.tabled, self.moves_logits = V <= self.max_tabled, self.mask_id <= self.wte.size(1)
        with uncast(self.wte):
            # 1. features: what tokens say to the positions beside them, and from the left to all reach ahead of them
            self.codes = local.codes(self.wte, torch.arange(V, device=self.wte.device))                    # (V, D)
            self.near_weight = local.neighbor_proj.weight.T                                               # (S * D, H)
            self.ahead_weight = self.near_weight.unflatten(0, (S, -1))[:reach].flip(0).transpose(0, 1).flatten(1)
            # the recurrent state is read twice, as features and for the next state: one product
            self.state_weight = torch.cat((head.state_proj.weight, reader.weight_hh_l0)).T                # (S, H + 3 S)
            if self.tabled:
                self.near = local.tables(self.wte)                                                        # (S * V, H)
                self.starts = torch.arange(S, device=self.wte.device) * V
                ahead = self.near.unflatten(0, (S, V))[:reach].flip(0)
                self.ahead = ahead.transpose(0, 1).flatten(1)                                          # (V, reach * H)
                self.gates = F.linear(self.codes, reader.weight_ih_l0, reader.bias_ih_l0)                 # (V, 3 S)
            # 2. the last layer, with the scale of the view as its last row
            out = head.out[1].weight @ head.out[0].weight
            out = self.unembedding @ out if self.moves_logits else out
            self.out_weight = torch.cat((out, head.scale.weight))
            self.out_bias = F.pad(1 + head.scale.bias, (len(out), 0))

    @classmethod
    def of(cls, model):
        """The HeadFiller of a model; that of the last model is kept while its weights are fixed and the same."""
        weights = list(model.parameters())
        if any(p.requires_grad for p in weights):
            return cls(model)
        now = [(p.data_ptr(), p._version, p.dtype) for p in weights]    # loading other weights changes the version
        if not cls.kept or cls.kept[0] is not model or cls.kept[1] != now:
            cls.kept = model, now, cls(model)
        return cls.kept[2]

    def fill(self, xt, mask, hidden, u, temperature, top_p, wave=None):
        """Fill the positions of mask.

        xt, mask (B, T); hidden (B, T, C); u (B, T) uniform; wave (B, T) int64: when each position is filled, None for
        the wavefront's own order. Returns x (B, T); wave (B, T), 0 for known positions and for first ones, which the
        language-model head fills; and the number of sequential steps. Each position costs one evaluation of the head,
        however many waves there are. In the wavefront's own order first positions are drawn at temperature 1 (unless it
        is 0): cooler ones would begin every sequence alike.
        """
        T, reach, of_first = xt.size(1), self.reach, temperature
        with small_products(hidden):
            if wave is None:
                wave, of_first = wave_numbers(mask, self.first(mask, hidden)), 1.0 if temperature else 0.0
            flat = mask.flatten().nonzero()[:, 0]
            numbers, order = wave.flatten()[flat].sort(stable=True)
            sequences, positions = flat[order] // T, flat[order] % T
            sizes = numbers.bincount(minlength=1).tolist()    # the last wait for the device: waves run on without any
            hidden, u = hidden[sequences, positions], u[sequences, positions]
            view, projected = self.view(hidden), self.head.project(hidden)
            x = F.pad(xt, (reach, reach), value=self.mask_id)
            start = 0
            for number, size in enumerate(sizes):
                now = slice(start, start + size)
                at = sequences[now], positions[now]
                if number == 0:
                    drawn = self.draw(view[now], u[now], of_first, top_p)
                else:
                    features = self.features(projected[now], padded_neighbors(x, at, self.head.local.offsets))
                    drawn = self.draw(view[now], u[now], temperature, top_p, features)
                x[at[0], at[1] + reach] = drawn    # when the wave is done: its positions do not see each other
                start += size
        return x[:, reach:reach + T], wave, sum(size > 0 for size in sizes)

    def correct(self, x, mask, hidden, u, temperature, top_p):
        """Draw again what stands at the positions of mask: the even ones, then the odd ones.

        x (B, T) filled, the rest as in fill. Both direct neighbours of a position stand still while it is drawn, so the
        head sees both sides, and there are two sequential steps, however many positions. Returns as fill.
        """
        x, odd = x.clone(), torch.arange(x.size(1), device=x.device) % 2
        with small_products(hidden):
            for parity in (0, 1):
                at = (mask & (odd == parity)).nonzero(as_tuple=True)
                view = hidden[at]
                features = self.features(self.head.project(view), self.around(x, at))
                x[at] = self.draw(self.view(view), u[at], temperature, top_p, features)
        return x, mask * odd, 2

    def fill_from_left(self, xt, mask, hidden, last, lanes, u, temperature, top_p, state=None):
        """Fill the positions of mask from left to right, in every lane at once.

        xt, mask (B, T); hidden (B, T, C); last (B, C) the trunk's state before the lanes, or None; lanes: a plans.Lane
        for each stretch to fill; state (B * n, S): the head's recurrent state before the n lanes, None to read the
        text. Returns as fill, and the state behind the lanes. Every sequence and lane takes each step: nothing waits
        for the device, and no shape depends on what is drawn.
        """
        (B, T), n, reach, device = xt.shape, len(lanes), self.reach, xt.device
        with small_products(hidden):
            if state is None:
                read = [F.pad(xt[:, lane.read_from:lane.start], (0, 1)) for lane in lanes]
                state = torch.stack([self.head.states(text, self.wte)[:, -1] for text in read], 1).flatten(0, 1)
            # 1. what the steps need that no draw decides, (steps, B * n, ...) each
            steps = max(lane.end - lane.start for lane in lanes)
            beyond = torch.stack([torch.arange(lane.start, lane.start + steps, device=device) for lane in lanes], 1)
            position = torch.stack([at.clamp(max=lane.end - 1) for at, lane in zip(beyond.unbind(1), lanes)], 1)
            at = (torch.arange(B, device=device)[:, None] * T + position[:, None]).flatten(1)
            inside = (beyond == position).repeat(1, B)    # a shorter lane waits at its end for the others
            given, fills, u, view = (z.flatten(0, 1)[at] for z in (xt, mask, u, hidden))
            # 2. the features of all positions from first to last lane, by what is known before
            begin, end = lanes[0].start, lanes[-1].end
            around = F.pad(xt, (reach, 0), value=self.mask_id)[:, begin:end + reach - 1].unfold(1, reach, 1)
            known = self.head.project(hidden[:, begin:end].transpose(0, 1), last).flatten(0, 1)
            known = self.features(known, around.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, B))
            # 3. the steps; with nothing read the first tokens are drawn at temperature 1
            of_first = 1.0 if temperature and lanes[0].read_from == lanes[0].start else temperature
            starts = [lane.start - begin for lane in lanes]
            tokens, state = self.write_from_left(known, starts, self.view(view), given, fills & inside, u, temperature,
                                                 top_p, state, of_first)
            x, tokens, state = xt.clone(), torch.stack(tokens).unflatten(1, (B, n)), state.clone()
            for i, lane in enumerate(lanes):
                x[:, lane.start:lane.end] = tokens[:lane.end - lane.start, :, i].T
            at = torch.arange(T, device=device)
            wave = mask * sum((at - lane.start) * ((at >= lane.start) & (at < lane.end)) for lane in lanes)
        return x, wave, steps, state

    def write_from_left(self, known, starts, view, given, fills, u, temperature, top_p, state, of_first=None,
                        on_step=None):
        """The steps of filling from left to right: in each, one position of every sequence and lane.

        known (P, B, H): features of P adjacent positions by what is known beforehand; starts: n ints, where among them
        the lanes begin. For each step view, given ids, fills bool (is it to be filled?) and u, (steps, B * n, ...);
        state (B * n, S) before. of_first: the temperature of the first token, which the language-model head then draws;
        None: the sampler head draws it like the others. on_step is called with the features (B * n, H) of each step and
        the state before it. Returns a list of tokens (B * n,) over the steps, and the state behind them.
        """
        (P, B, H), n, reach, S = known.shape, len(starts), self.reach, self.head.reader.hidden_size
        entering = torch.cat((known, self.head.reader.bias_hh_l0.expand(P, B, -1)), -1)
        entering = F.pad(entering, (0, 0, 0, 0, 0, reach + 1))
        right_of = entering[1:, :, :H].unfold(0, reach, 1).transpose(2, 3).unbind()    # (B, reach, H) each
        entering, tokens = entering.unbind(), []
        nothing, steps = torch.full_like(given[0], self.mask_id), zip(*map(torch.unbind, (view, given, fills, u)))
        with torch.inference_mode():    # a fifth of the time; what leaves it is made outside
            for t, (view, given, fills, u) in enumerate(steps):
                now = [start + t for start in starts]
                enters = entering[now[0]] if n == 1 else torch.stack([entering[i] for i in now], 1).flatten(0, 1)
                features, gates = torch.addmm(enters, state, self.state_weight).split_with_sizes((H, 3 * S), 1)
                if t or of_first is None:
                    drawn = self.draw(view, u, temperature, top_p, features)
                else:
                    drawn = self.draw(view, u, of_first, top_p)
                tokens.append(torch.where(fills, drawn, given))
                if on_step:
                    on_step(features, state)
                state = self.head.read(self.gates_of(tokens[-1]), gates, state)
                # what is drawn adds to what enters on its right; what is given is known there: [MASK] adds nothing
                said = self.said_ahead(torch.where(fills, drawn, nothing)).view(B, n, reach, H)
                for i, part in zip(now, said.unbind(1)):
                    right_of[i].add_(part)
        return tokens, state

    def features(self, projected, around):
        """Input of the head: projected (N, H), around (N, n) ids at the first n offsets -> (N, H)."""
        if self.tabled:
            return projected + F.embedding_bag(around + self.starts[:around.size(1)], self.near, mode='sum')
        codes = self.codes[around].flatten(1)
        return torch.addmm(projected, codes, self.near_weight[:codes.size(1)])

    def said_ahead(self, ids):
        """What tokens (N,) add to the features of the reach positions on their right, (N, reach * H)."""
        return self.ahead.index_select(0, ids) if self.tabled else self.codes[ids] @ self.ahead_weight

    def gates_of(self, ids):
        """What tokens (N,) say to the gates of the recurrent state, (N, 3 S)."""
        if self.tabled:
            return self.gates.index_select(0, ids)
        return F.linear(self.codes[ids], self.head.reader.weight_ih_l0, self.head.reader.bias_ih_l0)

    def first(self, mask, hidden):
        """Where blank sequences begin, their most confident positions: mask (B, T), hidden (B, T, C) -> (B, T) bool."""
        score = torch.zeros(mask.shape, device=mask.device)
        blank = mask.all(1).nonzero()[:, 0]
        views = hidden[blank].flatten(0, 1)
        with uncast(hidden):
            found = [confidence(self.lm_head(views[part])) for part in pieces(len(views), len(self.wte))]
        score = score.index_copy(0, blank, torch.cat(found).view(-1, mask.size(1)))
        return first_positions(mask, score, self.first_ratio)

    def rescore(self, x, at, hidden, by=probability):
        """Probability of tokens given their present neighbours on both sides, or noise.margin there.

        x (B, T) filled; at: sequences and positions (N,); hidden (B, T, C) as the trunk last saw each position masked,
        so this costs no forward pass. Returns (N,) float64.
        """
        with uncast(hidden):
            hidden = hidden[at]
            view, projected = self.view(hidden), self.head.project(hidden)
            features = self.features(projected, self.around(x, at))
            return torch.cat([by(self.logits(view[part], features[part]), x[at[0][part], at[1][part]])
                              for part in pieces(len(view), len(self.wte))])

    def around(self, x, at):
        """Ids (N, 2 * reach) beside positions: x (B, T), at: sequences and positions (N,)."""
        return neighbors(x, at, self.head.local.offsets, self.mask_id)

    def view(self, hidden):
        """What the trunk says of positions, for the head to move: hidden (..., C) -> (..., V - 1 or C)."""
        return F.linear(hidden, self.unembedding) if self.moves_logits else hidden

    def logits(self, view, features=None):
        """Logits (N, V - 1) float32 of the language-model head or, given features (N, H), of the sampler head.

        view (N, V - 1 or C). The head's layers are those of sampler.SamplerHead.forward, the last ones multiplied out.
        """
        if features is not None:
            x = norm(F.gelu(norm(features)))
            gate, value = self.head.gate(x).chunk(2, -1)
            moved = F.linear(norm(torch.addcmul(x, F.gelu(gate), value)), self.out_weight, self.out_bias)
            view = torch.addcmul(moved[:, :-1], view, moved[:, -1:])
        return view.float() if self.moves_logits else self.lm_head(view)

    def draw(self, view, u, temperature, top_p, features=None):
        """Tokens (N,), some positions after the others where the vocabulary is large: as logits, and u (N,)."""
        parts = pieces(len(view), len(self.wte))
        if len(parts) == 1:
            return sample(self.logits(view, features), u, temperature, top_p)
        return torch.cat([sample(self.logits(view[part], None if features is None else features[part]), u[part],
                                 temperature, top_p) for part in parts])

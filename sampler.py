"""The sampler head: fills a masked region wave after wave, each token given those just placed beside it.

The trunk's marginals do not know each other: tokens drawn from them in parallel do not fit together. The head
corrects the marginal of a place by the tokens around it, which may be younger than the trunk's view.
A wave fills every masked place that has a known direct neighbour; when each place is filled depends on the mask
alone, so training can teacher-force exactly the neighbours that decoding will have.

References: docs/sampler.md; ADJUST, a neighbour of this idea: https://arxiv.org/abs/2509.22738
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from noise import probability, sample


def norm(x):
    """Layer norm without parameters. Fused on every device, where torch's RMSNorm is not: 8 times faster on a CPU."""
    return F.layer_norm(x, (x.size(-1),))


class Window(nn.Module):
    """Features of a place from its hidden state and the tokens around it: the first, linear layer of a head.

    It is a sum of one projection and, for each offset, one row of a table over the vocabulary. In decoding the
    projection of a place is made ahead of its wave and the tables once for each block of text.
    """

    def __init__(self, n_embd, width, offsets, n_code):
        super().__init__()
        self.register_buffer('offsets', torch.tensor(offsets), persistent=False)
        self.place = nn.Linear(n_embd, width)
        self.code = nn.Linear(n_embd, n_code, bias=False)
        self.slots = nn.Linear(len(offsets) * n_code, width, bias=False)

    def tables(self, wte, ids=None):
        """Every offset's table, stacked, of the whole vocabulary or of some ids (M,): wte (V, C) -> (S * V, H) or (S * M, H).

        wte are the token embeddings; [MASK], the last of them, adds nothing.
        """
        ids = torch.arange(len(wte), device=wte.device) if ids is None else ids
        code = self.code(norm(wte.detach()[ids]))
        code = code * (ids < len(wte) - 1)[:, None]
        slots = self.slots.weight.view(-1, len(self.offsets), code.size(-1))    # (H, S, D)
        return torch.einsum('vd,hsd->svh', code, slots).flatten(0, 1).to(wte.dtype)

    def tables_for(self, wte, around):
        """Tables that hold the ids around (N, S), and those ids as rows of them: a large vocabulary is not tabled whole."""
        if len(wte) <= around.numel():
            return self.tables(wte), around
        ids, around = around.unique(return_inverse=True)
        return self.tables(wte, ids), around

    def forward(self, place, around, tables):
        """place (N, H) projected hidden states, around (N, S) ids, [MASK] for unknown -> (N, H)."""
        S = len(self.offsets)
        slots = torch.arange(S, device=around.device) * (len(tables) // S)
        return place.to(tables.dtype) + F.embedding_bag(around + slots, tables, mode='sum')


class SamplerHead(nn.Module):
    """Logits of a place: the language-model head's, detached, plus a learned correction that starts at zero.

    One gated layer (GEGLU, https://arxiv.org/abs/2002.05202) on the window's features, normalised before and after.
    """

    def __init__(self, n_embd, context, width):
        super().__init__()
        self.context = context
        self.window = Window(n_embd, width, [*range(-context, 0), *range(1, context + 1)], n_code=width // 9)
        self.mix = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, n_embd, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, place, around, tables, lm_logits, unembedding):
        """place (N, H), around (N, 2k) ids, lm_logits (N, V - 1), unembedding (V - 1, C) -> logits (N, V - 1)."""
        x = norm(F.gelu(norm(self.window(place, around, tables))))
        gate, value = self.mix(x).chunk(2, -1)
        x = norm(x + F.gelu(gate) * value)
        return lm_logits + F.linear(self.out(x), unembedding.detach()).float()


# -----------------------------------------------------------------------------
# order of filling

def wave_numbers(mask, first):
    """The wave in which each place is filled: 0 known or first, then one more for each step away from those.

    mask (B, T) bool, True where masked; first (B, T) bool, masked places that are filled before wave 1.
    The last two places of a gap would meet unseen: the right one waits for the left.
    Returns (B, T) int64; in a row where nothing is known every number is at least T.
    """
    B, T = mask.size()
    at = torch.arange(T, device=mask.device).expand(B, T)
    known = ~mask | first
    left = at - torch.where(known, at, -T).cummax(1).values
    right = torch.where(known, at, 2 * T).flip(1).cummin(1).values.flip(1) - at
    wave = torch.minimum(left, right)
    meets = (wave[:, 1:] == wave[:, :-1]) & (wave[:, 1:] > 0)
    return torch.cat((wave[:, :1], wave[:, 1:] + meets), 1)


def first_places(mask, score, ratio):
    """Places to start from in rows that know no token: the highest-scored ratio of them, at least one.

    mask (B, T) bool; score (B, T) float; ratio in [0, 1]. Returns (B, T) bool, all False in other rows.
    """
    B, T = mask.size()
    chosen = score.topk(max(1, round(ratio * T)), dim=1).indices
    first = torch.zeros_like(mask).scatter(1, chosen, True)
    return first & mask.all(1, keepdim=True)


def pad(x, k, value):
    return F.pad(x, (k, k), value=value)


def look_around(padded, rows, cols, offsets, k):
    """Tokens at the given offsets of places: padded (B, T + 2k) ids; rows, cols (N,); offsets (S,) -> (N, S)."""
    return padded[rows[:, None], cols[:, None] + k + offsets]


# -----------------------------------------------------------------------------
# training

def teacher_forced(x0, redo, rows, cols, offsets, score, ratio, mask_id):
    """Neighbours of places as a wavefront that fills redo would have placed them, taken from the clean row.

    x0 (B, T) ids; redo (B, T) bool, all that is masked or, in a correction, a part of it; rows, cols (N,) the places:
    those outside redo are looked at when it is about to be filled; score (B, T) float chooses where rows without a
    known token start. Returns (N, S) ids, [MASK] where hidden.
    """
    k = len(offsets) // 2
    wave = wave_numbers(redo, first_places(redo, score, ratio))
    # a place is known to those of later waves; places past the ends never are
    around_wave = look_around(pad(wave, k, 1 << 30), rows, cols, offsets, k)
    around = look_around(pad(x0, k, mask_id), rows, cols, offsets, k)
    seen = around_wave < wave[rows, cols, None].clamp(min=1)
    return torch.where(seen, around, mask_id)


def sampler_loss(head, hidden, lm_logits, targets, around, wte):
    """Cross-entropy of the head at masked places, nats, averaged; its gradient reaches the head alone.

    hidden (N, C), lm_logits (N, V - 1), targets (N,), around (N, 2k) ids, wte (V, C).
    """
    place = head.window.place(hidden.detach())
    tables, around = head.window.tables_for(wte, around)
    logits = head(place, around, tables, lm_logits.detach(), wte[:-1])
    return F.cross_entropy(logits, targets)


# -----------------------------------------------------------------------------
# decoding

class Wavefront:
    """Fills masked rows by wavefront: the head's tables are made once, here, and serve every pass.

    Those of a vocabulary of more than max_tabled tokens would fill the memory: they are made for the tokens of each wave.
    """
    max_tabled = 8192

    def __init__(self, head, wte, min_neighbors_ratio):
        self.head, self.wte, self.ratio, self.reach = head, wte, min_neighbors_ratio, head.context
        self.tables = head.window.tables(wte) if len(wte) <= self.max_tabled else None

    def fill(self, xt, mask, hidden, lm_logits, u, temperature, top_p):
        """Fill every masked place.

        xt, mask (B, T); hidden (B, T, C); lm_logits (B, T, V - 1); u (B, T) uniform.
        Returns x (B, T) without masks and wave (B, T) int64, when each place was filled (0 known or first).
        Each masked place costs one evaluation of the head, however many waves there are. First places of rows that know
        nothing are drawn at temperature 1 (unless it is 0): cool ones would begin every row alike.
        """
        T, k = xt.size(1), self.head.context
        first = first_places(mask, lm_logits.amax(-1) - lm_logits.logsumexp(-1), self.ratio)
        wave = wave_numbers(mask, first)
        flat = mask.flatten().nonzero()[:, 0]
        number, order = wave.flatten()[flat].sort(stable=True)
        rows, cols = flat[order] // T, flat[order] % T
        sizes = number.bincount(minlength=1).tolist()    # the last wait for the device: waves run on without any
        with uncast(hidden):
            place = self.head.window.place(hidden[rows, cols])
            lm_logits, u = lm_logits[rows, cols], u[rows, cols]
            x = pad(xt, k, self.wte.size(0) - 1)
            start = 0
            for number, size in enumerate(sizes):
                now = slice(start, start + size)
                if number == 0:
                    logits, heat = lm_logits[now], 1.0 if temperature else 0.0
                else:
                    logits, heat = self.logits(x, rows[now], cols[now], place[now], lm_logits[now]), temperature
                x[rows[now], cols[now] + k] = sample(logits, u[now], heat, top_p)
                start += size
        return x[:, k:k + T], wave

    def look(self, x, at, hidden, lm_logits):
        """Probability of placed tokens on a fresh look, both sides known.

        x (B, T) filled; at: rows and columns (N,); hidden (B, T, C), lm_logits (B, T, V - 1) as the trunk last saw
        each place masked, so this costs no trunk pass. Returns (N,) float64.
        """
        with uncast(hidden):
            x = pad(x, self.head.context, self.wte.size(0) - 1)
            logits = self.logits(x, *at, self.head.window.place(hidden[at]), lm_logits[at])
            return probability(logits, x[at[0], at[1] + self.head.context])

    def logits(self, x, rows, cols, place, lm_logits):
        around = look_around(x, rows, cols, self.head.window.offsets, self.head.context)
        tables, around = (self.tables, around) if self.tables is not None else self.head.window.tables_for(self.wte, around)
        return self.head(place, around, tables, lm_logits, self.wte[:-1])


def uncast(hidden):
    """No autocast: a wave is many small products, and casting them would cost more than it saves."""
    return torch.autocast(hidden.device.type, enabled=False)

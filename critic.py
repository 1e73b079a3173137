"""The critic head: finds the tokens of a filled row that are worth redoing.

It scores what the decoder has at hand once a row is filled: the hidden state of a place (of the masked row, no
further trunk pass), the placed token and the tokens around it. Its logit starts from what the decoder knows,
the odds that the placed token is wrong by the decoder's own probability, plus a learned correction.

References: informed correctors, https://arxiv.org/abs/2407.21243; PRISM, https://arxiv.org/abs/2510.01384
"""
import torch.nn as nn
import torch.nn.functional as F

from sampler import Window, look_around, pad


class CriticHead(nn.Module):
    """Logit that a placed token is wrong: high means wrong."""

    def __init__(self, n_embd, context, width=64):
        super().__init__()
        self.context = context
        self.window = Window(n_embd, width, [*range(-context, context + 1)], n_code=width // 4)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden, x, rows, cols, prob, wte):
        """hidden (N, C); x (B, T) filled ids; rows, cols (N,) the places; prob (N,) the decoder's; wte (V, C) -> (N,)."""
        around = look_around(pad(x, self.context, len(wte) - 1), rows, cols, self.window.offsets, self.context)
        features = self.window(self.window.place(hidden.detach()), around, self.window.tables(wte))
        prior = (1 - prob).clamp(1e-4, 1 - 1e-4).logit().to(hidden.dtype)
        return prior.float() + self.out(F.gelu(features))[:, 0].float()


def critic_loss(head, hidden, x, x0, mask, prob, wte):
    """Binary cross-entropy at the filled places of rows the decoder filled, nats; target 1 where it missed x0.

    hidden (B, T, C); x filled and x0 clean ids (B, T); mask (B, T) bool, the filled places; prob (B, T).
    Its gradient reaches the head alone. Returns loss, and wrong (N,) bool with logits (N,) for measures of rank.
    """
    rows, cols = mask.nonzero(as_tuple=True)
    logits = head(hidden[rows, cols], x, rows, cols, prob[rows, cols], wte)
    wrong = x[rows, cols] != x0[rows, cols]
    return F.binary_cross_entropy_with_logits(logits, wrong.float()), wrong, logits

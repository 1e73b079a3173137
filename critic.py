"""The critic head: finds the tokens of a filled row that are worth redoing.

It tells tokens that the decoder placed from the tokens of the text, at the same places and from what the decoder has
at hand once a row is filled: the hidden state of the place (as the trunk last saw it masked, so no further pass), the
token and the tokens around it. A token is doubted where the decoder gave it little probability or the critic takes it
for placed. Asking instead whether a token differs from the text's own blames every token that could have been another.

References: docs/critic.md; telling placed from real tokens, ELECTRA, https://arxiv.org/abs/2003.10555
informed correctors, https://arxiv.org/abs/2407.21243; PRISM, https://arxiv.org/abs/2510.01384
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from sampler import Window, look_around, pad


class CriticHead(nn.Module):
    """Logit that a token was placed by the decoder rather than read from text: high means wrong."""

    def __init__(self, n_embd, context, width=48):
        super().__init__()
        self.context = context
        self.window = Window(n_embd, width, [*range(-context, context + 1)], n_code=width // 4)
        self.out = nn.Linear(width, 1)

    def forward(self, hidden, x, at, wte):
        """hidden (B, T, C); x (B, T) filled ids; at: rows and columns (N,) of places; wte (V, C) -> (N,) float32."""
        around = look_around(pad(x, self.context, len(wte) - 1), *at, self.window.offsets, self.context)
        tables, around = self.window.tables_for(wte, around)
        features = self.window(self.window.place(hidden[at].detach()), around, tables)
        return self.out(F.gelu(features))[:, 0].float()


def critic_loss(head, hidden, x, x0, mask, wte):
    """Binary cross-entropy at the masked places, filled by the decoder (target 1) and clean (target 0), nats.

    hidden (B, T, C) of the masked rows; x filled and x0 clean ids (B, T); mask (B, T) bool; wte (V, C).
    Its gradient reaches the head alone. Returns the loss, and logits and targets (2 N,) for measures of rank.
    """
    at = mask.nonzero(as_tuple=True)
    logits = torch.cat((head(hidden, x, at, wte), head(hidden, x0, at, wte)))
    targets = torch.arange(2, device=x.device).flip(0).repeat_interleave(len(at[0])).float()
    return F.binary_cross_entropy_with_logits(logits, targets), logits, targets


def wrongness(prob, critic_logits):
    """1 - p * (1 - c): not right unless the decoder's probability p says so and the critic's c of being placed does not."""
    return 1 - prob * torch.sigmoid(-critic_logits.to(prob.dtype))

"""Who has which sequences of an iteration's global batch, which does not depend on how many share it.

All that is drawn for an iteration (places in the text, masks, which sequences a head learns from) is drawn for the
global batch, in every process alike, and each micro-step of each process takes its own part of it.
"""
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Share:
    """Every parts-th of the sequences 0 to total - 1, from number first on: a micro-step's part of the global batch."""
    total: int
    first: int = 0
    parts: int = 1

    @property
    def numbers(self):
        return range(self.first, self.total, self.parts)

    def split(self, n):
        """The Shares of the first total - n sequences and of the last n, each numbered from 0."""
        rest = self.total - n
        return replace(self, total=rest), replace(self, total=n, first=(self.first - rest) % self.parts)

    def of(self, chosen):
        """Which of chosen (M,) int64 numbers are in this share, and which of its own sequences these are."""
        which = ((chosen - self.first) % self.parts == 0).nonzero()[:, 0]
        return which, (chosen[which] - self.first) // self.parts

    def weigh(self, mean, n, n_global):
        """A mean over n of the n_global values of the global batch, such that its mean over all parts is theirs."""
        return mean * (n * self.parts / n_global)


def spread_choice(n_all, n, generator):
    """n of n_all numbers, or all, evenly spaced from a random offset, so that every masking ratio has its share."""
    n = min(n, n_all)
    return (torch.arange(n) * n_all + torch.randint(n_all, (), generator=generator)) // n


def untaught(head):
    """The loss of a head of which this part of the global batch has no example: 0, with gradients of 0.

    So all processes have gradients of the same weights, which they then average.
    """
    return 0 * sum(p.sum() for p in head.parameters())

"""Text beside masked blocks of itself, in one forward pass: how the trunk reads for decoding in blocks.

Decoding in blocks from left to right asks the trunk about a masked block after finished text. One pass can train many
such questions at once: the text is read from left to right, and behind it stand copies of its blocks, masked, each of
which sees the text before it and itself, but neither what comes later nor another copy.

Reference: block diffusion, https://arxiv.org/abs/2503.09573
"""
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F


@dataclass
class BlockLayout:
    """A text of T tokens, then M = n * size masks: n blocks that begin at starts (n,)."""
    starts: torch.Tensor
    size: int
    positions: torch.Tensor    # (T + M,) int64, of the rotary angles
    bias: torch.Tensor         # (T + M, T + M) float: 0 where a token (row) sees another (column), else -inf

    @property
    def n_masks(self):
        return len(self.starts) * self.size

    @property
    def n_text(self):
        return len(self.positions) - self.n_masks


@lru_cache(maxsize=64)
def lay_out(n_text, starts, size, device='cpu'):
    """BlockLayout of n_text tokens and the blocks of size positions that begin at starts, a tuple, each <= n_text."""
    starts = torch.stack([torch.full((), start, device=device) for start in starts])    # made there, not copied
    text = torch.arange(n_text, device=device)
    block_positions = (starts[:, None] + torch.arange(size, device=device)).flatten()
    block = torch.cat((torch.full_like(text, -1), torch.arange(len(starts), device=device).repeat_interleave(size)))
    visible = torch.cat((text + 1, starts.repeat_interleave(size)))    # how much of the text each token sees
    column = torch.arange(len(block), device=device)
    sees = (column < visible[:, None]) & (block < 0) | (block[:, None] == block) & (block >= 0)
    bias = torch.zeros(sees.shape, device=device).masked_fill(~sees, float('-inf'))
    return BlockLayout(starts, size, torch.cat((text, block_positions)), bias)


def views(hidden, layout):
    """What the trunk says of each block: hidden (B, T + M, C) of its forward pass over text and blocks.

    Returns (B, M, C) the view of the masked positions, and (B, n, C) the state of the last token before each block, 0
    where there is none. The first position of a block follows the text, whose last state is the better view of it.
    """
    last = F.pad(hidden[:, :layout.n_text], (0, 0, 1, 0))[:, layout.starts]    # (B, n, C)
    masks = hidden[:, layout.n_text:].unflatten(1, (-1, layout.size))          # (B, n, size, C)
    first = torch.where((layout.starts > 0)[:, None], last, masks[:, :, 0])
    return torch.cat((first[:, :, None], masks[:, :, 1:]), 2).flatten(1, 2), last

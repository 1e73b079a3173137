"""The trunk as a reader from left to right that remembers what later tokens need: a key-value cache.

    reader = CachedTrunk(model, B=4, length=256)
    hidden = reader.read(ids)                           # of the next tokens
    hidden, last = reader.read_block(x, 64, 128)        # of a masked block behind the text

Text that is read from left to right is never read again: a forward pass takes the tokens that came since the one before
and, for decoding in blocks, the masks behind them, which nothing remembers. Causal models (autoregressive.py) and
decoding in blocks (blocks.py) share it.
"""
import torch
import torch.nn.functional as F

from blocks import lay_out, views
from layers import attend, norm, rotate


def depthwise(x, weight):
    """Convolution over time, without padding: x (B, K - 1 + n, C), weight (K, C), oldest input first -> (B, n, C)."""
    if x.size(1) == len(weight):
        return (x * weight).sum(1, keepdim=True)    # one position at a time this is the faster
    return F.conv1d(x.transpose(1, 2), weight.T[:, None], groups=x.size(2)).transpose(1, 2)


class CachedTrunk:
    """Reads up to length tokens of B sequences, some at a time.

    Every block keeps the keys and values of all positions and the inputs of its short convolution, in tensors that are
    as long as the text from the start. Weights are cast once, to the dtype that autocast would use.
    """

    def __init__(self, model, B, length):
        wte = model.wte.weight
        device = wte.device
        casts = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if casts else wte.dtype
        self.device_type, self.n_head, self.mask_id = device.type, model.h[0].attn.n_head, model.mask_id
        self.wte, self.unembedding = wte, model.unembedding.to(self.dtype)
        self.cos, self.sin = model.cos.to(self.dtype), model.sin.to(self.dtype)
        self.length, self.n_read = length, 0
        self.last = wte.new_zeros(B, wte.size(1))    # the state of the last token of text
        self.blocks = []
        for block in model.h:
            conv = block.mlp.near.conv.weight[:, 0].T                                      # (K, C), oldest input first
            weights = [layer.weight for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj)]
            K, C = conv.shape
            self.past = K - 1 if block.attn.causal else K // 2    # inputs that a token of text sees on its left
            keys_values = torch.zeros(2, B, self.n_head, length, C // self.n_head, dtype=self.dtype, device=device)
            inputs = torch.zeros(B, self.past + length, C, dtype=self.dtype, device=device)   # zeros before the text
            self.blocks.append([w.to(self.dtype) for w in (*weights, conv)] + [*keys_values, inputs])

    @torch.no_grad()
    def read(self, ids, n_masks=0):
        """Hidden states (B, n + n_masks, C) of the next tokens, ids (B, n), and of masks behind them.

        Each token sees those before it; the masks see all of the text and one another.
        """
        n, start = ids.size(1), self.n_read
        end = start + n + n_masks
        bias = None
        if n > 1 or n and n_masks:
            bias = torch.full((n, end), float('-inf'), dtype=self.dtype, device=ids.device).triu(start + 1)
            bias = F.pad(bias, (0, 0, 0, n_masks))

        def keep(cache, new):
            cache[:, :, start:end] = new
        hidden = self.through_blocks(F.pad(ids, (0, n_masks), value=self.mask_id), slice(start, end), end, bias, keep,
                                     lambda inputs, conv: self.convolve(inputs, conv, n, n_masks))
        if n:
            self.n_read, self.last = start + n, hidden[:, n - 1]
        return hidden

    @torch.no_grad()
    def read_at(self, ids, starts):
        """Hidden states (B, n, C) of tokens, each sequence's from a place of its own: ids (B, n), starts (B,) int64.

        Later positions that were read before count for nothing: they are written over when they are read again. Length
        must have room for all tokens; beyond block_size their angles are those of the last position.
        """
        (B, n), device = ids.shape, ids.device
        rows, ahead = torch.arange(B, device=device)[:, None], torch.arange(n + self.past, device=device)
        at, window = starts[:, None] + ahead[:n], starts[:, None] + ahead
        later = torch.arange(self.length, device=device) > at[..., None]
        bias = torch.zeros(later.shape, dtype=self.dtype, device=device).masked_fill(later, float('-inf'))[:, None]

        def keep(cache, new):
            cache[rows, :, at] = new.transpose(1, 2)
        angles = at.clamp(max=len(self.cos) - 1)
        return self.through_blocks(ids, angles[:, None], self.length, bias, keep,
                                   lambda inputs, conv: depthwise(inputs[rows, window], conv[:self.past + 1]))

    def through_blocks(self, ids, positions, end, bias, keep, convolve):
        """The trunk itself: ids (B, n) -> hidden (B, n, C).

        positions: of the tokens among the rotary angles. keep(cache, new) puts what is new, (B, n_head, n, channels),
        where a cache (B, n_head, length, channels) has it; attention goes over its first end places, with bias added.
        convolve(inputs, conv): what the short convolution adds.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        with torch.autocast(self.device_type, enabled=False):
            x = norm(F.embedding(ids, self.wte)).to(self.dtype)
            for qkv, proj, fc, out, conv, keys, values, inputs in self.blocks:
                # attention
                q_k_v = F.linear(norm(x), qkv).view(*ids.shape, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
                q, k = rotate(norm(q_k_v[:2]), cos, sin)
                keep(keys, k)
                keep(values, q_k_v[2])
                y = attend(q, keys[:, :, :end], values[:, :, :end], bias=bias)
                x = x + F.linear(y.transpose(1, 2).reshape(x.shape), proj)
                # MLP, after the convolution
                near = norm(x)
                keep(inputs[:, None, self.past:], near[:, None])
                x = x + F.linear(F.gelu(F.linear(near + convolve(inputs, conv), fc)), out)
            return norm(x.to(self.wte.dtype))

    def convolve(self, inputs, conv, n, n_masks):
        """What the convolution adds to n tokens and the masks behind them: as layers.ShortConv.over_blocks."""
        start, middle, end = self.n_read, self.n_read + n, self.n_read + n + n_masks
        parts = []
        if n:
            parts.append(depthwise(inputs[:, start:self.past + middle], conv[:self.past + 1]))
        if n_masks:
            window = F.pad(inputs[:, middle:self.past + end], (0, 0, 0, len(conv) - 1 - self.past))
            parts.append(depthwise(window, conv))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def read_block(self, x, start, end):
        """The trunk's view of a block, masked, after finished text: x (B, T) ids, of which those before start count.

        Returns hidden (B, end - start, C) and last (B, C), as blocks.views.
        """
        masks = self.read(x[:, self.n_read:start], end - start)[:, start - end:]
        n_text = min(start, 1)    # of the text the view needs the last state alone
        layout = lay_out(n_text, (n_text,), end - start, x.device)
        hidden, last = views(torch.cat((self.last[:, None][:, :n_text], masks), 1), layout)
        return hidden, last[:, 0]

    def lm_head(self, hidden):
        """Logits (..., V - 1) float32 of hidden states (..., C)."""
        return F.linear(hidden.to(self.dtype), self.unembedding).float()

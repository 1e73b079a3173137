"""The layers of the trunk, small modules that model.py stacks: norm, rotary attention, short convolution, MLP, block.

References:
rotary positions: https://arxiv.org/abs/2104.09864; QK-norm: https://arxiv.org/abs/2010.04245
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def norm(x):
    """Layer norm without parameters. Fused on every device, where torch's RMSNorm is not: 8 times faster on a CPU."""
    return F.layer_norm(x, (x.size(-1),))


def rotary_tables(block_size, head_size):
    """cos and sin, each (T, head_size / 2), of the rotary angles."""
    freq = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    angle = torch.arange(block_size)[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair of channels of x (B, n_head, T, head_size) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def attend(q, k, v, causal=False, bias=None):
    """Scaled dot-product attention of q, k, v (B, n_head, T, head_size); bias (T, T) is added to the scores."""
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type != 'cpu':
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    # written out, the backward pass takes half the time of the fused kernel for CPUs
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
    if causal:
        bias = torch.full(scores.shape[-2:], float('-inf'), dtype=q.dtype).triu(1)
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, -1, dtype=v.dtype) @ v


class SelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.causal = config.attention_type == 'causal'
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, layout=None):
        B, T, C = x.size()
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in self.qkv(x).split(C, dim=2))
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, self.causal, None if layout is None else layout.bias)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class ShortConv(nn.Module):
    """Adds to each channel a weighted sum of its nearby values: spelling, which attention is slow to learn.

    A depthwise convolution of x (B, T, C), initialised to zero; causal where attention is.
    """

    def __init__(self, config, reach=4):
        super().__init__()
        pad = 2 * reach if config.attention_type == 'causal' else reach
        self.conv = nn.Conv1d(config.n_embd, config.n_embd, 2 * reach + 1, padding=pad, groups=config.n_embd,
                              bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x, layout=None):
        if layout is not None:
            return x + self.over_blocks(x, layout)
        return x + self.conv(x.transpose(1, 2))[..., :x.size(1)].transpose(1, 2)

    def over_blocks(self, x, layout):
        """The same for text and masked blocks, x (B, T + M, C): no token gets more than its attention sees."""
        B, _, C = x.shape
        weight, reach = self.conv.weight, self.conv.weight.size(-1) // 2
        text = F.pad(x[:, :layout.n_text], (0, 0, reach, 0)).transpose(1, 2)                   # (B, C, reach + T)
        before = text.unfold(2, reach, 1)[:, :, layout.starts]                                 # (B, C, n, reach)
        masks = x[:, layout.n_text:].transpose(1, 2).reshape(B, C, len(layout.starts), layout.size)
        masks = torch.cat((before, masks), -1).transpose(1, 2).flatten(0, 1)               # (B * n, C, reach + size)
        masks = F.conv1d(masks, weight, padding=reach, groups=C)[..., reach:]
        masks = masks.view(B, len(layout.starts), C, layout.size).transpose(2, 3).reshape(B, layout.n_masks, C)
        if not layout.n_text:
            return masks
        return torch.cat((F.conv1d(text, weight[..., :reach + 1], groups=C).transpose(1, 2), masks), 1)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.near = ShortConv(config)
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, layout=None):
        return self.proj(F.gelu(self.fc(self.near(x, layout))))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, layout=None):
        x = x + self.dropout(self.attn(norm(x), cos, sin, layout))
        return x + self.dropout(self.mlp(norm(x), layout))

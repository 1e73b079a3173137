"""The trunk: a transformer that reads a row of tokens, and the places where the small heads attach.

    model = GPT(GPTConfig(vocab_size=66, add_sampler_head=True))
    logits = model.lm_head(model(xt))

References:
nanoGPT, the shape of this file: https://github.com/karpathy/nanoGPT
MDLM, masked diffusion without time conditioning: https://arxiv.org/abs/2406.07524
rotary positions: https://arxiv.org/abs/2104.09864; QK-norm: https://arxiv.org/abs/2010.04245
"""
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn as nn
import torch.nn.functional as F

from critic import CriticHead
from sampler import SamplerHead, norm


class ModelMode(str, Enum):
    LANGUAGE_MODEL = 'language_model'     # a distribution over tokens at each place
    SEQUENCE_SCORER = 'sequence_scorer'   # one score for a whole row: the judge


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


def attend(q, k, v, causal):
    """Scaled dot-product attention of q, k, v (B, n_head, T, head_size)."""
    if q.device.type != 'cpu':
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # written out, the backward pass takes half the time of the fused kernel for CPUs
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], float('-inf'), dtype=q.dtype).triu(1)
    return torch.softmax(scores, -1, dtype=v.dtype) @ v


class SelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.causal = config.attention_type == 'causal'
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.size()
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in self.qkv(x).split(C, dim=2))
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, self.causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class ShortConv(nn.Module):
    """Adds to each channel what it holds in the places nearby, weighted: spelling, which attention is slow to learn.

    A depthwise convolution of x (B, T, C) that starts at zero; causal where attention is.
    """

    def __init__(self, config, reach=4):
        super().__init__()
        pad = 2 * reach if config.attention_type == 'causal' else reach
        self.conv = nn.Conv1d(config.n_embd, config.n_embd, 2 * reach + 1, padding=pad, groups=config.n_embd, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x):
        return x + self.conv(x.transpose(1, 2))[..., :x.size(1)].transpose(1, 2)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.near = ShortConv(config)
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(self.near(x))))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin):
        x = x + self.dropout(self.attn(norm(x), cos, sin))
        return x + self.dropout(self.mlp(norm(x)))


@dataclass
class GPTConfig:
    block_size: int = 256
    vocab_size: int = 66                     # with [MASK], the last id
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    attention_type: str = 'bidirectional'    # or 'causal'
    model_mode: str = 'language_model'       # or 'sequence_scorer'
    add_sampler_head: bool = False
    start_sampler_iteration: int = 1000
    sampler_min_neighbors_ratio: float = 0.01
    sampler_context: int = 8                 # neighbours on each side
    sampler_width: int = 192
    add_critic_head: bool = False
    start_critic_iteration: int = 3000
    end_critic_iteration: int = 5000
    critic_alpha: float = 1.0


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f'n_embd {config.n_embd} is no multiple of n_head {config.n_head}'
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        cos, sin = rotary_tables(config.block_size, config.n_embd // config.n_head)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        for name, p in self.named_parameters():
            if name.endswith('proj.weight'):
                nn.init.zeros_(p)    # each block starts as the identity
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.score_head = nn.Linear(config.n_embd, 1) if config.model_mode == ModelMode.SEQUENCE_SCORER else None
        # heads come last, so that the trunk starts the same with and without them
        self.sampler_head = SamplerHead(config.n_embd, config.sampler_context, config.sampler_width) if config.add_sampler_head else None
        self.critic_head = CriticHead(config.n_embd, config.sampler_context) if config.add_critic_head else None

    @property
    def mask_id(self):
        return self.config.vocab_size - 1

    def parts(self):
        """Parameters of the trunk and of each head that is there, {name: [parameter]}."""
        parts = {'trunk': [], 'sampler': [], 'critic': []}
        for name, p in self.named_parameters():
            parts[name.split('_')[0] if name.startswith(('sampler_head', 'critic_head')) else 'trunk'].append(p)
        return {name: params for name, params in parts.items() if params}

    def forward(self, idx):
        """Hidden states of a row of tokens: idx (B, T) int64 -> (B, T, C)."""
        B, T = idx.size()
        assert T <= self.config.block_size, f'row of {T} tokens, block_size {self.config.block_size}'
        x = norm(self.wte(idx))                                 # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))   # the residual stream too: a tenth less time
        for block in self.h:
            x = block(x, self.cos[:T], self.sin[:T])
        return norm(x.to(self.wte.weight.dtype))

    def lm_head(self, hidden):
        """Logits (..., V - 1) float32 of hidden states (..., C). There is none for [MASK]: no decoder can produce it."""
        return F.linear(hidden, self.unembedding).float()

    @property
    def unembedding(self):
        """The language-model head's weights, tied to the embeddings, (V - 1, C)."""
        return self.wte.weight[:-1]

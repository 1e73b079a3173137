"""The model: a transformer (the trunk) that reads a sequence of tokens, and the small heads that attach to it.

    model = GPT(GPTConfig(vocab_size=66, add_sampler_head=True))
    logits = model.lm_head(model(xt))

References:
nanoGPT, the shape of this file: https://github.com/karpathy/nanoGPT
MDLM, masked diffusion without time conditioning: https://arxiv.org/abs/2406.07524
"""
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from cache import CachedTrunk
from critic import CriticHead
from layers import Block, norm, rotary_tables
from sampler import SamplerHead


@dataclass
class GPTConfig:
    block_size: int = 256
    vocab_size: int = 66                     # with [MASK], the last id
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    attention_type: str = 'bidirectional'    # or 'causal'
    model_mode: str = 'language_model'       # or 'sequence_scorer': a judge, a logit for each token
    add_sampler_head: bool = False
    start_sampler_iteration: int = 1000
    sampler_min_neighbors_ratio: float = 0.01
    sampler_context: int = 8                 # neighbours on each side
    sampler_width: int = 128
    sampler_state: int = 192                 # of the recurrent state that reads from left to right
    add_critic_head: bool = False
    start_critic_iteration: int = 3000
    end_critic_iteration: int = 5000
    critic_alpha: float = 1.0

    @classmethod
    def of(cls, config, vocab_size):
        """From the settings of a run, a namespace."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls) if f.name != 'vocab_size'},
                   vocab_size=vocab_size)


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f'n_embd {config.n_embd} is no multiple of n_head {config.n_head}'
        self.config = config
        self.reads_text = True    # from left to right: a trunk that was trained with block_rows 0 cannot
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
        self.score_head = nn.Linear(config.n_embd, 1) if config.model_mode == 'sequence_scorer' else None
        # heads come last, so that the trunk starts the same with and without them
        self.sampler_head = self.critic_head = None
        if config.add_sampler_head:
            self.sampler_head = SamplerHead(config.n_embd, config.sampler_context, config.sampler_width,
                                            config.sampler_state)
        if config.add_critic_head:
            self.critic_head = CriticHead(config.n_embd, config.sampler_context)

    @property
    def mask_id(self):
        return self.config.vocab_size - 1

    def parts(self):
        """Parameters of the trunk and of each head the model has, {name: [parameter]}."""
        parts = {'trunk': [], 'sampler': [], 'critic': []}
        for name, p in self.named_parameters():
            part = name.split('_')[0] if name.startswith(('sampler_head', 'critic_head')) else 'trunk'
            parts[part].append(p)
        return {name: params for name, params in parts.items() if params}

    def forward(self, idx, layout=None):
        """Hidden states of a sequence of tokens: idx (B, T) int64 -> (B, T, C).

        With a blocks.BlockLayout idx is text, read from left to right, and the layout's masked blocks are read behind
        it: -> (B, T + M, C).
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f'sequence of {T} tokens, block_size {self.config.block_size}'
        cos, sin = self.cos[:T], self.sin[:T]
        if layout is not None:
            idx = F.pad(idx, (0, layout.n_masks), value=self.mask_id)
            cos, sin = self.cos[layout.positions], self.sin[layout.positions]
        x = norm(self.wte(idx))                                 # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))   # the residual stream too: a tenth less time
        for block in self.h:
            x = block(x, cos, sin, layout)
        return norm(x.to(self.wte.weight.dtype))

    def reader(self, B, length):
        """Reads text of B sequences from left to right, and masked blocks behind it, each token once."""
        return CachedTrunk(self, B, length)

    def lm_head(self, hidden):
        """Logits (..., V - 1) float32 of hidden states (..., C). [MASK] has none, so no decoder can produce it."""
        return F.linear(hidden, self.unembedding).float()

    @property
    def unembedding(self):
        """The language-model head's weights, tied to the embeddings, (V - 1, C)."""
        return self.wte.weight[:-1]

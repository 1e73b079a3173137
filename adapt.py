"""A sampler head for a trunk that is not model.py's: what such a trunk has to offer, and how the head learns.

    model = Adapted(trunk, block_size=256)
    fit(model, batches)
    decoded = generate(model, x, free, DecoderConfig(plan='left-to-right', mask_ratios=()), range(len(x)))

A trunk offers three things:

    trunk.hidden(ids)         (B, T) int64, [MASK] where unknown -> (B, T, C) hidden states that its output layer reads
    trunk.logits(hidden)      (..., C) -> (..., V - 1) logits, none for [MASK], which is the last id, V - 1
    trunk.embeddings          (V, C) with trunk.logits(h) == h @ embeddings[:-1].T: those of its output layer, and a row
                              for [MASK], which may be anything

Every plan then works but speculative, blocks, and left-to-right behind a prefix: for them the trunk would have to read
text from left to right. So decoding.default_config fills in interleaved order. Fill in behind a prefix by wavefront.
"""
from types import SimpleNamespace

import torch
import torch.nn as nn

from diffusion import beta_ratios, draw_masks, forward_masked, spread_ratios
from sampler import SamplerHead, sampler_examples, sampler_loss


class Adapted(nn.Module):
    """A foreign trunk with a sampler head, as decoding.py, likelihood.py and sampler.py ask for a model.

    block_size: the longest sequence that the trunk reads; the others are those of GPTConfig. ValueError where logits
    and embeddings do not belong together.
    """
    critic_head, reads_text = None, False

    def __init__(self, trunk, block_size, sampler_context=8, sampler_width=128, sampler_state=192,
                 sampler_min_neighbors_ratio=0.01):
        super().__init__()
        V, C = trunk.embeddings.shape
        self.trunk, self.mask_id = trunk, V - 1
        self.config = SimpleNamespace(block_size=block_size, vocab_size=V,
                                      sampler_min_neighbors_ratio=sampler_min_neighbors_ratio)
        self.wte = nn.Embedding.from_pretrained(trunk.embeddings.detach())    # frozen
        probe = torch.randn(4, C, dtype=self.wte.weight.dtype, device=self.wte.weight.device)
        if not torch.allclose(trunk.logits(probe), probe @ self.wte.weight[:-1].T, rtol=1e-3, atol=1e-4):
            raise ValueError('trunk.logits(h) is not h @ trunk.embeddings[:-1].T, wanted the embeddings of its output '
                             'layer, without a bias')
        self.sampler_head = SamplerHead(C, sampler_context, sampler_width, sampler_state)
        self.sampler_head.to(probe.device, probe.dtype)

    def forward(self, idx):
        """Hidden states of a sequence of tokens: (B, T) int64 -> (B, T, C). The trunk does not learn."""
        with torch.no_grad():
            return self.trunk.hidden(idx)

    @property
    def unembedding(self):
        return self.wte.weight[:-1]

    def lm_head(self, hidden):
        """Logits (..., V - 1) of hidden states (..., C), float32 or better."""
        logits = self.trunk.logits(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()


def fit(model, batches, learning_rate=1e-3, seed=1337):
    """Train the sampler head of an Adapted on batches of text, (B, T) int64 ids; returns its loss on each, nats."""
    optimizer, losses = torch.optim.AdamW(model.sampler_head.parameters(), learning_rate), []
    generator = torch.Generator().manual_seed(seed)
    for x0 in batches:
        mask = draw_masks(beta_ratios(spread_ratios(len(x0), generator)), x0.size(1), generator)
        with torch.no_grad():
            batch = forward_masked(model, model, x0, mask.to(x0.device))
            examples = sampler_examples(model, batch, None, len(x0), generator)
        loss = sampler_loss(model.sampler_head, examples, model.wte.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

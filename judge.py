"""The judge: a separate model that scores whole samples, by the chance that their tokens are real text.

    python train.py config/train_judge.py
    python sample_simple.py --quality-metric judge --judge-checkpoint-name judge_model.pt

It starts from the trunk of a frozen generator. From text of which some was masked and filled by the decoder it learns
which tokens the decoder generated. Asking instead which tokens differ from the text's own would blame every token that
could have been another. A target for every token teaches more than one for the whole sequence (ELECTRA,
https://arxiv.org/abs/2003.10555). A causal model can judge too, by bits per character.
"""

import torch
import torch.nn.functional as F

import autoregressive
from checkpoint import load_model, require_generator, require_same_vocabulary
from corpus import bits_per_nat
from decoding import decode_window, default_config
from diffusion import draw_masks, spread_ratios
from errors import InputError
from metrics import rank_correlation
from progress import bar

ITERATIONS = (1, 4, 15)       # of the fills: those that users run
TEMPERATURES = (0.6, 1.2)     # range of the fills
CLEAN, BLANK = 0.25, 0.25     # share of sequences that stay real, and of batches that the decoder writes whole


def load_generator(path, corpus, block_size):
    """The frozen generator of a judge's examples. InputError unless it is one, of this vocabulary and block size."""
    model, _, saved = load_model(path)
    require_generator(model, path)
    if model.config.block_size < block_size:
        raise InputError(f'{path!r} has block_size={model.config.block_size}, the judge {block_size}; wanted no more')
    require_same_vocabulary(saved['corpus'], path, corpus)
    return model


def make_examples(generator, x0, rng):
    """Sequences that the frozen generator wrote in part, in whole or not at all, with its default settings.

    x0 (B, T) ids; rng: numpy Generator, which chooses masks, iterations, temperature and whether the sampler head is
    used, for the whole batch. Returns x (B, T) ids and real (B, T) bool, False where the decoder generated the token.
    """
    (B, T), blank = x0.shape, bool(rng.random() < BLANK)
    noise = torch.Generator(x0.device).manual_seed(int(rng.integers(2 ** 62)))
    ratio = (spread_ratios(B, noise, x0.device) - CLEAN) / (1 - CLEAN)    # up to 0: stays real
    mask = draw_masks(ratio.clamp(1 / T, 1), T, noise)
    mask = (mask | blank) & (ratio > 0)[:, None]
    config = default_config(generator, int(rng.choice(ITERATIONS)), prefix_only=blank,
                            use_sampler=generator.sampler_head is not None and bool(rng.integers(2)),
                            temperature=float(rng.uniform(*TEMPERATURES)), seed=int(rng.integers(2 ** 31)))
    return decode_window(generator, x0, mask, config, range(B), range(T)).x, ~mask


def token_logits(trunk, model, x):
    """Logit that each token is real: x (B, T) ids -> (B, T) float32."""
    return model.score_head(trunk(x))[..., 0].float()


def loss(trunk, model, x, real):
    """Binary cross-entropy over all positions, nats: x (B, T) ids, real (B, T) bool."""
    return F.binary_cross_entropy_with_logits(token_logits(trunk, model, x), real.float())


@torch.no_grad()
def validate(model, generator, x0, batch_size, rng):
    """Loss and Spearman's rank correlation of score and share of real tokens over examples from x0 (N, T) ids.

    Returns {'loss': nats per token, 'rank_correlation'}.
    """
    losses, scores, shares = [], [], []
    for part in bar(x0.split(batch_size), 'evaluation'):
        x, real = make_examples(generator, part, rng)
        logits = token_logits(model, model, x)
        losses.append(F.binary_cross_entropy_with_logits(logits, real.float(), reduction='none').mean(1))
        scores.append(torch.sigmoid(logits).mean(1))
        shares.append(real.float().mean(1))
    correlation = rank_correlation(torch.cat(scores), torch.cat(shares))
    return {'loss': torch.cat(losses).mean().item(), 'rank_correlation': correlation}


class Judge:
    """Scores samples with a sequence scorer or a causal model. InputError for another kind of model."""

    def __init__(self, model, path, corpus_meta):
        self.model = model
        self.is_scorer = model.config.model_mode == 'sequence_scorer'
        if not self.is_scorer and model.config.attention_type != 'causal':
            raise InputError(f'{path!r} is a masked-diffusion model, wanted a judge: a sequence scorer '
                             f'(config/train_judge.py) or a causal model (config/train_char_ar.py)')
        self.bits = bits_per_nat(corpus_meta)
        self.meaning = 'mean chance that a token is real text, 0 to 1, high is good' if self.is_scorer else \
            'bits per character under a causal model, low is good'

    @classmethod
    def load(cls, path, corpus, device):
        """The judge at path. InputError unless its vocabulary is that of corpus, a corpus's meta."""
        model, _, saved = load_model(path, 'judge')
        require_same_vocabulary(saved['corpus'], path, corpus)
        return cls(model.to(device), path, saved['corpus'])

    @torch.no_grad()
    def score(self, x):
        """One score for each sequence of x (B, L) ids, (B,) float; longer than a block, it is scored block by block."""
        size = self.model.config.block_size
        if self.is_scorer:
            parts = [torch.sigmoid(token_logits(self.model, self.model, part)) for part in x.split(size, 1)]
            return torch.cat(parts, 1).mean(1)
        starts = range(0, max(1, x.size(1) - 1), size)
        parts = [autoregressive.nll(self.model, self.model, x[:, start:start + size + 1]) for start in starts]
        return torch.cat(parts, 1).mean(1) * self.bits

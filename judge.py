"""The judge: a separate model that scores whole samples, the share of a row's tokens that were left intact.

It starts from the trunk of a frozen generator and is trained on clean rows, partly masked and filled by that generator.
Its score is the mean over places of the chance that the token is the row's own: a target for every token teaches more
than one for the whole row (ELECTRA, https://arxiv.org/abs/2003.10555). A causal model can judge too, by bits per character.
"""
import math

import torch
import torch.nn.functional as F

import autoregressive
from diffusion import Decoder, decode_block, linear_ratios, mask_tokens, spread_ratios
from errors import InputError

TEMPERATURES = (0.7, 1.0)    # range of the fills
PASSES = (1, 2, 4)
CORRECTIONS = (0, 2)


def make_rows(generator, x0, rng):
    """Damage clean rows: mask each at its own ratio and let the frozen generator fill it.

    x0 (B, T) ids; rng: numpy Generator, which chooses masks, decoder, passes, corrections and temperature of the batch.
    Returns x (B, T) filled and intact (B, T) bool, where x is x0.
    """
    noise = torch.Generator(x0.device).manual_seed(int(rng.integers(2 ** 62)))
    _, mask = mask_tokens(x0, spread_ratios(len(x0), noise, x0.device), generator.mask_id, noise)
    mask[rng.integers(len(x0))] = False    # one row stays whole
    decoder = Decoder(use_sampler=generator.sampler_head is not None and bool(rng.integers(2)),
                      ratios=tuple(linear_ratios(int(rng.choice(PASSES)), 0.6, 0.2)),
                      temperature=float(rng.uniform(*TEMPERATURES)), corrections=int(rng.choice(CORRECTIONS)), seed=int(rng.integers(2 ** 31)))
    x = decode_block(generator, x0, mask, decoder, range(len(x0)), range(x0.size(1)))[0]
    return x, x == x0


def start_from(model, generator):
    """Give a fresh judge the generator's trunk, which knows the text already, if the two have one shape. Returns whether."""
    weights = {name: p for name, p in generator.state_dict().items() if not name.startswith(('sampler_head', 'critic_head'))}
    shapes = {name: p.shape for name, p in model.state_dict().items() if not name.startswith('score_head')}
    same = shapes == {name: p.shape for name, p in weights.items()}
    if same:
        model.load_state_dict(weights, strict=False)
    return same


def token_logits(trunk, model, x):
    """Logit at each place that its token is intact: x (B, T) ids -> (B, T)."""
    return model.score_head(trunk(x))[..., 0].float()


def loss(trunk, model, x, intact):
    """Binary cross-entropy over all places, nats: x (B, T) ids, intact (B, T) bool."""
    return F.binary_cross_entropy_with_logits(token_logits(trunk, model, x), intact.float())


@torch.no_grad()
def validate(model, generator, x0, batch_size, rng):
    """Loss and Spearman rank correlation of score and true share on rows (R, T) damaged by the generator."""
    losses, scores, shares = [], [], []
    for part in x0.split(batch_size):
        x, intact = make_rows(generator, part, rng)
        logits = token_logits(model, model, x)
        losses.append(F.binary_cross_entropy_with_logits(logits, intact.float()))
        scores.append(torch.sigmoid(logits).mean(1))
        shares.append(intact.float().mean(1))
    return {'loss': torch.stack(losses).mean().item(), 'rank_correlation': rank_correlation(torch.cat(scores), torch.cat(shares))}


def rank_correlation(a, b):
    """Spearman's rank correlation of a, b (N,), equal values sharing their mean rank."""
    def ranks(x):
        _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        return (last - (counts - 1) / 2)[inverse]
    return torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1].item()


class Judge:
    """Scores samples with a sequence scorer or a causal model. InputError for another kind of model."""

    def __init__(self, model, path, corpus):
        self.model = model
        self.scorer = model.config.model_mode == 'sequence_scorer'
        if not self.scorer and model.config.attention_type != 'causal':
            raise InputError(f'{path!r} is a masked-diffusion model, wanted a judge: a sequence scorer '
                             f'(config/train_judge.py) or a causal model (config/train_char_ar.py)')
        self.bits = corpus['val_tokens'] / corpus['val_chars'] / math.log(2)
        self.meaning = 'estimated share of intact tokens, 0 to 1, high is good' if self.scorer else \
            'bits per character under a causal model, low is good'

    @torch.no_grad()
    def score(self, x):
        """One score for each row of x (B, L) ids of any length, (B,) float; longer rows are scored block by block."""
        size = self.model.config.block_size
        if self.scorer:
            parts = [torch.sigmoid(token_logits(self.model, self.model, part)) for part in x.split(size, 1)]
            return torch.cat(parts, 1).mean(1)
        starts = range(0, max(1, x.size(1) - 1), size)
        parts = [autoregressive.nll(self.model, self.model, x[:, start:start + size + 1]) for start in starts]
        return torch.cat(parts, 1).mean(1) * self.bits

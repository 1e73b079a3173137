"""What is minimised: the losses of one micro-step, as a module, and the validation of what it trains.

One class for each kind of model: masked diffusion with its heads, the autoregressive baseline, the judge. Each is a
module whose forward returns every loss, {'main': ..., 'sampler': ..., 'critic': ...}, so that DistributedDataParallel
sees one forward for one backward. figure is what validation chooses the best checkpoint by, title its name in the log.
"""
import numpy as np
import torch
import torch.nn as nn

import autoregressive
import diffusion
import judge
from noise import JUDGE, MASKS, TEXT_BLOCKS, TEXT_MASKS, derive


def make_objective(model, config, generator=None):
    """The objective that the settings ask for; generator: the frozen model whose fills a judge learns from."""
    if generator is not None:
        return JudgeObjective(model, config, generator)
    return (AutoregressiveObjective if config.attention_type == 'causal' else DiffusionObjective)(model, config)


class Objective(nn.Module):
    """forward(x0, seed, share, *rows) returns the losses, each weighed as a part of those of the global batch.

    x0: the sequences of an iteration that a batches.Share says; seed: of the iteration's noise; rows: as
    schedules.rows_to_learn_from gives them. Dropout, which train.py seeds, and a judge's examples alone are drawn by
    each process for itself.
    """
    extra_tokens = 0    # that a training sequence has beyond block_size

    def __init__(self, model, config):
        super().__init__()
        self.model, self.text_masking = model, config.text_masking
        # a function, not a module: the parameters are those of model, once
        compiled = config.compile and not config.shard and config.device.startswith('cuda')
        self.trunk = torch.compile(model.forward) if compiled else model.forward

    def partly_masked(self, text, seed, share):
        """text (R, T) of a Share of the global batch, as the trunk reads it from left to right in training.

        In each sequence a share of the tokens, drawn uniformly from 0 to twice text_masking, is masked: blank noising
        (arXiv:1703.02573, there with one share for all) against learning by heart what is read many times.
        """
        if not self.text_masking:
            return text
        generator = torch.Generator().manual_seed(derive(seed, TEXT_MASKS))
        ratio = 2 * self.text_masking * torch.rand(share.total, 1, generator=generator)
        mask = torch.rand(share.total, text.size(1), generator=generator) < ratio
        return text.masked_fill(mask[list(share.numbers)].to(text.device, non_blocking=True), self.model.mask_id)


class DiffusionObjective(Objective):
    figure, title = 'nelbo', 'NELBO'

    def forward(self, x0, seed, share, sampler_rows=0, critic_rows=0, block_rows=0):
        """x0 (B, T) clean ids; block_rows: how many sequences of the global batch, half at most, are read in blocks and
        not masked; the other *_rows: see diffusion.head_losses. The trunk's losses are main, of masks, and blocks."""
        n_blocks = min(block_rows, share.total // 2) if x0.size(1) > 2 else 0
        masked, in_blocks = share.split(n_blocks)
        x0, text = x0.split((len(masked.numbers), len(in_blocks.numbers)))
        generator = torch.Generator().manual_seed(derive(seed, MASKS))
        t = diffusion.beta_ratios(diffusion.spread_ratios(masked.total, generator))
        all_masks = diffusion.draw_masks(t, x0.size(1), generator)
        mask = all_masks[list(masked.numbers)].to(x0.device, non_blocking=True)
        batch = diffusion.forward_masked(self.trunk, self.model, x0, mask, masked, all_masks)
        losses, blocks, of_blocks = {'main': diffusion.masked_loss(batch)}, None, {}
        if n_blocks:
            generator = torch.Generator().manual_seed(derive(seed, TEXT_BLOCKS))
            blocks, of_blocks['blocks'] = diffusion.forward_blocks(
                self.trunk, self.model, text, generator, in_blocks, self.partly_masked(text, seed, in_blocks),
                viewed=sampler_rows > 0)
        heads, _ = diffusion.head_losses(self.model, batch, seed, sampler_rows, critic_rows, blocks=blocks)
        return losses | heads | of_blocks

    def validate(self, x0, batch_size, seed, sampler, critic):
        return diffusion.validate(self.model, x0, batch_size, seed, sampler, critic)


class AutoregressiveObjective(Objective):
    figure, title = 'nll', 'NLL'
    extra_tokens = 1

    def forward(self, x0, seed, share, *rows):
        """x0 (B, T + 1) ids."""
        return {'main': autoregressive.nll(self.trunk, self.model, x0, self.partly_masked(x0, seed, share)).mean()}

    def validate(self, x0, batch_size, seed, sampler, critic):
        return autoregressive.validate(self.model, x0, batch_size)


class JudgeObjective(Objective):
    figure, title = 'loss', 'loss'

    def __init__(self, model, config, generator):
        super().__init__(model, config)
        self.generator = [generator]    # in a list: no part of what is trained

    def forward(self, x0, seed, share, *rows):
        """x0 (B, T) clean ids, of which the generator damages a part, each process as it draws for itself."""
        x, real = judge.make_examples(self.generator[0], x0, np.random.default_rng(derive(seed, JUDGE, share.first)))
        return {'main': judge.loss(self.trunk, self.model, x, real)}

    def validate(self, x0, batch_size, seed, sampler, critic):
        return judge.validate(self.model, self.generator[0], x0, batch_size, np.random.default_rng(seed))

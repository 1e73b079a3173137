"""What is minimised: the losses of one micro-step, as a module, and the validation of what it trains.

One class for each kind of model: masked diffusion with its heads, the autoregressive baseline, the judge. Each is a
module whose forward returns every loss, {'main': ..., 'sampler': ..., 'critic': ...}, so that DistributedDataParallel
sees one forward for one backward. figure is what validation chooses the best checkpoint by, title its name in the log.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import autoregressive
import diffusion
import judge
from noise import derive
from sampler import spread_choice


def make_objective(model, config, generator=None):
    """The objective that the settings ask for; generator: the frozen model whose fills a judge learns from."""
    if generator is not None:
        return JudgeObjective(model, config, generator)
    return (AutoregressiveObjective if config.attention_type == 'causal' else DiffusionObjective)(model, config)


class Objective(nn.Module):
    extra_tokens = 0    # that a training sequence has beyond block_size

    def __init__(self, model, config):
        super().__init__()
        self.model = model
        # a function, not a module: the parameters are those of model, once
        compiled = config.compile and not config.shard and config.device.startswith('cuda')
        self.trunk = torch.compile(model.forward) if compiled else model.forward


class DiffusionObjective(Objective):
    figure, title = 'nelbo', 'NELBO'

    def forward(self, x0, seed, sampler_rows=0, critic_rows=0, block_rows=0):
        """x0 (B, T) clean ids; seed: of masks, dropout and the heads' noise; block_rows: sequences read in blocks too;
        the other *_rows: see diffusion.head_losses. main is the masked loss plus that of the blocks."""
        torch.manual_seed(seed)
        t = diffusion.beta_ratios(diffusion.spread_ratios(len(x0))).to(x0.device, non_blocking=True)
        xt, mask = diffusion.mask_tokens(x0, t, self.model.mask_id)
        batch = diffusion.forward_masked(self.trunk, self.model, x0, xt, mask)
        main, blocks = F.cross_entropy(batch.lm_logits, batch.targets), None
        if block_rows and x0.size(1) > 1:
            generator = torch.Generator().manual_seed(derive(seed, 4))
            chosen = spread_choice(len(x0), block_rows, generator).to(x0.device)
            blocks, block_loss = diffusion.forward_blocks(self.trunk, self.model, x0[chosen], generator)
            main = main + block_loss
        heads = diffusion.head_losses(self.model, batch, seed, sampler_rows, critic_rows, blocks=blocks)
        return {'main': main} | {name: heads[name] for name in ('sampler', 'critic') if name in heads}

    def validate(self, x0, batch_size, seed, sampler, critic):
        return diffusion.validate(self.model, x0, batch_size, seed, sampler, critic)


class AutoregressiveObjective(Objective):
    figure, title = 'nll', 'NLL'
    extra_tokens = 1

    def forward(self, x0, seed, sampler_rows=0, critic_rows=0, block_rows=0):
        """x0 (B, T + 1) ids."""
        torch.manual_seed(seed)
        return {'main': autoregressive.nll(self.trunk, self.model, x0).mean()}

    def validate(self, x0, batch_size, seed, sampler, critic):
        return autoregressive.validate(self.model, x0, batch_size)


class JudgeObjective(Objective):
    figure, title = 'loss', 'loss'

    def __init__(self, model, config, generator):
        super().__init__(model, config)
        self.generator = [generator]    # in a list: no part of what is trained

    def forward(self, x0, seed, sampler_rows=0, critic_rows=0, block_rows=0):
        """x0 (B, T) clean ids, of which the generator damages a part."""
        x, real = judge.make_examples(self.generator[0], x0, np.random.default_rng(derive(seed, 3)))
        torch.manual_seed(seed)
        return {'main': judge.loss(self.trunk, self.model, x, real)}

    def validate(self, x0, batch_size, seed, sampler, critic):
        return judge.validate(self.model, self.generator[0], x0, batch_size, np.random.default_rng(seed))

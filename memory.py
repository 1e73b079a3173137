"""What memory cannot hold is refused before any of it is taken: lower bounds, so that nothing that fits is refused."""
import math
import os
from dataclasses import replace

import torch
from torch.overrides import TorchFunctionMode

from errors import InputError
from model import GPT

CGROUP = '/sys/fs/cgroup/memory.max'    # a container's limit


class NothingComputed(TorchFunctionMode):
    """Skips what the meta device would compute in Python: for that it imports torch's compiler, 1.2 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.init.normal_:
            return kwargs['tensor']
        return function(*args, **kwargs | ({'device': 'cpu'} if function is torch.arange else {}))    # of the tables


def skeleton(config):
    """The model of a GPTConfig without memory: names, shapes and dtypes of its weights (torch's meta device).

    Its tables of rotary angles are those of one position.
    """
    with torch.device('meta'), NothingComputed():
        return GPT(replace(config, block_size=1))


def available(device):
    """Bytes of memory that the device, 'cpu', 'mps' or 'cuda...', has altogether."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, 'sysconf'):    # Windows: nothing is refused
        return math.inf
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    try:
        with open(CGROUP) as f:
            return min(total, int(f.read()))
    except (OSError, ValueError):    # none, or 'max'
        return total


def require(needed, device, what):
    """InputError where the device cannot hold what needs so many bytes at least."""
    found = available(device)
    if needed > found:
        raise InputError(f'{what} needs more than {needed / 2 ** 30:,.1f} GiB of memory, {device} has '
                         f'{found / 2 ** 30:,.1f} GiB; wanted smaller sizes')


def of_model(config):
    """Bytes of the weights and tables of the model of a GPTConfig, in float32."""
    model = skeleton(config)
    other_positions = (config.block_size - 1) * (config.n_embd // config.n_head)    # in the tables
    return 4 * (sum(t.numel() for t in (*model.parameters(), *model.buffers())) + other_positions)


def of_activations(config, tokens):
    """Bytes that the backward pass over so many tokens keeps at least: projections of attention and MLP, 16 bits."""
    return 2 * tokens * config.n_layer * 8 * config.n_embd


def require_for_training(config, model_config, device, divisor, parts=1):
    """InputError where weights, gradients, moments and the activations of a micro-step, or evaluation, do not fit.

    parts: into how many processes divide weights, gradients and moments.
    """
    tokens = config.batch_size // divisor * config.block_size
    needed = of_model(model_config) // parts
    if not (config.eval_only or config.freeze_trunk):
        needed = 3 * needed + of_activations(config, tokens)
    require(needed, device, f'the model with its optimizer and micro-steps of {config.batch_size // divisor} x '
                            f'{config.block_size} tokens')
    require(8 * config.eval_rows * config.block_size, device, f'an evaluation with eval_rows={config.eval_rows}')

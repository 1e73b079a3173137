"""Weights, gradients and moments divided among the processes, for a model that one device cannot train: FSDP2.

Every block of the trunk is a unit, whose weights are gathered when it is read and let go afterwards; everything else is
gathered while the objective runs. AdamW moves each process's part of a weight; Muon needs whole matrices.

Reference: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""
from contextlib import contextmanager

import torch


class WholeMuon(torch.optim.Muon):
    """Muon for divided matrices, which are gathered for their step one after another.

    It would take them as they are. But the parts of its products, summed in bfloat16, then round otherwise, and where a
    gradient is small Muon makes of that rounding an update as large as any: the run would be another one.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                matrix = torch.nn.Parameter(full(p))
                matrix.grad = full(p.grad)
                alone = torch.optim.Muon([matrix], **{k: v for k, v in group.items() if k != 'params'})
                alone.state[matrix] = {name: full(moment) for name, moment in self.state[p].items()}
                alone.step()
                p.copy_(part_of(matrix.data, p))
                self.state[p] = {name: part_of(moment, p) for name, moment in alone.state[matrix].items()}


def shard(objective, optimizers, processes, make_optimizers):
    """Divide the model of objective, whose parts move to their devices, and the moments of optimizers among processes.

    What will ever train requires a gradient by now. optimizers {part: [optimizer]}; returns those that go on in their
    place, which make_optimizers(class of Muon) makes.
    """
    # not above: a second that whoever does not divide anything would wait
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(processes.device.split(':')[0], (processes.world,))
    for block in objective.model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh, reshard_after_forward=True)    # not kept whole, as a root's weights would be
    register_fsdp_forward_method(objective, 'validate')
    made = make_optimizers(WholeMuon)
    for part, group in made.items():
        for optimizer, plain in zip(group, optimizers[part]):
            optimizer.load_state_dict(divided(plain.state_dict(), optimizer.param_groups[0]['params']))
    return made


def divided(state, params):
    """The state dict of an optimizer, with moments divided as params, which they belong to in this order."""
    moments = {i: {name: value if name == 'step' else part_of(value, params[i]) for name, value in values.items()}
               for i, values in state['state'].items()}
    return state | {'state': moments}


def part_of(value, p):
    """A tensor that every process has whole, divided as the parameter p."""
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


@contextmanager
def whole(model):
    """For a while the weights of blocks are whole, for what reads them past block.forward, as cache.py does."""
    blocks = [module for module in model.modules() if hasattr(module, 'unshard')]
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True)
            block.reshard()


def full(tensor):
    """The whole of a tensor, where it is divided; all processes take part."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def gathered(value, keep=True):
    """The same of nested dicts and lists, with whole tensors on the CPU for divided ones; all processes take part.

    keep False: without them, where another process keeps them.
    """
    if hasattr(value, 'full_tensor'):
        whole = full(value)
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gathered(one, keep) for key, one in value.items()}
    return [gathered(one, keep) for one in value] if isinstance(value, list) else value

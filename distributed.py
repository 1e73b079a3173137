"""Several processes as one run: who speaks, how the work is shared, gradients averaged by DistributedDataParallel.

    torchrun --standalone --nproc_per_node=4 train.py config/train_char_diffusion_sampler.py
"""
import os
import sys
from contextlib import nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import heartbeat
from environment import rank_and_world
from errors import InputError

TORCHRUN = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
LONGEST = timedelta(hours=3)    # that the others wait for the first, which evaluates and saves; heartbeat.py is quicker


class Processes:
    """The processes of a run, as torchrun's environment describes them; a run without torchrun has one."""

    def __init__(self, device, shard=False):
        """device 'cuda', 'mps' or 'cpu'; .device is this process's own. shard: several divide the model among them."""
        self.rank, self.world = rank_and_world()
        names = TORCHRUN + ('LOCAL_RANK',) * (device == 'cuda')
        said = {name: os.environ.get(name, '') for name in names}
        if (said['WORLD_SIZE'] or '1') != str(self.world) or self.world > 1 and (
                '' in said.values() or not 0 <= self.rank < self.world):
            raise InputError(f'the environment has {", ".join(f"{name}={value}" for name, value in said.items())}; '
                             f'wanted what torchrun sets, or none of it')
        self.master_process, self.shards = self.rank == 0, shard and self.world > 1
        self.device = device
        if self.world > 1:
            if device.startswith('cuda:'):
                raise InputError(f'device {device!r} with {self.world} processes would put all of them on one GPU; '
                                 f'wanted cuda, of which each process takes its own')
            if device == 'cuda':
                self.device = f'cuda:{os.environ["LOCAL_RANK"]}'
                torch.cuda.set_device(self.device)
            dist.init_process_group('nccl' if self.device.startswith('cuda') else 'gloo', timeout=LONGEST)
            self.heartbeat = heartbeat.connected(self.rank, self.world, self.of_first)

    def print0(self, *args):
        """Print in the first process alone."""
        if self.master_process:
            print(*args, flush=True)

    def first_speaks(self):
        """A context in which the prints of every process but the first are lost."""
        return nullcontext() if self.master_process else redirect_stdout(None)

    def share(self, n):
        """The part of range(n) that is this process's, in one piece; the first process has the first of it."""
        return share_of(n, self.rank, self.world)

    def gathered(self, value):
        """The values of all processes, in their order, in all of them; they are pickled on the way."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def of_first(self, function):
        """What function() returns in the first process, in all of them."""
        if not dist.is_initialized():
            return function()
        result = [function() if self.master_process else None]
        dist.broadcast_object_list(result)
        return result[0]

    def wrap(self, module, some_wait=False):
        """module with gradients averaged over processes, its weights made equal; anew when other parameters train.

        some_wait: some parameters are not used in every iteration.
        """
        if self.world == 1 or self.shards or not any(p.requires_grad for p in module.parameters()):
            return module
        ids = [self.device] if self.device.startswith('cuda') else None
        return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=some_wait)

    def mean(self, values):
        """Mean over processes of a 1-d tensor."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def largest(self, number):
        """The largest of the processes' ints, in all of them."""
        if self.world == 1:
            return number
        values = torch.tensor(number, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.world == 1:
            return
        if kind is None:
            dist.barrier()    # the first may still be saving, and gloo aborts when the others leave
            self.heartbeat.leave()
            dist.destroy_process_group()
        else:
            self.heartbeat.fail(error)
            if isinstance(error, InputError):
                leave(2)


def leave(status=0):
    """End a process of several, past the interpreter's finalization.

    A thread of gloo, which outlives destroy_process_group after DistributedDataParallel, may still hold the last work;
    it then asks for the interpreter's lock, which finalization no longer gives, and aborts the process, in one run of
    24 on a busy machine. Source: https://github.com/pytorch/pytorch/pull/179291
    """
    if rank_and_world()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def without_sync(module, last):
    """Context of a micro-step: gradients are averaged in the last one of an iteration alone."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def share_of(n, rank, world):
    """The part of range(n) that the process of this rank has, of world processes."""
    return range(*(-(-n * r // world) for r in (rank, rank + 1)))


def share_batch(accumulation, batch_size, world):
    """Micro-steps of each process in an iteration, and the number that every micro-batch is divided by.

    The global batch, accumulation * batch_size sequences, does not depend on the number of processes: they share the
    micro-steps where these divide evenly, else the sequences of each. InputError where neither does.
    """
    if accumulation % world == 0:
        return accumulation // world, 1
    if batch_size % world == 0:
        return accumulation, world
    raise InputError(f'{world} processes can share neither gradient_accumulation_steps={accumulation} nor '
                     f'batch_size={batch_size}; wanted a multiple of {world} for one of them')

"""Measuring time: rows run in turn, so that other work on the machine meets them alike, and what the machine is.

A ratio of two rows is the median over rounds of their ratio within the round.
"""
import os
import platform
import time
from contextlib import contextmanager
from statistics import median

import torch


def synchronize(device):
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of named parts, added up: with clock('forward'): ..."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    @contextmanager
    def __call__(self, name):
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start


def in_turn(rows, rounds, device, show=lambda name: None):
    """{name: [{'total': seconds, part: seconds} of each round]} of rows {name: function of a Clock}.

    One round is for warming up. Every other round goes backwards, so that no row always follows the same one.
    """
    found = {name: [] for name in rows}
    for i in range(rounds + 1):
        for name in (list(rows), list(rows)[::-1])[i % 2]:
            show(name)
            clock = Clock(device)
            with clock('total'):
                rows[name](clock)
            if i:
                found[name].append(clock.seconds)
    return found


def medians(seconds):
    """Median of every part over the rounds of one row."""
    return {part: median(s.get(part, 0.0) for s in seconds) for part in seconds[0]}


def ratio(rounds, a, b):
    """How many times as long a takes as b; None where one of them was not run."""
    if not rounds.get(a) or not rounds.get(b):
        return None
    return median(x['total'] / y['total'] for x, y in zip(rounds[a], rounds[b]))


def peak_memory(device):
    """Bytes at the highest so far: of the GPU, or of this process."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == 'Linux':    # whose ru_maxrss is that of the process that started this one, if that is more
        with open('/proc/self/status') as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith('VmHWM'))
    import resource    # not above: Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == 'Darwin' else 1024)


def matmul_rate(device, dtype, n=1024):
    """FLOP/s of a product of two n x n matrices: what utilisation is a share of; the best of ten."""
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(10):
        clock = Clock(device)
        with clock('product'):
            a @ a
        best = max(best, 2 * n ** 3 / clock.seconds['product'])
    return best


def machine(device):
    """{name, cores, threads, load of other work, torch} of where this runs."""
    name = platform.processor() or platform.machine()
    if device.startswith('cuda'):
        name = torch.cuda.get_device_name(device)
    elif os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            name = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), name)
    return {'machine': name, 'cores': os.cpu_count(), 'threads': torch.get_num_threads(),
            'load_before': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
            'torch': torch.__version__, 'python': platform.python_version()}

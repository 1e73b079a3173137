"""Which device and precision a run uses: what --device and --dtype mean, for training and decoding alike."""
import time
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F

import choices
from errors import InputError

DTYPES = {name: getattr(torch, name) for name in choices.DTYPES}


def pick_device(name):
    """'cuda', 'mps' or 'cpu'; 'auto' is the first of them that is available. InputError if the named one is not."""
    found = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(device for device, available in found.items() if available)
    kind, colon, number = name.partition(':')
    count = torch.cuda.device_count() if kind == 'cuda' else 1
    if not found.get(kind, False) or colon and not (number.isdecimal() and int(number) < count):
        available = ', '.join(device for device in found if found[device])
        raise InputError(f'device {name!r} is not available, wanted auto or one of {available}')
    return name


def pick_dtype(name, device):
    """A name in DTYPES; 'auto' is bfloat16 where the hardware multiplies matrices faster in it, else float32."""
    if name == 'auto':
        fast = torch.cuda.is_bf16_supported() if device.startswith('cuda') else \
            device.startswith('cpu') and bfloat16_speedup() > 1.2
        return 'bfloat16' if fast else 'float32'
    if name not in DTYPES:
        raise InputError(f'dtype {name!r}, wanted auto, {", ".join(DTYPES)}')
    return name


@cache
def bfloat16_speedup():
    """How many times as fast a CPU multiplies matrices in bfloat16 as in float32: measured, in a tenth of a second.

    Flags of the processor do not tell: AVX512-BF16 and AMX both make bfloat16 the faster one, older ones the slower.
    """
    with torch.random.fork_rng(devices=[]):
        x, weight = torch.randn(1024, 256), torch.randn(768, 256)
    times = {torch.float32: [], torch.bfloat16: []}
    for _ in range(10):    # in turn, so that other work on the machine slows both
        for dtype, seconds in times.items():
            operands = x.to(dtype), weight.to(dtype)
            start = time.perf_counter()
            F.linear(*operands)
            seconds.append(time.perf_counter() - start)
    return min(times[torch.float32]) / min(times[torch.bfloat16])


def autocast(device, dtype):
    """Context in which matrix products run in dtype: nothing changes for float32 and float64."""
    if dtype in ('float32', 'float64'):
        return nullcontext()
    return torch.autocast(device.split(':')[0], dtype=DTYPES[dtype])

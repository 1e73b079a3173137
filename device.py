"""Which device and precision a run uses: what --device and --dtype mean, for training and decoding alike."""
from contextlib import nullcontext

import torch

from errors import InputError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float64': torch.float64}


def pick_device(name):
    """'cuda', 'mps' or 'cpu'; 'auto' is the first of them that is there. InputError if it is not."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(device for device, found in there.items() if found)
    if not there.get(name.split(':')[0], False):
        raise InputError(f'device {name!r} is not here, wanted auto or one of {", ".join(d for d in there if there[d])}')
    return name


def pick_dtype(name, device):
    """A name in DTYPES; 'auto' is bfloat16 on hardware that multiplies matrices in it, float32 elsewhere."""
    if name == 'auto':
        fast = torch.cuda.is_bf16_supported() if device.startswith('cuda') else \
            device == 'cpu' and torch.cpu._is_amx_tile_supported()
        return 'bfloat16' if fast else 'float32'
    if name not in DTYPES:
        raise InputError(f'dtype {name!r}, wanted auto, {", ".join(DTYPES)}')
    return name


def autocast(device, dtype):
    """Context in which matrix products run in dtype: nothing changes for float32 and float64."""
    if dtype in ('float32', 'float64'):
        return nullcontext()
    return torch.autocast(device.split(':')[0], dtype=DTYPES[dtype])

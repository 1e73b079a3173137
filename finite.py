"""NaN and infinity in training: noticed in losses and gradients, named, and kept out of every checkpoint.

No iteration waits for the device. The iteration at which a value first was not finite is kept there, a number for each
value; it is looked at where the device is waited for anyway, at log lines, and before anything is saved.
"""
import torch

from errors import InputError

NEVER = 2 ** 62
LOWEST_SCALE = 2.0 ** -20    # of float16's losses, which begin at 2 ** 16: every batch of the last 36 overflowed
HELP = 'try a lower learning_rate or muon_learning_rate'


class Watch:
    """Remembers the iteration at which each value first was not finite."""

    def __init__(self):
        self.first = {}    # {what: 0-d int64 on the device}

    def note(self, it, values):
        """Look at {what: 0-d tensor} of iteration it."""
        for what, value in values.items():
            first = self.first.get(what)
            if first is None:
                first = torch.full_like(value, NEVER, dtype=torch.int64)
            self.first[what] = torch.where(value.isfinite(), first, first.clamp(max=it))

    def check(self, stage_of, saved):
        """InputError names what first was not finite. stage_of: iteration -> stage; saved: the last good checkpoint.

        A sync point.
        """
        if not self.first:
            return
        found = torch.stack(list(self.first.values())).tolist()
        it, what = min(zip(found, self.first), key=lambda pair: pair[0])
        if it < NEVER:
            raise InputError(f'iteration {it}, stage {stage_of(it)}: {what} is not finite; nothing is saved, '
                             f'{last_good(saved)}; {HELP}')


def check_scaler(scaler, it, saved):
    """InputError where float16's loss scale has fallen so far that no batch trains any more."""
    if scaler.is_enabled() and scaler.get_scale() < LOWEST_SCALE:
        raise InputError(f'iteration {it}: the loss scale of float16 fell to {scaler.get_scale():g}, batch after batch '
                         f'overflows; {last_good(saved)}; {HELP}, or dtype=bfloat16')


def last_good(saved):
    return f'the last good checkpoint is {saved}' if saved else 'there is no checkpoint yet'


def tensors(value, name=''):
    """(name, tensor) of every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(one, f'{name}.{key}' if name else str(key))


def require_finite(value, path):
    """InputError names the first tensor of nested dicts and lists that holds a number that is not finite."""
    for name, tensor in tensors(value):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f'{path!r}: {name} holds numbers that are not finite, which a checkpoint never does')

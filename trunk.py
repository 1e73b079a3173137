"""The trunk of a finished model, for a model that has other heads: config/fit_sampler.py, and the judge's start."""
import hashlib

from checkpoint import load_model, require_generator, require_same_vocabulary
from errors import InputError

HEADS = ('sampler_head', 'critic_head', 'score_head')
SHAPE = ('block_size', 'n_layer', 'n_head', 'n_embd')


def weights_of(model):
    """{name: tensor} of everything but the heads."""
    return {name: p for name, p in model.state_dict().items() if not name.startswith(HEADS)}


def copy(source, model):
    """Give model the trunk of source if the shapes agree. Returns whether they do."""
    weights = weights_of(source)
    same = {name: p.shape for name, p in weights.items()} == {name: p.shape for name, p in weights_of(model).items()}
    if same:
        model.load_state_dict(weights, strict=False)
    return same


def start_from(model, path, corpus):
    """Give model the trunk of the checkpoint at path. InputError unless it generates and fits the run."""
    source, _, saved = load_model(path)
    require_generator(source, path)
    require_same_vocabulary(saved['corpus'], path, corpus)
    shapes = [{name: getattr(m.config, name) for name in SHAPE} for m in (source, model)]
    if shapes[0] != shapes[1]:
        wanted = ' '.join(f'--{name}={value}' for name, value in shapes[0].items() if value != shapes[1][name])
        raise InputError(f'the trunk of {path!r} has another shape than this run; give {wanted}')
    if model.reads_text and not source.reads_text:
        raise InputError(f'the trunk of {path!r} did not learn to read text from left to right; give --block_rows=0')
    copy(source, model)


def digest(path):
    """Of all weights of the checkpoint at path, hexadecimal: the same wherever it lies and whatever else it holds."""
    found = hashlib.sha256()
    for name, weight in load_model(path)[0].state_dict().items():
        found.update(f'{name} {tuple(weight.shape)}'.encode() + weight.numpy().tobytes())
    return found.hexdigest()[:16]

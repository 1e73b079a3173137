"""Checkpoints: a plain dict in one file, written whole or not at all, loaded without executing anything in it.

Keys: model_args (the fields of GPTConfig), model, optimizer, begins (the iteration at which each part began to learn),
iter_num, best_val_loss, config (every setting of the run), corpus (vocabulary and source), commit. No random states: randomness is a function of seed and iteration.
"""
import os
import pickle
from dataclasses import fields

import torch

from corpus import Tokenizer
from errors import InputError
from model import GPT, GPTConfig

WANTED = {'model_args', 'model', 'iter_num', 'config', 'corpus'}


def save(path, checkpoint):
    """Write checkpoint to path through a temporary file: a kill at any instant leaves the previous one whole."""
    part = f'{path}.part'
    try:
        with open(part, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f'cannot write {path!r}: {error.strerror}') from error


def load(path):
    """The checkpoint dict at path, on the CPU. InputError if it is missing, damaged, or wants to run code."""
    if not os.path.isfile(path):
        raise InputError(f'no checkpoint {path!r}; train one with python train.py config/train_char_diffusion_sampler.py')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f'{path!r} is no checkpoint of this project: it holds more than tensors and plain values, '
                         f'or is damaged') from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f'{path!r} is damaged or no checkpoint ({type(error).__name__}); train again, '
                         f'or give another --checkpoint-name') from error
    lacks = WANTED - set(checkpoint) if isinstance(checkpoint, dict) else WANTED
    if lacks:
        raise InputError(f'{path!r} lacks {", ".join(sorted(lacks))}; wanted a checkpoint that train.py wrote')
    return checkpoint


def build(checkpoint, path):
    """The model of a checkpoint, in evaluation mode on the CPU. InputError if arguments and weights do not fit."""
    unknown = set(checkpoint['model_args']) - {f.name for f in fields(GPTConfig)}
    if unknown:
        raise InputError(f'{path!r} has model_args that this version does not know: {", ".join(sorted(unknown))}')
    model = GPT(GPTConfig(**checkpoint['model_args']))
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as error:
        raise InputError(f'{path!r}: model_args and weights do not fit together: {str(error).splitlines()[-1].strip()}') from error
    return model.eval()


def load_model(path):
    """Model, tokenizer and the whole checkpoint at path."""
    checkpoint = load(path)
    return build(checkpoint, path), Tokenizer(checkpoint['corpus']), checkpoint


def want_generator(model, path):
    """InputError unless model generates by masked diffusion."""
    if (model.config.attention_type, model.config.model_mode) != ('bidirectional', 'language_model'):
        kind = 'a judge' if model.config.model_mode == 'sequence_scorer' else 'an autoregressive model'
        raise InputError(f'{path!r} is {kind}, wanted a masked-diffusion model (config/train_char_diffusion_sampler.py); '
                         f'python evaluate.py samples from an autoregressive one')


def want_vocabulary(corpus, path, wanted):
    """InputError unless the corpus of the checkpoint at path has the same vocabulary as the wanted one."""
    if (corpus['kind'], corpus['chars']) != (wanted['kind'], wanted['chars']):
        raise InputError(f'{path!r} was trained on {corpus["name"]!r}, whose vocabulary is another than that of {wanted["name"]!r}')

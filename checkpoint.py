"""Checkpoints: a plain dict in one file, written whole or not at all, loaded without executing anything in it.

Keys: model_args (the fields of GPTConfig), model, optimizer, scaler, start_iter (the iteration at which each part began
to learn), iter_num, evaluated (whether the evaluation of that iteration is done), best_val_loss, config (every setting
of the run), corpus (vocabulary and source), commit. No random states: randomness is a function of seed and iteration.

A checkpoint is a file from a stranger. load_model, and resume.py, check the checksums in the file, the fields and their
types, the shapes of all weights before memory is taken for any, and that every number is finite.
"""
import os
import pickle
import subprocess
import zipfile
from contextlib import suppress
from dataclasses import fields
from types import SimpleNamespace

import torch

import memory
import settings
from configurator import checked
from corpus import Tokenizer, check_meta
from errors import InputError, within
from files import write_atomically
from finite import require_finite
from model import GPT, GPTConfig
from schedules import begins_to_learn

FIELDS = {'model_args': dict, 'model': dict, 'iter_num': int, 'config': dict, 'corpus': dict}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# -----------------------------------------------------------------------------
# files of a run

def path_of(config):
    """The checkpoint of a run: the latest, or the best where always_save_checkpoint is off."""
    return os.path.join(config.out_dir, config.checkpoint_name)


def best_path_of(config):
    return os.path.join(config.out_dir, f'{stem_of(config)}_best.pt')


def last_path_of(config):
    """Where a run that keeps only the best as its checkpoint saves between evaluations."""
    return os.path.join(config.out_dir, f'{stem_of(config)}_last.pt')


def stem_of(config):
    return config.checkpoint_name.removesuffix('.pt')


def metrics_path(config):
    stem = stem_of(config)
    return os.path.join(config.out_dir, 'metrics.jsonl' if stem == 'ckpt' else f'{stem}_metrics.jsonl')


def paths_to_save(config, better):
    """Where the present state goes. better: than every evaluation before, None where it has not been evaluated.

    The best comes first: a kill between the two leaves nothing stale.
    """
    if not config.always_save_checkpoint:
        return [last_path_of(config)] if better is None else [path_of(config)] if better else []
    return [best_path_of(config), path_of(config)] if better else [path_of(config)]


def refuse_to_replace(path, config):
    """InputError where a run from scratch would replace a checkpoint, unless it may."""
    for found in filter(os.path.exists, (path, best_path_of(config), last_path_of(config))):
        if not (config.overwrite or config.eval_only):
            raise InputError(f'{found!r} exists and a new run would replace it; go on with --init_from=resume, choose '
                             f'another --out_dir, or replace it with --overwrite=True')
    for source in filter(None, (config.generator_checkpoint, config.trunk_checkpoint)):
        if os.path.realpath(source) in map(os.path.realpath, (path, best_path_of(config), last_path_of(config))):
            raise InputError(f'the run would replace {source!r}, which it begins with; choose another --out_dir or '
                             f'--checkpoint_name')


# -----------------------------------------------------------------------------
# saving and loading

def contents(state, model_args, config, corpus, evaluated):
    """The dict to save for a train.State."""
    optimizer = {part: [o.state_dict() for o in group] for part, group in state.optimizers.items()}
    return {'model_args': model_args, 'model': state.model.state_dict(), 'optimizer': optimizer,
            'scaler': state.scaler.state_dict(), 'start_iter': state.start_iter, 'iter_num': state.iter_num,
            'evaluated': evaluated, 'best_val_loss': state.best_val_loss, 'config': config, 'corpus': corpus,
            'commit': commit()}


def commit():
    """The commit this code is at, '' outside a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        found = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True)
    except OSError:
        return ''
    return found.stdout.strip()


def save(path, checkpoint):
    """Write checkpoint to path: a kill at any instant leaves the previous one whole. InputError, and nothing written,
    if a number in it is not finite; WriteError on a full disk."""
    require_finite(checkpoint, path)
    write_atomically(path, lambda f: torch.save(checkpoint, f))


def save_where_due(config, checkpoint, better, first):
    """Write checkpoint to each of paths_to_save, which are yielded when written; what that makes obsolete goes.

    first: of a run from scratch, which replaces every checkpoint that another one left.
    """
    for path in paths_to_save(config, better):
        save(path, checkpoint)
        yield path
        obsolete = {best_path_of(config), path_of(config), last_path_of(config)} if first else set()
        if path == path_of(config):
            obsolete.add(last_path_of(config))
        for other in obsolete - {path}:
            with suppress(OSError):
                os.remove(other)
        first = False


def load(path, kind='char_diffusion_sampler'):
    """The checkpoint dict at path, on the CPU. InputError if it is missing, damaged, or wants to run code.

    kind: of the config file that trains such a model, config/train_KIND.py.
    """
    if not os.path.isfile(path):
        raise InputError(f'no checkpoint {path!r}; train one with python train.py config/train_{kind}.py')
    try:
        check_bytes(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f'{path!r} is no checkpoint of this project: it holds more than tensors and plain values, '
                         f'or is damaged') from error
    except InputError:
        raise
    except Exception as error:    # torch lets whatever the bytes lead to through
        raise InputError(f'{path!r} is damaged or no checkpoint ({type(error).__name__}); train again, '
                         f'or give another --checkpoint-name') from error
    require(checkpoint, FIELDS, path)
    return checkpoint


def check_bytes(path):
    """InputError unless the parts of the file have the checksums that it gives, and no part is larger than the file."""
    if not zipfile.is_zipfile(path):    # torch would load its old format too, in which nothing has a checksum
        raise InputError(f'{path!r} is no checkpoint of this project, which is a zip file, or is damaged; train again, '
                         f'or give another --checkpoint-name')
    with zipfile.ZipFile(path) as parts:
        if sum(part.file_size for part in parts.infolist()) > os.path.getsize(path):
            raise InputError(f'{path!r} would be larger in memory than it is; wanted a checkpoint that train.py wrote')
        damaged = parts.testzip()
    if damaged:
        raise InputError(f'{path!r} is damaged: {damaged!r} in it does not have its checksum; train again, or give '
                         f'another --checkpoint-name')


def require(found, wanted, path):
    """InputError unless found is a dict that has the wanted keys, {name: type}, a bool being no int."""
    missing = set(wanted) - set(found) if isinstance(found, dict) else set(wanted)
    if missing:
        raise InputError(f'{path!r} lacks {", ".join(sorted(missing))}; wanted a checkpoint that train.py wrote')
    for name, kind in wanted.items():
        if not isinstance(found[name], kind) or kind is int and (isinstance(found[name], bool) or found[name] < 0):
            raise InputError(f'{path!r}: {name} is {repr(found[name])[:60]}, wanted {kind.__name__}'
                             + ', at least 0' * (kind is int))


def model_config(saved, path):
    """The GPTConfig of a checkpoint, checked like settings, and its weights against it: nothing large is made before.

    InputError if a size is absurd, if arguments and weights do not fit, or if a weight is not finite.
    """
    defaults = {f.name: f.default for f in fields(GPTConfig)}
    source = f'{path!r} (model_args)'
    args = {name: checked(defaults, name, value, source) for name, value in saved['model_args'].items()}
    with within(repr(path)):
        settings.check_values(args)
        settings.check_shape(SimpleNamespace(**defaults | args))
        check_meta(saved['corpus'])
    config = GPTConfig(**args)
    if saved['corpus']['vocab_size'] != config.vocab_size:
        raise InputError(f'{path!r} has vocab_size={config.vocab_size}, its corpus {saved["corpus"]["vocab_size"]}')
    memory.require(memory.of_model(config), 'cpu', repr(path))
    check_weights(saved['model'], memory.skeleton(config).state_dict(), path)
    for name, weight in saved['model'].items():
        require_finite({name: weight.float()}, path)    # float64 may hold more
    return config


def check_weights(weights, expected, path):
    """InputError unless weights are whole tensors of the expected names and shapes, {name: tensor}."""
    wrong = [name for name in (*expected, *(name for name in weights if name not in expected))
             if name not in weights or name not in expected or not fits(weights[name], expected[name].shape)]
    if wrong:
        raise InputError(f'{path!r}: model_args and weights do not fit together: {wrong[0]} and {len(wrong) - 1} other '
                         f'weights are missing, unknown or of another shape')


def fits(tensor, shape):
    """Whether it is a plain tensor of the shape that has memory of its own for every number."""
    return isinstance(tensor, torch.Tensor) and tensor.shape == shape and tensor.dtype in FLOATS \
        and tensor.layout is torch.strided and tensor.device.type == 'cpu' and tensor.is_contiguous()


def load_model(path, kind='char_diffusion_sampler'):
    """Model, in evaluation mode on the CPU, tokenizer and the whole checkpoint at path; kind: see load."""
    saved = load(path, kind)
    model = GPT(model_config(saved, path))
    model.load_state_dict(saved['model'])
    model.reads_text = saved['config'].get('block_rows') != 0
    for head in untrained_heads(saved):
        setattr(model, f'{head}_head', None)    # its weights say nothing
    return model.eval(), Tokenizer(saved['corpus']), saved


def untrained_heads(saved):
    """Heads of a checkpoint that had not begun to learn when it was saved."""
    starts, interval = saved.get('start_iter', {}), saved['config'].get('critic_interval', 1)
    interval = interval if isinstance(interval, int) and interval > 0 else 1
    for head in ('sampler', 'critic') if isinstance(starts, dict) else ():
        start = starts.get(head)
        if saved['model_args'].get(f'add_{head}_head') and isinstance(start, int):
            if begins_to_learn(head, start, interval) >= saved['iter_num']:
                yield head


def require_generator(model, path):
    """InputError unless model generates by masked diffusion."""
    if (model.config.attention_type, model.config.model_mode) != ('bidirectional', 'language_model'):
        kind = 'a judge' if model.config.model_mode == 'sequence_scorer' else 'an autoregressive model'
        raise InputError(f'{path!r} is {kind}, wanted a masked-diffusion model '
                         f'(config/train_char_diffusion_sampler.py); evaluate.py samples from an autoregressive one')


def require_same_vocabulary(corpus, path, wanted):
    """InputError unless the corpus of the checkpoint at path has the same vocabulary as the wanted one."""
    if (corpus['kind'], corpus['chars']) != (wanted['kind'], wanted['chars']):
        raise InputError(f'{path!r} was trained on {corpus["name"]!r}, whose vocabulary is another than that of '
                         f'{wanted["name"]!r}')

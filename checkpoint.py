"""Checkpoints: a plain dict in one file, written whole or not at all, loaded without executing anything in it.

Keys: model_args (the fields of GPTConfig), model, optimizer, scaler, start_iter (the iteration at which each part began
to learn), iter_num, best_val_loss, config (every setting of the run), corpus (vocabulary and source), commit. No random
states: randomness is a function of seed and iteration.
"""
import os
import pickle
import subprocess
from dataclasses import fields

import torch

from corpus import Tokenizer
from errors import InputError
from model import GPT, GPTConfig

REQUIRED = {'model_args', 'model', 'iter_num', 'config', 'corpus'}
REQUIRED_TO_RESUME = {'optimizer', 'scaler', 'start_iter', 'best_val_loss'}
SHAPE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'attention_type', 'model_mode')
HEAD_SHAPE = ('sampler_context', 'sampler_width', 'sampler_state')


# -----------------------------------------------------------------------------
# files of a run

def path_of(config):
    """The checkpoint of a run: the latest, or the best where always_save_checkpoint is off."""
    return os.path.join(config.out_dir, config.checkpoint_name)


def best_path_of(config):
    return os.path.join(config.out_dir, f'{stem_of(config)}_best.pt')


def stem_of(config):
    return config.checkpoint_name.removesuffix('.pt')


def metrics_path(config):
    stem = stem_of(config)
    return os.path.join(config.out_dir, 'metrics.jsonl' if stem == 'ckpt' else f'{stem}_metrics.jsonl')


def paths_to_save(config, better):
    """Where the present state goes. The best comes first: a kill between the two leaves nothing stale."""
    if not config.always_save_checkpoint:
        return [path_of(config)] if better else []
    return [best_path_of(config), path_of(config)] if better else [path_of(config)]


def refuse_to_replace(path, config):
    """InputError where a run from scratch would replace a checkpoint, unless it may."""
    for found in filter(os.path.exists, (path, best_path_of(config))):
        if not (config.overwrite or config.eval_only):
            raise InputError(f'{found!r} exists and a new run would replace it; go on with --init_from=resume, choose '
                             f'another --out_dir, or replace it with --overwrite=True')
    if config.generator_checkpoint and os.path.realpath(config.generator_checkpoint) == os.path.realpath(path):
        raise InputError(f'the judge would replace its generator {path!r}; choose another --out_dir or '
                         f'--checkpoint_name')


# -----------------------------------------------------------------------------
# saving and loading

def contents(state, model_args, config, corpus):
    """The dict to save for a train.State."""
    optimizer = {part: [o.state_dict() for o in group] for part, group in state.optimizers.items()}
    return {'model_args': model_args, 'model': state.model.state_dict(), 'optimizer': optimizer,
            'scaler': state.scaler.state_dict(), 'start_iter': state.start_iter, 'iter_num': state.iter_num,
            'best_val_loss': state.best_val_loss, 'config': config, 'corpus': corpus, 'commit': commit()}


def commit():
    """The commit this code is at, '' outside a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        found = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True)
    except OSError:
        return ''
    return found.stdout.strip()


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
        raise InputError(f'no checkpoint {path!r}; train one with '
                         f'python train.py config/train_char_diffusion_sampler.py')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f'{path!r} is no checkpoint of this project: it holds more than tensors and plain values, '
                         f'or is damaged') from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f'{path!r} is damaged or no checkpoint ({type(error).__name__}); train again, '
                         f'or give another --checkpoint-name') from error
    require(checkpoint, REQUIRED, path)
    return checkpoint


def require(checkpoint, keys, path):
    """InputError unless checkpoint is a dict that has the keys."""
    missing = keys - set(checkpoint) if isinstance(checkpoint, dict) else keys
    if missing:
        raise InputError(f'{path!r} lacks {", ".join(sorted(missing))}; wanted a checkpoint that train.py wrote')


def build(checkpoint, path):
    """The model of a checkpoint, in evaluation mode on the CPU. InputError if arguments and weights do not fit."""
    unknown = set(checkpoint['model_args']) - {f.name for f in fields(GPTConfig)}
    if unknown:
        raise InputError(f'{path!r} has model_args that this version does not know: {", ".join(sorted(unknown))}')
    model = GPT(GPTConfig(**checkpoint['model_args']))
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as error:
        raise InputError(f'{path!r}: model_args and weights do not fit together: '
                         f'{str(error).splitlines()[-1].strip()}') from error
    return model.eval()


def load_model(path):
    """Model, tokenizer and the whole checkpoint at path."""
    checkpoint = load(path)
    return build(checkpoint, path), Tokenizer(checkpoint['corpus']), checkpoint


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


def load_generator(path, corpus, block_size):
    """The frozen generator of a judge's examples. InputError unless it is one, of this vocabulary and block size."""
    model, _, saved = load_model(path)
    require_generator(model, path)
    if model.config.block_size < block_size:
        raise InputError(f'{path!r} has block_size={model.config.block_size}, the judge {block_size}; wanted no more')
    require_same_vocabulary(saved['corpus'], path, corpus)
    return model


# -----------------------------------------------------------------------------
# resuming

def load_for_resume(path, config):
    """Checkpoint at path, checked against the settings of this run; heads alone may be missing in it."""
    saved = load(path)
    require(saved, REQUIRED_TO_RESUME, path)
    args = saved['model_args']
    require(args, {f.name for f in fields(GPTConfig)}, f'{path} (model_args)')
    require(saved['start_iter'], {'trunk', 'sampler', 'critic'}, f'{path} (start_iter)')
    require(saved['config'], {'dtype', 'start_sampler_iteration', 'start_critic_iteration'}, f'{path} (config)')
    for name in SHAPE + HEAD_SHAPE + ('add_sampler_head', 'add_critic_head'):
        if not hasattr(config, name):
            continue    # vocab_size: compared by the corpus
        old, new = args[name], getattr(config, name)
        added = name.startswith('add_') and not old
        unused = name in HEAD_SHAPE and not (args['add_sampler_head'] or args['add_critic_head'])
        if old != new and not (added or unused):
            raise InputError(f'{path!r} has {name}={old!r}, this run {new!r}; resume with the same, or use another '
                             f'out_dir')
    if config.max_iters <= saved['iter_num'] and not config.eval_only:
        raise InputError(f'{path!r} is at iteration {saved["iter_num"]}, so max_iters={config.max_iters} leaves '
                         f'nothing to train; give a larger --max_iters')
    for part in ('sampler', 'critic'):
        name = f'start_{part}_iteration'
        has_begun = args[f'add_{part}_head'] and saved['start_iter'][part] < saved['iter_num']
        if has_begun and saved['config'][name] != getattr(config, name):
            raise InputError(f'{path!r} has {name}={saved["config"][name]}, this run {getattr(config, name)}, but its '
                             f'{part} head has been learning since iteration {saved["start_iter"][part]}; resume with '
                             f'the same, or use another out_dir')
    return saved


def fresh_heads(saved, names=('sampler', 'critic')):
    """Heads that a checkpoint lacks."""
    return [head for head in names if not saved['model_args'][f'add_{head}_head']]


def load_weights(model, saved, path):
    """Put the weights of a checkpoint into model; returns the heads of model that it lacks, which stay fresh."""
    fresh = [head for head in fresh_heads(saved) if head in model.parts()]
    expected = {k for k in model.state_dict() if not any(k.startswith(f'{head}_head') for head in fresh)}
    weights = saved['model']
    wrong = sorted(k for k in expected | set(weights)
                   if k not in weights or k not in expected or weights[k].shape != model.state_dict()[k].shape)
    if wrong:
        raise InputError(f'{path!r} does not fit its own model_args: {wrong[0]} and {len(wrong) - 1} other weights are '
                         f'missing, unknown or of another shape; it cannot be resumed')
    model.load_state_dict(weights, strict=False)
    return fresh


def resumed_start_iter(asked_for, saved):
    """{part: iteration at which it begins}: as saved if it has begun, else as asked for, but not before now."""
    now = saved['iter_num']
    start_iter = {'trunk': saved['start_iter']['trunk']}
    for part in ('sampler', 'critic'):
        same = saved['config'][f'start_{part}_iteration'] == asked_for[part] and part not in fresh_heads(saved)
        start_iter[part] = saved['start_iter'][part] if same else max(asked_for[part], now)
    return start_iter


def load_optimizers(optimizers, saved):
    """Put saved optimizer states into {part: [optimizer]}; settings such as weight decay stay those of this run."""
    for part, states in saved['optimizer'].items():
        for optimizer, state in zip(optimizers.get(part, []), states):
            settings = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, settings):
                group.update(values)

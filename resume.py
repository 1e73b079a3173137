"""Resuming: the checkpoint that a run goes on from, checked against its settings, and put into its state.

    python train.py config/train_char_diffusion_sampler.py --init_from=resume
"""
import os
from dataclasses import fields

import settings
from checkpoint import (best_path_of, last_path_of, load, model_config, path_of, refuse_to_replace, require,
                        require_same_vocabulary)
from errors import InputError
from finite import require_finite
from model import GPTConfig

FIELDS_TO_RESUME = {'optimizer': dict, 'scaler': dict, 'start_iter': dict, 'best_val_loss': float}
MOMENTS = {'Muon': {'momentum_buffer'}, 'AdamW': {'step', 'exp_avg', 'exp_avg_sq'}}
# what validation figures depend on besides the text: with another one they do not compare
YARDSTICK = ('seed', 'eval_rows')
JUDGES_YARDSTICK = (*YARDSTICK, 'batch_size', 'generator_weights')    # its examples are drawn for a batch at a time
SHAPE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'attention_type', 'model_mode')
HEAD_SHAPE = ('sampler_context', 'sampler_width', 'sampler_state')


def open_for_run(config, meta):
    """The checkpoint that a run goes on from, with its path; None for a run from scratch.

    meta: of the corpus. InputError where the run would lose a checkpoint.
    """
    if config.init_from != 'resume':
        refuse_to_replace(path_of(config), config)
        return None
    return load_for_resume(path_to_resume(config), config, meta)


def path_to_resume(config):
    """The latest of the checkpoints of a run, which may have been saved between two evaluations.

    To evaluate, its own checkpoint: with always_save_checkpoint=False the best.
    """
    paths = [path for path in (path_of(config), last_path_of(config)) if os.path.isfile(path)]
    if len(paths) == 2 and not config.eval_only:
        return max(paths, key=lambda path: load(path)['iter_num'])
    return (*paths, path_of(config))[0]


def load_for_resume(path, config, meta):
    """Checkpoint at path, checked against the settings and the corpus of this run; heads alone may be missing in it.

    Returned with its path as 'path'.
    """
    saved = load(path)
    require(saved, FIELDS_TO_RESUME, path)
    args = saved['model_args']
    require(args, {f.name: object for f in fields(GPTConfig)}, f'{path} (model_args)')
    require(saved['start_iter'], {'trunk': int, 'sampler': int, 'critic': int}, f'{path} (start_iter)')
    require(saved['config'], {'dtype': str, 'start_sampler_iteration': int, 'start_critic_iteration': int},
            f'{path} (config)')
    model_config(saved, path)
    require_finite(saved['optimizer'], path)
    if saved['best_val_loss'] != saved['best_val_loss']:
        raise InputError(f'{path!r}: best_val_loss is nan, wanted a number')
    require_same_vocabulary(saved['corpus'], path, meta)
    require_same_yardstick(saved, path, config, meta)
    require_same_files(saved, path, config)
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
    settings.check_reached(config)
    asked_for = {head: getattr(config, f'start_{head}_iteration') for head in ('sampler', 'critic')}
    for check in (settings.check_frozen, settings.check_learns):
        check(config, resumed_start_iter(asked_for, saved), saved['iter_num'])
    return saved | {'path': path}


def fresh_heads(saved):
    """Heads that a checkpoint lacks."""
    return [head for head in ('sampler', 'critic') if not saved['model_args'][f'add_{head}_head']]


def restore(state, saved, asked_for, path):
    """Put a checkpoint into a fresh train.State: weights, optimizers, scaler, counters.

    asked_for {part: iteration at which it is to begin}. Returns the heads that the checkpoint lacks, which stay fresh.
    """
    fresh = [head for head in fresh_heads(saved) if head in state.model.parts()]
    state.model.load_state_dict(saved['model'], strict=False)
    state.iter_num, state.best_val_loss = saved['iter_num'], saved['best_val_loss']
    state.start_iter = resumed_start_iter(asked_for, saved)
    state.saved = f'{path!r} of iteration {saved["iter_num"]}'
    try:
        load_optimizers(state.optimizers, saved)
        if saved['scaler']:    # empty unless that run was in float16
            state.scaler.load_state_dict(saved['scaler'])
            float(saved['scaler']['scale'])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise InputError(f'{path!r}: its optimizer or scaler does not fit its model ({type(error).__name__}); it '
                         f'cannot be resumed') from error
    return fresh


def require_same_yardstick(saved, path, config, meta):
    """InputError where validation would not compare with the checkpoint's best; with overwrite a new best begins."""
    names = JUDGES_YARDSTICK if config.generator_checkpoint else YARDSTICK
    pairs = [(name, saved['config'].get(name, getattr(config, name)), getattr(config, name)) for name in names]
    pairs.append(('the text', saved['corpus']['sha256'][:8], meta['sha256'][:8]))
    differing = [f'{name} {old!r}, this run {new!r}' for name, old, new in pairs if old != new]
    if differing and not (config.overwrite or config.eval_only):
        raise InputError(f'{path!r} has {"; ".join(differing)}: validation would not compare with its best; resume '
                         f'with the same, or begin a new best with --overwrite=True, which replaces '
                         f'{best_path_of(config) if config.always_save_checkpoint else path_of(config)!r}')
    if differing:
        saved['best_val_loss'] = float('inf')


def require_same_files(saved, path, config):
    """InputError where the latest would replace the only best there is; with overwrite a new best begins."""
    only_best = not saved['config'].get('always_save_checkpoint', True)
    if not only_best or not config.always_save_checkpoint or config.eval_only:
        return
    if not config.overwrite:
        raise InputError(f'{path_of(config)!r} is the best of a run with always_save_checkpoint=False, and this run, '
                         f'with True, would replace it by the latest; resume with False, or begin a new best with '
                         f'--overwrite=True')
    saved['best_val_loss'] = float('inf')


def changed_settings(saved, config):
    """Settings that a resumed run changes, as 'name old -> new'; it goes on with the trunk it has."""
    before = {'text_masking': 0.0} | saved['config']    # of a checkpoint from before there was that setting
    for name in ('init_from', 'overwrite', 'eval_only', 'device', 'dtype', 'out_dir', 'data_dir'):
        before.pop(name, None)
    changed = [name for name, new in vars(config).items() if before.get(name, new) != new]
    unread = {'trunk_checkpoint': ' (which is not read)'}
    return [f'{name} {before[name]} -> {getattr(config, name)}{unread.get(name, "")}' for name in changed]


def resumed_start_iter(asked_for, saved):
    """{part: iteration at which it begins}: as saved if it has begun, else as asked for, but not before now."""
    now = saved['iter_num']
    start_iter = {'trunk': saved['start_iter']['trunk']}
    for part in ('sampler', 'critic'):
        same = saved['config'][f'start_{part}_iteration'] == asked_for[part] and part not in fresh_heads(saved)
        start_iter[part] = saved['start_iter'][part] if same else max(asked_for[part], now)
    return start_iter


def load_optimizers(optimizers, saved):
    """Put saved optimizer states into {part: [optimizer]}; settings such as weight decay stay those of this run.

    ValueError for moments of another shape than their weight's.
    """
    for part, states in saved['optimizer'].items():
        for optimizer, state in zip(optimizers.get(part, []), states, strict=part in optimizers):
            settings_now = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, settings_now):
                group.update(values)
            for p, moments in optimizer.state.items():
                if set(moments) != MOMENTS[type(optimizer).__name__] or any(
                        moment.shape != p.shape for name, moment in moments.items() if name != 'step'):
                    raise ValueError(f'moments of a weight of {part}')
    missing = {part for part, start in saved['start_iter'].items()
               if part in optimizers and part not in saved['optimizer'] and part not in fresh_heads(saved)}
    if missing:
        raise ValueError(f'no optimizer state of {missing}')

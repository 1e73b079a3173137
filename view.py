"""Makes a page of how samples were decoded, from one or two files of sample_simple.py --save, or an animated SVG.

    python sample_simple.py --iterations 15 --save a.json
    python sample_simple.py --iterations 15 --disable-sampler --save b.json
    python view.py a.json b.json -o compare.html
    python view.py a.json b.json -o decoding.svg

The page, view.html with the data in it, needs no network. All text in it comes from files, so none of it is ever read
as HTML: the data are JSON in which < is escaped, and the page shows them as plain text.
"""
import argparse
import base64
import json
import os
import zlib

import numpy as np

import svg
from animate import PLACEHOLDER
from corpus import Tokenizer
from errors import InputError, run
from files import require_file, require_own, write_atomically
from progress import passes_text

SCHEMA = 2                  # of the files that it reads
MASKED, REMASKED, CORRECTED = 1, 2, 4    # bits of a position's flags in a pass, as view.html reads them
# settings that change no sample, or that another one says
UNSHOWN = {'save', 'animate', 'verbose', 'no_progress', 'disable_sampler', 'no_revise'}
TEMPLATE = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'view.html')


def parser():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('files', nargs='+', metavar='FILE', help='one or two files that sample_simple.py --save wrote')
    parser.add_argument('-o', '--output', default='compare.html', metavar='PAGE',
                        help='page to write, or an animated picture, x.svg (default: compare.html)')
    parser.add_argument('--sample', type=int, metavar='N',
                        help='which sample the picture shows (default: 0); the page shows all')
    return parser


def main():
    args = parser().parse_args()
    if len(args.files) > 2:
        raise InputError(f'found {len(args.files)} files, wanted one, or two to compare')
    if not args.output.endswith(('.html', '.htm', '.svg')) or os.path.realpath(args.output) == TEMPLATE:
        raise InputError(f'-o {args.output!r}, wanted the name of a page, such as compare.html, or of an animated '
                         f'picture, such as decoding.svg')
    is_picture = args.output.endswith('.svg')
    if args.sample is not None and not is_picture:
        raise InputError(f'found --sample {args.sample} with a page, which shows all samples; leave it out, or give '
                         f'-o decoding.svg')
    saves = [(path, read(path)) for path in args.files]
    made = (picture(saves, args.sample or 0) if is_picture else page(saves)).encode(errors='replace')
    require_own(args.output, made[:made.index(b'view.py') + 7], '-o')    # its name is in the first lines
    write_atomically(args.output, made)
    print(f'saved {args.output}: {os.path.getsize(args.output) / 1e6:.2f} MB, open it in a browser')


def read(path):
    """What --save wrote to path. InputError if it is something else."""
    require_file(path, 'what sample_simple.py --save writes')
    try:
        with open(path, encoding='utf-8') as f:
            saved = json.load(f)
    except OSError as error:
        raise InputError(f'cannot read {path!r}: {error.strerror}; wanted what sample_simple.py --save '
                         f'writes') from error
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path!r} is not JSON ({type(error).__name__}); wanted what sample_simple.py --save '
                         f'writes') from error
    schema = saved.get('schema') if isinstance(saved, dict) else None
    if schema != SCHEMA:
        raise InputError(f'{path!r} has schema {schema!r}, wanted {SCHEMA}; write it again with '
                         f'sample_simple.py --save')
    return saved


def page(saves):
    """The HTML of the page: saves is a list of (name, what --save wrote). InputError for damaged data."""
    runs = [undamaged(name, pack, name, saved) for name, saved in saves]
    data = {'runs': runs, 'settings': setting_rows([saved['settings'] for _, saved in saves])}
    with open(TEMPLATE, encoding='utf-8') as f:
        return f.read().replace('{{data}}', json.dumps(data).replace('<', '\\u003c'), 1)


def picture(saves, sample):
    """The animated SVG of one sample of each run. InputError for damaged data, or where there is no such sample."""
    titles = [', '.join(undamaged(name, pack, name, saved)['facts'][-4:-2]) for name, saved in saves]
    return undamaged(saves[0][0], svg.animated, list(zip(titles, [saved for _, saved in saves])), sample)


def undamaged(name, function, *args):
    """What function(*args) makes of a file's data. InputError with the file's name where they are damaged."""
    try:
        return function(*args)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{name!r} is damaged ({type(error).__name__}: {error}); write it again with '
                         f'sample_simple.py --save') from error


# -----------------------------------------------------------------------------
# one run

def pack(name, saved):
    """A run as view.html reads it: names and counts as plain values, the passes in compressed arrays.

    Of every position in every pass there are a token (an index into pieces), a wave, a remask score in 255ths and
    flags. Most positions do not change from one pass to the next, which deflate makes use of. A file in which lengths,
    ids or scores are wrong is a ValueError.
    """
    passes = [one for sample in saved['samples'] for one in sample['iterations']]
    if saved['samples'] and not passes:
        raise InputError(f'{name!r} has no pass: the given text filled every sequence, nothing was generated')
    arrays = [pass_arrays(one, saved['mask_id']) for one in passes]
    tokens, waves, scores, flags = (np.concatenate(parts) for parts in zip(*arrays))
    final = [np.array(sample['tokens'], np.int64) for sample in saved['samples']]
    ids, index = np.unique(np.concatenate([tokens, *final]), return_inverse=True)
    index, given = index[:len(tokens)], np.split(index[len(tokens):], np.cumsum([len(ids) for ids in final])[:-1])
    blob = index.astype('<u2').tobytes() + waves.astype('<u2').tobytes() + scores.tobytes() + flags.tobytes()
    samples = []
    for sample, one_given in zip(saved['samples'], given):
        spans = [(int(one['iteration']), int(one['block_start']), len(one['wave'])) for one in sample['iterations']]
        check(all(0 <= start <= start + length <= len(one_given) for _, start, length in spans), 'block_start')
        quality = sample['quality']
        samples.append({'tokens': one_given.tolist(), 'passes': spans,
                        'quality': None if quality is None else f'{quality:.3f}'})
    pieces = pieces_of(ids.tolist(), saved)
    return {'name': name, 'facts': facts(saved), 'pieces': pieces, 'samples': samples,
            'placeholder': PLACEHOLDER * (1 if saved['vocabulary']['kind'] == 'char' else 3),
            'blob': base64.b64encode(zlib.compress(blob, 9)).decode()}


def check(fine, what):
    if not fine:
        raise ValueError(f'{what} out of range')


def pass_arrays(one, mask_id):
    """tokens (n,), waves (n,) int64 and scores (n,), flags (n,) uint8 of a pass over a block of n positions."""
    tokens, before, waves = (np.array(one[name], np.int64) for name in ('output_unmasked', 'input_masked', 'wave'))
    scores, n = np.array(one['remask_score'], float), len(waves)
    check(tokens.shape == before.shape == waves.shape == scores.shape == (n,), 'length of a pass')
    check(((0 <= tokens) & (tokens <= mask_id)).all(), 'token')
    check(((0 <= waves) & (waves < 2 ** 16)).all(), 'wave')
    check(((0 <= scores) & (scores <= 1)).all(), 'remask_score')
    flags = np.where(before == mask_id, MASKED, 0).astype(np.uint8)
    corrected = one.get('corrected_indices', [])    # which files of older versions lack
    for name, bit, indices in (('remasked', REMASKED, one['remasked_indices']), ('corrected', CORRECTED, corrected)):
        at = np.array(indices, np.int64) - one['block_start']
        check(((0 <= at) & (at < n)).all(), f'{name}_indices')
        flags[at] |= bit
    return tokens, waves, np.round(255 * scores).astype(np.uint8), flags


def pieces_of(ids, saved):
    """The text of each id, None for [MASK]. A byte pair that is only a part of a character shows as a question mark."""
    tokenizer, mask_id = Tokenizer(saved['vocabulary']), saved['mask_id']
    check(all(0 <= i <= mask_id for i in ids) and len(ids) <= 2 ** 16, 'token')
    return [None if i == mask_id else tokenizer.decode([i]) for i in ids]


def facts(saved):
    """What a run cost and how good it is, as short texts."""
    qualities = [sample['quality'] for sample in saved['samples'] if sample['quality'] is not None]
    settings, result = saved['settings'], []
    if qualities:
        judge = settings['judge_checkpoint_name']
        result.append(f'mean quality {sum(qualities) / len(qualities):.3f} by {judge or "the critic"}')
    plan = '' if has_no_plan(settings) else f', {settings["plan"]}'
    return result + [('sampler head' if settings['use_sampler'] else 'naive') + plan,
                     passes_text(saved['forward_passes']), f'{saved["waves"]} waves',
                     f'{len(saved["samples"])} samples in {saved["seconds"]:.2f} s']


# -----------------------------------------------------------------------------
# settings

def has_no_plan(settings):
    """Naive decoding fills all at once unless another plan was asked for, whatever stands in the file."""
    return settings.get('plan') is None or settings['plan'] == 'wavefront' and not settings['use_sampler']


def setting_rows(runs):
    """One row for each setting that some run has: {'cells': [name, value of each run], 'differs': bool}."""
    rows, runs = [], [run | {'plan': None, 'plan_passes': None} if has_no_plan(run) else run for run in runs]
    for name in dict.fromkeys(name for settings in runs for name in settings):
        values = [settings.get(name) for settings in runs]
        if name not in UNSHOWN and any(value is not None for value in values):
            rows.append({'cells': [name, *map(setting_text, values)],
                         'differs': any(value != values[0] for value in values)})
    return rows


def setting_text(value):
    """A value as a person writes it; a long list of numbers by its ends."""
    if isinstance(value, float):
        return f'{value:.4g}'
    if isinstance(value, list):
        texts = [setting_text(v) for v in value]
        return ', '.join(texts) if len(texts) <= 4 else f'{texts[0]}, {texts[1]} … {texts[-1]} ({len(texts)} values)'
    return '-' if value is None else value if isinstance(value, str) else json.dumps(value)


if __name__ == '__main__':
    run(main)

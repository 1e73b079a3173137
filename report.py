"""Compares decoders at real text's diversity: from what evaluate.py measured to a table, sentences and figures.

A lower temperature makes samples likelier and less diverse, so a decoder is a curve. A figure is read off that curve
only where its samples are as diverse as real text, by linear interpolation between two measured temperatures. A decoder
that never gets there has no figure. Standard errors come from the jackknife: the curve is read again without each group
of samples, which counts the uncertainty of where it enters the band too.
"""
import json
import math
import os

import figures
from files import write_atomically
from metrics import jackknife_error
from progress import passes_text
from tables import markdown, value_text

# real text's diversity. A wider band would let a decoder buy likelihood with repetition: four passes gained 0.14 nats
# from temperature 1 to 0.8, more than most decoders differ by, and lost 9% of their distinct 4-grams. Both sides count,
# for noise is more varied than text.
DISTINCT_BAND = 0.1    # relative, of distinct 4-grams
ENTROPY_BAND = 0.1     # nats, of the entropy of characters
COLUMNS = {
    'nll': 'NLL, autoregressive', 'nll_ngram': 'NLL, n-gram', 'distinct4': 'distinct 4-grams', 'entropy': 'entropy',
    'divergence': 'n-gram divergence', 'in_vocabulary_words': 'in-vocabulary words',
    'repeated_within': 'repeated within', 'repeated_across': 'repeated across', 'in_training_text': 'in training text',
    'judge': 'judge'}
COLORS = {'ar_baseline': '#555555', 'naive-random': '#e0b08f', 'naive-confidence': '#d1804f', 'naive-remask': '#a33d1a',
          'naive-planned': '#c9a227', 'naive-margin': '#8c6bb1', 'naive-remdm': '#e377a2', 'wavefront': '#7fb3c8',
          'wavefront-planned': '#6a9a5b', 'left-to-right': '#3b528b', 'speculative': '#000000',
          'wavefront-critic': '#1f6f8b', 'wavefront-corrected': '#0b3846'}


# -----------------------------------------------------------------------------
# reading curves

def band(real, replicate=None):
    """{measure: (lowest, highest)} of what counts as real text's diversity, from real text's measures."""
    distinct, nats = (pick(real[name], replicate) for name in ('distinct4', 'entropy'))
    return {'distinct4': ((1 - DISTINCT_BAND) * distinct, (1 + DISTINCT_BAND) * distinct),
            'entropy': (nats - ENTROPY_BAND, nats + ENTROPY_BAND)}


def pick(measure, replicate):
    """The value of a measure, or its value without one group of samples."""
    return measure['value'] if replicate is None else measure['replicates'][replicate]


def within(a, b, low, high):
    """The part of [0, 1] on which a line from a to b lies in [low, high]: (start, end), start > end for none."""
    if a == b:
        return (0.0, 1.0) if low <= a <= high else (1.0, 0.0)
    ends = sorted(((low - a) / (b - a), (high - a) / (b - a)))
    return max(0.0, ends[0]), min(1.0, ends[1])


def read_curve(curve, real, replicate=None):
    """Where a curve has its lowest NLL at real text's diversity.

    curve: settings in order of temperature; real: real text's measures. Between neighbours every measure is linear, so
    NLL is lowest at an end of what lies in the band. Returns {measure: value}, with temperature and seconds, or None.
    """
    limits, best = band(real, replicate), None
    for a, b in zip(curve, curve[1:] or curve):
        start, end = 0.0, 1.0
        for name, (low, high) in limits.items():
            inside = within(pick(a['measures'][name], replicate), pick(b['measures'][name], replicate), low, high)
            start, end = max(start, inside[0]), min(end, inside[1])
        for share in (start, end) if start <= end else ():
            mixed = lambda x, y, share=share: (1 - share) * x + share * y
            point = {name: mixed(pick(a['measures'][name], replicate), pick(b['measures'][name], replicate))
                     for name in a['measures'] if name in b['measures']}
            point |= {name: mixed(a[name], b[name]) for name in ('temperature', 'seconds_1', 'seconds_batch')}
            if best is None or point['nll'] < best['nll']:
                best = point
    return best


def at_real_diversity(curve, real):
    """read_curve with standard errors: the first setting's names, and {measure: as metrics.describe gives it}, or None.

    Where leaving out some group of samples takes the curve out of the band, the errors are nan.
    """
    point = read_curve(curve, real)
    if point is None:
        return None
    without = [read_curve(curve, real, i) for i in range(len(real['nll']['replicates']))]
    result = {name: curve[0][name] for name in ('decoder', 'passes', 'schedule', 'noise', 'curve')}
    result |= {name: point.pop(name) for name in ('temperature', 'seconds_1', 'seconds_batch')}
    for name, value in point.items():
        replicates = [math.nan if other is None else other[name] for other in without]
        result[name] = {'value': value, 'replicates': replicates, 'error': jackknife_error(replicates)}
    return result


def curves_of(settings):
    """{name of a curve: its settings in order of temperature}."""
    curves = {}
    for setting in sorted(settings, key=lambda s: s['temperature']):
        curves.setdefault(setting['curve'], []).append(setting)
    return curves


def best_points(settings, real):
    """The lowest NLL at real text's diversity over schedules and noises, {(decoder, passes): point or None}, in order.

    The choice is made on the samples that are reported, which favours a decoder with more curves a little.
    """
    best = {(s['decoder'], s['passes']): None for s in settings}
    for curve in curves_of(settings).values():
        point, at = at_real_diversity(curve, real), (curve[0]['decoder'], curve[0]['passes'])
        if point and (best[at] is None or point['nll']['value'] < best[at]['nll']['value']):
            best[at] = point
    return best


def difference(a, b, name):
    """How much lower measure name is at point a than at point b: (value, standard error). Their noise is the same."""
    replicates = [y - x for x, y in zip(a[name]['replicates'], b[name]['replicates'])]
    return b[name]['value'] - a[name]['value'], jackknife_error(replicates)


# -----------------------------------------------------------------------------
# sentences and table

def nll_text(point):
    return value_text(point['nll']['value'], point['nll']['error'])


def family(points, *prefixes):
    """The points of decoders whose name starts so, those with the fewest passes first, then the likeliest."""
    chosen = [p for p in points.values() if p and p['decoder'].startswith(prefixes)]
    return sorted(chosen, key=lambda p: (p['passes'], p['nll']['value']))


def comparison(a, b, batch):
    """Point a against point b, in both evaluators and in seconds."""
    gains = [difference(a, b, name) for name in ('nll', 'nll_ngram')]
    words = ['lower' if gain >= 0 else 'higher' for gain, _ in gains]
    first, second = (f'{value_text(abs(gain), error)} {word}' for (gain, error), word in zip(gains, words))
    return (f'{first} by the autoregressive evaluator and {second} by the n-gram one, in {a["seconds_batch"]:.2f} s '
            f'against {b["seconds_batch"]:.2f} s for {batch} samples and {a["seconds_1"]:.2f} s against '
            f'{b["seconds_1"]:.2f} s for one')


def sentences(points, batch):
    """What the sampler head is worth at real text's diversity, against the best naive decoder and the baseline.

    points: of best_points; batch: the samples that seconds_batch is for. Against the best naive decoder stands the one
    with the head that is as likely in the fewest forward passes.
    """
    naive, baseline = family(points, 'naive'), family(points, 'ar_baseline')
    heads = family(points, 'wavefront', 'left-to-right', 'speculative')
    lowest = lambda group: min(group, key=lambda p: p['nll']['value'])
    if not heads:
        return 'No decoder with the sampler head reaches real text\'s diversity, or none was measured: no claim.'
    if not naive:
        chosen = lowest(heads)
        text = (f'No naive decoder reaches real text\'s diversity, or none was measured. {chosen["decoder"]} has '
                f'{nll_text(chosen)} nats there with {passes_text(chosen["passes"])}.')
    else:
        best = lowest(naive)
        chosen = next((p for p in heads if p['nll']['value'] <= best['nll']['value']), lowest(heads))
        text = (f'At real text\'s diversity the best naive decoder found, {best["decoder"]} with '
                f'{passes_text(best["passes"])}, has {nll_text(best)} nats. {chosen["decoder"]} with '
                f'{passes_text(chosen["passes"])} has {nll_text(chosen)}: {comparison(chosen, best, batch)}.')
        if lowest(heads) is not chosen:
            last = lowest(heads)
            text += f' Its best, {last["decoder"]} with {passes_text(last["passes"])}, has {nll_text(last)}.'
    if baseline:
        chosen = lowest(heads)
        text += (f'\nThe autoregressive baseline has {nll_text(baseline[0])} nats there. Against it '
                 f'{chosen["decoder"]} with {passes_text(chosen["passes"])} is '
                 f'{comparison(chosen, baseline[0], batch)}.')
    return text


def table_row(name, entry, columns):
    figures = [value_text(entry[c]['value'], entry[c]['error']) if c in entry else '-' for c in columns]
    extra = [f'{entry[c]:.2f}' if c in entry else '-' for c in ('temperature', 'seconds_1', 'seconds_batch')]
    return name, extra[0], *figures, *extra[1:]


def table(real, points, batch):
    """Real text and every decoder with each number of passes, at real text's diversity. Markdown."""
    columns = [c for c in COLUMNS if c in real]
    head = ['decoder', 'temperature', *(COLUMNS[c] for c in columns), 'seconds, 1 sample', f'seconds, {batch} samples']
    rows = [table_row('real text', real, columns)]
    for (decoder, passes), point in points.items():
        name = f'{decoder}, {passes_text(passes)}'
        if point and point['schedule'] and passes > 1:
            name += f' ({point["schedule"]}' + (f', noise {point["noise"]:g})' if point['noise'] else ')')
        rows.append(table_row(name, point or {}, columns))
    return markdown(head, rows)


# -----------------------------------------------------------------------------
# figures

def draw_curves(plt, result, settings, points):
    """NLL over distinct 4-grams and over entropy, a line for each curve, the best of a decoder's thick."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    real, chosen = result['reference']['real text'], {p['curve'] for p in points.values() if p}
    for axis, name in zip(axes, ('distinct4', 'entropy')):
        axis.axvspan(*band(real)[name], color='black', alpha=0.07, label='real text\'s diversity')
        axis.plot(real[name]['value'], real['nll']['value'], '*', ms=13, color='black', label='real text')
        for decoder in dict.fromkeys(s['decoder'] for s in settings):
            axis.plot([], [], color=COLORS.get(decoder), label=decoder)
        for curve_name, curve in curves_of(settings).items():
            x, y = ([s['measures'][c]['value'] for s in curve] for c in (name, 'nll'))
            style = dict(lw=2, ms=4) if curve_name in chosen else dict(lw=0.6, ms=2, alpha=0.5)
            axis.plot(x, y, '.-', color=COLORS.get(curve[0]['decoder']), **style)
            if curve_name in chosen and curve[0]['decoder'] != 'ar_baseline':
                axis.annotate(curve[0]['passes'], (x[-1], y[-1]), fontsize=7)
        axis.set(xlabel=COLUMNS[name])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('NLL under the autoregressive evaluator, nats per token')
    axes[0].set_ylim(top=min(4.0, axes[0].get_ylim()[1]))
    axes[1].legend(fontsize=8)
    figure.suptitle(f'{result["corpus"]}: samples over temperature; numbers are forward passes')
    figure.tight_layout()
    return figure


def draw_frontier(plt, result, points):
    """NLL at real text's diversity against forward passes and against seconds, for a batch and for one sample."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), sharey=True)
    real = result['reference']['real text']
    titles = {'passes': 'forward passes', 'seconds_batch': f'seconds for {result["batch"]} samples',
              'seconds_1': 'seconds for one sample'}
    for axis, (name, title) in zip(axes, titles.items()):
        axis.axhline(real['nll']['value'], color='black', lw=1, ls=':', label='real text')
        for decoder in dict.fromkeys(decoder for decoder, _ in points):
            line = [p for p in family(points, decoder) if p['decoder'] == decoder]
            errors = [0 if math.isnan(p['nll']['error']) else p['nll']['error'] for p in line]
            if line:
                axis.errorbar([p[name] for p in line], [p['nll']['value'] for p in line], errors, marker='o', ms=4,
                              capsize=2, color=COLORS.get(decoder), label=decoder)
        axis.set(xscale='log', xlabel=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('NLL, nats per token')
    axes[0].legend(fontsize=8)
    figure.suptitle(f'{result["corpus"]}: at real text\'s diversity, bars are standard errors')
    figure.tight_layout()
    return figure


# -----------------------------------------------------------------------------
# all of it

def heading(result, settings):
    """What was measured, on what, and what counts as real text's diversity."""
    identity, bound, limits = result['identity'], result['validation'], band(result['reference']['real text'])
    return '\n'.join((
        f'{result["checkpoint"]} on {result["corpus"]}: validation NELBO '
        f'{value_text(bound["nelbo"], bound["nelbo_error"], 4)} nats per token, '
        f'{value_text(bound["bits_per_character"], bound["bits_error"], 4)} bits per character',
        f'{len(settings)} settings, {identity["num_samples"]} samples of {identity["length"]} tokens each, '
        f'seed {identity["seed"]}, {identity["hardware"]}, {identity["device"]}, {identity["dtype"]}, '
        f'torch {identity["torch"]}',
        'lowest NLL where distinct 4-grams are {:.3f} to {:.3f} and entropy is {:.3f} to {:.3f} nats; - for a decoder '
        'that is never so diverse'.format(*limits['distinct4'], *limits['entropy']),
        'n-gram divergence is from other real text, so that of real text is the least to be had; shares of 20-grams '
        'repeated within a sample, across samples, found in the training text'))


def entries(points):
    """The points as plain values, [{'decoder', 'passes', 'nll', 'nll_error', ...}]; without figures for no point."""
    result = []
    for (decoder, passes), point in points.items():
        entry = {'decoder': decoder, 'passes': passes}
        for name, value in (point or {}).items():
            if isinstance(value, dict):
                error = None if math.isnan(value['error']) else value['error']
                entry |= {name: value['value'], f'{name}_error': error}
            else:
                entry[name] = value
        result.append(entry)
    return result


def write(result, keys, out_dir):
    """Print table and sentences for the settings with these keys; write report.md, report.json and the figures."""
    plt = figures.pyplot()
    settings, real = [result['settings'][key] for key in keys], result['reference']['real text']
    points = best_points(settings, real)
    parts = heading(result, settings), table(real, points, result['batch']), sentences(points, result['batch'])
    text = '\n\n'.join(parts)
    print(text)
    write_atomically(os.path.join(out_dir, 'report.md'), f'    {result["command"]}\n\n{text}\n'.encode())
    write_atomically(os.path.join(out_dir, 'report.json'), json.dumps(entries(points), indent=1).encode())
    drawn = {'curves': draw_curves(plt, result, settings, points), 'frontier': draw_frontier(plt, result, points)}
    for name, figure in drawn.items():
        figures.save(figure, os.path.join(out_dir, name))
    print(f'{out_dir} holds evaluation.json, report.md, report.json, and curves and frontier as png and svg')

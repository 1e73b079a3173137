"""Draws the curves of training runs, from the metrics.jsonl in their folders.

    python plot.py out-char-diffusion
    python plot.py out-a out-b --only nelbo,nll -o curves

Writes curves.png and curves.svg. A run may also be given as the file itself, such as the judge's,
out-char-diffusion/judge_model_metrics.jsonl.
"""
import environment    # before torch, which metrics_log brings

import argparse
import math
import os

import numpy as np

import figures
from errors import InputError, run

plt = figures.pyplot()

# names of figures, the title of their panel, where they come from; 'smoothed' is 'batch' averaged over neighbours
PANELS = ((('main',), 'main loss, nats', 'smoothed'), (('blocks',), 'loss of blocks, nats', 'smoothed'),
          (('sampler',), 'sampler loss, nats', 'smoothed'), (('critic',), 'critic loss, nats', 'smoothed'),
          (('nelbo', 'nll'), 'NELBO (autoregressive: NLL), nats per token', 'evaluation'),
          (('one_pass_nll',), 'NLL of one pass with the head, nats per token', 'evaluation'),
          (('critic_auc',), "critic's area under ROC", 'evaluation'),
          (('loss',), "judge's loss, nats", 'evaluation'),
          (('rank_correlation',), "judge's rank correlation", 'evaluation'),
          (('learning_rate',), 'learning rate', 'batch'), (('ms',), 'milliseconds per iteration', 'smoothed'))
STYLES = {'val': '-', 'train': '--'}
BORDERS = {'sampler': '-.', 'critic': ':'}


def parser():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('runs', nargs='+', metavar='RUN', help='out_dir of a run of train.py, or its metrics.jsonl')
    parser.add_argument('-o', '--output', default='curves', metavar='NAME',
                        help='write NAME.png and NAME.svg (default: curves)')
    parser.add_argument('--only', metavar='FIGURE,FIGURE', help='panels of these figures alone, such as nelbo,ms')
    return parser


def main():
    args = parser().parse_args()
    stem = args.output.removesuffix('.png').removesuffix('.svg')
    if not os.path.basename(stem):
        raise InputError(f'-o {args.output!r}, wanted a name, such as curves')
    import metrics_log    # not above: it brings torch, for which --help would wait
    runs = {path: metrics_log.of_run(path) for path in args.runs}
    plt.style.use('tableau-colorblind10')
    figure = draw(runs, panels_of(runs, args.only))
    figures.save(figure, stem)
    print(f'saved {stem}.png and {stem}.svg')


# -----------------------------------------------------------------------------
# reading

def curve(entries, name, split=None):
    """Iterations and values (n,) of a figure: of training batches, or of evaluations of a split."""
    chosen = [e for e in entries if e.get('split') == split and name in e]
    return np.array([e['iter'] for e in chosen]), np.array([e[name] for e in chosen], float)


def borders(entries):
    """{head: the iteration at which its loss first appears}; exact to log_interval."""
    found = {head: [e['iter'] for e in entries if head in e] for head in BORDERS}
    return {head: min(iterations) for head, iterations in found.items() if iterations}


def smooth(values, n):
    """Mean over n neighbours, fewer at the ends: (m,) -> (m,)."""
    kernel = np.ones(n)
    return np.convolve(values, kernel, 'same') / np.convolve(np.ones(len(values)), kernel, 'same')


# -----------------------------------------------------------------------------
# drawing

def panels_of(runs, only=None):
    """The PANELS of figures that some run has; only: those of the named figures, such as 'nelbo,ms'.

    runs: {name: entries}. InputError where no run has a figure that is drawn, or that was named.
    """
    found = {(name, 'split' in e) for entries in runs.values() for e in entries for name in e}
    known = [name for names, _, source in PANELS for name in names if (name, source == 'evaluation') in found]
    if not known:
        raise InputError(f'{", ".join(runs)}: no figures that plot.py draws; wanted the metrics of a run of train.py')
    wanted = known if only is None else only.split(',')
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InputError(f'--only {only}: no figure {unknown[0]!r} in these runs; wanted some of {",".join(known)}')
    panels = [(tuple(name for name in names if name in wanted and (name, source == 'evaluation') in found), title,
               source) for names, title, source in PANELS]
    return [panel for panel in panels if panel[0]]


def draw(runs, panels):
    """A figure of panels, as panels_of gives them, all runs in each; runs: {name: entries}."""
    columns = max(1, min(3, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    width = 4.6 * columns if columns > 1 else 7
    figure, axes = plt.subplots(rows, columns, figsize=(width, 3.2 * rows), squeeze=False, sharex=True)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, (names, title, source) in zip(axes.flat, panels):
        for number, entries in enumerate(runs.values()):
            for name in names:
                if any(name in entry for entry in entries):
                    draw_run(axis, entries, name, source, f'C{number}')
        axis.set(title=title, xlabel='iteration')
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        if names == ('ms',):    # the first iterations take longer than all others
            values = np.concatenate([curve(entries, 'ms')[1] for entries in runs.values()])
            axis.set_ylim(0, 1.2 * np.percentile(values, 98) or None)
        if source == 'evaluation':
            leave_out_iteration_0(axis)
    add_legend(figure, runs)
    return figure


def draw_run(axis, entries, name, source, color):
    """A run's line in one panel; evaluations have one for each split."""
    for head, iteration in borders(entries).items():
        axis.axvline(iteration, color=color, ls=BORDERS[head], lw=1, alpha=0.7)
    if source == 'evaluation':
        for split, style in STYLES.items():
            axis.plot(*curve(entries, name, split), style, color=color, marker='.', ms=4, lw=1.5)
        return
    iterations, values = curve(entries, name)
    if not len(values):    # a run that stopped where a head would begin has evaluated it and no more
        return
    n = max(1, len(values) // 30) if source == 'smoothed' else 1
    if n > 1:
        axis.plot(iterations, values, color=color, lw=0.5, alpha=0.3)
    axis.plot(iterations, smooth(values, n), color=color, lw=1.5)


def leave_out_iteration_0(axis):
    """Set the range of a panel of evaluations by what came after training began, for each line that has any such."""
    values = []
    for line in axis.lines:
        iterations, found = line.get_data()
        if line.get_marker() == '.':
            values.append(found[iterations > 0] if (iterations > 0).any() else found)
    values = np.concatenate(values or [[]])
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.05 * np.ptp(values) or 0.05
        axis.set_ylim(values.min() - margin, values.max() + margin)


def add_legend(figure, runs):
    """What colours and line styles mean, above the panels."""
    line = lambda label, **style: plt.Line2D([], [], label=label, **style)
    plain = lambda name: name.rstrip('/').replace('$', r'\$')    # else two of them enclose a formula
    handles = [line(plain(name), color=f'C{i}') for i, name in enumerate(runs)]
    handles += [line(f'evaluated on {split}', color='black', ls=style) for split, style in STYLES.items()]
    begun = {head for entries in runs.values() for head in borders(entries)}
    handles += [line(f'{head} begins', color='black', lw=1, ls=style) for head, style in BORDERS.items()
                if head in begun]
    columns = min(5, len(handles), int(figure.get_figwidth() / 2.7))    # inches
    rows = math.ceil(len(handles) / columns)
    height = 0.1 + 0.18 * rows
    figure.set_figheight(figure.get_figheight() + height)
    top = 1 - height / figure.get_figheight()
    figure.legend(handles=handles, loc='upper center', ncols=columns, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, top))


if __name__ == '__main__':
    run(main)

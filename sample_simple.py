"""Generates text from a checkpoint: with its sampler head where it has one, else naively.

    python sample_simple.py --out-dir out-char-diffusion --num-samples 16 --iterations 15
    python sample_simple.py --seed-text "To be or not to be" --seed-placement random --save out.json
    python sample_simple.py --template "To be, ____ not to ____" --num-samples 8
    python sample_simple.py --disable-sampler
    torchrun --standalone --nproc_per_node=4 sample_simple.py --num-samples 256

The same seed gives the same samples, whatever the batch. view.py and --animate show how they come about.
"""
import environment    # before torch

import argparse
import os

from choices import ANY_PASSES, DTYPES, ONE_PASS
from errors import InputError, run
from files import require_own
from settings import COUNTS, SEEDS, SHARES, Range, check_not_empty, check_range

RANGES = {
    'num_samples': COUNTS, 'sequence_length': Range(0, COUNTS.high), 'batch_size': COUNTS,
    'seed': Range(-1, SEEDS.high), 'iterations': Range(1, 10 ** 5), 'plan_passes': Range(1, 10 ** 5),
    'temperature': Range(0), 'end_temperature': Range(0), 'top_p': Range(1e-6, 1), 'start_ratio': SHARES,
    'end_ratio': SHARES, 'threshold': Range(1e-6, 1), 'corrections': Range(0, 10 ** 4), 'correction_ratio': SHARES,
    'remask_kept': SHARES, 'randomness_strength': Range(0, 10 ** 6), 'animate': Range(0.1, 1000)}


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to each help text that does not tell it in its own words."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=29)

    def _get_help_string(self, action):
        plain = action.default in (None, False, '', argparse.SUPPRESS) or 'default' in action.help
        return action.help if plain else f'{action.help} (default: %(default)s)'


def parser():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=HelpFormatter,
                                     usage='%(prog)s [flags]')
    add = parser.add_argument_group('what to generate').add_argument
    add('--out-dir', default='out-char-diffusion', metavar='DIR', help='folder of the checkpoint')
    add('--checkpoint-name', default='ckpt.pt', metavar='FILE', help='file in it')
    add('--num-samples', type=int, default=4, metavar='N', help='sequences to generate')
    add('--sequence-length', type=int, default=0, metavar='N',
        help='tokens in each (default: a block or the template)')
    add('--seed-text', default='', metavar='TEXT', help='text that every sample contains')
    add('--seed-placement', choices=('prefix', 'random'), default='prefix', metavar='WHERE',
        help='where: prefix or random')
    add('--template', metavar='TEXT',
        help='text with blanks, such as "To be, ____ not": each _ is one token to fill, all else is kept; @FILE '
        'reads it from a file. A larger --sequence-length goes on behind it')
    add('--blank', metavar='CHAR',
        help='character of the blanks; for a template with underscores another: --blank "#" (default: _)')
    add('--seed', type=int, default=1337, metavar='N', help='of the noise; -1 draws one')
    add = parser.add_argument_group('how to decode: order').add_argument
    add('--iterations', type=int, metavar='N', help='forward passes over one block, at most; longer texts take '
        'overlapping windows (default: 15)')
    add('--plan', metavar='NAME', help=f'order of filling: {", ".join(ONE_PASS + ANY_PASSES)} '
        '(default: speculative, blocks with --corrections or --end-temperature, interleaved without a sampler; to '
        'revise, left-to-right, or wavefront without a sampler; wavefront between given text)')
    add('--plan-passes', type=int, metavar='N',
        help=f'iterations that the plan takes, the others revise (default: 1, or all for {", ".join(ANY_PASSES)})')
    add('--disable-sampler', action='store_true', help='decode naively, each token from its own marginal')
    add = parser.add_argument_group('how to decode: tokens').add_argument
    add('--temperature', type=float, default=0.8, metavar='T', help='0 takes the likeliest token')
    add('--end-temperature', type=float, metavar='T', help='of the last pass (default: --temperature)')
    add('--top-p', type=float, default=1.0, metavar='P', help='keep the likeliest tokens up to this probability')
    add = parser.add_argument_group('how to decode: revising').add_argument
    add('--schedule-mode', choices=('ratio', 'threshold'), default='ratio', metavar='MODE',
        help='ratio remasks a share of the tokens, threshold those whose remask score is above --threshold')
    add('--start-ratio', type=float, metavar='R', help='share remasked first (default: 0.95, below 8 iterations 0.7)')
    add('--end-ratio', type=float, metavar='R', help='share remasked last (default: 0.05, below 8 iterations 0.1)')
    add('--masking-ratios', type=ratios, metavar='R,R', help='shares after each pass but the last, such as 0.6,0.3,0.1')
    add('--threshold', type=float, metavar='S',
        help='remask score from 0 to 1 above which a token is remasked (default: 0.9)')
    add('--order', choices=('confidence', 'margin', 'critic', 'random'), metavar='NAME',
        help='what is remasked first: lowest confidence, lowest margin between the two likeliest tokens, highest '
        'critic score, random (default: critic with a sampler and a critic head, else confidence)')
    add('--no-revise', action='store_true', help='never remask a token that was kept once')
    add('--remask-kept', type=float, default=0.0, metavar='R',
        help='with --order random: share of the tokens kept so far that each pass remasks, as ReMDM does (default: 0)')
    add('--randomness-strength', type=float, default=0.0, metavar='X',
        help='of annealed Gumbel noise on the order (default: 0)')
    add('--corrections', type=int, default=0, metavar='N',
        help='times that the sampler head resamples its worst tokens after each pass (default: 0)')
    add('--correction-ratio', type=float, metavar='R',
        help='share that the first of them resamples, falling evenly (default: 0.6)')
    add = parser.add_argument_group('output').add_argument
    add('--animate', type=float, nargs='?', const=20.0, metavar='SPEED',
        help='show in the terminal how the first sample comes about, SPEED waves a second (20 unless given)')
    add('--quality-metric', choices=('none', 'node', 'judge'), metavar='NAME', help='score samples: none, node by the '
        'critic, judge by --judge-checkpoint-name (default: what there is)')
    add('--judge-checkpoint-name', metavar='FILE',
        help='file in --out-dir, or a path; config/train_judge.py trains one')
    add('--save', metavar='FILE', help='write samples and every step of their making as JSON; view.py shows it')
    add('--verbose', action='store_true', help='show the first sample after every pass')
    add('--no-progress', action='store_true', help='no bar, no lines')
    add = parser.add_argument_group('machine').add_argument
    add('--batch-size', type=int, default=64, metavar='N', help='sequences decoded at a time')
    add('--device', default='auto', metavar='NAME', help='auto, cuda, mps, cpu')
    add('--dtype', default='auto', choices=('auto', *DTYPES), metavar='NAME',
        help='float32, bfloat16, float16, float64, or auto: the fastest here')
    return parser


def ratios(text):
    """'0.6,0.3' -> [0.6, 0.3]"""
    return [float(part) for part in text.split(',')]


def check(args):
    """InputError for a value out of range; settles what depends on another flag."""
    check_not_empty(args, 'seed_text', 'blank', 'save')
    for name, wanted in RANGES.items():
        value = getattr(args, name)
        if value is not None:
            check_range(f'--{name.replace("_", "-")} is {value}', value, wanted)
    if args.masking_ratios is not None:
        if not all(0 <= r <= 1 for r in args.masking_ratios):
            raise InputError(f'--masking-ratios has {args.masking_ratios}, wanted numbers in [0, 1]')
        found, args.iterations = args.iterations, len(args.masking_ratios) + 1
        if found not in (None, args.iterations):
            raise InputError(f'{len(args.masking_ratios)} --masking-ratios make {args.iterations} iterations, '
                             f'found --iterations {found}')
    args.iterations = args.iterations or 15
    check_ignored(args)
    args.correction_ratio = 0.6 if args.correction_ratio is None else args.correction_ratio
    args.blank = '_' if args.blank is None else args.blank
    if len(args.blank) != 1:
        raise InputError(f'--blank is {args.blank!r}, wanted one character')
    if args.template and (args.seed_text or args.seed_placement == 'random'):
        raise InputError('--template goes neither with --seed-text nor with --seed-placement random; write the text '
                         'into the template, where it is to stand')
    if args.schedule_mode == 'threshold':
        if args.order == 'random' or args.masking_ratios is not None:
            raise InputError('--schedule-mode threshold goes by the remask score; it allows neither --order random '
                             'nor --masking-ratios')
        args.threshold = 0.9 if args.threshold is None else args.threshold
    elif args.threshold is not None:
        raise InputError('--threshold needs --schedule-mode threshold')
    if args.save is not None:
        check_save(args.save)
    if args.judge_checkpoint_name and args.quality_metric is None:
        args.quality_metric = 'judge'
    if (args.quality_metric == 'judge') != bool(args.judge_checkpoint_name):
        raise InputError(f'found --quality-metric {args.quality_metric} with --judge-checkpoint-name '
                         f'{args.judge_checkpoint_name}, wanted both or neither; python train.py config/train_judge.py '
                         f'trains a judge')


def check_ignored(args):
    """InputError for a flag that the other flags leave nothing to do."""
    ends = args.start_ratio is not None or args.end_ratio is not None
    threshold = args.schedule_mode == 'threshold'
    revises = ends or threshold or args.no_revise or args.randomness_strength > 0 or args.remask_kept > 0
    ignored = {
        '--start-ratio or --end-ratio with --schedule-mode threshold, which goes by --threshold; wanted '
        '--schedule-mode ratio': ends and threshold,
        '--start-ratio or --end-ratio beside --masking-ratios, which say every share; wanted one or the other':
            ends and args.masking_ratios is not None,
        '--corrections with --disable-sampler; it is the sampler head that corrects':
            args.corrections > 0 and args.disable_sampler,
        '--correction-ratio without --corrections; wanted a number of --corrections above 0':
            args.correction_ratio is not None and not args.corrections,
        '--randomness-strength with --order random, which goes by noise alone; wanted another --order':
            args.randomness_strength > 0 and args.order == 'random',
        '--remask-kept without --order random; other orders remask kept tokens by themselves, wanted --order random':
            args.remask_kept > 0 and args.order != 'random',
        '--remask-kept with --no-revise, which remasks no kept token; wanted one or the other':
            args.remask_kept > 0 and args.no_revise,
        '--no-revise with --order random, which keeps what it kept but for --remask-kept; leave out --no-revise':
            args.no_revise and args.order == 'random',
        '--end-temperature with one iteration, which has --temperature; wanted more --iterations':
            args.end_temperature is not None and args.iterations == 1,
        'a flag about revising with one iteration, after which nothing is revised; wanted more --iterations':
            revises and args.iterations == 1,
        '--blank without --template, whose blanks it names': args.blank is not None and not args.template,
        '--seed-placement random without --seed-text, the text to be placed':
            args.seed_placement == 'random' and not (args.seed_text or args.template)}
    for found, is_so in ignored.items():
        if is_so:
            raise InputError(f'found {found}')


def check_save(path):
    """InputError unless samples may be written to path: a name, a device, or a file that --save wrote."""
    if not os.path.isdir(os.path.dirname(path) or '.'):
        raise InputError(f'--save {path!r}: no folder {os.path.dirname(path)!r}')
    if not path or os.path.isdir(path):
        raise InputError(f'--save {path!r}, wanted the name of a file, such as samples.json')
    require_own(path, b'{"schema"', '--save')


def main():
    args = parser().parse_args()
    check(args)
    # not above: they bring torch, for which --help and a misspelt flag would wait
    from device import pick_device
    from distributed import Processes, leave
    from generation import generate_text
    with Processes(pick_device(args.device)) as processes, processes.first_speaks():
        ended_by = generate_text(args, processes)
    leave(128 + ended_by if ended_by else 0)


if __name__ == '__main__':
    run(main)

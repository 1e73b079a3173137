"""Generates text from a checkpoint: by wavefront where it has a sampler head, else naively.

    python sample_simple.py --out-dir out-char-diffusion --num-samples 16 --iterations 15
    python sample_simple.py --seed-text "To be or not to be" --seed-placement random --save out.json
    python sample_simple.py --disable-sampler

The same seed gives the same noise to both decoders, so their outputs can be compared sample by sample.
"""
import environment    # before torch

import argparse
import json
import math
import os
import secrets
import sys
import time

import torch
from tqdm import tqdm

import memory
import signals
from checkpoint import load_model, require_generator, require_same_vocabulary, untrained_heads
from decoding import blocks, default_config, default_ratios, generate, linear_ratios
from device import DTYPES, autocast, pick_device, pick_dtype
from errors import InputError, run
from files import write_atomically
from judge import Judge
from noise import POSITIONS, uniform
from plans import ANY_PASSES, ONE_PASS, check_plan
from settings import COUNTS, SEEDS, SHARES, Range, check_range

SCHEMA = 2    # of the file that --save writes
RANGES = {
    'num_samples': COUNTS, 'sequence_length': Range(0, COUNTS.high), 'batch_size': COUNTS,
    'seed': Range(-1, SEEDS.high), 'iterations': Range(1, 10 ** 5), 'plan_passes': Range(1, 10 ** 5),
    'temperature': Range(0), 'end_temperature': Range(0), 'top_p': Range(1e-6, 1), 'start_ratio': SHARES,
    'end_ratio': SHARES, 'threshold': Range(1e-6, 1), 'corrections': Range(0, 10 ** 4), 'correction_ratio': SHARES,
    'randomness_strength': Range(0, 10 ** 6)}


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to each help text that does not tell it in its own words."""

    def _get_help_string(self, action):
        plain = action.default in (None, False, '', argparse.SUPPRESS) or 'default' in action.help
        return action.help if plain else f'{action.help} (default: %(default)s)'


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=HelpFormatter)
    add = parser.add_argument_group('what to generate').add_argument
    add('--out-dir', default='out-char-diffusion', help='folder of the checkpoint')
    add('--checkpoint-name', default='ckpt.pt', help='file in it')
    add('--num-samples', type=int, default=4, help='sequences to generate')
    add('--sequence-length', type=int, default=0, help='tokens in a sequence (default: one block)')
    add('--seed-text', default='', help='text that every sample contains')
    add('--seed-placement', choices=('prefix', 'random'), default='prefix', help='where it stands')
    add('--seed', type=int, default=1337, help='of the noise; -1 draws one')
    add = parser.add_argument_group('how to decode').add_argument
    add('--iterations', type=int, help='forward passes over a block (default: 15)')
    add('--temperature', type=float, default=0.8, help='0 takes the likeliest token')
    add('--end-temperature', type=float, help='of the last pass, reached evenly (default: --temperature)')
    add('--top-p', type=float, default=1.0, help='keep the likeliest tokens up to this probability')
    add('--plan', help=f'order of filling everything first: {", ".join(ONE_PASS + ANY_PASSES)} '
        '(default with a sampler: blocks; left-to-right where a flag asks to revise; else, and where text is given '
        'elsewhere than as a prefix, wavefront)')
    add('--plan-passes', type=int, help='iterations that the plan takes; the others revise (default: 1, or all for a '
        f'plan of any number: {", ".join(ANY_PASSES)})')
    add('--disable-sampler', action='store_true', help='decode naively, each token from its own marginal')
    add('--schedule-mode', choices=('ratio', 'threshold'), default='ratio',
        help='remask a share of the tokens, or those whose remask score is above --threshold')
    add('--start-ratio', type=float, help='revise: share remasked first (default: 0.95, below 8 iterations 0.7)')
    add('--end-ratio', type=float, help='revise: share remasked last (default: 0.05, below 8 iterations 0.1)')
    add('--masking-ratios', type=ratios, help='shares after each pass but the last, such as 0.6,0.3,0.1')
    add('--threshold', type=float, help='remask score from 0 to 1 above which a token is remasked (default: 0.9)')
    add('--order', choices=('confidence', 'critic', 'random'),
        help='what is remasked first (default: critic with a sampler and a critic head, else confidence)')
    add('--no-revise', action='store_true', help='never remask a token that was kept once')
    add('--randomness-strength', type=float, default=0.0, help='of the annealed Gumbel noise on that order')
    add('--corrections', type=int, default=0,
        help='times that the sampler head resamples its worst tokens after each pass, without a forward pass')
    add('--correction-ratio', type=float, default=0.6, help='share that the first correction resamples, falling evenly')
    add('--batch-size', type=int, default=64, help='sequences decoded at a time')
    add('--device', default='auto', help='auto, cuda, mps, cpu')
    add('--dtype', default='auto', choices=('auto', *DTYPES), help='precision; auto is the fastest here')
    add = parser.add_argument_group('what to show').add_argument
    add('--quality-metric', choices=('none', 'node', 'judge'),
        help='score samples: node by the critic, judge by --judge-checkpoint-name (default: what there is)')
    add('--judge-checkpoint-name', help='file in --out-dir, or a path; config/train_judge.py trains one')
    add('--save', metavar='FILE', help='write samples and every step of their making as JSON')
    add('--verbose', action='store_true', help='show the first sample after every pass')
    add('--no-progress', action='store_true', help='no bar, no lines')
    return parser.parse_args()


def ratios(text):
    """'0.6,0.3' -> [0.6, 0.3]"""
    return [float(part) for part in text.split(',')]


def check(args):
    """InputError for a value out of range; settles what depends on another flag."""
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
    if args.seed == -1:
        args.seed = secrets.randbelow(2 ** 31)
        print(f'seed: {args.seed}')


def check_save(path):
    """InputError unless samples may be written to path: a name, a device, or a file that --save wrote."""
    if not os.path.isdir(os.path.dirname(path) or '.'):
        raise InputError(f'--save {path!r}: no folder {os.path.dirname(path)!r}')
    if not path or os.path.isdir(path):
        raise InputError(f'--save {path!r}, wanted the name of a file, such as samples.json')
    if os.path.isfile(path) and os.path.getsize(path):
        try:
            with open(path, 'rb') as f:
                found = f.read(9)
        except OSError as error:
            raise InputError(f'--save {path!r}: {error.strerror}') from error
        if found != b'{"schema"':
            raise InputError(f'--save {path!r} would replace a file that --save did not write; give another name')


def decoder_config(args, model, path):
    """The DecoderConfig that the flags ask for: the defaults, changed by each flag that was given."""
    if args.order == 'critic' and model.critic_head is None:
        raise InputError(f'{path!r} has no critic head, which --order critic needs')
    prefix_only = not args.seed_text or args.seed_placement == 'prefix'
    use_sampler = False if args.disable_sampler else None
    given = {name: getattr(args, name) for name in ('order', 'plan') if getattr(args, name)}
    config = default_config(model, args.iterations, use_sampler, prefix_only, asks_to_revise(args), seed=args.seed,
                            top_p=args.top_p, temperature=args.temperature, end_temperature=args.end_temperature,
                            revise=not args.no_revise, randomness_strength=args.randomness_strength,
                            corrections=args.corrections, correction_ratio=args.correction_ratio,
                            threshold=args.threshold or 0.0, **given)
    config.plan_passes = args.plan_passes or (args.iterations if config.plan in ANY_PASSES else 1)
    check_plan(config.plan, config.plan_passes)
    revisions = args.iterations - config.plan_passes
    if revisions < 0:
        raise InputError(f'--plan-passes is {config.plan_passes}, wanted at most --iterations, {args.iterations}')
    if args.masking_ratios is not None:
        if len(args.masking_ratios) != revisions:
            raise InputError(f'--plan {config.plan} leaves {revisions} iterations to revise, found '
                             f'{len(args.masking_ratios)} --masking-ratios')
        config.mask_ratios = tuple(args.masking_ratios)
    elif revisions:
        start, end = (default if given is None else given for default, given in zip(
            default_ratios(args.iterations), (args.start_ratio, args.end_ratio)))
        config.mask_ratios = tuple(linear_ratios(revisions + 1, start, end))
    else:
        config.mask_ratios = ()
    return config


def asks_to_revise(args):
    """Was a flag given that only means something where tokens are remasked or resampled?"""
    return args.order is not None or args.start_ratio is not None or args.end_ratio is not None \
        or args.masking_ratios is not None or args.schedule_mode == 'threshold' or args.no_revise \
        or args.randomness_strength > 0 or args.plan_passes is not None


def prompts(args, tokenizer, length):
    """Sequences with the seed text in place: x (num_samples, length) ids and free (num_samples, length) bool."""
    prompt = torch.tensor(tokenizer.encode(args.seed_text), dtype=torch.long)
    if len(prompt) > length:
        raise InputError(f'--seed-text has {len(prompt)} tokens, wanted at most the sequence length, {length}')
    starts = torch.zeros(args.num_samples, dtype=torch.long)
    if args.seed_placement == 'random':
        u = uniform(args.seed, POSITIONS, range(args.num_samples), 0, [0])[:, 0]
        starts = (u * (length - len(prompt) + 1)).long()
    at = starts[:, None] + torch.arange(len(prompt))
    x = torch.full((args.num_samples, length), tokenizer.mask_id).scatter(1, at, prompt.expand(args.num_samples, -1))
    return x, torch.ones_like(x, dtype=torch.bool).scatter(1, at, False)


def load_judge(args, corpus, device):
    """The judge, from --out-dir or a path of its own."""
    path = args.judge_checkpoint_name
    if not os.path.exists(path):
        path = os.path.join(args.out_dir, path)
    model, _, saved = load_model(path)
    require_same_vocabulary(saved['corpus'], path, corpus)
    return Judge(model.to(device), path, saved['corpus'])


class Stopped(Exception):
    """A signal came: the batch at hand is given up."""


class Progress:
    """Shows every pass on a bar or in lines, keeps it for --save, and ends with Stopped after a signal."""

    def __init__(self, args, tokenizer, total, stop):
        self.args, self.tokenizer, self.stop = args, tokenizer, stop
        self.lines = not args.no_progress and not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit='pass', disable=args.no_progress or self.lines)
        self.history = []

    def begin(self, sequences):
        self.sequences, self.first = sequences, len(self.history)
        self.history += [[] for _ in sequences]

    def __call__(self, step):
        if self.stop.number:
            raise Stopped
        self.bar.update()
        if self.lines:
            print(f'samples {self.sequences[0]}-{self.sequences[-1]}, from token {step["start"]}, pass '
                  f'{step["pass"] + 1}: {step["remasked"].float().mean().item():.0%} left to fill', file=sys.stderr)
        if self.args.verbose and self.sequences[0] == 0:
            ids = torch.where(step['remasked'], self.tokenizer.mask_id, step['x'])[0].tolist()
            tqdm.write(f'--- pass {step["pass"] + 1}\n' + self.tokenizer.decode(ids))
        if self.args.save:
            per_token = {'input_masked': step['xt'], 'output_unmasked': step['x'], 'wave': step['wave'],
                         'remask_score': step['remask_score']}
            for i, passes in enumerate(self.history[self.first:]):
                remasked = (step['remasked'][i].nonzero()[:, 0] + step['start']).tolist()
                passes.append({'iteration': step['pass'], 'block_start': step['start']}
                              | {name: values[i].tolist() for name, values in per_token.items()}
                              | {'remasked_indices': remasked})


def decode(args, model, x, free, config, device, dtype, progress):
    """Decode in batches: tokens (lists), the critic's mean chance that each is real, forward passes, waves.

    Where a signal comes, those of the batches that are done.
    """
    tokens, p_real, passes, waves = [], [], 0, 0
    for start in range(0, args.num_samples, args.batch_size):
        part = slice(start, min(start + args.batch_size, args.num_samples))
        progress.begin(range(part.start, part.stop))
        try:
            with autocast(device, dtype):
                decoded = generate(model, x[part].to(device), free[part].to(device), config, progress.sequences,
                                   progress)
        except Stopped:
            break
        tokens += decoded.x.tolist()
        if decoded.p_generated is not None:
            n_free = free[part].sum(1).clamp(min=1)
            p_real += (1 - decoded.p_generated.sum(1).cpu() / n_free).tolist()
        passes, waves = passes + decoded.passes, waves + decoded.waves
    progress.bar.close()
    return tokens, p_real, passes, waves


def main():
    args = arguments()
    check(args)

    # 1. model, judge, prompts
    path = os.path.join(args.out_dir, args.checkpoint_name)
    model, tokenizer, saved = load_model(path)
    require_generator(model, path)
    config = decoder_config(args, model, path)
    if args.quality_metric == 'node' and model.critic_head is None:
        raise InputError(f'{path!r} has no critic head, which --quality-metric node needs')
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    judge = load_judge(args, saved['corpus'], device) if args.judge_checkpoint_name else None
    model = model.to(device, torch.float64 if dtype == 'float64' else torch.float32)
    length = args.sequence_length or model.config.block_size
    if judge and not judge.is_scorer and length < 2:
        raise InputError('--sequence-length is 1, and a causal judge scores what follows the first token; wanted 2')
    memory.require(17 * args.num_samples * length + memory.of_activations(
        model.config, min(args.num_samples, args.batch_size) * min(length, model.config.block_size))
        // model.config.n_layer, device, f'{args.num_samples} samples of {length} tokens')
    x, free = prompts(args, tokenizer, length)
    print(f'{path}: iteration {saved["iter_num"]}, trained on {saved["corpus"]["name"]}; decoding '
          f'{"by wavefront" if config.use_sampler else "naively"}, {config.passes} iterations, {device}, {dtype}, '
          f'seed {args.seed}')
    for head in untrained_heads(saved):
        print(f'note: the {head} head had not begun to learn when this was saved; --disable-sampler decodes without it')
    if not free.any():
        print('note: --seed-text fills the sequence, nothing is left to generate')

    # 2. decode
    n_batches = math.ceil(args.num_samples / args.batch_size)
    n_passes = n_batches * len(blocks(length, model.config.block_size)) * config.passes
    clock = time.perf_counter()
    with signals.noted('this pass, with the samples that are done') as stop:
        progress = Progress(args, tokenizer, n_passes, stop)
        tokens, p_real, passes, waves = decode(args, model, x, free, config, device, dtype, progress)
    seconds = time.perf_counter() - clock

    # 3. score, show, save
    texts, scores, meaning = [tokenizer.decode(ids) for ids in tokens], [], ''
    if judge and tokens:
        ids = torch.tensor(tokens).split(args.batch_size)
        scores = [score for part in ids for score in judge.score(part.to(device)).tolist()]
        meaning = f'by {args.judge_checkpoint_name}: {judge.meaning}'
    elif args.quality_metric != 'none' and p_real and free.any():
        scores, meaning = p_real, 'by the critic: 0 is seen through, 0.5 cannot be told from real text'
    for i, text in enumerate(texts):
        print(f'--- sample {i}' + (f', quality {scores[i]:.3f}' if scores else '') + f'\n{text}')
    print('---')
    if scores:
        print(f'mean quality {sum(scores) / len(scores):.3f}, {meaning}')
    print(f'{len(tokens)} samples of {length} tokens in {seconds:.2f} s: {passes} forward passes, {waves} waves, '
          f'{int(free[:len(tokens)].sum()) / seconds:,.0f} tokens/s')
    if args.save and tokens:
        samples = [{'text': text, 'tokens': ids, 'quality': scores[i] if scores else None,
                    'iterations': progress.history[i]} for i, (text, ids) in enumerate(zip(texts, tokens))]
        settings = vars(args) | vars(config) | {'device': device, 'dtype': dtype, 'checkpoint': path}
        write_atomically(args.save, json.dumps({
            'schema': SCHEMA, 'settings': settings, 'vocabulary': saved['corpus'], 'mask_id': tokenizer.mask_id,
            'seconds': seconds, 'forward_passes': passes, 'waves': waves, 'samples': samples}).encode())
        print(f'saved {args.save}')
    if stop.number:
        print(f'{signals.name_of(stop.number)} after {len(tokens)} of {args.num_samples} samples', file=sys.stderr)
        sys.exit(128 + stop.number)


if __name__ == '__main__':
    run(main)

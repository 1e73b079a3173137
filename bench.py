"""What training steps and decoding cost on this machine: one table, and bench.json with the ratios.

    python bench.py --quick
    python bench.py --checkpoint out-char-diffusion/ckpt.pt --nanogpt ../nanoGPT
    python bench.py --run out-char-diffusion --run out-char-ar

Rows run in turn after a warm-up, figures are medians, ratios are taken within each round: read ratios, not seconds,
where the machine has other work. A decoding's time is that of the trunk, of waves (filling by the head or from the
trunk's marginals), of checking drafts, corrections, remasking (scores and choosing) and sampling (drawing tokens). The
utilisation of a training step is a share of the speed at which this machine was seen to multiply two matrices, not of a
data sheet's peak. Settings of train.py may follow, as in --n_layer=2. Reference: nanoGPT, whose model.py can be
compared (https://github.com/karpathy/nanoGPT).
"""
import environment    # before torch

import argparse
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch

import autoregressive
import decoding
import filling
import memory
import time_to_loss
import train
from batches import Share
from cache import CachedTrunk
from checkpoint import load_model, require_generator
from configurator import configure
from corpus import Corpus
from critic import CriticHead
from decoding import default_config, from_nothing
from device import DTYPES, autocast, pick_device, pick_dtype
from errors import InputError, run
from files import make_folder, require_own, write_atomically
from filling import HeadFiller, NaiveFiller
from model import GPT, GPTConfig
from settings import Range, check, check_not_empty, check_range
from speculative import Writer
from timing import in_turn, machine, matmul_rate, medians, peak_memory, ratio

RATIOS = {'stage2_over_stage1': ('stage 2', 'stage 1'), 'stage3_over_stage1': ('stage 3', 'stage 1'),
          'stage1_over_nanogpt': ('stage 1', 'nanoGPT')}
for B in (1, 32):
    RATIOS |= {f'wavefront_over_naive_15_batch{B}': (f'wavefront 15, batch {B}', f'naive 15, batch {B}'),
               f'few_over_naive_4_batch{B}': (f'wavefront 4, batch {B}', f'naive 4, batch {B}'),
               f'revising_over_naive_15_batch{B}': (f'revising 15, batch {B}', f'naive 15, batch {B}'),
               f'wavefront_over_cached_ar_batch{B}': (f'wavefront 15, batch {B}', f'autoregressive, batch {B}')}
VOCAB_SIZE = 66    # of tiny Shakespeare, where there is no checkpoint
MEMORY = ('naive 15, batch 32', 'wavefront 15, batch 32')    # rows whose peak is measured; in full also
FULL_MEMORY = ('corrected 4, batch 32', 'autoregressive, batch 32')


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='config/train_char_diffusion_sampler.py', help='size and batch')
    parser.add_argument('--checkpoint', help='decode with these weights; default: random ones of the config\'s size')
    parser.add_argument('--out-dir', default='.', help='where bench.json is written')
    parser.add_argument('--quick', action='store_true',
                        help='fewer rounds, no growth with batch and length, no revising or correcting at batch 32')
    parser.add_argument('--run', action='append', metavar='OUT_DIR',
                        help='only print how many seconds this run trained until each evaluation; may be repeated')
    parser.add_argument('--nanogpt', help='nanoGPT\'s folder or model.py, for a comparison of training steps')
    parser.add_argument('--rounds', type=int, help='of every row, after the warm-up; default 3 or, in full, 7')
    parser.add_argument('--peak-of', help=argparse.SUPPRESS)    # run one row in this process, print its peak memory
    return parser


def arguments():
    args, settings = parser().parse_known_args()
    check_not_empty(args)
    others = [flag for flag in sys.argv[1:] if flag.startswith('-') and not flag.startswith('--run')]
    if args.run and others:
        raise InputError(f'found {others[0]} with --run, which times nothing itself; wanted one or the other')
    args.rounds = (3 if args.quick else 7) if args.rounds is None else args.rounds
    check_range(f'--rounds is {args.rounds}', args.rounds, Range(1, 10 ** 4))
    if any(setting.startswith('--out_dir=') for setting in settings):
        raise InputError('found --out_dir, which is a setting of train.py; wanted --out-dir, where bench.json goes')
    config = SimpleNamespace(**configure(train.settings, [args.config, *settings]))
    check(config)
    if config.freeze_trunk or config.trunk_checkpoint:
        raise InputError('a frozen trunk, or one of a checkpoint, has no stages to time; wanted another --config')
    if not (config.add_sampler_head and config.add_critic_head):
        raise InputError('a model without sampler and critic head has no such decoding and stages to time; wanted '
                         '--config config/train_char_diffusion_sampler.py, or both heads')
    config.device = pick_device(config.device)
    config.dtype = pick_dtype(config.dtype, config.device)
    return args, config, settings


# -----------------------------------------------------------------------------
# training steps

class RandomText(Corpus):
    """A corpus of random tokens, for batches gathered as in training."""

    def __init__(self, vocab_size):
        ids = np.random.default_rng(0).integers(0, vocab_size - 1, 2 ** 20).astype(np.uint16)
        self.meta, self.splits = {'vocab_size': vocab_size}, {'train': ids}


class Training:
    """The step of train.py in one of its stages, on random text."""

    def __init__(self, config, vocab_size, number):
        self.config, self.number = config, number
        k = config.gradient_accumulation_steps    # of which one is run here
        self.share = Share(k * config.batch_size, parts=k)
        quiet = SimpleNamespace(device=config.device, world=1, shards=False, print0=lambda text: None)
        self.corpus = RandomText(vocab_size)
        self.state, self.objective = train.build(config, self.corpus, None, quiet, divisor=1)
        self.state.start_iter = dict.fromkeys(self.state.start_iter, 0)
        self.state.model.train()
        train.choose_trainable(config, self.state.model, number)
        self.it = max(1, config.end_critic_iteration)

    def __call__(self, clock):
        self.it += 1
        with clock('batch'):
            x0 = train.next_batch(self.config, self.corpus, self.objective, self.it, self.share, self.config.device)
        with clock('forward'), autocast(self.config.device, self.config.dtype):
            rows = train.rows_to_learn_from(self.config, self.number)
            losses = self.objective(x0, self.it, self.share, *rows)
            loss = train.weighted(self.config, self.state.start_iter, self.it, losses)
        with clock('backward'):
            self.state.scaler.scale(loss).backward()
        with clock('optimizer'):
            train.update(self.config, self.state)


class NanoGPT:
    """A training step of nanoGPT's own model.py at the same shape, batch and precision."""

    def __init__(self, path, config, vocab_size):
        path = os.path.join(path, 'model.py') if os.path.isdir(path) else path
        if not (os.path.isfile(path) and path.endswith('.py')):
            raise InputError(f'--nanogpt {path!r}: no model.py; wanted a clone of https://github.com/karpathy/nanoGPT')
        spec = importlib.util.spec_from_file_location('nanogpt_model', path)
        module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
        shape = {name: getattr(config, name) for name in ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout')}
        try:
            spec.loader.exec_module(module)
            with contextlib.redirect_stdout(io.StringIO()):
                its_config = module.GPTConfig(vocab_size=vocab_size - 1, bias=False, **shape)
                self.model = module.GPT(its_config).to(config.device)
                self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), config.device.split(':')[0])
        except Exception as error:    # whatever another model.py does
            raise InputError(f'--nanogpt {path!r} is not nanoGPT\'s model.py ({type(error).__name__}: {error}); '
                             f'wanted a clone of https://github.com/karpathy/nanoGPT') from error
        ids = torch.randint(vocab_size - 1, (config.batch_size, config.block_size + 1)).to(config.device)
        self.config, self.inputs, self.targets = config, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def __call__(self, clock):
        with clock('forward'), autocast(self.config.device, self.config.dtype):
            _, loss = self.model(self.inputs, self.targets)
        with clock('backward'):
            loss.backward()
        with clock('optimizer'):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or float('inf'))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def training_rows(args, config, vocab_size):
    names = ('stage 1', 'stage 2', 'step with critic')
    rows = {name: Training(config, vocab_size, number) for number, name in enumerate(names, 1)}
    if args.nanogpt:
        rows['nanoGPT'] = NanoGPT(args.nanogpt, config, vocab_size)
    return rows


def mixed(plain, with_critic, interval):
    """Seconds of an iteration of stage 3, of which one in interval teaches the critic, the others are as in stage 2."""
    return [{part: a.get(part, 0) + (b.get(part, 0) - a.get(part, 0)) / interval for part in b}
            for a, b in zip(plain, with_critic)]


def model_flops(config, parameters):
    """FLOP of a training step: 6 for each parameter of the trunk and token, and 12 L C T of attention (PaLM)."""
    per_token = 6 * parameters + 12 * config.n_layer * config.n_embd * config.block_size
    return per_token * config.batch_size * config.block_size


# -----------------------------------------------------------------------------
# decoding

class Decoding:
    """Text from nothing by masked diffusion, as sample_simple.py writes it."""

    def __init__(self, model, config, B, length, decoder, iterations):
        self.model, self.config, self.n, self.length = model, config, B, length
        self.decoder = default_config(model, iterations, use_sampler=decoder != 'naive',
                                      revising=decoder in ('revising', 'corrected'),
                                      corrections=8 if decoder == 'corrected' else 0)
        self.passes = self.steps = 0

    def __call__(self, clock):
        with autocast(self.config.device, self.config.dtype), parts_timed(clock):
            decoded = from_nothing(self.model, self.length, self.decoder, range(self.n))
        self.passes, self.steps = decoded.passes, decoded.waves


class Autoregressive:
    """Text from one token by a causal model, whose trunk has the same size, with its key-value cache.

    Beyond the block the window slides, see autoregressive.generate: its later half is read anew when it is full.
    """

    def __init__(self, model, config, B, length):
        self.model, self.config, self.length = model, config, length
        self.first = torch.zeros(B, 1, dtype=torch.int64, device=config.device)
        self.passes = self.steps = length - 1

    def __call__(self, clock):
        with autocast(self.config.device, self.config.dtype), parts_timed(clock):
            autoregressive.generate(self.model, self.first, self.length, range(len(self.first)), seed=1337)


@contextlib.contextmanager
def parts_timed(clock):
    """Time of each part of a decoding, into a Clock; what one part calls of another counts for the other alone."""
    kept, inside = [], []
    for owner, method, part in ((GPT, 'forward', 'trunk'), (CachedTrunk, 'through_blocks', 'trunk'),
                                (NaiveFiller, 'fill', 'waves'), (HeadFiller, 'fill', 'waves'),
                                (HeadFiller, 'fill_from_left', 'waves'), (Writer, 'draft', 'waves'),
                                (Writer, 'check', 'checking'),
                                (HeadFiller, 'correct', 'corrections'), (NaiveFiller, 'rescore', 'remasking'),
                                (HeadFiller, 'rescore', 'remasking'), (CriticHead, 'forward', 'remasking'),
                                (decoding, 'positions_to_remask', 'remasking'), (filling, 'sample', 'sampling'),
                                (autoregressive, 'sample', 'sampling')):
        def timed(*args, plain=getattr(owner, method), part=part):    # noqa: B008 (bound now, in this round)
            before = clock.seconds.get(part, 0)
            inside.append(part)
            with clock(part):
                result = plain(*args)
            inside.pop()
            if inside:
                clock.seconds[inside[-1]] = clock.seconds.get(inside[-1], 0) - (clock.seconds[part] - before)
            return result
        kept.append((owner, method, getattr(owner, method)))
        setattr(owner, method, timed)
    try:
        yield
    finally:
        for owner, method, plain in kept:
            setattr(owner, method, plain)


def models(args, config):
    """The masked-diffusion model with its heads, and a causal one with a trunk of the same size."""
    torch.manual_seed(config.seed)
    if args.checkpoint:
        model, _, _ = load_model(args.checkpoint)
        require_generator(model, args.checkpoint)
        if model.sampler_head is None:
            raise InputError(f'{args.checkpoint!r} has no sampler head that has learned, whose decoding is to be timed')
    else:
        model_config = GPTConfig.of(config, VOCAB_SIZE)
        memory.require_for_training(config, model_config, config.device, divisor=1)
        model = GPT(model_config)
    causal = vars(model.config) | {'attention_type': 'causal', 'add_sampler_head': False, 'add_critic_head': False}
    return [m.to(config.device).eval().requires_grad_(False) for m in (model, GPT(GPTConfig(**causal)))]


def decoding_rows(args, config, model, causal):
    """{name: row} at block length; in full, also growing batches, and lengths that take several blocks."""
    T = model.config.block_size
    rows = {}

    def add(decoder, iterations, B, length=T):
        at = '' if length == T else f', length {length}'
        if decoder == 'autoregressive':
            rows[f'autoregressive, batch {B}{at}'] = Autoregressive(causal, config, B, length)
        else:
            rows[f'{decoder} {iterations}, batch {B}{at}'] = Decoding(model, config, B, length, decoder, iterations)
    for B in (1, 32):
        for decoder, iterations in (('naive', 15), ('wavefront', 15), ('naive', 4), ('wavefront', 4),
                                    ('autoregressive', 0), ('corrected', 4), ('revising', 15)):
            if not (args.quick and decoder in ('corrected', 'revising') and B > 1):    # the slowest rows
                add(decoder, iterations, B)
    if not args.quick:
        for B in (2, 4, 8, 16, 64):
            for decoder in ('naive', 'wavefront', 'autoregressive'):
                add(decoder, 15, B)
        for length in (128, 512, 1024, 2048, 4096):
            for decoder in ('naive', 'wavefront', 'autoregressive'):
                if length != T:
                    add(decoder, 15, 1, length)
        for decoder, iterations in (('naive', 15), ('wavefront', 15), ('corrected', 4), ('autoregressive', 0)):
            for B in (1, 32):
                add(decoder, iterations, B, 1024)
    return rows


# -----------------------------------------------------------------------------
# table and file

def peak_of(args, config, name):
    """Print the bytes that one row takes over what the process had before: to be run in a process of its own."""
    row = decoding_rows(args, config, *models(args, config))[name]
    before = peak_memory(config.device)
    in_turn({name: row}, 0, config.device)
    print(peak_memory(config.device) - before)


def peaks(args, settings, names):
    """{name: bytes} of rows, each in a fresh process, for the peak of a process never falls; {} where none is told."""
    if sys.platform == 'win32':
        return {}
    command = [sys.executable, os.path.abspath(__file__), '--config', args.config, *settings]
    command += ['--checkpoint', args.checkpoint] if args.checkpoint else []
    return {name: int(subprocess.run([*command, '--peak-of', name], check=True, capture_output=True, text=True).stdout)
            for name in names}


def summarize(rounds, rows, config, flops, rate):
    """{name: figures} of every row: seconds of each part, tokens per second, utilisation or steps."""
    summary = {}
    for name, seconds in rounds.items():
        figures, row = {'seconds': medians(seconds)}, rows[name]
        total = figures['seconds']['total']
        if isinstance(row, (Training, NanoGPT)):
            figures['tokens_per_second'] = config.batch_size * config.block_size / total
            figures['model_flop_utilisation'] = flops / total / rate
        else:
            figures |= {'passes': row.passes, 'steps': row.steps}
        summary[name] = figures
    return summary


def table(result):
    lines = [' · '.join(f'{k} {v}' for k, v in result['machine'].items()),
             f'{result["rounds"]} rounds after the warm-up; medians', '']
    for name, figures in result['rows'].items():
        parts = ', '.join(f'{part} {s:.3f}' for part, s in figures['seconds'].items() if part != 'total')
        line = f'{name:36} {figures["seconds"]["total"]:8.3f} s'
        if 'steps' in figures:
            line += f' {figures["passes"]:5} passes {figures["steps"]:6} steps'
        else:
            share = f'{figures["model_flop_utilisation"]:.1%} of a matrix product\'s speed'
            line += f' {figures["tokens_per_second"]:9,.0f} tokens/s, {share}'
        lines.append(f'{line}   {parts}')
    lines += ['', *(f'peak memory of {name:36} {n / 2 ** 20:8,.0f} MiB over what the process had before'
                    for name, n in result['peak_memory'].items())]
    lines += ['', *(f'{name:40} {value:7.3f}' for name, value in result['ratios'].items() if value is not None)]
    return '\n'.join(lines)


def main():
    args, config, settings = arguments()
    for out_dir in args.run or ():
        print('\n'.join(time_to_loss.table(out_dir)))
    if args.run:
        return
    if args.peak_of:
        return peak_of(args, config, args.peak_of)
    path = os.path.join(args.out_dir, 'bench.json')
    make_folder(args.out_dir)
    require_own(path, b'{\n  "machine"', 'the result')
    # 1. rows
    model, causal = models(args, config)
    rate = matmul_rate(config.device, DTYPES[config.dtype])
    result = {'machine': machine(config.device) | {'device': config.device, 'dtype': config.dtype},
              'settings': vars(config), 'checkpoint': args.checkpoint, 'rounds': args.rounds,
              'matmul_flop_per_second': rate}
    training = training_rows(args, config, model.config.vocab_size)
    trunk = sum(p.numel() for p in training['stage 1'].state.model.parts()['trunk'])
    decoders = decoding_rows(args, config, model, causal)

    # 2. time, then memory
    show = lambda name: print(f'\r{name:60}', end='', file=sys.stderr)
    rounds = in_turn(training, args.rounds, config.device, show) | in_turn(decoders, args.rounds, config.device, show)
    rounds['stage 3'] = mixed(rounds['stage 2'], rounds['step with critic'], config.critic_interval)
    show('memory')
    memory = peaks(args, settings, MEMORY if args.quick else MEMORY + FULL_MEMORY)
    show('')

    # 3. table and bench.json
    rows = training | {'stage 3': training['step with critic']} | decoders
    result['rows'] = summarize(rounds, rows, config, model_flops(config, trunk), rate)
    result['peak_memory'] = memory
    result['ratios'] = {name: ratio(rounds, *pair) for name, pair in RATIOS.items()}
    naive, wavefront = (memory.get(name) for name in MEMORY)
    result['ratios']['wavefront_over_naive_15_memory_batch32'] = wavefront / max(1, naive) if memory else None
    print('\n' + table(result))
    write_atomically(path, json.dumps(result, indent=2).encode())
    print(f'saved {path}')


if __name__ == '__main__':
    run(main)

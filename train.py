"""Trains the trunk, then the sampler head with it, then the critic head with both.

    python train.py config/train_char_diffusion_sampler.py --batch_size=32
    torchrun --standalone --nproc_per_node=4 train.py config/train_char_diffusion_sampler.py

References: nanoGPT, the shape of this file, https://github.com/karpathy/nanoGPT; Muon, https://kellerjordan.github.io/posts/muon/
"""
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import autoregressive
import checkpoint
import diffusion
import judge
from configurator import configure
from corpus import DATA_DIR, load_or_prepare
from device import autocast, pick_device, pick_dtype
from errors import InputError, run
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# defaults: masked diffusion on tiny Shakespeare by character, the trunk alone
# output
out_dir = 'out'
eval_interval = 250         # iterations between evaluations, each of which may save a checkpoint
log_interval = 10           # iterations between log lines
eval_rows = 432             # validation rows of block_size tokens in an evaluation, and a third as many training rows
eval_only = False           # evaluate once and stop
always_save_checkpoint = True    # ckpt.pt is the latest, ckpt_best.pt the best; False: ckpt.pt is the best
init_from = 'scratch'       # or 'resume': go on from out_dir/ckpt.pt
wandb_log = False           # needs pip install wandb
wandb_project = 'masked-diffusion'
wandb_run_name = 'run'
# data
dataset = 'shakespeare_char'     # a folder of data_dir
offline_dataset = 'pydoc_char'   # in its place where dataset cannot be downloaded; '' stops instead
data_dir = DATA_DIR
gradient_accumulation_steps = 1  # micro-steps for each update, shared out among the processes
batch_size = 64             # rows in a micro-step of one process
block_size = 256            # tokens in a row
# model
model_mode = 'language_model'       # or 'sequence_scorer': a judge
generator_checkpoint = ''   # of the model whose fills the judge learns to see through
attention_type = 'bidirectional'    # or 'causal': an autoregressive model
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0
# sampler head
add_sampler_head = False
start_sampler_iteration = 1000      # stage 2 begins
sampler_min_neighbors_ratio = 0.01  # share of a row that is placed first where nothing is known
sampler_context = 8         # neighbours on each side that the head sees
sampler_width = 192
sampler_rows = 64           # rows of a micro-step that the head learns from
# critic head
add_critic_head = False
start_critic_iteration = 3000       # stage 3 begins
end_critic_iteration = 5000         # the critic's weight has risen linearly from 0 to critic_alpha
critic_alpha = 1.0
critic_rows = 8             # rows of a micro-step that the decoder fills for the critic
# optimizer
freeze_trunk = False        # train the heads alone
learning_rate = 1e-3        # AdamW: embeddings and biases
muon_learning_rate = 0.02   # Muon: every other matrix
max_iters = 8000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0             # largest gradient norm of the trunk and of each head, apart; 0 is off
warmup_iters = 100
lr_decay_iters = 0          # linear decay ends here; 0 is max_iters
final_lr_ratio = 0.0        # learning rate at the end, as a share of the highest
# system
device = 'auto'             # 'cuda', 'mps', 'cpu'; auto takes the first there is
dtype = 'auto'              # 'float32', 'bfloat16', 'float16'; auto takes bfloat16 where the hardware has it
compile = True              # on CUDA alone
seed = 1337
settings = [k for k, v in globals().items() if k.islower() and not k.startswith('_') and isinstance(v, (int, float, str))]
# -----------------------------------------------------------------------------


def stage(it):
    """1: trunk alone; 2: and sampler; 3: and critic. Each begins at its start iteration."""
    if add_critic_head and it >= start_critic_iteration:
        return 3
    if add_sampler_head and it >= start_sampler_iteration:
        return 2
    return 1


def has_sampler(it):
    return add_sampler_head and stage(it) >= 2


def critic_weight(it):
    """0 up to start_critic_iteration, then linear, critic_alpha from end_critic_iteration on."""
    progress = (it - start_critic_iteration) / max(1, end_critic_iteration - start_critic_iteration)
    return critic_alpha * min(1.0, max(0.0, progress))


def lr_factor(it, begin=0):
    """Learning rate at it, as a share of the highest, of a part that begins to learn at begin.

    Linear warm-up from there, linear decay to final_lr_ratio, then constant.
    """
    end = lr_decay_iters or max_iters
    if it < begin + warmup_iters:
        return max(0, it - begin + 1) / (warmup_iters + 1)
    if it >= end:
        return final_lr_ratio
    progress = (it - begin - warmup_iters) / (end - begin - warmup_iters)
    return 1 - (1 - final_lr_ratio) * progress


def make_optimizers(model):
    """{part: [Muon, AdamW]} for the trunk and each head: nothing is shared, so no part moves another."""
    optimizers = {}
    for part, params in model.parts().items():
        # Muon orthogonalises the update of a matrix between hidden layers
        matrices = [p for p in params if p.dim() == 2 and p is not model.wte.weight and min(p.shape) > 1]
        others = [p for p in params if not any(p is m for m in matrices)]
        optimizers[part] = [torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay),
                            torch.optim.AdamW(others, lr=learning_rate, betas=(beta1, beta2), weight_decay=0.0)]
    if freeze_trunk:
        del optimizers['trunk']
    return optimizers


def check_settings():
    """InputError for settings that cannot go together."""
    if n_embd % n_head or (n_embd // n_head) % 2:
        raise InputError(f'n_embd={n_embd} with n_head={n_head}: wanted an even number of channels for each head')
    if attention_type not in ('bidirectional', 'causal'):
        raise InputError(f'attention_type={attention_type!r}, wanted bidirectional or causal')
    if (add_sampler_head or add_critic_head) and (attention_type, model_mode) != ('bidirectional', 'language_model'):
        raise InputError(f'the heads need attention_type=bidirectional and model_mode=language_model, '
                         f'found {attention_type} and {model_mode}')
    if model_mode not in ('language_model', 'sequence_scorer'):
        raise InputError(f'model_mode={model_mode!r}, wanted language_model or sequence_scorer')
    if (model_mode == 'sequence_scorer') != bool(generator_checkpoint):
        raise InputError(f'model_mode={model_mode} with generator_checkpoint={generator_checkpoint!r}: a sequence scorer needs '
                         f'the checkpoint of a generator, such as out-char-diffusion/ckpt.pt, and nothing else takes one')
    if init_from not in ('scratch', 'resume'):
        raise InputError(f'init_from={init_from!r}, wanted scratch or resume')
    for name in ('batch_size', 'block_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_rows', 'log_interval',
                 'n_layer', 'sampler_context', 'sampler_rows', 'critic_rows'):
        if globals()[name] < 1:
            raise InputError(f'{name}={globals()[name]}, wanted at least 1')
    if not 0 <= sampler_min_neighbors_ratio <= 1:
        raise InputError(f'sampler_min_neighbors_ratio={sampler_min_neighbors_ratio}, wanted 0 to 1')


def resume(args, path):
    """Checkpoint at path, checked against the model arguments of this run; heads alone may be missing in it."""
    saved = checkpoint.load(path)
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'attention_type', 'model_mode',
                 'add_sampler_head', 'sampler_context', 'sampler_width', 'add_critic_head'):
        old, new = saved['model_args'][name], args[name]
        added = name.startswith('add_') and not old
        unused = name.startswith('sampler_') and not saved['model_args']['add_sampler_head']
        if old != new and not (added or unused):
            raise InputError(f'{path!r} has {name}={old!r}, this run {new!r}; resume with the same, or use another out_dir')
    return saved


def load_generator(corpus):
    """The frozen generator of a judge's rows. InputError if it is not one for this corpus."""
    generator, _, saved = checkpoint.load_model(generator_checkpoint)
    checkpoint.want_generator(generator, generator_checkpoint)
    checkpoint.want_vocabulary(saved['corpus'], generator_checkpoint, corpus.meta)
    return generator


def open_out_dir():
    """Make out_dir and see that it can be written. InputError otherwise."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        with open(os.path.join(out_dir, 'metrics.jsonl'), 'a'):
            pass
    except OSError as error:
        raise InputError(f'cannot write out_dir {out_dir!r}: {error.strerror}') from error


def commit():
    """The commit this code is at, '' outside a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        found = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True)
    except OSError:
        return ''
    return found.stdout.strip()


def main():
    # -------------------------------------------------------------------------
    # set-up
    config = configure({k: globals()[k] for k in settings}, sys.argv[1:])
    globals().update(config)
    check_settings()
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    leads = rank == 0
    where = pick_device(device)
    if world > 1:
        if where == 'cuda':
            where = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(where)
        dist.init_process_group('nccl' if where.startswith('cuda') else 'gloo')
        if gradient_accumulation_steps % world:
            raise InputError(f'gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared by {world} processes')
    kind = pick_dtype(dtype, where)
    say = print if leads else lambda *args, **kwargs: None
    if leads:
        corpus = load_or_prepare(dataset, offline_dataset, data_dir)
    if world > 1:
        dist.barrier()    # the others read what the first has prepared
    if not leads:
        corpus = load_or_prepare(dataset, offline_dataset, data_dir)
    corpus.check(block_size)
    generator = load_generator(corpus).to(where) if generator_checkpoint else None

    # -------------------------------------------------------------------------
    # model and optimizers
    torch.manual_seed(seed)
    args = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config} | {'vocab_size': corpus.meta['vocab_size']}
    saved, first_iter, best_val_loss = None, 0, math.inf
    path = os.path.join(out_dir, 'ckpt.pt')
    if init_from == 'resume':
        saved = resume(args, path)
        checkpoint.want_vocabulary(saved['corpus'], path, corpus.meta)
        first_iter, best_val_loss = saved['iter_num'], saved['best_val_loss']
        say(f'Resuming from {path} at iteration {first_iter}')
    else:
        say('Initializing a new model from scratch')
    model = GPT(GPTConfig(**args))
    if generator and not saved and judge.start_from(model, generator):
        say("The judge starts from the generator's trunk")
    say(f'Using {attention_type} attention')
    if add_sampler_head:
        say(f'Sampler head enabled (start_iter={start_sampler_iteration})')
    if add_critic_head:
        say(f'Critic head enabled (alpha={critic_alpha})')
    counts = {part: sum(p.numel() for p in params) for part, params in model.parts().items()}
    total = sum(counts.values())
    say(f'number of parameters: {total / 1e6:.2f} M ('
        + ', '.join(f'{part} {n:,}, {n / total:.1%}' for part, n in counts.items()) + ')')
    begins = {'trunk': 0, 'sampler': start_sampler_iteration, 'critic': start_critic_iteration}
    if saved:
        fresh = [head for head in ('sampler', 'critic') if head in counts and not saved['model_args'][f'add_{head}_head']]
        model.load_state_dict(saved['model'], strict=not fresh)
        for head in fresh:
            say(f'{path} has no {head} head: a fresh one is added')
            begins[head] = max(begins[head], first_iter)
        begins |= {part: begin for part, begin in saved['begins'].items() if part not in fresh}
    if leads:
        open_out_dir()
    model.to(where)
    optimizers = make_optimizers(model)
    for part, states in (saved['optimizer'] if saved else {}).items():
        for optimizer, state in zip(optimizers.get(part, []), states):
            optimizer.load_state_dict(state)
    for p in model.parts()['trunk'] if freeze_trunk else []:
        p.requires_grad_(False)
    trunk = torch.compile(model) if compile and where.startswith('cuda') else model
    scaler = torch.amp.GradScaler(where.split(':')[0], enabled=kind == 'float16')
    micro_steps = gradient_accumulation_steps // world
    tokens = gradient_accumulation_steps * batch_size * block_size
    say(f'{corpus.meta["name"]}: {corpus.meta["train_tokens"]:,} training tokens; {tokens:,} tokens per iteration, '
        f'{max_iters:,} iterations; {where}, {kind}, {world} process{"es" if world > 1 else ""}, seed {seed}')
    say('settings: ' + ' '.join(f'{k}={v}' for k, v in config.items()))
    if wandb_log and leads:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name, config=config)

    def report(entry):
        with open(os.path.join(out_dir, 'metrics.jsonl'), 'a') as f:
            f.write(json.dumps(entry) + '\n')
        if wandb_log:
            wandb.log(entry, step=entry['iter'])

    def batch_losses(it, micro):
        """Losses of one micro-step, {'main': ..., 'sampler': ..., 'critic': ...}; its randomness is its place's own."""
        rng = np.random.default_rng([seed, it, micro, rank])
        x0 = torch.from_numpy(corpus.random_rows('train', batch_size, block_size + causal, rng)).to(where, non_blocking=True)
        torch.manual_seed(int(rng.integers(2 ** 62)))    # of dropout and masks
        if generator:
            return {'main': judge.loss(trunk, model, *judge.make_rows(generator, x0, rng))}
        if causal:
            return {'main': autoregressive.nll(trunk, model, x0).mean()}
        xt, mask = diffusion.mask_tokens(x0, diffusion.bell(diffusion.spread_ratios(batch_size, device=where)), model.mask_id)
        batch = diffusion.read(trunk, model, x0, xt, mask)
        heads = diffusion.head_losses(model, batch, seed, it, sampler_rows if has_sampler(it) else 0,
                                      critic_rows if stage(it) == 3 else 0, use_sampler=add_sampler_head)
        return {'main': F.cross_entropy(batch.lm_logits, batch.targets)} | heads

    @torch.no_grad()
    def evaluate(it):
        """Likelihood and head losses on fixed rows of both splits, printed; returns the validation figure in nats per token."""
        model.eval()
        for split, n in (('train', eval_rows // 3), ('val', eval_rows)):
            rows = torch.from_numpy(corpus.spread_rows(split, n, block_size + causal)).to(where)
            with autocast(where, kind):
                if generator:
                    result = judge.validate(model, generator, rows, batch_size, np.random.default_rng(seed))
                elif causal:
                    result = autoregressive.validate(model, rows, batch_size)
                else:
                    result = diffusion.validate(model, rows, batch_size, seed, has_sampler(it), stage(it) == 3)
            if not generator:
                result['bits_per_character'] = result[yardstick] / math.log(2) / corpus.chars_per_token
            extra = [f'{result["bits_per_character"]:.4f} bits per character'] if not generator else []
            others = [f'{name.replace("_", " ")} {result[name]:.4f}'
                      for name in ('main', 'sampler', 'critic', 'critic_auc', 'rank_correlation') if name in result]
            say(f'iter {it}: {split} {", ".join([f"{title} {result[yardstick]:.4f} nats per token", *extra])}'
                + (f' ({", ".join(others)})' if others else ''))
            report({'iter': it, 'split': split} | result)
        model.train()
        return result[yardstick]

    # -------------------------------------------------------------------------
    # the loop
    causal = attention_type == 'causal'
    yardstick, title = ('loss', 'loss') if generator else ('nll', 'NLL') if causal else ('nelbo', 'NELBO')
    model.train()
    announced, clock, since = 0, time.time(), first_iter
    for it in range(first_iter, max_iters + 1):
        # 1. learning rate and stage
        for part, group in optimizers.items():
            for optimizer, lr in zip(group, (muon_learning_rate, learning_rate)):
                optimizer.param_groups[0]['lr'] = lr * lr_factor(it, begins[part])
        if stage(it) != announced:
            announced = stage(it)
            say(f'stage {announced}: ' + ('main model' if announced == 1 else 'main model + sampler' if announced == 2
                else 'main model + sampler + critic' if add_sampler_head else 'main model + critic'))

        # 2. evaluate and save
        if leads and (it % eval_interval == 0 or it == max_iters):
            val_loss = evaluate(it)
            better = val_loss < best_val_loss
            best_val_loss = min(val_loss, best_val_loss)
            state = {'model_args': asdict(model.config), 'model': model.state_dict(),
                     'optimizer': {part: [o.state_dict() for o in group] for part, group in optimizers.items()},
                     'begins': begins, 'iter_num': it, 'best_val_loss': best_val_loss, 'config': config, 'corpus': corpus.meta, 'commit': commit()}
            if it > first_iter and not eval_only:
                if always_save_checkpoint or better:
                    checkpoint.save(path, state)
                    say(f'saved {path}')
                if always_save_checkpoint and better:
                    checkpoint.save(os.path.join(out_dir, 'ckpt_best.pt'), state)
            clock, since = time.time(), it
        if eval_only or it == max_iters:
            break

        # 3. micro-steps
        sums = {}
        for micro in range(micro_steps):
            with autocast(where, kind):
                losses = batch_losses(it, micro)
            weights = {'main': float(not freeze_trunk), 'sampler': 1.0, 'critic': critic_weight(it)}
            losses = {name: losses[name] for name in weights if name in losses}
            loss = sum(weights[name] * value for name, value in losses.items()) / micro_steps
            if loss.requires_grad:
                scaler.scale(loss).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / micro_steps

        # 4. update: each part is averaged over processes, clipped and stepped by itself
        for part, params in model.parts().items():
            params = [p for p in params if p.grad is not None]
            if not params:
                continue
            if world > 1:
                flat = torch.cat([p.grad.flatten() for p in params])
                dist.all_reduce(flat)
                for p, grad in zip(params, (flat / world).split([p.numel() for p in params])):
                    p.grad.copy_(grad.view_as(p))
            for optimizer in optimizers[part]:
                scaler.unscale_(optimizer)
            if grad_clip:
                torch.nn.utils.clip_grad_norm_(params, grad_clip)
            for optimizer in optimizers[part]:
                scaler.step(optimizer)
                optimizer.zero_grad()
        scaler.update()

        # 5. log
        if it % log_interval == 0 and leads:
            values = {name: value.item() for name, value in sums.items()}    # sync point
            total = sum(weights[name] * value for name, value in values.items())
            ms = (time.time() - clock) * 1000 / (it + 1 - since)
            say(f'iter {it}: loss {total:.4f} ({", ".join(f"{k} {v:.4f}" for k, v in values.items())}), time {ms:.2f}ms, '
                f'{tokens / ms * 1000:,.0f} tokens/s')
            report({'iter': it, 'loss': total, 'ms': ms} | values)
            clock, since = time.time(), it + 1
    if world > 1:
        dist.barrier()    # the first may still be saving, and gloo aborts when its peers leave
        dist.destroy_process_group()


if __name__ == '__main__':
    run(main)

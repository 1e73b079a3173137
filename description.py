"""What a training run prints first: parameters, data, how the global batch is made, settings."""
from device import bfloat16_speedup
from schedules import begins_to_learn


def describe_run(config, corpus, state, micro_steps, divisor, world):
    """What a run with this train.State is, in the lines that it prints first."""
    counts = {part: sum(p.numel() for p in params) for part, params in state.model.parts().items()}
    total, sequences = sum(counts.values()), config.batch_size * config.gradient_accumulation_steps
    shares = ', '.join(f'{part} {n:,}, {n / total:.1%}' for part, n in counts.items())
    plural = lambda n, word: f'{n} {word}' + ('es' if word == 'process' else 's') * (n > 1)
    speedup = f', where bfloat16 is {bfloat16_speedup():.1f} times as fast as float32' \
        if config.device.startswith('cpu') else ''
    first = {head: begins_to_learn(head, state.start_iter[head], config.critic_interval) for head in counts
             if head != 'trunk'}
    notes = [f'note: the {head} head learns from iteration {it} on, which max_iters={config.max_iters} does not reach'
             for head, it in first.items() if it >= config.max_iters and not config.eval_only]
    lines = [
        f'Using {config.attention_type} attention',
        config.add_sampler_head and f'Sampler head enabled (start_iter={state.start_iter["sampler"]})',
        config.add_critic_head and f'Critic head enabled (alpha={config.critic_alpha})',
        *notes,
        f'number of parameters: {total / 1e6:.2f} M ({shares})',
        f'{corpus.meta["name"]}: {corpus.meta["train_tokens"]:,} training tokens, {config.max_iters:,} iterations of '
        f'{sequences * config.block_size:,} tokens',
        f'global batch: {sequences} sequences = {plural(world, "process")} x '
        f'{plural(micro_steps, "micro-step")} x {config.batch_size // divisor} sequences',
        config.shard and f'weights, gradients and moments: divided among {plural(world, "process")}',
        f'{config.dtype} on {config.device}{speedup}; seed {config.seed}',
        'settings: ' + ' '.join(f'{k}={v}' for k, v in vars(config).items())]
    return '\n'.join(filter(None, lines))

"""docs/troubleshooting.md: every message that it quotes is what the program says."""
import os
import re

import pytest
import torch

import corpus
from conftest import NO_HEADS, ROOT, TINY

with open(os.path.join(ROOT, 'docs', 'troubleshooting.md'), encoding='utf-8') as f:
    PAGE = f.read()
QUOTED = [line for block in re.findall(r'```text\n(.*?)```', PAGE, re.S) for line in block.splitlines()] \
    + re.findall(r'^\| `(.*?)` \|', PAGE, re.M)


@pytest.fixture
def said(script, train, toy_data, trained, half, tmp_path):
    """said[message]() -> what a program prints in the case that the page tells of."""
    def call(*args):
        return ''.join(map(str, script(*args)))

    def tiny(*args):
        return call('train.py', *TINY, f'--data_dir={toy_data}', *args)

    def without_heads():
        train(tmp_path / 'plain', *NO_HEADS, '--max_iters=4')
        return tiny(f'--out_dir={tmp_path / "plain"}', '--init_from=resume', '--max_iters=5',
                    '--add_critic_head=False')

    def without_network():
        def unreachable(url, path, sha256, timeout=10):
            raise corpus.DownloadError('no network')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus, 'download', unreachable)
            return call('train.py', *TINY, '--dataset=shakespeare_char', f'--data_dir={tmp_path}', '--max_iters=1',
                        f'--out_dir={tmp_path / "manual"}', '--n_layer=1', '--eval_rows=3', *NO_HEADS)

    sample = ['sample_simple.py', '--out-dir', trained]
    return {
        'the heads need attention_type=bidirectional and model_mode=language_model':
            lambda: tiny(f'--out_dir={tmp_path / "x"}', '--attention_type=causal'),
        'has no sampler head: a fresh one is added': without_heads,
        'stage 1: main model': lambda: tiny(f'--out_dir={tmp_path / "x"}', '--max_iters=4', '--add_critic_head=False'),
        'stage 2: main model + sampler': lambda: tiny(f'--out_dir={tmp_path / "y"}', '--max_iters=4',
                                                       '--add_critic_head=False'),
        'no checkpoint': lambda: call('sample_simple.py', '--out-dir', tmp_path / 'nowhere'),
        'exists and a new run would replace it': lambda: tiny(f'--out_dir={trained}'),
        'leaves nothing to train': lambda: tiny(f'--out_dir={half}', '--init_from=resume', '--max_iters=6'),
        'is not in the vocabulary': lambda: call(*sample, '--seed-text', 'XYZ'),
        'has no blank': lambda: call(*sample, '--template', 'the cat'),
        'unknown setting': lambda: tiny('--learning_rat=1'),
        'NO NETWORK': without_network}


@pytest.mark.parametrize('message', QUOTED)
def test_what_the_page_quotes_is_what_is_said(said, message):
    assert message in said[message]()


def test_the_heads_begin_near_the_main_loss(trained_once):
    """The sampler head starts as the trunk's own prediction."""
    main, sampler = map(float, re.search(r'iter 3: loss \S+ \(main (\S+), sampler (\S+), blocks',
                                         trained_once[1]).groups())
    assert abs(main - sampler) < 0.5 * main


def test_a_checkpoint_says_whether_it_has_a_sampler_head(trained_once, monkeypatch, capsys, tmp_path):
    """The page's lines."""
    code = re.search(r'```python\n(.*?)```', PAGE, re.S)[1]
    os.symlink(trained_once[0], tmp_path / 'out-char-diffusion')
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == 'True True\n'
    assert torch.load(trained_once[0] / 'ckpt.pt', weights_only=False)['model_args'].get('start_sampler_iteration') == 3

"""Every command in README and docs: its flags are known, and it runs (slow: a tiny model in place of the page's)."""
import glob
import os
import re
import shlex
import shutil
import string

import pytest

import corpus
from conftest import ROOT, TINY, run_script
from flags import parser_of

PAGES = ['README.md', *sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, 'docs', '*.md')))]
PROGRAMS = ('python', 'torchrun', 'make', 'pip')
PARSERS = {}


def commands_of(page):
    """The commands of a page, each a list of words: lines of fenced sh blocks, and lines that are indented."""
    with open(os.path.join(ROOT, page), encoding='utf-8') as f:
        text = f.read()
    blocks = re.findall(r'```sh\n(.*?)```', text, re.S) + re.findall(r'(?:^ {4}.*\n)+', text, re.M)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    parts = [part for line in lines if line.split() and line.split()[0] in PROGRAMS for part in line.split('&&')]
    return [shlex.split(part, comments=True) for part in parts]


def script_of(command):
    """(script, its arguments) of a command that runs one, else None; several processes are as good as one here."""
    at = next((i for i, word in enumerate(command) if word.endswith('.py')), None)
    return None if at is None else (command[at], command[at + 1:])


def test_there_are_commands():
    assert sum(map(len, map(commands_of, PAGES))) > 30
    assert ['make', 'demo'] in commands_of('README.md')


@pytest.mark.parametrize('page', PAGES)
def test_every_flag_is_known(page):
    from configurator import configure
    from train import settings
    for command in commands_of(page):
        if script_of(command) is None:
            if command[0] == 'make':
                with open(os.path.join(ROOT, 'Makefile')) as f:
                    assert f'\n{command[1]}:' in f.read()
            else:
                assert command[:3] == ['pip', 'install', '-r'] and os.path.exists(os.path.join(ROOT, command[3]))
            continue
        script, args = script_of(command)
        assert os.path.exists(os.path.join(ROOT, script)), command
        if script == 'train.py':
            configure(settings, [os.path.join(ROOT, a) if a.startswith('config/') else a for a in args])
        elif script != 'flags.py':
            if script not in PARSERS:
                PARSERS[script] = parser_of(os.path.join(ROOT, script))
            PARSERS[script].parse_args(args)


# -----------------------------------------------------------------------------
# run

SMALL = [flag for flag in TINY[1:] if not flag.startswith('--dataset')]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder in which the commands run: configs, texts, corpora under the names of real ones, tiny models."""
    import tiktoken
    encoding = tiktoken.Encoding('bytes', pat_str=r'.|\n', special_tokens={},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(corpus, 'gpt2_encoding', lambda: encoding)
    monkeypatch.setattr(corpus, 'BPE_SIZE', 300)
    monkeypatch.setattr(encoding, 'decode', lambda ids: ''.join(chr(i) if i < 128 else '?' for i in ids))
    text = f'To be or not to be: {string.ascii_letters}, {string.digits}.\n' * 40
    shutil.copytree(os.path.join(ROOT, 'config'), tmp_path / 'config')
    (tmp_path / 'my.txt').write_text(text)
    (tmp_path / 'letters').mkdir()
    (tmp_path / 'letters' / 'a.md').write_text(text)
    for name in ('shakespeare_char', 'my_corpus'):
        corpus.prepare_text(name, text, 'test', data_dir=str(tmp_path / 'data'))
    for config in ('train_char_diffusion_sampler', 'train_char_ar'):
        run_here(tmp_path, 'train.py', [f'config/{config}.py'])
    for name in ('out-my-corpus', 'out-1337'):
        shutil.copytree(tmp_path / 'out-char-diffusion', tmp_path / name)
    return tmp_path


def run_here(folder, script, args):
    """Run a script with flags that make it quick; it must succeed."""
    if script == 'train.py':
        more = [*SMALL, f'--data_dir={folder / "data"}']
        more += ['--max_iters=14'] if '--init_from=resume' in args else ['--overwrite=True']
    elif script.endswith('prepare.py'):
        more = ['--data-dir', folder / 'data']
    elif script == 'sample_simple.py':
        more = ['--iterations', 2, '--num-samples', 2, '--no-progress']
        more += ['--sequence-length', 64] if '--sequence-length' in args else []
    elif script == 'evaluate.py':
        more = ['--passes', 2, '--data-dir', folder / 'data', '--overwrite']
        more += [] if '--likelihood' in args else ['--num-samples', 2, '--temperatures', 1]
    elif script == 'bench.py':
        if '--nanogpt' in args:    # which is not here
            args = args[:args.index('--nanogpt')] + args[args.index('--nanogpt') + 2:]
        more = ['--rounds', 1, '--quick', *SMALL]
    else:
        more = []
    status, out, err = run_script(script, *args, *more, cwd=folder)
    assert status == 0, (script, args, err)
    return out


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if commands_of(page)])
def test_every_command_runs(workspace, page):
    for command in commands_of(page):
        if script_of(command) and script_of(command)[0] != 'flags.py':
            script, args = script_of(command)
            if '--init_from=resume' in args:    # each from the model as it was
                shutil.copy(workspace / 'out-1337' / 'ckpt.pt', workspace / 'out-char-diffusion' / 'ckpt.pt')
            run_here(workspace, script, args)

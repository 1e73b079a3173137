"""Commands in README, docs and pretrained/README.md: their flags are known, and they run (slow: on a tiny model).

Those of torchrun run as one process, and bench.py without nanoGPT, which is not here; make and pip do not run: their
targets and files are there.
"""
import glob
import os
import re
import shlex
import shutil
import string
import subprocess

import pytest

import corpus
from conftest import ROOT, TINY, run_script
from flags import parser_of

PAGES = ['README.md', 'pretrained/README.md',
         *sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, 'docs', '*.md')))]
PROGRAMS = ('python', 'torchrun', 'make', 'pip')
PARSERS = {}


def commands_of(page):
    """The commands of a page, each a list of words: in fenced sh blocks, in lines that are indented, within a line."""
    with open(os.path.join(ROOT, page), encoding='utf-8') as f:
        text = f.read()
    blocks = re.findall(r'```sh\n(.*?)```', text, re.S) + re.findall(r'(?:^ {4}.*\n)+', text, re.M)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    prose = re.sub(r'```.*?```', '', text, flags=re.S)
    lines += [' '.join(found.split()) for found in re.findall(rf'`((?:{"|".join(PROGRAMS)})\s[^`]+)`', prose)]
    parts = [part for line in lines if line.split() and line.split()[0] in PROGRAMS for part in line.split('&&')]
    return [shlex.split(part, comments=True) for part in parts]


def script_of(command):
    """(script, its arguments) of a command that runs one, else None; several processes are as good as one here."""
    at = next((i for i, word in enumerate(command) if word.endswith('.py')), None)
    return None if at is None else (command[at], command[at + 1:])


def test_there_are_commands():
    assert sum(map(len, map(commands_of, PAGES))) > 30
    assert ['make', 'demo'] in commands_of('README.md') and ['make', 'test-all'] in commands_of('README.md')
    assert ['python', 'plot.py', 'out-char-diffusion'] in commands_of('docs/troubleshooting.md')    # within a line
    (several,) = [command for command in commands_of('README.md') if command[0] == 'torchrun']
    assert script_of(several) == ('train.py', ['config/train_char_diffusion_sampler.py'])


def test_what_the_commands_write_is_ignored_by_git():
    """decoding.svg, a.json and others lay about as untracked files."""
    if not os.path.exists(os.path.join(ROOT, '.git')) or not shutil.which('git'):
        pytest.skip('no git checkout')
    written = {'bench.json'}
    for words in (command for page in PAGES for command in commands_of(page) if script_of(command)):
        for flag, value in zip(words, words[1:]):
            makes_it = flag == '--out-dir' and 'sample_simple.py' not in words
            written |= {value} if flag in ('--save', '-o') else {f'{value}/x'} if makes_it else set()
        written |= {f'{word.partition("=")[2]}/x' for word in words if word.startswith('--out_dir=')}
        written |= {words[-1]} if 'export.py' in words else set()
        written |= {words[words.index(flag) + 1] for flag in words if flag.endswith('prepare.py')}
    assert {'a.json', 'compare.html', 'decoding.svg', 'my_model.pt', 'my.txt', 'letters'} <= written
    for name in sorted(written):
        path = os.path.join(name, 'x') if name == 'letters' else name
        done = subprocess.run(['git', 'check-ignore', '-q', '--no-index', path], cwd=ROOT)
        assert done.returncode == 0, f'{name} is not in .gitignore'


def test_no_page_has_a_gap_to_be_filled():
    """Results with a mark in place of a table were committed once."""
    for page in PAGES:
        with open(os.path.join(ROOT, page), encoding='utf-8') as f:
            assert '@@' not in f.read(), page


def test_no_line_of_prose_is_longer_than_120_characters():
    """Tables and lines that are one command may be."""
    for page in PAGES:
        with open(os.path.join(ROOT, page), encoding='utf-8') as f:
            long = [line for line in f.read().splitlines() if len(line) > 120 and not line.startswith(('|', '    '))]
        assert not long, (page, long)
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        assert len(f.read().splitlines()) <= 120


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
                assert command[:3] == ['pip', 'install', '-r'] and os.path.exists(os.path.join(ROOT, *command[3:]))
            continue
        script, args = script_of(command)
        assert os.path.exists(os.path.join(ROOT, script)), command
        if args == ['--help']:
            continue
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
    for name in ('my', 'russian'):
        (tmp_path / f'{name}.txt').write_text(text)
    (tmp_path / 'letters').mkdir()
    (tmp_path / 'letters' / 'a.md').write_text(text)
    for name in ('shakespeare_char', 'my_corpus'):
        corpus.prepare_text(name, text, 'test', data_dir=str(tmp_path / 'data'))
    for config in ('train_char_diffusion_sampler', 'train_char_ar'):
        run_here(tmp_path, 'train.py', [f'config/{config}.py'])
    for name in ('out-my-corpus', 'out-1337'):
        shutil.copytree(tmp_path / 'out-char-diffusion', tmp_path / name)
    (tmp_path / 'pretrained').mkdir()
    shutil.copy(tmp_path / 'out-char-diffusion' / 'ckpt.pt', tmp_path / 'pretrained' / 'tiny_shakespeare.pt')
    return tmp_path


def run_here(folder, script, args):
    """Run a script with flags that make it quick; it must succeed."""
    if script == 'train.py':
        more = [*SMALL, f'--data_dir={folder / "data"}']
        more += ['--max_iters=14'] if '--init_from=resume' in args else ['--overwrite=True']
        more += ['--start_sampler_iteration=0'] if 'config/fit_sampler.py' in args else []
    elif script.endswith('prepare.py'):
        more = ['--data-dir', folder / 'data']
    elif script == 'sample_simple.py':
        more = ['--iterations', 2, '--num-samples', 2, '--no-progress']
        more += ['--sequence-length', 64] if '--sequence-length' in args else []
    elif script == 'evaluate.py':
        more = ['--data-dir', folder / 'data']
        more += [] if '--gaps' in args else ['--passes', 3]    # the fewest that every decoder takes
        more += [] if {'--gaps', '--likelihood'} & set(args) else ['--num-samples', 2, '--temperatures', 1]
    elif script == 'bench.py':
        if '--nanogpt' in args:    # which is not here
            args = args[:args.index('--nanogpt')] + args[args.index('--nanogpt') + 2:]
        more = [] if '--run' in args else ['--rounds', 1, '--quick', *SMALL]
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

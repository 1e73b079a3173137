"""Writes docs/flags.md, every flag and setting of every script, from the code that reads them.

    python flags.py
"""
import environment    # before torch

import argparse
import importlib.util
import os
import re

from files import write_atomically
from errors import run

ROOT = os.path.dirname(os.path.abspath(__file__))
PAGE = os.path.join(ROOT, 'docs', 'flags.md')
SCRIPTS = ('sample_simple.py', 'evaluate.py', 'bench.py', 'view.py', 'plot.py', 'export.py',
           'data/text_char/prepare.py')
INTRO = '''# Flags and settings

Every setting of `train.py` and every flag of the other scripts, with its default and what it does. Written by
`python flags.py` from the code; do not edit it by hand.
'''


def settings_tables(path):
    """Markdown for the defaults at the top of train.py: one table for each group, from its assignments and comments."""
    with open(path, encoding='utf-8') as f:
        block = f.read().split('# defaults', 1)[1].split('\nsettings = ', 1)[0]
    lines = []
    for line in block.split('\n')[1:]:
        setting = re.fullmatch(r'(\w+) = (.*?)(?:\s+# (.*))?', line)
        if setting:
            name, default, meaning = setting.groups()
            lines.append(row(f'--{name}', '`data/`' if default == 'DATA_DIR' else f'`{default}`', meaning or ''))
        elif line.startswith('# ') and not line.startswith('# --'):
            lines += ['', f'### {line[2:]}', '', *header('setting')]
    return lines[1:]


def header(first):
    return [f'| {first} | default | meaning |', '|---|---|---|']


def row(name, default, meaning):
    """A line of a table; a bar would end the cell."""
    return f'| `{name}` | {default} | {meaning} |'.replace('||', '\\|\\|')


def parser_of(path):
    """The ArgumentParser of a script, which runs nothing else."""
    spec = importlib.util.spec_from_file_location('script', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parser()


def parser_tables(parser):
    """Markdown for the flags of a parser: one table for each group that has any."""
    lines = []
    for group in parser._action_groups:    # argparse offers no other way to ask for them
        actions = [a for a in group._group_actions
                   if not isinstance(a, argparse._HelpAction) and a.help is not argparse.SUPPRESS]
        if actions:
            titles = {'options': 'flags', 'positional arguments': 'files'}
            lines += [f'### {titles.get(group.title, group.title)}', '', *header('flag')]
            lines += [action_row(action) for action in actions] + ['']
    return lines


def action_row(action):
    name = ', '.join(action.option_strings) or (action.metavar or action.dest)
    values = '{' + ','.join(map(str, action.choices)) + '}' if action.choices else ''
    plain = action.default in (None, False, '', argparse.SUPPRESS)
    meaning = action.help % {'default': action.default, 'prog': ''}
    said = re.search(r'(?:^| )\(default( [^:()]*)?: ([^()]*)\)', meaning)    # in the help's own words
    default = 'off' if action.nargs == 0 else '-' if plain else f'`{action.default}`'
    if said:
        words = said[2] if ' ' in said[2] else f'`{said[2]}`'
        default = f'{said[1].strip()}: {words}' if said[1] else words
        meaning = meaning.replace(said[0], '')
    if os.path.isabs(str(action.default)):
        default = '`data/` beside the script'
    return row(name + (f' {values}' if values else ''), default, meaning)


def page():
    """The whole of docs/flags.md."""
    lines = [INTRO, '## train.py', '', 'A config file and the command line set the same names; a later one wins:', '',
             '    python train.py config/train_char_diffusion_sampler.py --batch_size=32', '',
             *settings_tables(os.path.join(ROOT, 'train.py'))]
    for script in SCRIPTS:
        parser = parser_of(os.path.join(ROOT, script))
        lines += ['', f'## {script}', '', f'{parser.description.rstrip(".")}.', '', *parser_tables(parser)]
    return re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).rstrip() + '\n'


def main():
    argparse.ArgumentParser(description=__doc__.split('\n')[0]).parse_args()
    write_atomically(PAGE, page().encode())
    print(f'saved {os.path.relpath(PAGE)}')


if __name__ == '__main__':
    run(main)

"""docs/flags.md: current, and it has every flag."""
from conftest import ROOT
from flags import PAGE, SCRIPTS, page, parser_of, row


def test_the_page_is_current():
    with open(PAGE, encoding='utf-8') as f:
        assert f.read() == page(), 'run python flags.py'


def test_it_has_every_flag_and_setting():
    with open(PAGE, encoding='utf-8') as f:
        text = f.read()
    flags = [flag for script in SCRIPTS for flag, action in parser_of(f'{ROOT}/{script}')._option_string_actions.items()
             if action.help != '==SUPPRESS==']
    assert len(flags) > 60 and all(f'`{flag}' in text or f', {flag}' in text for flag in flags if 'help' not in flag
                                   and flag != '-h')
    for setting in ('out_dir', 'sampler_min_neighbors_ratio', 'critic_alpha', 'seed', 'trunk_checkpoint'):
        assert f'| `--{setting}` |' in text


def test_every_flag_has_a_default_and_a_meaning():
    """Cells were blank, out_dir's and those of Weights & Biases among them."""
    with open(PAGE, encoding='utf-8') as f:
        rows = [[cell.strip() for cell in line.strip('|\n').replace('\\|', '').split('|')] for line in f
                if line.startswith('| `')]
    assert len(rows) > 90 and not [row for row in rows if len(row) != 3 or not all(row)]


def test_the_rows_of_a_table():
    assert row('--a', '`1`', 'what it does') == '| `--a` | `1` | what it does |'

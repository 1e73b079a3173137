"""One rule for config files and the command line: unknown names and other types stop the run and name the setting."""
import pytest

from configurator import checked, configure
from errors import InputError

DEFAULTS = {'n_layer': 6, 'learning_rate': 1e-3, 'compile': True, 'dataset': 'shakespeare_char'}


def test_file_then_command_line(tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('import math\n_half = 0.5\nn_layer = 2\nlearning_rate = 1\n')
    config = configure(DEFAULTS, ['--n_layer=3', str(file), '--compile=False', '--dataset=123'])
    assert config == {'n_layer': 3, 'learning_rate': 1.0, 'compile': False, 'dataset': '123'}
    assert type(config['learning_rate']) is float and DEFAULTS['n_layer'] == 6


@pytest.mark.parametrize('line, message', [
    ('n_layers = 2', "unknown setting 'n_layers'.*'n_layer'"), ('n_layer = 2.0', "'n_layer'.*2.0.*int"),
    ('n_layer = True', "'n_layer'.*True.*int"), ('compile = 1', "'compile'.*bool"), ('dataset = 3', "'dataset'.*str"),
    ('n_layer = ', 'does not run'), ('import sys\nsys.exit(0)', 'does not run.*SystemExit'),
    ('n_layer = 10 ** 5000', "'n_layer'.*more than 64 bits"), ('learning_rate = 10 ** 400', 'more than 64 bits')])
def test_bad_file(tmp_path, line, message):
    file = tmp_path / 'c.py'
    file.write_text(line)
    with pytest.raises(InputError, match=message):
        configure(DEFAULTS, [str(file)])


@pytest.mark.parametrize('flag, message', [
    ('--n_layers=2', "'n_layers'.*'n_layer'"), ('--n_layer=two', "'n_layer'.*int"),
    ('--compile=yes', "'compile'.*bool"), ('--n_layer', 'key=value'), ('-n_layer=2', 'key=value'),
    ('nowhere.py', 'no config file')])
def test_bad_command_line(flag, message):
    with pytest.raises(InputError, match=message):
        configure(DEFAULTS, [flag])


def test_a_name_that_is_none_is_named():
    """A checkpoint's arguments may have any keys; this one was a traceback."""
    with pytest.raises(InputError, match='unknown setting 3 in a file'):
        checked(DEFAULTS, 3, 1, 'a file')


@pytest.mark.parametrize('flags, message', [
    (['--n_head=3'], 'n_embd=32 with n_head=3'), (['--attention_type=sideways'], "attention_type='sideways'"),
    (['--init_from=gpt2'], "init_from='gpt2'"), (['--attention_type=causal'], 'heads need attention_type=bidirec'),
    (['--add_sampler_head=False', '--add_critic_head=False', '--freeze_trunk=True'], 'freeze_trunk=True without'),
    (['--generator_checkpoint=x.pt'], 'generator_checkpoint'), (['--batch_size=0'], 'batch_size=0'),
    (['--sampler_min_neighbors_ratio=2'], 'sampler_min_neighbors_ratio=2'), (['--block_size=100000'], '100000')])
def test_settings_that_cannot_go_together(refused, tmp_path, flags, message):
    assert message in refused(tmp_path, *flags) and not list(tmp_path.iterdir())

"""plot.py: what it reads from metrics.jsonl, what it draws, and what it refuses."""
import json
import math

import numpy as np
import pytest

from errors import InputError
from metrics_log import of_run
from plot import borders, curve, draw, panels_of, plt, smooth


def entries(sampler=20, critic=40, last=60, **more):
    """A run whose heads begin at these iterations, with a log line every 10 and an evaluation every 30."""
    result = []
    for it in range(0, last + 1, 10):
        heads = ({'sampler': 2.0} if it >= sampler else {}) | ({'critic': 0.7} if it >= critic else {})
        if it % 30 == 0:
            result += [{'iter': it, 'split': split, 'nelbo': 3 - it / 60, 'main': 9.0} | heads
                       for split in ('train', 'val')]
        result.append({'iter': it, 'loss': 3.0, 'ms': 5.0, 'main': 2.5 - it / 100} | heads | more)
    return result


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def lines(axis):
    """Curves of a panel, without the borders."""
    return [line for line in axis.lines if len(line.get_xdata()) > 2]


@pytest.fixture
def drawn():
    """drawn({name: entries}) -> figure, closed afterwards."""
    yield lambda runs, only=None: draw(runs, panels_of(runs, only))
    plt.close('all')


def test_batches_and_splits_are_kept_apart():
    run = entries()
    assert curve(run, 'main')[1].tolist() == [2.5 - it / 100 for it in range(0, 61, 10)]
    assert [part.tolist() for part in curve(run, 'nelbo', 'val')] == [[0, 30, 60], [3.0, 2.5, 2.0]]
    assert curve(run, 'main', 'train')[1].tolist() == [9.0] * 3


def test_borders_are_where_a_loss_first_appears():
    assert borders(entries()) == {'sampler': 20, 'critic': 40}
    assert borders(entries(critic=math.inf)) == {'sampler': 20} and borders(entries(math.inf, math.inf)) == {}


def test_smoothing_is_a_mean_over_neighbours():
    values = np.array([3.0, 0, 0, 6, 0])
    assert smooth(values, 3).tolist() == [1.5, 1.0, 2.0, 2.0, 3.0] and smooth(values, 1).tolist() == values.tolist()


def test_every_panel_has_every_run(drawn):
    figure = drawn({'a': entries(learning_rate=0.1), 'b': entries(30)})
    assert titles(figure) == ['main loss, nats', 'sampler loss, nats', 'critic loss, nats',
                              'NELBO (autoregressive: NLL), nats per token', 'learning rate',
                              'milliseconds per iteration']
    assert [len(lines(axis)) for axis in figure.axes] == [2, 2, 2, 4, 1, 2]
    assert lines(figure.axes[3])[0].get_ydata().tolist() == [3.0, 2.5, 2.0]
    begun = [line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert sorted(begun) == [20, 30, 40, 40]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ['a', 'b', 'evaluated on val', 'evaluated on train', 'sampler begins', 'critic begins']


def test_panels_are_chosen_by_the_names_of_their_figures(drawn):
    runs = {'a': entries(), 'b': [{'iter': 0, 'split': 'val', 'nll': 2.0}]}
    assert titles(drawn(runs, 'nll,ms')) == ['NELBO (autoregressive: NLL), nats per token',
                                             'milliseconds per iteration']
    with pytest.raises(InputError, match="no figure 'one_pass_nll' in these runs; wanted some of main,"):
        drawn(runs, 'nelbo,one_pass_nll')


def test_a_panel_shows_the_figure_that_was_asked_for(drawn):
    """A run's bound was drawn where its likelihood was asked for, which it does not have."""
    runs = {'a': entries(), 'b': [{'iter': it, 'split': 'val', 'nll': 2.0} for it in (0, 10, 20)]}
    (axis,) = drawn(runs, 'nll').axes
    assert len(lines(axis)) == 1
    with pytest.raises(InputError, match="no figure 'nll' in these runs"):
        drawn({'a': entries()}, 'nll')


def test_a_name_is_no_formula(drawn, tmp_path):
    drawn({'cost$a_$': entries()}).savefig(tmp_path / 'x.svg')


def test_a_judges_validation_is_drawn_and_a_run_without_figures_is_refused(drawn):
    judge = [{'iter': it, 'split': 'val', 'loss': 0.7, 'rank_correlation': 0.5} for it in (0, 30)]
    assert titles(drawn({'a': judge})) == ["judge's loss, nats", "judge's rank correlation"]
    with pytest.raises(InputError, match='no figures that plot.py draws'):
        drawn({'a': [{'iter': 0, 'loss': 1.0}]})


def test_what_came_before_training_does_not_flatten_what_it_taught(drawn):
    run = [{'iter': it, 'split': 'val', 'nelbo': value} for it, value in ((0, 9.0), (30, 3.0), (60, 2.0))]
    low, high = drawn({'a': run}).axes[0].get_ylim()
    assert 1.8 < low < 2 and 3 < high < 3.2
    assert drawn({'a': run[:1]}).axes[0].get_ylim()[1] > 9, 'it is all there is'
    both = drawn({'a': run, 'b': [run[0] | {'nelbo': 5.0}]}).axes[0].get_ylim()
    assert both[0] < 2 and 5 < both[1] < 6, 'and all there is of b'
    assert drawn({'a': [*run, run[-1] | {'iter': 90, 'nelbo': math.nan}]}).axes[0].get_ylim() == (low, high)


def test_what_evaluations_tell_of_the_heads_and_the_loss_of_blocks(drawn):
    run = [entry | ({'one_pass_nll': 1.5, 'critic_auc': 0.7} if 'split' in entry and entry['iter'] > 20 else
                    {} if 'split' in entry else {'blocks': 1.0}) for entry in entries(last=90)]
    axes = {axis.get_title(): axis for axis in drawn({'a': run}).axes}
    assert list(axes)[:2] == ['main loss, nats', 'loss of blocks, nats'] and len(axes) == 8
    for title, value in (('NLL of one pass with the head, nats per token', 1.5), ("critic's area under ROC", 0.7)):
        assert [line.get_ydata().tolist() for line in lines(axes[title])] == [[value] * 3] * 2    # val and train
    assert lines(axes['loss of blocks, nats'])[0].get_ydata().tolist() == [1.0] * 10


def test_a_model_without_heads_beside_an_autoregressive_one(drawn):
    plain = entries(math.inf, math.inf)
    causal = [{'nll' if k == 'nelbo' else k: v for k, v in entry.items()} for entry in plain]
    figure = drawn({'a': plain, 'b': causal})
    assert len(titles(figure)) == 3 and len(lines(figure.axes[1])) == 4
    assert not any('begins' in text.get_text() for text in figure.legends[0].get_texts())


def test_a_run_that_stopped_where_the_sampler_begins(drawn):
    stopped = [entry for entry in entries(30, last=30) if entry['iter'] < 30 or 'split' in entry]
    assert [len(lines(axis)) for axis in drawn({'a': entries(), 'b': stopped}).axes][1] == 1


def test_a_real_run_as_png_and_svg(script, trained, tmp_path):
    status, out, err = script('plot.py', trained, trained / 'metrics.jsonl', '-o', tmp_path / 'c.png')
    assert status == 0 and err == '' and 'c.svg' in out
    assert (tmp_path / 'c.png').read_bytes()[:4] == b'\x89PNG' and b'<svg' in (tmp_path / 'c.svg').read_bytes()
    assert borders(of_run(str(trained))) == {'sampler': 3, 'critic': 6}


def test_a_torn_line_and_a_figure_that_is_no_number_are_left_out(tmp_path, drawn):
    text = ''.join(json.dumps(entry) + '\n' for entry in entries(last=90))
    (tmp_path / 'metrics.jsonl').write_text(text.replace('"ms": 5.0', '"ms": NaN', 1) + '{"iter": 99, "lo')
    run = of_run(str(tmp_path))
    assert run[-1]['iter'] == 90
    assert drawn({'a': run}).axes[-1].get_ylim()[1] == pytest.approx(6)


@pytest.mark.parametrize('content, message', [
    (None, "no '"), ('', 'no figures'), ('{"torn', 'no figures'), ('[1]\n', 'no figures'),
    ('{"loss": 1}\n', 'no figures'),
    ('{"iter": "x"}\n', 'no figures'), ('{"iter": 1, "main": "x"}\n', 'other than figures'),
    ('{"iter": 1, "main": 1e999}\n', 'other than figures'), ('{"iter": 1, "main": null}\n', 'no figures'),
    (b'\xff\xfe\x00', 'no figures')])
def test_bad_files_are_one_line(script, tmp_path, content, message):
    if content is not None:
        (tmp_path / 'metrics.jsonl').write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, err = script('plot.py', tmp_path, '-o', tmp_path / 'c')
    assert status == 2 and err.count('\n') == 1 and message in err and 'train.py' in err, err


def test_a_folder_that_is_not_there_is_one_line(script, trained, tmp_path):
    for args, message in (([tmp_path / 'no'], 'wanted the out_dir'),
                          ([trained, '-o', tmp_path / 'no' / 'c'], 'cannot write')):
        status, _, err = script('plot.py', *args)
        assert status == 2 and err.count('\n') == 1 and message in err, err

"""What evaluate.py measures: decoders, each with the schedules, noises and temperatures that it is given."""
import math
from dataclasses import dataclass

from decoding import DecoderConfig, linear_ratios
from errors import InputError
from plans import ANY_PASSES


@dataclass(frozen=True)
class Recipe:
    """A decoder and the choices it is given: each gets its best schedule, noise and temperature."""
    config: dict                      # fields of DecoderConfig
    fewest: int = 2                   # forward passes: with one, several decoders are the same
    most: int = 64                    # forward passes, unless more are asked for
    schedules: tuple = ('even',)      # or plans; the first is that of --quick
    noises: tuple = (0.0,)            # strengths of the noise on the order, likewise


RECIPES = {
    # without the sampler head
    'naive-random': Recipe(dict(use_sampler=False, order='random'), fewest=1),             # ancestral, MDLM's
    'naive-confidence': Recipe(dict(use_sampler=False, order='confidence', revise=False),  # MaskGIT's
                               schedules=('cosine', '0.95-0.05'), noises=(6.0, 2.0)),
    'naive-margin': Recipe(dict(use_sampler=False, order='margin', revise=False),          # top-probability margin
                           schedules=('even', 'cosine'), noises=(0.0, 2.0)),
    'naive-remdm': Recipe(dict(use_sampler=False, order='random'), fewest=3,               # ReMDM's, capped
                          schedules=('cap-0.04', 'cap-0.01', 'cap-0.2')),
    'naive-remask': Recipe(dict(use_sampler=False, order='confidence', revise=True),       # kept tokens compete too
                           schedules=('0.4-0.01', '0.95-0.05'), noises=(2.0, 6.0)),
    'naive-planned': Recipe(dict(use_sampler=False), schedules=('interleaved',)),
    # with it
    'wavefront': Recipe(dict(order='confidence'), 1, 16, ('0.7-0.05',), (2.0,)),
    'wavefront-planned': Recipe({}, 2, 16, ('interleaved', 'blocks', 'spans')),
    'speculative': Recipe({}, schedules=('speculative',)),
    'left-to-right': Recipe(dict(plan='left-to-right', order='critic'), 1, 16, ('0.7-0.05',), (2.0, 4.0, 0.0)),
    'wavefront-critic': Recipe(dict(order='critic'), 2, 16, ('0.7-0.05',), (2.0, 4.0, 0.0)),
    'wavefront-corrected': Recipe(dict(order='critic', corrections=8), 1, 16, ('0.7-0.1',), (2.0,)),
}
BASELINE = 'ar_baseline'    # the evaluator's own samples; a forward pass for each token
PASSES = (1, 4, 8, 16, 64)
TEMPERATURES = (0.7, 0.85, 1.0, 1.2, 1.4)
QUICK = {'decoders': ('naive-planned', 'naive-remask', 'left-to-right', 'speculative', 'wavefront-critic'),
         'passes': (1, 4, 16), 'temperatures': (0.8, 1.0, 1.2)}


@dataclass(frozen=True)
class Setting:
    decoder: str           # a name in RECIPES, or BASELINE
    passes: int
    schedule: str
    noise: float
    temperature: float

    @property
    def curve(self):
        """Name of the curve over temperature that this setting lies on."""
        noise = f', noise {self.noise:g}' if self.noise else ''
        return f'{self.decoder}, {self.passes} passes' + (f', {self.schedule}{noise}' if self.schedule else '')

    @property
    def key(self):
        return f'{self.curve}, temperature {self.temperature:g}'

    def decoder_config(self, seed):
        if self.schedule in ANY_PASSES:
            passes = dict(plan=self.schedule, plan_passes=self.passes, mask_ratios=())
        else:
            passes = dict(mask_ratios=tuple(mask_ratios(self.schedule, self.passes)))
        if self.schedule.startswith('cap-'):
            passes['remask_kept'] = float(self.schedule.removeprefix('cap-'))
        return DecoderConfig(temperature=self.temperature, randomness_strength=self.noise, seed=seed, **passes,
                             **RECIPES[self.decoder].config)


def mask_ratios(schedule, passes):
    """Share remasked after each pass but the last.

    'even' fills as many positions in each pass, and so does 'cap-0.04', with a share of the kept ones remasked;
    'cosine' is MaskGIT's, '0.7-0.1' falls linearly from one to the other.
    """
    if schedule == 'even' or schedule.startswith('cap-'):
        return [1 - (i + 1) / passes for i in range(passes - 1)]
    if schedule == 'cosine':
        return [math.cos(math.pi / 2 * (i + 1) / passes) for i in range(passes - 1)]
    start, end = map(float, schedule.split('-'))
    return linear_ratios(passes, start, end)


def list_settings(decoders, passes, temperatures, length, quick=False, named=True):
    """Every setting that differs from the others in what it does, the baseline's first.

    passes: () for those of PASSES that a recipe wants. A decoder that wants more is left out; InputError where it was
    named, or where none is left.
    """
    curves = [(BASELINE, length - 1, '', 0.0)]
    for name in decoders:
        recipe = RECIPES[name]
        chosen = [n for n in passes or PASSES if recipe.fewest <= n and (passes or n <= recipe.most)]
        if not chosen and named:
            raise InputError(f'--passes {joined(passes)} leaves {name} nothing to do, wanted {recipe.fewest} or more')
        for n in chosen:
            schedules, noises = (recipe.schedules, recipe.noises) if n > 1 else (('even',), (0.0,))
            first = 1 if quick else None
            curves += [(name, n, schedule, noise) for schedule in schedules[:first] for noise in noises[:first]]
    if decoders and len(curves) == 1:
        raise InputError(f'--passes {joined(passes)} leaves the decoders of this model nothing to do, wanted more')
    return [Setting(*curve, temperature) for curve in curves for temperature in temperatures]


def joined(values):
    return ','.join(f'{value:g}' for value in values)

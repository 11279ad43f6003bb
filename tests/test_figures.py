"""Every figure and table of the index is drawn and told from its numbers alone, here small ones made by hand."""
import copy, dataclasses, io, json

import pytest
import torch

from pixart_delta_nb.evidence.attributes import COLUMNS, ROWS
from pixart_delta_nb.evidence.drawing import pack_images, unpack_images
from pixart_delta_nb.evidence.fig3 import run_fig3
from pixart_delta_nb.evidence.fig7 import run_fig7
from pixart_delta_nb.evidence.figures import FIGURES, figure
from pixart_delta_nb.evidence.figured import stored
from pixart_delta_nb.evidence.kit import Method, tiny_kit
from pixart_delta_nb.evidence.table1 import REPORT_SETTINGS
from pixart_delta_nb.evidence.table2 import REPORT_SECONDS


def row(accuracy, **more):
    "A graded row, as of `kit.grade`."
    distances = {'frechet': 1., 'frechet_imagenet': 100*(1 - accuracy), 'clip': 50*accuracy}
    bands = {'accuracy': [accuracy - .02, accuracy + .02], 'frechet': None, 'clip': None,
             'frechet_imagenet': [100*(.9 - accuracy), 100*(1.1 - accuracy)]}
    return {'accuracy': accuracy, 'intervals': bands, **distances} | more


def attribute_table(less):
    "Seen or unseen pairs of `run_attributes`, `less` below the best."
    rows = {name: .9 - .01*i - less for i, name in enumerate(ROWS)}
    return rows | {'all': .9 - less, 'interval': [.88 - less, .92 - less], 'whole picture': .5}


def strip(*columns, rows=2):
    "A stored grid of noise."
    images = torch.rand(rows, len(columns), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {'captions': ['a', 'b'][:rows], 'columns': list(columns), 'sheet': pack_images(images)}


PARTS = {'text': .01, 'transformer': .5, 'decode': .1, 'overhead': .02}
SCORES = [{'captions': told, 'method': m, 'fidelity': .7, 'accuracy': .9} for told in ('full', 'none') for m in ('student 4', 'teacher 14')]
RUNS = [(batch, seed) for batch, seeds in ((4, (0, 1)), (64, (0,))) for seed in seeds]
FOUND = {
    '2': {'rows': [row(.4 + .1*i/15 + .05*k + .01*s + .001*b, variant=v, batch=b, seed=s, iteration=i, steps=n)
                   for k, v in enumerate(('ω embedded', 'ω = 4.5')) for b, s in RUNS for n in (1, 4) for i in (0, 15)]},
    '3': run_fig3(None),
    '5': {'rows': [{'run': f'{name}, N = 7', 'seed': s, 'final': SCORES} for name in ('Transformer', 'UNet') for s in (0, 1)],
          'floor': SCORES, 'ceiling': {'fidelity': .9}},
    '6': strip('edges', '0', '20') | {'values': [[.2, .3], [.3, .8], [.8, .8]], 'marks': [0, 10, 20], 'ceiling': [.9, .9]},
    '7': strip('teacher\n14', 'student\n4', 'student\n1'),
    '8': strip('0', '10', '20'),
    '12': strip('edges', '0', '20') | {'scores': [{'fidelity': .5}, {'fidelity': .8}]},
    'table1': {'rows': [*REPORT_SETTINGS, {'model': 'here', 'pairs': 9, 'pixels': 128, 'batch': 8, 'memory': '1 GB'}],
               'memory': {'before': 2**29, 'peak': 2**30}, 'parameters': 8_000_000},
    'table2': {'report': REPORT_SECONDS, 'speed': {
        'batch': 2, 'evaluation_ratio': 7., 'denoising_ratio': 6.1, 'end_to_end_ratio': 4.2, 'methods': {
            'teacher 14': PARTS | {'whole': 4., 'evaluations': 28.}, 'student 4': PARTS | {'whole': 1., 'evaluations': 4.}}}},
    'schedule': strip('right', 'wrong', 'none') | {'steps': 120, 'settings': {'batch_size': 24}, 'rows': [
        row(.9, distilled='linear', sampled='linear', spread=2.),
        row(.7, distilled='scaled linear', sampled='scaled linear', spread=1.),
        row(.8, distilled='neither', sampled='linear', spread=2.)]},
    'peers': {'rows': [row(a, solver=s, network=n, steps=e, evaluations=e) for s, n, a, e in (
        ('DDIM', 'teacher', .5, 8), ('DDIM', 'teacher', .8, 28), ('UniPC', 'teacher', .7, 8), ('student', 'student', .7, 4), ('student', 'student', .6, 1))]},
    'lora': {'images': 64, 'adapter': {'rank': 8}, 'rows': [row(a, network=n, steps=k, evaluations=k) for n, k, a in (
        ('student', 4, .9), ('student', 1, .8), ('LoRA', 4, .8), ('LoRA', 1, .9))]},
    'omega': {'rows': [row(a, scale=s, network='teacher', evaluations=28) for s, a in ((1., .5), (4.5, .8), (5.5, .79))]},
    'attributes': {'tables': {name: dict(zip(COLUMNS, map(attribute_table, (0., drop, .02))))
                              for name, drop in (('teacher 14', .01), ('student 4', .1))}},
    'control': {'tolerances': [1], 'rows': [
        row(.8, method='student 4', captions=told, scale=s, fidelity_1=.5 + .3*s, interval_1=[.4 + .3*s, .6 + .3*s], closed_1=.8*s, ceiling_1=.9)
        for told in ('full', 'none') for s in (0., 1.)]},
    'control-cost': {'rows': [{'num_copies': n, 'measured': 1 + .07*n, 'predicted': 1 + .08*n, 'parameters': n*10**6} for n in (1, 7)]},
    'benchmarks': {'batch': 8, 'floor': {'floor_seconds': 1., 'ratio': 1.1}, 'step_ratio': 1.27,
                   'step': {n: {'seconds': s, 'before': 1, 'peak': 2**30} for n, s in (('here', 1.1), ('usual', 1.4))},
                   'sampling': [{'network': 'student', 'steps': n, 'ratio': 1.1, 'apart': 1e-5} for n in (1, 4)]}}


def tell(name, found=None): return figure(name).tell(FOUND[name] if found is None else found)


@pytest.mark.parametrize('name', FOUND)            # dial, conditional, calibration and decoders have tests of their own
def test_every_figure_is_drawn_and_told_from_its_numbers_alone(name):
    found = json.loads(json.dumps(FOUND[name]))
    before, file = copy.deepcopy(found), io.BytesIO()
    figure(name).draw(found).savefig(file, format='png')
    assert len(file.getvalue()) > 5000 and figure(name).tell(found).endswith('.') and found == before


@pytest.mark.parametrize('name', FIGURES)
def test_the_stored_run_of_every_figure_still_tells(name):
    found = stored(figure(name).run.__module__.split('.')[-1].replace('_', '-'))
    if found is None: pytest.skip('has not been made yet')
    assert found['figure'] == name and tell(name, found).endswith('.')


@pytest.mark.parametrize('name, words', [
    ('lora', 'rank 8. 4 steps: accuracy 0.800 with the adapter, 0.900 with the full student; Fréchet distance 1.00 (judge) and 2.00 (ImageNet) times'),
    ('lora', '1 step: accuracy 0.900'),
    ('schedule', 'Distilled on the scaled linear, sampled on the scaled linear: accuracy 0.700'), ('schedule', 'spread 0.50'), ('schedule', 'Distilled on neither'),
    ('peers', "is 0.7, at 4 evaluations; the teacher reaches it with UniPC at 8. Fréchet distance, ImageNet: the student's best is 30, at 4"),
    ('attributes', 'teacher 14: 0.900 of the attributes of seen pairs are right (whole pictures 0.500); 0.890 for unseen pairs, which the intervals do not tell from it'),
    ('attributes', '(weakest there is light with 0.770, whole'), ('attributes', '0.880 for phrasing that training never showed'),
    ('attributes', '0.800 for unseen pairs, which the intervals tell from it'),
    ('3', 'PixArt at the start, Stable Diffusion, LCM at the end'),
    ('omega', 's = 4.5 (ω = 3.5)'), ('omega', 's = 5.5 may be'), ('benchmarks', '1.27 times as long'),
    ('2', 'Batch 4, 1 step: 44.1 with ω = 4.5 is the smallest, 95 % interval over seeds [37.7, 50.5], which that of ω embedded overlaps. '),
    ('2', 'Batch 64, 4 steps: 38.6 with ω = 4.5 is the smallest; one seed'),
    ('control', 'student 4, captions: F 0.500 to 0.800 at 1 px (80% of the gap), accuracy 0.800 to 0.800, Fréchet (ImageNet) 20.0 to 20.0'),
    ('12', '0: 0.50, 20: 0.80.')])
def test_sentences_follow_the_numbers(name, words): assert words in tell(name)


def test_a_student_that_no_solver_reaches_is_said_to_be_out_of_reach():
    rows = [r | {'accuracy': .99} if r['network'] == 'student' else r for r in FOUND['peers']['rows']]
    assert 'no solver' in tell('peers', {'rows': rows})


def test_fig2_counts_the_statements_of_the_report():
    assert tell('2').endswith('ends lower in 4 of 4 cases; in the report it helps. A fixed ω ends lower than the embedded one in 4 of 4; in the report it does.')
    worse = [r | {'frechet_imagenet': 99.} if r['batch'] == 64 and r['variant'] == 'ω = 4.5' else r for r in FOUND['2']['rows']]
    assert 'lower in 2 of 4 cases' in tell('2', {'rows': worse}) and 'embedded one in 2 of 4' in tell('2', {'rows': worse})
    alone = [r for r in FOUND['2']['rows'] if r['batch'] == 4 and r['variant'] == 'ω = 4.5']
    assert 'report' not in tell('2', {'rows': alone})


def test_fig2_overlap_is_that_of_two_intervals_and_not_of_a_mean():
    rows = [r | {'frechet_imagenet': r['frechet_imagenet'] + 40*r['seed']*(r['variant'] == 'ω embedded')} for r in FOUND['2']['rows']]
    told = tell('2', {'rows': rows})                    # the means of ω embedded leave the bands of ω = 4.5, its own bands do not
    assert told.count('which that of ω embedded overlaps') == 2 and 'apart from the others' not in told


def test_fig2_shows_bands_only_over_several_seeds():
    axes = figure('2').draw(FOUND['2']).axes            # a row a number of steps; Fréchet for batch 4 and 64, then CLIP
    assert [len(ax.collections) for ax in axes] == [2, 0, 2, 0]*2 and [len(ax.lines) for ax in axes] == [2]*8


def test_panels_leave_out_scores_that_were_not_measured():
    rows = [{k: v for k, v in r.items() if k not in ('clip', 'frechet_imagenet')} for r in FOUND['omega']['rows']]
    assert len(figure('omega').draw({'rows': rows}).axes) == 1


def test_pictures_survive_their_text_to_a_byte():
    images = torch.rand(2, 3, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    back = unpack_images(pack_images(images), 2, 3)
    assert back.shape == images.shape and (back - images).abs().max() <= .5/255 + 1e-6


def test_fig7_shows_the_lora_only_if_there_is_one():
    kit, few = tiny_kit(), (Method('student', 1),)
    assert run_fig7(kit, 2, few)['columns'] == ['student\n1']
    assert run_fig7(dataclasses.replace(kit, lora=kit.student), 2, few)['columns'] == ['student\n1', 'LoRA\n4', 'LoRA\n2']

"""Directions that the prose of the evidence states, held to the numbers in results/."""
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def stored(name):
    "The numbers of a figure; the test is skipped where it has not been measured."
    path = ROOT/f'results/{name}.json'
    if not path.is_file(): pytest.skip(f'results/{name}.json has not been made')
    return json.loads(path.read_text(encoding='utf-8'))


def says(notebook, words):
    "Whether the prose of a notebook holds these words."
    cells = json.loads((ROOT/f'nbs/evidence/{notebook}.ipynb').read_text(encoding='utf-8'))['cells']
    return words in ' '.join(' '.join(''.join(c['source']).split()) for c in cells if c['cell_type'] == 'markdown')


def test_distillation_pays_in_texture_at_every_level_of_detail():
    assert says('dial', 'So distillation always pays in texture')
    assert all(g['intervals']['texture'][0] > 1 for g in stored('dial')['gains'])


def test_no_undistilled_sampler_keeps_more_than_the_bound_from_two_evaluations_on():
    assert says('dial', '0.71 of its amplitude')
    rows = [r for r in stored('dial')['rows'] if r['network'] == 'undistilled' and r['steps'] > 1]
    assert rows and all(r['texture'] < .5**.5 for r in rows)


def test_one_evaluation_fails_less_with_the_student():
    assert says('fig7', 'though less than the network that it was made from')
    assert all(g['intervals']['frechet'][0] > 0 for g in stored('dial')['gains'] if g['steps'] == 1)


RUNS = [('fig2', 'ω = 2'), ('fig2', 'ω embedded'), ('fig2-48', 'ω = 2')]


def curve(name, variant, steps, score):
    "A score of one run of Figure 2: iteration -> value."
    rows = [r for r in stored(name)['rows'] if (r['variant'], r['steps']) == (variant, steps)]
    return {r['iteration']: r[score] for r in sorted(rows, key=lambda r: r['iteration'])}


@pytest.mark.parametrize('name, variant, steps', [(*run, 4) for run in RUNS] + [(*RUNS[0], 1), (*RUNS[2], 1)])
def test_distilling_adds_texture_mark_by_mark(name, variant, steps):
    assert says('fig8', 'Along a row texture and edges come in')
    found = list(curve(name, variant, steps, 'texture').values())
    assert len(found) > 2 and found == sorted(found)


def test_one_step_gets_worse_before_it_gets_better_in_small_batches_alone():
    assert says('fig2', 'With one step small batches first make it worse') and says('fig2', 'In batches of 48 there is no such hump')
    small, large = (curve(name, 'ω = 2', 1, 'frechet_imagenet') for name in ('fig2', 'fig2-48'))
    assert small[300] > 1.1*small[0] > small[0] > small[1000]
    assert max(large.values()) == large[0]


@pytest.mark.parametrize('name', ['fig2', 'fig2-48'])
def test_four_steps_gain_most_within_three_hundred_iterations(name):
    assert says('fig2', 'most of their work within 300 iterations')
    found = curve(name, 'ω = 2', 4, 'frechet_imagenet')
    assert found[0] - found[300] > .5*(found[0] - min(found.values()))


def test_distillation_does_what_no_solver_does():
    assert says('peers', 'So distillation does what no solver does')
    rows = stored('peers')['rows']
    own, others = ([r['accuracy'] for r in rows if r['evaluations'] <= 4 and (r['network'] == 'student') is student] for student in (True, False))
    assert max(own) > max(others) + .1


def test_solvers_meet_above_the_student():
    assert says('peers', "what separates the student's best from that height is its own error")
    rows = stored('peers')['rows']
    last = max(r['evaluations'] for r in rows)
    best = max(r['accuracy'] for r in rows if r['network'] == 'student')
    assert all(r['accuracy'] > best for r in rows if r['evaluations'] == last)


def test_words_alone_reach_about_what_another_render_of_the_caption_does():
    assert says('control', 'The crosses lie low even with captions')
    found = stored('control')
    off = [r['fidelity_1'] for r in found['rows'] if r['scale'] == 0 and r['captions'] == 'full']
    on = [r['closed_1'] for r in found['rows'] if r['scale'] == 1]
    assert all(abs(v - found['redrawn']['fidelity']) < .1 for v in off) and min(on) > .5


def test_the_students_scale_can_be_defended():
    assert says('omega', 'none of the other scores speaks for a larger one')
    found = stored('omega')
    rows, chosen = found['rows'], next(r for r in found['rows'] if r['scale'] == found['chosen'])
    best = max(rows, key=lambda r: r['accuracy'])
    assert chosen['intervals']['accuracy'][1] >= best['intervals']['accuracy'][0]
    assert min(rows, key=lambda r: r['frechet_imagenet'])['scale'] <= chosen['scale'] >= max(rows, key=lambda r: r['clip'])['scale']


def test_two_wrong_tables_cancel_in_part():
    assert says('schedule', 'So two wrongs may partly cancel')
    spread = {(r['distilled'], r['sampled']): r['spread'] for r in stored('schedule')['rows']}
    off = {pair: abs(value/spread['linear', 'linear'] - 1) for pair, value in spread.items()}
    assert spread['linear', 'scaled linear'] < spread['linear', 'linear'] < spread['scaled linear', 'linear']
    assert off['scaled linear', 'scaled linear'] < min(off['linear', 'scaled linear'], off['scaled linear', 'linear'])


def test_the_students_texture_lies_with_the_teachers():
    assert says('results', "the student's marks lie with the teacher's")
    rows = {r['method']: r['texture'] for r in stored('reproduce/results')['quality']}
    assert all(abs(rows[f'student {n}'] - rows['teacher 14']) < .1 for n in (8, 4, 2))
    assert all(rows[f'undistilled {n}'] < rows['teacher 14'] - .3 for n in (8, 4, 2))

"""What must be reached, judged from stored results alone: what is missing is never met, and luck does not count."""
import json

import pytest

from pixart_delta_nb.evidence.targets import Mark, at_least, at_most, marks_of, tell_marks


def quality(method, texture, distance, accuracy=.97, half=.02):
    bands = {'texture': [texture - half, texture + half], 'frechet_imagenet': [distance*(1 - half), distance*(1 + half)]}
    return {'method': method, 'texture': texture, 'frechet_imagenet': distance, 'intervals': bands,
            'accuracy': {'overall': accuracy, 'interval': [accuracy - half, accuracy + half]}}


TABLE = [quality('teacher 14', .95, 20.), quality('student 4', .94, 20.), quality('student 2', .92, 23.), quality('student 1', .8, 50.),
         quality('undistilled 4', .6, 40.), quality('undistilled 2', .5, 60.), quality('undistilled 1', .4, 90.)]


@pytest.fixture
def folder(tmp_path):
    for name, found in (('evaluate', {'quality': TABLE}), ('reproduce', {'quality': [], 'provenance': {'wall_seconds': 420.}, 'speed': [
            {'batch': 1}, {'batch': 16, 'denoising_ratio': 6.8, 'tiny_ratio': 5.9}]})):
        (tmp_path/name).mkdir()
        (tmp_path/name/'results.json').write_text(json.dumps(found))
    return tmp_path


def by_name(folder): return {m.what: m for m in marks_of(folder)}


def test_nothing_is_met_where_nothing_was_measured(tmp_path):
    marks = marks_of(tmp_path)
    assert len(marks) >= 25 and {(m.measured, m.met) for m in marks} == {('', None)}
    assert tell_marks(marks).endswith(f'0 met, 0 missed, {len(marks)} missing')


def test_the_large_run_counts_for_quality_and_the_other_for_speed(folder):
    marks = by_name(folder)
    assert marks['texture energy, student 4'].met and marks['texture energy, student 4'].measured == '0.94 [0.92, 0.96]'
    assert marks['Fréchet (ImageNet), student 4 / undistilled 4, intervals apart'] == Mark(
        'Fréchet (ImageNet), student 4 / undistilled 4, intervals apart', '≤ 0.8', '0.50', True)
    assert marks['faster denoising'].met and not marks['faster end to end, with the small decoder'].met
    assert marks['minutes of reproduce'].measured == '7.0' and marks['number of things right there'].met is None


def test_a_ratio_that_could_be_luck_is_missed(folder):
    wide = [quality(r['method'], r['texture'], r['frechet_imagenet'], half=.6) for r in TABLE]
    (folder/'evaluate'/'results.json').write_text(json.dumps({'quality': wide}))
    marks = by_name(folder)
    assert not marks['Fréchet (ImageNet), student 4 / undistilled 4, intervals apart'].met
    assert marks['Fréchet (ImageNet), student 4 / teacher 14'].met                # which asks for no more than the ratio


def test_curves_must_improve_with_intervals_apart(folder):
    def row(few, i, f, c, size=96): return {'steps': few, 'iteration': i, 'batch': size, 'variant': 'ω = 2', 'seed': 0, 'frechet_imagenet': f, 'clip': c,
                                            'intervals': {'frechet_imagenet': [f - 5, f + 5], 'clip': [c - 1, c + 1]}}
    rows = [row(4, 0, 60., 20.), row(4, 300, 40., 25.), row(1, 0, 90., 10.), row(1, 300, 120., 9.), row(4, 3000, 30., 26.), row(1, 3000, 115., 14.)]
    (folder/'fig2.json').write_text(json.dumps({'rows': rows}))
    marks = by_name(folder)
    assert marks['Fig. 2, 4 steps, Fréchet from iteration 0 on'].met and marks['Fig. 2, 4 steps, CLIP score from iteration 0 on'].met
    late = marks['Fig. 2, 1 step, Fréchet from iteration 300 on']
    assert late.met is False and late.measured == '120.0 to 115.0, intervals overlap'
    assert marks['Fig. 2, 1 step, CLIP score from iteration 300 on'].met


def test_marks_from_below_and_above():
    assert at_least('a', 1., 1.).met and at_most('a', 1., 1.).met and not at_least('a', .99, 1.).met and not at_most('a', 1.01, 1.).met

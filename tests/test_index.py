"""The index of figures, the grades that they share, and the page: found by name, measured once, drawn from stored numbers."""
import dataclasses, json, subprocess, sys

import pytest
import torch

from pixart_delta_nb.evidence import fig3, fig8, figures, omega, report, results
from pixart_delta_nb.evidence.distances import frechet_distance
from pixart_delta_nb.evidence.figures import FIGURES
from pixart_delta_nb.evidence.figured import Figured
from pixart_delta_nb.evidence.kit import exam, grade, tiny_kit
from pixart_delta_nb.world.recipes import scene_data


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def kit(): return tiny_kit()


def test_every_name_of_the_index_is_a_figure_with_a_run_a_drawing_and_a_sentence():
    for name in FIGURES:
        entry = figures.figure(name)
        assert isinstance(entry, Figured) and entry.title and entry.evaluations >= 0
        assert all(callable(part) for part in (entry.run, entry.draw, entry.tell))
    assert len({figures.stored_name(name) for name in FIGURES}) == len(FIGURES)


def test_a_name_imports_its_own_module_and_no_other_figure():
    code = ('import sys; from pixart_delta_nb.evidence.figures import FIGURES, figure; figure("3"); '
            'print([m for m in FIGURES.values() if "pixart_delta_nb.evidence." + m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == "['fig3']", done.stderr


def test_other_names_are_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match='one of 2, 3, 5, 6, 7, 8'): figures.reproduce_figure('9', tmp_path)


def test_the_estimate_follows_the_number_of_evaluations(kit):
    assert figures.estimate('peers', kit) > figures.estimate('7', kit) > figures.estimate('3', kit) == 0


def settings(kit, tmp_path):
    return dict(kit=kit, run=tmp_path/'run', data=scene_data(kit.teacher, 2), marks=(0, 1), captions=1, steps=1, batch_size=1)


def test_reproduce_measures_once_and_again_from_scratch(kit, tmp_path, capsys):
    few = settings(kit, tmp_path)
    figures.reproduce_figure('8', tmp_path/'out', **few)
    stamp = (tmp_path/'run'/'000001'/'config.json').stat().st_mtime_ns
    figures.reproduce_figure('8', tmp_path/'out', **few)
    assert (tmp_path/'run'/'000001'/'config.json').stat().st_mtime_ns == stamp
    figures.reproduce_figure('8', tmp_path/'out', from_scratch=True, **few)
    assert (tmp_path/'run'/'000001'/'config.json').stat().st_mtime_ns > stamp
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['fig8.json', 'fig8.webp']
    assert 'minutes at the default settings' in capsys.readouterr().out and not (tmp_path/'run'/'unfinished').exists()


def test_from_scratch_goes_on_with_a_run_that_was_cut_off(kit, tmp_path, monkeypatch):
    few = settings(kit, tmp_path)
    monkeypatch.setattr(fig8, 'decode', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): figures.reproduce_figure('8', tmp_path/'out', from_scratch=True, **few)
    stamp = (tmp_path/'run'/'000000'/'config.json').stat().st_mtime_ns
    monkeypatch.undo()
    figures.reproduce_figure('8', tmp_path/'out', from_scratch=True, **few)
    assert (tmp_path/'run'/'000000'/'config.json').stat().st_mtime_ns == stamp and (tmp_path/'out'/'fig8.json').is_file()


def test_provenance_is_the_command_line_where_nothing_was_set(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, 'open_kit', lambda device: kit)
    small = lambda kit, images=2: omega.run_omega(kit, images=images, scales=(1., 4.5), steps=1)
    monkeypatch.setattr(omega, 'FIGURE', dataclasses.replace(omega.FIGURE, run=small))
    made = [figures.reproduce_figure('omega', tmp_path, from_scratch=True, **more)['provenance']['command']
            for more in ({}, {'images': 3}, {'device': 'cuda'})]
    command = 'pixart-delta reproduce --figure omega --from-scratch'
    assert made == [command, 'run_omega(kit)', f'{command} --device cuda']


def test_every_network_of_a_kit_follows_it_to_a_device(kit):
    class Part:
        model = property(lambda self: self)
        def to(self, device): moved.append((self, device))
    moved, parts = [], {f.name: Part() for f in dataclasses.fields(kit)}
    assert (whole := dataclasses.replace(kit, **parts)).to('cuda') is whole
    assert {(id(part), device) for part, device in moved} == {(id(part), 'cuda') for part in parts.values()}


def test_a_figure_drawn_again_from_the_same_numbers_is_the_same_file(tmp_path):
    (tmp_path/'fig3.json').write_text(json.dumps(fig3.run_fig3(None)))
    made = []
    for _ in range(2):
        figures.reproduce_figure('3', tmp_path)
        made.append((tmp_path/'fig3.svg').read_bytes())
    assert made[0] == made[1]


# grades ---------------------------------------------------------------------------------------------------------
def test_grade_has_every_score_of_the_kit_and_an_interval_around_it(kit):
    flat = torch.nn.Flatten()
    full = dataclasses.replace(kit, features=flat, inception=flat)
    paper = exam(16)
    fake = paper['real'].flip(0)*.9
    found = grade(full, fake, paper)
    spaces = {'frechet', 'frechet_imagenet', 'kernel_imagenet', 'frechet_inception', 'kernel_inception'}
    assert spaces | {'accuracy', 'log_likelihood', 'count', 'precision', 'recall', 'texture', 'intervals'} <= set(found)
    assert set(found['intervals']) == set(found) - {'intervals'}
    assert all(found['intervals'][k][0] < found[k] < found['intervals'][k][1] for k in spaces)
    assert found['frechet_imagenet'] == found['frechet_inception'] and json.dumps(found)
    assert found['frechet_imagenet'] == pytest.approx(frechet_distance(paper['real'], fake, flat), rel=1e-9)


def test_grade_of_few_pictures_has_no_interval(kit):
    paper = exam(4)
    assert grade(kit, paper['real'], paper)['intervals']['frechet'] is None


# the table and the page -----------------------------------------------------------------------------------------
def quality(method, distance, **more):
    network, steps = method.split()
    return {'method': method, 'network': network, 'steps': int(steps), 'evaluations': 4,
            'accuracy': {'overall': .9, 'interval': [.88, .92]},
            'frechet': distance, 'intervals': {'frechet': [distance - 1, distance + 1]}} | more


SPEED = [{'batch': 2, 'methods': {'teacher 14': {'transformer': 4., 'overhead': .2}},
          'evaluation_ratio': 7., 'denoising_ratio': 6., 'end_to_end_ratio': 5.}]


def test_table_shows_the_scores_that_there_are_with_their_intervals():
    rows = [quality('teacher 14', 10., frechet_inception=3.), quality('student 4', 12., frechet_inception=4.)]
    head, body = results.rows_of({'quality': rows, 'speed': SPEED})
    assert head == ['method', 'evaluations', 'seconds an image', 'Fréchet (judge)', 'FID', 'attribute accuracy']
    assert body[0] == ['teacher 14', '4', '2.100', '10.0 ± 1.0', '3.0', '0.900 ± 0.020'] and body[1][2] == ''


def test_sentence_of_the_table_holds_the_ratios_to_the_teacher():
    rows = [quality('teacher 14', 10.), quality('student 4', 11.), quality('student 2', 15.), quality('student 1', 80.)]
    told = "Student's Fréchet distance over the teacher's at 14 steps: 1.10 at 4 steps (intervals overlap), 1.50 at 2 steps, 8.00 at 1 step."
    assert results.tell_quality({'quality': rows}) == told
    control = results.tell_quality({'quality': rows + [quality('undistilled 4', 22.), quality('undistilled 1', 81.)]})
    assert control == f"{told} Student's Fréchet distance over the undistilled network's: 0.50 at 4 steps, 0.99 at 1 step (intervals overlap)."
    assert results.tell_quality({'quality': rows[1:]}) == '' and results.tell_quality({'quality': rows[:1]}) == ''


def test_page_holds_every_stored_figure_and_asks_for_nothing_outside(tmp_path):
    origin = {'command': 'make <3>', 'commit': 'abc', 'finished': '2026-01-01T', 'wall_seconds': 1.}
    (tmp_path/'fig3.json').write_text(json.dumps(fig3.run_fig3(None) | {'provenance': origin}))
    renders = {'accuracy': {'overall': 1.}, 'psnr': 30.}
    found = {'images': 2, 'quality': [quality('teacher 14', 10.)], 'speed': SPEED, 'provenance': {}, 'renders': renders}
    page = report.report_html(found, {'quality': results.draw_quality(found)}, figures.stored_figures(tmp_path))
    assert page.count('<img') == page.count('src="data:image/webp;base64,') == 2
    assert 'make &lt;3&gt;' in page and 'Higher is PixArt at the start' in page and '5.00 times faster' in page
    assert 'http' not in page and 'href' not in page and '<script' not in page


def test_reproduce_refuses_a_single_image_before_it_measures(tmp_path):
    with pytest.raises(ValueError, match='needs at least 2'): report.reproduce(tmp_path/'out', images=1)
    assert not (tmp_path/'out').exists()


def test_the_page_of_results_is_the_one_that_the_package_writes():
    from pathlib import Path
    folder = Path(__file__).parent.parent/'results'
    assert (folder/'README.md').read_text(encoding='utf-8') == figures.results_page(folder)

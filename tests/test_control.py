"""Ablation of the ControlNet: runs that resume, sentences that follow from numbers, figures from stored numbers alone."""
import inspect, json

import pytest
import torch

from pixart_delta_nb.controlnet import ControlNetTransformer
from pixart_delta_nb.evidence import control, control_runs, fig5, fig6, fig12, runs
from pixart_delta_nb.evidence.control import draw_control, run_control
from pixart_delta_nb.evidence.control_runs import MARKS, RUNS, control_snapshots, held_out, obey, run_folder
from pixart_delta_nb.evidence.fig5 import draw_fig5, ends, run_fig5, tell_fig5
from pixart_delta_nb.evidence.fig6 import draw_fig6, jumps, run_fig6, tell_fig6
from pixart_delta_nb.evidence.fig12 import run_fig12
from pixart_delta_nb.evidence.kit import tiny_kit
from pixart_delta_nb.world.recipes import scene_data


@pytest.fixture(scope='module')
def kit(): return tiny_kit()

@pytest.fixture(scope='module')
def data(kit): return scene_data(kit.teacher, 4, condition='edges')

def scores(full, none): # of one examination
    return [{'captions': told, 'method': m, 'fidelity': v, 'accuracy': .9} for told, v in (('full', full), ('none', none)) for m in ('student 4', 'teacher 14')]

def ablation(transformer, unet): # of `run_fig5`, with these fidelities without words, a seed each
    rows = [{'run': f'{name}, N = 7', 'seed': i, 'final': scores(.85, v)} for name, values in (('Transformer', transformer), ('UNet', unet)) for i, v in enumerate(values)]
    return {'rows': rows, 'floor': scores(.7, .4), 'ceiling': {'fidelity': .9}}


def test_runs_are_those_of_the_report():
    assert {(r['num_copies'], r.get('wiring', 'transformer')) for r in RUNS.values()} == {(1, 'transformer'), (2, 'transformer'), (4, 'transformer'), (7, 'transformer'), (13, 'transformer'), (7, 'unet')}

def test_folders_of_runs_differ(tmp_path): assert len({run_folder(tmp_path, name, s) for name in RUNS for s in (0, 1)}) == 2*len(RUNS)

def test_a_run_in_segments_is_the_run_in_one_piece(kit, data, tmp_path):
    paused = dict(control_snapshots(kit.teacher, data, tmp_path/'a', (0, 1, 3), num_copies=1, batch_size=2))
    through = dict(control_snapshots(kit.teacher, data, tmp_path/'b', (3,), num_copies=1, batch_size=2))
    assert all(torch.equal(a, b) for a, b in zip(paused[3].adapter.state_dict().values(), through[3].adapter.state_dict().values()))

def test_step_zero_is_the_floor(kit, tmp_path):
    (_, net), = control_snapshots(kit.teacher, None, tmp_path, (0,), num_copies=1)
    paper = held_out(kit, 2)
    assert torch.equal(obey(kit, net, paper, steps=1), obey(kit, net, paper, steps=1, scale=0.))

def test_a_folder_of_another_run_is_refused(kit, tmp_path):
    list(control_snapshots(kit.teacher, None, tmp_path, (0,), num_copies=1))
    with pytest.raises(ValueError, match='other settings'): list(control_snapshots(kit.teacher, None, tmp_path, (0,), num_copies=2))

def test_marks_that_a_run_lacks_are_refused(kit, tmp_path):
    with pytest.raises(ValueError, match='choose among these'): run_fig12(kit, tmp_path, None, marks=(0,), at=(5,))

@pytest.mark.parametrize('transformer, unet, wanted', [((.8, .82, .81), (.6, .61, .62), 'Transformer wiring is ahead in the mean of 3 seeds, and the seeds of the two do not overlap'),
    ((.6, .7), (.65, .8), 'UNet wiring is ahead in the mean of 2 seeds, and the seeds of the two overlap'), ((.8,), (.7, .6), 'no comparison')])
def test_wirings_are_compared_by_their_seeds(transformer, unet, wanted): assert wanted.lower() in tell_fig5(ablation(transformer, unet)).lower()

def test_ends_pick_captions_and_method():
    found = ablation((.8, .7), (.6,))
    assert ends(found, 'none', 'student 4') == {'Transformer, N = 7': [.8, .7], 'UNet, N = 7': [.6]}
    assert ends(found, 'full', 'teacher 14', 'accuracy') == {'Transformer, N = 7': [.9, .9], 'UNet, N = 7': [.9]}

def test_the_floor_is_the_network_before_training(kit, tmp_path):
    found = run_fig5(kit, tmp_path, None, ('Transformer, N = 1',), marks=(0,), images=2)
    assert found['floor'] == found['rows'][0]['final'] and found['rows'][0]['curve'][0]['none']['fidelity'] == found['floor'][2]['fidelity']

def test_figure_5_is_drawn_from_numbers_alone():
    left, right = draw_fig5(json.loads(json.dumps(ablation((.8, .7), (.6,))))).axes
    assert left.get_title() == 'with its caption' and right.get_title() == 'without words'

def test_a_jump_is_told_from_a_ramp():
    ramp, step, flat = torch.linspace(0, 1, 5), torch.tensor([0., 0, 1, 1, 1]), torch.full((5,), .3)
    assert jumps({'values': torch.stack([ramp, step, flat], 1).tolist()}) == pytest.approx([.25, 1.])

def test_the_floor_closes_no_gap_and_a_wider_tolerance_never_hurts(kit):
    found = json.loads(json.dumps(run_control(kit, images=2, net=ControlNetTransformer(kit.teacher.transformer, 1).eval())))
    assert len(found['rows']) == 8 and {r['closed_1'] for r in found['rows']} == {0.}      # a fresh ControlNet closes none either
    assert all(r['fidelity_1'] <= r['fidelity_2'] + 1e-6 for r in found['rows']) and len(draw_control(found).axes[0].get_yticklabels()) == 4

def test_the_shipped_controlnet_is_what_is_measured_by_default(kit, tmp_path, monkeypatch):
    control_runs.save_controlnet(ControlNetTransformer(kit.teacher.transformer, 1), tmp_path/'controlnet', condition='edges')
    monkeypatch.setattr(control, 'shipped', lambda name: tmp_path/name)
    assert len(run_control(kit, images=2, ends=(('student', 1),))['rows']) == 4

def test_a_network_that_obeys_closes_the_whole_gap(kit, monkeypatch):
    honest = control.obey
    monkeypatch.setattr(control, 'obey', lambda kit, net, paper, *a, scale: paper['decoded'] if scale else honest(kit, net, paper, *a, scale=scale))
    off, on, *_ = run_control(kit, images=2, net=ControlNetTransformer(kit.teacher.transformer, 1), ends=(('student', 1),))['rows']
    assert (off['closed_1'], on['closed_1']) == (0, pytest.approx(1)) and on['fidelity_1'] == on['ceiling_1']

def test_what_no_eye_reads_off_a_picture_is_refused(kit):
    with pytest.raises(ValueError, match='condition'): run_control(kit, images=2, condition='segmentation')

def test_a_render_has_its_own_edges_and_another_of_its_caption_has_not(kit):
    paper = held_out(kit, 3)
    assert control_runs.scene_fidelity(paper['given'], paper['renders'], 'edges').min() == 1 and paper['redrawn'].max() < .7

def test_a_condition_that_scenes_do_not_have_is_refused(kit):
    with pytest.raises(ValueError, match='condition is'): run_control(kit, images=2, condition='hed')

def test_captions_none_hides_the_words_and_control_is_a_row_an_image(kit, monkeypatch):
    heard, honest = [], control_runs.generate
    monkeypatch.setattr(control_runs, 'generate', lambda pipe, captions, *a, **o: heard.append((captions, o)) or honest(pipe, captions, *a, **o))
    net, paper = ControlNetTransformer(kit.teacher.transformer, 1), held_out(kit, 2)
    for told in control_runs.CAPTIONS: obey(kit, net, paper, told, steps=1)
    assert [captions for captions, _ in heard] == [paper['captions'], ['', '']]
    assert all(o['control'] is paper['given'] and o['conditioning_scale'] == 1 for _, o in heard)

@pytest.mark.parametrize('run', [fig5.run_fig5, fig6.run_fig6, fig12.run_fig12], ids=lambda run: run.__name__)
def test_figures_of_control_look_at_the_marks_of_control(run):
    assert inspect.signature(run).parameters['marks'].default == MARKS != runs.MARKS

def test_figure_6_keeps_values_and_pictures(kit, data, tmp_path):
    found = json.loads(json.dumps(run_fig6(kit, tmp_path, data, 'Transformer, N = 1', (0, 1), images=2, shown=1, batch_size=2)))
    assert (len(found['values']), len(found['values'][0]), found['columns']) == (2, 2, ['edges', '0', '1'])
    assert len(draw_fig6(found).subfigs) == 2 and isinstance(tell_fig6(found), str)

def test_nothing_sudden_is_said_of_images_that_do_not_rise():
    assert 'nothing to call sudden' in tell_fig6({'values': [[.5, .5], [.5, .55]], 'ceiling': [1., 1.], 'marks': [0, 1]})

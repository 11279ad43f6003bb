"""Figures: runs on random networks, drawings and sentences from hand-made numbers, and the index."""
import copy, io, json

import pytest
import torch

from pixart_delta_nb import costs, figures, learning, peers, results
from pixart_delta_nb.evidence.figures import FIGURES
from pixart_delta_nb.evidence.runs import WORKSHOP
from pixart_delta_nb.evidence.peers import SOLVERS
from pixart_delta_nb.evidence.kit import Method
from pixart_delta_nb.evidence.attributes import ROWS
from pixart_delta_nb.sampling import sample_student
from pixart_delta_nb.schedules import BETAS


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def kit(): return results.tiny_kit()


@pytest.fixture(scope='module')
def data(kit): return learning.training_data(kit.teacher, 4)


def row(accuracy, **more): return {'accuracy': accuracy, 'intervals': {'accuracy': [accuracy - .02, accuracy + .02], 'frechet': None, 'frechet_imagenet': [100*(.9 - accuracy), 100*(1.1 - accuracy)], 'clip': None},
                                   'frechet': 1., 'frechet_imagenet': 100*(1 - accuracy), 'clip': 50*accuracy} | more


PARTS = {'text': .01, 'transformer': .5, 'decode': .1, 'overhead': .02}
FOUND = {
    'peers': {'rows': [row(a, solver=s, network=n, steps=e, evaluations=e) for s, n, a, e in (
        ('DDIM', 'teacher', .5, 8), ('DDIM', 'teacher', .8, 28), ('UniPC', 'teacher', .7, 8), ('student', 'student', .7, 4), ('student', 'student', .6, 1))]},
    'lora': {'images': 64, 'adapter': {'rank': 8}, 'rows': [row(a, network=n, steps=k, evaluations=k) for n, k, a in (('student', 4, .9), ('student', 1, .8), ('LoRA', 4, .8), ('LoRA', 1, .9))]},
    'omega': {'rows': [row(a, scale=s, network='teacher', evaluations=28) for s, a in ((1., .5), (4.5, .8), (5.5, .79))]},
    '2': {'rows': [row(.4 + .1*i/15 + .05*k + .01*s + .001*b, variant=v, batch=b, seed=s, iteration=i, steps=n) for k, v in enumerate(('ω embedded', 'ω = 4.5'))
                   for b, seeds in ((4, (0, 1)), (64, (0,))) for s in seeds for n in (1, 4) for i in (0, 15)]},
    '7': {'captions': ['a', 'b'], 'columns': ['teacher\n14', 'student\n4', 'student\n1'], 'sheet': peers.pack_images(torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)))},
    'table1': {'rows': costs.REPORT_SETTINGS + [{'model': 'here', 'pairs': 9, 'pixels': 128, 'batch': 8, 'memory': '1 GB'}], 'memory': {'before': 2**29, 'peak': 2**30}, 'parameters': 8_000_000},
    'table2': {'report': costs.REPORT_SECONDS, 'speed': {'batch': 2, 'evaluation_ratio': 7., 'denoising_ratio': 6.1, 'end_to_end_ratio': 4.2, 'methods': {
        'teacher 14': PARTS | {'whole': 4., 'evaluations': 28.}, 'student 4': PARTS | {'whole': 1., 'evaluations': 4.}}}},
    'benchmarks': {'batch': 8, 'floor': {'floor_seconds': 1., 'ratio': 1.1}, 'step': {n: {'seconds': s, 'before': 1, 'peak': 2**30} for n, s in (('here', 1.1), ('usual', 1.4))},
                   'step_ratio': 1.27, 'sampling': [{'network': 'student', 'steps': n, 'ratio': 1.1, 'apart': 1e-5} for n in (1, 4)]}}
FOUND['3'] = figures.run_fig3(None)
FOUND['attributes'] = {'tables': {name: {pairs: {row: .9 - .01*i - less for i, row in enumerate(ROWS)} | {'all': .9 - less, 'interval': [.88 - less, .92 - less], 'whole picture': .5}
                                         for pairs, less in (('seen', 0.), ('unseen', drop))} for name, drop in (('teacher 14', .01), ('student 4', .1))}}
SCORES = [{'captions': told, 'method': m, 'fidelity': .7, 'accuracy': .9} for told in ('full', 'none') for m in ('student 4', 'teacher 14')]
FOUND['5'] = {'rows': [{'run': f'{name}, N = 7', 'seed': s, 'final': SCORES} for name in ('Transformer', 'UNet') for s in (0, 1)], 'floor': SCORES, 'ceiling': {'fidelity': .9}}
FOUND['6'] = {'values': [[.2, .3], [.3, .8], [.8, .8]], 'marks': [0, 10, 20], 'ceiling': [.9, .9], 'captions': ['', ''], 'columns': ['edges', '0', '20'], 'sheet': FOUND['7']['sheet']}
FOUND['12'] = FOUND['7'] | {'columns': ['edges', '0', '20'], 'scores': [{'fidelity': .5}, {'fidelity': .8}]}
FOUND['control'] = {'tolerances': [1], 'rows': [row(.8, method='student 4', captions=told, scale=s, fidelity_1=.5 + .3*s, interval_1=[.4 + .3*s, .6 + .3*s], closed_1=.8*s, ceiling_1=.9)
                                               for told in ('full', 'none') for s in (0., 1.)]}
FOUND['control-cost'] = {'rows': [{'num_copies': n, 'measured': 1 + .07*n, 'predicted': 1 + .08*n, 'parameters': n*10**6} for n in (1, 7)]}
FOUND['schedule'] = {'captions': ['a', 'b'], 'columns': ['right', 'wrong', 'none'], 'sheet': FOUND['7']['sheet'], 'steps': 120, 'settings': {'batch_size': 24},
                     'rows': [row(a, distilled=d, sampled=w, spread=s) for d, w, a, s in (('linear', 'linear', .9, 2.), ('scaled linear', 'scaled linear', .7, 1.), ('neither', 'linear', .8, 2.))]}
FOUND['8'] = FOUND['7'] | {'columns': ['0', '10', '20']}


@pytest.mark.parametrize('name', FIGURES)
def test_every_figure_is_drawn_and_told_from_its_numbers_alone(name):
    found = json.loads(json.dumps(FOUND[name]))
    before = copy.deepcopy(found)
    file = io.BytesIO()
    FIGURES[name].draw(found).savefig(file, format='png')
    assert len(file.getvalue()) > 5000 and FIGURES[name].tell(found).endswith('.') and found == before


def test_sentences_follow_the_numbers():
    told = FIGURES['lora'].tell(FOUND['lora'])
    assert 'rank 8. 4 steps: accuracy 0.800 with the adapter, 0.900 with the full student; Fréchet distance 1.00 (judge) and 2.00 (ImageNet) times' in told and '1 step: accuracy 0.900' in told
    told = FIGURES['schedule'].tell(FOUND['schedule'])
    assert 'Distilled on the scaled linear, sampled on the scaled linear: accuracy 0.700' in told and 'spread 0.50' in told and 'Distilled on neither' in told
    told = FIGURES['peers'].tell(FOUND['peers'])
    assert 'is 0.7, at 4 evaluations; the teacher reaches it with UniPC at 8. Fréchet distance, ImageNet: the student\'s best is 30, at 4' in told
    told = FIGURES['attributes'].tell(FOUND['attributes'])
    assert 'teacher 14: 0.900 of the attributes of seen pairs and 0.890 of unseen ones, which their intervals do not tell apart; weakest for unseen pairs is sky with 0.810' in told
    assert 'student 4: 0.900 of the attributes of seen pairs and 0.800 of unseen ones, which their intervals tell apart' in told
    assert 'PixArt at the start, Stable Diffusion, LCM at the end' in FIGURES['3'].tell(FOUND['3'])
    rows = [r | {'accuracy': .99} if r['network'] == 'student' else r for r in FOUND['peers']['rows']]
    assert 'no solver' in FIGURES['peers'].tell({'rows': rows})
    assert 's = 4.5 (ω = 3.5)' in FIGURES['omega'].tell(FOUND['omega']) and 's = 5.5 may be' in FIGURES['omega'].tell(FOUND['omega'])
    assert 'Batch 4, 1 step: 44.1 with ω = 4.5 is the smallest, 95 % interval over seeds [37.7, 50.5], which that of ω embedded overlaps. ' in FIGURES['2'].tell(FOUND['2'])
    assert 'Batch 64, 4 steps: 38.6 with ω = 4.5 is the smallest; one seed' in FIGURES['2'].tell(FOUND['2'])
    assert '1.27 times as long' in FIGURES['benchmarks'].tell(FOUND['benchmarks'])


def test_fig2_counts_the_statements_of_the_report():
    assert FIGURES['2'].tell(FOUND['2']).endswith('ends lower in 4 of 4 cases; in the report it helps. A fixed ω ends lower than the embedded one in 4 of 4; in the report it does.')
    worse = [r | {'frechet_imagenet': 99.} if r['batch'] == 64 and r['variant'] == 'ω = 4.5' else r for r in FOUND['2']['rows']]
    assert 'lower in 2 of 4 cases' in FIGURES['2'].tell({'rows': worse}) and 'embedded one in 2 of 4' in FIGURES['2'].tell({'rows': worse})
    alone = [r for r in FOUND['2']['rows'] if r['batch'] == 4 and r['variant'] == 'ω = 4.5']
    assert 'report' not in FIGURES['2'].tell({'rows': alone})


def test_fig2_shows_bands_only_over_several_seeds():
    axes = FIGURES['2'].draw(FOUND['2']).axes                                # a row a number of steps; Fréchet for batch 4 and 64, then CLIP
    assert [len(ax.collections) for ax in axes] == [2, 0, 2, 0]*2 and [len(ax.lines) for ax in axes] == [2]*8


def test_panels_leave_out_scores_that_were_not_measured():
    rows = [{k: v for k, v in r.items() if k not in ('clip', 'frechet_imagenet')} for r in FOUND['omega']['rows']]
    assert len(FIGURES['omega'].draw({'rows': rows}).axes) == 1


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('steps', [1, 4])
def test_schedulers_have_the_betas_and_start_at_the_noisiest_time(solver, steps):
    scheduler = peers.build_scheduler(solver)
    scheduler.set_timesteps(steps)
    assert {k: scheduler.config[k] for k in BETAS} == BETAS
    assert scheduler.timesteps[0] == 999 and scheduler.config.prediction_type == 'epsilon'


def test_solvers_agree_where_they_must(kit):
    x = {name: peers.sample_with(kit.teacher, name, ['a red cube'], 1, seeds=[3]) for name in SOLVERS}
    for name in SOLVERS: assert (x[name] - x['DDIM']).abs().max() < 1e-3*x['DDIM'].abs().max()      # one step is one step
    assert [x[name].evaluations for name in SOLVERS] == [2]*5


def test_an_image_depends_on_its_own_seed(kit):
    both = peers.sample_with(kit.teacher, 'UniPC', ['a red cube', 'a cone'], 3, seeds=[5, 6], batch_size=1)
    assert (both[1:] - peers.sample_with(kit.teacher, 'UniPC', ['a cone'], 3, seeds=[6])).abs().max() < 1e-4*both.abs().max()


def test_pictures_survive_their_text_to_a_byte():
    images = torch.rand(2, 3, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    back = peers.unpack_images(peers.pack_images(images), 2, 3)
    assert back.shape == images.shape and (back - images).abs().max() <= .5/255 + 1e-6


def test_snapshots_go_on_after_a_stop_and_refuse_other_settings(kit, data, tmp_path):
    run = learning.snapshots(kit.teacher, data, tmp_path, (1, 2), batch_size=2)
    first = next(run)[1]
    run.close()                                                              # killed after the first snapshot
    again = dict(learning.snapshots(kit.teacher, data, tmp_path, (1, 2), batch_size=2))
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert same(first, again[1]) and not same(again[1], again[2])
    with pytest.raises(ValueError, match='other settings'): next(learning.snapshots(kit.teacher, data, tmp_path, (1, 2), batch_size=3))


def test_told_student_starts_as_the_teacher_and_samples(kit):
    import dataclasses
    wide = learning.embed_guidance(kit.teacher.transformer, 8)
    pipe = dataclasses.replace(kit.student, transformer=wide)
    plain = dataclasses.replace(kit.student, transformer=kit.teacher.transformer)
    told = [sample_student(pipe, ['a red cube'], 2, guidance_scale=s) for s in (2., 9.)]
    assert torch.equal(*told) and torch.allclose(told[0], sample_student(plain, ['a red cube'], 2), atol=1e-4)


def test_fig2_with_every_variant(kit, data, tmp_path):
    found = learning.run_fig2(kit, tmp_path, data, marks=(0, 1), batches={3: (5,), 2: (6,)}, images=2, steps=(1, 2))
    assert [(r['batch'], r['seed'], r['variant'], r['iteration'], r['steps']) for r in found['rows']] == [(b, s, v, i, n) for b, s in ((3, 5), (2, 6)) for v in learning.VARIANTS for i in (0, 1) for n in (1, 2)]
    assert found['settings'] == {k: v for k, v in WORKSHOP.items() if k != 'batch_size'} and found['provenance']['seeds']['runs of batch 3'] == [5]


def test_fig8_goes_on_with_the_first_run_of_fig2(kit, data, tmp_path):
    learning.run_fig2(kit, tmp_path, data, marks=(0, 1), batches={4: (0,)}, images=2, steps=(1,), variants={'ω = 3.5': learning.VARIANTS['ω = 3.5']})
    stamp = (tmp_path/'omega-3.5-4-0'/'000001'/'config.json').stat().st_mtime_ns
    assert learning.run_fig8(kit, tmp_path/'omega-3.5-4-0', marks=(0, 1), captions=1, steps=1)['columns'] == ['0', '1']   # without data, so nothing is trained
    assert (tmp_path/'omega-3.5-4-0'/'000001'/'config.json').stat().st_mtime_ns == stamp
    assert learning.run_fig2.__wrapped__.__defaults__[0] + '/omega-3.5-4-0' == learning.run_fig8.__wrapped__.__defaults__[0]


def test_fig7_shows_the_lora_only_if_there_is_one(kit):
    import dataclasses
    few = (Method('student', 1),)
    assert peers.run_fig7(kit, 2, few)['columns'] == ['student\n1']
    assert peers.run_fig7(dataclasses.replace(kit, lora=kit.student), 2, few)['columns'] == ['student\n1', 'LoRA\n4', 'LoRA\n2']


def test_cost_law_is_exact_and_explains_the_report():
    c, a = costs.fit_cost(16., 28, 3.3, 4)
    assert abs(c + 28*a - 16) < 1e-12 and abs(c + 4*a - 3.3) < 1e-12
    with pytest.raises(ValueError, match='different counts'): costs.fit_cost(1., 4, 2., 4)


def test_table2_counts_evaluations(kit):
    found = costs.run_table2(kit, methods=(Method('teacher', 3), Method('student', 2)), repeats=1)
    assert [r['evaluations'] for r in costs.rows_table2(found)] == [6, 2] and found['speed']['evaluation_ratio'] == 3


def test_usual_step_has_the_gradient_of_the_step_here(kit):
    from pixart_delta_nb.distill import lcd_step
    from pixart_delta_nb.evidence.kit import real_images
    from pixart_delta_nb.world.words import make
    from pixart_delta_nb.text import null_caption
    teacher, pipe = kit.teacher.transformer, kit.teacher
    rows, grads = costs._rows(learning.training_data(pipe, 2), 2, 'cpu'), []
    for usual in (False, True):
        student, generator = copy.deepcopy(teacher).requires_grad_(True), torch.Generator().manual_seed(1)
        with torch.no_grad(): student.proj_out.weight.mul_(1.1)
        loss = (costs.usual_step(student, teacher, pipe, real_images(0, 2), [make(0, i)[1] for i in range(2)], null_caption(pipe.tokenizer, pipe.text_encoder), generator=generator) if usual
                else lcd_step(student, teacher, teacher, rows, pipe.alpha_bar, generator=generator))
        loss.backward()
        grads.append(student.proj_out.weight.grad)
    assert (grads[0] - grads[1]).norm() < .02*grads[0].norm()


def test_stock_pipeline_makes_the_same_pictures(kit):
    rows = [costs._against_stock(p, s, 2, ['a red cube'], 1) for p, s in ((kit.student, True), (kit.teacher, False))]
    assert all(r['apart'] < 1e-3 and r['ratio'] > 0 for r in rows)


def test_students_of_two_schedules_differ_in_the_table_alone(kit, data, tmp_path):
    found = learning.run_schedule(kit, tmp_path, data, steps=1, images=2, captions=1, few=1, batch_size=2)
    assert [(r['distilled'], r['sampled']) for r in found['rows']][2:4] == [('linear', 'linear'), ('linear', 'scaled linear')]
    runs = [json.loads((tmp_path/name/'run.json').read_text()) for name in ('linear', 'scaled-linear')]
    assert runs[0] == runs[1] and len({r['spread'] for r in found['rows']}) == 6 and len(found['columns']) == 6


def test_index_names_files_once_and_refuses_others(kit, tmp_path):
    assert len({f.file for f in FIGURES.values()}) == len(FIGURES)
    assert figures.estimate('peers', kit) > figures.estimate('7', kit) > 0
    with pytest.raises(ValueError, match='one of 2, 3, 5, 6, 7, 8'): figures.reproduce_figure('9', tmp_path)


def test_reproduce_measures_once_and_again_from_scratch(kit, tmp_path, capsys):
    settings = dict(kit=kit, run=tmp_path/'run', data=learning.training_data(kit.teacher, 2), marks=(0, 1), captions=1, steps=1, batch_size=1)
    figures.reproduce_figure('8', tmp_path/'out', **settings)
    stamp = (tmp_path/'run'/'000001'/'config.json').stat().st_mtime_ns
    figures.reproduce_figure('8', tmp_path/'out', **settings)
    assert (tmp_path/'run'/'000001'/'config.json').stat().st_mtime_ns == stamp
    figures.reproduce_figure('8', tmp_path/'out', from_scratch=True, **settings)
    assert (tmp_path/'run'/'000001'/'config.json').stat().st_mtime_ns > stamp
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['fig8.json', 'fig8.png']
    assert 'minutes at the default settings' in capsys.readouterr().out and not (tmp_path/'run'/'unfinished').exists()


def test_from_scratch_goes_on_with_a_run_that_was_cut_off(kit, tmp_path, monkeypatch):
    settings = dict(kit=kit, run=tmp_path/'run', data=learning.training_data(kit.teacher, 2), marks=(0, 1), captions=1, steps=1, batch_size=1)
    monkeypatch.setattr(learning, 'decode', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): figures.reproduce_figure('8', tmp_path/'out', from_scratch=True, **settings)
    stamp = (tmp_path/'run'/'000000'/'config.json').stat().st_mtime_ns
    monkeypatch.undo()
    figures.reproduce_figure('8', tmp_path/'out', from_scratch=True, **settings)
    assert (tmp_path/'run'/'000000'/'config.json').stat().st_mtime_ns == stamp and (tmp_path/'out'/'fig8.json').is_file()


def test_provenance_is_the_command_line_where_nothing_was_set(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, 'open_kit', lambda: kit)
    entry = figures.Figured('omega', 'title', lambda kit, images=2: peers.run_omega(kit, images=images, scales=(1., 4.5), steps=1), peers.draw_omega, peers.tell_omega, 1)
    monkeypatch.setitem(FIGURES, 'omega', entry)
    made = [figures.reproduce_figure('omega', tmp_path, from_scratch=True, **more)['provenance']['command'] for more in ({}, {'images': 3})]
    assert made == ['pixart-delta reproduce --figure omega --from-scratch', 'run_omega(kit)']


def test_grade_has_every_score_of_the_kit_and_an_interval_around_it(kit):
    import dataclasses
    flat = torch.nn.Flatten()
    full = dataclasses.replace(kit, features=flat, inception=flat)
    paper = results.exam(16)
    fake = paper['real'].flip(0)*.9
    found = results.grade(full, fake, paper)
    assert set(found) == {'accuracy', 'intervals', 'frechet', 'frechet_imagenet', 'kernel_imagenet', 'frechet_inception', 'kernel_inception'}
    assert set(found['intervals']) == set(found) - {'intervals'} and all(low < found[k] < high for k, (low, high) in found['intervals'].items())
    assert found['frechet_imagenet'] == found['frechet_inception'] and json.dumps(found)
    assert found['frechet_imagenet'] == pytest.approx(results.frechet_distance(paper['real'], fake, flat), rel=1e-9)


def test_grade_of_few_pictures_has_no_interval(kit):
    paper = results.exam(4)
    assert results.grade(kit, paper['real'], paper)['intervals']['frechet'] is None


def quality(method, distance, **more):
    network, steps = method.split()
    return {'method': method, 'network': network, 'steps': int(steps), 'evaluations': 4, 'accuracy': {'overall': .9, 'interval': [.88, .92]},
            'frechet': distance, 'intervals': {'frechet': [distance - 1, distance + 1]}} | more


SPEED = [{'batch': 2, 'methods': {'teacher 14': {'transformer': 4., 'overhead': .2}}, 'evaluation_ratio': 7., 'denoising_ratio': 6., 'end_to_end_ratio': 5.}]


def test_table_shows_the_scores_that_there_are_with_their_intervals():
    found = {'quality': [quality('teacher 14', 10., frechet_inception=3.), quality('student 4', 12., frechet_inception=4.)], 'speed': SPEED}
    head, body = results.rows_of(found)
    assert head == ['method', 'evaluations', 'seconds an image', 'Fréchet (judge)', 'FID', 'attribute accuracy']
    assert body[0] == ['teacher 14', '4', '2.100', '10.0 ± 1.0', '3.0', '0.900 ± 0.020'] and body[1][2] == ''


def test_sentence_of_the_table_holds_the_ratios_to_the_teacher():
    rows = [quality('teacher 14', 10.), quality('student 4', 11.), quality('student 2', 15.), quality('student 1', 80.)]
    assert results.tell_quality({'quality': rows}).endswith('1.10 at 4 steps, 1.50 at 2 steps, 8.00 at 1 step.')
    assert results.tell_quality({'quality': rows[1:]}) == '' and results.tell_quality({'quality': rows[:1]}) == ''


def test_page_holds_every_stored_figure_and_asks_for_nothing_outside(tmp_path):
    for name in ('3', 'peers'):
        (tmp_path/f'{FIGURES[name].file}.json').write_text(json.dumps(FOUND[name] | {'provenance': {'command': f'make {name}', 'commit': 'abc', 'finished': '2026-01-01T', 'wall_seconds': 1.}}))
    page = figures.report_html({'images': 2, 'quality': [quality('teacher 14', 10.)], 'speed': SPEED, 'provenance': {}, 'renders': {'accuracy': {'overall': 1.}, 'psnr': 30.}},
                               figures.stored_figures(tmp_path))
    assert page.count('<img') == page.count('src="data:image/png;base64,') == 2 and 'make peers' in page and 'UniPC at 8' in page
    assert 'http' not in page and 'href' not in page and '<script' not in page


def test_table2_stands_beside_the_report():
    rows = costs.beside_table2(FOUND['table2'])
    assert [r['ratio'] for r in rows] == ['4.8', '6.9', '4.4', '4.0'] and rows[-1]['4 steps'] == '0.5 s' and rows[-1]['an evaluation'] == '62 ms'

"""Distillation runs that are looked at on their way, and the figures that look."""
import dataclasses, json

import pytest
import torch

from pixart_delta_nb.lcd import embed_guidance
from pixart_delta_nb.evidence import fig2, fig8, runs
from pixart_delta_nb.evidence.kit import tiny_kit
from pixart_delta_nb.evidence.schedule import run_schedule
from pixart_delta_nb.sampling import sample_student
from pixart_delta_nb.world.recipes import scene_data


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def kit(): return tiny_kit()


@pytest.fixture(scope='module')
def data(kit): return scene_data(kit.teacher, 4)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_snapshots_go_on_after_a_stop_and_refuse_other_settings(kit, data, tmp_path):
    run = runs.snapshots(kit.teacher, data, tmp_path, (1, 2), batch_size=2)
    first = next(run)[1]
    run.close()                                                                 # killed after the first snapshot
    again = dict(runs.snapshots(kit.teacher, data, tmp_path, (1, 2), batch_size=2))
    assert same(first, again[1]) and not same(again[1], again[2])
    with pytest.raises(ValueError, match='other settings'): next(runs.snapshots(kit.teacher, data, tmp_path, (1, 2), batch_size=3))


def test_told_student_starts_as_the_teacher_and_samples(kit):
    pipe = dataclasses.replace(kit.student, transformer=embed_guidance(kit.teacher.transformer, 8))
    plain = dataclasses.replace(kit.student, transformer=kit.teacher.transformer)
    told = [sample_student(pipe, ['a red cube'], 2, guidance_scale=s) for s in (2., 9.)]
    assert torch.equal(*told) and torch.allclose(told[0], sample_student(plain, ['a red cube'], 2), atol=1e-4)


def test_a_network_is_given_one_entrance_for_omega(kit):
    wide = embed_guidance(kit.teacher.transformer, 8)
    assert not kit.teacher.transformer.config.guidance_embed_dim and wide.config.guidance_embed_dim == 8
    with pytest.raises(ValueError, match='embeds ω in 8 numbers already'): embed_guidance(wide)


def test_fig2_with_every_variant(kit, data, tmp_path):
    found = fig2.run_fig2(kit, tmp_path, data, marks=(0, 1), batches={3: (5,), 2: (6,)}, images=2, steps=(1, 2), variants=fig2.variants_of(3.5))
    cases = [(b, s, v, i, n) for b, s in ((3, 5), (2, 6)) for v in fig2.variants_of(3.5) for i in (0, 1) for n in (1, 2)]
    assert [(r['batch'], r['seed'], r['variant'], r['iteration'], r['steps']) for r in found['rows']] == cases
    assert found['settings'] == {k: v for k, v in runs.WORKSHOP.items() if k != 'batch_size'}
    assert found['provenance']['seeds']['runs of batch 3'] == [5]


def test_fig8_goes_on_with_the_first_run_of_fig2(kit, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fig2.run_fig2(kit, data=data, marks=(0, 1), images=2, steps=(1,))
    note = tmp_path/'runs/fig2/omega-3.5-48-0/000001/config.json'
    stamp = note.stat().st_mtime_ns
    found = fig8.run_fig8(kit, marks=(0, 1), captions=1, steps=1)               # without data, so nothing is trained
    assert found['columns'] == ['0', '1'] and note.stat().st_mtime_ns == stamp


def test_students_of_two_schedules_differ_in_the_table_alone(kit, data, tmp_path):
    found = run_schedule(kit, tmp_path, data, steps=1, images=2, captions=1, few=1, batch_size=2)
    assert [(r['distilled'], r['sampled']) for r in found['rows']][2:4] == [('linear', 'linear'), ('linear', 'scaled linear')]
    notes = [json.loads((tmp_path/name/'run.json').read_text()) for name in ('linear', 'scaled-linear')]
    assert notes[0] == notes[1] and len({r['spread'] for r in found['rows']}) == 6 and len(found['columns']) == 6

"""Other solvers for the teacher: their betas, their agreement, their cost."""
import pytest
import torch

from pixart_delta_nb.evidence.kit import tiny_kit
from pixart_delta_nb.evidence.lora import run_lora
from pixart_delta_nb.evidence.omega import run_omega
from pixart_delta_nb.evidence.peers import SOLVERS, build_scheduler, run_peers, sample_with
from pixart_delta_nb.sampling import sample_teacher
from pixart_delta_nb.schedules import BETAS


@pytest.fixture(scope='module')
def kit(): return tiny_kit()


def far(a, b): return ((a - b).abs().max()/b.abs().max()).item()


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('steps', [1, 4])
def test_schedulers_have_the_betas_and_start_at_the_noisiest_time(solver, steps):
    scheduler = build_scheduler(solver)
    scheduler.set_timesteps(steps)
    assert {k: scheduler.config[k] for k in BETAS} == BETAS
    assert scheduler.timesteps[0] == 999 and scheduler.config.prediction_type == 'epsilon'


def test_other_solvers_are_refused():
    with pytest.raises(ValueError, match='one of DDIM, Euler'): build_scheduler('PNDM')


def test_solvers_agree_where_they_must(kit):
    x = {name: sample_with(kit.teacher, name, ['a red cube'], 1, seeds=[3]) for name in SOLVERS}
    for name in SOLVERS: assert far(x[name], x['DDIM']) < 1e-3                  # one step is one step
    assert [x[name].evaluations for name in SOLVERS] == [2]*5


def test_the_stock_solver_is_the_projects_own(kit):
    stock = sample_with(kit.teacher, 'DPM-Solver++ 2M', ['a red cube', 'a cone'], 5)
    assert far(stock, sample_teacher(kit.teacher, ['a red cube', 'a cone'], 5)) < 1e-4


def test_an_image_depends_on_its_own_seed(kit):
    both = sample_with(kit.teacher, 'UniPC', ['a red cube', 'a cone'], 3, seeds=[5, 6], batch_size=1)
    assert far(sample_with(kit.teacher, 'UniPC', ['a cone'], 3, seeds=[6]), both[1:]) < 1e-4


def test_evaluations_are_counted_and_heun_gets_half_the_steps(kit):
    found = run_peers(kit, images=2, calls=(3,), student_steps=(1,), solvers=('DDIM', 'Heun'))
    assert [(r['solver'], r['steps'], r['evaluations']) for r in found['rows']] == [('DDIM', 3, 6), ('Heun', 2, 6), ('student', 1, 1)]


def test_without_guidance_half_the_evaluations(kit):
    assert [r['evaluations'] for r in run_omega(kit, images=2, scales=(1., 2.), steps=1)['rows']] == [1, 2]


def test_a_kit_without_an_adapter_cannot_compare_it(kit):
    with pytest.raises(ValueError, match='has no LoRA'): run_lora(kit)

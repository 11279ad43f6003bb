"Consistency functions: boundary, closed-form maps, time grids, and diffusers' LCMScheduler."
import pytest
import torch

from pixart_delta_nb.consistency import (boundary_scalings, consistency_function, guide, lcm_timesteps,
    multistep_consistency_sample, released_timesteps)
from pixart_delta_nb.schedules import add_noise, alpha_bar_from_betas, at, linear_betas

ALPHA_BAR = alpha_bar_from_betas(linear_betas())


def seeded(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def scheduler():
    from diffusers import LCMScheduler
    return LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule='linear')


def test_boundary_is_exact_at_zero():
    c_skip, c_out = boundary_scalings(torch.tensor(0))
    assert c_skip.item() == 1 and c_out.item() == 0


def test_boundary_in_float64_follows_its_formula():
    t = torch.arange(1000, dtype=torch.float64)
    c_skip, c_out = boundary_scalings(t)
    torch.testing.assert_close(c_skip, 0.25/((10*t)**2 + 0.25), rtol=1e-14, atol=0)
    torch.testing.assert_close(c_out, 10*t/((10*t)**2 + 0.25).sqrt(), rtol=1e-14, atol=0)


def test_disagreement_4_timestep_scaling_is_used():
    assert boundary_scalings(torch.tensor(50), timestep_scaling=0.01)[0].item() == pytest.approx(0.5)


def test_skip_weight_is_negligible_from_the_first_grid_point():
    assert boundary_scalings(torch.tensor(19))[0].item() == pytest.approx(7e-6, rel=0.05)


@pytest.mark.parametrize('bad', [{'sigma_data': 0}, {'timestep_scaling': -1}])
def test_boundary_refuses(bad):
    with pytest.raises(ValueError, match='must be positive'): boundary_scalings(1, **bad)


def test_boundary_refuses_negative_times():
    with pytest.raises(ValueError, match='must not be negative'): boundary_scalings(torch.tensor([3, -1]))


def test_consistency_function_returns_its_input_at_zero():
    x, eps = torch.randn(2, 4, 3, 3, generator=seeded(0)), torch.randn(2, 4, 3, 3, generator=seeded(1))
    assert torch.equal(consistency_function(x, eps, torch.zeros(2, dtype=torch.long), ALPHA_BAR), x)


def test_consistency_function_undoes_the_noise_it_is_told():
    x0, eps, t = torch.randn(3, 4, 3, 3, generator=seeded(0)), torch.randn(3, 4, 3, 3, generator=seeded(1)), torch.tensor([19, 500, 999])
    x_t = add_noise(x0, eps, at(ALPHA_BAR, t, x0))
    torch.testing.assert_close(consistency_function(x_t, eps, t, ALPHA_BAR), x0, rtol=0, atol=1e-3)


def test_consistency_function_lifts_half_precision_before_dividing():
    x0, eps = (torch.randn(1, 4, 3, 3, generator=seeded(s)).half() for s in (0, 1))
    t = torch.tensor([999])
    x_t = add_noise(x0, eps, at(ALPHA_BAR, t, x0))
    out = consistency_function(x_t, eps, t, ALPHA_BAR)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x0.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize('t, match', [(torch.tensor([1000]), 'between 0 and 999'), (torch.tensor([-1]), 'between 0 and 999'),
                                      (torch.tensor([3.]), 'integer')])
def test_consistency_function_refuses_times(t, match):
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=match): consistency_function(x, x, t, ALPHA_BAR)


def test_consistency_function_refuses_learned_variance_channels():
    with pytest.raises(ValueError, match='learned-variance'):
        consistency_function(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 2, 2), torch.tensor([1]), ALPHA_BAR)


def test_disagreement_5_four_step_grids():
    assert lcm_timesteps(4).tolist() == [999, 759, 499, 259]
    assert released_timesteps(4).tolist() == [999, 759, 519, 279]


def test_grid_equals_diffusers_for_every_count(scheduler):
    for steps in range(1, 51):
        scheduler.set_timesteps(steps, original_inference_steps=50)
        assert lcm_timesteps(steps).tolist() == scheduler.timesteps.tolist(), steps


@pytest.mark.parametrize('grid', [lcm_timesteps, released_timesteps])
@pytest.mark.parametrize('steps', [0, 51])
def test_grids_refuse(grid, steps):
    with pytest.raises(ValueError, match=f'steps={steps} must lie between 1 and 50'): grid(steps)


@pytest.mark.parametrize('grid', [lcm_timesteps, released_timesteps])
def test_grids_refuse_a_skip_that_does_not_divide(grid):
    with pytest.raises(ValueError, match='k is 30; it must divide'): grid(4, k=30)
    with pytest.raises(ValueError, match='steps=2.0'): grid(2.)


def toy_eps(x, t): return torch.tanh(1.3*x + t.reshape(-1, 1, 1, 1)/500 - 1)
def toy_f(x, t): return consistency_function(x, toy_eps(x, t), t, ALPHA_BAR)


@pytest.mark.parametrize('steps', [1, 2, 4, 8])
def test_sampler_equals_diffusers(scheduler, steps):
    x = noise = torch.randn(2, 4, 8, 8, generator=seeded(0))
    scheduler.set_timesteps(steps, original_inference_steps=50)
    g = seeded(5)
    for t in scheduler.timesteps: x, denoised = scheduler.step(toy_eps(x, t.expand(2)), t, x, generator=g, return_dict=False)
    ours = multistep_consistency_sample(toy_f, noise, lcm_timesteps(steps), ALPHA_BAR, seeded(5))
    assert (ours - denoised).abs().max() < 1e-4*denoised.abs().max()


def test_sampler_with_one_generator_an_image_does_not_depend_on_the_batch():
    noise = torch.randn(2, 4, 8, 8, generator=seeded(0))
    both = multistep_consistency_sample(toy_f, noise, lcm_timesteps(4), ALPHA_BAR, [seeded(1), seeded(2)])
    one = multistep_consistency_sample(toy_f, noise[1:], lcm_timesteps(4), ALPHA_BAR, [seeded(2)])
    torch.testing.assert_close(both[1:], one, rtol=1e-5, atol=1e-4)


def test_sampler_keeps_the_standard_deviation_with_the_exact_map():
    s, count = 0.4, 20_000
    def f(x, t): ab = at(ALPHA_BAR, t, x); return s*x/(ab*s**2 + 1 - ab).sqrt()
    x = torch.randn(count, 1, 1, 1, generator=seeded(0))
    out = multistep_consistency_sample(f, x, lcm_timesteps(4), ALPHA_BAR, seeded(1))
    assert abs(out.std().item() - s) < 4*s/(2*count)**0.5


def test_sampler_calls_back_once_a_jump_and_returns_the_last_estimate():
    seen = []
    out = multistep_consistency_sample(toy_f, torch.zeros(1, 4, 2, 2), lcm_timesteps(3), ALPHA_BAR, seeded(0),
                                       lambda i, t, estimate: seen.append((i, int(t), estimate)))
    assert [s[:2] for s in seen] == list(enumerate(lcm_timesteps(3).tolist())) and torch.equal(seen[-1][2], out)


@pytest.mark.parametrize('times', [[], [259, 999], [999, 999]])
def test_sampler_refuses_times_that_do_not_descend(times):
    with pytest.raises(ValueError, match='descending'):
        multistep_consistency_sample(toy_f, torch.zeros(1, 4, 2, 2), torch.tensor(times, dtype=torch.long), ALPHA_BAR)


def test_sampler_refuses_a_wrong_number_of_generators():
    with pytest.raises(ValueError, match='1 generators were given for 2 images'):
        multistep_consistency_sample(toy_f, torch.zeros(2, 4, 2, 2), lcm_timesteps(2), ALPHA_BAR, [seeded(0)])


@pytest.mark.parametrize('times', [[1000, 19], [19, -1], [500.5]])
def test_sampler_refuses_times_off_the_table(times):
    with pytest.raises(ValueError, match='integers between 0 and 999'):
        multistep_consistency_sample(toy_f, torch.zeros(1, 4, 2, 2), torch.tensor(times), ALPHA_BAR)


def test_guidance_takes_one_strength_an_image():
    c, null, omega = (torch.randn(3, 4, 2, 2, generator=seeded(s)) for s in (0, 1, 2))
    omega = omega[:, :1, :1, :1].abs()
    single = torch.cat([guide(c[i:i+1], null[i:i+1], omega[i].item()) for i in range(3)])
    torch.testing.assert_close(guide(c, null, omega), single)


def test_disagreement_1_pipelines_scale_is_one_plus_omega():
    c, null = (torch.randn(2, 3, generator=seeded(s)) for s in (0, 1))
    torch.testing.assert_close(guide(c, null, 3.5), null + 4.5*(c - null))
    torch.testing.assert_close(guide(c, null, 4.5), 5.5*c - 4.5*null)
    assert torch.equal(guide(c, null, 0), c)


@pytest.mark.parametrize('c, null, omega, message', [
    (torch.zeros(2, 3), torch.zeros(2, 3), -.5, 'omega=.-0.5. must not be negative'), (torch.zeros(2, 3), torch.zeros(1, 3), 1., 'must be equal'),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), 'reshape it'), (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, 1), 'reshape it')])
def test_guidance_refuses(c, null, omega, message):
    with pytest.raises(ValueError, match=message): guide(c, null, omega)


def test_algorithm_1_combines_increments_which_equals_a_guided_hop():
    from pixart_delta_nb.solvers import ddim_step
    x, c, null = (torch.randn(2, 4, 2, 2, generator=seeded(s), dtype=torch.float64) for s in (0, 1, 2))
    psi = lambda eps: ddim_step(x, eps, ALPHA_BAR[519], ALPHA_BAR[499]) - x
    torch.testing.assert_close(x + 5.5*psi(c) - 4.5*psi(null), ddim_step(x, guide(c, null, 4.5), ALPHA_BAR[519], ALPHA_BAR[499]))


def test_sampler_takes_a_plain_list_and_refuses_a_table_that_does_not_decrease():
    x = torch.zeros(1, 4, 2, 2)
    assert torch.equal(multistep_consistency_sample(toy_f, x, [999], ALPHA_BAR), toy_f(x, torch.tensor([999])))
    with pytest.raises(ValueError, match='must decrease'): multistep_consistency_sample(toy_f, x, [999], 1 - ALPHA_BAR)


def test_disagreement_11_the_estimate_of_the_last_jump_has_no_noise(scheduler):
    scheduler.set_timesteps(2, original_inference_steps=50)
    x, g = torch.randn(1, 4, 8, 8, generator=seeded(0)), seeded(1)
    for t in scheduler.timesteps: x, denoised = scheduler.step(toy_eps(x, t.expand(1)), t, x, generator=g, return_dict=False)
    assert torch.equal(x, denoised)
    ours = multistep_consistency_sample(toy_f, torch.randn(1, 4, 8, 8, generator=seeded(0)), lcm_timesteps(2), ALPHA_BAR, seeded(1))
    assert (ours - denoised).abs().max() < 1e-4*denoised.abs().max()

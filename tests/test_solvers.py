"Solvers: parity with diffusers, order of convergence against exact answers, and the skip grid."
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from pixart_delta_nb import schedules as S, solvers

AB = S.alpha_bar_from_betas(S.linear_betas())
LINEAR = dict(beta_schedule='linear', beta_start=1e-4, beta_end=.02)
SAMPLERS = [solvers.ddim_sample, solvers.euler_sample, solvers.heun_sample, solvers.dpm_solver_pp_2m]


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x, t): return .9 * torch.tanh(1.3 * x + t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000)


def gauss(x, t): return S.gaussian_eps(x, S.at(AB, t, x), .5)


def reference(scheduler, steps, x):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps: x = scheduler.step(network(x, t.repeat(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize('steps', [1, 2, 3, 14, 15, 25])
def test_dpm_solver_equals_diffusers(steps):
    theirs = reference(DPMSolverMultistepScheduler(**LINEAR), steps, noise(2, 4, 8, 8))
    ours = solvers.dpm_solver_pp_2m(network, noise(2, 4, 8, 8), solvers.dpm_timesteps(steps), AB)
    assert (ours - theirs).norm() < 2e-4 * theirs.norm()


@pytest.mark.parametrize('steps', [1, 2, 4, 7, 14, 20, 33, 100, 999])
def test_dpm_timesteps_equal_diffusers(steps):
    theirs = DPMSolverMultistepScheduler(**LINEAR)
    theirs.set_timesteps(steps)
    assert solvers.dpm_timesteps(steps).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize('k', [20, 50, 100])
def test_ddim_on_the_skip_grid_equals_diffusers(k):
    theirs = reference(DDIMScheduler(**LINEAR, timestep_spacing='trailing', clip_sample=False), 1000 // k,
                       noise(2, 4, 8, 8))
    ours = solvers.ddim_sample(network, noise(2, 4, 8, 8), S.skip_grid(k).flip(0), AB)
    assert (ours - theirs).norm() < 2e-4 * theirs.norm()


def test_ddim_step_equals_diffusers():
    theirs = DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing='trailing')
    theirs.set_timesteps(50)
    x, eps = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    wanted = theirs.step(eps, 519, x).prev_sample
    torch.testing.assert_close(solvers.ddim_step(x, eps, AB[519], AB[499]), wanted, rtol=1e-4, atol=1e-4)


def test_ddim_step_takes_one_time_per_image():
    x, eps, t = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1), torch.tensor([19, 500, 999])
    batch = solvers.ddim_step(x, eps, S.at(AB, t, x), S.at(AB, t - 19, x))
    single = torch.cat([solvers.ddim_step(x[i:i + 1], eps[i:i + 1], AB[t[i]], AB[t[i] - 19]) for i in range(3)])
    torch.testing.assert_close(batch, single, rtol=1e-3, atol=1e-4)


def test_ddim_is_euler():
    x = noise(3, 5, dtype=torch.float64)
    grid = [999, 640, 333, 19]
    torch.testing.assert_close(solvers.ddim_sample(network, x, grid, AB), solvers.euler_sample(network, x, grid, AB),
                               rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('sampler, order', zip(SAMPLERS, (1, 1, 2, 2)))
def test_order_of_convergence_on_gaussian_data(sampler, order):
    N, std = 2048, .5
    tau = torch.linspace(.05, 1, N + 1, dtype=torch.float64)
    fine = (-(.1 * tau + 19.9 * tau**2 / 2)).exp()
    model = lambda x, t: S.gaussian_eps(x, fine[t[0]], std)
    x = torch.tensor([1.], dtype=torch.float64)
    spread = lambda ab: (ab * std**2 + 1 - ab).sqrt()
    exact = x * spread(fine[0]) / spread(fine[-1])
    sample = lambda n: sampler(model, x, range(N, 0, -N // n), fine, alpha_bar_end=fine[0].item())
    error = [(sample(n) - exact).abs() for n in (256, 512)]
    assert abs((error[0] / error[1]).log2() - order) < .15


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_many_steps_reach_the_gaussian_answer(sampler):
    x = noise(8, 1, dtype=torch.float64)
    torch.testing.assert_close(sampler(gauss, x, range(999, -1, -5), AB), S.gaussian_x0(x, AB[999], .5), rtol=.02,
                               atol=1e-3)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_one_step_returns_the_estimate_of_the_clean_data(sampler):
    x = noise(4, 3, dtype=torch.float64)
    t = torch.full((4,), 700)
    torch.testing.assert_close(sampler(network, x, [700], AB), S.eps_to_x0(x, network(x, t), AB[700]), rtol=1e-9,
                               atol=1e-12)


@pytest.mark.parametrize('sampler, wanted', zip(SAMPLERS, (6, 6, 11, 6)))
def test_number_of_evaluations(sampler, wanted):
    calls = []
    def count(x, t):
        assert t.shape == (len(x),) and t.dtype == torch.long
        calls.append(t); return network(x, t)
    sampler(count, noise(2, 3), solvers.dpm_timesteps(6), AB)
    assert len(calls) == wanted


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_callback_sees_every_step(sampler):
    seen = []
    last = sampler(network, noise(2, 3), [999, 500, 19], AB, callback=lambda i, t, x: seen.append((i, t, x)))
    assert [(i, t) for i, t, _ in seen] == [(0, 999), (1, 500), (2, 19)] and torch.equal(seen[-1][2], last)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_half_precision_input_is_widened_and_left_alone(sampler):
    x = noise(2, 3).half(); before = x.clone()
    assert sampler(network, x, [999, 19], AB).dtype == torch.float32 and torch.equal(x, before)


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('times, message',
                         [([19, 999], 'must descend'), ([500, 500], 'must descend'), ([1000], '0..999'),
                                            ([5, -1], '0..999'), ([], 'empty'), ([500.5], 'integer')])
def test_bad_timesteps_are_refused(sampler, times, message):
    with pytest.raises(ValueError, match=message): sampler(network, noise(2, 3), times, AB)


def test_skip_grid_is_19_39_to_999():
    assert S.skip_grid().tolist() == list(range(19, 1000, 20))


def test_disagreement_3_first_interval_is_clamped_to_zero():
    grid = S.skip_grid()
    before = (grid - 20).clamp(min=0)
    assert before[0] == 0 and torch.equal(before[1:], grid[:-1]) and AB[before[0]] == AB[0] < 1


@pytest.mark.parametrize('call, message', [
    (lambda: S.skip_grid(30), 'k is 30'), (lambda: S.skip_grid(0), 'k is 0'), (lambda: S.skip_grid(20.), 'k is 20.0'),
    (lambda: solvers.dpm_timesteps(0), 'steps is 0'), (lambda: solvers.dpm_timesteps(1000), 'steps is 1000')])
def test_bad_grids_are_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_bad_tables_and_networks_are_refused(sampler):
    with pytest.raises(ValueError, match='must decrease'): sampler(network, noise(2, 3), [500], 1 - AB)
    with pytest.raises(ValueError, match='alpha_bar_end is 0'):
        sampler(network, noise(2, 3), [500], AB, alpha_bar_end=0)
    with pytest.raises(ValueError, match='learned-variance'):
        sampler(lambda x, t: x.repeat(1, 2), noise(2, 3), [500], AB)


def tensor(values): return torch.tensor(values, dtype=torch.float64)


LINE = solvers.Mixture(tensor([.3, .7]), tensor([[-1.], [.8]]), tensor([.3, .4]))
PLANE = solvers.Mixture(tensor([.25, .25, .5]), tensor([[1., 1.], [-1., 1.], [0., -1.]]), tensor([.2, .3, .25]))


@pytest.mark.parametrize('data', [LINE, LINE.given([0]), PLANE, PLANE.given([0, 2])],
                         ids=['line', 'line|c', 'plane', 'plane|c'])
def test_mixture_noise_is_the_score_at_one_time_per_row(data):
    x, t = noise(3, data.mean.shape[1], dtype=torch.float64).requires_grad_(), torch.tensor([19, 400, 999])
    ab = S.at(AB, t, x)
    score, = torch.autograd.grad(solvers.mixture_log_prob(x, ab, data).sum(), x)
    torch.testing.assert_close(solvers.mixture_eps(x.detach(), ab, data), -(1 - ab).sqrt() * score, rtol=1e-9,
                               atol=1e-12)


def test_mixture_density_integrates_to_one_and_matches_torch():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    ours = solvers.mixture_log_prob(x[:, None], AB[300], LINE)
    assert abs(torch.trapezoid(ours.exp(), x) - 1) < 1e-9
    parts = torch.distributions.Normal(AB[300].sqrt() * LINE.mean[:, 0], (AB[300] * LINE.std**2 + 1 - AB[300]).sqrt())
    theirs = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(LINE.weight), parts).log_prob(x)
    torch.testing.assert_close(ours, theirs)


def test_mixture_mean_of_pure_noise_is_the_mean_of_the_data():
    mean = solvers.mixture_mean(noise(4, 2, dtype=torch.float64), torch.zeros(()), PLANE)
    torch.testing.assert_close(mean, (PLANE.weight @ PLANE.mean).expand(4, 2))


def test_a_caption_of_all_clusters_is_no_caption():
    x = noise(5, 2, dtype=torch.float64)
    torch.testing.assert_close(solvers.mixture_eps(x, AB[300], PLANE.given([0, 1, 2])),
                               solvers.mixture_eps(x, AB[300], PLANE))


@pytest.mark.parametrize('data', [PLANE, PLANE.given([0, 2])], ids=['unconditional', 'conditional'])
def test_exact_map_does_not_depend_on_a_stop_on_the_way(data):
    field = lambda x, ab: solvers.mixture_eps(x, ab, data)
    x = noise(4, 2, dtype=torch.float64)
    halfway = solvers.pf_ode_map(field, x, AB[999], AB[300])
    torch.testing.assert_close(solvers.pf_ode_map(field, halfway, AB[300]), solvers.pf_ode_map(field, x, AB[999]),
                               rtol=0, atol=3e-8)
    torch.testing.assert_close(solvers.pf_ode_map(field, halfway, AB[300], AB[999]), x, rtol=0, atol=1e-6)


def test_exact_map_equals_the_gaussian_closed_form():
    x = noise(6, dtype=torch.float64)
    torch.testing.assert_close(solvers.pf_ode_map(lambda x, ab: S.gaussian_eps(x, ab, .5), x, AB[999]),
                               S.gaussian_x0(x, AB[999], .5), rtol=0, atol=1e-8)


@pytest.mark.parametrize('call, message', [
    (lambda: solvers.Mixture(tensor([.5, .6]), tensor([[0.], [1.]]), tensor([1., 1.])), 'sum to one'),
    (lambda: solvers.Mixture(tensor([.5, .5]), tensor([0., 1.]), tensor([1., 1.])), r'\(K, D\)'),
    (lambda: solvers.Mixture(tensor([1.]), tensor([[0.]]), tensor([0.])), 'must have a width'),
    (lambda: solvers.mixture_eps(tensor([0., 1.]), AB[5], PLANE), r'\(B, 2\)'),
    (lambda: solvers.mixture_mean(tensor([[0., 1.]]), AB[:2], PLANE), 'use at'),
    (lambda: solvers.pf_ode_map(lambda x, ab: x, tensor([1.]), 0.), r'\(0, 1\]'),
    (lambda: solvers.pf_ode_map(lambda x, ab: torch.rand(1), tensor([1.]), .5), 'larger tol')])
def test_bad_oracles_are_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_a_wrong_schedule_is_not_cured_by_smaller_steps():
    other = S.alpha_bar_from_betas(S.scaled_linear_betas())
    model = lambda x, t: solvers.mixture_eps(x, AB[t[0]], LINE)                # knows the linear schedule
    x = tensor([[-1.], [.5], [1.]])
    exact = solvers.pf_ode_map(lambda x, ab: solvers.mixture_eps(x, ab, LINE), x, AB[999])
    error = {(name,
              k): (solvers.ddim_sample(model, x, S.skip_grid(k).flip(0), table) - exact).square().mean().sqrt().item()
             for name, table in (('right', AB), ('wrong', other)) for k in (20, 1)}
    assert error['right', 1] < error['right', 20] / 10
    assert error['wrong', 1] > error['wrong', 20] / 2 and error['wrong', 1] > 20 * error['right', 1]


def test_a_caption_for_each_row_is_the_mixture_of_its_clusters():
    x, among = noise(3, 2, dtype=torch.float64), torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]]).bool()
    together = solvers.mixture_eps(x, AB[300], PLANE, among)
    alone = [solvers.mixture_eps(x[i:i + 1], AB[300],
                                 PLANE.given(among[i].nonzero().flatten().tolist())) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize('call, message', [
    (lambda: PLANE.given([3]), 'some of 0..2'), (lambda: PLANE.given([]), 'some of 0..2'),
    (lambda: PLANE.given([-1]), 'some of 0..2'),
    (lambda: solvers.mixture_eps(tensor([[0., 1.]]), AB[5], PLANE, torch.zeros(1, 3).bool()), 'a True in each row'),
    (lambda: solvers.mixture_eps(tensor([[0., 1.]]), AB[5], PLANE, torch.ones(1, 2).bool()), r'\(1, 2\)'),
    (lambda: solvers.mixture_eps(tensor([[0., 1.]]), tensor(1.5), PLANE),
     r'\[0, 1\]'), (lambda: solvers.dpm_timesteps(4.), 'steps is 4.0')])
def test_bad_captions_and_counts_are_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_disagreement_14_the_teachers_fourteen_times_are_uniform():
    assert solvers.dpm_timesteps(14).diff().unique().tolist() in ([-72, -71], [-71, -72])
    assert len(solvers.dpm_timesteps(14)) == 14


def test_disagreement_17_latents_stay_float32_whatever_the_table():
    t = torch.tensor([19, 999])
    x = noise(2, 3)
    assert AB.dtype == torch.float64
    assert solvers.ddim_step(x, x, S.at(AB, t, x), S.at(AB, t - 19, x)).dtype == torch.float32


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_sampler_compiles_as_one_graph(sampler):
    sample = lambda x: sampler(network, x, [999, 500, 20], AB)
    compiled = torch.compile(sample, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(noise(2, 3, 4)), sample(noise(2, 3, 4)))


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_sampler_waits_for_no_value_of_the_latents(sampler):
    "On the meta device there are none to read."
    assert sampler(network, noise(2, 3).to('meta'), [999, 500, 20], AB).device.type == 'meta'


def test_counts_may_be_numpys():
    import numpy as np
    assert torch.equal(solvers.dpm_timesteps(np.int64(14)), solvers.dpm_timesteps(14))
    assert torch.equal(S.skip_grid(np.int32(20)), S.skip_grid(20)) and len(S.linear_betas(np.int64(10))) == 10
    assert torch.equal(solvers.ddim_sample(network, noise(2, 3), np.array([999, 20]), AB),
                       solvers.ddim_sample(network, noise(2, 3), [999, 20], AB))

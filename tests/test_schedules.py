"Schedules: betas, conversions, precision and the Gaussian oracle; parity with diffusers."
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from pixart_delta_nb import schedules as S

PIXART = S.alpha_bar_from_betas(S.linear_betas())
LCM = S.alpha_bar_from_betas(S.scaled_linear_betas())


def data(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('name, betas, bounds', [
    ('linear', S.linear_betas(), (1e-4, .02)), ('scaled_linear', S.scaled_linear_betas(), (.00085, .012))])
def test_schedules_equal_diffusers(name, betas, bounds):
    theirs = DDIMScheduler(beta_schedule=name, beta_start=bounds[0], beta_end=bounds[1])
    torch.testing.assert_close(betas.float(), theirs.betas, rtol=1e-5, atol=0)
    torch.testing.assert_close(S.alpha_bar_from_betas(betas).float(), theirs.alphas_cumprod, rtol=2e-4, atol=0)


def test_tables_are_float64_and_decrease():
    for table in (PIXART, LCM): assert table.dtype == torch.float64 and (table.diff() < 0).all()


def test_disagreement_2_logsnr_is_higher_first_and_lower_at_the_end():
    gap = S.log_snr(PIXART) - S.log_snr(LCM)
    assert gap[0] > 0 and gap[-1] < 0 and (gap.sign().diff() != 0).sum() == 1
    assert round(S.snr(PIXART)[-1].rsqrt().item()) == 157 and round(S.snr(LCM)[-1].rsqrt().item(), 1) == 14.6


def test_lcm_scheduler_defaults_to_the_other_schedule():
    torch.testing.assert_close(LCMScheduler().alphas_cumprod, LCM.float(), rtol=1e-4, atol=0)


def test_noise_and_velocity_equal_diffusers():
    theirs = DDIMScheduler(beta_schedule='linear', beta_start=1e-4, beta_end=.02)
    x0, eps, t = data(3, 4, 8, 8).float(), data(3, 4, 8, 8, seed=1).float(), torch.tensor([0, 400, 999])
    ab = S.at(PIXART, t, x0)
    torch.testing.assert_close(S.add_noise(x0, eps, ab), theirs.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(S.to_v(x0, eps, ab), theirs.get_velocity(x0, eps, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('back, to', [(S.eps_to_x0, 'eps'), (S.v_to_x0, 'v')])
def test_conversions_return_the_clean_data(back, to):
    x0, eps = data(5, 2, 3), data(5, 2, 3, seed=1)
    ab = S.at(PIXART, torch.tensor([0, 19, 300, 700, 999]), x0)
    given = eps if to == 'eps' else S.to_v(x0, eps, ab)
    torch.testing.assert_close(back(S.add_noise(x0, eps, ab), given, ab), x0, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('back, to', [(S.x0_to_eps, 'x0'), (S.v_to_eps, 'v')])
def test_conversions_return_the_noise(back, to):
    x0, eps = data(5, 2, 3), data(5, 2, 3, seed=1)
    ab = S.at(PIXART, torch.tensor([0, 19, 300, 700, 999]), x0)
    given = x0 if to == 'x0' else S.to_v(x0, eps, ab)
    torch.testing.assert_close(back(S.add_noise(x0, eps, ab), given, ab), eps, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('function', [S.add_noise, S.eps_to_x0, S.x0_to_eps, S.to_v, S.v_to_x0, S.v_to_eps])
@pytest.mark.parametrize('given, wanted', [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                           (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_results_are_float32_at_least(function, given, wanted):
    x = data(2, 3).to(given)
    assert function(x, x, S.at(PIXART, torch.tensor([5, 999]), x)).dtype == wanted


def test_an_error_of_the_noise_is_magnified_by_sigma_over_alpha():
    x, delta = data(4), torch.full((4,), 1e-3, dtype=torch.float64)
    shift = S.eps_to_x0(x, x + delta, PIXART[999]) - S.eps_to_x0(x, x, PIXART[999])
    torch.testing.assert_close(shift, -S.snr(PIXART[999]).rsqrt() * delta, rtol=1e-7, atol=0)


def test_half_precision_arithmetic_would_be_worse():
    x0, eps, ab = data(4096), data(4096, seed=1), PIXART[500]
    x = S.add_noise(x0, eps, ab)
    narrow = (x.half() - (1 - ab).sqrt().half() * eps.half()) / ab.sqrt().half()
    error = lambda guess: (guess.double() - x0).square().mean().sqrt()
    mixed, single = S.eps_to_x0(x.half(), eps.half(), ab), S.eps_to_x0(x.float(), eps.float(), ab)
    assert error(narrow) > error(mixed) > 100 * error(single)


def test_at_shapes_and_values():
    x, t = torch.zeros(2, 4, 3, 3), torch.tensor([7, 999])
    assert S.at(PIXART, t, x).shape == (2, 1, 1, 1)
    assert S.at(PIXART, t, x.double()).flatten().tolist() == PIXART[t].tolist()


@pytest.mark.parametrize('t, message', [(torch.tensor([-1, 3]), r'\[-1, 3\]'), (torch.tensor([1, 1000]), '1000'),
                                        (torch.tensor([1., 2.]), 'float32'), (torch.tensor([1, 2, 3]), r'\(3,\)'),
                                        (torch.tensor([]).long(), r'\(0,\)')])
def test_at_refuses(t, message):
    with pytest.raises(ValueError, match=message): S.at(PIXART, t, torch.zeros(2, 4))


@pytest.mark.parametrize('call, message', [
    (lambda: S.linear_betas(beta_start=0), 'beta_start=0'), (lambda: S.scaled_linear_betas(T=0), 'T is 0'),
    (lambda: S.alpha_bar_from_betas(torch.tensor([.5, 1.])), r'\(0, 1\)'),
    (lambda: S.alpha_bar_from_betas(torch.tensor([.5, float('nan')])), r'\(0, 1\)'),
    (lambda: S.eps_to_x0(data(3), data(3), torch.zeros(())), r'\(0, 1\]'),
    (lambda: S.x0_to_eps(data(3), data(3), torch.ones(())), 'reaches 1'),
    (lambda: S.add_noise(data(3, 3), data(3, 3), PIXART[:3]), 'broadcast'),
    (lambda: S.add_noise(data(3, 3), data(3, 3), PIXART[:2].reshape(2, 1)), 'broadcast'),
    (lambda: S.add_noise(data(3, 3), data(1, 3), PIXART[0]), 'must be equal'),
    (lambda: S.to_v(data(3), data(3), torch.tensor(1.5)),
     r'\[0, 1\]'), (lambda: S.to_v(data(3), data(3), torch.tensor(float('nan'))), r'\[0, 1\]'),
    (lambda: S.snr(torch.tensor([-.1, .5])), r'\[-0.1, 0.5\]'), (lambda: S.log_snr(torch.tensor(2.)), r'\[0, 1\]'),
    (lambda: S.continuous_alpha_bar(torch.tensor([0., 999.])), 'divide timesteps'),
    (lambda: S.continuous_alpha_bar(torch.tensor(.5), beta_start=.5, beta_end=.1), 'beta_start=0.5'),
    (lambda: S.gaussian_eps(data(3), PIXART[0], 0), 'std is 0')])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize('table, message',
                         [(S.linear_betas(), 'not betas'), (1 - PIXART, 'must decrease'),
                          (PIXART[[3, 3, 4]], 'must decrease'),
                                            (PIXART * 2, r'within \[0, 1\]'), (PIXART[None], r'\(1, 1000\)'),
                                            (PIXART[:0], r'\(0,\)')])
def test_tables_that_are_not_alpha_bar_are_refused(table, message):
    with pytest.raises(ValueError, match=message): S.check_alpha_bar(table)
    with pytest.raises(ValueError, match=message): S.at(table, torch.tensor([0]), torch.zeros(1, 4))


def test_continuous_schedule_is_the_limit_of_the_table():
    tau = torch.arange(1, 4001, dtype=torch.float64) / 4000
    fine = S.alpha_bar_from_betas(S.linear_betas(4000, 1e-4 / 4, .02 / 4))
    assert (S.log_snr(fine) - S.log_snr(S.continuous_alpha_bar(tau)))[400:].abs().max() < .02
    assert S.continuous_alpha_bar(torch.tensor(0.)) == 1


def test_velocity_survives_where_no_signal_is_left():
    x0, eps, nothing = data(4), data(4, seed=1), torch.zeros(())
    v = S.to_v(x0, eps, nothing)
    torch.testing.assert_close(v, -x0)
    torch.testing.assert_close(S.v_to_x0(S.add_noise(x0, eps, nothing), v, nothing), x0)


def test_ratios_reach_their_ends():
    ends = torch.tensor([1., 0.])
    assert S.snr(ends).tolist() == [float('inf'), 0] and S.log_snr(ends).tolist() == [float('inf'), float('-inf')]


def test_gaussian_noise_prediction_is_the_score():
    x, ab, std = data(6).requires_grad_(), PIXART[300], .4
    density = torch.distributions.Normal(0., (ab * std**2 + 1 - ab).sqrt()).log_prob(x).sum()
    score, = torch.autograd.grad(density, x)
    torch.testing.assert_close(S.gaussian_eps(x.detach(), ab, std), -(1 - ab).sqrt() * score)


def test_gaussian_map_solves_the_flow():
    "d x̄ / d σ̄ = ε: moving along the flow must not change its end."
    x_bar, std = data(6), .7
    end = lambda sigma, x_bar: S.gaussian_x0(x_bar / (1 + sigma**2).sqrt(), 1 / (1 + sigma**2), std)
    for sigma in torch.tensor([.01, 1., 50.], dtype=torch.float64):
        ab = 1 / (1 + sigma**2)
        velocity = torch.ones_like(sigma), S.gaussian_eps(ab.sqrt() * x_bar, ab, std)
        _, change = torch.func.jvp(lambda s, x: (x * std / (std**2 + s**2).sqrt()), (sigma, x_bar), velocity)
        torch.testing.assert_close(change, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(end(sigma, x_bar), x_bar * std / (std**2 + sigma**2).sqrt())


def test_gaussian_map_keeps_the_distribution():
    ab, std = PIXART[999], 2.
    x_t = (ab * std**2 + 1 - ab).sqrt() * data(1000)
    torch.testing.assert_close(S.gaussian_x0(x_t, ab, std).std(), std * data(1000).std())


def test_ground_floor_imports_neither_diffusers_nor_transformers():
    code = ('import sys, pixart_delta_nb.core, pixart_delta_nb.schedules, pixart_delta_nb.solvers; '
            'sys.exit(bool({"diffusers", "transformers"} & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


CONVERSIONS = [S.add_noise, S.eps_to_x0, S.x0_to_eps, S.to_v, S.v_to_x0, S.v_to_eps]


@pytest.mark.parametrize('function', CONVERSIONS)
def test_conversions_compile_as_one_graph_and_wait_for_no_value(function):
    x, t = data(3, 4).float(), torch.tensor([5, 500, 999])
    convert = lambda x: function(x, 2*x, S.at(PIXART, t, x))
    torch.testing.assert_close(torch.compile(convert, fullgraph=True, backend='eager')(x), convert(x))
    assert convert(x.to('meta')).shape == x.shape


def test_a_table_on_the_host_serves_times_on_a_device():
    assert S.at(PIXART, torch.tensor([5, 999], device='meta'), torch.zeros(2, 4, device='meta')).shape == (2, 1)


@pytest.mark.parametrize('times, message',
                         [([19, 999], 'must descend'), ([500, 500], 'must descend'), ([], 'empty'),
                          ([500.5], 'integer'),
                                            ([1000], r'0\.\.999'), ([5, -1], r'0\.\.999')])
def test_times_of_a_sampler_are_checked_once(times, message):
    with pytest.raises(ValueError, match=message): S.check_timesteps(times, PIXART)

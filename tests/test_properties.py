"""Properties of conversions, grids and scalings that hold for every timestep, precision and shape."""
import math

import torch
from hypothesis import given, settings, strategies as st

from pixart_delta_nb import consistency as C, core, schedules as S, solvers, toy, transformer as T
from pixart_delta_nb.lcd import pseudo_huber

AB = S.alpha_bar_from_betas(S.linear_betas())
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3)
TIMES = st.integers(0, 999)
every = settings(max_examples=50, deadline=None, derandomize=True)


def draw(seed, shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def batches(draw_):
    "Two tensors (B, ...), and one timestep for each row."
    dtype, tail, seed = draw_(DTYPES), draw_(SHAPES), draw_(st.integers(0, 2**31))
    t = torch.tensor(draw_(st.lists(TIMES, min_size=1, max_size=4)))
    a, b = (draw(seed + i, (len(t), *tail), dtype) for i in range(2))
    return a, b, t


def wide(x): return torch.promote_types(x.dtype, torch.float32)


def unit(x): return 2e-13 if x.dtype == torch.float64 else 2e-5


@every
@given(batches())
def test_conversions_invert_each_other_up_to_the_amplification(batch):
    x0, eps, t = batch
    ab = S.at(AB, t, x0)
    x_t, v = S.add_noise(x0, eps, ab), S.to_v(x0, eps, ab)
    a, s = ab.sqrt(), (1 - ab).sqrt()
    size = 1 + x0.abs().max().to(x_t) + eps.abs().max().to(x_t)
    for got, wanted, factor in ((S.eps_to_x0(x_t, eps.to(x_t), ab), x0, 1/a),
                                (S.x0_to_eps(x_t, x0.to(x_t), ab), eps, 1/s),
                                (S.v_to_x0(x_t, v, ab), x0, 1.), (S.v_to_eps(x_t, v, ab), eps, 1.)):
        assert got.dtype == wide(x0) and got.shape == x0.shape
        assert ((got - wanted.to(got)).abs() <= unit(x_t)*size*factor).all()


@every
@given(batches())
def test_velocity_and_sample_are_a_rotation_of_data_and_noise(batch):
    x0, eps, t = batch
    ab = S.at(AB, t, x0)
    before = x0.to(wide(x0))**2 + eps.to(wide(x0))**2
    after = S.add_noise(x0, eps, ab)**2 + S.to_v(x0, eps, ab)**2
    assert ((before - after).abs() <= unit(after)*(1 + before)).all()


@every
@given(batches())
def test_a_conversion_of_a_batch_is_the_conversion_of_its_rows(batch):
    x0, eps, t = batch
    whole = S.add_noise(x0, eps, S.at(AB, t, x0))
    rows = torch.cat([S.add_noise(x0[i:i+1], eps[i:i+1], S.at(AB, t[i:i+1], x0[i:i+1])) for i in range(len(t))])
    assert torch.equal(whole, rows)


@every
@given(batches(), TIMES)
def test_ddim_hops_along_a_fixed_noise_compose(batch, s):
    x0, eps, t = batch
    x0, eps, s = x0.double(), eps.double(), torch.full_like(t, s)
    ab_t, ab_s = S.at(AB, t, x0), S.at(AB, s, x0)
    hop = solvers.ddim_step(S.add_noise(x0, eps, ab_t), eps, ab_t, ab_s)
    torch.testing.assert_close(hop, S.add_noise(x0, eps, ab_s), rtol=1e-9, atol=1e-9)


@every
@given(TIMES, TIMES, st.floats(.05, 5.))
def test_the_gaussian_map_does_not_depend_on_where_the_path_is_entered(t, s, std):
    x = draw(t, (3,), torch.float64)
    spread = lambda ab: (ab*std**2 + 1 - ab).sqrt()
    torch.testing.assert_close(S.gaussian_x0(x*spread(AB[t]), AB[t], std), S.gaussian_x0(x*spread(AB[s]), AB[s], std),
                               rtol=1e-10, atol=0)


@every
@given(TIMES, st.integers(1, 3), st.integers(0, 999))
def test_the_mixture_mean_solves_the_noising_equation(t, D, seed):
    data = solvers.Mixture(torch.tensor([.4, .6]).double(), draw(seed, (2, D), torch.float64),
                           torch.tensor([.3, .5]).double())
    x = draw(seed + 1, (5, D), torch.float64)
    x0, eps = solvers.mixture_mean(x, AB[t], data), solvers.mixture_eps(x, AB[t], data)
    torch.testing.assert_close(S.add_noise(x0, eps, AB[t]), x, rtol=1e-9, atol=1e-9)


@every
@given(st.integers(1, 2000), st.floats(1e-5, .05), st.floats(1e-5, .05))
def test_every_schedule_gives_a_decreasing_table(T, a, b):
    for betas in (S.linear_betas, S.scaled_linear_betas):
        table = S.alpha_bar_from_betas(betas(T, min(a, b), max(a, b)))
        S.check_alpha_bar(table)
        assert table.shape == (T,) and math.isclose(table[0].item(), 1 - min(a, b), rel_tol=1e-9)
        torch.testing.assert_close(S.log_snr(table).exp(), S.snr(table), rtol=1e-9, atol=0)


@every
@given(st.sampled_from([k for k in range(1, 1001) if 1000 % k == 0]))
def test_the_skip_grid_ends_at_the_noisiest_time_in_equal_hops(k):
    grid = S.skip_grid(k)
    assert grid[0] == k - 1 and grid[-1] == 999 and (grid.diff() == k).all() and len(grid) == 1000//k


@every
@given(st.sampled_from([1, 2, 4, 5, 8, 10, 20, 25, 40, 50]), st.data())
def test_few_step_grids_start_at_the_noisiest_time_and_stay_on_the_skip_grid(k, data):
    grid = S.skip_grid(k)
    steps = data.draw(st.integers(1, len(grid)))
    for times in (C.lcm_timesteps(steps, k), C.released_timesteps(steps, k)):
        assert len(times) == steps and times[0] == 999 and (times.diff() < 0).all() and torch.isin(times, grid).all()


@every
@given(st.integers(1, 999))
def test_solver_times_descend_from_the_noisiest_and_leave_out_zero(steps):
    times = solvers.dpm_timesteps(steps)
    assert len(times) == steps and times[0] == 999 and times[-1] > 0 and (times.diff() < 0).all()


@every
@given(st.lists(TIMES, min_size=1, max_size=5), st.floats(.01, 5.), st.floats(.01, 100.), DTYPES)
def test_boundary_weights_are_cosine_squared_and_sine(t, sigma_data, kappa, dtype):
    c_skip, c_out = C.boundary_scalings(torch.tensor(t).to(dtype), sigma_data, kappa)
    assert c_skip.dtype == c_out.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(c_skip + c_out**2, torch.ones_like(c_skip), rtol=1e-5, atol=1e-5)
    assert ((c_skip >= 0) & (c_skip <= 1)).all()


@every
@given(batches())
def test_the_consistency_function_is_the_identity_at_zero_and_the_estimate_elsewhere(batch):
    x, eps, t = batch
    assert torch.equal(C.consistency_function(x, eps, torch.zeros_like(t), AB), x.to(wide(x)))
    c_skip, c_out = C.boundary_scalings(t.double())
    shape = (-1, *[1]*(x.ndim - 1))
    x0 = S.eps_to_x0(x.double(), eps.double(), AB[t].reshape(shape))
    wanted = c_skip.reshape(shape)*x.double() + c_out.reshape(shape)*x0
    error = (C.consistency_function(x, eps, t, AB).double() - wanted).abs()
    assert (error <= 2e-5*(1 + x.double().abs().max() + eps.double().abs().max())/AB[t].sqrt().reshape(shape)).all()


@every
@given(batches(), st.floats(0., 20.))
def test_guidance_of_equal_predictions_changes_nothing_and_s_is_one_plus_omega(batch, omega):
    a, b, _ = (y.double() for y in batch)
    torch.testing.assert_close(C.guide(a, a, omega), a)
    torch.testing.assert_close(C.guide(a, b, omega), b + (1 + omega)*(a - b), rtol=1e-9, atol=1e-9)


@every
@given(st.floats(0., 1.), st.floats(0., 1.))
def test_the_continuous_schedule_falls_from_one(a, b):
    early, late = (S.continuous_alpha_bar(torch.tensor(v, dtype=torch.float64)) for v in sorted((a, b)))
    assert 0 < late <= early <= 1


@every
@given(batches(), st.floats(1e-4, 1.))
def test_the_pseudo_huber_distance_is_symmetric_and_below_the_absolute_error(batch, c):
    a, b, _ = batch
    d = pseudo_huber(a, b, c)
    assert d.dtype == wide(a) and torch.equal(d, pseudo_huber(b, a, c))
    assert -1e-6 <= d <= (a.to(d) - b.to(d)).abs().mean() + 1e-6


@every
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), DTYPES)
def test_unpatchify_puts_each_patch_in_its_place(h, w, p, C_out, dtype):
    tokens = draw(h, (2, h*w, p*p*C_out), dtype)
    image = T.unpatchify(tokens, h*p, w*p, p)
    for i in range(h):
        for j in range(w):
            patch = tokens[:, i*w + j].reshape(2, p, p, C_out).permute(0, 3, 1, 2)
            assert torch.equal(image[:, :, i*p:(i + 1)*p, j*p:(j + 1)*p], patch)


@every
@given(st.lists(st.floats(0., 5000.), min_size=1, max_size=4), st.integers(1, 64))
def test_waves_lie_on_circles(t, half):
    waves = T.sinusoid(torch.tensor(t), 2*half)
    torch.testing.assert_close(waves[:, :half]**2 + waves[:, half:]**2, torch.ones(len(t), half), rtol=0, atol=1e-5)


@every
@given(st.integers(0, 999), st.floats(0., 8.), st.integers(0, 999))
def test_guiding_all_data_changes_nothing_and_a_caption_is_its_own_mixture(t, omega, seed):
    x, world = draw(seed, (6, 2), torch.float64), toy.ring()
    null = torch.full((6,), world.null)
    torch.testing.assert_close(toy.exact_eps(x, AB[t], null, world, omega), solvers.mixture_eps(x, AB[t], world.data))
    label = torch.arange(6) % 4
    torch.testing.assert_close(toy.exact_eps(x, AB[t], label, world)[1:2],
                               solvers.mixture_eps(x[1:2], AB[t], world.given(1)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), max_size=3),
       st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]))
def test_files_keep_every_shape_and_dtype(tmp_path_factory, shape, dtype):
    tensor = draw(0, tuple(shape), torch.float64).mul(3).to(dtype)
    back = core.load_tensors(core.save_tensors(tmp_path_factory.mktemp('t')/'t.safetensors', {'t': tensor}))['t']
    assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)

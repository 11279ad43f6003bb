"Consistency functions: boundary, closed-form maps, time grids, and diffusers' LCMScheduler."
import pytest
import torch

from pixart_delta_nb.consistency import (boundary_scalings, consistency_function, guide, guided_eps, lcm_timesteps,
                                         multistep_consistency_sample, network_dtype, pair_with_null, predict_eps,
                                         released_timesteps)
from pixart_delta_nb.schedules import add_noise, alpha_bar_from_betas, at, eps_to_x0, linear_betas, to_v

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
    x0, eps = (torch.randn(3, 4, 3, 3, generator=seeded(s)) for s in (0, 1))
    t = torch.tensor([19, 500, 999])
    x_t = add_noise(x0, eps, at(ALPHA_BAR, t, x0))
    torch.testing.assert_close(consistency_function(x_t, eps, t, ALPHA_BAR), x0, rtol=0, atol=1e-3)


def test_consistency_function_lifts_half_precision_before_dividing():
    x0, eps = (torch.randn(1, 4, 3, 3, generator=seeded(s)).half() for s in (0, 1))
    t = torch.tensor([999])
    x_t = add_noise(x0, eps, at(ALPHA_BAR, t, x0))
    out = consistency_function(x_t, eps, t, ALPHA_BAR)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x0.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize('t, match', [(torch.tensor([1000]), '0..999'), (torch.tensor([-1]), '0..999'),
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
    for t in scheduler.timesteps:
        x, denoised = scheduler.step(toy_eps(x, t.expand(2)), t, x, generator=g, return_dict=False)
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


@pytest.mark.parametrize('times, match', [([], 'empty'), ([259, 999], 'must descend'), ([999, 999], 'must descend')])
def test_sampler_refuses_times_that_do_not_descend(times, match):
    with pytest.raises(ValueError, match=match):
        multistep_consistency_sample(toy_f, torch.zeros(1, 4, 2, 2), torch.tensor(times, dtype=torch.long), ALPHA_BAR)


def test_sampler_refuses_a_wrong_number_of_generators():
    with pytest.raises(ValueError, match='1 generators were given for 2 images'):
        multistep_consistency_sample(toy_f, torch.zeros(2, 4, 2, 2), lcm_timesteps(2), ALPHA_BAR, [seeded(0)])


@pytest.mark.parametrize('times, match',
                         [([1000, 19], '0..999'), ([19, -1], '0..999'), ([500.5], 'must be an integer')])
def test_sampler_refuses_times_off_the_table(times, match):
    with pytest.raises(ValueError, match=match):
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
    (torch.zeros(2, 3), torch.zeros(2, 3), -.5, 'omega=.-0.5. must not be negative'),
    (torch.zeros(2, 3), torch.zeros(1, 3), 1., 'must be equal'),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), 'reshape it'),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, 1), 'reshape it')])
def test_guidance_refuses(c, null, omega, message):
    with pytest.raises(ValueError, match=message): guide(c, null, omega)


def test_algorithm_1_combines_increments_which_equals_a_guided_hop():
    from pixart_delta_nb.solvers import ddim_step
    x, c, null = (torch.randn(2, 4, 2, 2, generator=seeded(s), dtype=torch.float64) for s in (0, 1, 2))
    psi = lambda eps: ddim_step(x, eps, ALPHA_BAR[519], ALPHA_BAR[499]) - x
    torch.testing.assert_close(x + 5.5*psi(c) - 4.5*psi(null),
                               ddim_step(x, guide(c, null, 4.5), ALPHA_BAR[519], ALPHA_BAR[499]))


def test_sampler_takes_a_plain_list_and_refuses_a_table_that_does_not_decrease():
    x = torch.zeros(1, 4, 2, 2)
    assert torch.equal(multistep_consistency_sample(toy_f, x, [999], ALPHA_BAR), toy_f(x, torch.tensor([999])))
    with pytest.raises(ValueError, match='must decrease'): multistep_consistency_sample(toy_f, x, [999], 1 - ALPHA_BAR)


def test_disagreement_11_the_estimate_of_the_last_jump_has_no_noise(scheduler):
    scheduler.set_timesteps(2, original_inference_steps=50)
    x, g = torch.randn(1, 4, 8, 8, generator=seeded(0)), seeded(1)
    for t in scheduler.timesteps:
        x, denoised = scheduler.step(toy_eps(x, t.expand(1)), t, x, generator=g, return_dict=False)
    assert torch.equal(x, denoised)
    ours = multistep_consistency_sample(toy_f, torch.randn(1, 4, 8, 8, generator=seeded(0)), lcm_timesteps(2),
                                        ALPHA_BAR, seeded(1))
    assert (ours - denoised).abs().max() < 1e-4*denoised.abs().max()


def reads(x, t, caption, mask, size=1.):
    "A network of any number of axes that reads the words of its caption, not the padding."
    words = (caption*mask[..., None]).sum((1, 2)).reshape(-1, *[1]*(x.ndim - 1))
    return torch.tanh(x*size + words + t.reshape(words.shape)/1000)


def rows(*shape):
    "Latents, times, captions and masks of three rows, in float64."
    g = seeded(3)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([[1], [3], [5]])).long()
    return draw(3, *shape), torch.tensor([19, 500, 999]), draw(3, 5, 2), mask


@pytest.mark.parametrize('shape', [(2,), (4, 6), (4, 2, 3), (4, 2, 3, 5)], ids=str)
@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
def test_every_parametrisation_gives_the_same_noise_for_any_number_of_axes(shape, prediction):
    x, t, caption, mask = rows(*shape)
    def network(x, t, caption, mask):
        eps, ab = reads(x, t, caption, mask), at(ALPHA_BAR, t, x)
        x0 = eps_to_x0(x, eps, ab)
        answer = {'epsilon': eps, 'v_prediction': to_v(x0, eps, ab), 'sample': x0}[prediction]
        return torch.cat([answer, torch.ones_like(answer)], 1)                          # a learned variance behind it
    got = predict_eps(network, x, t, caption, mask, ALPHA_BAR, prediction)
    torch.testing.assert_close(got, reads(x, t, caption, mask), rtol=1e-9, atol=1e-9)


def test_a_prediction_without_a_name_or_a_table_is_refused():
    inputs = rows(4)
    with pytest.raises(ValueError, match="prediction is 'x0'"): predict_eps(reads, *inputs, ALPHA_BAR, 'x0')
    with pytest.raises(ValueError, match='with a table'): predict_eps(reads, *inputs, prediction='sample')
    with pytest.raises(ValueError, match='first channels'): predict_eps(lambda x, *_: x[..., :1], *rows(4, 2))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_take_the_precision_of_the_network_and_answers_are_wide(dtype):
    seen = []
    class Network(torch.nn.Module):
        def __init__(self): super().__init__(); self.linear = torch.nn.Linear(2, 4).to(dtype)
        def forward(self, x, t, caption, mask, control, size):
            seen.extend((x.dtype, caption.dtype, control.dtype, size.dtype, t.dtype))
            return x*self.linear(caption).mean((1, 2)).reshape(-1, 1, 1, 1) + control
    x, t, caption, mask = rows(4, 2, 2)
    out = predict_eps(Network(), x.float(), t, caption.float(), mask, control=x.float(), size=torch.ones(3, 2))
    assert seen == [dtype]*3 + [torch.float32, torch.int64] and out.dtype == torch.promote_types(dtype, torch.float32)


def test_a_callable_may_name_its_precision():
    def half(x, *_): return x
    half.dtype = torch.bfloat16
    assert network_dtype(half) == torch.bfloat16 and network_dtype(reads) is None


def test_null_captions_keep_their_masks_and_are_padded():
    x, t, caption, mask = rows(4)
    words, masks = pair_with_null(caption, mask, torch.ones(1, 2, 2), torch.tensor([[1, 0]]))
    assert words.shape == (6, 5, 2) and words.dtype == torch.float64 and masks[3:].tolist() == [[1, 0, 0, 0, 0]]*3
    words, masks = pair_with_null(caption[:, :1], mask[:, :1], torch.ones(1, 2, 2))
    assert words.shape == (6, 2, 2) and masks.sum(1).tolist() == [1]*3 + [2]*3


def test_a_null_caption_may_have_a_row_or_a_mask_for_each_caption():
    x, t, caption, mask = rows(4, 2)
    null, own = torch.randn(3, 7, 2,
                            generator=seeded(1)).double(), (torch.arange(7) < torch.tensor([[2], [7], [4]])).long()
    for given in (null, null[:1]):
        together = guided_eps(reads, x, t, caption, mask, given, own, 3.5)
        wanted = guide(reads(x, t, caption, mask), reads(x, t, given.expand(3, -1, -1), own), 3.5)
        torch.testing.assert_close(together, wanted)


@pytest.mark.parametrize('shape', [(2,), (4, 6), (4, 2, 3), (4, 2, 3, 5)], ids=str)
def test_guidance_in_one_call_equals_two_calls_for_any_number_of_axes(shape):
    x, t, caption, mask = rows(*shape)
    null = torch.randn(1, 1, 2, generator=seeded(1)).double()
    omega = torch.tensor([0., 1., 5.]).reshape(3, *[1]*len(shape))
    size = torch.rand(3, *[1]*len(shape), generator=seeded(2)).double()
    cond = reads(x, t, caption, mask, size)
    uncond = reads(x, t, null.expand(3, -1, -1), torch.ones(3, 1), size)
    together = guided_eps(reads, x, t, caption, mask, null, None, omega, size=size)
    torch.testing.assert_close(together, cond + omega*(cond - uncond))


def test_conditions_of_other_rows_are_refused_under_guidance():
    x, t, caption, mask = (y[:1] for y in rows(4, 2, 2))
    with pytest.raises(ValueError, match='size has 2 rows for 1 images'):
        guided_eps(reads, x, t, caption, mask, torch.ones(1, 1, 2), None, 3.5, size=torch.ones(2, 1, 1, 1))


@pytest.mark.parametrize('null, own, match',
                         [((1, 1, 5), None, 'one encoder makes both'), ((2, 1, 2), None, '3 rows of the captions'),
                                              ((1, 2, 2), (1, 1), r'null_mask \(1, 1\)'),
                          ((1, 2, 2), (2, 2), r'null_mask \(2, 2\)')])
def test_null_captions_that_do_not_fit_are_refused(null, own, match):
    _, _, caption, mask = rows(4)
    with pytest.raises(ValueError, match=match):
        pair_with_null(caption, mask, torch.ones(null), None if own is None else torch.ones(own))


def test_a_number_of_steps_may_be_numpys():
    import numpy as np
    assert torch.equal(lcm_timesteps(np.int64(4)), lcm_timesteps(4))
    assert torch.equal(released_timesteps(np.int32(5)), released_timesteps(5))


def test_one_step_of_the_sampler_compiles_whole():
    inputs, g = rows(4, 2, 2), seeded(0)
    def sample(x): return multistep_consistency_sample(lambda x, t: consistency_function(x, guided_eps(
        reads, x, t, inputs[2].float(), inputs[3], torch.ones(1, 1, 2), None, 3.5), t, ALPHA_BAR), x, [999], ALPHA_BAR)
    compiled = torch.compile(sample, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(inputs[0].float()), sample(inputs[0].float()))
    def again(x, noise):
        return consistency_function(add_noise(x, noise, at(ALPHA_BAR, inputs[1], x)), noise, inputs[1], ALPHA_BAR)
    x = inputs[0].float()
    torch.testing.assert_close(torch.compile(again, fullgraph=True, backend='eager')(x, x), again(x, x))

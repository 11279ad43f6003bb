"""Samplers against stock diffusers on a tiny random pipeline, and the rules of a request."""
import copy
from dataclasses import asdict, replace
import numpy as np
import pytest
import torch
from pixart_delta_nb.consistency import lcm_timesteps
from pixart_delta_nb.pipeline import tiny_pipeline
from pixart_delta_nb.controlnet import ControlNetTransformer
from pixart_delta_nb.sampling import (check_request, decode, generate, initial_latents, latent_shape, make_generators,
                                      sample_student, sample_teacher, to_pil)

CAPTIONS = ['a red cube on grass', ' A small blue SPHERE at night', '']
SEEDS = [11, 12, 13]
BETAS = dict(beta_start=1e-4, beta_end=0.02, beta_schedule='linear')

@pytest.fixture(scope='module')
def teacher(): return tiny_pipeline()

@pytest.fixture(scope='module')
def student(): return tiny_pipeline(omega=3.5)

def apart(a, b):
    "Largest difference relative to the largest value; random weights make large latents."
    return ((a - b).abs().max()/b.abs().max()).item()

def by_stock(pipe, scheduler, steps, guidance_scale, output_type='pt', **options):
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
    config = {k: v for k, v in asdict(pipe.transformer.config).items() if k != 'guidance_embed_dim'}
    network = PixArtTransformer2DModel(**config, cross_attention_dim=pipe.transformer.config.width)
    network.load_state_dict(pipe.transformer.state_dict())
    stock = PixArtAlphaPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, network.eval(), scheduler)
    stock.set_progress_bar_config(disable=True)
    options = dict(use_resolution_binning=False, clean_caption=False) | options
    return torch.as_tensor(stock(CAPTIONS, num_inference_steps=steps, guidance_scale=guidance_scale,
                                 generator=make_generators(SEEDS), output_type=output_type, **options).images)

@pytest.mark.parametrize('steps', [1, 4, 8])
def test_student_equals_diffusers(student, steps):
    from diffusers import LCMScheduler
    theirs = by_stock(student, LCMScheduler(**BETAS, original_inference_steps=50), steps, 1.0)
    assert (generate(student, CAPTIONS, steps, seeds=SEEDS) - theirs).abs().max() < 1e-4

@pytest.mark.parametrize('steps', [14, 20])
def test_teacher_equals_diffusers(teacher, steps):
    from diffusers import DPMSolverMultistepScheduler
    theirs = by_stock(teacher, DPMSolverMultistepScheduler(**BETAS, algorithm_type='dpmsolver++', solver_order=2),
                      steps, 4.5)
    assert (generate(teacher, CAPTIONS, steps, seeds=SEEDS) - theirs).abs().max() < 1e-4

def test_latents_equal_diffusers(student):
    from diffusers import LCMScheduler
    theirs = by_stock(student, LCMScheduler(**BETAS, original_inference_steps=50), 4, 1.0, 'latent')
    assert apart(sample_student(student, CAPTIONS, seeds=SEEDS), theirs) < 1e-4

def test_parity_would_notice_the_released_times(student):
    from diffusers import LCMScheduler
    from pixart_delta_nb.consistency import released_timesteps
    scheduler = LCMScheduler(**BETAS, original_inference_steps=50)
    steps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda n, device=None, **_: steps(timesteps=released_timesteps(n).tolist(), device=device)
    assert apart(sample_student(student, CAPTIONS, seeds=SEEDS), by_stock(student, scheduler, 4, 1.0, 'latent')) > 1e-3

def test_teacher_without_guidance_equals_diffusers(teacher):
    from diffusers import DPMSolverMultistepScheduler
    theirs = by_stock(teacher, DPMSolverMultistepScheduler(**BETAS, algorithm_type='dpmsolver++', solver_order=2), 6,
                      1.0)
    assert (generate(teacher, CAPTIONS, 6, guidance_scale=1., seeds=SEEDS) - theirs).abs().max() < 1e-4

def test_last_jump_is_returned_without_noise(student):
    seen = []
    out = sample_student(student, CAPTIONS, seeds=SEEDS, callback=lambda i, t,
                         estimate: seen.append((int(t), estimate)))
    assert [t for t, _ in seen] == lcm_timesteps(4).tolist() and torch.equal(seen[-1][1], out)

@pytest.mark.parametrize('sample', [sample_teacher, sample_student])
def test_an_image_depends_on_its_seed_alone(teacher, sample):
    whole = sample(teacher, CAPTIONS, 3, seeds=SEEDS, batch_size=3)
    assert apart(sample(teacher, CAPTIONS, 3, seeds=SEEDS, batch_size=2), whole) < 1e-4
    assert apart(sample(teacher, CAPTIONS[1:2], 3, seeds=SEEDS[1:2]), whole[1:2]) < 1e-4
    assert apart(sample(teacher, CAPTIONS, 3, seeds=[1, 2, 3]), whole) > 1e-2

def test_evaluations_agree_with_a_hook(teacher):
    rows = []
    handle = teacher.transformer.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    guided = sample_teacher(teacher, CAPTIONS, 14, batch_size=2).evaluations; by_teacher = sum(rows); rows.clear()
    plain = sample_student(teacher, CAPTIONS, 4, batch_size=2).evaluations; by_student = sum(rows); rows.clear()
    handle.remove()
    assert (guided, plain) == (28, 4) and (by_teacher, by_student) == (28*3, 4*3)

def test_sampling_leaves_the_weights_trainable(teacher):
    sample_student(teacher, CAPTIONS[:1], 1)
    out = teacher.transformer(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 2, 32))
    out.sum().backward()
    assert teacher.transformer.proj_out.weight.grad is not None
    teacher.transformer.zero_grad()

def test_global_random_state_is_left_alone(student):
    torch.manual_seed(3); before = torch.get_rng_state()
    sample_student(student, CAPTIONS, 2); tiny_pipeline()
    assert torch.equal(before, torch.get_rng_state())

def test_sizes(teacher):
    assert latent_shape(teacher, (32, 96)) == (4, 4, 12)
    assert generate(teacher, CAPTIONS[:1], 1, size=(32, 96)).shape == (1, 3, 32, 96)

def test_initial_latents_are_one_stream_an_image():
    g = make_generators([4])
    first, second = initial_latents(g, (4, 2, 2)), initial_latents(g, (4, 2, 2))
    reference = torch.Generator().manual_seed(4)
    assert torch.equal(first, torch.randn(1, 4, 2, 2, generator=reference))
    assert torch.equal(second, torch.randn(1, 4, 2, 2, generator=reference))

def test_decode_lies_in_range_and_does_not_depend_on_the_batch(teacher):
    z = 10*initial_latents([1, 2, 3], (4, 8, 8))
    images = decode(teacher, z)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.allclose(images, decode(teacher, z, batch_size=1), atol=1e-5)

def test_pictures_round_like_diffusers():
    from diffusers.image_processor import VaeImageProcessor
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(to_pil(images), theirs))

@pytest.mark.parametrize('options, words', [
    (dict(steps=0), 'steps is 0'), (dict(steps=51), '1 to 50'), (dict(guidance_scale=4.5), 'fixed omega 3.5'),
    (dict(seeds=[1]), '1 seeds were given for 3 captions'), (dict(size=72), 'use 64'),
    (dict(captions=[]), 'captions is empty'),
    (dict(captions=[1]), 'must be a string'), (dict(batch_size=0), 'batch_size is 0')])
def test_bad_requests(student, options, words):
    with pytest.raises(ValueError, match=words) as error: sample_student(student, **{'captions': CAPTIONS, **options})
    assert '\n' not in str(error.value)

def test_guidance_on_top_of_a_guided_student_is_refused(student):
    with pytest.raises(ValueError, match='load the teacher'): sample_teacher(student, CAPTIONS)

def test_decode_refuses_what_is_not_finite(teacher):
    with pytest.raises(ValueError, match='not finite'): decode(teacher, torch.full((1, 4, 8, 8), torch.nan))

def test_pictures_refuse_values_outside_the_unit_interval():
    with pytest.raises(ValueError, match='must lie in'): to_pil(torch.full((1, 3, 2, 2), 1.5))

def test_the_shipped_student_draws_the_same_in_stock_diffusers():
    from diffusers import LCMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from pixart_delta_nb.folders import shipped
    from pixart_delta_nb.pipeline import load_pipeline
    caption = 'a large red cube in front of a small blue sphere, on grass at sunset'
    noise = dict(num_inference_steps=4, guidance_scale=1.)
    transformer = PixArtTransformer2DModel.from_pretrained(shipped('student'), torch_dtype=torch.float32)
    stock = PixArtAlphaPipeline.from_pretrained(shipped('teacher'), transformer=transformer, torch_dtype=torch.float32,
                                                scheduler=LCMScheduler(**BETAS, original_inference_steps=50))
    stock.set_progress_bar_config(disable=True)
    theirs = torch.as_tensor(stock(caption, **noise, generator=make_generators([5]), output_type='np', height=128,
                                   width=128,
                                   use_resolution_binning=False, clean_caption=False).images).permute(0, 3, 1, 2)
    assert (generate(load_pipeline(student='shipped'), [caption], 4, seeds=[5]) - theirs).abs().max() < 1e-4


def test_seeds_that_are_no_whole_numbers_are_refused():
    for bad in ('a', 1.5):
        with pytest.raises(ValueError, match='a seed is a whole number'): make_generators([bad])

@pytest.mark.parametrize('size', [(100, 300), 256])
def test_a_published_model_draws_at_a_shape_of_training_and_cuts_to_the_size_asked_for(size):
    from pixart_delta_nb.hub import binned_size
    pipe = tiny_pipeline(0)
    pipe.transformer.config.sample_size = 32
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: seen.append(tuple(8*n for n in args[0].shape[-2:])))
    images = generate(pipe, 'a red cube', 1, size=size)
    assert images.shape[-2:] == (size if isinstance(size, tuple) else (size, size))
    assert seen[0] == tuple(binned_size(pipe.transformer.config, *images.shape[-2:])) and min(seen[0]) >= 100


@pytest.fixture(scope='module')
def controlled():
    "The teacher under a ControlNet whose control is felt."
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    net = ControlNetTransformer(pipe.transformer, num_copies=1).eval()
    for part in ('before_proj', 'after_proj'):
        torch.nn.init.normal_(getattr(net.adapter.controlnet_blocks[0], part).weight)
    return replace(pipe, transformer=net)


CONTROL = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize('size', [(100, 300), (256, 200)])
def test_an_image_is_resized_before_it_is_clamped_as_in_diffusers(size):
    from diffusers import LCMScheduler
    pipe = tiny_pipeline(0, omega=3.5)
    pipe.transformer.config.sample_size = 32
    pipe.vae.decoder.conv_out.weight.data *= 20                                    # overshoots at every edge
    stock = by_stock(pipe, LCMScheduler(**BETAS, original_inference_steps=50), 1, 1., use_resolution_binning=True,
                     height=size[0], width=size[1])
    ours = generate(pipe, CAPTIONS, 1, seeds=SEEDS, size=size)
    assert ours.shape[-2:] == size and ((ours == 0) | (ours == 1)).float().mean() > .1
    assert (ours - stock).abs().max() < 1e-3


@pytest.mark.parametrize('sample, scale', [(sample_teacher, 1.), (sample_teacher, 4.5), (sample_student, None)])
def test_control_belongs_to_its_image_as_a_caption_does(controlled, sample, scale):
    options = {} if scale is None else {'guidance_scale': scale}
    whole = sample(controlled, CAPTIONS, 3, seeds=SEEDS, control=CONTROL, **options)
    parts = sample(controlled, CAPTIONS, 3, seeds=SEEDS, control=CONTROL, batch_size=2, **options)
    single = sample(controlled, CAPTIONS[1:2], 3, seeds=SEEDS[1:2], control=CONTROL[1:2], **options)
    other = sample(controlled, CAPTIONS, 3, seeds=SEEDS, control=CONTROL.roll(1, 0), **options)
    assert apart(parts, whole) < 1e-4 and apart(single, whole[1:2]) < 1e-4 and apart(other, whole) > 1e-3


def test_guided_control_is_the_guided_network_in_both_halves(controlled):
    from pixart_delta_nb.consistency import predict_eps
    from pixart_delta_nb.solvers import dpm_solver_pp_2m, dpm_timesteps
    from pixart_delta_nb.text import encode_captions, null_caption
    pipe, (h, m) = controlled, encode_captions(controlled.tokenizer, controlled.text_encoder, CAPTIONS)
    null, _ = null_caption(pipe.tokenizer, pipe.text_encoder)
    def eps(x, t):
        cond, uncond = (predict_eps(pipe.transformer, x, t, c, mask, control=CONTROL, conditioning_scale=.7)
                        for c, mask in ((h, m), (null.expand(3, -1, -1), torch.ones(3, 1))))
        return uncond + 4.5*(cond - uncond)
    with torch.no_grad():
        wanted = dpm_solver_pp_2m(eps, initial_latents(SEEDS, (4, 8, 8)), dpm_timesteps(3), pipe.alpha_bar)
    ours = sample_teacher(pipe, CAPTIONS, 3, seeds=SEEDS, control=CONTROL, conditioning_scale=.7)
    assert apart(ours, wanted) < 1e-4


def test_the_scale_of_the_control_is_handed_on(controlled, teacher):
    off = sample_teacher(controlled, CAPTIONS, 3, seeds=SEEDS, control=CONTROL, conditioning_scale=0.)
    assert apart(off, sample_teacher(teacher, CAPTIONS, 3, seeds=SEEDS)) < 1e-4
    with pytest.raises(ValueError, match='conditioning_scale is nan'):
        sample_teacher(controlled, CAPTIONS, 3, control=CONTROL, conditioning_scale=float('nan'))


@pytest.mark.parametrize('control, words', [(CONTROL[:2], '2 condition pictures for 1 captions'),
                                            (CONTROL[:1, :, :4], 'of the size of the images'),
                                            (None, 'control is None')])
def test_control_that_does_not_fit_is_refused(controlled, control, words):
    for sample in (sample_teacher, sample_student):
        with pytest.raises(ValueError, match=words) as error: sample(controlled, CAPTIONS[:1], 1, control=control)
        assert '\n' not in str(error.value)


def test_control_for_a_network_that_reads_none_is_refused(teacher):
    with pytest.raises(ValueError, match='put a ControlNet around it'):
        sample_teacher(teacher, CAPTIONS, 1, control=CONTROL)


def test_generate_encodes_condition_pictures_with_its_own_autoencoder(controlled):
    pictures = 2*torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad(): encoded = controlled.vae.encode(pictures).latent_dist.mode()*controlled.scaling_factor
    wanted = decode(controlled, sample_teacher(controlled, CAPTIONS, 2, seeds=SEEDS, control=encoded))
    assert (generate(controlled, CAPTIONS, 2, seeds=SEEDS, control=pictures) - wanted).abs().max() < 1e-4


def test_condition_pictures_are_fitted_to_the_images(controlled):
    pictures = 2*torch.rand(1, 3, 90, 120, generator=torch.Generator().manual_seed(0)) - 1
    assert generate(controlled, CAPTIONS[:1], 1, control=pictures, size=(32, 96)).shape == (1, 3, 32, 96)
    with pytest.raises(ValueError, match=r'must be \(N, 3, H, W\)'):
        generate(controlled, CAPTIONS[:1], 1, control=pictures[0])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('sample', [sample_teacher, sample_student])
def test_networks_in_half_precision_are_sampled_in_float32(teacher, sample, dtype):
    half = replace(teacher, transformer=copy.deepcopy(teacher.transformer).to(dtype))
    got, wanted = (sample(p, CAPTIONS, 3, seeds=SEEDS) for p in (half, teacher))
    assert got.dtype == torch.float32 and apart(got, wanted) < .1


@pytest.mark.parametrize('seeds', [np.array([11, 12, 13]), torch.tensor([11, 12, 13]), [np.int64(11), 12, np.uint8(13)],
                                   (11, 12, 13), range(11, 14)], ids=['array', 'tensor', 'numpy', 'tuple', 'range'])
def test_seeds_of_every_kind_mean_the_same_images(student, seeds):
    assert torch.equal(sample_student(student, CAPTIONS, 2, seeds=seeds),
                       sample_student(student, CAPTIONS, 2, seeds=SEEDS))


@pytest.mark.parametrize('seed',
                         [5, np.int64(5), np.array(5), np.array([5]), torch.tensor(5),
                          torch.Generator().manual_seed(5)])
def test_one_caption_takes_one_seed_of_every_kind(student, seed):
    assert torch.equal(sample_student(student, CAPTIONS[0], 1, seeds=seed),
                       sample_student(student, CAPTIONS[:1], 1, seeds=[5]))


def test_seeds_beyond_torchs_range_are_refused_and_its_ends_work():
    make_generators([2**63, 2**64 - 1, -2**63])
    for seed in (2**64, -2**63 - 1, 10**30):
        with pytest.raises(ValueError, match='below 2..64'): make_generators([seed])


@pytest.mark.parametrize('steps', [np.int64(3), np.array(3), torch.tensor(3)], ids=['numpy', 'array', 'tensor'])
def test_steps_may_be_numpys(student, teacher, steps):
    assert torch.equal(sample_student(student, CAPTIONS, steps), sample_student(student, CAPTIONS, 3))
    assert torch.equal(sample_teacher(teacher, CAPTIONS, steps), sample_teacher(teacher, CAPTIONS, 3))


@pytest.mark.parametrize('size', [(64, 64, 64), (64,), '64', 64., (64., 64), 0, -64, (), (64, None)], ids=str)
@pytest.mark.parametrize('sample', [sample_student, generate])
def test_sizes_that_are_none_are_refused(student, sample, size):
    with pytest.raises(ValueError, match='must be one side or'): sample(student, CAPTIONS, 1, size=size)


@pytest.mark.parametrize('size', [64, np.int64(64), (64, 64), [64, 64], (np.int64(64), 64)], ids=str)
def test_sizes_of_every_kind_work(student, size):
    assert sample_student(student, CAPTIONS[:1], 1, size=size).shape == (1, 4, 8, 8)


def test_a_scale_below_one_is_refused(teacher):
    with pytest.raises(ValueError, match='guidance_scale is 0.5'): sample_teacher(teacher, CAPTIONS, guidance_scale=.5)


def test_requests_become_lists():
    assert check_request('a', 7) == (['a'], [7]) and check_request(('a', 'b'), None) == (['a', 'b'], [0, 1])

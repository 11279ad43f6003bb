"A pipeline and its folder: round trips, what a model is, stock diffusers, links, and everything that may be broken."
import json, os, shutil, subprocess, sys
import pytest, torch
from pixart_delta_nb.consistency import guided_eps
from pixart_delta_nb.data import precompute
from pixart_delta_nb.folders import fingerprint, read_card, save_card, shipped
from pixart_delta_nb.hub import Model, open_folder, read_scheduler
from pixart_delta_nb.pipeline import Pipeline, load_pipeline, save_pipeline, save_student, save_teacher, tiny_pipeline, to_diffusers
from pixart_delta_nb.sampling import generate, make_generators
from pixart_delta_nb.schedules import BETAS, alpha_bar_from_betas, alpha_bar_of, linear_betas
from pixart_delta_nb.text import encode_captions, null_caption
from pixart_delta_nb.transformer import PixArtTransformer

CAPTION = 'a red cube on grass'
SMALL = tiny_pipeline().transformer.config


pytestmark = pytest.mark.usefixtures('seeded')


@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline()


@pytest.fixture(scope='module')
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')/'model'
    save_pipeline(pipe, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved, tmp_path/'copy')


@pytest.fixture
def inputs(pipe):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, [CAPTION, 'a small blue sphere at night'])
    return x, torch.tensor([999, 19]), h, mask, *null_caption(pipe.tokenizer, pipe.text_encoder)


def stock_of(folder):
    "What somebody who knows diffusers alone opens."
    from diffusers import PixArtAlphaPipeline
    stock = PixArtAlphaPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return stock


def test_parts_are_in_evaluation_mode(pipe):
    assert not (pipe.vae.training or pipe.text_encoder.training or pipe.transformer.training)


def test_alpha_bar_is_float64():
    assert alpha_bar_of(BETAS).dtype == torch.float64 and torch.equal(alpha_bar_of(BETAS), alpha_bar_from_betas(linear_betas()))


def test_round_trip(pipe, saved, inputs):
    again = load_pipeline(saved)
    with torch.no_grad(): assert torch.equal(again.transformer(*inputs[:4]), pipe.transformer(*inputs[:4]))
    assert again.scaling_factor == .5 and torch.equal(encode_captions(again.tokenizer, again.text_encoder, CAPTION)[0], inputs[2][:1, :inputs[3][0].sum()])


def test_a_pipeline_saved_again_names_no_folder(saved, tmp_path):
    save_pipeline(load_pipeline(saved), tmp_path)
    assert not [p.name for p in tmp_path.rglob('*.json') if str(saved) in p.read_text()]


def test_stock_diffusers_samples_the_same_latents(pipe, saved, inputs):
    x, _, h, mask, null, null_mask = inputs
    stock = stock_of(saved)
    theirs = stock(CAPTION, num_inference_steps=3, guidance_scale=4.5, latents=x[:1].clone(), height=64, width=64,
                   use_resolution_binning=False, clean_caption=False, output_type='latent').images
    stock.scheduler.set_timesteps(3)
    ours = x[:1].clone()
    with torch.no_grad():
        for t in stock.scheduler.timesteps:
            eps = guided_eps(pipe.transformer, ours, t[None], h[:1], mask[:1], null, null_mask, omega=3.5)
            ours = stock.scheduler.step(eps, t, ours).prev_sample
    assert torch.allclose(ours, theirs, atol=1e-3*theirs.abs().max().item())


# What a model is, kept on every way

@pytest.mark.parametrize('omega, kind', [(None, 'DPMSolverMultistepScheduler'), (3.5, 'LCMScheduler')])
@pytest.mark.parametrize('card', [True, False])
def test_ours_to_stock_to_ours_keeps_what_the_model_is(tmp_path, omega, kind, card):
    save_pipeline(tiny_pipeline(omega=omega), tmp_path/'a')
    if not card: (tmp_path/'a/card.json').unlink()
    stock = stock_of(tmp_path/'a')
    assert type(stock.scheduler).__name__ == kind and stock.scheduler.config.beta_end == .02
    stock.save_pretrained(tmp_path/'b')
    again = load_pipeline(tmp_path/'b')                                   # stock keeps no card
    save_pipeline(again, tmp_path/'c')
    third = load_pipeline(tmp_path/'c')
    first = load_pipeline(tmp_path/'a')
    assert first.is_student == again.is_student == third.is_student == (omega is not None)
    assert first.omega == (omega if card else None)
    assert type(stock_of(tmp_path/'c').scheduler).__name__ == kind


def test_a_student_loaded_saved_and_loaded_stays_one_with_its_omega(tmp_path):
    save_pipeline(tiny_pipeline(omega=2.), tmp_path/'a')
    save_pipeline(load_pipeline(tmp_path/'a'), tmp_path/'b')
    again = load_pipeline(tmp_path/'b')
    assert again.is_student and again.omega == 2. and generate(again, CAPTION).evaluations == 4
    with pytest.raises(ValueError, match='distilled'): generate(again, CAPTION, guidance_scale=4.5)


def test_a_student_put_into_its_teachers_place_is_saved_as_one(saved, tmp_path):
    PixArtTransformer(SMALL).save_pretrained(tmp_path/'student', torch.float32)
    save_card(tmp_path/'student', omega=3.5)
    save_pipeline(load_pipeline(saved, student=tmp_path/'student'), tmp_path/'whole')
    again = load_pipeline(tmp_path/'whole')
    assert again.is_student and again.omega == 3.5 and read_scheduler(tmp_path/'whole', {})[1]


def test_a_fact_named_omega_makes_the_folder_a_students(pipe, tmp_path):
    save_pipeline(pipe, tmp_path, omega=1.5)
    again = load_pipeline(tmp_path)
    assert again.omega == 1.5 and read_scheduler(tmp_path, {})[1] and not pipe.is_student


def test_the_grid_of_a_saved_student_is_that_of_the_report(tmp_path):
    save_pipeline(tiny_pipeline(omega=3.5), tmp_path)
    scheduler = stock_of(tmp_path).scheduler
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259] and scheduler.config.original_inference_steps == 50


def test_a_student_of_another_card_is_not_described_by_the_pipelines(tmp_path):
    save_pipeline(tiny_pipeline(omega=2.), tmp_path/'pipe')
    PixArtTransformer(SMALL).save_pretrained(tmp_path/'student')
    save_card(tmp_path/'student', omega=7.)
    assert load_pipeline(tmp_path/'pipe', tmp_path/'student').omega == 7.


def test_a_network_that_embeds_omega_is_a_student(tmp_path):
    from dataclasses import replace
    pipe = tiny_pipeline()
    pipe.transformer = PixArtTransformer(replace(SMALL, guidance_embed_dim=8))
    assert pipe.is_student
    save_pipeline(pipe, tmp_path)
    assert load_pipeline(tmp_path).is_student and open_folder(tmp_path).is_student
    with pytest.raises(ValueError, match='embeds'): to_diffusers(pipe)


# Stock diffusers

@pytest.mark.parametrize('opener', ['PixArtAlphaPipeline', 'AutoPipelineForText2Image'])
def test_the_shipped_teacher_opens_in_stock_diffusers_without_a_precision(opener):
    import diffusers
    stock = getattr(diffusers, opener).from_pretrained(shipped('teacher'))
    stock.set_progress_bar_config(disable=True)
    assert {stock.vae.dtype, stock.text_encoder.dtype, stock.transformer.dtype} == {torch.float32}
    picture = stock('a red cube on grass', num_inference_steps=2, use_resolution_binning=False, output_type='pt').images
    assert torch.as_tensor(picture).isfinite().all() and picture.shape[-1] == 128


def test_card_and_readme_of_the_shipped_teacher_say_how_stock_diffusers_calls_it():
    assert 'use_resolution_binning=False' in read_card(shipped('teacher'))['use']
    text = (shipped('teacher').parent/'README.md').read_text(encoding='utf-8')
    assert 'use_resolution_binning=False' in text and 'guidance_scale=1.0' in text


@pytest.mark.parametrize('dtype', ['float16', torch.bfloat16])
def test_a_folder_in_half_precision_opens_in_stock_diffusers_on_a_cpu(pipe, tmp_path, dtype):
    save_pipeline(pipe, tmp_path, dtype)
    stock = stock_of(tmp_path)
    assert {stock.vae.dtype, stock.text_encoder.dtype, stock.transformer.dtype} == {torch.float32}
    assert torch.as_tensor(stock(CAPTION, num_inference_steps=2, use_resolution_binning=False, output_type='pt').images).isfinite().all()


def test_readme_of_a_students_folder_warns_of_a_second_guidance(tmp_path):
    save_pipeline(tiny_pipeline(omega=3.5), tmp_path)
    text = (tmp_path/'README.md').read_text(encoding='utf-8')
    assert 'guidance_scale=1.0' in text and 'ω = 3.5' in text and 'second time' in text and 'use_resolution_binning=False' in text
    assert read_card(tmp_path)['use'] in text


def test_to_diffusers_draws_the_same_pictures(pipe):
    student = tiny_pipeline(omega=3.5)
    for model, steps, call in ((pipe, 3, {'num_inference_steps': 3}), (student, 4, {})):
        stock = to_diffusers(model)
        theirs = torch.as_tensor(stock(CAPTION, generator=make_generators([5]), output_type='pt', clean_caption=False, **call).images)
        assert (generate(model, CAPTION, steps, seeds=[5]) - theirs).abs().max() < 2e-3


def test_to_diffusers_with_defaults_does_not_guide_a_student_twice():
    student, seen = tiny_pipeline(omega=3.5), []
    stock = to_diffusers(student)
    stock.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    stock(CAPTION, output_type='latent')
    assert seen == [1]*4                                                  # one row a step: no guidance
    with pytest.raises(ValueError, match='guided twice'): stock(CAPTION, guidance_scale=4.5)
    stock(CAPTION, '', 2, output_type='latent')                           # the order of stock's arguments
    assert seen == [1]*6


def test_to_diffusers_is_stock_shares_its_parts_and_can_be_saved(pipe, tmp_path):
    from diffusers import PixArtAlphaPipeline
    student = tiny_pipeline(omega=3.5)
    stock = to_diffusers(student)
    assert isinstance(stock, PixArtAlphaPipeline) and stock.vae is student.vae
    assert stock.transformer.proj_out.weight.data_ptr() == student.transformer.proj_out.weight.data_ptr()
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path/'model_index.json').read_text())['_class_name'] == 'PixArtAlphaPipeline' and load_pipeline(tmp_path).is_student


def test_an_adapter_that_is_not_merged_is_neither_handed_over_nor_saved(tmp_path):
    from pixart_delta_nb.lora import add_lora
    pipe = tiny_pipeline()
    add_lora(pipe.transformer, 2)
    with pytest.raises(ValueError, match='unknown'): to_diffusers(pipe)
    with pytest.raises(ValueError, match='merge an adapter'): save_pipeline(pipe, tmp_path/'x')


# The schedule

@pytest.mark.parametrize('changes, words', [
    ({'rescale_betas_zero_snr': True}, 'rescale_betas_zero_snr = True'), ({'prediction_type': 'v_prediction'}, 'v_prediction'),
    ({'prediction_type': 'sample'}, 'sample'), ({'trained_betas': [.1, .2]}, 'trained_betas'), ({'use_flow_sigmas': True}, 'use_flow_sigmas'),
    ({'thresholding': True}, 'thresholding'), ({'beta_schedule': 'squaredcos_cap_v2'}, 'squaredcos_cap_v2'),
    ({'_class_name': 'LCMScheduler', 'original_inference_steps': 100}, 'original_inference_steps = 100'),
    ({'_class_name': 'LCMScheduler', 'timestep_scaling': 1.}, 'timestep_scaling')])
def test_entries_that_would_change_the_table_are_refused(folder, changes, words):
    (folder/'card.json').unlink()
    edit(folder/'scheduler/scheduler_config.json', **changes)
    with pytest.raises(ValueError, match=words) as error: load_pipeline(folder)
    assert '\n' not in str(error.value)


def test_entries_that_choose_a_sampler_are_not_our_business(folder):
    (folder/'card.json').unlink()
    edit(folder/'scheduler/scheduler_config.json', use_karras_sigmas=True, timestep_spacing='trailing', solver_order=3)
    assert torch.equal(load_pipeline(folder).alpha_bar, alpha_bar_of(BETAS))


def test_another_schedule_is_carried_through_a_round_trip(pipe, tmp_path):
    betas = BETAS | {'beta_schedule': 'scaled_linear', 'beta_end': .012}
    other = Pipeline(pipe.vae, pipe.tokenizer, pipe.text_encoder, pipe.transformer, alpha_bar_of(betas), .5, {'betas': betas, 'omega': 1.})
    save_pipeline(other, tmp_path)
    assert torch.equal(load_pipeline(tmp_path).alpha_bar, other.alpha_bar) and stock_of(tmp_path).scheduler.config.beta_schedule == 'scaled_linear'


def test_a_table_that_is_not_that_of_its_betas_is_not_saved(pipe, tmp_path):
    other = Pipeline(pipe.vae, pipe.tokenizer, pipe.text_encoder, pipe.transformer, pipe.alpha_bar**2, .5)
    for call in (lambda: save_pipeline(other, tmp_path), lambda: to_diffusers(other)):
        with pytest.raises(ValueError, match='not the table of the betas'): call()


# Opening without networks, and students as links

def test_open_folder_reads_no_network(saved):
    code = f'''import sys; from pixart_delta_nb.hub import open_folder
opened = open_folder({str(saved)!r}, parts=("transformer",))
print(opened.scaling_factor, opened.is_student, *(m for m in ("diffusers", "transformers", "matplotlib", "accelerate") if m in sys.modules))'''
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.split() == ['0.5', 'False']


def test_fingerprints_of_a_folder_are_those_of_its_networks(pipe, saved):
    for dtype in ('float32', 'bfloat16', 'float16'):
        again = load_pipeline(saved, dtype=dtype)
        assert again.config['fingerprints'] == {'vae': fingerprint(again.vae), 'text_encoder': fingerprint(again.text_encoder)}
    assert open_folder(saved).config['fingerprints'] == again.config['fingerprints'] != open_folder().config['fingerprints']


def test_checksums_of_other_parts_are_left_alone(folder):
    flip(folder/'vae/diffusion_pytorch_model.safetensors')
    assert isinstance(open_folder(folder, parts=('transformer',)), Model)
    with pytest.raises(ValueError, match='SHA-256'): open_folder(folder)
    flip(folder/'transformer/diffusion_pytorch_model.safetensors')
    with pytest.raises(ValueError, match='SHA-256'): open_folder(folder, parts=('transformer',))


def test_a_student_is_saved_without_its_teachers_other_parts(saved, tmp_path):
    network = PixArtTransformer(SMALL)
    save_student(network, tmp_path/'student', like=saved, omega=2.5, steps=7)
    again = load_pipeline(tmp_path/'student')
    assert again.omega == 2.5 and again.config['card']['steps'] == 7 and torch.equal(again.transformer.proj_out.weight, network.proj_out.weight)
    for name in ('vae/diffusion_pytorch_model.safetensors', 'text_encoder/model.safetensors', 'tokenizer/tokenizer.json'):
        assert (tmp_path/'student'/name).samefile(saved/name) == name.endswith('.safetensors')      # JSON is edited in place
    assert type(stock_of(tmp_path/'student').scheduler).__name__ == 'LCMScheduler' and open_folder(saved).omega is None


def test_a_teacher_trained_further_is_saved_without_the_other_parts_and_stays_a_teacher(saved, tmp_path):
    save_teacher(PixArtTransformer(SMALL), tmp_path/'taught', like=saved, taught=7)
    again = load_pipeline(tmp_path/'taught')
    assert not again.is_student and again.omega is None and again.config['card']['taught'] == 7
    assert (tmp_path/'taught/text_encoder/model.safetensors').samefile(saved/'text_encoder/model.safetensors')
    assert type(stock_of(tmp_path/'taught').scheduler).__name__ == 'DPMSolverMultistepScheduler'
    with pytest.raises(ValueError, match='would be lost'): save_teacher(PixArtTransformer(SMALL), saved, like=saved)


def test_a_student_is_copied_where_there_are_no_links(saved, tmp_path, monkeypatch):
    def none(source, target): raise OSError('no links here')
    monkeypatch.setattr(os, 'link', none)
    save_student(PixArtTransformer(SMALL), tmp_path/'student', like=saved, omega=2.5)
    assert load_pipeline(tmp_path/'student').is_student and not (tmp_path/'student/vae/config.json').samefile(saved/'vae/config.json')


def test_saving_over_a_linked_student_leaves_the_teacher_whole(saved, tmp_path):
    save_student(PixArtTransformer(SMALL), tmp_path, like=saved, omega=2.5)
    save_pipeline(tiny_pipeline(seed=1), tmp_path)
    assert not load_pipeline(tmp_path).is_student and not load_pipeline(saved).is_student      # checksums of both


def test_a_student_cannot_replace_its_teacher(saved):
    with pytest.raises(ValueError, match='would be lost'): save_student(PixArtTransformer(SMALL), saved, like=saved, omega=1.)


def test_a_student_of_a_cached_hub_folder_links_files_not_links(saved, tmp_path):
    for path in [p for p in saved.rglob('*') if p.is_file()]:             # the hub's cache: snapshots of relative links
        blob, link = tmp_path/'blobs'/path.relative_to(saved), tmp_path/'snapshot'/path.relative_to(saved)
        blob.parent.mkdir(parents=True, exist_ok=True); link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob); link.symlink_to(os.path.relpath(blob, link.parent))
    save_student(PixArtTransformer(SMALL), tmp_path/'far/away/student', like=tmp_path/'snapshot', omega=1.)
    assert load_pipeline(tmp_path/'far/away/student').is_student


def test_written_folders_follow_the_umask(pipe, tmp_path):
    before = os.umask(0o022)
    try: save_pipeline(pipe, tmp_path/'a'); save_student(pipe.transformer, tmp_path/'b', like=tmp_path/'a', omega=1.)
    finally: os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob('*') if p.is_file()} == {0o644}


def test_stale_pieces_of_a_larger_model_do_not_win(pipe, folder):
    (folder/'text_encoder/model.safetensors.index.json').write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    save_pipeline(pipe, folder)
    assert load_pipeline(folder).scaling_factor == .5 and not list(folder.rglob('*.index.json'))


@pytest.mark.parametrize('place', ['file', 'file/below'])
def test_a_place_that_cannot_be_written_is_one_sentence(pipe, tmp_path, place):
    (tmp_path/'file').touch()
    for call in (lambda: save_pipeline(pipe, tmp_path/place), lambda: save_student(pipe.transformer, tmp_path/place, omega=1.)):
        with pytest.raises(ValueError, match='file is a file'): call()


def test_an_interrupted_save_is_recognised(pipe, folder, monkeypatch):
    def stop(*args, **options): raise KeyboardInterrupt
    monkeypatch.setattr(pipe.tokenizer, 'save_pretrained', stop)
    with pytest.raises(KeyboardInterrupt): save_pipeline(pipe, folder)
    with pytest.raises(ValueError, match='model_index.json'): load_pipeline(folder)
    assert not [p for p in folder.rglob('.*')]


# What may be broken

def test_student_replaces_the_transformer(saved, tmp_path):
    student = PixArtTransformer(SMALL)
    student.save_pretrained(tmp_path/'student', torch.float32)
    save_card(tmp_path/'student', omega=3.5)
    pipe = load_pipeline(saved, student=tmp_path/'student')
    assert torch.equal(pipe.transformer.proj_out.weight, student.proj_out.weight) and pipe.config['student_card']['omega'] == 3.5


def test_damaged_student_is_refused(saved, tmp_path):
    PixArtTransformer(SMALL).save_pretrained(tmp_path, torch.float32)
    save_card(tmp_path)
    flip(tmp_path/'diffusion_pytorch_model.safetensors')
    with pytest.raises(ValueError, match='SHA-256'): load_pipeline(saved, student=tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


def edit(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(folder, name):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder/name)
    tensors.pop(next(k for k in tensors if 'SelfAttention.q' in k))
    save_file(tensors, folder/name, {'format': 'pt'})
    (folder/'card.json').unlink()


def cut(path): path.write_bytes(path.read_bytes()[:999])


BROKEN = {
    'missing folder': (lambda f: shutil.rmtree(f), 'not a folder'),
    'no index': (lambda f: (f/'model_index.json').unlink(), 'no model_index.json'),
    'other pipeline': (lambda f: edit(f/'model_index.json', _class_name='FluxPipeline'), 'FluxPipeline'),
    'missing part': (lambda f: shutil.rmtree(f/'vae'), 'lacks its folder vae'),
    'missing weights': (lambda f: (f/'text_encoder/model.safetensors').unlink(), 'is missing'),
    'missing weights, no card': (lambda f: ((f/'text_encoder/model.safetensors').unlink(), (f/'card.json').unlink()), 'no safetensors file'),
    'truncated': (lambda f: cut(f/'vae/diffusion_pytorch_model.safetensors'), 'truncated'),
    'bit flip': (lambda f: flip(f/'transformer/diffusion_pytorch_model.safetensors'), 'SHA-256'),
    'other betas': (lambda f: edit(f/'scheduler/scheduler_config.json', beta_end=.012), 'trained with'),
    'missing tensor': (lambda f: drop_tensor(f, 'text_encoder/model.safetensors'), 'missing keys'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_folder_is_one_sentence(folder, name):
    change, words = BROKEN[name]
    change(folder)
    with pytest.raises(ValueError, match=words) as error: load_pipeline(folder)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('dtype', ['bfloat16', torch.bfloat16, {'vae': 'bfloat16', 'text_encoder': 'bfloat16', 'transformer': 'bfloat16'}])
def test_a_precision_is_a_dtype_or_its_name(saved, dtype):
    pipe = load_pipeline(saved, dtype=dtype)
    assert {pipe.vae.dtype, pipe.text_encoder.dtype, next(pipe.transformer.parameters()).dtype} == {torch.bfloat16}
    with pytest.raises(ValueError, match='floating'): load_pipeline(saved, dtype='int4')


def test_a_pipeline_and_its_latents_print_in_one_line():
    pipe = tiny_pipeline(omega=3.5)
    assert '\n' not in repr(pipe) and 'student' in repr(pipe)
    data = precompute(pipe, torch.zeros(2, 3, 64, 64), ['a red cube on grass']*2)
    assert repr(data).startswith('LatentDataset of 2 rows') and '\n' not in repr(data)

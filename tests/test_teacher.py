"Building, saving, loading and training the teacher's parts, on miniatures."
import json, shutil, subprocess, sys, warnings
import pytest, torch
from pixart_delta_nb.world.words import ATTRIBUTES, attributes, make
from pixart_delta_nb.schedules import alpha_bar_from_betas, linear_betas
from pixart_delta_nb.data import precompute
from pixart_delta_nb.folders import save_card
from pixart_delta_nb.pipeline import Pipeline, load_pipeline, save_pipeline
from pixart_delta_nb.schedules import BETAS, alpha_bar_of
from pixart_delta_nb.sampling import guided_eps
from pixart_delta_nb.teacher import drop_captions, initialise, loss_weight, train_teacher
from pixart_delta_nb.text import build_tokenizer, encode_captions, null_caption
from pixart_delta_nb.world.language import build_text_encoder
from pixart_delta_nb.world.autoencoder import build_vae, train_vae
from pixart_delta_nb.world.language import train_text_encoder
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

SMALL_VAE = dict(block_out_channels=(8,)*4, norm_num_groups=4, sample_size=64)
SMALL_T5 = dict(num_layers=1, d_model=48, num_heads=2, d_ff=64)
SMALL = TransformerConfig(num_attention_heads=3, attention_head_dim=16, num_layers=1, sample_size=8, caption_channels=48, use_additional_conditions=False)
CAPTIONS = [make(0, i)[1] for i in range(80)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def pipe():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS)
    return Pipeline(build_vae(**SMALL_VAE), tokenizer, build_text_encoder(len(tokenizer), **SMALL_T5), PixArtTransformer(SMALL), alpha_bar_of(BETAS), .7, {'betas': BETAS})


@pytest.fixture(scope='module')
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')/'model'
    save_pipeline(pipe, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path/'copy')


@pytest.fixture
def inputs(pipe):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, CAPTIONS[:2])
    return x, torch.tensor([999, 19]), h, mask, *null_caption(pipe.tokenizer, pipe.text_encoder)


def test_import_loads_neither_diffusers_nor_transformers():
    code = 'import sys, pixart_delta_nb, pixart_delta_nb.teacher; sys.exit(any(m in sys.modules for m in ("diffusers", "transformers")))'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_tokenizer_spells_unknown_words(pipe):
    assert pipe.tokenizer('')['input_ids'] == [1] and 2 not in pipe.tokenizer('quizzical zebra!')['input_ids']


def test_tokenizer_survives_saving(pipe, tmp_path):
    from transformers import T5Tokenizer
    pipe.tokenizer.save_pretrained(tmp_path)
    assert T5Tokenizer.from_pretrained(tmp_path)(CAPTIONS)['input_ids'] == pipe.tokenizer(CAPTIONS)['input_ids']


def test_case_does_not_matter(pipe):
    a, b = (encode_captions(pipe.tokenizer, pipe.text_encoder, [c])[0] for c in ('a red ball', 'A Red BALL '))
    assert torch.equal(a, b)


def test_padding_leaves_states_alone(pipe):
    h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, ['a red ball', CAPTIONS[0]])
    alone, _ = encode_captions(pipe.tokenizer, pipe.text_encoder, 'a red ball')
    assert torch.allclose(h[0][mask[0]], alone[0], atol=1e-5)


def test_truncation_quotes_what_was_cut(pipe):
    with pytest.warns(UserWarning, match='this was cut: "cube"'):
        h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, ['a small red cube'], max_length=4)
    assert mask.shape == (1, 4)


def test_long_captions_keep_120_tokens(pipe):
    with pytest.warns(UserWarning, match='120 are read'):
        assert encode_captions(pipe.tokenizer, pipe.text_encoder, ['a red cube '*60])[1].shape == (1, 120)


@pytest.mark.parametrize('bad', [[], [3], [None]])
def test_captions_must_be_strings(pipe, bad):
    with pytest.raises(ValueError, match='list of strings'): encode_captions(pipe.tokenizer, pipe.text_encoder, bad)


@pytest.mark.parametrize('s', [1., 4.5])
def test_guidance_is_the_omega_form(pipe, inputs, s):
    x, t, h, mask, null, null_mask = inputs
    with torch.no_grad():
        cond, uncond = pipe.transformer(x, t, h, mask)[:, :4], pipe.transformer(x, t, null.expand(2, -1, -1))[:, :4]
        assert torch.allclose(guided_eps(pipe.transformer, *inputs, s), s*cond - (s - 1)*uncond, atol=1e-4)


def test_parts_are_in_evaluation_mode(pipe):
    assert not (pipe.vae.training or pipe.text_encoder.training or pipe.transformer.training)


def test_alpha_bar_is_float64():
    assert alpha_bar_of(BETAS).dtype == torch.float64 and torch.equal(alpha_bar_of(BETAS), alpha_bar_from_betas(linear_betas()))


def test_round_trip(pipe, saved, inputs):
    again = load_pipeline(saved)
    with torch.no_grad(): assert torch.equal(again.transformer(*inputs[:4]), pipe.transformer(*inputs[:4]))
    assert again.scaling_factor == .7 and torch.equal(encode_captions(again.tokenizer, again.text_encoder, CAPTIONS[:2])[0], inputs[2])


def test_a_pipeline_saved_again_names_no_folder(saved, tmp_path):
    save_pipeline(load_pipeline(saved), tmp_path)
    assert not [p.name for p in tmp_path.rglob('*.json') if str(saved) in p.read_text()]


def test_stock_diffusers_samples_the_same_latents(pipe, saved, inputs):
    from diffusers import PixArtAlphaPipeline
    x, _, _, _, null, null_mask = inputs
    h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, CAPTIONS[:1])
    stock = PixArtAlphaPipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(CAPTIONS[0], num_inference_steps=3, guidance_scale=4.5, latents=x[:1].clone(), height=64, width=64,
                   use_resolution_binning=False, clean_caption=False, output_type='latent').images
    stock.scheduler.set_timesteps(3)
    ours = x[:1].clone()
    with torch.no_grad():
        for t in stock.scheduler.timesteps:
            ours = stock.scheduler.step(guided_eps(pipe.transformer, ours, t[None], h, mask, null, null_mask, 4.5), t, ours).prev_sample
    assert torch.allclose(ours, theirs, atol=1e-3*theirs.abs().max().item())


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


BROKEN = {
    'missing folder': (lambda f: shutil.rmtree(f), 'not a folder'),
    'no index': (lambda f: (f/'model_index.json').unlink(), 'no model_index.json'),
    'other pipeline': (lambda f: edit(f/'model_index.json', _class_name='FluxPipeline'), 'FluxPipeline'),
    'missing part': (lambda f: shutil.rmtree(f/'vae'), 'lacks its folder vae'),
    'missing weights': (lambda f: (f/'text_encoder/model.safetensors').unlink(), 'is missing'),
    'missing weights, no card': (lambda f: ((f/'text_encoder/model.safetensors').unlink(), (f/'card.json').unlink()), 'no safetensors file'),
    'truncated': (lambda f: (f/'vae/diffusion_pytorch_model.safetensors').write_bytes((f/'vae/diffusion_pytorch_model.safetensors').read_bytes()[:999]), 'truncated'),
    'bit flip': (lambda f: flip(f/'transformer/diffusion_pytorch_model.safetensors'), 'SHA-256'),
    'other betas': (lambda f: edit(f/'scheduler/scheduler_config.json', beta_end=.012), 'trained with'),
    'missing tensor': (lambda f: drop_tensor(f, 'text_encoder/model.safetensors'), 'missing keys'),
}


def drop_tensor(folder, name):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder/name)
    tensors.pop(next(k for k in tensors if 'SelfAttention.q' in k))
    save_file(tensors, folder/name, {'format': 'pt'})
    (folder/'card.json').unlink()


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_folder_is_one_sentence(folder, name):
    change, words = BROKEN[name]
    change(folder)
    with pytest.raises(ValueError, match=words) as error: load_pipeline(folder)
    assert '\n' not in str(error.value)


def test_loss_weight():
    ab = torch.tensor([.999, .5, 1e-4], dtype=torch.float64)
    assert torch.allclose(loss_weight(ab), .5 + ((1 - ab)/ab).clamp_max(5.))


def test_initial_network_predicts_zero(inputs):
    assert initialise(PixArtTransformer(SMALL))(*inputs[:4]).abs().max() == 0


def test_dropped_captions_are_the_null_caption(inputs):
    _, _, h, mask, null, _ = inputs
    h2, m2 = drop_captions(h, mask, null, torch.Generator().manual_seed(0), rate=1.)
    assert torch.equal(h2[:, :1], null.expand(2, -1, -1)) and m2.sum().item() == 2 and mask.sum() > 2


def test_vae_trains_and_resumes(tmp_path):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    a = train_vae(images, tmp_path/'a', 4, batch=2, vae=small_vae(), progress=False)
    train_vae(images, tmp_path/'b', 4, batch=2, vae=small_vae(), progress=False, until=2)
    b = train_vae(images, tmp_path/'b', 4, batch=2, vae=small_vae(), progress=False, resume=True)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())) and (tmp_path/'a/vae/config.json').is_file()


def small_vae():
    torch.manual_seed(0)
    return build_vae(**SMALL_VAE)


def test_text_encoder_trains(tmp_path):
    made = [make(0, i) for i in range(80)]
    labels = torch.stack([attributes(scene, unsaid) for scene, _, unsaid in made])
    log = []
    tokenizer, encoder, accuracy = train_text_encoder(CAPTIONS, labels, [len(v) for v in ATTRIBUTES.values()], tmp_path, steps=20, batch=16,
                                                      held_out=16, encoder=SMALL_T5, log_every=5, log=log.append, progress=False)
    assert log[-1]['loss'] < log[0]['loss'] and accuracy.shape == (len(ATTRIBUTES),)
    assert (tmp_path/'tokenizer').is_dir() and (tmp_path/'text_encoder/model.safetensors').is_file()


def test_position_table_has_a_rate_of_its_own(tmp_path):
    made = [make(0, i) for i in range(40)]
    labels = torch.stack([attributes(scene, unsaid) for scene, _, unsaid in made])
    kw = dict(sizes=[len(v) for v in ATTRIBUTES.values()], batch=8, held_out=8, encoder=SMALL_T5, progress=False)
    move = []
    for rate in (2e-3, 5e-2):
        encoder = train_text_encoder(CAPTIONS[:40], labels, out=tmp_path/str(rate), steps=3, position_lr=rate, **kw)[1]
        torch.manual_seed(0)
        start = build_text_encoder(encoder.config.vocab_size, **SMALL_T5)
        move.append(sum((p - q).abs().sum().item() for (n, p), q in zip(encoder.named_parameters(), start.parameters()) if 'relative' in n))
    assert move[1] > 10*move[0] > 0


def test_precompute_scales_latents(pipe, tmp_path):
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = precompute(pipe.vae, pipe.tokenizer, pipe.text_encoder, images, CAPTIONS[:5], tmp_path/'data.safetensors', batch=2)
    assert abs(data['latents'].std().item() - 1) < 1e-3 and data['latents'].shape == (5, 4, 8, 8) and (tmp_path/'data.safetensors').is_file()


def test_teacher_resumes_bit_exact(tmp_path, inputs):
    _, _, h, mask, null, _ = inputs
    data = {'latents': torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), 'captions': h, 'mask': mask, 'null': null}
    kw = dict(steps=6, config=SMALL, batch=4, progress=False)
    a = train_teacher(data, tmp_path/'a', **kw)
    train_teacher(data, tmp_path/'b', until=3, **kw)
    b = train_teacher(data, tmp_path/'b', resume=True, **kw)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_teacher_with_micro_conditions_is_told_the_sizes(tmp_path):
    from dataclasses import replace
    g = torch.Generator().manual_seed(1)
    data = {'latents': torch.randn(4, 4, 8, 8, generator=g), 'captions': torch.randn(4, 3, 48, generator=g), 'mask': torch.ones(4, 3, dtype=torch.bool), 'null': torch.zeros(1, 1, 48)}
    kw = dict(steps=3, config=replace(SMALL, use_additional_conditions=True), batch=4, progress=False)
    with pytest.raises(ValueError, match='micro-conditions'): train_teacher(data, tmp_path/'none', **kw)
    sizes = [{'resolution': torch.full((4, 2), s), 'aspect_ratio': torch.ones(4, 1)} for s in (64., 512.)]
    a, b = (train_teacher(data | s, tmp_path/str(i), **kw) for i, s in enumerate(sizes))
    moved = [n for (n, p), q in zip(a.named_parameters(), b.parameters()) if not torch.equal(p, q)]
    assert any('resolution_embedder' in n for n in moved)


def test_first_loss_is_the_mean_weight(tmp_path, inputs):
    _, _, h, mask, null, _ = inputs
    data = {'latents': torch.randn(2, 4, 8, 8), 'captions': h, 'mask': mask, 'null': null}
    log = []
    train_teacher(data, tmp_path, steps=1, config=SMALL, batch=512, log=log.append, progress=False)
    assert abs(log[0]['loss']/loss_weight(alpha_bar_of(BETAS)).mean().item() - 1) < .1

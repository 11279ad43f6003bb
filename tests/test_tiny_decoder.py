"The small decoder: what it learns, what it is saved as, and how a pipeline holds it."
import json, shutil
import pytest, torch
from pixart_delta_nb.folders import diffusers_class, read_card
from pixart_delta_nb.hub import check_folder
from pixart_delta_nb.pipeline import load_pipeline, save_decoder, save_pipeline, save_student, save_teacher, tiny_pipeline, to_diffusers, with_decoder
from pixart_delta_nb.sampling import decode, generate, make_generators
from pixart_delta_nb.tiny_decoder import SHAPE, add_decoder, build_tiny, decoder_loss, decoder_psnr, disturbed, full_pictures, train_tiny

pytestmark = pytest.mark.usefixtures('seeded')
CAPTION = 'a red cube on grass'
QUICK = dict(steps=3, batch_size=2, held=2, progress=False)


@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline()


@pytest.fixture(scope='module')
def latents(): return torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def made(pipe, latents, tmp_path_factory):
    out = tmp_path_factory.mktemp('made')
    train_tiny(latents, pipe.vae, out, **QUICK)
    return out/'vae_tiny'


@pytest.fixture(scope='module')
def model(pipe, made, tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')/'model'
    save_pipeline(with_decoder(pipe, made), folder)
    return folder


def test_it_is_small_and_fast_by_count():
    "A megabyte in half precision at most, and a sixth of the multiplications of the shipped autoencoder's decoder."
    from pixart_delta_nb.core import read_json
    from pixart_delta_nb.evidence.operations import decode_flops
    from pixart_delta_nb.folders import autoencoder_class, shipped
    with torch.device('meta'):
        full = autoencoder_class().from_config(read_json(shipped('teacher')/'vae/config.json'))
        tiny = build_tiny()
    count, found = 0, []
    for layer in tiny.decoder.modules():
        if isinstance(layer, torch.nn.Conv2d): layer.register_forward_hook(lambda m, x, y: found.append(m.weight.numel()*y[0, 0].numel()))
    tiny.decode(torch.zeros(1, 4, 16, 16, device='meta'))
    assert 2*sum(p.numel() for p in tiny.parameters()) < 1e6 and 2*sum(found) < decode_flops(full, 16)/6


def test_pictures_are_eight_times_larger_and_the_encoder_is_zero():
    tiny = build_tiny()
    assert tiny.decode(torch.zeros(2, 4, 8, 12)).sample.shape == (2, 3, 64, 96)
    assert not any(p.any() for p in tiny.encoder.parameters()) and tiny.config.scaling_factor == 1


def test_widths_that_diffusers_cannot_join_are_refused():
    with pytest.raises(ValueError, match='no layer between stages'): build_tiny(decoder_block_out_channels=(32, 16, 16, 16))


def test_loss_is_that_of_numpy(pipe, latents):
    import numpy as np
    tiny = build_tiny()
    with torch.no_grad():
        goal = pipe.vae.decode(latents[:3]/.5).sample.clamp(-1, 1)
        loss = decoder_loss(tiny, latents[:3], full_pictures(pipe.vae, latents[:3])).item()
        e = (tiny.decode(latents[:3]).sample - goal).double().numpy()
    assert abs(loss - (np.abs(e).mean() + np.abs(np.diff(e, axis=-1)).mean() + np.abs(np.diff(e, axis=-2)).mean())) < 1e-5


def test_only_the_small_one_has_gradients(pipe, latents):
    tiny = build_tiny()
    decoder_loss(tiny, latents[:2], full_pictures(pipe.vae, latents[:2])).backward()
    assert all(p.grad is not None for p in tiny.decoder.parameters()) and all(p.grad is None for p in pipe.vae.parameters())


def test_ratio_is_that_of_torchmetrics(pipe, latents):
    from torchmetrics.functional.image import peak_signal_noise_ratio
    tiny = build_tiny()
    with torch.no_grad(): mine, theirs = tiny.decode(latents).sample.clamp(-1, 1)/2 + .5, full_pictures(pipe.vae, latents)/2 + .5
    wanted = peak_signal_noise_ratio(mine, theirs, data_range=1., dim=(1, 2, 3)).item()
    assert abs(decoder_psnr(tiny, pipe.vae, latents, batch_size=5) - wanted) < 1e-3


def test_noise_is_seeded_and_of_all_strengths():
    draw = lambda: disturbed(torch.zeros(2, 4, 16, 16, dtype=torch.float16), 500, .2, torch.Generator().manual_seed(1))
    strength = draw().std((1, 2, 3))
    assert torch.equal(draw(), draw()) and draw().dtype == torch.float32
    assert strength.min() < .02 and .17 < strength.max() < .22


def test_training_brings_it_nearer_is_seeded_and_leaves_the_autoencoder(pipe, latents, tmp_path):
    before, log = {k: v.clone() for k, v in pipe.vae.state_dict().items()}, []
    options = dict(steps=60, batch_size=4, held=4, progress=False)
    first = train_tiny(latents, pipe.vae, tmp_path/'a', log=log.append, **options)
    again = train_tiny(latents, pipe.vae, tmp_path/'b', **options)
    assert [r['step'] for r in log] == [50, 60] and log[1]['loss'] < log[0]['loss']
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
    assert first.facts['psnr'] > decoder_psnr(build_tiny(), pipe.vae, latents[-4:]) and not first.training
    assert all(torch.equal(v, before[k]) for k, v in pipe.vae.state_dict().items())


@pytest.mark.parametrize('pool', [None, 5])
def test_half_precision_latents_and_bfloat16_products_train(pipe, latents, tmp_path, pool):
    tiny = train_tiny(latents.half(), pipe.vae, tmp_path, bf16=True, pool=pool, **QUICK)
    assert all(p.isfinite().all() for p in tiny.parameters())


def test_a_pool_learns_the_same_pictures(pipe, latents, tmp_path):
    options = dict(steps=60, batch_size=4, held=4, progress=False)
    anew, pooled = (train_tiny(latents, pipe.vae, tmp_path/str(pool), pool=pool, **options).facts['psnr'] for pool in (None, 64))
    assert abs(anew - pooled) < 1.5 and pooled > decoder_psnr(build_tiny(), pipe.vae, latents[-4:])


def test_training_goes_on_from_a_decoder_and_leaves_it(pipe, latents, made, tmp_path):
    start = with_decoder(pipe, made).decoder
    before = {k: v.clone() for k, v in start.state_dict().items()}
    further = train_tiny(latents, pipe.vae, tmp_path, start=start, lr=0., **QUICK)
    assert all(torch.equal(v, before[k]) and torch.equal(v, start.state_dict()[k]) for k, v in further.state_dict().items())
    assert further.facts['steps'] == 6 and with_decoder(pipe, tmp_path/'vae_tiny').decoder.facts['steps'] == 6


@pytest.mark.parametrize('change, words', [
    (dict(latents=torch.zeros(9, 3, 8, 8)), r'must be \(N, 4, h, w\)'), (dict(latents=torch.zeros(2, 4, 8, 8)), 'held out'),
    (dict(latents=torch.full((9, 4, 8, 8), float('nan'))), 'lower the learning rate')])
def test_bad_input_is_refused_in_one_sentence(pipe, tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as error: train_tiny(vae=pipe.vae, out=tmp_path, **change, **QUICK)
    assert '\n' not in str(error.value) and not (tmp_path/'vae_tiny').exists()


# In a folder

def test_the_folder_is_stock_and_its_card_says_how_it_was_made(made, recwarn, capfd):
    stock = diffusers_class('AutoencoderTiny').from_pretrained(made)
    assert stock.config.num_decoder_blocks == list(SHAPE['num_decoder_blocks']) and 'will be ignored' not in ''.join(capfd.readouterr())
    card = read_card(made)
    assert card['steps'] == 3 and card['latents'] == 10 and card['psnr'] > 0 and len(card['vae']) == 16
    assert sum(p.stat().st_size for p in made.glob('*.safetensors')) < 1e6


def test_a_model_keeps_its_decoder_on_every_way(pipe, model, made, tmp_path):
    assert read_card(model/'vae_tiny') == read_card(made) and 'vae_tiny/config.json' in read_card(model)['sha256']
    save_student(pipe.transformer, tmp_path/'student', model, 3.5)
    save_teacher(pipe.transformer, tmp_path/'teacher', model)
    save_pipeline(load_pipeline(model, decoder='tiny'), tmp_path/'again')
    for folder in (tmp_path/'student', tmp_path/'teacher', tmp_path/'again'):
        assert check_folder(folder) and load_pipeline(folder, decoder='tiny').decoder.facts['steps'] == 3
        assert 'vae_tiny' in (folder/'README.md').read_text()
    assert load_pipeline(model).decoder is None


def test_added_to_a_folder_it_is_on_the_card(pipe, made, tmp_path):
    save_pipeline(pipe, tmp_path/'model', note='kept')
    assert 'vae_tiny' not in (tmp_path/'model/README.md').read_text()
    add_decoder(with_decoder(pipe, made).decoder, tmp_path/'model')
    card = check_folder(tmp_path/'model')
    assert card['note'] == 'kept' and 'vae_tiny/config.json' in card['sha256'] and load_pipeline(tmp_path/'model', decoder='tiny').decoder


def test_what_is_missing_damaged_or_anothers_is_refused(pipe, model, made, tmp_path):
    cases = [(tmp_path/'nothing', 'holds no decoder')]
    shutil.copytree(made, tmp_path/'cut')
    weights = next((tmp_path/'cut').glob('*.safetensors'))
    weights.write_bytes(weights.read_bytes()[:-9])
    for folder, words in [*cases, (tmp_path/'cut', 'damaged')]:
        with pytest.raises(ValueError, match=words) as error: load_pipeline(model, decoder=folder)
        assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='another autoencoder'): with_decoder(tiny_pipeline(seed=1), made)
    with pytest.raises(ValueError, match="pass 'full'"): with_decoder(pipe, 'tiny')


# In a pipeline

def test_decode_uses_it_and_nothing_else_changes(pipe, made, latents):
    small = with_decoder(pipe, made)
    wanted = small.decoder.decode(latents).sample/2 + .5
    assert torch.allclose(decode(small, latents), wanted.clamp(0, 1).detach(), atol=1e-5)
    assert small.transformer is pipe.transformer and small.vae is pipe.vae and pipe.decoder is None and pipe.decoding == (pipe.vae, .5)
    full = with_decoder(small, 'full')
    assert full.decoder is None and torch.equal(decode(full, latents), decode(pipe, latents))
    with pytest.raises(ValueError, match='latents has shape'): decode(small, latents[:, :3])


def test_it_follows_the_pipeline_to_its_device_and_precision(pipe, model):
    half = load_pipeline(model, dtype='bfloat16', decoder='tiny')
    assert half.decoder.dtype == torch.bfloat16 and generate(half, CAPTION, 2).dtype == torch.float32
    assert {p.device.type for p in with_decoder(tiny_pipeline(), 'full').to('meta').vae.parameters()} == {'meta'}
    small = load_pipeline(model, decoder='tiny').to('meta')
    assert {p.device.type for p in small.decoder.parameters()} == {'meta'}


def test_stock_diffusers_draws_the_same_pictures_with_it(model):
    small = load_pipeline(model, decoder='tiny')
    stock = to_diffusers(small)
    options = dict(num_inference_steps=2, output_type='pt', clean_caption=False)
    theirs = torch.as_tensor(stock(CAPTION, generator=make_generators([5]), **options).images)
    assert stock.vae is small.decoder and (generate(small, CAPTION, 2, seeds=[5]) - theirs).abs().max() < 2e-3


def test_stock_diffusers_alone_draws_with_the_folder(model):
    from diffusers import AutoencoderTiny, PixArtAlphaPipeline
    stock = PixArtAlphaPipeline.from_pretrained(model)
    stock.vae = AutoencoderTiny.from_pretrained(model/'vae_tiny')
    stock.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=2, guidance_scale=4.5, output_type='pt', clean_caption=False, use_resolution_binning=False)
    theirs = torch.as_tensor(stock(CAPTION, generator=make_generators([5]), **options).images)
    assert (generate(load_pipeline(model, decoder='tiny'), CAPTION, 2, seeds=[5]) - theirs).abs().max() < 2e-3


def test_speed_is_timed_with_both_where_the_folder_has_one(model):
    from pixart_delta_nb.evidence.kit import Method
    from pixart_delta_nb.evidence.speed import measure_speed, tell_decoders
    teacher = load_pipeline(model)
    few = dict(methods=(Method('teacher', 2), Method('student', 1)), repeats=1)
    found = measure_speed(teacher, tiny_pipeline(omega=3.5), [CAPTION], **few)
    assert found['tiny_ratio'] > 0 and 'small decoder' in tell_decoders(found)
    for parts in found['methods'].values(): assert 0 < parts['decode_tiny'] < parts['whole_tiny']
    without = measure_speed(teacher, tiny_pipeline(omega=3.5), [CAPTION], tiny=None, **few)
    assert 'tiny_ratio' not in without and tell_decoders(without) == ''


# What it costs

def test_decibels_are_those_of_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio
    from pixart_delta_nb.evidence.decoders import decibels
    a, b = torch.rand(5, 3, 16, 16), torch.rand(5, 3, 16, 16)
    wanted = peak_signal_noise_ratio(a, b, data_range=1., dim=(1, 2, 3), reduction='none')
    assert abs(decibels(a, b).mean() - wanted.mean()) < 1e-4 and decibels(a, a).tolist() == [120.]*5


def test_the_run_compares_equal_latents_and_says_so(made, tmp_path):
    from pixart_delta_nb.evidence.decoders import run_decoders, tell_decoders_run
    from pixart_delta_nb.evidence.kit import tiny_kit
    kit = tiny_kit()
    with pytest.raises(ValueError, match='no vae_tiny'): run_decoders(kit, images=2)
    save_pipeline(kit.teacher, tmp_path/'model')
    add_decoder(train_tiny(torch.randn(4, 4, 16, 16), kit.teacher.vae, tmp_path, **QUICK), tmp_path/'model')
    kit.teacher = load_pipeline(tmp_path/'model')
    found = json.loads(json.dumps(run_decoders(kit, images=2, steps=1, batch_sizes=(1, 2), repeats=1, shown=1)))
    assert [r['decoder'] for r in found['rows']] == ['autoencoder', 'small decoder'] and set(found['seconds']) == {'1', '2'}
    assert '2 pictures' in tell_decoders_run(found) and found['figure'] == 'decoders' and kit.student.decoder is None


def test_the_command_distils_a_folder_with_its_latents(model, tmp_path, capsys):
    from pixart_delta_nb import cli
    from pixart_delta_nb.data import save_latents
    from pixart_delta_nb.latents import LatentDataset
    g = torch.Generator().manual_seed(0)
    rows = LatentDataset(torch.randn(70, 4, 8, 8, generator=g), torch.zeros(70, 2, 32), torch.ones(70, 2), torch.zeros(1, 1, 32))
    save_latents(rows, tmp_path/'latents.safetensors')
    cli.main([str(w) for w in ('train-decoder', '--pipeline', model, '--latents', tmp_path/'latents.safetensors', '--out', tmp_path/'out',
                               '--steps', 2, '--batch-size', 2)])
    assert str(tmp_path/'out/vae_tiny') in capsys.readouterr().out.replace('\n', '') and read_card(tmp_path/'out/vae_tiny')['latents'] == 6
    assert load_pipeline(model, decoder=tmp_path/'out/vae_tiny').decoder.facts['steps'] == 2

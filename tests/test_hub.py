"Folders in exactly the published format, of every size and with every twist: pieces, variants, old names, an old vocabulary."
import json, os, shutil, struct, subprocess, sys
from pathlib import Path
import pytest, torch
from pixart_delta_nb.folders import fingerprint, fingerprint_of, read_weights, variant_of, weight_files
from pixart_delta_nb.hub import binned_size, choose_dtype, local_folder, part_map, placement, resize_and_crop
from pixart_delta_nb.text import read_sentencepiece, read_tokenizer
from pixart_delta_nb.int8 import low_memory_pipeline
from pixart_delta_nb.sampling import generate, initial_latents, sample_teacher
from pixart_delta_nb.pipeline import load_pipeline
from pixart_delta_nb.schedules import BETAS
from pixart_delta_nb.text import encode_captions
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

CAPTION = 'a red cube'
WORDS = [('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.), ('▁a', -2.), ('▁red', -4.), ('▁cube', -4.), ('▁', -5.)] + [(c, -8.) for c in 'abcdefghijklmnopqrstuvwxyz']
#: The published transformer/config.json, but for the sizes: an old class name, keys without meaning for PixArt, none of the younger ones.
OLD = {'_class_name': 'Transformer2DModel', '_diffusers_version': '0.22.0.dev0', 'activation_fn': 'gelu-approximate', 'attention_bias': True, 'attention_type': 'default',
       'double_self_attention': False, 'dropout': 0.0, 'in_channels': 4, 'norm_elementwise_affine': False, 'norm_eps': 1e-06, 'norm_num_groups': 32, 'norm_type': 'ada_norm_single',
       'num_embeds_ada_norm': 1000, 'num_vector_embeds': None, 'only_cross_attention': False, 'out_channels': 8, 'patch_size': 2, 'upcast_attention': False, 'use_linear_projection': False}
SHAPE = {'num_attention_heads': 2, 'attention_head_dim': 12, 'num_layers': 1, 'caption_channels': 48, 'cross_attention_dim': 24}


pytestmark = pytest.mark.usefixtures('seeded')


def varint(n): return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)
def field(number, data): return varint(8*number + 2) + varint(len(data)) + data


def spiece(words):
    pieces = (field(1, field(1, w.encode()) + varint(8*2 + 5) + struct.pack('<f', p) + (varint(8*3) + varint(3))*(i < 3)) for i, (w, p) in enumerate(words))
    return b''.join(pieces) + field(2, varint(8*3) + varint(1) + varint(8*41) + b'\xff'*9 + b'\x01') + field(3, field(1, b'identity'))


def published(folder, side=32, lcm=False, pieces=True):
    "A miniature PixArt as the hub stores it: no card, the text encoder in pieces, the tokenizer as spiece.model."
    import diffusers
    net = PixArtTransformer(TransformerConfig(sample_size=side, **{k: v for k, v in SHAPE.items() if k != 'cross_attention_dim'}))
    net.save_pretrained(folder/'transformer', torch.float32)
    (folder/'transformer/config.json').write_text(json.dumps(OLD | SHAPE | {'sample_size': side}))
    from transformers import T5Config, T5EncoderModel
    T5EncoderModel(T5Config(vocab_size=128, d_model=48, d_kv=12, num_heads=2, d_ff=64, num_layers=1, feed_forward_proj='gated-gelu', is_encoder_decoder=False,
                            tie_word_embeddings=False)).save_pretrained(folder/'text_encoder', max_shard_size='20KB' if pieces else '1GB')
    diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, layers_per_block=1,
                            norm_num_groups=4, latent_channels=4, sample_size=128, mid_block_add_attention=False).save_pretrained(folder/'vae')
    kind = diffusers.LCMScheduler if lcm else diffusers.DPMSolverMultistepScheduler
    kind(**BETAS).save_pretrained(folder/'scheduler')
    (folder/'tokenizer').mkdir()
    (folder/'tokenizer/spiece.model').write_bytes(spiece(WORDS))
    (folder/'tokenizer/tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>', 'extra_ids': 100, 'model_max_length': 120, 'pad_token': '<pad>', 'tokenizer_class': 'T5Tokenizer'}))
    parts = {'scheduler': ['diffusers', kind.__name__], 'text_encoder': ['transformers', 'T5EncoderModel'], 'tokenizer': ['transformers', 'T5Tokenizer'],
             'transformer': ['diffusers', 'Transformer2DModel'], 'vae': ['diffusers', 'AutoencoderKL']}
    (folder/'model_index.json').write_text(json.dumps({'_class_name': 'PixArtAlphaPipeline', '_diffusers_version': '0.22.0.dev0'} | parts))
    return folder


@pytest.fixture
def folder(tmp_path): return published(tmp_path/'model')


def test_the_text_encoder_is_in_pieces(folder):
    assert len(list((folder/'text_encoder').glob('model-*-of-*.safetensors'))) > 1 and (folder/'text_encoder/model.safetensors.index.json').is_file()


@pytest.mark.parametrize('side, told', [(32, False), (64, False), (128, True)])
def test_every_published_size_opens_and_draws_as_diffusers_does(tmp_path, side, told):
    from diffusers import PixArtAlphaPipeline
    folder, size = published(tmp_path/'model', side), (5*side + 4, 4*side)
    pipe = load_pipeline(folder)
    assert pipe.transformer.config.use_additional_conditions == told and pipe.transformer.config.interpolation_scale == max(side//64, 1)
    stock = PixArtAlphaPipeline.from_pretrained(folder, tokenizer=pipe.tokenizer)     # its own reader of spiece.model needs another library
    stock.set_progress_bar_config(disable=True)
    shape = binned_size(pipe.transformer.config, *size)
    noise = initial_latents([0], (4, shape[0]//8, shape[1]//8))
    theirs = stock(CAPTION, num_inference_steps=2, guidance_scale=4.5, height=size[0], width=size[1], clean_caption=False, output_type='latent', latents=noise).images
    ours = sample_teacher(pipe, CAPTION, 2, 4.5, seeds=[0], size=shape)
    assert shape != size and ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-3*theirs.abs().max().item())
    assert resize_and_crop(torch.zeros(1, 3, *shape), *size).shape == (1, 3, *size)


def test_a_folder_with_an_lcm_scheduler_is_a_student(tmp_path):
    student, teacher = load_pipeline(published(tmp_path/'lcm', lcm=True)), load_pipeline(published(tmp_path/'alpha'))
    assert student.is_student and not teacher.is_student and torch.equal(student.alpha_bar, teacher.alpha_bar)
    assert generate(student, CAPTION, size=64).evaluations == 4
    with pytest.raises(ValueError, match='distilled'): sample_teacher(student, CAPTION, guidance_scale=4.5, size=64)


@pytest.mark.parametrize('lcm, last', [(False, 4.04e-5), (True, 4.66e-3)])
def test_betas_that_a_scheduler_leaves_out_are_its_classs(tmp_path, lcm, last):
    folder = published(tmp_path/'model', lcm=lcm)
    path = folder/'scheduler/scheduler_config.json'
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if 'beta' not in k}))
    assert load_pipeline(folder).alpha_bar[-1].item() == pytest.approx(last, rel=.01)


def test_half_precision_copies_under_a_variants_name(folder, tmp_path):
    exact, other = load_pipeline(folder), tmp_path/'fp16'
    shutil.copytree(folder, other)
    for path in [*other.rglob('*.safetensors')]: path.unlink()
    (other/'text_encoder/model.safetensors.index.json').unlink()
    from safetensors.torch import save_file
    for name, part, stem in (('transformer', exact.transformer, 'diffusion_pytorch_model'), ('vae', exact.vae, 'diffusion_pytorch_model'), ('text_encoder', exact.text_encoder, 'model')):
        save_file({k: v.half().contiguous() for k, v in part.state_dict().items() if k != 'encoder.embed_tokens.weight'}, other/name/f'{stem}.fp16.safetensors', {'format': 'pt'})
    again = load_pipeline(other)
    assert variant_of(other/'vae') == variant_of(other/'text_encoder') == variant_of(other/'transformer') == 'fp16'
    for part in ('transformer', 'vae', 'text_encoder'):
        for a, b in zip(getattr(exact, part).parameters(), getattr(again, part).parameters()): assert b.dtype == torch.float32 and torch.equal(a.half().float(), b)


def test_a_variant_in_pieces(folder):
    part = folder/'transformer'
    exact = PixArtTransformer.from_pretrained(part)
    from safetensors.torch import load_file, save_file
    state = load_file(part/'diffusion_pytorch_model.safetensors')
    (part/'diffusion_pytorch_model.safetensors').unlink()
    for i, names in enumerate((list(state)[:9], list(state)[9:]), 1): save_file({k: state[k] for k in names}, part/f'diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors')
    again = PixArtTransformer.from_pretrained(part, torch.bfloat16)
    assert all(torch.equal(p.bfloat16(), again.state_dict()[k]) for k, p in exact.state_dict().items())
    (part/'diffusion_pytorch_model.fp16-00002-of-00002.safetensors').unlink()
    with pytest.raises(ValueError, match='lack'): PixArtTransformer.from_pretrained(part)


def test_an_index_of_a_variant_is_read(folder):
    part = folder/'transformer'
    exact = read_weights(part)
    from safetensors.torch import save_file
    (part/'diffusion_pytorch_model.safetensors').unlink()
    names = [list(exact)[:9], list(exact)[9:]]
    for i, some in enumerate(names, 1): save_file({k: exact[k] for k in some}, part/f'diffusion_pytorch_model.bf16-0000{i}-of-00002.safetensors')
    where = {k: f'diffusion_pytorch_model.bf16-0000{i}-of-00002.safetensors' for i, some in enumerate(names, 1) for k in some}
    (part/'diffusion_pytorch_model.safetensors.index.bf16.json').write_text(json.dumps({'weight_map': where}))
    assert len(weight_files(part)) == 2 and all(torch.equal(v, exact[k]) for k, v in read_weights(part).items())
    (part/'diffusion_pytorch_model.safetensors.index.bf16.json').write_text(json.dumps({'weight_map': where | {'x': '../elsewhere.safetensors'}}))
    with pytest.raises(ValueError, match='outside its folder'): read_weights(part)


def test_a_controlnet_opens_under_a_variants_name(tmp_path):
    from pixart_delta_nb.controlnet import load_controlnet
    from pixart_delta_nb.folders import shipped
    shutil.copy(shipped('controlnet')/'config.json', tmp_path)
    shutil.copy(shipped('controlnet')/'diffusion_pytorch_model.safetensors', tmp_path/'diffusion_pytorch_model.fp16.safetensors')
    base = PixArtTransformer.from_pretrained(shipped('teacher')/'transformer')
    one, two = (load_controlnet(f, base).adapter.state_dict() for f in (tmp_path, shipped('controlnet')))
    assert all(torch.equal(one[k], v) for k, v in two.items())


@pytest.mark.parametrize('pieces', [True, False])
def test_fingerprints_survive_pieces_variants_and_precisions(tmp_path, pieces):
    folder = published(tmp_path/'model', pieces=pieces)
    wanted = fingerprint_of(folder/'text_encoder')
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipe = load_pipeline(folder, dtype=dtype)
        assert fingerprint(pipe.text_encoder) == wanted and fingerprint(pipe.vae) == fingerprint_of(folder/'vae') != wanted
    with torch.no_grad(): next(pipe.text_encoder.parameters()).view(-1)[:8].neg_()
    assert fingerprint(pipe.text_encoder) != wanted


def test_a_fingerprint_reads_little(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    save_file({'a': torch.randn(4000, 3000), 'b': torch.randn(())}, tmp_path/'model.safetensors')
    asked = []
    import pixart_delta_nb.folders as folders
    monkeypatch.setattr(folders, '_digest', lambda pairs: asked.extend(start.numel() for _, start in pairs))
    fingerprint_of(tmp_path)
    assert sorted(asked) == [1, 1024]


def test_a_fingerprint_notices_a_little_training():
    network = PixArtTransformer(TransformerConfig(sample_size=32, **{k: v for k, v in SHAPE.items() if k != 'cross_attention_dim'} | {'num_attention_heads': 8}))
    before = fingerprint(network)
    with torch.no_grad():
        for p in network.parameters(): p.add_(torch.randn(p.shape)*p.abs().mean()*1e-3)
    assert fingerprint(network) != before


def test_a_missing_piece_is_named(folder):
    next(folder.glob('text_encoder/model-00002-of-*')).unlink()
    with pytest.raises(ValueError, match='model-00002-of-') as error: load_pipeline(folder)
    assert '\n' not in str(error.value)


def test_float16_at_load_time_keeps_what_would_overflow(folder):
    half = load_pipeline(folder, dtype=torch.float16).text_encoder
    assert half.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32 and half.shared.weight.dtype == torch.float16


def test_maps_of_precisions_and_devices(folder):
    pipe = load_pipeline(folder, dtype={'text_encoder': torch.bfloat16}, device={'transformer': 'cpu'})
    assert (pipe.text_encoder.dtype, pipe.vae.dtype, next(pipe.transformer.parameters()).dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert generate(pipe, CAPTION, 1, size=64).isfinite().all()
    with pytest.raises(ValueError, match='unet'): part_map({'unet': 'cpu'})
    with pytest.raises(ValueError, match='cpu and cuda.*mps'): load_pipeline(folder, device='mps')


def test_a_gpu_without_bfloat16_gets_float16_and_refuses_the_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for has, default in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: has)
        assert placement('cuda')['transformer'] == (torch.device('cuda'), default) and placement({'vae': 'cuda'})['text_encoder'][1] == torch.float32
    with pytest.raises(ValueError, match='does not multiply in it'): placement('cuda', torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a CUDA device')
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match='sees no CUDA device'): placement('cuda')
    with pytest.raises(ValueError, match='natively'): choose_dtype('cpu', 'float8')


def test_eight_bits_open_the_published_format(folder):
    pytest.importorskip('bitsandbytes', reason='8-bit loading needs bitsandbytes')
    pipe = low_memory_pipeline([CAPTION], folder, dtype=torch.float32)
    assert generate(pipe, CAPTION, 1, size=64).isfinite().all() and encode_captions(pipe.tokenizer, pipe.text_encoder, CAPTION)[1].sum() == 4


def test_vocabulary_of_a_spiece_model(folder):
    vocab, table = read_sentencepiece(folder/'tokenizer/spiece.model')
    assert table == b'' and [(w, round(p, 3)) for w, p in vocab] == WORDS
    tokenizer = read_tokenizer(folder/'tokenizer')
    assert tokenizer.convert_ids_to_tokens(tokenizer('a red cube bed')['input_ids']) == ['▁a', '▁red', '▁cube', '▁', 'b', 'e', 'd', '</s>'] and tokenizer('')['input_ids'] == [1]
    (folder/'tokenizer/spiece.model').write_bytes(b'\xff')
    with pytest.raises(ValueError, match='tokenizer'): load_pipeline(folder)


def test_hub_id_without_a_network_says_what_to_fetch_and_where_to_put_it(monkeypatch):
    def unreachable(name, allow_patterns): raise ConnectionError(f'{name} is far away')
    monkeypatch.setattr('huggingface_hub.snapshot_download', unreachable)
    with pytest.raises(ValueError) as error: load_pipeline('PixArt-alpha/PixArt-LCM-XL-2-1024-MS')
    said = str(error.value)
    assert 'hf download PixArt-alpha/PixArt-LCM-XL-2-1024-MS' in said and '--local-dir PixArt-LCM-XL-2-1024-MS' in said and '\n' not in said


def test_hub_id_in_the_cache_opens_without_a_network(folder, tmp_path):
    cache, commit = tmp_path/'cache', 'a'*40
    repository = cache/'models--someone--tiny'
    shutil.copytree(folder, repository/'snapshots'/commit)
    (repository/'refs').mkdir()
    (repository/'refs/main').write_text(commit)
    code = 'import sys; from pixart_delta_nb.pipeline import load_pipeline; print(load_pipeline("someone/tiny").config["folder"])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'HF_HUB_CACHE': str(cache), 'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 0, done.stderr[-1500:]
    assert Path(done.stdout.strip()) == repository/'snapshots'/commit


def test_a_folder_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'owner/model').mkdir(parents=True)
    assert local_folder('owner/model') == Path('owner/model')


@pytest.mark.parametrize('change, said', [
    (lambda f: (f/'transformer/config.json').write_text(json.dumps(OLD | SHAPE | {'sample_size': 32, '_class_name': 'FluxTransformer2DModel'})), 'FluxTransformer2DModel'),
    (lambda f: (f/'model_index.json').write_text('{"_class_name": "StableDiffusionPipeline"}'), 'StableDiffusionPipeline'),
    (lambda f: (f/'transformer/config.json').write_text(json.dumps(OLD | SHAPE | {'sample_size': 32, 'norm_type': 'layer_norm'})), 'layer_norm'),
    (lambda f: edit(f/'scheduler/scheduler_config.json', prediction_type='v_prediction'), 'v_prediction')])
def test_another_architecture_is_one_sentence(folder, change, said):
    change(folder)
    with pytest.raises(ValueError, match=said) as error: load_pipeline(folder)
    assert '\n' not in str(error.value)


def edit(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shapes_need_a_published_table():
    with pytest.raises(ValueError, match='tables for 256'): binned_size(TransformerConfig(sample_size=16), 9, 9)
    with pytest.raises(ValueError, match='positive'): binned_size(TransformerConfig(sample_size=32), 0, 9)

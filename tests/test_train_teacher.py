"The teacher's loss, its initial network, and its training loop."
import pytest, torch
from pixart_delta_nb.data import precompute
from pixart_delta_nb.schedules import BETAS, alpha_bar_of
from pixart_delta_nb.pipeline import Pipeline
from pixart_delta_nb.teacher import drop_captions, initialise, loss_weight, train_teacher
from pixart_delta_nb.text import build_tokenizer, encode_captions, null_caption
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig
from pixart_delta_nb.world.autoencoder import build_vae
from pixart_delta_nb.world.language import build_text_encoder
from pixart_delta_nb.world.words import make

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


@pytest.fixture
def inputs(pipe):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, CAPTIONS[:2])
    return x, torch.tensor([999, 19]), h, mask, *null_caption(pipe.tokenizer, pipe.text_encoder)


def test_loss_weight():
    ab = torch.tensor([.999, .5, 1e-4], dtype=torch.float64)
    assert torch.allclose(loss_weight(ab), .5 + ((1 - ab)/ab).clamp_max(5.))


def test_initial_network_predicts_zero(inputs):
    assert initialise(PixArtTransformer(SMALL))(*inputs[:4]).abs().max() == 0


def test_dropped_captions_are_the_null_caption(inputs):
    _, _, h, mask, null, _ = inputs
    h2, m2 = drop_captions(h, mask, null, torch.Generator().manual_seed(0), rate=1.)
    assert torch.equal(h2[:, :1], null.expand(2, -1, -1)) and m2.sum().item() == 2 and mask.sum() > 2


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

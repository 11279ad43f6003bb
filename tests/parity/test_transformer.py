"""The from-scratch transformer against diffusers': outputs, state dicts, shapes, folders, and what it refuses."""
import inspect
import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_delta_nb.core import load_tensors, save_tensors
from pixart_delta_nb.folders import INDEX, WEIGHTS
from pixart_delta_nb.transformer import (PixArtTransformer, TransformerConfig, caption_bias, config_from_dict,
    config_to_dict, position_embedding, sinusoid, unpatchify)

SMALL = dict(num_attention_heads=4, attention_head_dim=12, num_layers=2, caption_channels=24)


def pair(sample_size=16, micro=False, seed=0):
    "The same random weights in diffusers' class and in ours."
    torch.manual_seed(seed)
    size = dict(sample_size=sample_size, use_additional_conditions=micro, **SMALL)
    theirs = PixArtTransformer2DModel(cross_attention_dim=48, **size).eval()
    ours = PixArtTransformer(TransformerConfig(**size)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(shape=(16, 24), seed=1):
    "Latents, times, captions, mask, resolution and aspect ratio of three images."
    torch.manual_seed(seed)
    mask = torch.tensor([3, 7, 1])[:, None].gt(torch.arange(7)).long()
    return (torch.randn(3, 4, *shape), torch.tensor([0, 19, 999]), torch.randn(3, 7, 24), mask,
            torch.tensor([[128., 128], [256, 64], [512, 512]]), torch.tensor([[1.], [4], [1]]))


def call(theirs, z, t, c, mask, r, a):
    return theirs(z, encoder_hidden_states=c, timestep=t, encoder_attention_mask=mask,
                  added_cond_kwargs={'resolution': r, 'aspect_ratio': a}).sample


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return PixArtTransformer(TransformerConfig(sample_size=16, **SMALL)).eval()


@torch.no_grad()
@pytest.mark.parametrize('shape', [(16, 16), (16, 24), (32, 8)], ids=str)
@pytest.mark.parametrize('masked', [False, True], ids=['unmasked', 'masked'])
@pytest.mark.parametrize('sample_size, micro', [(16, False), (128, True), (128, False), (64, True)])
def test_output_equals_diffusers(sample_size, micro, masked, shape):
    theirs, ours = pair(sample_size, micro)
    z, t, c, mask, r, a = inputs(shape)
    mask, r, a = mask if masked else None, r if micro else None, a if micro else None
    torch.testing.assert_close(ours(z, t, c, mask, r, a), call(theirs, z, t, c, mask, r, a), atol=1e-5, rtol=0)


@pytest.mark.parametrize('micro', [False, True])
def test_gradients_equal_diffusers(micro):
    theirs, ours = pair(128 if micro else 16, micro)
    z, t, c, mask, r, a = inputs()
    call(theirs, z, t, c, mask, r if micro else None, a if micro else None).square().mean().backward()
    ours(z, t, c, mask, r, a).square().mean().backward()
    grads = {k: p.grad for k, p in theirs.named_parameters()}
    for name, p in ours.named_parameters(): torch.testing.assert_close(p.grad, grads[name], atol=1e-6, rtol=1e-4)


def test_the_mask_matters():
    _, ours = pair()
    z, t, c, mask, *_ = inputs()
    with torch.no_grad(): gap = (ours(z, t, c, mask) - ours(z, t, c)).abs().amax((1, 2, 3))
    assert gap[0] > 1e-4 and gap[2] > 1e-4 and gap[1] < 1e-6      # the second caption has no padding


def test_masked_tokens_are_never_read():
    _, ours = pair()
    z, t, c, mask, *_ = inputs()
    other = torch.where(mask[..., None].bool(), c, torch.randn_like(c))
    with torch.no_grad(): assert torch.equal(ours(z, t, c, mask), ours(z, t, other, mask))


def test_micro_conditions_matter():
    _, ours = pair(128, True)
    z, t, c, mask, r, a = inputs()
    with torch.no_grad(): assert (ours(z, t, c, mask, r, a) - ours(z, t, c, mask, 2*r, a)).abs().max() > 1e-4


@pytest.mark.parametrize('micro', [False, True])
def test_state_dict_loads_both_ways(micro):
    theirs, ours = pair(128 if micro else 16, micro)
    assert not any(theirs.load_state_dict(ours.state_dict())) and not any(ours.load_state_dict(theirs.state_dict()))


def test_xl_1024_name_for_name_and_shape_for_shape():
    with torch.device('meta'):
        theirs, ours = PixArtTransformer2DModel(caption_channels=4096), PixArtTransformer(TransformerConfig())
    shapes = lambda m: {k: tuple(v.shape) for k, v in m.state_dict().items()}
    assert shapes(ours) == shapes(theirs)
    assert ours.adaln_single.emb.resolution_embedder.linear_1.weight.shape == (384, 256)


def test_config_has_the_keys_and_defaults_of_diffusers():
    defaults = {k: p.default for k, p in inspect.signature(PixArtTransformer2DModel).parameters.items()}
    ours = config_to_dict(TransformerConfig())
    assert ours.pop('_class_name') == 'PixArtTransformer2DModel' and set(ours) == set(defaults)
    derived = {'interpolation_scale': 2, 'use_additional_conditions': True, 'caption_channels': 4096}
    assert ours == {**defaults, **derived}


def test_config_of_an_older_release_opens():
    old = {'_class_name': 'Transformer2DModel', 'double_self_attention': False, 'num_vector_embeds': None,
           'norm_type': 'ada_norm_single',
           'sample_size': 64, 'num_layers': 3, 'cross_attention_dim': 1152, 'caption_channels': 4096}
    config = config_from_dict(old)
    assert (config.num_layers, config.use_additional_conditions, config.interpolation_scale) == (3, False, 1)


@torch.no_grad()
@pytest.mark.parametrize('micro', [False, True])
def test_diffusers_opens_what_we_save(tmp_path, micro):
    _, ours = pair(128 if micro else 16, micro)
    ours.save_pretrained(tmp_path, torch.float32)
    theirs, report = PixArtTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    z, t, c, mask, r, a = inputs()
    r, a = (r, a) if micro else (None, None)
    torch.testing.assert_close(ours(z, t, c, mask, r, a), call(theirs.eval(), z, t, c, mask, r, a), atol=1e-5, rtol=0)


@pytest.mark.parametrize('shard', ['10GB', '40KB'], ids=['one file', 'shards'])
def test_we_open_what_diffusers_saves(tmp_path, shard):
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path/INDEX).exists() == (shard == '40KB')
    ours = PixArtTransformer.from_pretrained(tmp_path)
    assert not ours.training and all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_saves_float16_and_loads_float32_unless_told(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert {v.dtype for v in load_tensors(tmp_path/WEIGHTS).values()} == {torch.float16}
    assert {p.dtype for p in PixArtTransformer.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in PixArtTransformer.from_pretrained(tmp_path,
                                                               torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_loaded_model_trains(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded, (z, t, c, mask, *_) = PixArtTransformer.from_pretrained(tmp_path), inputs()
    loaded(z, t, c, mask).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_new_save_wins_over_old_shards(tmp_path, model):
    pair(seed=5)[0].save_pretrained(tmp_path, max_shard_size='40KB')
    model.save_pretrained(tmp_path, torch.float32)
    loaded = PixArtTransformer.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


def test_guidance_embedding_survives_the_folder_and_starts_silent(tmp_path, model):
    told = PixArtTransformer(TransformerConfig(sample_size=16, guidance_embed_dim=32, **SMALL)).eval()
    missing = told.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing == ['adaln_single.emb.guidance_embedder.weight']
    told.save_pretrained(tmp_path, torch.float32)
    z, t, c, mask, *_ = inputs()
    with torch.no_grad():
        assert torch.equal(PixArtTransformer.from_pretrained(tmp_path)(z, t, c, mask, omega=torch.tensor([0., 3.5, 9])),
                           model(z, t, c, mask))


def sentence(error, *words):
    "The error is one sentence that holds `words`."
    text = str(error.value)
    return '\n' not in text and text.endswith('.') and all(word in text for word in words)


@pytest.mark.parametrize('change, words', [
    (dict(latents=torch.zeros(3, 4, 16, 15)), ('16 x 15', 'patch size 2')),
    (dict(latents=torch.zeros(3, 3, 16, 16)), ('(3, 3, 16, 16)', '(any, 4, any, any)')),
    (dict(timestep=torch.tensor(5)), ('timestep', '(3,)')),
    (dict(caption=torch.zeros(3, 7, 8)), ('(3, 7, 8)', '(3, any, 24)')),
    (dict(caption=torch.zeros(2, 7, 24)), ('(2, 7, 24)', 'one caption an image')),
    (dict(caption_mask=torch.ones(3, 6)), ('caption_mask', '(3, 7)')),
], ids=['odd side', 'channels', 'scalar time', 'caption width', 'caption count', 'mask'])
def test_bad_input_gets_one_sentence(model, change, words):
    z, t, c, mask, *_ = inputs()
    with pytest.raises(ValueError) as error:
        model(**{'latents': z, 'timestep': t, 'caption': c, 'caption_mask': mask, **change})
    assert sentence(error, *words)


def test_missing_micro_conditions_get_one_sentence():
    _, ours = pair(128, True)
    z, t, c, *_ = inputs()
    with pytest.raises(ValueError) as error: ours(z, t, c)
    assert sentence(error, 'resolution', 'aspect_ratio', 'micro-conditions')


def test_missing_omega_gets_one_sentence():
    told, (z, t, c, *_) = PixArtTransformer(TransformerConfig(sample_size=16, guidance_embed_dim=32, **SMALL)), inputs()
    with pytest.raises(ValueError) as error: told(z, t, c)
    assert sentence(error, 'omega')


@pytest.mark.parametrize('change, word',
                         [(dict(norm_type='ada_norm_zero'), 'ada_norm_zero'), (dict(cross_attention_dim=99), '99'),
                                          (dict(_class_name='UNet2DConditionModel'),
                                           'UNet2DConditionModel'), (dict(num_layers=0), 'num_layers')])
def test_foreign_config_gets_one_sentence(tmp_path, model, change, word):
    model.save_pretrained(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps({**config_to_dict(model.config), **change}))
    with pytest.raises(ValueError) as error: PixArtTransformer.from_pretrained(tmp_path)
    assert sentence(error, word)


def test_missing_and_damaged_files_get_one_sentence(tmp_path, model):
    with pytest.raises(ValueError) as error: PixArtTransformer.from_pretrained(tmp_path)
    assert sentence(error, 'config.json')
    model.save_pretrained(tmp_path)
    (tmp_path/WEIGHTS).write_bytes((tmp_path/WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError) as error: PixArtTransformer.from_pretrained(tmp_path)
    assert sentence(error, WEIGHTS)
    (tmp_path/WEIGHTS).unlink()
    with pytest.raises(ValueError) as error: PixArtTransformer.from_pretrained(tmp_path)
    assert sentence(error, WEIGHTS)


def test_a_missing_shard_gets_one_sentence(tmp_path):
    pair()[0].save_pretrained(tmp_path, max_shard_size='40KB')
    shard = sorted(tmp_path.glob('*.safetensors'))[0]
    shard.unlink()
    with pytest.raises(ValueError) as error: PixArtTransformer.from_pretrained(tmp_path)
    assert sentence(error, shard.name)


@pytest.mark.parametrize('edit, word',
                         [(lambda s: s.pop('proj_out.bias'), 'proj_out.bias'),
                          (lambda s: s.update(stranger=torch.ones(1)), 'stranger'),
                                        (lambda s: s.update({'proj_out.bias': torch.ones(1)}),
                                         'shape')], ids=['missing', 'unknown', 'shape'])
def test_weights_that_do_not_fit_get_one_sentence(tmp_path, model, edit, word):
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    edit(state)
    save_tensors(tmp_path/WEIGHTS, state)
    with pytest.raises(ValueError) as error: PixArtTransformer.from_pretrained(tmp_path)
    assert sentence(error, word)


def test_weights_that_overflow_float16_are_not_saved(tmp_path):
    _, ours = pair()
    with torch.no_grad(): ours.proj_out.bias[0] = 1e6
    with pytest.raises(ValueError) as error: ours.save_pretrained(tmp_path)
    assert sentence(error, 'proj_out.bias', 'float16') and not list(tmp_path.iterdir())


def test_positions_depend_on_displacement_alone():
    grid = position_embedding(48, 8, 8, 8, 1).unflatten(0, (8, 8)).double()
    products = torch.stack([grid[v, u] @ grid[v + 2, u + 3] for v in range(6) for u in range(5)])
    assert products.std() < 1e-6


def test_unpatchify_undoes_unfold():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 6, 8)
    cut = torch.nn.functional.unfold(image, 2, stride=2).transpose(1, 2).unflatten(-1, (3, 4))
    tokens = cut.transpose(-1, -2).flatten(2)
    assert torch.equal(unpatchify(tokens, 6, 8, 2), image)


def test_caption_bias_is_diffusers():
    mask = torch.tensor([[1, 1, 0]])
    assert torch.equal(caption_bias(mask, torch.float32), torch.tensor([[[[0., 0., -10_000.]]]]))
    assert caption_bias(mask, torch.float16).isfinite().all()


@pytest.mark.parametrize('call, word', [
    (lambda: position_embedding(6, 2, 2, 2, 1), 'multiple of 4'), (lambda: position_embedding(8, 0, 2, 2, 1),
                                                                   'positive'),
    (lambda: sinusoid(torch.zeros(2), 7), 'even'), (lambda: sinusoid(torch.zeros(2, 2), 8), r'\(2, 2\)'),
    (lambda: unpatchify(torch.zeros(1, 6, 16), 4, 4, 2),
     r'\(1, 6, 16\)'), (lambda: caption_bias(torch.ones(3), torch.float32), 'one row a caption')])
def test_building_blocks_refuse(call, word):
    with pytest.raises(ValueError, match=word): call()


@torch.no_grad()
@pytest.mark.parametrize('micro, embed', [(False, 0), (True, 32)])
def test_the_forward_pass_compiles_as_one_graph(micro, embed):
    torch.manual_seed(0)
    ours = PixArtTransformer(TransformerConfig(sample_size=16, use_additional_conditions=micro,
                                               guidance_embed_dim=embed, **SMALL)).eval()
    z, t, c, mask, r, a = inputs()
    told = {'resolution': r, 'aspect_ratio': a, 'omega': torch.arange(3.)} if micro else {}
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend='eager')(z, t, c, mask, **told),
                               ours(z, t, c, mask, **told))

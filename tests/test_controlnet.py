"ControlNet: wirings against literal transcriptions, training that touches the adapter alone, files, and bad input."
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pixart_delta_nb.consistency import guided_eps
from pixart_delta_nb.controlnet import ControlNetTransformer, ENTRIES, convert_released, load_controlnet, save_controlnet, train_controlnet
from pixart_delta_nb.data import precompute_control
from pixart_delta_nb.folders import WEIGHTS
from pixart_delta_nb.latents import LatentDataset
from pixart_delta_nb.pipeline import tiny_pipeline
from pixart_delta_nb.sampling import generate
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig, caption_bias, unpatchify


def config(**changes):
    return TransformerConfig(**{**dict(num_attention_heads=2, attention_head_dim=8, num_layers=4, sample_size=8, caption_channels=6,
                                       use_additional_conditions=False), **changes})


def perturb(net):
    for name, p in net.adapter.named_parameters():
        if '_proj' in name: torch.nn.init.normal_(p, std=.2)
    return net


@pytest.fixture
def base():
    torch.manual_seed(0)
    return PixArtTransformer(config()).double()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)
    return draw(3, 4, 8, 8), torch.tensor([3, 500, 999]), draw(3, 5, 6), (torch.arange(5) < torch.tensor([[2], [5], [4]])).double(), draw(3, 4, 8, 8)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(2)
    draw = lambda *s: torch.randn(s, generator=g)
    return LatentDataset(draw(6, 4, 8, 8), draw(6, 5, 6), torch.ones(6, 5), draw(1, 1, 6), control=draw(6, 4, 8, 8))


def around(base, latents, t, caption, mask, middle):
    "A transformer whose blocks are `middle(x, *arguments)`."
    x = base.pos_embed(latents)
    condition, emb = base.adaln_single(t, None, None, None, x.dtype)
    x = middle(x, condition, base.caption_projection(caption), caption_bias(mask, x.dtype))
    shift, scale = (base.scale_shift_table + emb[:, None]).unsqueeze(2).unbind(1)
    return unpatchify(base.proj_out(F.layer_norm(x, x.shape[-1:], eps=1e-6)*(1 + scale) + shift), 8, 8, 2)


def original_names(adapter):
    "The adapter as a released file names it."
    state, out = adapter.state_dict(), {}
    joined = {'attn.qkv': 'attn1.to_q attn1.to_k attn1.to_v', 'attn.proj': 'attn1.to_out.0', 'cross_attn.q_linear': 'attn2.to_q',
              'cross_attn.kv_linear': 'attn2.to_k attn2.to_v', 'cross_attn.proj': 'attn2.to_out.0', 'mlp.fc1': 'ff.net.0.proj', 'mlp.fc2': 'ff.net.2'}
    for i in range(len(adapter.controlnet_blocks)):
        ours, theirs = f'controlnet_blocks.{i}', f'controlnet.{i}'
        out[f'{theirs}.copied_block.scale_shift_table'] = state[f'{ours}.transformer_block.scale_shift_table']
        for kind in ('weight', 'bias'):
            for old, new in joined.items():
                out[f'{theirs}.copied_block.{old}.{kind}'] = torch.cat([state[f'{ours}.transformer_block.{n}.{kind}'] for n in new.split()])
            out[f'{theirs}.after_proj.{kind}'] = state[f'{ours}.after_proj.{kind}']
            if i == 0: out[f'{theirs}.before_proj.{kind}'] = state[f'{ours}.before_proj.{kind}']
    return out


def original_block(w, x, y, t0, bias, heads=2):
    "PixArt's block in the original's names, written out."
    linear = lambda name, v: F.linear(v, w[f'{name}.weight'], w[f'{name}.bias'])
    def attend(q, k, v, bias=None):
        q, k, v = (u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in (q, k, v))
        scores = q @ k.mT/q.shape[-1]**.5
        return ((scores if bias is None else scores + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    a, b, c, d, e, f = (w['scale_shift_table'][None] + t0.reshape(len(x), 6, -1)).chunk(6, 1)
    norm = lambda v: F.layer_norm(v, v.shape[-1:], eps=1e-6)
    x = x + c*linear('attn.proj', attend(*linear('attn.qkv', norm(x)*(1 + b) + a).chunk(3, -1)))
    x = x + linear('cross_attn.proj', attend(linear('cross_attn.q_linear', x), *linear('cross_attn.kv_linear', y).chunk(2, -1), bias))
    return x + f*linear('mlp.fc2', F.gelu(linear('mlp.fc1', norm(x)*(1 + e) + d), approximate='tanh'))


def test_released_file_runs_as_its_authors_wired_it(base, inputs, tmp_path):
    *plain, control = inputs
    held = original_names(perturb(ControlNetTransformer(base, 3, 'released')).adapter)
    torch.save({'state_dict': held | {'base_model.x_embedder.proj.bias': torch.zeros(2)}}, tmp_path/'released.pth')
    inner = [{k.split('copied_block.')[1]: v for k, v in held.items() if k.startswith(f'controlnet.{i}.copied')} for i in range(3)]
    def middle(x, t0, y, bias):
        c = base.pos_embed(control)
        x = base.transformer_blocks[0](x, t0, y, bias)
        for i in range(3):
            if i == 0: c = x + F.linear(c, held['controlnet.0.before_proj.weight'], held['controlnet.0.before_proj.bias'])
            c = original_block(inner[i], c, y, t0, bias)
            x = base.transformer_blocks[i + 1](x + F.linear(c, held[f'controlnet.{i}.after_proj.weight'], held[f'controlnet.{i}.after_proj.bias']), t0, y, bias)
        return x
    expected = around(base, *plain, middle)
    torch.testing.assert_close(convert_released(tmp_path/'released.pth', base)(*inputs), expected)


def test_report_entry_equals_its_figure(base, inputs):
    *plain, control = inputs
    net = perturb(ControlNetTransformer(base, 2))
    one, two = net.adapter.controlnet_blocks
    def middle(x, *a):
        h1 = one.transformer_block(x + one.before_proj(base.pos_embed(control)), *a)
        h2 = two.transformer_block(h1, *a)
        x = base.transformer_blocks[0](x, *a) + .5*one.after_proj(h1)
        x = base.transformer_blocks[1](x, *a) + .5*two.after_proj(h2)
        return base.transformer_blocks[3](base.transformer_blocks[2](x, *a), *a)
    torch.testing.assert_close(net(*inputs, .5), around(base, *plain, middle))


def test_unet_mirrors_its_skips(base, inputs):
    *plain, control = inputs
    net = perturb(ControlNetTransformer(base, 2, wiring='unet'))
    one, two = net.adapter.controlnet_blocks
    def middle(x, *a):
        h1 = one.transformer_block(x + one.before_proj(base.pos_embed(control)), *a)
        h2 = two.transformer_block(h1, *a)
        x = base.transformer_blocks[1](base.transformer_blocks[0](x, *a), *a)
        x = base.transformer_blocks[2](x + two.after_proj(h2), *a)
        return base.transformer_blocks[3](x + one.after_proj(h1), *a)
    torch.testing.assert_close(net(*inputs), around(base, *plain, middle))


@pytest.mark.parametrize('changes', [dict(num_layers=2), dict(attention_head_dim=12, num_layers=7), dict(num_attention_heads=1, attention_head_dim=4)])
@pytest.mark.parametrize('entry', ENTRIES)
def test_fresh_copies_change_nothing_at_any_width_and_depth(changes, entry):
    torch.manual_seed(0)
    base = PixArtTransformer(config(**changes))
    x = torch.randn(2, 4, 8, 4), torch.tensor([1, 900]), torch.randn(2, 3, 6), None
    for n in (1, base.config.num_layers - 1):
        assert torch.equal(ControlNetTransformer(base, n, entry)(*x, torch.randn(2, 4, 8, 4)), base(*x))


def test_micro_conditions_and_omega_reach_the_base():
    torch.manual_seed(0)
    base = PixArtTransformer(config(attention_head_dim=12, use_additional_conditions=True, guidance_embed_dim=16))
    torch.nn.init.normal_(base.adaln_single.emb.guidance_embedder.weight)
    extra = dict(resolution=torch.tensor([[64., 64]]), aspect_ratio=torch.ones(1, 1), omega=torch.tensor([3.5]))
    x = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 6), None
    assert torch.equal(ControlNetTransformer(base, 2)(*x, torch.randn(1, 4, 8, 8), **extra), base(*x, **extra))


def test_the_condition_passes_the_frozen_patch_embedding(base, inputs):
    *plain, control = inputs
    net = perturb(ControlNetTransformer(base, 2))
    before = net(*inputs)
    with torch.no_grad(): base.pos_embed.proj.bias.add_(0)
    assert not any('pos_embed' in name for name, _ in net.adapter.named_parameters()) and torch.equal(net(*inputs), before)
    net(*inputs).sum().backward()
    assert all(p.grad is None for p in base.parameters()) and all(p.grad is not None for p in net.adapter.parameters())


def test_scale_is_not_linear_but_zero_is_the_base(base, inputs):
    net = perturb(ControlNetTransformer(base, 2))
    assert torch.equal(net(*inputs, 0), base(*inputs[:4])) and not torch.allclose(net(*inputs, 1.), net(*inputs, 2.))


def test_another_base_keeps_the_copies(base, inputs):
    net, student = perturb(ControlNetTransformer(base, 2)), PixArtTransformer(config()).double()
    other = net.with_base(student)
    assert other.adapter is net.adapter and net.base is base and torch.equal(other(*inputs, 0.), student(*inputs[:4]))
    assert {n.split('.')[0] for n, _ in other.named_parameters()} == {'base', 'adapter'}


def test_both_halves_of_a_guided_batch_are_controlled(base, inputs):
    x, t, caption, mask, control = inputs
    net, null = perturb(ControlNetTransformer(base, 2)), torch.randn(1, 1, 6).double()
    null_mask, s = torch.ones(1, 1).double(), 4.5
    got = guided_eps(net, x, t, caption, mask, null, null_mask, s - 1, control=control)
    cond = net(x, t, caption, mask, control)[:, :4]
    uncond = net(x, t, null.expand(3, -1, -1), null_mask.expand(3, -1), control)[:, :4]
    torch.testing.assert_close(got, uncond + s*(cond - uncond))


def test_two_pictures_do_not_steer_the_two_halves_of_one_guided_image(base, inputs):
    x, t, caption, mask, control = inputs
    net, null = perturb(ControlNetTransformer(base, 1)), torch.randn(1, 1, 6).double()
    with pytest.raises(ValueError, match='control has 2 rows for 1 images'):
        guided_eps(net, x[:1], t[:1], caption[:1], mask[:1], null, torch.ones(1, 1).double(), 3.5, control=control[:2])
    with pytest.raises(ValueError, match='control has shape'): net(x[:2], t[:2], caption[:2], mask[:2], control=control[:1])
    pipe = tiny_pipeline()
    under = replace(pipe, transformer=ControlNetTransformer(pipe.transformer, 1))
    with pytest.raises(ValueError, match='2 condition pictures for 1 captions'): generate(under, ['a red cube'], steps=1, control=torch.zeros(2, 3, 64, 64))


def test_a_network_under_control_without_a_control_is_refused(base, inputs):
    with pytest.raises(ValueError, match='no control was given'): ControlNetTransformer(base, 1)(*inputs[:4])


def test_each_image_has_its_own_condition_whatever_the_batch():
    pipe, g = tiny_pipeline(omega=3.5), torch.Generator().manual_seed(0)
    pictures, captions = torch.rand(3, 3, 64, 64, generator=g)*2 - 1, ['a red cube', 'a small sphere', 'grass']
    torch.manual_seed(0)
    under = replace(pipe, transformer=perturb(ControlNetTransformer(pipe.transformer, 1)))
    images = [generate(under, captions, control=pictures, batch_size=n, steps=2) for n in (1, 2, 3)]
    assert torch.allclose(images[0], images[1], atol=1e-4) and torch.allclose(images[0], images[2], atol=1e-4)
    swapped = generate(under, captions, control=pictures.flip(0), steps=2)
    assert not torch.allclose(images[0][0], swapped[0], atol=1e-3)


def test_control_latents_are_scaled_as_images_are():
    pipe = tiny_pipeline()
    x = torch.rand(3, 3, 64, 64)*2 - 1
    with torch.no_grad(): expected = pipe.vae.encode(x).latent_dist.mode()*pipe.scaling_factor
    assert torch.allclose(precompute_control(pipe, x, batch_size=2), expected, atol=1e-5)


def test_training_moves_the_adapter_alone_and_resumes_bit_for_bit(data, tmp_path):
    torch.manual_seed(0)
    base = PixArtTransformer(config())
    before = {k: v.clone() for k, v in base.state_dict().items()}
    run = lambda name, **o: train_controlnet(base, data, tmp_path/name, steps=6, num_copies=2, batch_size=4, progress=False, **o)
    whole = run('whole')
    run('parts', until=3)
    parts = run('parts', resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.adapter.state_dict().values(), parts.adapter.state_dict().values()))
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert whole.adapter.controlnet_blocks[0].before_proj.weight.abs().max() > 0
    fresh = ControlNetTransformer(base, 2)
    assert not torch.equal(whole.adapter.controlnet_blocks[1].transformer_block.attn1.to_q.weight, fresh.adapter.controlnet_blocks[1].transformer_block.attn1.to_q.weight)


def test_checkpoint_holds_no_weight_of_the_base(data, tmp_path):
    from pixart_delta_nb.core import load_tensors
    train_controlnet(PixArtTransformer(config()), data, tmp_path, steps=1, num_copies=1, batch_size=2, progress=False)
    assert not [k for k in load_tensors(tmp_path/'checkpoint.safetensors') if 'pos_embed' in k or 'caption_projection' in k or 'proj_out' in k]


def test_bfloat16_products_train(data, tmp_path):
    log = []
    train_controlnet(PixArtTransformer(config()), data, tmp_path, steps=2, num_copies=1, batch_size=2, bf16=True, progress=False, log=log.append, log_every=1)
    assert len(log) == 2


def test_resuming_another_wiring_is_refused(data, tmp_path):
    base = PixArtTransformer(config())
    train_controlnet(base, data, tmp_path, steps=2, num_copies=1, batch_size=2, until=1, progress=False)
    with pytest.raises(ValueError, match='entry = report, not released'):
        train_controlnet(base, data, tmp_path, steps=2, num_copies=1, entry='released', batch_size=2, resume=True, progress=False)


def test_save_and_load(base, inputs, tmp_path):
    net = perturb(ControlNetTransformer(base, 3, 'released'))
    save_controlnet(net, tmp_path, torch.float64, condition='edges', steps=7)
    again = load_controlnet(tmp_path, base)
    assert torch.equal(again(*inputs), net(*inputs)) and again.entry == 'released' and again.facts['condition'] == 'edges'
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['config.json', WEIGHTS])


def test_loading_around_another_shape_names_it(base, tmp_path):
    save_controlnet(ControlNetTransformer(base, 1), tmp_path)
    with pytest.raises(ValueError, match='num_layers = 4.*num_layers = 5'): load_controlnet(tmp_path, PixArtTransformer(config(num_layers=5)))
    with pytest.raises(ValueError, match='attention_head_dim = 8'): load_controlnet(tmp_path, PixArtTransformer(config(attention_head_dim=16)))


def test_a_student_with_guidance_embedding_is_no_other_shape(base):
    ControlNetTransformer(base, 1).with_base(PixArtTransformer(config(guidance_embed_dim=16)))


def test_damaged_folders_are_refused(base, tmp_path):
    save_controlnet(ControlNetTransformer(base, 2), tmp_path)
    weights = (tmp_path/WEIGHTS).read_bytes()
    (tmp_path/WEIGHTS).write_bytes(weights[:-100])
    with pytest.raises(ValueError, match='damaged'): load_controlnet(tmp_path, base)
    (tmp_path/WEIGHTS).write_bytes(weights)
    values = json.loads((tmp_path/'config.json').read_text())
    (tmp_path/'config.json').write_text(json.dumps(values | {'num_copies': 3}))
    with pytest.raises(ValueError, match='lack'): load_controlnet(tmp_path, base)
    (tmp_path/'config.json').write_text('{}')
    with pytest.raises(ValueError, match='describes no ControlNet'): load_controlnet(tmp_path, base)


def test_weights_that_overflow_are_not_saved(base, tmp_path):
    net = ControlNetTransformer(base, 1)
    with torch.no_grad(): net.adapter.controlnet_blocks[0].after_proj.weight.fill_(1e6)
    with pytest.raises(ValueError, match='not finite'): save_controlnet(net, tmp_path)
    assert not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self): return print, ('this ran',)


@pytest.mark.parametrize('held,words', [
    ({'state_dict': {'controlnet.0.after_proj.weight': Evil()}}, 'something else'), (Evil(), 'something else'), ({'epoch': 3}, 'something else'),
    ([torch.zeros(1)], 'something else'), ({'blocks.0.attn.qkv.weight': torch.zeros(1)}, 'no tensor named controlnet'),
    ({'controlnet.0.copied_block.other.weight': torch.zeros(1)}, 'no tensor of a released'), ({'controlnet.0.after_proj.weight': torch.zeros(1)}, 'lack')])
def test_files_that_are_no_released_controlnet_are_refused(base, tmp_path, capfd, held, words):
    torch.save(held, tmp_path/'x.pth')
    with pytest.raises(ValueError, match=words): convert_released(tmp_path/'x.pth', base)
    assert 'this ran' not in capfd.readouterr().out


def test_released_file_of_another_width_is_refused(base, tmp_path):
    torch.save(original_names(ControlNetTransformer(PixArtTransformer(config(attention_head_dim=16)), 1).adapter), tmp_path/'x.pth')
    with pytest.raises(ValueError, match='shape'): convert_released(tmp_path/'x.pth', base)


@pytest.mark.parametrize('options,words', [
    (dict(num_copies=0), 'allows 1 to 3'), (dict(num_copies=4), 'allows 1 to 3'), (dict(num_copies=2.), 'allows 1 to 3'), (dict(num_copies=1, entry='middle'), 'entry'),
    (dict(num_copies=1, wiring='u-net'), 'wiring'), (dict(num_copies=3, wiring='unet'), 'num_copies=2'), (dict(num_copies=2, wiring='unet', entry='released'), 'num_copies=2')])
def test_copies_that_do_not_fit_are_refused(base, options, words):
    with pytest.raises(ValueError, match=words): ControlNetTransformer(base, **options)


@pytest.mark.parametrize('scale', [float('nan'), float('inf'), '1', None])
def test_scale_must_be_finite(base, inputs, scale):
    with pytest.raises(ValueError, match='conditioning_scale'): ControlNetTransformer(base, 1)(*inputs, scale)


def test_controls_must_fit(base, inputs, data, tmp_path):
    x, t, caption, mask, control = inputs
    net, pipe = ControlNetTransformer(base, 1), tiny_pipeline()
    with pytest.raises(ValueError, match='control has shape'): net(x, t, caption, mask, control[:2])
    with pytest.raises(ValueError, match=r'\[-1, 1\]'): precompute_control(pipe, torch.full((1, 3, 64, 64), 255.))
    with pytest.raises(ValueError, match='lacks control'): train_controlnet(base, replace(data, control=None), tmp_path)
    with pytest.raises(ValueError, match='each latent needs'): train_controlnet(base, replace(data, control=data.control[:2]), tmp_path)
    with pytest.raises(ValueError, match='width 6, but the data has 9'): train_controlnet(base, replace(data, caption=torch.zeros(6, 5, 9)), tmp_path)


def test_another_base_is_refused(base):
    with pytest.raises(ValueError, match='num_layers'): ControlNetTransformer(base, 1).with_base(PixArtTransformer(config(num_layers=3)))


def test_micro_conditions_are_needed_and_reach_the_training(data, tmp_path):
    torch.manual_seed(0)
    base = PixArtTransformer(config(use_additional_conditions=True, num_attention_heads=3, attention_head_dim=8))
    with pytest.raises(ValueError, match='lacks resolution, aspect_ratio'): train_controlnet(base, data, tmp_path/'a', 1, 1, batch_size=2, progress=False)
    losses = []
    torch.nn.init.normal_(base.proj_out.weight, std=.1)
    for name, side in (('b', 1.), ('c', 8.)):
        train_controlnet(base, replace(data, resolution=torch.full((6, 2), 64.*side), aspect_ratio=torch.ones(6, 1)), tmp_path/name, 1, 1, batch_size=2, progress=False, log_every=1, log=lambda r: losses.append(r['loss']))
    assert losses[0] != losses[1]


def test_resuming_around_another_base_or_with_other_data_is_refused(data, tmp_path):
    torch.manual_seed(0)
    settings = dict(steps=2, num_copies=1, batch_size=2, progress=False)
    train_controlnet(PixArtTransformer(config()), data, tmp_path, until=1, **settings)
    with pytest.raises(ValueError, match='teacher = '): train_controlnet(PixArtTransformer(config()), data, tmp_path, resume=True, **settings)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match='data = '): train_controlnet(PixArtTransformer(config()), replace(data, control=data.z), tmp_path, resume=True, **settings)


def test_the_schedule_of_noise_is_an_argument(data, tmp_path):
    torch.manual_seed(0)
    base, losses = PixArtTransformer(config()), []
    for name, table in (('a', None), ('b', torch.linspace(.99, .01, 1000, dtype=torch.float64))):
        train_controlnet(base, data, tmp_path/name, 1, 1, batch_size=2, progress=False, alpha_bar=table, log=lambda r: losses.append(r['loss']))
    assert losses[0] != losses[1]

"LCM-LoRA: the adapter against its formula and peft, its files and what they refuse, and distillation with one model."
import copy, json

import pytest
import torch
from torch import nn

from pixart_delta_nb.core import load_tensors, save_tensors
from pixart_delta_nb.latents import LatentDataset
from pixart_delta_nb.lcd import lcd_step, lcd_train
from pixart_delta_nb.lcm_lora import adapter_of, lora_train, one_model
from pixart_delta_nb.lora import (LoRA, TARGETS, add_lora, apply_lora, base_only, chosen_layers, from_peft_names,
    load_lora, lora_layers, lora_parameters, merge, remove_lora, save_lora, unmerge)
from pixart_delta_nb.schedules import alpha_bar_from_betas, linear_betas
from pixart_delta_nb.optimisers import EMA
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

ALPHA_BAR = alpha_bar_from_betas(linear_betas())


def config(**changes):
    return TransformerConfig(**dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, caption_channels=6,
                                    use_additional_conditions=False) | changes)


def transformer(seed=0, **changes):
    torch.manual_seed(seed)
    return PixArtTransformer(config(**changes)).eval()


def randomise(model, seed=1):
    "As if B had been trained."
    torch.manual_seed(seed)
    for _, lora in lora_layers(model).values(): nn.init.normal_(lora.B.weight, std=.1)
    return model


@pytest.fixture
def base(): return transformer()


@pytest.fixture
def adapted(): return randomise(add_lora(transformer(), 3))


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(2)
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([999, 19]), torch.randn(2, 4, 6, generator=g), torch.tensor([[1]*4, [1, 1, 0, 0]])


@pytest.fixture
def rows():
    g = torch.Generator().manual_seed(3)
    return LatentDataset(torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 3, 6, generator=g), torch.ones(4, 3, dtype=torch.long), torch.randn(1, 1, 6, generator=g))


def test_start_is_the_teacher(base, inputs):
    before = base(*inputs)
    assert torch.equal(add_lora(base, 2)(*inputs), before)


def test_linear_layer_follows_the_formula():
    layer, x = nn.Linear(5, 7).double(), torch.randn(3, 5, dtype=torch.float64)
    lora = LoRA(layer, 2, 6.)
    nn.init.normal_(lora.B.weight)
    expected = x @ (layer.weight + 3*lora.B.weight @ lora.A.weight).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('kernel, stride, padding', [(2, 2, 0), (3, 1, 1), (1, 1, 0)])
def test_convolution_follows_the_formula(kernel, stride, padding):
    layer, x = nn.Conv2d(3, 5, kernel, stride, padding).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    lora = LoRA(layer, 2, 6.)
    nn.init.normal_(lora.B.weight)
    expected = nn.functional.conv2d(x, layer.weight + lora.change(), layer.bias, stride, padding)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_seed_fixes_the_adapter_and_leaves_the_global_state():
    networks = [transformer() for _ in range(3)]
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    a, b, c = (lora_parameters(add_lora(network, 2, seed=seed))[0] for network, seed in zip(networks, (5, 5, 6)))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.rand(1), expected)


def test_only_the_adapter_is_trainable(adapted):
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == {id(p) for p in lora_parameters(adapted)}


def test_targets_leave_out_the_modulation_tables(base):
    layers = chosen_layers(base)
    rest = {name for name, _ in base.named_parameters() if name.rpartition('.')[0] not in layers}
    assert rest == {'scale_shift_table', 'transformer_blocks.0.scale_shift_table'}


def test_merged_equals_unmerged(adapted, inputs):
    expected = adapted(*inputs)
    assert (merge(adapted)(*inputs) - expected).abs().max() < 1e-5


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_unmerge_restores_the_base_bit_for_bit(adapted, dtype):
    for layer, _ in lora_layers(adapted).values(): layer.to(dtype)
    before = {name: layer.weight.clone() for name, (layer, _) in lora_layers(adapted).items()}
    merge(adapted)
    assert any(not torch.equal(layer.weight, before[name]) for name, (layer, _) in lora_layers(adapted).items())
    unmerge(adapted)
    assert all(torch.equal(layer.weight, before[name]) for name, (layer, _) in lora_layers(adapted).items())


def test_removing_a_merged_adapter_leaves_a_plain_model(adapted, inputs, tmp_path):
    expected = adapted(*inputs)
    remove_lora(merge(adapted)).save_pretrained(tmp_path, torch.float32)
    assert (PixArtTransformer.from_pretrained(tmp_path)(*inputs) - expected).abs().max() < 1e-5


def test_removing_an_unmerged_adapter_leaves_the_base(adapted, base, inputs):
    assert torch.equal(remove_lora(adapted)(*inputs), base(*inputs)) and adapted.state_dict().keys() == base.state_dict().keys()


def test_a_copy_is_independent(adapted, base, inputs):
    expected = adapted(*inputs)
    remove_lora(copy.deepcopy(adapted))
    assert torch.equal(adapted(*inputs), expected) and not torch.equal(expected, base(*inputs))


def test_base_only_answers_without_the_adapter_and_ends_on_an_error(adapted, base, inputs):
    expected = adapted(*inputs)
    with pytest.raises(RuntimeError), base_only(adapted):
        assert torch.equal(adapted(*inputs), base(*inputs))
        raise RuntimeError
    assert torch.equal(adapted(*inputs), expected)


def test_half_precision_base_keeps_a_single_precision_adapter(inputs):
    model = randomise(add_lora(transformer().to(torch.bfloat16), 2))
    output = model(inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16(), inputs[3])
    assert output.dtype == torch.bfloat16 and {p.dtype for p in lora_parameters(model)} == {torch.float32}


@pytest.mark.parametrize('call, match', [
    (lambda m: add_lora(m, 0), 'rank is 0'), (lambda m: add_lora(m, 2.5), 'rank is 2.5'), (lambda m: add_lora(m, 2, 0.), 'alpha is 0'),
    (lambda m: add_lora(m, 2, targets=('to_q', 'proj_in')), r"\['proj_in'\] match no layer"), (lambda m: add_lora(m, 2, targets=()), 'match no layer'),
    (lambda m: add_lora(m, 2, targets=('ff',)), 'transformer_blocks.0.ff is no linear'), (lambda m: add_lora(add_lora(m, 2), 2), 'has an adapter already'),
    (lambda m: merge(m), 'has no adapter'), (lambda m: merge(merge(add_lora(m, 2))), 'merged already'), (lambda m: unmerge(add_lora(m, 2)), 'not merged'),
    (lambda m: save_lora(m, 'nowhere'), 'has no adapter'), (lambda m: base_only(merge(add_lora(m, 2))).__enter__(), 'merged into the weights')])
def test_refuses_in_one_sentence(base, call, match):
    with pytest.raises(ValueError, match=match): call(base)


@pytest.fixture
def stock(base, tmp_path):
    diffusers = pytest.importorskip('diffusers')
    pytest.importorskip('peft')
    base.save_pretrained(tmp_path/'base', torch.float32)
    return lambda: diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path/'base').eval()


def call_stock(network, inputs):
    latents, t, caption, mask = inputs
    with torch.no_grad():
        return network(latents, encoder_hidden_states=caption, timestep=t, encoder_attention_mask=mask,
                       added_cond_kwargs={'resolution': None, 'aspect_ratio': None}).sample


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_peft_reads_our_file(adapted, stock, inputs, tmp_path, dtype):
    import peft
    save_lora(adapted, tmp_path/'lora', dtype)
    ours = transformer()
    load_lora(ours, tmp_path/'lora')
    theirs = peft.PeftModel.from_pretrained(stock(), tmp_path/'lora').eval()
    assert (call_stock(theirs, inputs) - ours(*inputs)).abs().max() < 1e-5


@pytest.mark.parametrize('options', [{}, {'lora_alpha': 5}, {'target_modules': ['to_q', 'proj_in', 'proj']}], ids=str)
def test_we_read_a_file_of_peft(base, stock, inputs, tmp_path, options):
    import peft
    torch.manual_seed(4)
    theirs = peft.get_peft_model(stock(), peft.LoraConfig(**{'r': 4, 'target_modules': [*TARGETS], 'init_lora_weights': False} | options)).eval()
    theirs.save_pretrained(tmp_path/'lora')
    before = base(*inputs)
    applied = load_lora(base, tmp_path/'lora')
    assert applied == len(load_tensors(tmp_path/'lora/adapter_model.safetensors'))
    assert (call_stock(theirs, inputs) - base(*inputs)).abs().max() < 1e-5 and (base(*inputs) - before).abs().max() > 1e-2


def of_peft(stock, folder, **options):
    "An adapter that peft has initialised, as if trained for a moment, and saved."
    import peft
    torch.manual_seed(4)
    theirs = peft.get_peft_model(stock(), peft.LoraConfig(**{'r': 4, 'target_modules': ['to_q', 'to_k', 'to_v', 'to_out.0', 'net.2']} | options)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if 'lora_' in name: p.add_(torch.randn(p.shape)*.02)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize('start', [True, False, 'gaussian', 'orthogonal'])
def test_initialisations_that_leave_the_base_alone_are_computed(base, stock, inputs, tmp_path, start):
    theirs = of_peft(stock, tmp_path, init_lora_weights=start)
    load_lora(base, tmp_path)
    assert (call_stock(theirs, inputs) - base(*inputs)).abs().max() < 1e-5


@pytest.mark.parametrize('start', ['pissa', 'pissa_niter_4', 'olora'])
def test_initialisations_that_change_the_base_are_refused(base, stock, tmp_path, start):
    of_peft(stock, tmp_path, init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights = '{start}', which changes the base") as error: load_lora(base, tmp_path)
    assert '\n' not in str(error.value) and not lora_layers(base)


@pytest.mark.parametrize('start', ['corda', 'loftq', 'lora_ga', 'something of next year', 1, 0])
def test_initialisations_that_nobody_here_knows_are_refused(adapted, base, tmp_path, start):
    save_lora(adapted, tmp_path)
    settings = json.loads((tmp_path/'adapter_config.json').read_text())
    (tmp_path/'adapter_config.json').write_text(json.dumps(settings | {'init_lora_weights': start}))
    with pytest.raises(ValueError, match='init_lora_weights'): load_lora(base, tmp_path)


def test_a_converted_pissa_adapter_is_plain_and_computed(base, stock, inputs, tmp_path):
    import peft
    torch.manual_seed(4)
    theirs = peft.get_peft_model(stock(), peft.LoraConfig(r=4, target_modules=['to_q', 'net.2'], init_lora_weights='pissa')).eval()
    theirs.peft_config['default'].init_lora_weights = True               # as peft's documentation has it
    theirs.save_pretrained(tmp_path/'start')
    theirs.peft_config['default'].init_lora_weights = 'pissa'
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if 'lora_' in name: p.add_(torch.randn(p.shape)*.02)
    wanted = call_stock(theirs, inputs)
    theirs.save_pretrained(tmp_path/'plain', path_initial_model_for_weight_conversion=str(tmp_path/'start'))
    load_lora(base, tmp_path/'plain')
    assert (wanted - base(*inputs)).abs().max() < 1e-4


@pytest.mark.parametrize('changes', [
    {'use_qalora': True}, {'layer_replication': [[0, 1]]}, {'trainable_token_indices': [1]}, {'alora_invocation_tokens': [1]}, {'arrow_config': {'a': 1}},
    {'kasa_config': {'x': 1}}, {'use_bdlora': {'n': 2}}, {'exclude_modules': ['to_q']}, {'a_key_of_next_year': True}])
def test_unknown_settings_that_are_set_are_refused_and_unset_ones_are_not(adapted, base, inputs, tmp_path, changes):
    save_lora(adapted, tmp_path, torch.float32)
    settings = json.loads((tmp_path/'adapter_config.json').read_text())
    write = lambda more: (tmp_path/'adapter_config.json').write_text(json.dumps(settings | more))
    write(changes)
    with pytest.raises(ValueError, match=next(iter(changes))): load_lora(base, tmp_path)
    write(dict.fromkeys(changes))
    load_lora(base, tmp_path)
    assert torch.equal(base(*inputs), adapted(*inputs))


def test_a_precision_may_be_a_name_and_files_follow_the_umask(adapted, tmp_path):
    import os
    before = os.umask(0o022)
    try: save_lora(adapted, tmp_path/'a', 'bfloat16')
    finally: os.umask(before)
    assert {t.dtype for t in load_tensors(tmp_path/'a/adapter_model.safetensors').values()} == {torch.bfloat16}
    assert {p.stat().st_mode & 0o777 for p in (tmp_path/'a').iterdir()} == {0o644}
    with pytest.raises(ValueError, match='is a file'): save_lora(adapted, tmp_path/'a/adapter_config.json')


def test_applying_an_adapter_imports_no_sampler():
    import subprocess, sys
    code = 'import sys, pixart_delta_nb.lora; print([m for m in sys.modules if m in ("pixart_delta_nb.sampling", "pixart_delta_nb.pipeline", "diffusers")])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_unset_alpha_is_pefts_eight(base, adapted, tmp_path):
    save_lora(adapted, tmp_path)
    settings = json.loads((tmp_path/'adapter_config.json').read_text())
    del settings['lora_alpha']
    (tmp_path/'adapter_config.json').write_text(json.dumps(settings))
    load_lora(base, tmp_path)
    assert lora_layers(base)['proj_out'][1].scale == 8/3


@pytest.mark.parametrize('suffix', ['', '.default', '.lcm'])
def test_released_names_load(base, adapted, inputs, tmp_path, suffix):
    save_lora(adapted, tmp_path, torch.float32)
    state = {name.replace('.weight', f'{suffix}.weight'): t for name, t in load_tensors(tmp_path/'adapter_model.safetensors').items()}
    assert f'base_model.model.transformer_blocks.0.attn1.to_out.0.lora_A{suffix}.weight' in state
    save_tensors(tmp_path/'adapter_model.safetensors', state)
    assert load_lora(base, tmp_path) == len(state) and torch.equal(base(*inputs), adapted(*inputs))


@pytest.mark.parametrize('name', ['base_model.model.scale_shift_table', 'base_model.model.proj_out.lora_magnitude_vector', 'proj_out.lora.down.weight',
                                  'base_model.model.proj_out.lora_A.bias', 'base_model.model.proj_out.modules_to_save.default.weight'])
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match='1 tensors are no LoRA weights'): from_peft_names({name: torch.zeros(1)})


def test_two_adapters_in_one_file_raise():
    with pytest.raises(ValueError, match='only 1 names'): from_peft_names(dict.fromkeys(['a.lora_A.one.weight', 'a.lora_A.two.weight'], torch.zeros(1)))


@pytest.mark.parametrize('changes, match', [
    ({'attention_head_dim': 16}, r'do not fit, the first .*: \(16, 3\) where the model needs \(32, 3\)'), ({'num_layers': 2}, 'lacks 20 tensors'),
    ({'caption_channels': 8}, r'the first caption_projection.linear_1.lora_A.weight: \(3, 6\) where the model needs \(3, 8\)'),
    ({'use_additional_conditions': True, 'num_attention_heads': 3}, 'lacks 8 tensors')])
def test_adapter_of_another_model_is_refused_and_nothing_changes(adapted, tmp_path, changes, match):
    save_lora(adapted, tmp_path)
    other = transformer(**changes)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=match): load_lora(other, tmp_path)
    after = other.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_extra_layer_in_the_file_is_refused(adapted, base, tmp_path):
    save_lora(adapted, tmp_path)
    state = load_tensors(tmp_path/'adapter_model.safetensors')
    save_tensors(tmp_path/'adapter_model.safetensors', state | {'base_model.model.proj_in.lora_A.weight': torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="unknown 1 tensors, the first .'proj_in.lora_A.weight'"): load_lora(base, tmp_path)


@pytest.mark.parametrize('change, match', [
    ({'use_dora': True}, 'has use_dora = True'), ({'use_rslora': True}, 'use_rslora'), ({'peft_type': 'LOHA'}, "peft_type = 'LOHA'"),
    ({'rank_pattern': {'to_q': 2}}, 'rank_pattern'), ({'target_modules': '.*to_q'}, 'a list of layers is needed'),
    ({'target_modules': ['down_blocks']}, 'match no layer'), ({'r': 7}, 'do not fit'), ({'r': None}, 'rank is None')])
def test_settings_that_we_cannot_honour_are_refused(adapted, base, tmp_path, change, match):
    save_lora(adapted, tmp_path)
    settings = json.loads((tmp_path/'adapter_config.json').read_text())
    (tmp_path/'adapter_config.json').write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=match): load_lora(base, tmp_path)


@pytest.mark.parametrize('name, content, match', [
    ('adapter_config.json', None, 'has no adapter_config.json'), ('adapter_config.json', b'{"r": ', 'not valid JSON'), ('adapter_config.json', b'{"target_modules": ["to_q"]}', 'lacks r'),
    ('adapter_model.safetensors', None, 'adapter_model.safetensors is missing'), ('adapter_model.safetensors', b'\x80\x04.', 'damaged')])
def test_missing_and_damaged_files_are_refused(adapted, base, tmp_path, name, content, match):
    save_lora(adapted, tmp_path)
    (tmp_path/name).unlink() if content is None else (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=match): load_lora(base, tmp_path)


def test_saving_refuses_what_half_precision_cannot_hold(adapted, tmp_path):
    with torch.no_grad(): lora_parameters(adapted)[0].fill_(1e6)
    with pytest.raises(ValueError, match='not finite in torch.float16'): save_lora(adapted, tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_model_has_the_gradient_of_three(adapted, base, rows):
    ema = EMA(adapter_of(adapted))
    for p in ema.module.parameters(): p.mul_(.5)
    slow = copy.deepcopy(adapted)
    for p, q in zip(lora_parameters(slow), ema.module.parameters()): p.data = q.clone()
    student, batch = copy.deepcopy(adapted), rows.draw(4, torch.Generator().manual_seed(0))
    draws = dict(n=torch.tensor([0, 49, 7, 20]), noise=torch.randn(4, 4, 8, 8))
    one = lcd_step(*one_model(adapted, ema), batch, ALPHA_BAR, **draws)
    three = lcd_step(student, remove_lora(merge(slow)), base, batch, ALPHA_BAR, **draws)
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora_parameters(m))]) for loss, m in ((one, adapted), (three, student)))
    assert one.item() == pytest.approx(three.item(), rel=1e-4) and (a - b).norm() < 1e-3*b.norm()


def run(rows, out, **options):
    model = add_lora(transformer(), 2)
    log = lora_train(model, rows, ALPHA_BAR, out, **({'steps': 5, 'batch_size': 2, 'lr': 1e-3, 'warmup': 2, 'progress': False} | options))
    return model, log


@pytest.mark.parametrize('mu', [0., .9])
def test_loop_resumes_bit_for_bit(rows, tmp_path, mu):
    whole, log = run(rows, tmp_path/'whole', mu=mu)
    run(rows, tmp_path/'parts', mu=mu, until=2)
    parts, log_again = run(rows, tmp_path/'parts', mu=mu, resume=True)
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(whole), lora_parameters(parts))) and log == log_again


def test_loop_moves_the_adapter_alone(base, rows, tmp_path):
    model, _ = run(rows, tmp_path)
    assert all(torch.equal(model.state_dict()[name], p) for name, p in base.state_dict().items())
    assert all(lora.B.weight.abs().max() > 0 for _, lora in lora_layers(model).values())


def test_checkpoint_holds_no_base_weight(rows, tmp_path):
    model, _ = run(rows, tmp_path)
    floats = sum(t.numel() for t in load_tensors(tmp_path/'checkpoint.safetensors').values() if t.is_floating_point())
    assert floats == 3*sum(p.numel() for p in lora_parameters(model)) + len(lora_parameters(model))     # weights, two moments, step counts


def test_without_an_average_the_target_is_the_student():
    student, target, _ = one_model(add_lora(transformer(), 2))
    assert target is student


def test_first_loss_equals_full_distillation(base, rows, tmp_path):
    _, log = run(rows, tmp_path/'lora', steps=1)
    _, _, expected = lcd_train(base, rows, ALPHA_BAR, tmp_path/'full', steps=1, batch_size=2, progress=False)
    assert log[0]['loss'] == pytest.approx(expected[0]['loss'], rel=1e-5)


@pytest.mark.parametrize('options, match', [({'mu': 95}, 'mu=95 must lie'), ({'k': 7}, 'k is 7')])
def test_loop_refuses(rows, tmp_path, options, match):
    with pytest.raises(ValueError, match=match): run(rows, tmp_path, **options)


def test_loop_refuses_a_checkpoint_of_another_rank(rows, tmp_path):
    run(rows, tmp_path, until=2)
    other = add_lora(transformer(), 3)
    with pytest.raises((ValueError, RuntimeError)):
        lora_train(other, rows, ALPHA_BAR, tmp_path, steps=5, batch_size=2, lr=1e-3, warmup=2, progress=False, resume=True)


def test_loop_refuses_a_model_without_adapter(base, rows, tmp_path):
    with pytest.raises(ValueError, match='no adapter'): lora_train(base, rows, ALPHA_BAR, tmp_path, steps=1)


def test_loop_refuses_another_base_or_other_data(rows, tmp_path):
    run(rows, tmp_path, until=2)
    settings = dict(steps=5, batch_size=2, lr=1e-3, warmup=2, progress=False, resume=True)
    with pytest.raises(ValueError, match='teacher = '): lora_train(add_lora(transformer(seed=9), 2), rows, ALPHA_BAR, tmp_path, **settings)
    other = LatentDataset(rows.z + 1, rows.caption, rows.mask, rows.null)
    with pytest.raises(ValueError, match='data = '): lora_train(add_lora(transformer(), 2), other, ALPHA_BAR, tmp_path, **settings)


def test_a_trained_adapter_resumes_in_the_model_that_was_trained(rows, tmp_path):
    model, _ = run(rows, tmp_path, until=2)
    lora_train(model, rows, ALPHA_BAR, tmp_path, steps=5, batch_size=2, lr=1e-3, warmup=2, progress=False, resume=True)
    whole, _ = run(rows, tmp_path/'whole')
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(whole), lora_parameters(model)))


def test_a_damaged_adapter_is_refused_by_its_card(tmp_path):
    pytest.importorskip('diffusers')
    from pixart_delta_nb.pipeline import tiny_pipeline
    from pixart_delta_nb.folders import save_card
    pipe = tiny_pipeline()
    save_lora(add_lora(copy.deepcopy(pipe.transformer), 2), tmp_path)
    save_card(tmp_path, omega=3.5)
    state = load_tensors(tmp_path/'adapter_model.safetensors')
    save_tensors(tmp_path/'adapter_model.safetensors', {k: v + 1 for k, v in state.items()})
    with pytest.raises(ValueError, match='SHA-256 differs'): apply_lora(pipe, tmp_path)


def test_teacher_and_target_of_one_model_take_micro_conditions():
    from pixart_delta_nb.lcm_lora import adapter_of, one_model
    from pixart_delta_nb.lora import add_lora
    from pixart_delta_nb.optimisers import EMA
    from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig
    torch.manual_seed(0)
    model = add_lora(PixArtTransformer(TransformerConfig(num_attention_heads=3, attention_head_dim=8, num_layers=1, sample_size=8, caption_channels=6, use_additional_conditions=True)), rank=2)
    x, t, y, m = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 3, 6), torch.ones(2, 3)
    told = {'resolution': torch.full((2, 2), 64.), 'aspect_ratio': torch.ones(2, 1)}
    with torch.no_grad():
        student, target, teacher = one_model(model, EMA(adapter_of(model)))
        assert torch.equal(student(x, t, y, m, **told), teacher(x, t, y, m, **told)) and torch.equal(target(x, t, y, m, **told), teacher(x, t, y, m, **told))

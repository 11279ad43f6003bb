"""Eight bits: scales, products, layers, stored captions and the ledger, at their edges."""
import copy
import pytest
import torch
from torch import nn
from pixart_delta_nb.int8 import (Int8Linear, LiveBytes, StoredCaptions, imagined, int_product, lcd_peak,
    load_8bit_encoder, low_memory_pipeline, paper_part, stage_peaks, product_error, quantise, quantise_absmax,
    tensor_bytes, training_ledger, weight_bytes)
from pixart_delta_nb.pipeline import tiny_pipeline
from pixart_delta_nb.sampling import sample_student
from pixart_delta_nb.text import encode_captions
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

SMALL = TransformerConfig(num_attention_heads=2, attention_head_dim=16, num_layers=4, sample_size=8, caption_channels=32, use_additional_conditions=False)
CAPTIONS = ['a red cube on grass', 'a small blue sphere at night']

@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline(omega=3.5)

@pytest.mark.parametrize('size', [1e-30, 1e-3, 1., 1e30])
def test_error_of_an_entry_is_at_most_half_a_scale(size):
    x = torch.randn(8, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)*size
    q, s = quantise_absmax(x)
    assert ((x - s*q).abs() <= s/2*(1 + 1e-9)).all()

def test_one_scale_for_all_or_for_each_row():
    x = torch.tensor([[1., -2.], [127., 0.]])
    assert quantise_absmax(x, None)[1].shape == () and quantise_absmax(x)[1].shape == (2, 1)
    assert quantise_absmax(x, 0)[0].tolist() == [[1, -127], [127, 0]]

def test_zeros_stay_zero_and_have_a_finite_scale():
    q, s = quantise_absmax(torch.zeros(3, 4, dtype=torch.float16))
    assert not q.any() and s.isfinite().all() and (s > 0).all()

@pytest.mark.parametrize('rows', [1, 16, 17, 32, 33])
def test_int_product_is_exact_for_any_number_of_rows(rows):
    g = torch.Generator().manual_seed(rows)
    q, p = (torch.randint(-127, 128, (n, 4096), generator=g, dtype=torch.int8) for n in (rows, 5))
    assert torch.equal(int_product(q, p).long(), q.long() @ p.long().T)

def test_int_product_does_not_overflow_at_the_width_of_t5():
    q = torch.full((1, 10240), 127, dtype=torch.int8)
    assert int_product(q, q).item() == 127*127*10240

def test_bound_holds_where_all_errors_conspire():
    k, step = 50, 1/127
    x = torch.full((1, k), 10.5*step, dtype=torch.float64); x[0, 0] = 1            # every entry but one lies at a half
    (q, s), (p, t) = quantise_absmax(x), quantise_absmax(x.clone())
    error, (bound, usual) = (x @ x.T - int_product(q, p)*s*t.T).abs(), product_error(x, x, s, t)
    assert 3*usual < error <= bound

def test_layer_with_bias_keeps_shape_and_dtype():
    layer = nn.Linear(24, 7).bfloat16()
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    y = Int8Linear(layer)(x)
    assert y.shape == (2, 3, 7) and y.dtype == torch.bfloat16 and (y - layer(x)).norm() < .05*layer(x).norm()

def test_layer_of_one_token_without_outliers_equals_the_formula():
    layer = nn.Linear(16, 4, bias=False)
    x = torch.randn(1, 16)
    (q, s), (p, t) = quantise_absmax(x), quantise_absmax(layer.weight.detach())
    assert torch.allclose(Int8Linear(layer)(x), (q.float() @ p.float().T)*s*t.T, atol=1e-6)

def test_outliers_do_not_disturb_the_other_columns():
    layer, x = nn.Linear(64, 8, bias=False), torch.randn(32, 64)
    with torch.no_grad(): layer.weight[:, 3] = 0                                    # the outlier has no say in the answer
    big = x.clone(); big[:, 3] = 1e4
    exact = layer(x)
    assert (Int8Linear(layer)(big) - exact).norm() < .05*exact.norm() < .5*(Int8Linear(layer, float('inf'))(big) - exact).norm()

def test_values_that_are_not_finite_are_not_hidden():
    assert not Int8Linear(nn.Linear(4, 2))(torch.tensor([[float('nan'), 1., 1., 1.]])).isfinite().any()
    assert not Int8Linear(nn.Linear(4, 2))(torch.tensor([[float('inf'), 1., 1., 1.]])).isfinite().any()

def test_a_quantised_model_survives_saving():
    model = quantise(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    again = quantise(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(model(x), again(x)) and model[0].weight.dtype == torch.int8

def test_quantise_skips_by_name_and_refuses_what_has_no_layers(pipe):
    model = quantise(copy.deepcopy(pipe.text_encoder), skip=('wo',))
    kinds = {name.split('.')[-1]: type(m) for name, m in model.named_modules()}
    assert kinds['wo'] is nn.Linear and kinds['wi_0'] is Int8Linear
    with pytest.raises(ValueError, match='no linear layer'): quantise(nn.ReLU())

def test_quantised_text_encoder_reads_captions_of_two_lengths(pipe):
    exact, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, CAPTIONS)
    ours, _ = encode_captions(pipe.tokenizer, quantise(copy.deepcopy(pipe.text_encoder)), CAPTIONS)
    assert (ours - exact)[mask].norm() < .05*exact[mask].norm()

def test_stored_captions_give_the_same_latents(pipe):
    stored = copy.copy(pipe)
    stored.text_encoder = StoredCaptions(pipe.tokenizer, pipe.text_encoder, CAPTIONS)
    a, b = (sample_student(p, CAPTIONS, seeds=[3, 4]) for p in (pipe, stored))
    assert torch.allclose(a, b, atol=1e-4*a.abs().max().item()) and stored.text_encoder.encoder is None

def test_stored_captions_hold_each_caption_once_and_refuse_others(pipe):
    stored = StoredCaptions(pipe.tokenizer, pipe.text_encoder, [CAPTIONS[0]]*3)
    assert len(stored.states) == 2                                                   # the caption, and the null caption
    with pytest.raises(ValueError, match='not stored'): encode_captions(pipe.tokenizer, stored, CAPTIONS[1])

def test_weight_bytes_count_tied_weights_once_and_follow_exceptions():
    model = nn.ModuleDict({'a': nn.Linear(10, 10, bias=False), 'wo': nn.Linear(10, 10, bias=False)})
    assert [weight_bytes(model, p) for p in ('fp32', 'bf16', 'int8')] == [800, 400, 280]
    assert weight_bytes(model, 'int8', {'wo': 4}) == 140 + 400
    model['wo'].weight = model['a'].weight
    assert weight_bytes(model, 'fp32') == tensor_bytes(model) == 400
    with pytest.raises(ValueError, match='int4'): weight_bytes(model, 'int4')

def test_paper_parts_have_the_published_sizes():
    with torch.device('meta'):
        sizes = {name: sum(p.numel() for p in paper_part(name).parameters()) for name in ('text_encoder', 'transformer', 'vae')}
    assert sizes == {'text_encoder': 4_762_310_656, 'transformer': 611_349_152, 'vae': 83_653_863}
    with pytest.raises(ValueError, match='unet'): paper_part('unet')

def test_live_bytes_see_memory_that_is_released():
    with LiveBytes() as live:
        for _ in range(5): x = torch.ones(250)
        held = live.now
    assert held == 1000 and live.peak == 2000

def test_imagined_restores_the_default_dtype_after_an_error():
    with pytest.raises(ZeroDivisionError):
        with imagined(torch.bfloat16): 1/0
    assert torch.get_default_dtype() == torch.float32

def test_freeing_moves_the_peak():
    weights, activations = {'text_encoder': 50, 'transformer': 10, 'vae': 2}, {'text_encoder': 1, 'transformer': 3, 'vae': 20}
    assert stage_peaks(weights, activations) == {'text_encoder': 63, 'transformer': 65, 'vae': 82}
    assert stage_peaks(weights, activations, free=True) == {'text_encoder': 51, 'transformer': 15, 'vae': 32}

def test_checkpointing_saves_memory():
    assert lcd_peak(SMALL, 4) < lcd_peak(SMALL, 4, checkpointing=False)

def test_8_bit_moments_save_six_bytes_a_parameter(monkeypatch):
    monkeypatch.setattr('pixart_delta_nb.int8.lcd_peak', lambda *args: 0)
    with torch.device('meta'): n = sum(p.numel() for p in PixArtTransformer(SMALL).parameters())
    assert [sum(training_ledger(SMALL, 4, m).values()) for m in (8, 2)] == [18*n, 12*n]

def test_8_bit_loading_explains_itself_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr('pixart_delta_nb.int8.find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install bitsandbytes'): load_8bit_encoder('anywhere')

def test_low_memory_pipeline_refuses_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match='model_index.json'): low_memory_pipeline(CAPTIONS, tmp_path)

def test_low_memory_pipeline_draws_without_a_text_encoder(tmp_path):
    pytest.importorskip('bitsandbytes', reason='8-bit loading needs bitsandbytes')
    from pixart_delta_nb.pipeline import save_pipeline
    whole = tiny_pipeline()
    save_pipeline(whole, tmp_path)
    low = low_memory_pipeline(CAPTIONS, tmp_path, dtype=torch.float32)
    exact, mask = encode_captions(whole.tokenizer, whole.text_encoder, CAPTIONS)
    eight, _ = encode_captions(low.tokenizer, low.text_encoder, CAPTIONS)
    assert isinstance(low.text_encoder, StoredCaptions) and (eight - exact)[mask].norm() < .05*exact[mask].norm()
    assert sample_student(low, CAPTIONS, seeds=[1, 2]).shape == (2, 4, 8, 8)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_layer_on_a_gpu_equals_the_cpu():
    layer, x = nn.Linear(64, 32), torch.randn(5, 64)*3
    assert torch.allclose(Int8Linear(layer)(x), Int8Linear(layer).cuda()(x.cuda()).cpu(), atol=1e-4)

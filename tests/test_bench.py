"""The benchmark: its operations, its random models, its rules and its JSON, on tiny networks."""
import json
import pytest
import torch
from pixart_delta_nb.evidence import bench as module
from pixart_delta_nb.evidence.bench import CAPTION, GraphedTransformer, bench, derived, matmul_peak, random_pipeline, random_weights, table
from pixart_delta_nb.hub import choose_dtype, precisions
from pixart_delta_nb.pipeline import tiny_pipeline
from pixart_delta_nb.pipeline import save_pipeline
from pixart_delta_nb.text import encode_captions
from pixart_delta_nb.world.autoencoder import build_vae
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

TINY = TransformerConfig(num_attention_heads=3, attention_head_dim=16, num_layers=2, sample_size=16, caption_channels=32, use_additional_conditions=True)

@pytest.fixture
def tiny(monkeypatch):
    "The benchmark with a tiny random pipeline in place of XL/2."
    monkeypatch.setattr(module, 'random_pipeline', lambda *args: tiny_pipeline())
    monkeypatch.setattr(module, 'matmul_peak', lambda *args: 1e12)

def test_random_weights_are_seeded_and_the_norms_are_ones():
    a, b, c = (random_weights(lambda: build_vae(sample_size=32), seed=s) for s in (0, 0, 1))
    assert torch.equal(a.decoder.conv_in.weight, b.decoder.conv_in.weight) and not torch.equal(a.decoder.conv_in.weight, c.decoder.conv_in.weight)
    assert (a.decoder.conv_norm_out.weight == 1).all() and not any(p.requires_grad for p in a.parameters())

def test_random_weights_restore_tied_ones():
    from transformers import T5Config, T5EncoderModel
    model = random_weights(lambda: T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)))
    assert model.shared.weight is model.encoder.embed_tokens.weight

def test_random_pipeline_has_finite_outputs_and_a_full_caption():
    pipe = random_pipeline('workshop', 128, 'cpu', torch.float32)
    h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, CAPTION)
    with torch.no_grad(): out = pipe.transformer(torch.randn(1, 4, 16, 16), torch.tensor([999]), h, mask)
    assert mask.sum() == 120 and out.isfinite().all() and out.std() > 0

def test_bench_counts_evaluations_and_writes_what_it_returns(tiny, tmp_path):
    found = bench('workshop', 128, (2, 3), dtype='float32', repeats=1, batch_size=2, out=tmp_path/'b.json', command='the command')
    assert [m['evaluations'] for m in found['methods'].values()] == [6, 2] and found['evaluation_ratio'] == 3
    assert json.loads((tmp_path/'b.json').read_text()) == found and found['provenance']['command'] == 'the command'

def test_bench_times_a_students_folder_as_teacher_and_as_student(tmp_path, monkeypatch):
    import diffusers
    from pixart_delta_nb.schedules import BETAS
    pipe = tiny_pipeline()
    save_pipeline(pipe, tmp_path)
    (tmp_path/'card.json').unlink()
    diffusers.LCMScheduler(**BETAS).save_pretrained(tmp_path/'scheduler')
    monkeypatch.setattr(module, 'matmul_peak', lambda *args: 1e12)
    monkeypatch.setitem(module.SCALES, 'workshop', (64,))
    found = bench('workshop', 64, (1, 1), weights=tmp_path, dtype='float32', repeats=1)
    assert [m['evaluations'] for m in found['methods'].values()] == [2, 1] and found['memory']['parts'].keys() == {'text_encoder', 'transformer', 'vae'}

def test_bench_with_a_compiled_transformer(tiny, monkeypatch):
    used, real = [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda network: used.append(network) or real(network, backend='eager'))
    found = bench('workshop', 128, (1, 1), dtype='float32', repeats=1, compile=True)
    assert len(used) == 1 and found['compile'] and [m['evaluations'] for m in found['methods'].values()] == [2, 1]

def test_bench_on_a_folder_of_another_resolution_says_which(tmp_path):
    save_pipeline(tiny_pipeline(), tmp_path)
    with pytest.raises(ValueError, match='trained at 64'): bench('workshop', 128, weights=tmp_path, dtype='float32')

def test_ratios_and_shares_follow_from_the_seconds():
    seconds = lambda text, transformer, decode, overhead, n: dict(whole=text + transformer + decode + overhead, text=text, transformer=transformer, decode=decode, overhead=overhead, evaluations=n)
    found = derived({'batch': 1, 'methods': {'teacher 14': seconds(5., 28., 1., .28, 28), 'student 4': seconds(5., 4., 1., .04, 4)}}, 10, 20, 50, 100.)
    assert found['without_text_ratio'] == pytest.approx(29.28/5.04) and found['predicted_ratio'] == pytest.approx(300/60)
    for m in found['methods'].values(): assert [m[k] for k in ('overhead_share', 'peak_share', 'decode_share', 'text_share')] == pytest.approx([.01, .1, .2, .1])

@pytest.mark.parametrize('wrong, said', [
    (dict(scale='poster'), 'paper and workshop'), (dict(scale='workshop', resolution=1024), '128, 256'), (dict(resolution=300), '256, 512, 1024'),
    (dict(steps=(0, 14)), 'at least 1'), (dict(steps=(4,)), 'two whole numbers'), (dict(steps=(4, 2.5)), 'whole'), (dict(steps=(51, 14)), 'at most 50'),
    (dict(dtype='float8'), 'natively'), (dict(cuda_graph=True), 'need a CUDA device'), (dict(device='tpu'), 'cpu and cuda'), (dict(repeats=0), 'at least 1'), (dict(batch_size=0), 'batch_size is 0')])
def test_bad_input_is_one_sentence_before_any_model_is_built(wrong, said, monkeypatch):
    monkeypatch.setattr(module, 'open_pipeline', lambda *args: pytest.fail('built a model'))
    with pytest.raises(ValueError, match=said) as error: bench(**wrong)
    assert '\n' not in str(error.value)

@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a CUDA device')
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match='sees no CUDA device'): bench(device='cuda')

def test_precision_follows_the_processor(monkeypatch):
    for has, names in (({}, ['float32']), ({'avx512_bf16': True}, ['bfloat16', 'float32']), ({'amx_fp16': True}, ['float16', 'float32'])):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
        assert precisions('cpu') == [getattr(torch, n) for n in names] and choose_dtype('cpu') == getattr(torch, names[0])

def test_the_peak_is_at_least_what_a_product_reaches():
    assert matmul_peak(n=128, repeats=2) > 1e7

def test_a_graph_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match='CUDA'): GraphedTransformer(torch.nn.Linear(2, 2))

def test_table_leaves_unmeasured_rows_empty_and_shows_measured_ones(tiny):
    assert table().splitlines()[-1].split() == ['this', 'machine', '–', '–', '–']
    shown = table(bench('workshop', 128, (1, 2), dtype='float32', repeats=1))
    assert 'V100' in shown and 'workshop' not in shown and 'decode' in shown and '–' not in shown

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_graph_replays_the_plain_call():
    network = random_weights(lambda: PixArtTransformer(TINY), 'cuda')
    args = [torch.randn(2, 4, 16, 16).cuda(), torch.tensor([9, 900]).cuda(), torch.randn(2, 5, 32).cuda(), torch.ones(2, 5).cuda()]
    more = {'resolution': torch.full((2, 2), 128.).cuda(), 'aspect_ratio': torch.ones(2, 1).cuda()}
    graphed = GraphedTransformer(network)
    with torch.no_grad():
        for scale in (1, 2): assert torch.allclose(graphed(args[0]*scale, *args[1:], **more), network(args[0]*scale, *args[1:], **more), atol=1e-4)

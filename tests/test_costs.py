"""What a step, a picture, a copy and an evaluation cost: counted by formula, counted by torch, measured."""
import copy, mmap

import pytest
import torch

from pixart_delta_nb.controlnet import ControlNetTransformer
from pixart_delta_nb.lcd import lcd_step
from pixart_delta_nb.evidence.benchmarks import against_stock, benchmark_step, usual_step
from pixart_delta_nb.evidence.control_cost import adapter_flops, adapter_parameters, draw_control_cost, example_inputs, measure_cost
from pixart_delta_nb.evidence.control_cost import run_control_cost, tell_control_cost
from pixart_delta_nb.evidence.kit import Method, real_images, tiny_kit
from pixart_delta_nb.evidence.operations import counted_flops, encode_flops, predicted_ratio, transformer_flops
from pixart_delta_nb.evidence.speed import peak_memory
from pixart_delta_nb.evidence.table1 import run_table1
from pixart_delta_nb.evidence.table2 import REPORT_SECONDS, beside_table2, fit_cost, rows_table2, run_table2
from pixart_delta_nb.latents import Batch
from pixart_delta_nb.text import null_caption
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig
from pixart_delta_nb.world.recipes import scene_data
from pixart_delta_nb.world.captions import make


@pytest.fixture(scope='module')
def kit(): return tiny_kit()


def config(**changes):
    return TransformerConfig(**{'num_attention_heads': 2, 'attention_head_dim': 16, 'num_layers': 4, 'sample_size': 8, 'caption_channels': 32,
                                'use_additional_conditions': False} | changes)


def test_cost_law_is_exact_and_explains_the_report():
    c, a = fit_cost(16., 28, 3.3, 4)
    assert abs(c + 28*a - 16) < 1e-12 and abs(c + 4*a - 3.3) < 1e-12
    with pytest.raises(ValueError, match='different counts'): fit_cost(1., 4, 2., 4)


def test_table_2_is_the_reports():
    assert {gpu: list(row.values()) for gpu, row in REPORT_SECONDS.items()} == {
        'T4': [3.3, 8.4, 16., 26.5], 'V100': [.8, 1.2, 5.5, 7.7], 'A100': [.5, 1.2, 2.2, 3.8]}


def test_table2_counts_evaluations(kit):
    found = run_table2(kit, methods=(Method('teacher', 3), Method('student', 2)), repeats=1)
    assert [r['evaluations'] for r in rows_table2(found)] == [6, 2] and found['speed']['evaluation_ratio'] == 3


def test_table2_stands_beside_the_report():
    methods = {'teacher 14': {'whole': 4.}, 'student 4': {'whole': 1.}}
    rows = beside_table2({'report': REPORT_SECONDS, 'speed': {'batch': 2, 'methods': methods}})
    assert [r['ratio'] for r in rows] == ['4.8', '6.9', '4.4', '4.0']
    assert rows[-1]['4 steps'] == '0.5 s' and rows[-1]['an evaluation'] == '62 ms'


def test_table1_takes_its_batch_from_the_card(kit):
    data = scene_data(kit.teacher, 3)
    kit.student.config['student_card'] = {'batch': 5, 'scenes': 9, 'sha256': {}}
    try: found = run_table1(kit, data)
    finally: del kit.student.config['student_card']
    assert found['rows'][-1] | {'memory': ''} == {'model': 'here', 'pairs': 9, 'pixels': 128, 'batch': 5, 'memory': ''}
    assert found['card'] == {'batch': 5, 'scenes': 9} and found['memory']['peak'] >= found['memory']['before'] > 0


def test_the_peak_of_a_cpu_is_that_of_the_process():
    "New pages of the system's: an allocator may hand out memory that an earlier test has left resident."
    size = 64 << 20
    with peak_memory('cpu') as memory, mmap.mmap(-1, size) as block: block.write(b'1'*size)
    assert memory['peak'] - memory['before'] > .5*size


def test_usual_step_has_the_gradient_of_the_step_here(kit):
    teacher, pipe, data, grads = kit.teacher.transformer, kit.teacher, scene_data(kit.teacher, 2), []
    rows = Batch(data.z.float(), data.caption.float(), data.mask, data.null, data.null_mask)
    images, texts, null = real_images(0, 2), [make(0, i)[1].text for i in range(2)], null_caption(pipe.tokenizer, pipe.text_encoder)
    for usual in (False, True):
        student, generator = copy.deepcopy(teacher).requires_grad_(True), torch.Generator().manual_seed(1)
        with torch.no_grad(): student.proj_out.weight.mul_(1.1)
        loss = (usual_step(student, teacher, pipe, images, texts, null, generator=generator) if usual
                else lcd_step(student, teacher, teacher, rows, pipe.alpha_bar, generator=generator))
        loss.backward()
        grads.append(student.proj_out.weight.grad)
    assert (grads[0] - grads[1]).norm() < .02*grads[0].norm()


def test_a_benchmark_of_no_round_is_refused():
    with pytest.raises(ValueError, match='repeats=0 must be at least 1'): benchmark_step(None, None, None, None, None, repeats=0)


def test_stock_pipeline_makes_the_same_pictures(kit):
    rows = [against_stock(pipe, 2, ['a red cube'], 1) for pipe in (kit.student, kit.teacher)]
    assert all(r['apart'] < 1e-3 and r['ratio'] > 0 for r in rows) and [r['network'] for r in rows] == ['student', 'teacher']


@pytest.mark.parametrize('batch_size, tokens, side', [(1, 1, 16), (2, 7, 16), (3, 120, 8)])
def test_operations_equal_torchs_counter(batch_size, tokens, side):
    shape = config(num_attention_heads=3, num_layers=2, sample_size=16, use_additional_conditions=True)
    with torch.device('meta'):
        network, sizes = PixArtTransformer(shape), dict(resolution=torch.zeros(batch_size, 2), aspect_ratio=torch.zeros(batch_size, 1))
        args = torch.zeros(batch_size, 4, side, side), torch.zeros(batch_size), torch.zeros(batch_size, tokens, 32)
        counted = counted_flops(lambda: network(*args, **sizes))
    assert transformer_flops(shape, batch_size, tokens, side) == counted


def test_prediction_at_its_two_ends():
    assert predicted_ratio(1, 0) == 7 and predicted_ratio(0, 1) == 1 and predicted_ratio(2, 0, (1, 10)) == 20


def test_operations_of_a_caption_by_hand():
    from pixart_delta_nb.world.language import build_text_encoder
    with torch.device('meta'): text = build_text_encoder(50, d_model=24, d_kv=8, num_heads=2, d_ff=40, num_layers=3)
    weights, attention = 2*(4*24*16 + 3*24*40)*7, 2*2*7*7*16
    assert encode_flops(text, 7) == 3*(weights + attention)


def test_cost_is_counted_and_timed_for_each_number_of_copies():
    rows = measure_cost(PixArtTransformer(config()).eval(), (1, 3), batch_size=2, caption_tokens=9, repeats=1)
    with torch.device('meta'):
        given, _ = example_inputs(config(), 1, 9)
        alone = counted_flops(lambda: PixArtTransformer(config())(*given))
    for r, n in zip(rows, (1, 3)):
        assert r['parameters'] == adapter_parameters(config(), n) and r['flops'] == adapter_flops(config(), n, 9)
        assert r['predicted'] == pytest.approx(1 + r['flops']/alone) and r['measured'] == pytest.approx(r['seconds']/r['base_seconds'])
    with pytest.raises(ValueError, match='allows 1 to 3'): measure_cost(PixArtTransformer(config()), (4,), repeats=1)


@pytest.mark.parametrize('copies', [1, 2, 3])
def test_operations_of_copies_are_those_that_torch_counts(copies):
    with torch.device('meta'):
        base = PixArtTransformer(config())
        net, (given, _) = ControlNetTransformer(base, copies), example_inputs(config(), 1, 9)
        added = counted_flops(lambda: net(*given, given[0])) - counted_flops(lambda: base(*given))
    patches = 2*8*8*4*32                                                        # the control enters as latents do
    assert added - patches == adapter_flops(config(), copies, 9)
    assert sum(p.numel() for p in net.adapter.parameters()) == adapter_parameters(config(), copies)


def test_cost_is_measured_with_micro_conditions():
    base = PixArtTransformer(config(attention_head_dim=12, use_additional_conditions=True)).eval()
    assert measure_cost(base, (1,), batch_size=1, caption_tokens=3, repeats=1)[0]['seconds'] > 0


def test_cost_leaves_out_what_does_not_fit_and_adds_no_evaluation(kit):
    found = run_control_cost(kit, copies=(1, 99), batch_size=1, repeats=1)
    assert [r['num_copies'] for r in found['rows']] == [1] and 'Evaluations added: none' in tell_control_cost(found)
    assert len(draw_control_cost(found).axes[0].lines) == 2

"One process and two give one result: rows shared out, weights copied or cut, activations computed twice."
import copy, json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch import nn
from pixart_delta_nb import scale
from pixart_delta_nb.controlnet import load_controlnet, train_controlnet
from pixart_delta_nb.core import load_tensors, read_json, save_tensors
from pixart_delta_nb.data import precompute
from pixart_delta_nb.latents import LatentDataset
from pixart_delta_nb.lcd import lcd_train
from pixart_delta_nb.folders import autoencoder_class, text_encoder_class
from pixart_delta_nb.lcm_lora import lora_train
from pixart_delta_nb.lora import add_lora
from pixart_delta_nb.scale import (Rows, accelerated, checkpoint_blocks, control_many, distill_many, lora_many, main, own_rows, start,
    teach_many)
from pixart_delta_nb.schedules import alpha_bar_from_betas, linear_betas
from pixart_delta_nb.pipeline import load_pipeline, save_pipeline, tiny_pipeline
from pixart_delta_nb.teacher import train_teacher
from pixart_delta_nb.optimisers import EMA, optimisers
from pixart_delta_nb.training import train
from pixart_delta_nb.transformer import Block, PixArtTransformer, TransformerConfig


def tiny(seed=0):
    torch.manual_seed(seed)
    return PixArtTransformer(TransformerConfig(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, caption_channels=12,
                                               use_additional_conditions=False)).double().eval()


def inputs(rows=4):
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(rows, 4, 8, 8), torch.arange(rows)*9, draw(rows, 5, 12)


def lcd(out, **options):
    x, _, caption = inputs(32)
    data = LatentDataset(x, caption, torch.ones(32, 5), torch.zeros(1, 1, 12).double())
    return lcd_train(accelerated(tiny()), data, alpha_bar_from_betas(linear_betas()), out, steps=5, batch_size=7, lr=1e-3, warmup=1, progress=False,
                     log_every=1, average=.9, **options)


def regression(out, **options):
    torch.manual_seed(0)
    net, g = accelerated(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()), torch.Generator().manual_seed(0)
    ema = EMA(net)
    def step_fn(step, steps):
        x = torch.randn(6, 6, generator=g, dtype=torch.float64)
        return (net(x) - x[:, :3]).square().mean()
    state = {'net': net, 'ema': ema, 'g': g} | optimisers(net, lambda n, p: p.ndim == 2)
    train(step_fn, state, 6, out, clip=1., accumulate=2, after=lambda i, n: ema.update(net, .5), log_every=1, progress=False, **options)


def rows_of_data(**changes):
    x, _, caption = (y.float() if y.is_floating_point() else y for y in inputs(32))
    return LatentDataset(x, caption, torch.ones(32, 5, dtype=torch.bool), torch.zeros(1, 1, 12), **changes)


def lora(out, **options):
    model, (x, _, caption) = accelerated(add_lora(tiny(), rank=2)), inputs(32)
    data = LatentDataset(x, caption, torch.ones(32, 5, dtype=torch.bool), torch.zeros(1, 1, 12).double())
    return lora_train(model, data, alpha_bar_from_betas(linear_betas()), out, steps=4, batch_size=6, lr=1e-2, warmup=1, clip=1., progress=False, log_every=1, **options)


def teacher(out, **options):
    return train_teacher(rows_of_data(), out, steps=4, batch_size=6, transformer=accelerated(tiny().float()), progress=False, log_every=1, **options)


def control(out, **options):
    data = rows_of_data(control=inputs(32)[0].float().flip(-1))
    return train_controlnet(tiny().float(), data, out, 4, 1, batch_size=6, lr=1e-2, wrap=accelerated, progress=False, log_every=1, **options)


LOOPS = (lcd, regression, lora, teacher, control)
FLOAT32 = ('teacher', 'control')                                                # the others run in float64


def work(out):
    "What each process of a launch does: all loops, each with a pause and a resume."
    torch.set_num_threads(1)
    for loop in LOOPS:
        loop(out/loop.__name__, until=2)
        result = loop(out/loop.__name__, resume=True)
        if loop is lcd: student = result[0].plain()
        if loop is teacher: result.plain()
    saved = load_tensors(out/'lcd'/'checkpoint.safetensors')
    for name, p in student.named_parameters(): assert torch.equal(p, saved[f'/state/average/{name}'])
    try: accelerated(tiny())(*inputs(1))
    except ValueError as error: (out/'refusal.txt').write_text(str(error))


@pytest.fixture(scope='module')
def single(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('single')
    for loop in LOOPS: loop(out/loop.__name__)
    return out


@pytest.mark.parametrize('kind', ['ddp', 'fsdp'])
def test_two_processes_give_the_result_of_one(single, tmp_path, kind):
    config = Path(__file__).parents[1]/f'configs/accelerate/{kind}_cpu.yaml'
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--config_file', config, '--main_process_port', '0', __file__, tmp_path],
                          capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (loop.__name__ for loop in LOOPS):
        one, two = (load_tensors(folder/name/'checkpoint.safetensors') for folder in (single, tmp_path))
        assert one.keys() == two.keys()
        assert max((one[k].double() - two[k].double()).abs().max() for k in one) < (1e-5 if name in FLOAT32 else 1e-9), name
        losses = [[json.loads(l)['loss'] for l in (folder/name/'log.jsonl').read_text().splitlines()] for folder in (single, tmp_path)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5 if name in FLOAT32 else 1e-9) and len(losses[0]) in (4, 5, 6)
    assert 'for 2 processes' in (tmp_path/'refusal.txt').read_text()


def test_the_single_run_moves(single):
    saved = load_tensors(single/'lcd'/'checkpoint.safetensors')
    assert max((saved[f'/state/trained/{n}'] - p).abs().max() for n, p in tiny().named_parameters()) > 1e-3
    for name, key in (('lora', '/state/trained/0.B.weight'), ('control', '/state/trained/controlnet_blocks.0.after_proj.weight')):
        assert load_tensors(single/name/'checkpoint.safetensors')[key].abs().max() > 1e-4


def test_shipped_configurations():
    import yaml
    folder = Path(__file__).parents[1]/'configs/accelerate'
    found = {p.stem: yaml.safe_load(p.read_text()) for p in folder.glob('*.yaml')}
    assert set(found) == {'ddp', 'fsdp', 'ddp_cpu', 'fsdp_cpu'}
    assert all(c['use_cpu'] == n.endswith('cpu') and (c['distributed_type'] == 'FSDP') == n.startswith('fsdp') for n, c in found.items())


@pytest.mark.parametrize('total, processes', [(1, 1), (7, 2), (9, 4), (24, 5)])
def test_every_row_has_a_process_and_all_shares_are_equal(total, processes):
    shares = [own_rows(total, processes, r) for r in range(processes)]
    assert len({len(s) for s in shares}) == 1 and torch.cat(shares)[:total].tolist() == list(range(total))


def test_more_processes_than_rows_is_one_sentence():
    with pytest.raises(ValueError, match='2 rows for 3 processes'): own_rows(2, 3, 0)


def test_half_precision_without_scaling_is_refused(monkeypatch):
    import accelerate
    monkeypatch.setattr(accelerate, 'Accelerator', lambda **options: SimpleNamespace(mixed_precision='fp16'))
    with pytest.raises(ValueError, match='bf16'): start()


def test_wrapper_is_invisible_in_one_process():
    net, rows = tiny(), accelerated(tiny())
    rows.load_state_dict(tiny(3).state_dict())
    net.load_state_dict(rows.state_dict())
    assert torch.equal(net(*inputs()), rows(*inputs())) and rows.config == net.config and isinstance(rows.plain(), PixArtTransformer)
    with pytest.raises(AttributeError): rows.nothing
    with pytest.raises(RuntimeError): rows.load_state_dict({})


def test_copies_share_nothing():
    rows = accelerated(tiny())
    twin = copy.deepcopy(rows)
    with torch.no_grad(): next(twin.parameters()).add_(1)
    assert isinstance(twin, Rows) and not torch.equal(next(twin.parameters()), next(rows.parameters()))


def gradients(net):
    net(*inputs()).square().mean().backward()
    return [p.grad for p in net.parameters()]


def test_blocks_computed_twice_change_no_bit():
    for a, b in zip(gradients(tiny()), gradients(checkpoint_blocks(tiny()))): assert torch.equal(a, b)


def test_blocks_run_again_in_the_backward_pass():
    net, calls = checkpoint_blocks(tiny()), []
    for block in net.transformer_blocks: block.attn1.register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad(): net(*inputs())
    assert len(calls) == 2
    gradients(net)
    assert len(calls) == 2 + 4


def test_checkpointed_network_keeps_names_copies_and_classes():
    net = checkpoint_blocks(tiny())
    twin = copy.deepcopy(net)
    assert list(net.state_dict()) == list(tiny().state_dict()) and all(isinstance(b, Block) for b in twin.transformer_blocks)
    for a, b in zip(gradients(net), gradients(twin)): assert torch.equal(a, b)


@pytest.fixture
def workplace(tmp_path):
    save_pipeline(tiny_pipeline(), tmp_path/'teacher')
    save_tensors(tmp_path/'rows.safetensors', {'latents': torch.randn(8, 4, 8, 8), 'captions': torch.randn(8, 5, 32), 'mask': torch.ones(8, 5, dtype=torch.bool),
                                               'null': torch.zeros(1, 1, 32)})
    return tmp_path


@pytest.mark.parametrize('words, made', [(['distill', '--recompute'], 'pipeline/card.json'), (['teach'], 'pipeline/card.json'), (['lora', '--rank', '2'], 'lora/adapter_model.safetensors')])
def test_commands_write_a_folder(workplace, words, made):
    where = [str(workplace/name) for name in ('teacher', 'rows.safetensors', 'out')]
    with pytest.raises(SystemExit) as done: main([words[0], *where, '--steps', '2', '--batch-size', '2', *words[1:]])
    assert not done.value.code and (workplace/'out'/made).is_file()
    if 'pipeline' in made: assert not torch.equal(load_pipeline(workplace/'out/pipeline').transformer.proj_out.weight, load_pipeline(workplace/'teacher').transformer.proj_out.weight)


def test_bad_input_to_a_command_is_one_sentence(workplace):
    with pytest.raises(SystemExit) as done: main(['distill', str(workplace/'nowhere'), str(workplace/'rows.safetensors'), str(workplace/'out')])
    assert 'not a folder' in done.value.code and '\n' not in done.value.code


def test_without_accelerate_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(scale, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'pixart_delta_nb\[scale\]'"): start()


@pytest.fixture
def mixed(monkeypatch):
    "An accelerator of bfloat16 products; Accelerate keeps one state a process, which is forgotten before and after."
    import accelerate
    forget = lambda: accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    forget()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision='bf16')
    monkeypatch.setattr(scale, 'start', lambda: accelerator)
    yield
    forget()


def test_mixed_precision_keeps_the_frozen_teacher_in_half_and_the_student_in_full(workplace, mixed, monkeypatch):
    seen, real = [], scale.lcd_train
    monkeypatch.setattr(scale, 'lcd_train', lambda teacher, *args, student, **options: seen.extend((teacher, student)) or real(teacher, *args, student=student, **options))
    made = load_pipeline(distill_many(workplace/'teacher', workplace/'rows.safetensors', workplace/'out', 2, batch_size=2, progress=False)).transformer
    assert [next(n.parameters()).dtype for n in seen] == [torch.bfloat16, torch.float32] and made.proj_out.weight.isfinite().all()


def test_averaged_adapters_are_refused_where_weights_are_cut(workplace, monkeypatch):
    monkeypatch.setattr(scale, 'is_sharded', lambda accelerator: True)
    with pytest.raises(ValueError, match='mu is 0.95'): lora_many(workplace/'teacher', workplace/'rows.safetensors', workplace/'out', 2, mu=.95)


def test_rows_come_from_shards_too(workplace):
    from PIL import Image
    pictures = [{'image': Image.new('RGB', (64, 64), (i*20, 0, 0)), 'text': 'a red cube'} for i in range(8)]
    precompute(load_pipeline(workplace/'teacher'), pictures, out=workplace/'shards', shard_size=4, size=64, progress=False)
    made = teach_many(workplace/'teacher', workplace/'shards', workplace/'out', 2, batch_size=2, progress=False)
    assert (made/'card.json').is_file() and not load_pipeline(made).is_student


def test_a_teacher_taught_by_many_is_written_without_loading_the_other_parts(workplace, monkeypatch):
    for cls in (autoencoder_class(), text_encoder_class()): monkeypatch.setattr(cls, 'from_pretrained', None)
    made = teach_many(workplace/'teacher', workplace/'rows.safetensors', workplace/'out', 2, batch_size=2, progress=False)
    assert all((made/f).samefile(workplace/'teacher'/f) for f in ('vae/diffusion_pytorch_model.safetensors', 'text_encoder/model.safetensors'))
    monkeypatch.undo()
    assert not load_pipeline(made).is_student and read_json(made/'card.json')['taught'] == {'steps': 2, 'processes': 1}


def test_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match='Block'): checkpoint_blocks(nn.Linear(1, 1))
    with pytest.raises(ValueError, match='Block'): checkpoint_blocks(checkpoint_blocks(tiny()))


def test_a_controlnet_from_folder_to_folder(workplace):
    z = load_tensors(workplace/'rows.safetensors')['latents']
    save_tensors(workplace/'control.safetensors', {'control': z.flip(-1)})
    made = control_many(workplace/'teacher', workplace/'rows.safetensors', workplace/'out', workplace/'control.safetensors', 2, 1, batch_size=2, progress=False)
    saved = load_controlnet(made, load_pipeline(workplace/'teacher').transformer)
    assert saved.adapter.controlnet_blocks[0].after_proj.weight.abs().max() > 0


def test_a_folder_distilled_by_many_is_known_as_a_student_and_is_not_distilled_again(workplace):
    made = distill_many(workplace/'teacher', workplace/'rows.safetensors', workplace/'out', 2, guidance_scale=3., batch_size=2, progress=False)
    assert load_pipeline(made).omega == 2
    with pytest.raises(ValueError, match='is a student already'): distill_many(made, workplace/'rows.safetensors', workplace/'twice', 2)


if __name__ == '__main__': work(Path(sys.argv[1]))

"Stages from folder to folder: a student, an adapter and a ControlNet of a user's own model, and what they refuse."
import os, signal, subprocess, sys, textwrap
from dataclasses import replace
import pytest, torch
from PIL import Image
from pixart_delta_nb.conditions import extract
from pixart_delta_nb.controlnet import load_controlnet
from pixart_delta_nb.core import load_tensors
from pixart_delta_nb.data import precompute, save_latents
from pixart_delta_nb.lcd import lcd_train
from pixart_delta_nb.lora import apply_lora, chosen_layers
from pixart_delta_nb.pipeline import load_pipeline, save_pipeline, tiny_pipeline
from pixart_delta_nb.sampling import generate
from pixart_delta_nb.stages import controlled, distill, distill_lora, train_control

SETTINGS = dict(steps=2, lr=1e-3, batch_size=2, warmup=1, progress=False)
CONTROL = dict(steps=2, num_copies=1, batch_size=2, progress=False)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def pictures(): return torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def place(tmp_path_factory, pictures):
    "A teacher's folder, and D_z made with it as a file."
    folder, tiny = tmp_path_factory.mktemp('place'), tiny_pipeline()
    save_pipeline(tiny, folder/'teacher')
    precompute(tiny, pictures, ['a red cube on grass', 'a small blue sphere at night']*3, folder/'d_z.safetensors')
    return folder


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_distilling_a_folder_is_the_loop_and_gives_a_student(place, tmp_path):
    from pixart_delta_nb.data import open_latents
    tiny = tiny_pipeline()
    made = distill(place/'teacher', place/'d_z.safetensors', tmp_path/'run', guidance_scale=3., **SETTINGS)
    by_hand, _, _ = lcd_train(tiny.transformer, open_latents(place/'d_z.safetensors'), tiny.alpha_bar, tmp_path/'by_hand', omega=2., **SETTINGS)
    opened = load_pipeline(made)
    assert same(opened.transformer, by_hand) and opened.is_student and opened.omega == 2 and not load_pipeline(place/'teacher').is_student
    assert same(opened.vae, load_pipeline(place/'teacher').vae) and generate(opened, ['a red cube'], steps=2).evaluations == 2


def test_distilling_loads_the_transformer_alone(place, tmp_path, monkeypatch):
    import diffusers, transformers
    def refuse(*args, **kwargs): raise AssertionError('loaded')
    for cls in (diffusers.AutoencoderKL, transformers.T5EncoderModel): monkeypatch.setattr(cls, 'from_pretrained', refuse)
    assert (distill(place/'teacher', place/'d_z.safetensors', tmp_path, **SETTINGS)/'text_encoder').is_dir()


def test_latents_of_another_scale_are_refused(place, tmp_path):
    from pixart_delta_nb.data import open_latents
    data = open_latents(place/'d_z.safetensors')
    save_latents(replace(data, z=data.z*3.79/.5, facts=data.facts | {'scaling_factor': 3.79}), tmp_path/'scaled.safetensors')
    for stage, settings in ((distill, SETTINGS), (distill_lora, SETTINGS), (train_control, CONTROL)):
        with pytest.raises(ValueError, match='scaling_factor = 3.79, but the pipeline has 0.5'): stage(place/'teacher', tmp_path/'scaled.safetensors', tmp_path/'run', **settings)
    assert not (tmp_path/'run').exists()


def test_latents_of_another_model_are_refused(place, tmp_path, pictures):
    other = precompute(tiny_pipeline(seed=1), pictures[:2], ['a red cube']*2)
    with pytest.raises(ValueError, match='vae = .*precompute them again'): distill(place/'teacher', other, tmp_path, **SETTINGS)


def test_a_student_is_not_distilled_nor_put_under_control(place, tmp_path):
    student = distill(place/'teacher', place/'d_z.safetensors', tmp_path/'student', **SETTINGS)
    for stage, settings in ((distill, SETTINGS), (distill_lora, SETTINGS), (train_control, CONTROL)):
        with pytest.raises(ValueError, match='is a student already'): stage(student, place/'d_z.safetensors', tmp_path/'again', **settings)


@pytest.mark.parametrize('scale', [(2., 8.), .5, None])
def test_a_folder_has_one_guidance(place, tmp_path, scale):
    with pytest.raises(ValueError, match='guidance_scale is'): distill(place/'teacher', place/'d_z.safetensors', tmp_path, guidance_scale=scale, **SETTINGS)


def test_a_run_is_resumed_with_its_own_data_and_teacher_alone(place, tmp_path, pictures):
    run = lambda pipeline=place/'teacher', latents=place/'d_z.safetensors', **options: distill(pipeline, latents, tmp_path/'run', **SETTINGS | options)
    run(until=1)
    assert not (tmp_path/'run/pipeline').exists()
    with pytest.raises(ValueError, match='choose another folder'): run()
    with pytest.raises(ValueError, match='data = '): run(latents=precompute(tiny_pipeline(), pictures[:4], ['a cube']*4), resume=True)
    other = tiny_pipeline()
    torch.manual_seed(5)
    for p in other.transformer.parameters(): torch.nn.init.normal_(p, std=.1)
    save_pipeline(other, tmp_path/'other')
    with pytest.raises(ValueError, match='teacher = '): run(tmp_path/'other', resume=True)
    assert load_pipeline(run(resume=True)).is_student


def test_an_adapter_makes_a_teacher_a_student(place, tmp_path):
    made = distill_lora(place/'teacher', place/'d_z.safetensors', tmp_path, rank=2, guidance_scale=3., **SETTINGS)
    pipe = load_pipeline(place/'teacher')
    plain = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    assert apply_lora(pipe, made) == 2*len(chosen_layers(pipe.transformer))
    assert pipe.is_student and pipe.omega == 2. and pipe.transformer.state_dict().keys() == plain.keys()
    assert not torch.equal(pipe.transformer.proj_out.weight, plain['proj_out.weight']) and generate(pipe, ['a red cube'], steps=2).evaluations == 2
    with pytest.raises(ValueError, match='holds a student already'): apply_lora(pipe, made)


def user_folder(folder, count=6):
    folder.mkdir()
    for i in range(count):
        Image.effect_noise((80, 64), 60 + 10*i).convert('RGB').save(folder/f'{i}.png')
        (folder/f'{i}.txt').write_text('a red cube on grass')
    return folder


def test_a_controlnet_learns_from_a_users_folder_of_pictures(place, tmp_path):
    data = precompute(load_pipeline(place/'teacher'), user_folder(tmp_path/'pictures'), out=tmp_path/'shards', control='edges', progress=False)
    made = train_control(place/'teacher', tmp_path/'shards', tmp_path/'run', **CONTROL)
    net = load_controlnet(made, load_pipeline(place/'teacher').transformer)
    assert len(data) == 6 and net.facts['condition'] == 'edges' and net.adapter.controlnet_blocks[0].after_proj.weight.abs().max() > 0


class Known:
    "Condition pictures that a world knows."
    def __init__(self, pictures, seed=None): self.pictures, self.seed = pictures, seed
    def __len__(self): return len(self.pictures)
    def __getitem__(self, i): return extract(self.pictures[i][None]/255, 'edges')[0]


def of_world(place, seed):
    from pixart_delta_nb.data import open_latents
    data = open_latents(place/'d_z.safetensors')
    return replace(data, facts=data.facts | {'world': seed})


def test_conditions_of_another_world_are_refused(place, tmp_path, pictures):
    for data, known in ((of_world(place, 7), Known(pictures, 0)), (of_world(place, 7), Known(pictures))):
        with pytest.raises(ValueError, match='latents are of world 7'): train_control(place/'teacher', data, tmp_path, known, **CONTROL)
    with pytest.raises(ValueError, match='5 condition pictures for 6 latents'): train_control(place/'teacher', of_world(place, 7), tmp_path, Known(pictures[:5], 7), **CONTROL)
    with pytest.raises(ValueError, match='lacks control'): train_control(place/'teacher', of_world(place, 7), tmp_path, **CONTROL)
    assert load_controlnet(train_control(place/'teacher', of_world(place, 7), tmp_path/'run', Known(pictures, 7), **CONTROL), tiny_pipeline().transformer)


def test_kept_conditions_are_encoded_anew_for_other_data_and_other_pictures(place, tmp_path, pictures):
    kept = lambda: load_tensors(tmp_path/'run/control.safetensors')['control']
    def go(data, known):
        for left in (tmp_path/'run').glob('checkpoint*'): left.unlink()
        train_control(place/'teacher', data, tmp_path/'run', known, **CONTROL)
        return kept()
    first = go(of_world(place, 7), Known(pictures, 7))
    stamp = (tmp_path/'run/control.safetensors').stat().st_mtime_ns
    assert torch.equal(go(of_world(place, 7), Known(pictures, 7)), first) and (tmp_path/'run/control.safetensors').stat().st_mtime_ns == stamp
    flipped = go(of_world(place, 7), Known(pictures.flip(-1), 7))
    assert not torch.equal(flipped, first)
    late = torch.cat([pictures[:-1], pictures[-1:].flip(-1)]).flip(-1)                            # the last one alone differs
    assert not torch.equal(go(of_world(place, 7), Known(late, 7))[-1], flipped[-1])
    stamp = (tmp_path/'run/control.safetensors').stat().st_mtime_ns
    go(of_world(place, 8), Known(late, 8))
    assert (tmp_path/'run/control.safetensors').stat().st_mtime_ns != stamp


def test_one_picture_of_a_user_takes_charge(place, tmp_path, pictures):
    data = precompute(load_pipeline(place/'teacher'), pictures, ['a cube']*6, control='edges')
    made = train_control(place/'teacher', data, tmp_path, **CONTROL)
    pipe, drawing = tiny_pipeline(), Image.fromarray(pictures[0].permute(1, 2, 0).numpy())
    steered, shown = controlled(pipe, drawing, controlnet=made)
    assert torch.allclose(shown, extract(pictures[:1]/255, 'edges'), atol=1e-4) and generate(steered, ['a cube'], steps=1, control=shown).shape == (1, 3, 64, 64)
    assert torch.allclose(controlled(pipe, drawing, 'given', made)[1], pictures[:1]/127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match='was trained on edges'): controlled(pipe, drawing, 'depth', made)


def test_a_stage_stopped_by_sigterm_keeps_what_was_done_and_says_so(place, tmp_path):
    code = textwrap.dedent('''
        import sys, torch; torch.set_num_threads(1)
        from pixart_delta_nb.stages import distill
        distill(sys.argv[1], sys.argv[2], sys.argv[3], 10**6, batch_size=2, save_every=1, log_every=1, log=lambda entry: print(entry, flush=True))''')
    child = subprocess.Popen([sys.executable, '-c', code, place/'teacher', place/'d_z.safetensors', tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | {'OMP_NUM_THREADS': '1'})
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and 'Stopped after step' in said and 'Traceback' not in said
    assert (tmp_path/'checkpoint.safetensors').is_file() and not (tmp_path/'pipeline').exists()

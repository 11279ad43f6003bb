"""Commands: what is written, one clear sentence for what cannot be done, and what is left where a command is stopped."""
import functools, io, json, os, signal, subprocess, sys, time
import pytest
from PIL import Image
from pixart_delta_nb import cli
from pixart_delta_nb.core import PlainProgress

COMMANDS = ('generate', 'precompute', 'distill', 'train-decoder', 'train-controlnet', 'render', 'train-vae', 'train-text', 'train-teacher', 'reproduce',
            'evaluate', 'train-evaluator', 'train-clip', 'bench')
PLACE = {'generate': ['a red cube'], 'precompute': ['pictures']}                    # arguments without which a command does not start


def run(*words): cli.main([str(word) for word in words])


def failed(capsys, *words):
    "Exit status and the sentence of a command that fails."
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_: run(*words)
    return exit_.value.code, capsys.readouterr().err


def refused(capsys, *words):
    "The one sentence of a command that cannot do what it is asked."
    code, message = failed(capsys, *words)
    assert code == 1 and 'Traceback' not in message and len(message.strip().splitlines()) == 1, message
    return message


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "A folder with a tiny teacher, six captioned pictures of 64 pixels, and what the commands make of them."
    from pixart_delta_nb.pipeline import save_pipeline, tiny_pipeline
    folder = tmp_path_factory.mktemp('own')
    (folder/'pictures').mkdir()
    for i in range(6):
        Image.new('RGB', (64, 64), (40*i, 0, 0)).save(folder/f'pictures/{i}.png')
        (folder/f'pictures/{i}.txt').write_text('a red cube on grass')
    save_pipeline(tiny_pipeline(), folder/'teacher')
    run('precompute', folder/'pictures', '--pipeline', folder/'teacher', '--out', folder/'latents', '--control', 'edges')
    return folder


def test_help_is_instant_and_lists_the_commands_on_a_console_without_greek():
    code = 'import sys\nfrom pixart_delta_nb.cli import main\nmain(sys.argv[1:])\nassert "torch" not in sys.modules'
    for words in (['--help'], ['distill', '--help'], ['evaluate', '--help']):
        done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, encoding='cp1252',
                              env=os.environ | {'PYTHONIOENCODING': 'cp1252'})
        assert done.returncode == 0, done.stderr
        if words == ['--help']: assert all(name in done.stdout for name in (*COMMANDS, 'lab', 'demo', 'doctor'))


# what is drawn, and how it is written

def test_generate_writes_a_picture_that_depends_on_the_seed_alone(tmp_path):
    for name, seed in (('a', 3), ('b', 3), ('c', 4)):
        run('generate', 'a large red cube in the middle on sand at night', '--seed', seed, '--out', tmp_path/f'{name}.png')
    a, b, c = (Image.open(tmp_path/f'{n}.png') for n in 'abc')
    assert a.size == (128, 128) and a.tobytes() == b.tobytes() and a.tobytes() != c.tobytes()


def test_a_picture_has_the_format_of_its_suffix_and_the_permissions_of_the_umask(own, tmp_path):
    before = os.umask(0o027)
    try:
        for suffix, wanted in (('png', 'PNG'), ('JPG', 'JPEG'), ('webp', 'WEBP'), ('tif', 'TIFF'), ('bmp', 'BMP')):
            out = tmp_path/f'new/x.{suffix}'
            run('generate', 'a red cube', '--pipeline', own/'teacher', '--steps', 2, '--out', out)
            assert Image.open(out).format == wanted and out.stat().st_mode & 0o777 == 0o640
    finally: os.umask(before)


@pytest.mark.parametrize('name', ['x', 'x.psd', 'x.png.txt'])
def test_a_name_without_a_known_format_is_refused_before_anything_is_drawn(name, tmp_path, capsys):
    assert '.webp' in refused(capsys, 'generate', 'a red cube', '--out', tmp_path/name) and not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_picture_is_refused(tmp_path, capsys):
    assert 'is a folder' in refused(capsys, 'generate', 'a red cube', '--out', tmp_path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('words, part', [
    (['--steps', '0'], 'steps is 0'), (['--steps', '51'], '51'), (['--guidance-scale', '4.5'], 'guidance_scale is 4.5'),
    (['--seed', str(2**64)], 'seed'), (['--seed', str(-2**70)], 'seed')])
def test_numbers_out_of_range_are_refused(words, part, tmp_path, capsys):
    assert part in refused(capsys, 'generate', 'a red cube', *words, '--out', tmp_path/'x.png') and not list(tmp_path.iterdir())


def test_a_seed_of_64_bits_draws(own, tmp_path):
    run('generate', 'a red cube', '--pipeline', own/'teacher', '--steps', 2, '--seed', 2**63 + 1, '--out', tmp_path/'x.png')
    assert (tmp_path/'x.png').is_file()


def test_teacher_takes_guidance(tmp_path, capsys):
    run('generate', 'a red cube', '--teacher', '--guidance-scale', 2, '--steps', 2, '--out', tmp_path/'x.png')
    assert '4 network evaluations' in capsys.readouterr().out


def test_a_lora_makes_the_teacher_a_student(tmp_path, capsys):
    from pixart_delta_nb.folders import shipped
    run('generate', 'a red cube on sand', '--lora', shipped('lora'), '--out', tmp_path/'x.png')
    assert '4 network evaluations' in capsys.readouterr().out
    refused(capsys, 'generate', 'a red cube', '--lora', tmp_path, '--out', tmp_path/'y.png')


@pytest.mark.parametrize('words', [['--pipeline', 'mine', '--teacher'], ['--teacher', '--lora', 'mine'], ['--pipeline', 'mine', '--control', 'x.png']])
def test_options_that_exclude_each_other_are_refused(words, own, tmp_path, capsys):
    words = [str(own/'teacher') if word == 'mine' else word for word in words]
    refused(capsys, 'generate', 'a red cube', *words, '--out', tmp_path/'x.png')


def test_an_unknown_word_is_named_in_one_plain_line(tmp_path, capsys):
    run('generate', 'a red zeppelin on sand', '--out', tmp_path/'x.png')
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('pixart-delta: ') and 'zeppelin' in lines[0] and 'Warning' not in lines[0]


def test_a_console_without_greek_and_chinese_prints_what_it_can(own, tmp_path, monkeypatch):
    for name in ('stdout', 'stderr'): monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), 'cp1252'))
    run('generate', 'ω 猫', '--pipeline', own/'teacher', '--steps', 2, '--out', tmp_path/'猫.png')
    for stream, wanted in ((sys.stdout, rb'\u732b.png'), (sys.stderr, rb'\u732b')):
        stream.flush()
        assert wanted in stream.buffer.getvalue()


def test_words_that_the_model_has_never_met_are_quoted_in_one_line(tmp_path, capsys):
    run('generate', 'A red teapot, on jet-black grass!', '--steps', 1, '--out', tmp_path/'x.png')
    said = [line for line in capsys.readouterr().err.splitlines() if 'never met' in line]
    assert len(said) == 1 and said[0].startswith('pixart-delta:') and '"teapot"' in said[0] and '"grass"' not in said[0]


# control

@pytest.fixture(scope='module')
def edges(tmp_path_factory):
    from pixart_delta_nb.sampling import to_pil
    from pixart_delta_nb.world.truths import truth
    from pixart_delta_nb.world.captions import make
    path = tmp_path_factory.mktemp('edges')/'edges.png'
    to_pil(truth(make(555, 3)[0], 'edges')/2 + .5)[0].save(path)
    return path


def test_a_control_picture_and_its_strength_change_the_image(tmp_path, edges):
    given = ['--control', edges, '--condition', 'given']
    for name, words in (('free', []), ('off', [*given, '--conditioning-scale', 0]), ('on', given)):
        run('generate', 'a red cube on sand', *words, '--out', tmp_path/f'{name}.png')
    free, off, on = (Image.open(tmp_path/f'{n}.png').tobytes() for n in ('free', 'off', 'on'))
    assert free == off != on


@pytest.mark.parametrize('mode', ['P', 'LA', 'RGBA', 'CMYK', 'I;16'])
def test_control_takes_pictures_of_odd_modes(mode, tmp_path, edges):
    picture = Image.open(edges).convert('L') if mode == 'I;16' else Image.open(edges)
    picture.convert('I;16' if mode == 'I;16' else mode).save(tmp_path/'odd.tif')
    run('generate', 'a red cube', '--control', tmp_path/'odd.tif', '--condition', 'given', '--steps', 1, '--out', tmp_path/'x.png')
    assert (tmp_path/'x.png').is_file()


def test_a_decompression_bomb_as_control_is_refused(tmp_path, capsys):
    Image.new('1', (20_000, 20_000)).save(tmp_path/'huge.png')
    assert 'huge.png' in refused(capsys, 'generate', 'a red cube', '--control', tmp_path/'huge.png', '--out', tmp_path/'x.png')


def test_a_condition_that_the_controlnet_was_not_trained_on_is_refused(tmp_path, edges, capsys):
    message = refused(capsys, 'generate', 'a red cube', '--control', edges, '--condition', 'depth', '--out', tmp_path/'x.png')
    assert 'depth' in message and 'edges' in message


# a model of one's own, and a world from nothing

def test_a_folder_becomes_a_student_an_adapter_and_a_controlnet(own, tmp_path, capsys):
    mine = ['--pipeline', own/'teacher', '--latents', own/'latents', '--steps', 2, '--batch-size', 2]
    run('distill', *mine, '--out', tmp_path/'student', '--guidance-scale', 3)
    run('distill', *mine, '--out', tmp_path/'adapter', '--lora', '--rank', 2)
    run('train-controlnet', *mine, '--out', tmp_path/'control', '--copies', 1)
    drawn = capsys.readouterr().out.split()
    assert drawn == [str(tmp_path/'student/pipeline'), str(tmp_path/'adapter/lora'), str(tmp_path/'control/controlnet')]
    from pixart_delta_nb import load_pipeline
    assert load_pipeline(tmp_path/'student/pipeline').omega == 2                    # ω = s - 1
    steered = ['--control', own/'pictures/3.png', '--controlnet', tmp_path/'control/controlnet']
    for model, more in ((tmp_path/'student/pipeline', []), (own/'teacher', steered)):
        run('generate', 'a red cube', '--pipeline', model, '--steps', 2, *more, '--out', tmp_path/'x.png')
        assert Image.open(tmp_path/'x.png').size == (64, 64)


def test_latents_of_another_model_are_refused(own, tmp_path, capsys):
    from pixart_delta_nb.pipeline import save_pipeline, tiny_pipeline
    save_pipeline(tiny_pipeline(seed=1), tmp_path/'other')
    mine = ['--pipeline', tmp_path/'other', '--latents', own/'latents', '--out', tmp_path/'out']
    for command in (['distill'], ['distill', '--lora'], ['train-controlnet', '--copies', 1]):
        assert 'precompute' in refused(capsys, *command, *mine)


@pytest.fixture
def small(monkeypatch):
    "The world's stages on eight scenes: a tokenizer of few captions, scores of few, eight rows a step of the teacher."
    from pixart_delta_nb import teacher
    from pixart_delta_nb.world import recipes
    monkeypatch.setattr(recipes, 'train_text_encoder', functools.partial(recipes.train_text_encoder, vocabulary=500, batch_size=4))
    monkeypatch.setattr(recipes, 'score_text', functools.partial(recipes.score_text, count=20))
    monkeypatch.setattr(teacher, 'train_teacher', functools.partial(teacher.train_teacher, batch_size=8))


def test_the_world_goes_from_nothing_to_a_student_with_the_defaults(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run('render', '--count', 8)
    for command in ('train-vae', 'train-text', 'train-teacher'): run(command, '--steps', 1)
    run('distill', '--steps', 1, '--batch-size', 2)
    run('train-controlnet', '--steps', 1, '--batch-size', 2, '--copies', 1, '--data', 'data/scenes')
    out = capsys.readouterr().out
    assert all(word in out for word in ('8 scenes', 'runs/vae', 'runs/text', 'runs/teacher/pipeline', 'runs/student/pipeline', 'runs/controlnet/controlnet'))
    from pixart_delta_nb import load_pipeline
    assert load_pipeline('runs/student/pipeline').is_student


def test_a_decoder_can_be_trained_further_and_a_teacher_from_given_weights(small, tmp_path):
    from pixart_delta_nb import load_pipeline
    from pixart_delta_nb.folders import shipped
    data, vae, teacher = (tmp_path/n for n in ('data', 'vae', 'teacher'))
    run('render', '--out', data, '--count', 8)
    run('train-vae', '--data', data, '--out', vae, '--steps', 1, '--decoder-of', shipped('teacher')/'vae')
    run('train-teacher', '--data', data, '--vae', vae, '--text', shipped('teacher'), '--out', teacher, '--steps', 3, '--start', shipped('teacher')/'transformer')
    start, end = load_pipeline(), load_pipeline(teacher/'pipeline')
    assert all((p - q).abs().max() < 1e-3 for p, q in zip(start.vae.encoder.parameters(), end.vae.encoder.parameters()))
    assert 0 < max((p - q).abs().max().item() for p, q in zip(start.transformer.parameters(), end.transformer.parameters())) < .1


def test_precomputation_is_timed_beside_the_autoencoder(own, tmp_path):
    run('precompute', own/'pictures', '--pipeline', own/'teacher', '--measure', '--out', tmp_path)
    found = json.loads((tmp_path/'precompute.json').read_text())
    assert found['images'] == 6 and found['ratio'] == pytest.approx(found['images_per_second']/found['vae_images_per_second'])
    assert [p.name for p in tmp_path.iterdir()] == ['precompute.json']


# figures and scores

def test_a_figure_is_made_by_name_and_drawn_again_without_measuring(tmp_path, capsys):
    run('reproduce', '--figure', 3, '--from-scratch', '--out', tmp_path)
    first = (tmp_path/'fig3.json').read_text()
    assert json.loads(first)['provenance']['command'] == 'pixart-delta reproduce --figure 3 --from-scratch'
    for drawn in (p for p in tmp_path.iterdir() if p.suffix != '.json'): drawn.unlink()
    run('reproduce', '--figure', 3, '--out', tmp_path)
    assert (tmp_path/'fig3.json').read_text() == first and 'logSNR' in capsys.readouterr().out
    assert [p for p in tmp_path.iterdir() if p.suffix in ('.png', '.svg')]


def test_all_makes_every_figure_of_the_index(tmp_path, monkeypatch):
    from pixart_delta_nb.evidence import figures
    made = []
    monkeypatch.setattr(figures, 'reproduce_figure', lambda *arguments, device: made.append((*arguments, device)))
    run('reproduce', '--figure', 'all', '--out', tmp_path)
    assert made == [(name, tmp_path, False, 'cpu') for name in figures.FIGURES]


@pytest.mark.parametrize('words, part', [(['--figure', '99'], 'one of 2, 3'), (['--from-scratch'], '--figure'), (['--images', '1'], '--images')])
def test_reproduce_refuses_in_one_sentence(words, part, tmp_path, capsys):
    assert part in refused(capsys, 'reproduce', *words, '--out', tmp_path) and not list(tmp_path.iterdir())


def test_public_networks_are_refused_in_one_sentence_without_a_connection(tmp_path, capsys, monkeypatch):
    from pixart_delta_nb.evidence import kit
    def offline(): raise ValueError('Inception v3 could not be loaded (OSError); it needs a network connection')
    monkeypatch.setattr(kit, 'inception_features', offline)
    assert 'network connection' in refused(capsys, 'evaluate', '--public', '--images', 2, '--out', tmp_path)


def test_bench_refuses_steps_that_are_no_numbers(tmp_path, capsys):
    assert '4;14' in refused(capsys, 'bench', '--steps', '4;14', '--out', tmp_path/'b.json')


# the ways out

def test_an_unknown_option_exits_with_2(capsys):
    code, message = failed(capsys, 'generate', 'a red cube', '--stepz', '4')
    assert code == 2 and '--stepz' in message


def test_a_file_where_the_folder_should_be_is_refused(tmp_path, capsys):
    (tmp_path/'file').write_text('')
    for command in ('reproduce', 'render', 'distill'): assert '--out' in refused(capsys, command, '--out', tmp_path/'file/deep')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_exits_with_130_and_a_sentence_when_it_is_stopped(command, number, capsys, monkeypatch):
    def stopped(folder):
        os.kill(os.getpid(), number)
        time.sleep(5)
    monkeypatch.setattr(cli, 'check_writable', stopped)
    before, start = signal.getsignal(signal.SIGTERM), time.monotonic()
    code, message = failed(capsys, command, *PLACE.get(command, []))
    assert code == 130 and command in message and len(message.strip().splitlines()) == 1 and time.monotonic() - start < 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_that_says_what_it_kept_is_quoted(capsys, monkeypatch):
    def stopped(folder): raise KeyboardInterrupt('stopped after 3 of 8 scenes, which are kept')
    monkeypatch.setattr(cli, 'check_writable', stopped)
    assert failed(capsys, 'render') == (130, 'pixart-delta: stopped after 3 of 8 scenes, which are kept\n')


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_shows_signs_of_life_where_no_terminal_is(command, capsys, monkeypatch):
    monkeypatch.setattr(PlainProgress, 'EVERY', .02)
    def slow(folder):
        time.sleep(.2)
        raise ValueError('enough')
    monkeypatch.setattr(cli, 'check_writable', slow)
    code, message = failed(capsys, command, *PLACE.get(command, []))
    assert code == 1 and message.count(f'{command}: ') > 3 and not PlainProgress.opened


START = """import sys
from pathlib import Path
from pixart_delta_nb import training
from pixart_delta_nb.cli import main
record = training.record
def recorded(*arguments):
    Path(sys.argv[1]).touch()
    return record(*arguments)
training.record = recorded
main(sys.argv[2:])"""


def test_a_training_command_in_another_process_leaves_a_checkpoint(own, tmp_path):
    words = ['distill', '--pipeline', own/'teacher', '--latents', own/'latents', '--batch-size', 2, '--out', tmp_path/'out', '--steps', 100_000]
    process = subprocess.Popen([sys.executable, '-c', START, *map(str, [tmp_path/'begun', *words])], stderr=subprocess.PIPE, text=True)
    while not (tmp_path/'begun').exists() and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and 'checkpoint' in said and 'Traceback' not in said
    assert (tmp_path/'out/checkpoint.safetensors').is_file()

"""Commands: what is written, and one clear sentence for what cannot be done."""
import os
import pytest
from PIL import Image
from typer.testing import CliRunner
from pixart_delta_nb import cli


def failed(arguments, capsys):
    "Exit code and the sentence of a command that fails."
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return exit_.value.code, capsys.readouterr().err


def test_help_lists_the_commands():
    text = CliRunner().invoke(cli.app, ['--help']).output
    assert all(name in text for name in ('generate', 'reproduce', 'evaluate', 'train-clip'))


def test_generate_writes_a_picture_that_depends_on_the_seed_alone(tmp_path):
    from PIL import Image
    for name, seed in (('a', 3), ('b', 3), ('c', 4)):
        cli.main(['generate', 'a large red cube in the middle on sand at night', '--seed', str(seed), '--out', str(tmp_path/f'{name}.png')])
    a, b, c = (Image.open(tmp_path/f'{n}.png') for n in 'abc')
    assert a.size == (128, 128) and a.tobytes() == b.tobytes() and a.tobytes() != c.tobytes()


@pytest.mark.parametrize('steps', ['0', '-1', '51'])
def test_steps_off_the_grid_are_refused_in_one_sentence(steps, tmp_path, capsys):
    code, message = failed(['generate', 'a red cube', '--steps', steps, '--out', str(tmp_path/'x.png')], capsys)
    assert code == 1 and steps in message and 'Traceback' not in message and len(message.strip().splitlines()) == 1
    assert not (tmp_path/'x.png').exists()


def test_a_file_where_the_folder_should_be_is_refused(tmp_path, capsys):
    (tmp_path/'file').write_text('')
    code, message = failed(['reproduce', '--out', str(tmp_path/'file'/'deep')], capsys)
    assert code == 1 and '--out' in message


def test_an_unknown_option_exits_with_2(capsys):
    code, message = failed(['generate', 'a red cube', '--stepz', '4'], capsys)
    assert code == 2 and '--stepz' in message


def test_guidance_is_refused_for_the_student(tmp_path, capsys):
    code, message = failed(['generate', 'a red cube', '--guidance-scale', '4.5', '--out', str(tmp_path/'x.png')], capsys)
    assert code == 1 and 'guidance_scale is 4.5' in message and not (tmp_path/'x.png').exists()


def test_teacher_takes_guidance(tmp_path, capsys):
    cli.main(['generate', 'a red cube', '--teacher', '--guidance-scale', '2', '--steps', '2', '--out', str(tmp_path/'x.png')])
    assert '4 network evaluations' in capsys.readouterr().out


def test_a_decoder_can_be_trained_further_and_a_teacher_from_given_weights(tmp_path):
    from pixart_delta_nb.core import load_tensors
    from pixart_delta_nb.folders import shipped
    from pixart_delta_nb.pipeline import load_pipeline
    data, vae, teacher = (str(tmp_path/n) for n in ('data', 'vae', 'teacher'))
    cli.main(['render', '--out', data, '--count', '8'])
    cli.main(['train-vae', '--data', data, '--out', vae, '--steps', '1', '--decoder-of', str(shipped('teacher')/'vae')])
    cli.main(['train-teacher', '--data', data, '--vae', vae, '--text', str(shipped('teacher')), '--out', teacher, '--steps', '3', '--start', str(shipped('teacher')/'transformer')])
    start, end = load_pipeline(), load_pipeline(tmp_path/'teacher/pipeline')
    assert all((p - q).abs().max() < 1e-3 for p, q in zip(start.vae.encoder.parameters(), end.vae.encoder.parameters()))
    difference = max((p - q).abs().max().item() for p, q in zip(start.transformer.parameters(), end.transformer.parameters()))
    assert 0 < difference < .1 and load_tensors(tmp_path/'teacher/latents.safetensors')['latents'].shape == (8, 4, 16, 16)


@pytest.fixture
def edges(tmp_path):
    from pixart_delta_nb.world.truths import truth
    from pixart_delta_nb.sampling import to_pil
    from pixart_delta_nb.world.words import make
    to_pil(truth(make(555, 3)[0], 'edges')/2 + .5)[0].save(tmp_path/'edges.png')
    return str(tmp_path/'edges.png')


def test_a_control_picture_and_its_scale_change_the_image(tmp_path, edges):
    from PIL import Image
    for name, options in (('free', []), ('off', ['--control', edges, '--condition', 'given', '--scale', '0']), ('on', ['--control', edges, '--condition', 'given'])):
        cli.main(['generate', 'a red cube on sand', *options, '--out', str(tmp_path/f'{name}.png')])
    free, off, on = (Image.open(tmp_path/f'{n}.png').tobytes() for n in ('free', 'off', 'on'))
    assert free == off != on


def test_a_condition_that_the_controlnet_was_not_trained_on_is_refused(tmp_path, edges, capsys):
    code, message = failed(['generate', 'a red cube', '--control', edges, '--condition', 'depth', '--out', str(tmp_path/'x.png')], capsys)
    assert code == 1 and 'depth' in message and 'edges' in message and not (tmp_path/'x.png').exists()


def test_a_lora_makes_the_teacher_a_student(tmp_path, capsys):
    from pixart_delta_nb.folders import shipped
    cli.main(['generate', 'a red cube on sand', '--lora', str(shipped('lora')), '--out', str(tmp_path/'x.png')])
    assert '4 network evaluations' in capsys.readouterr().out
    assert failed(['generate', 'a red cube', '--lora', str(tmp_path), '--out', str(tmp_path/'y.png')], capsys)[0] == 1


def test_bench_refuses_steps_that_are_no_numbers(tmp_path, capsys):
    code, message = failed(['bench', '--steps', '4;14', '--out', str(tmp_path/'b.json')], capsys)
    assert code == 1 and '4;14' in message


def test_controlnet_is_trained_saved_and_used(tmp_path, capsys):
    from pixart_delta_nb.controlnet import load_controlnet
    from pixart_delta_nb.data import precompute
    from pixart_delta_nb.pipeline import load_pipeline, save_pipeline
    data, teacher, out = (tmp_path/n for n in ('data', 'teacher', 'out'))
    cli.main(['render', '--out', str(data), '--count', '4'])
    pipe = load_pipeline()
    save_pipeline(pipe, teacher/'pipeline')
    images, captions, _ = cli.open_data(data)
    precompute(pipe.vae, pipe.tokenizer, pipe.text_encoder, images, captions, teacher/'latents.safetensors', pipe.scaling_factor)
    cli.main(['train-controlnet', '--teacher', str(teacher), '--data', str(data), '--out', str(out), '--steps', '2', '--copies', '2', '--scenes', '3'])
    assert load_controlnet(out/'controlnet', load_pipeline().transformer).facts['condition'] == 'edges'
    code, message = failed(['train-controlnet', '--teacher', str(teacher), '--data', str(data), '--out', str(out), '--steps', '2', '--scenes', '3', '--condition', 'depth'], capsys)
    assert code == 1 and 'choose another --out' in message                       # latents of another condition are not taken for this one's
    Image.new('RGB', (128, 128)).save(tmp_path/'lines.png')
    options = ['--control', str(tmp_path/'lines.png'), '--condition', 'given', '--controlnet', str(out/'controlnet'), '--out', str(tmp_path/'own.png')]
    cli.main(['generate', 'a red cube', *options])
    assert (tmp_path/'own.png').is_file()


def test_a_figure_is_made_by_name_and_drawn_again_without_measuring(tmp_path, capsys):
    import json
    cli.main(['reproduce', '--figure', '3', '--from-scratch', '--out', str(tmp_path)])
    first = (tmp_path/'fig3.json').read_text()
    assert json.loads(first)['provenance']['command'] == 'pixart-delta reproduce --figure 3 --from-scratch'
    (tmp_path/'fig3.png').unlink()
    cli.main(['reproduce', '--figure', '3', '--out', str(tmp_path)])
    assert (tmp_path/'fig3.json').read_text() == first and (tmp_path/'fig3.png').is_file() and 'logSNR' in capsys.readouterr().out


def test_all_makes_every_figure_of_the_index(tmp_path, monkeypatch):
    from pixart_delta_nb import figures
    made = []
    monkeypatch.setattr(figures, 'reproduce_figure', lambda *arguments: made.append(arguments))
    cli.main(['reproduce', '--figure', 'all', '--out', str(tmp_path)])
    assert made == [(name, tmp_path, False) for name in figures.FIGURES]


@pytest.mark.parametrize('options, words', [(['--figure', '99'], 'one of 2, 3'), (['--from-scratch'], '--figure'), (['--images', '1'], '--images')])
def test_reproduce_refuses_in_one_sentence(options, words, tmp_path, capsys):
    code, message = failed(['reproduce', *options, '--out', str(tmp_path)], capsys)
    assert code == 1 and words in message and len(message.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_public_networks_are_refused_in_one_sentence_without_a_connection(tmp_path, capsys, monkeypatch):
    from pixart_delta_nb import results
    def offline(): raise ValueError('Inception v3 could not be loaded (OSError); it needs a network connection')
    monkeypatch.setattr(results, 'inception_features', offline)
    code, message = failed(['evaluate', '--public', '--images', '2', '--out', str(tmp_path)], capsys)
    assert code == 1 and 'network connection' in message and len(message.strip().splitlines()) == 1


def test_clip_is_trained_and_opens(tmp_path, capsys, monkeypatch):
    from pixart_delta_nb import scores
    small = scores.train_clip
    monkeypatch.setattr(scores, 'train_clip', lambda *arguments, **options: small(*arguments, batch=8, held_out=32, workers=1, progress=False, **options))
    cli.main(['train-clip', '--out', str(tmp_path), '--steps', '2', '--scenes', '8'])
    assert 'among 32' in capsys.readouterr().out and scores.load_clip(tmp_path/'clip').model.config.projection_dim == 64


def test_a_folder_in_the_place_of_the_picture_is_refused(tmp_path, capsys):
    code, message = failed(['generate', 'a red cube', '--out', str(tmp_path)], capsys)
    assert code == 1 and 'is a folder' in message and not list(tmp_path.iterdir())


def test_another_pipeline_draws(tmp_path):
    from pixart_delta_nb.pipeline import tiny_pipeline
    from pixart_delta_nb.pipeline import save_pipeline
    save_pipeline(tiny_pipeline(), tmp_path/'mine')
    cli.main(['generate', 'a red cube', '--pipeline', str(tmp_path/'mine'), '--steps', '2', '--out', str(tmp_path/'x.png')])
    assert Image.open(tmp_path/'x.png').size[0] > 0


def test_another_pipeline_excludes_what_belongs_to_the_shipped_one(tmp_path, capsys):
    code, message = failed(['generate', 'a red cube', '--pipeline', str(tmp_path), '--teacher', '--out', str(tmp_path/'x.png')], capsys)
    assert code == 1 and '--pipeline excludes' in message


def test_precomputation_is_timed_beside_the_autoencoder(tmp_path, capsys):
    import json
    (tmp_path/'in').mkdir()
    for i in range(3): Image.new('RGB', (128, 128), (40*i, 0, 0)).save(tmp_path/f'in/{i}.png'); (tmp_path/f'in/{i}.txt').write_text('a red cube')
    cli.main(['precompute', str(tmp_path/'in'), '--measure', '--out', str(tmp_path/'out')])
    found = json.loads((tmp_path/'out/precompute.json').read_text())
    assert found['images'] == 3 and found['ratio'] == pytest.approx(found['images_per_second']/found['vae_images_per_second'])
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['precompute.json']

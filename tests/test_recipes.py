"""The world's own recipe: folders from nothing to a teacher, crops of any shape, and conditions that belong to the pictures."""
import signal, subprocess, sys, time

import pytest
import torch

from pixart_delta_nb.core import load_metadata
from pixart_delta_nb.data import open_latents
from pixart_delta_nb.pipeline import load_pipeline, tiny_pipeline
from pixart_delta_nb.world import recipes as R
from pixart_delta_nb.world.autoencoder import crops, train_vae
from pixart_delta_nb.world.truths import truth
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.words import attributes

QUIET = {'progress': False}


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    R.render_scenes(folder/'scenes', 24, seed=7)
    return folder


# rendered scenes ------------------------------------------------------------------------------------------------
def test_a_rendered_set_knows_its_captions_attributes_and_seed(folder):
    scenes = R.open_scenes(folder/'scenes')
    assert len(scenes) == 24 and scenes.seed == 7 and scenes.images.shape == (24, 3, 128, 128)
    assert scenes.captions == [make(7, i)[1].text for i in range(24)]
    scene, caption = make(7, 5)
    assert torch.equal(scenes.labels[5], attributes(scene, caption.unsaid, caption.order))
    assert sorted(p.name for p in (folder/'scenes').iterdir()) == ['captions.json', 'scenes.safetensors']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_rendering_that_is_stopped_keeps_what_was_done_and_goes_on(folder, tmp_path, number):
    part = tmp_path/'scenes'/'scenes-7.part'
    code = f'from pixart_delta_nb.world.recipes import render_scenes; render_scenes({str(tmp_path/"scenes")!r}, 4000, 7)'
    process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
    while not (part.is_file() and part.stat().st_size > 30*3*128*128) and process.poll() is None: time.sleep(.02)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT) and 'of 4000 scenes are in' in error, error
    kept = part.stat().st_size//(3*128*128)
    assert 24 <= kept < 4000
    R.render_scenes(tmp_path/'scenes', 24, 7)
    assert torch.equal(R.open_scenes(tmp_path/'scenes').images, R.open_scenes(folder/'scenes').images)


def test_another_seed_does_not_go_on_with_the_pictures_of_the_first(folder, tmp_path):
    (tmp_path/'scenes-7.part').write_bytes(b'\0'*3*128*128)
    R.render_scenes(tmp_path, 1, seed=8)
    assert load_metadata(tmp_path/'scenes.safetensors')['seed'] == '8'
    assert not torch.equal(R.open_scenes(tmp_path).images[0], R.open_scenes(folder/'scenes').images[0])


def test_a_count_that_is_not_positive_is_refused(tmp_path):
    with pytest.raises(ValueError, match='count is 0'): R.render_scenes(tmp_path, 0)


# crops ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('shape', [(32, 64), (64, 32), (48, 48)])
def test_crops_of_pictures_of_any_shape_stay_inside_and_reach_every_place(shape):
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing='ij'))
    pictures = torch.cat([places, torch.zeros(1, *shape)])[None]
    found = crops(pictures, 300, (16, 16), torch.Generator().manual_seed(0))
    for axis, side in enumerate(shape): assert sorted(found[:, axis, 0, 0].unique().tolist()) == list(range(0, side - 15, 8))


def test_an_autoencoder_is_trained_on_oblong_pictures(tmp_path):
    images = torch.randint(0, 256, (3, 3, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    log = []
    train_vae(images, tmp_path, 3, batch_size=2, log=log.append, log_every=1, **QUIET)
    assert len(log) == 3 and (tmp_path/'vae'/'config.json').is_file()


@pytest.mark.parametrize('images, words', [(torch.zeros(2, 3, 32, 40, dtype=torch.uint8), '32 × 40 pixels'),
                                           ([{'image': torch.zeros(3, 32, 32)}, {'image': torch.zeros(3, 32, 48)}], 'one shape')])
def test_pictures_that_cannot_be_cropped_are_refused(images, words, tmp_path):
    with pytest.raises(ValueError, match=words): train_vae(images, tmp_path, 9, **QUIET)


# the stages -----------------------------------------------------------------------------------------------------
def test_the_stages_end_in_a_pipeline_whose_scaling_factor_is_one_over_the_spread(folder):
    assert R.make_vae(folder/'scenes', folder/'vae', 2, **QUIET) == folder/'vae'/'vae'
    named = R.make_text_encoder(folder/'text', 2, vocabulary=500, batch_size=4, **QUIET)
    assert 0 <= min(named) <= max(named) <= 1
    made = R.make_teacher(folder/'scenes', folder/'vae', folder/'text', folder/'teacher', 1, batch_size=2, **QUIET)
    pipe, data = load_pipeline(made), open_latents(folder/'teacher'/'latents.safetensors')
    assert data.z.float().std().item() == pytest.approx(1, abs=1e-3) and data.facts['world'] == 7
    assert pipe.scaling_factor == pytest.approx(data.facts['scaling_factor']) and not pipe.is_student
    data.check(**pipe.config.get('fingerprints', {}), scaling_factor=pipe.scaling_factor)


def test_the_latents_of_a_run_that_goes_on_are_not_made_again(folder, monkeypatch):
    monkeypatch.setattr(R, 'encode_scenes', lambda *a: 1/0)
    R.make_teacher(folder/'scenes', folder/'vae', folder/'text', folder/'teacher', 1, resume=True, batch_size=2, **QUIET)
    with pytest.raises(ZeroDivisionError):
        R.make_teacher(folder/'scenes', folder/'vae', folder/'text', folder/'other', 1, batch_size=2, **QUIET)


def test_marks_lie_on_things_and_two_pixels_around(folder):
    scenes = R.open_scenes(folder/'scenes')
    marked, share = R.Marked(scenes)[5]['image'], truth(make(7, 5)[0], 'segmentation')[0]/2 + .5
    wide = lambda x, n: torch.nn.functional.max_pool2d(x[None], 2*n + 1, 1, n)[0] > 0
    assert (marked[3] > 0)[wide((share == 1).float(), 2)].all() and not (marked[3] > 0)[~wide(share, 2)].any()
    assert torch.equal(marked[:3], R.pixels(scenes.images, 5))


def test_captions_are_told_anew_at_every_draw_and_the_same_from_the_same_generator(folder):
    scenes, pipe = R.open_scenes(folder/'scenes'), tiny_pipeline(0, captions=[make(7, i)[1].text for i in range(24)])
    data = R.encode_scenes(scenes, pipe.vae, pipe.tokenizer, pipe.text_encoder)
    again = R.Retold(**vars(data), tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    draws = [again.draw(8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0].z, draws[1].z) and torch.equal(draws[0].caption, draws[1].caption)
    assert draws[0].caption.shape != draws[2].caption.shape or not torch.equal(draws[0].caption, draws[2].caption)
    assert again.fingerprint == data.fingerprint and len(again) == 24
    with pytest.raises(ValueError, match='names no world'): R.Retold(data.z, data.caption, data.mask, data.null)


# conditions -----------------------------------------------------------------------------------------------------
def test_what_no_picture_shows_is_that_of_the_scenes_own_seed(folder):
    pictures = R.condition_pictures(folder/'scenes', 'depth', 3)
    assert len(pictures) == 3 and len(list(pictures)) == 3
    assert torch.equal(pictures[2], truth(make(7, 2)[0], 'depth'))


def test_edges_are_extracted_from_the_pictures_whether_rendered_or_not(folder):
    scenes = R.open_scenes(folder/'scenes')
    own = R.Scenes(scenes.images, scenes.captions)
    assert torch.equal(R.ConditionPictures(own, 'edges')[1], R.ConditionPictures(scenes, 'edges')[1])
    assert (R.ConditionPictures(own, 'edges')[1] - truth(make(7, 1)[0], 'edges')).abs().mean() < .01
    with pytest.raises(ValueError, match='edges, hard'): R.ConditionPictures(own, 'depth')


def test_latents_of_the_world_carry_the_control_of_the_same_scenes(folder):
    pipe = tiny_pipeline(0, captions=[make(7, i)[1].text for i in range(3)])
    data, edges = R.scene_data(pipe, 3, 7, 'edges'), R.condition_pictures(folder/'scenes', 'edges')[2]
    with torch.no_grad(): z = pipe.vae.encode(edges[None]).latent_dist.mode()*pipe.scaling_factor
    assert data.control.shape == data.z.shape and data.facts['world'] == 7
    torch.testing.assert_close(data.control[2:].float(), z, rtol=2e-3, atol=2e-3)

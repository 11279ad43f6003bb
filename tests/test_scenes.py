"Scenes: pixels and captions stay what the weights were trained on, geometry agrees with closed forms, folders survive."
import hashlib, json, math, warnings

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_delta_nb import scenes as S

BALL = S.Thing('sphere', 'red', 'large', .4, -.3, .5)
CENTRE, RADIUS = torch.tensor([.4, S.SIZES['large'], -.3], dtype=torch.float64), S.SIZES['large']


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# the data set the published weights saw -------------------------------------------------------------------------
def test_captions_and_attributes_are_those_of_the_published_weights():
    digest = hashlib.sha256()
    for seed in (0, 1, 7):
        for pairs in ('seen', 'unseen', 'any'):
            for i in range(50):
                scene, caption, unsaid = S.make(seed, i, pairs)
                digest.update(f'{caption}|{S.attributes(scene, unsaid).tolist()}\n'.encode())
    assert digest.hexdigest() == 'e36e51bafbcb9358ec1473e42888f08ea9dc14108ff908820f79f852d9f67762'


@pytest.mark.parametrize('seed, index, caption, levels', [
    (0, 0, 'a large purple cone on the left and a green cone on the right, on sand on a cloudy day',
     [184.0, 202.3, 195.0, 135.3, 97.2, 174.1, 173.5]),
    (1, 1, 'a big orange cone on the left and a small green sphere on the right, on snow under a dark sky',
     [27.1, 41.1, 113.3, 109.6, 177.0, 181.9, 183.8]),
    (7, 2, 'on sand under a dark sky, a big yellow box behind a little green cone',
     [27.1, 41.1, 91.4, 112.9, 68.0, 136.2, 137.4])])
def test_pixels_are_those_of_the_published_weights(seed, index, caption, levels):
    scene, said, _ = S.make(seed, index)
    assert said == caption
    grey = S.render(scene)['image'].mean(0)*255
    blocks = grey.reshape(16, 8, 16, 8).mean((1, 3)).flatten()[5::37]
    assert (blocks - torch.tensor(levels)).abs().max() < .5


# words ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('pairs, some', [('seen', False), ('unseen', True)])
def test_held_out_pairs(pairs, some):
    for i in range(200):
        things = S.make('pairs', i, pairs)[0].things
        assert any((t.colour, t.shape) in S.HELD_OUT for t in things) is some


def test_a_wrong_word_for_pairs_is_refused():
    with pytest.raises(ValueError, match="'new'"): S.make(0, 0, 'new')


def test_attributes_hold_what_was_said():
    for i in range(100):
        scene, _, unsaid = S.make('said', i)
        vector = dict(zip(S.ATTRIBUTES, S.attributes(scene, unsaid).tolist()))
        assert {k for k, v in vector.items() if v < 0} == unsaid | {
            f'{a}{j}' for a in ('shape', 'colour', 'size') for j in range(len(scene.things), S.SLOTS)}
        assert S.ATTRIBUTES['layout'][vector['layout']] == scene.layout
        assert all(S.ATTRIBUTES[f'shape{j}'][vector[f'shape{j}']] == t.shape for j, t in enumerate(scene.things))


# geometry -------------------------------------------------------------------------------------------------------
def test_sphere_distance_in_closed_form():
    d = S.camera_rays(48, 1)
    t, _ = S.intersect(BALL, S.EYE, d)
    v = CENTRE - S.EYE.double()
    along = d.double() @ v
    chord2 = RADIUS**2 - v @ v + along**2
    sure = chord2.abs() > 1e-3
    hit = sure & (chord2 > 0)
    assert torch.equal((t < S.FAR)[sure], (chord2 > 0)[sure]) and hit.sum() > 50
    torch.testing.assert_close(t[hit].double(), along[hit] - chord2[hit].sqrt(), rtol=1e-4, atol=1e-4)


FLAT = lambda p: (p[:, 0]**2 + p[:, 2]**2).sqrt()
IMPLICIT = {'sphere': lambda p: (p - torch.tensor([0., 1., 0.])).norm(dim=-1) - 1,
            'cube': lambda p: (p - torch.tensor([0., .8, 0.])).abs().amax(-1) - .8,
            'cylinder': lambda p: torch.maximum(FLAT(p) - .8, p[:, 1] - 1.8),
            'cone': lambda p: FLAT(p) - (2. - p[:, 1])/2.}


@pytest.mark.parametrize('shape', S.SHAPES)
def test_normals_are_the_gradient_of_the_implicit_surface(shape):
    thing = S.Thing(shape, 'red', 'small', -.4, .3, .6)
    d = S.camera_rays(64, 1)
    t, n = S.intersect(thing, S.EYE, d)
    p = (S.EYE + t[:, None]*d)[t < S.FAR].requires_grad_()
    value = IMPLICIT[shape](S.to_local(thing, p, True)[0])
    gradient, = torch.autograd.grad(value.sum(), p)
    assert len(p) > 50 and value.abs().max() < 1e-4
    cosine = (torch.nn.functional.normalize(gradient, dim=-1)*n[t < S.FAR]).sum(-1)
    assert (cosine > .999).float().mean() > .99


def test_shadow_of_a_ball_in_closed_form():
    x, z = torch.meshgrid(torch.linspace(-3, 4, 60), torch.linspace(-4, 3, 60), indexing='ij')
    floor = torch.stack([x, torch.zeros_like(x), z], -1).reshape(-1, 3)
    v = CENTRE - floor.double()
    gap = (v*v).sum(-1) - (v @ S.LIGHT.double())**2 - RADIUS**2
    dark, sure = S.shadowed(S.Scene('', [BALL], 'sand', 'clear'), floor), gap.abs() > 1e-4
    assert torch.equal(dark[sure], (gap < 0)[sure]) and dark.any()


# truth maps -----------------------------------------------------------------------------------------------------
def test_masks_sum_to_one():
    for i in range(5):
        scene = S.make('masks', i)[0]
        masks = S.render(scene, 48, truth=True)['masks']
        assert masks.shape == (2 + len(scene.things), 48, 48) and (masks.sum(0) == 1).all()


def test_depth_of_the_ground_obeys_the_plane_equation():
    truth = S.render(S.make(0, 3)[0], 48, supersample=1, truth=True)
    y = S.EYE[1].double() + truth['depth'].double()*S.camera_rays(48, 1).double()[:, 1].reshape(48, 48)
    near = (truth['masks'][1] == 1) & (truth['depth'] < 50)
    assert near.sum() > 500 and y[near].abs().max() < 1e-4


def test_edges_of_a_ball_lie_on_its_silhouette():
    truth = S.render(S.Scene('centre', [BALL], 'sand', 'clear'), 128, truth=True)
    edge = S.edges(truth)
    assert edge.shape == (1, 128, 128) and edge.min() >= 0 and edge.max() <= 1
    rays, v = S.camera_rays(128, 1).double().reshape(128, 128, 3), CENTRE - S.EYE.double()
    off = torch.acos(rays @ v/v.norm()) - math.asin(RADIUS/v.norm())
    horizon = truth['masks'][0].diff(dim=0, append=torch.zeros(1, 128)).abs() > 0
    assert (off[(edge[0] > .5) & ~horizon].abs() < 4*math.tan(math.radians(S.FOV/2))/128).all()


def test_edges_need_truth_maps():
    with pytest.raises(ValueError, match='truth=True'): S.edges({'image': torch.zeros(3, 8, 8)})


def test_no_edge_where_nothing_changes():
    assert S.edges({'masks': torch.ones(1, 8, 8), 'normals': torch.zeros(3, 8, 8)}).sum() == 0


# data sets ------------------------------------------------------------------------------------------------------
def test_scene_dataset_items():
    data = S.SceneDataset(5, 2, size=32)
    items = list(data)
    assert len(items) == len(data) == 2 and items[1]['caption'] == S.make(5, 1)[1]
    torch.testing.assert_close((items[1]['image'] + 1)/2, S.render(S.make(5, 1)[0], 32)['image'])


def test_processes_render_the_same_bytes():
    images = S.render_many(5, 3, workers=2, size=32, progress=False)
    expected = torch.stack([(S.render(S.make(5, i)[0], 32)['image']*255).round().byte() for i in range(3)])
    assert images.dtype == torch.uint8 and torch.equal(images, expected)


@pytest.mark.parametrize('call', [lambda: S.SceneDataset(0, 0), lambda: S.SceneDataset(0, 1, 'new'),
                                  lambda: S.render_many(0, 1, workers=0), lambda: S.render(S.make(0, 0)[0], 0)])
def test_bad_counts_are_refused_in_one_sentence(call):
    with pytest.raises(ValueError) as caught: call()
    assert '\n' not in str(caught.value)


def picture(path, colour=(0, 128, 64)):
    pixels = np.full((64, 128, 3), 255, np.uint8)
    pixels[:, 32:96] = colour
    Image.fromarray(pixels).save(path)


def test_folder_with_notes_beside_is_cropped_to_the_centre(tmp_path):
    picture(tmp_path/'a.png')
    (tmp_path/'a.txt').write_text(' a green square \n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        item = S.FolderDataset(tmp_path, 32)[0]
    inside = item['image'][:, :, 2:-2]
    assert item['caption'] == 'a green square' and item['image'].shape == (3, 32, 32)
    torch.testing.assert_close(inside, (torch.tensor([0, 128, 64])/127.5 - 1)[:, None, None].expand_as(inside))


def test_folder_turns_pictures_upright(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255                                   # white above; orientation 3 turns it by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path/'a.png', exif=exif)
    (tmp_path/'a.txt').write_text('half')
    image = S.FolderDataset(tmp_path, 32)[0]['image']
    assert image[:, :12].max() < -.9 and image[:, 20:].min() > .9


def test_folder_skips_and_lists_what_it_cannot_use(tmp_path):
    for name in ('a.png', 'b.jpg', 'mute.png', 'cut.jpg'): picture(tmp_path/name)
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'cut.jpg').read_bytes()[:700])
    (tmp_path/'odd.png').write_text('no picture')
    rows = [{'file_name': n, 'text': 'x'} for n in ('a.png', 'cut.jpg', 'odd.png', 'gone.png')]
    rows += [{'file_name': 'b.jpg', 'caption': 'y'}, {'file_name': 'mute.png'}, {'file_name': 3, 'text': 'z'}]
    (tmp_path/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{broken\n')
    with pytest.warns(UserWarning, match='skipped 6 of 8') as caught: data = S.FolderDataset(tmp_path, 16)
    assert len(caught) == 1 and [c for _, c in data.items] == ['x', 'y']
    assert {n for n, _ in data.skipped} == {'cut.jpg', 'odd.png', 'gone.png', 'mute.png', '3', 'entry 8 of metadata.jsonl'}


def test_refusal_names_what_was_skipped(tmp_path):
    (tmp_path/'broken.png').write_bytes(b'no picture'); (tmp_path/'broken.txt').write_text('a cube')
    with pytest.raises(ValueError, match='1 skipped: broken.png'): S.FolderDataset(tmp_path, 32)

def test_folder_without_usable_pictures_is_refused(tmp_path):
    picture(tmp_path/'mute.png')
    with pytest.raises(ValueError, match='no usable picture') as caught: S.FolderDataset(tmp_path, 32)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('size', [0, -16, 100, 32.])
def test_folder_size_must_be_a_multiple_of_16(tmp_path, size):
    picture(tmp_path/'a.png')
    with pytest.raises(ValueError, match='multiple of 16'): S.FolderDataset(tmp_path, size)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match='is not a folder'): S.FolderDataset(tmp_path/'none')


def test_folder_and_scenes_mix_in_one_loader(tmp_path):
    picture(tmp_path/'a.png')
    (tmp_path/'a.txt').write_text('mine')
    both = torch.utils.data.ConcatDataset([S.FolderDataset(tmp_path, 32), S.SceneDataset(0, 1, size=32)])
    batch = next(iter(torch.utils.data.DataLoader(both, batch_size=2)))
    assert batch['image'].shape == (2, 3, 32, 32) and batch['caption'][0] == 'mine'

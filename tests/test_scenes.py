"Scenes: pixels and captions stay what the weights were trained on, geometry agrees with closed forms, scripts come to their end."
import hashlib, math, subprocess, sys

import pytest
import torch

from pixart_delta_nb.world import raytracer as R, scenes as S, words as W

BALL = W.Thing('sphere', 'red', 'large', .4, -.3, .5)
CENTRE, RADIUS = torch.tensor([.4, W.SIZES['large'], -.3], dtype=torch.float64), W.SIZES['large']


pytestmark = pytest.mark.usefixtures('one_thread')


# the data set the published weights saw -------------------------------------------------------------------------
def test_captions_and_attributes_are_those_of_the_published_weights():
    digest = hashlib.sha256()
    for seed in (0, 1, 7):
        for pairs in ('seen', 'unseen', 'any'):
            for i in range(50):
                scene, caption, unsaid = W.make(seed, i, pairs)
                digest.update(f'{caption}|{W.attributes(scene, unsaid).tolist()}\n'.encode())
    assert digest.hexdigest() == 'e36e51bafbcb9358ec1473e42888f08ea9dc14108ff908820f79f852d9f67762'


@pytest.mark.parametrize('seed, index, caption, levels', [
    (0, 0, 'a large purple cone on the left and a green cone on the right, on sand on a cloudy day',
     [184.0, 202.3, 195.0, 135.3, 97.2, 174.1, 173.5]),
    (1, 1, 'a big orange cone on the left and a small green sphere on the right, on snow under a dark sky',
     [27.1, 41.1, 113.3, 109.6, 177.0, 181.9, 183.8]),
    (7, 2, 'on sand under a dark sky, a big yellow box behind a little green cone',
     [27.1, 41.1, 91.4, 112.9, 68.0, 136.2, 137.4])])
def test_pixels_are_those_of_the_published_weights(seed, index, caption, levels):
    scene, said, _ = W.make(seed, index)
    assert said == caption
    grey = R.render(scene)['image'].mean(0)*255
    blocks = grey.reshape(16, 8, 16, 8).mean((1, 3)).flatten()[5::37]
    assert (blocks - torch.tensor(levels)).abs().max() < .5


# words ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('pairs, some', [('seen', False), ('unseen', True)])
def test_held_out_pairs(pairs, some):
    for i in range(200):
        things = W.make('pairs', i, pairs)[0].things
        assert any((t.colour, t.shape) in W.HELD_OUT for t in things) is some


def test_a_wrong_word_for_pairs_is_refused():
    with pytest.raises(ValueError, match="'new'"): W.make(0, 0, 'new')


def test_attributes_hold_what_was_said():
    for i in range(100):
        scene, _, unsaid = W.make('said', i)
        vector = dict(zip(W.ATTRIBUTES, W.attributes(scene, unsaid).tolist()))
        assert {k for k, v in vector.items() if v < 0} == unsaid | {
            f'{a}{j}' for a in ('shape', 'colour', 'size') for j in range(len(scene.things), W.SLOTS)}
        assert W.ATTRIBUTES['layout'][vector['layout']] == scene.layout
        assert all(W.ATTRIBUTES[f'shape{j}'][vector[f'shape{j}']] == t.shape for j, t in enumerate(scene.things))


# geometry -------------------------------------------------------------------------------------------------------
def test_sphere_distance_in_closed_form():
    d = R.camera_rays(48, 1)
    t, _ = R.intersect(BALL, R.EYE, d)
    v = CENTRE - R.EYE.double()
    along = d.double() @ v
    chord2 = RADIUS**2 - v @ v + along**2
    sure = chord2.abs() > 1e-3
    hit = sure & (chord2 > 0)
    assert torch.equal((t < R.FAR)[sure], (chord2 > 0)[sure]) and hit.sum() > 50
    torch.testing.assert_close(t[hit].double(), along[hit] - chord2[hit].sqrt(), rtol=1e-4, atol=1e-4)


FLAT = lambda p: (p[:, 0]**2 + p[:, 2]**2).sqrt()
IMPLICIT = {'sphere': lambda p: (p - torch.tensor([0., 1., 0.])).norm(dim=-1) - 1,
            'cube': lambda p: (p - torch.tensor([0., .8, 0.])).abs().amax(-1) - .8,
            'cylinder': lambda p: torch.maximum(FLAT(p) - .8, p[:, 1] - 1.8),
            'cone': lambda p: FLAT(p) - (2. - p[:, 1])/2.}


@pytest.mark.parametrize('shape', W.SHAPES)
def test_normals_are_the_gradient_of_the_implicit_surface(shape):
    thing = W.Thing(shape, 'red', 'small', -.4, .3, .6)
    d = R.camera_rays(64, 1)
    t, n = R.intersect(thing, R.EYE, d)
    p = (R.EYE + t[:, None]*d)[t < R.FAR].requires_grad_()
    value = IMPLICIT[shape](R.to_local(thing, p, True)[0])
    gradient, = torch.autograd.grad(value.sum(), p)
    assert len(p) > 50 and value.abs().max() < 1e-4
    cosine = (torch.nn.functional.normalize(gradient, dim=-1)*n[t < R.FAR]).sum(-1)
    assert (cosine > .999).float().mean() > .99


def test_shadow_of_a_ball_in_closed_form():
    x, z = torch.meshgrid(torch.linspace(-3, 4, 60), torch.linspace(-4, 3, 60), indexing='ij')
    floor = torch.stack([x, torch.zeros_like(x), z], -1).reshape(-1, 3)
    v = CENTRE - floor.double()
    gap = (v*v).sum(-1) - (v @ R.LIGHT.double())**2 - RADIUS**2
    dark, sure = R.shadowed(W.Scene('', [BALL], 'sand', 'clear'), floor), gap.abs() > 1e-4
    assert torch.equal(dark[sure], (gap < 0)[sure]) and dark.any()


# truth maps -----------------------------------------------------------------------------------------------------
def test_masks_sum_to_one():
    for i in range(5):
        scene = W.make('masks', i)[0]
        masks = R.render(scene, 48, truth=True)['masks']
        assert masks.shape == (2 + len(scene.things), 48, 48) and (masks.sum(0) == 1).all()


def test_depth_of_the_ground_obeys_the_plane_equation():
    truth = R.render(W.make(0, 3)[0], 48, supersample=1, truth=True)
    y = R.EYE[1].double() + truth['depth'].double()*R.camera_rays(48, 1).double()[:, 1].reshape(48, 48)
    near = (truth['masks'][1] == 1) & (truth['depth'] < 50)
    assert near.sum() > 500 and y[near].abs().max() < 1e-4


def test_edges_of_a_ball_lie_on_its_silhouette():
    truth = R.render(W.Scene('centre', [BALL], 'sand', 'clear'), 128, truth=True)
    edge = R.edges(truth)
    assert edge.shape == (1, 128, 128) and edge.min() >= 0 and edge.max() <= 1
    rays, v = R.camera_rays(128, 1).double().reshape(128, 128, 3), CENTRE - R.EYE.double()
    off = torch.acos(rays @ v/v.norm()) - math.asin(RADIUS/v.norm())
    horizon = truth['masks'][0].diff(dim=0, append=torch.zeros(1, 128)).abs() > 0
    assert (off[(edge[0] > .5) & ~horizon].abs() < 4*math.tan(math.radians(R.FOV/2))/128).all()


def test_edges_need_truth_maps():
    with pytest.raises(ValueError, match='truth=True'): R.edges({'image': torch.zeros(3, 8, 8)})


def test_no_edge_where_nothing_changes():
    assert R.edges({'masks': torch.ones(1, 8, 8), 'normals': torch.zeros(3, 8, 8)}).sum() == 0


# data sets ------------------------------------------------------------------------------------------------------
def test_scene_dataset_items():
    data = S.SceneDataset(5, 2, size=32)
    items = list(data)
    assert len(items) == len(data) == 2 and items[1]['caption'] == W.make(5, 1)[1]
    torch.testing.assert_close((items[1]['image'] + 1)/2, R.render(W.make(5, 1)[0], 32)['image'])


def test_processes_render_the_same_bytes():
    images = S.render_many(5, 3, workers=2, size=32)
    expected = torch.stack([(R.render(W.make(5, i)[0], 32)['image']*255).round().byte() for i in range(3)])
    assert images.dtype == torch.uint8 and torch.equal(images, expected)


@pytest.mark.parametrize('call', [lambda: S.SceneDataset(0, 0), lambda: S.SceneDataset(0, 1, 'new'),
                                  lambda: S.render_many(0, 1, workers=0), lambda: R.render(W.make(0, 0)[0], 0)])
def test_bad_counts_are_refused_in_one_sentence(call):
    with pytest.raises(ValueError) as caught: call()
    assert '\n' not in str(caught.value)


# processes ------------------------------------------------------------------------------------------------------
def run_script(folder, text, **options):
    script = folder/'script.py'
    script.write_text(text)
    return subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, **options)


def test_a_script_without_a_main_guard_comes_to_its_end(tmp_path):
    done = run_script(tmp_path, 'print("started")\nfrom pixart_delta_nb.world.scenes import render_many\n'
                                'print(tuple(render_many(5, 3, workers=2, size=32).shape))')
    assert done.returncode == 0 and done.stdout.split('\n')[:2] == ['started', '(3, 3, 32, 32)'], done.stderr


def test_many_scenes_use_processes_without_being_asked(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(S, '_start', lambda *a: started.append(a) or 1/0)
    with pytest.raises(ZeroDivisionError): S.render_many(0, 100, size=16)
    assert started and S.render_many(0, 2, size=16).shape == (2, 3, 16, 16)


def test_a_stream_that_is_left_early_leaves_no_process():
    images = S.stream_scenes(0, 0, 200, workers=2, size=16)
    next(images)
    processes = images.gi_frame.f_locals['processes']
    images.close()
    assert all(process.returncode is not None for process in processes)


def test_a_process_that_dies_is_named_in_one_sentence(monkeypatch):
    dies = lambda *a: subprocess.Popen([sys.executable, '-c', 'raise SystemExit(3)'], stdout=subprocess.PIPE)
    monkeypatch.setattr(S, '_start', dies)
    with pytest.raises(ValueError, match='ended early, with status 3'): S.render_many(0, 2, workers=2, size=16)

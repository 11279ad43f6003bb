"Scenes: pixels and captions stay what the weights were trained on, geometry agrees with closed forms, scripts come to their end."
import hashlib, math, subprocess, sys
from dataclasses import replace

import pytest
import torch

from pixart_delta_nb.world import raytracer as R, scenes as S, shapes
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.words import Thing, attributes

BALL = Thing('sphere', 'red', 'large', 'plain', .4, -.3, .9, .5)
CENTRE, RADIUS = torch.tensor([.4, .9, -.3], dtype=torch.float64), .9
EMPTY = replace(make('geometry', 0)[0], things=[], sun=(-1.2, .7))


pytestmark = pytest.mark.usefixtures('one_thread')


# the data set the published weights saw -------------------------------------------------------------------------
def test_captions_and_attributes_are_those_of_the_published_weights():
    digest = hashlib.sha256()
    for seed in (0, 1, 7):
        for pairs in ('seen', 'unseen', 'any'):
            for i in range(50):
                scene, caption = make(seed, i, pairs)
                digest.update(f'{caption.text}|{attributes(scene, caption.unsaid, caption.order).tolist()}\n'.encode())
    assert digest.hexdigest() == '0461cb548b45c93c2c84ffd6b1d29f2ca781433ccfc3c9b8c235518218895f85'


BLOCKS = {(0, 0): [150.5, 197.5, 151.2, 157.7, 39.7, 57.2, 65.1],
          (1, 1): [24.6, 42.4, 59.9, 81.8, 67.3, 83.9, 99.1],
          (7, 2): [58.4, 38.7, 39.6, 167.9, 48.6, 188.3, 89.0]}


@pytest.mark.parametrize('seed, index', BLOCKS)
def test_pixels_are_those_of_the_published_weights(seed, index):
    grey = R.render(make(seed, index)[0])['image'].mean(0)*255
    blocks = grey.reshape(16, 8, 16, 8).mean((1, 3)).flatten()[5::37]
    assert (blocks - torch.tensor(BLOCKS[seed, index])).abs().max() < .5


# geometry -------------------------------------------------------------------------------------------------------
def rays(scene, size):
    "Eye (3, 1) and directions (3, size²)."
    return R.camera(scene)[0][:, None], R.directions(scene, R.plane_points(size, 1)[..., 0])


def test_sphere_distance_in_closed_form():
    eye, d = rays(EMPTY, 48)
    t, _ = R.intersect(BALL, eye, d)
    v = CENTRE - eye[:, 0].double()
    along = v @ d.double()
    chord2 = RADIUS**2 - v @ v + along**2
    sure = chord2.abs() > 1e-3
    hit = sure & (chord2 > 0)
    assert torch.equal((t < R.FAR)[sure], (chord2 > 0)[sure]) and hit.sum() > 50
    torch.testing.assert_close(t[hit].double(), along[hit] - chord2[hit].sqrt(), rtol=1e-4, atol=1e-4)


FLAT = lambda p: (p[0]**2 + p[2]**2).sqrt()
IMPLICIT = {'sphere': lambda p: (p - torch.tensor([[0.], [1.], [0.]])).norm(dim=0) - 1,
            'cube': lambda p: (p - torch.tensor([[0.], [shapes.HALF], [0.]])).abs().amax(0) - shapes.HALF,
            'cylinder': lambda p: torch.maximum(FLAT(p) - shapes.RADIUS, p[1] - shapes.HEIGHT),
            'cone': lambda p: FLAT(p) - (2. - p[1])/2.}


@pytest.mark.parametrize('shape', shapes.HITS)
def test_normals_are_the_gradient_of_the_implicit_surface(shape):
    thing = Thing(shape, 'red', 'small', 'plain', -.4, .3, .6, .6)
    eye, d = rays(EMPTY, 64)
    t, n = R.intersect(thing, eye, d)
    p = (eye + t*d)[:, t < R.FAR].requires_grad_()
    value = IMPLICIT[shape](R.to_local(thing, p, True))
    gradient, = torch.autograd.grad(value.sum(), p)
    assert p.shape[1] > 50 and value.abs().max() < 5e-4                  # float32 near an apex
    cosine = (torch.nn.functional.normalize(gradient, dim=0)*n[:, t < R.FAR]).sum(0)
    assert (cosine > .999).float().mean() > .99


def test_shadow_of_a_ball_in_closed_form_and_none_at_the_horizon():
    lone, light = replace(EMPTY, things=[BALL]), R.light_of(EMPTY).double()
    x, z = torch.meshgrid(torch.linspace(-3, 4, 60), torch.linspace(-4, 3, 60), indexing='ij')
    floor = torch.stack([x, torch.zeros_like(x), z]).flatten(1)
    v = CENTRE[:, None] - floor.double()
    gap = (v*v).sum(0) - (light @ v)**2 - RADIUS**2
    dark, sure = R.shadowed(lone, floor), gap.abs() > 1e-4
    assert torch.equal(dark[sure], ((gap < 0) & (light @ v > 0))[sure]) and dark.any()
    horizon = torch.stack([torch.linspace(-8e3, 8e3, 999), torch.zeros(999), torch.linspace(-2e4, -1e2, 999)])
    assert not R.shadowed(lone, horizon).any()


# truth maps -----------------------------------------------------------------------------------------------------
def test_masks_sum_to_one_and_each_thing_is_seen():
    for i in range(5):
        scene = make('masks', i)[0]
        masks = R.render(scene, 64, truth=True)['masks']
        assert masks.shape == (2 + len(scene.things), 64, 64) and (masks.sum(0) == 1).all()
        assert (masks[2:].flatten(1).sum(1) > 20).all()


def test_depth_of_the_ground_obeys_the_plane_equation():
    scene = make(0, 3)[0]
    truth, (eye, d) = R.render(scene, 48, supersample=1, truth=True), rays(scene, 48)
    y = eye[1].double() + truth['depth'].double()*d[1].double().reshape(48, 48)
    near = (truth['masks'][1] == 1) & (truth['depth'] < 50)
    assert near.sum() > 500 and y[near].abs().max() < 1e-4


def test_edges_of_a_ball_lie_on_its_silhouette():
    truth, (eye, d) = R.render(replace(EMPTY, things=[BALL]), 128, truth=True), rays(EMPTY, 128)
    edge, v = R.edges(truth), CENTRE - eye[:, 0].double()
    assert edge.shape == (1, 128, 128) and edge.min() >= 0 and edge.max() <= 1
    off = (torch.acos(v @ d.double()/v.norm()) - math.asin(RADIUS/v.norm())).reshape(128, 128)
    horizon = truth['masks'][0].diff(dim=0, append=torch.zeros(1, 128)).abs() > 0
    assert (off[(edge[0] > .5) & ~horizon].abs() < 4/R.FOCAL/128).all()


def test_edges_need_truth_maps():
    with pytest.raises(ValueError, match='truth=True'): R.edges({'image': torch.zeros(3, 8, 8)})


def test_no_edge_where_nothing_changes():
    assert R.edges({'masks': torch.ones(1, 8, 8), 'normals': torch.zeros(3, 8, 8)}).sum() == 0


# data sets ------------------------------------------------------------------------------------------------------
def test_scene_dataset_items():
    data = S.SceneDataset(5, 2, size=32)
    items = list(data)
    assert len(items) == len(data) == 2 and items[1]['caption'] == make(5, 1)[1].text
    torch.testing.assert_close((items[1]['image'] + 1)/2, R.render(make(5, 1)[0], 32)['image'])


def test_processes_render_the_same_bytes():
    images = S.render_many(5, 3, workers=2, size=32)
    expected = torch.stack([(R.render(make(5, i)[0], 32)['image']*255).round().byte() for i in range(3)])
    assert images.dtype == torch.uint8 and torch.equal(images, expected)


@pytest.mark.parametrize('call', [lambda: S.SceneDataset(0, 0), lambda: S.SceneDataset(0, 1, 'new'),
                                  lambda: S.render_many(0, 1, workers=0), lambda: R.render(make(0, 0)[0], 0)])
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

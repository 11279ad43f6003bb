"""True conditions of a scene, and how they are read off a picture of this world."""
import pytest
import torch

from pixart_delta_nb.conditions import CONDITIONS
from pixart_delta_nb.world.raytracer import render
from pixart_delta_nb.world.truths import scene_fidelity, truth
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.words import Scene, Thing

SCENE = Scene('centre', [Thing('sphere', 'red', 'large', 0., 0., 0.)], 'grass', 'clear')


@pytest.mark.parametrize('condition', CONDITIONS)
def test_truth_is_a_picture(condition):
    x = truth(SCENE, condition, 32)
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and -1 <= x.min() < x.max() <= 1


def test_depth_of_a_thing_is_nearer_than_the_ground_behind_it():
    x, masks = truth(SCENE, 'depth', 64)[0], truth(SCENE, 'segmentation', 64)[0]
    top = (masks > 0).any(1).nonzero()[0].item()
    column = (masks[top] > 0).nonzero()[0].item()
    assert x[top + 1, column] > x[top - 2, column]


def test_hard_line_of_the_horizon_has_no_gap():
    x = truth(SCENE, 'hard', 64)[0] > 0
    assert x.all(1).any()


@pytest.mark.parametrize('condition', CONDITIONS)
def test_a_scene_agrees_with_itself_better_than_with_another(condition):
    scenes = [make(5, i)[0] for i in range(4)]
    given, images = torch.stack([truth(s, condition) for s in scenes]), torch.stack([render(s)['image'] for s in scenes])
    own, other = (scene_fidelity(given, x, condition).mean() for x in (images, images.roll(1, 0)))
    assert own < other if condition == 'depth' else own > other


def test_shadow_never_lightens_the_empty_world():
    lit, dark, sky, depth = empty_worlds(32)
    assert lit.shape == dark.shape == (16, 3, 32, 32)
    assert (dark <= lit + 1e-5).all() and torch.equal(sky, sky.flip(-1))
    assert torch.allclose(depth, depth.flip(-1), atol=1e-3)


@pytest.mark.parametrize('call, words', [(lambda: truth(SCENE, 'hed'), 'condition is'),
                                         (lambda: read_condition(torch.rand(1, 3, 16, 32), 'depth'), 'square')])
def test_what_cannot_be_known_or_read_is_refused(call, words):
    with pytest.raises(ValueError, match=words): call()

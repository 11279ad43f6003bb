"""Conditions of a scene: what its picture shows, what only the ray tracer knows, and how a score is read."""
import pytest
import torch

from pixart_delta_nb.conditions import CONDITIONS, extract
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.raytracer import render
from pixart_delta_nb.world.truths import SEEN, scene_fidelity, truth

SCENE = next(s for i in range(99) if len((s := make('truths', i)[0]).things) == 1)


@pytest.mark.parametrize('condition', CONDITIONS)
def test_truth_is_a_picture(condition):
    x = truth(SCENE, condition, 32)
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and -1 <= x.min() < x.max() <= 1


@pytest.mark.parametrize('condition', SEEN)
def test_what_is_seen_is_what_a_user_extracts_from_the_picture(condition):
    assert torch.equal(truth(SCENE, condition), extract(render(SCENE)['image'][None], condition)[0])


def test_depth_of_a_thing_is_nearer_than_the_ground_behind_it():
    x, masks = truth(SCENE, 'depth', 64)[0], truth(SCENE, 'segmentation', 64)[0]
    top = (masks > 0).any(1).nonzero()[0].item()
    column = (masks[top] > 0).nonzero()[0].item()
    assert x[top + 1, column] > x[top - 2, column]


def test_the_horizon_of_outlines_has_no_gap():
    assert (truth(SCENE, 'outlines', 64)[0] > 0).any(0).all()


@pytest.mark.parametrize('condition', SEEN)
def test_a_render_follows_its_own_edges_and_no_others(condition):
    scenes = [make(5, i)[0] for i in range(4)]
    given, images = torch.stack([truth(s, condition) for s in scenes]), torch.stack([render(s)['image'] for s in scenes])
    own, other = (scene_fidelity(given, x, condition) for x in (images, images.roll(1, 0)))
    assert (own == 1).all() and (other < .7).all()


@pytest.mark.parametrize('call, words', [
    (lambda: truth(SCENE, 'hed'), 'condition is'),
    *((lambda c=c: scene_fidelity(torch.zeros(1, 3, 16, 16), torch.rand(1, 3, 16, 16), c), 'one of edges, hard, hed')
      for c in ('outlines', 'depth', 'segmentation'))])
def test_what_cannot_be_known_or_read_is_refused(call, words):
    with pytest.raises(ValueError, match=words): call()

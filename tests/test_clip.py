"""CLIP, its score and how well it retrieves, and the public networks."""
import json

import pytest
import torch
from torch import nn

from pixart_delta_nb.evidence.clip import build_clip, clip_score, contrastive_loss, load_clip, pair_scores, retrieval_accuracy, save_clip, spoken
from pixart_delta_nb.evidence.clip_training import TAUGHT, clip_captions, clip_step, keep_clip, teach_clip, train_clip
from pixart_delta_nb.evidence.public import InceptionFeatures, public_clip
from pixart_delta_nb.world.captions import make

CAPTIONS = [make('test scores', i)[1].text for i in range(40)]


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def clip():
    torch.manual_seed(0)
    return build_clip(CAPTIONS, hidden_size=32, intermediate_size=32, num_attention_heads=2, projection_dim=16)


@pytest.fixture(scope='module')
def images(): return torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def test_clip_reads_the_end_mark(clip):
    with torch.no_grad(): a, b, c = clip.embed_captions(['a red cube', 'a red cone', 'A RED cube '])
    assert not torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-6)


@pytest.mark.parametrize('text', ['a jet-black cube, on grass', 'A Jet Black  cube on grass.', 'A JET BLACK CUBE ON GRASS'])
def test_marks_and_capitals_are_not_heard(clip, text):
    assert spoken(text) == 'a jet black cube on grass'
    with torch.no_grad(): assert torch.allclose(*clip.embed_captions([text, 'a jet black cube on grass']), atol=1e-6)


def test_every_caption_of_the_world_fits_into_the_text_tower(clip):
    long = max(len(ids) for ids in clip.tokenizer([spoken(make('test long', i, level='full')[1].text) for i in range(500)])['input_ids'])
    assert long < clip.model.config.text_config.max_position_embeddings


def test_clip_cuts_long_captions(clip):
    with torch.no_grad(): assert clip.embed_captions(['red '*500]).isfinite().all()


def test_contrastive_loss_is_log_of_batch_without_knowledge():
    u = torch.ones(5, 4)/2
    assert abs(contrastive_loss(u, u, torch.tensor(10.)).item() - torch.tensor(5.).log().item()) < 1e-6


def test_contrastive_loss_asks_both_ways():
    u, v = torch.eye(3), torch.eye(3)[[0, 0, 2]]
    one_way = nn.functional.cross_entropy(4*u @ v.T, torch.arange(3)), nn.functional.cross_entropy(4*v @ u.T, torch.arange(3))
    assert one_way[0] != one_way[1]
    assert torch.isclose(contrastive_loss(u, v, 4.), sum(one_way)/2)


def test_pixels_agree_with_the_saved_image_processor(clip, tmp_path):
    from transformers import CLIPImageProcessorPil
    from pixart_delta_nb.sampling import to_pil
    save_clip(clip, tmp_path)
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    theirs = torch.as_tensor(CLIPImageProcessorPil.from_pretrained(tmp_path)(to_pil(picture), return_tensors='pt')['pixel_values'])
    assert (clip.pixels(picture) - theirs).abs().max() < 1.1/255


def test_saved_clip_opens_in_stock_transformers(clip, images, tmp_path):
    from transformers import CLIPModel
    save_clip(clip, tmp_path, retrieval_accuracy=.5)
    stock, back = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval(), load_clip(tmp_path)
    assert json.loads((tmp_path/'card.json').read_text())['retrieval_accuracy'] == .5
    with torch.no_grad(): theirs = nn.functional.normalize(stock.get_image_features(clip.pixels(images)).pooler_output, dim=-1)
    with torch.no_grad(): mine = back.embed_images(images)
    assert torch.allclose(theirs, mine, atol=1e-6)


def test_damaged_or_missing_clip_is_refused(clip, tmp_path):
    with pytest.raises(ValueError, match='holds no CLIP'): load_clip(tmp_path)
    save_clip(clip, tmp_path)
    data = bytearray((tmp_path/'model.safetensors').read_bytes()); data[-1] ^= 1
    (tmp_path/'model.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='damaged'): load_clip(tmp_path)


def test_clip_score_is_the_mean_cosine(clip, images):
    with torch.no_grad(): expected = 100*(clip.embed_images(images)*clip.embed_captions(CAPTIONS[:8])).sum(1).mean().clamp_min(0)
    for batch in (3, 8): assert abs(clip_score(images, CAPTIONS[:8], clip, batch) - expected.item()) < 1e-3


def test_scores_of_pairs_average_to_the_clip_score_of_any_part(clip, images):
    pairs = pair_scores(images, CAPTIONS[:8], clip, batch_size=3)
    for part in (slice(None), slice(1, 8, 2)):
        assert max(0., pairs[part].mean().item()) == pytest.approx(clip_score(images[part], CAPTIONS[:8][part], clip), abs=1e-3)


def test_clip_score_of_opposites_is_zero(images):
    class Opposite:
        model = type('M', (nn.Module,), {'device': torch.device('cpu'), 'config': None,
                     'get_image_features': lambda s, x: type('O', (), {'pooler_output': torch.ones(len(x), 2)}),
                     'get_text_features': lambda s, i, m: type('O', (), {'pooler_output': -torch.ones(len(i), 2)})})()
        def pixels(self, images): return images
        def tokens(self, texts): return {'input_ids': torch.zeros(len(texts), 1), 'attention_mask': torch.ones(len(texts), 1)}
    assert clip_score(images, CAPTIONS[:8], Opposite()) == 0


@pytest.mark.parametrize('captions', [[], ['one']])
def test_clip_score_wants_one_caption_an_image(clip, images, captions):
    with pytest.raises(ValueError, match='one caption an image'): clip_score(images[:len(captions)*2], captions, clip)


def test_retrieval_leaves_out_an_incomplete_group(clip):
    class Perfect:
        model = type('M', (), {'device': torch.device('cpu')})
        def embed_images(self, x): return torch.eye(4)
        def embed_captions(self, c): return torch.eye(4)
    assert retrieval_accuracy(Perfect(), torch.rand(7, 3, 2, 2), ['']*7, group=4) == 1
    with pytest.raises(ValueError, match='group needs 4'): retrieval_accuracy(Perfect(), torch.rand(3, 3, 2, 2), ['']*3, group=4)


def test_training_refuses_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ValueError, match='lower batch'): train_clip(tmp_path, count=4, batch_size=8)


def test_captions_of_one_picture_tell_more_or_less():
    texts = clip_captions(17, 5)
    assert len(texts) == 5*len(TAUGHT) and texts == clip_captions(17, 5)
    assert sum(map(len, texts[:5])) > sum(map(len, texts[-5:]))                 # full, and brief


def test_a_step_pairs_pictures_with_their_own_captions(clip):
    n, seen = 6, []
    pictures = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 3, 8, 8)
    class Watch:
        model = type('M', (), {'logit_scale': torch.tensor(0.), 'get_text_features': lambda s, ids, mask: seen.append(ids[:, 0]) or type('O', (), {'pooler_output': torch.eye(6)[ids[:, 0]]})})()
        def tokens(self, captions):
            class Tokens(dict):
                def to(self, device): return self
            return Tokens(input_ids=torch.tensor([[int(c)] for c in captions]), attention_mask=torch.ones(len(captions), 1))
        def embed_images(self, x): return torch.eye(6)[(x.amax((1, 2, 3))*255).round().long().clamp(0, 5)]
    step = clip_step(Watch(), pictures, [str(i % n) for i in range(3*n)], n, torch.Generator().manual_seed(0))
    step(0, 1)
    assert sorted(seen[0].tolist()) == list(range(n))


def test_teaching_lowers_the_loss_and_is_repeatable():
    pictures = torch.randint(0, 256, (6, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    def run():
        losses = []
        clip = teach_clip(pictures, CAPTIONS[:12], 2, batch_size=6, log=lambda step, loss: losses.append(loss))
        return losses[0], clip.model.state_dict()
    (a, one), (b, two) = run(), run()
    assert a == b and all(torch.equal(one[k], two[k]) for k in one)


def test_kept_clip_says_how_well_it_retrieves(clip, tmp_path):
    pictures = torch.randint(0, 256, (32, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    accuracy = keep_clip(clip, tmp_path, pictures, CAPTIONS[:32], scenes=3)
    card = json.loads((tmp_path/'card.json').read_text())
    assert card['retrieval_accuracy'] == accuracy and card['scenes'] == 3 and card['held_out'] == 32


@pytest.mark.parametrize('count', [4, 7])
def test_a_step_wants_whole_rounds_of_captions(clip, count):
    with pytest.raises(ValueError, match='lower batch_size'):
        clip_step(clip, torch.zeros(3, 3, 128, 128), ['a']*count, 2, None)


def test_public_networks_say_in_one_sentence_what_they_need(monkeypatch):
    import transformers
    def offline(*a, **k): raise OSError('no route')
    monkeypatch.setattr(transformers.CLIPModel, 'from_pretrained', offline)
    with pytest.raises(ValueError, match='network connection') as error: public_clip()
    assert '\n' not in str(error.value)


def test_inception_wrapper_hands_over_bytes():
    seen = []
    InceptionFeatures(lambda x: seen.append(x) or x.float())(torch.full((1, 3, 2, 2), .5))
    assert seen[0].dtype == torch.uint8 and seen[0].unique().tolist() == [128]

"The teacher's loss, its initial network, its training loop, and what they refuse."
from dataclasses import replace
import pytest, torch
from pixart_delta_nb.latents import LatentDataset
from pixart_delta_nb.schedules import BETAS, alpha_bar_of, at
from pixart_delta_nb.teacher import drop_captions, initialise, loss_weight, noise_loss, train_teacher
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

SMALL = TransformerConfig(num_attention_heads=3, attention_head_dim=16, num_layers=1, sample_size=8, caption_channels=48, use_additional_conditions=False)
ALPHA_BAR = alpha_bar_of(BETAS)
START = loss_weight(ALPHA_BAR).mean().item()


pytestmark = pytest.mark.usefixtures('seeded')


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return LatentDataset(torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 3, 48, generator=g), torch.ones(4, 3, dtype=torch.bool), torch.randn(1, 1, 48, generator=g))


def test_loss_weight():
    ab = torch.tensor([.999, .5, 1e-4], dtype=torch.float64)
    assert torch.allclose(loss_weight(ab), .5 + ((1 - ab)/ab).clamp_max(5.))


def test_initial_network_predicts_zero(data):
    assert initialise(PixArtTransformer(SMALL))(data.z, torch.tensor([1, 19, 500, 999]), data.caption, data.mask).abs().max() == 0


def test_dropped_captions_are_the_null_caption(data):
    h, m = drop_captions(data.caption, data.mask, data.null, torch.Generator().manual_seed(0), rate=1.)
    assert torch.equal(h[:, :1], data.null.expand(4, -1, -1)) and m.sum().item() == 4 and data.mask.sum() == 12
    kept, m = drop_captions(data.caption, data.mask, data.null, torch.Generator().manual_seed(0), rate=0.)
    assert torch.equal(kept, data.caption) and torch.equal(m, data.mask)


def test_a_null_caption_of_several_words_brings_its_own_masks(data):
    null, rows = torch.randn(1, 5, 48), torch.arange(5) < torch.tensor([[1], [2], [3], [5]])
    h, m = drop_captions(data.caption, data.mask, null, torch.Generator(), 1., rows)
    assert torch.equal(h, null.expand(4, -1, -1)) and torch.equal(m, rows)
    h, m = drop_captions(data.caption, data.mask, null, torch.Generator(), 0., rows)
    assert torch.equal(h[:, :3], data.caption) and h.shape == (4, 5, 48) and m.sum(1).tolist() == [3]*4


def test_the_loss_of_an_exact_network_is_zero_and_that_of_silence_the_mean_weight(data):
    grey, g = replace(data, z=torch.zeros(4, 4, 8, 8)), torch.Generator().manual_seed(0)
    exact = lambda x, t, caption, mask: x/(1 - at(ALPHA_BAR, t, x)).sqrt()
    assert noise_loss(exact, grey.draw(64, g), ALPHA_BAR, g) < 1e-8
    assert noise_loss(lambda x, *rest: 0*x, grey.draw(512, g), ALPHA_BAR, g).item() == pytest.approx(START, rel=.1)


def test_a_network_in_half_precision_is_given_its_own_and_its_loss_is_in_full(data):
    g = torch.Generator().manual_seed(0)
    loss = noise_loss(PixArtTransformer(SMALL).bfloat16(), data.draw(3, g), ALPHA_BAR, g)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_teacher_resumes_bit_exact(data, tmp_path):
    kw = dict(steps=6, config=SMALL, batch_size=4, progress=False)
    a = train_teacher(data, tmp_path/'a', **kw)
    train_teacher(data, tmp_path/'b', until=3, **kw)
    b = train_teacher(data, tmp_path/'b', resume=True, **kw)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_a_run_goes_on_with_its_own_data_and_start_alone(data, tmp_path):
    start, kw = PixArtTransformer(SMALL), dict(steps=4, batch_size=2, progress=False)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    train_teacher(data, tmp_path, transformer=start, until=2, **kw)
    assert all(torch.equal(before[k], v) for k, v in start.state_dict().items())
    with pytest.raises(ValueError, match='data = '): train_teacher(replace(data, z=-data.z), tmp_path, transformer=start, resume=True, **kw)
    torch.manual_seed(9)
    with pytest.raises(ValueError, match='teacher = '): train_teacher(data, tmp_path, transformer=PixArtTransformer(SMALL), resume=True, **kw)
    with pytest.raises(ValueError, match='teacher = .* not None'): train_teacher(data, tmp_path, config=SMALL, resume=True, **kw)
    with pytest.raises(ValueError, match='choose another folder'): train_teacher(data, tmp_path, transformer=start, **kw)


def test_teacher_with_micro_conditions_is_told_the_sizes(data, tmp_path):
    kw = dict(steps=3, config=replace(SMALL, use_additional_conditions=True), batch_size=4, progress=False)
    with pytest.raises(ValueError, match='lacks resolution, aspect_ratio'): train_teacher(data, tmp_path/'none', **kw)
    sizes = [dict(resolution=torch.full((4, 2), s), aspect_ratio=torch.ones(4, 1)) for s in (64., 512.)]
    a, b = (train_teacher(replace(data, **s), tmp_path/str(i), **kw) for i, s in enumerate(sizes))
    moved = [n for (n, p), q in zip(a.named_parameters(), b.parameters()) if not torch.equal(p, q)]
    assert any('resolution_embedder' in n for n in moved)


def test_sizes_and_control_in_the_data_do_not_disturb_a_network_without(data, tmp_path):
    more = replace(data, resolution=torch.full((4, 2), 64.), aspect_ratio=torch.ones(4, 1), control=data.z)
    kw = dict(steps=2, config=SMALL, batch_size=4, progress=False)
    a, b = train_teacher(data, tmp_path/'a', **kw), train_teacher(more, tmp_path/'b', **kw)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_captions_of_another_width_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match='captions of width 48, but the data has 6'): train_teacher(replace(data, caption=torch.randn(4, 3, 6)), tmp_path, config=SMALL)


def test_first_loss_is_the_mean_weight(data, tmp_path):
    log = []
    train_teacher(data, tmp_path, steps=1, config=SMALL, batch_size=512, log=log.append, progress=False)
    assert log[0]['loss'] == pytest.approx(START, rel=.1)

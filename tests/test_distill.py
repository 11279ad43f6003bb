"Latent consistency distillation: Algorithm 1 against a float64 transcription, its corner cases, and the loop."
import math

import pytest
import torch
from torch import nn

from pixart_delta_nb.core import save_tensors
from pixart_delta_nb.data import open_latents
from pixart_delta_nb.latents import Batch, LatentDataset
from pixart_delta_nb.consistency import guided_eps, pair_with_null, predict_eps
from pixart_delta_nb.lcd import lcd_step, lcd_train, pseudo_huber
from pixart_delta_nb.schedules import alpha_bar_from_betas, at, eps_to_x0, linear_betas, to_v
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

ALPHA_BAR = alpha_bar_from_betas(linear_betas())
CONFIG = TransformerConfig(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, caption_channels=6,
                           use_additional_conditions=False)
LENGTHS = torch.tensor([2, 4, 1])
N = torch.tensor([0, 49, 7])


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return [PixArtTransformer(CONFIG).double().requires_grad_(i == 0) for i in range(3)]  # student, target, teacher


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return Batch(draw(3, 4, 8, 8), draw(3, 4, 6), (torch.arange(4) < LENGTHS[:, None]).long(), draw(1, 1, 6))


@pytest.fixture
def noise(): return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def literal_f(network, z, t, c):
    x0 = (z - math.sqrt(1 - ALPHA_BAR[t])*network(z, torch.tensor([t]), c)[:, :4])/math.sqrt(ALPHA_BAR[t])
    return .25/((10*t)**2 + .25)*z + 10*t/math.sqrt((10*t)**2 + .25)*x0


def literal_psi(network, z, t, s, c):
    eps = network(z, torch.tensor([t]), c)[:, :4]
    x0 = (z - math.sqrt(1 - ALPHA_BAR[t])*eps)/math.sqrt(ALPHA_BAR[t])
    return math.sqrt(ALPHA_BAR[s])*x0 + math.sqrt(1 - ALPHA_BAR[s])*eps - z


@pytest.mark.parametrize('omega', [0., 3.5, 4.5])
def test_step_equals_the_literal_algorithm(networks, batch, noise, omega):
    student, target, teacher = networks
    losses = []
    with torch.no_grad():
        for b, i in enumerate(N.tolist()):
            t, s = 20*i + 19, max(20*i - 1, 0)
            c = batch.caption[b:b+1, :LENGTHS[b]]
            z = math.sqrt(ALPHA_BAR[t])*batch.z[b:b+1] + math.sqrt(1 - ALPHA_BAR[t])*noise[b:b+1]
            z_n = z + (1 + omega)*literal_psi(teacher, z, t, s, c) - omega*literal_psi(teacher, z, t, s, batch.null)
            d = literal_f(student, z, t, c) - literal_f(target, z_n, s, c)
            losses.append(((d**2 + 1e-6).sqrt() - 1e-3).mean().item())
    loss = lcd_step(student, target, teacher, batch, ALPHA_BAR, omega, n=N, noise=noise)
    assert abs(loss.item() - sum(losses)/3) < 1e-10


def test_step_in_float32_is_close_to_float64(networks, batch, noise):
    exact = lcd_step(*networks, batch, ALPHA_BAR, n=N, noise=noise).item()
    light = Batch(*(v.float() if v is not None and v.is_floating_point() else v for v in batch))
    single = lcd_step(*[m.float() for m in networks], light, ALPHA_BAR, n=N, noise=noise.float())
    assert single.dtype == torch.float32 and single.item() == pytest.approx(exact, rel=1e-4)


def test_lowest_index_ignores_the_target(networks, batch, noise):
    student, target, teacher = networks
    low = torch.zeros(3, dtype=torch.long)
    assert lcd_step(student, target, teacher, batch, ALPHA_BAR, n=low, noise=noise).item() == \
           lcd_step(student, student, teacher, batch, ALPHA_BAR, n=low, noise=noise).item()


def test_second_index_uses_the_target(networks, batch, noise):
    student, target, teacher = networks
    n = torch.ones(3, dtype=torch.long)
    assert lcd_step(student, target, teacher, batch, ALPHA_BAR, n=n, noise=noise).item() != \
           lcd_step(student, student, teacher, batch, ALPHA_BAR, n=n, noise=noise).item()


def test_gradient_reaches_the_student_alone(networks, batch, noise):
    student, target, teacher = networks
    for network in (target, teacher): network.requires_grad_(True)
    lcd_step(student, target, teacher, batch, ALPHA_BAR, n=N, noise=noise).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for network in (target, teacher) for p in network.parameters())


def test_step_draws_are_reproducible(networks, batch):
    losses = [lcd_step(*networks, batch, ALPHA_BAR, generator=torch.Generator().manual_seed(s)).item()
              for s in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_omega_an_image_equals_the_scalar(networks, batch, noise):
    scalar = lcd_step(*networks, batch, ALPHA_BAR, 3.5, n=N, noise=noise).item()
    assert lcd_step(*networks, batch, ALPHA_BAR, torch.full((3,), 3.5), n=N,
                    noise=noise).item() == pytest.approx(scalar, abs=1e-12)


def test_guidance_is_the_pipelines_with_s_one_above_omega(networks, batch):
    teacher, t = networks[2], torch.full((3,), 500)
    cond = predict_eps(teacher, batch.z, t, batch.caption, batch.mask)
    uncond = predict_eps(teacher, batch.z, t, batch.null.expand(3, -1, -1), torch.ones(3, 1))
    ours = guided_eps(teacher, batch.z, t, *batch[1:5], 3.5)
    torch.testing.assert_close(ours, uncond + 4.5*(cond - uncond), rtol=0, atol=1e-12)


def test_draw_batch_cuts_to_the_longest_caption_and_follows_its_seed(batch):
    data = LatentDataset(*batch._replace(mask=batch.mask.clone())); data.mask[1] = torch.tensor([1, 1, 1, 0])
    a, b = (data.draw(32, torch.Generator().manual_seed(5)) for _ in range(2))
    assert a.caption.shape == (32, 3, 6) and torch.equal(a.z, b.z)


def test_pseudo_huber_closed_form():
    three, zero = torch.tensor([3e-3], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert pseudo_huber(three, zero, c=4e-3).item() == pytest.approx(1e-3, rel=1e-12)


def test_pseudo_huber_lies_between_its_limits():
    d = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, absolute = pseudo_huber(d, torch.zeros_like(d)).item(), d.abs().mean().item()
    assert absolute - 1e-3 < value < absolute


def test_pseudo_huber_slope():
    d = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(pseudo_huber(d, torch.zeros_like(d)), d)
    torch.testing.assert_close(slope, (d/(d**2 + 1e-6).sqrt()).detach()/7)


@pytest.mark.parametrize('a, b, c, match',
                         [((2, 4), (4,), 1e-3, 'must be equal'), ((2,), (2,), 0., 'must be positive')])
def test_pseudo_huber_refuses(a, b, c, match):
    with pytest.raises(ValueError, match=match): pseudo_huber(torch.zeros(a), torch.zeros(b), c)


class Linear(nn.Module):
    "The smallest network with the interface of a transformer."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.9, 0.1]))
    def forward(self, x, t, caption, mask):
        return self.weight[0]*x + self.weight[1]*caption.mean((1, 2)).reshape(-1, 1, 1, 1)


def train_linear(batch, out, teacher=None, **options):
    light = LatentDataset(*(v.float() if v is not None and v.is_floating_point() else v for v in batch))
    teacher = teacher or Linear()
    return teacher, *lcd_train(teacher, light, ALPHA_BAR, out,
                               **({'steps': 8, 'batch_size': 2, 'lr': 1e-3, 'warmup': 2, 'progress': False} | options))


@pytest.mark.parametrize('average', [0., .9])
def test_loop_resumes_bit_for_bit(batch, tmp_path, average):
    _, whole, whole_target, log = train_linear(batch, tmp_path/'whole', average=average)
    train_linear(batch, tmp_path/'parts', average=average, until=3)
    _, parts, parts_target, log_again = train_linear(batch, tmp_path/'parts', average=average, resume=True)
    assert torch.equal(whole.weight, parts.weight) and torch.equal(whole_target.weight, parts_target.weight)
    assert log == log_again


def test_loop_moves_the_student_and_leaves_the_teacher(batch, tmp_path):
    teacher, student, _, _ = train_linear(batch, tmp_path)
    assert torch.equal(teacher.weight, Linear().weight) and not torch.equal(student.weight, teacher.weight)


class LinearV(Linear):
    "`Linear`, which answers with v."
    def forward(self, x, t, caption, mask):
        eps, ab = super().forward(x, t, caption, mask), at(ALPHA_BAR, t, x)
        return to_v(eps_to_x0(x, eps, ab), eps, ab)


def test_the_loop_hands_loss_solver_and_prediction_to_the_step(batch, tmp_path):
    log, in_v = (train_linear(batch, tmp_path/kind.__name__, teacher=kind(), prediction=prediction)[3]
                 for kind, prediction in ((Linear, 'epsilon'), (LinearV, 'v_prediction')))
    assert [row['loss'] for row in in_v] == pytest.approx([row['loss'] for row in log], rel=1e-4)
    squared = train_linear(batch, tmp_path/'squared', loss=nn.functional.mse_loss)[3]
    stays = train_linear(batch, tmp_path/'stays', solver=lambda x, eps, ab_t, ab_s: x)[3]
    assert len({row[-1]['loss'] for row in (log, squared, stays)}) == 3
    for wrong in ({'prediction': 'sample'}, {'loss': nn.functional.mse_loss}):
        with pytest.raises(ValueError, match='other settings'):
            train_linear(batch, tmp_path/'Linear', resume=True, **wrong)


def test_target_is_the_average_of_algorithm_1(batch, tmp_path):
    runs = [train_linear(batch, tmp_path/str(i), mu=.7, until=i, steps=3) for i in (1, 2, 3)]
    expected = .7**3*Linear().weight + .3*sum(.7**(3 - i)*run[1].weight for i, run in enumerate(runs, 1))
    torch.testing.assert_close(runs[-1][2].weight, expected.detach())


@pytest.mark.parametrize('options, match',
                         [({'mu': 95}, 'mu=95 must lie between 0 and 1'), ({'lr': 1e-3, 'k': 7}, 'k is 7')])
def test_loop_refuses(batch, tmp_path, options, match):
    with pytest.raises(ValueError, match=match): train_linear(batch, tmp_path, **options)


def test_loop_refuses_captions_that_do_not_match(batch, tmp_path):
    with pytest.raises(ValueError, match='3 latents, 2 captions'):
        train_linear(batch._replace(caption=batch.caption[:2]), tmp_path)


def test_latents_round_trip(batch, tmp_path):
    save_tensors(tmp_path/'d.safetensors', dict(zip(('latents', 'captions', 'mask', 'null'), batch)))
    data = open_latents(tmp_path/'d.safetensors')
    assert all(torch.equal(a, b) for a, b in zip((data.z, data.caption, data.mask, data.null), batch[:4]))
    assert data.null_mask is None


def test_latents_name_what_is_missing(batch, tmp_path):
    save_tensors(tmp_path/'d.safetensors', {'latents': batch.z})
    with pytest.raises(ValueError, match='lacks captions, mask, null'): open_latents(tmp_path/'d.safetensors')


def test_benchmark_reports_its_floor(networks, batch):
    from pixart_delta_nb.evidence.benchmarks import benchmark_step
    light = Batch(*(v.float() if v is not None and v.is_floating_point() else v for v in batch))
    cost = benchmark_step(*[m.float() for m in networks], light, ALPHA_BAR, repeats=2)
    assert cost['floor_seconds'] == pytest.approx(6*cost['forward_seconds']) and cost['ratio'] > 0
    assert cost['ratio'] == pytest.approx(cost['step_seconds']/cost['floor_seconds'])


@pytest.mark.parametrize('change, match', [
    (dict(n=torch.tensor([0, 50, 1])), 'from 0 to 49'), (dict(n=torch.tensor([0, -1, 1])), 'from 0 to 49'),
    (dict(n=torch.tensor([0])), 'one index an image'), (dict(omega=-1.), 'must not be negative'), (dict(k=30), 'k is 30')])
def test_step_refuses(networks, batch, noise, change, match):
    with pytest.raises(ValueError, match=match):
        lcd_step(*networks, batch, ALPHA_BAR, **{'n': N, 'noise': noise, **change})


def test_step_refuses_a_table_that_does_not_decrease(networks, batch, noise):
    with pytest.raises(ValueError, match='must decrease'): lcd_step(*networks, batch, 1 - ALPHA_BAR, n=N, noise=noise)


def test_batches_refuse(batch):
    with pytest.raises(ValueError, match='batch_size is 0'): LatentDataset(*batch).draw(0, torch.Generator())
    with pytest.raises(ValueError, match='one encoder makes both'):
        pair_with_null(batch.caption, batch.mask, torch.zeros(1, 1, 5))


def dataset(batch, **changes):
    return LatentDataset(*(v.float() if v is not None and v.is_floating_point() else v
                           for v in batch._replace(**changes)))


def train_transformer(data, out, **options):
    torch.manual_seed(0)
    teacher = options.pop('teacher', None) or PixArtTransformer(CONFIG)
    return lcd_train(teacher, data, ALPHA_BAR, out,
                     **({'steps': 3, 'batch_size': 2, 'lr': 1e-3, 'warmup': 1, 'progress': False} | options))


def test_a_range_of_omega_is_refused_for_a_student_that_does_not_embed_it(batch, tmp_path):
    with pytest.raises(ValueError, match='does not embed ω'): train_linear(batch, tmp_path, omega=(2., 5.))
    with pytest.raises(ValueError, match=r'embed_guidance\(network\)'):
        train_transformer(dataset(batch), tmp_path, omega=(2., 5.))


def test_one_null_mask_a_row_trains_on_captions_of_unequal_length(batch, tmp_path):
    # the released null caption: as long as a caption, under its mask
    wide = torch.cat([batch.null, torch.randn(1, 3, 6).double()], 1)
    student, _, log = train_transformer(dataset(batch, null=wide, null_mask=batch.mask), tmp_path, batch_size=3)
    assert all(p.isfinite().all() for p in student.parameters()) and math.isfinite(log[-1]['loss'])


def test_no_gradient_reaches_the_null_caption(batch, tmp_path):
    null = batch.null.clone().requires_grad_(True)
    data = dataset(batch, null=null)
    assert not data.draw(2, torch.Generator()).null.requires_grad
    train_transformer(data, tmp_path)
    assert null.grad is None and torch.equal(null.detach(), batch.null)


def test_a_teacher_in_half_precision_makes_a_student_in_float32(batch, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        teacher = PixArtTransformer(CONFIG).to(dtype)
        student, target, _ = train_transformer(dataset(batch), tmp_path/str(dtype), teacher=teacher)
        assert {p.dtype for n in (student, target) for p in n.parameters()} == {torch.float32}
        assert next(teacher.parameters()).dtype == dtype


def test_a_student_in_half_precision_is_refused(batch, tmp_path):
    with pytest.raises(ValueError, match='train them in float32'):
        train_transformer(dataset(batch), tmp_path, student=PixArtTransformer(CONFIG).bfloat16())


def test_a_run_goes_on_with_its_own_data_and_teacher_alone(batch, tmp_path):
    train_transformer(dataset(batch), tmp_path, until=1)
    with pytest.raises(ValueError, match='data = '):
        train_transformer(dataset(batch, z=batch.z + 1), tmp_path, resume=True)
    with pytest.raises(ValueError, match='teacher = '):
        train_transformer(dataset(batch), tmp_path, teacher=PixArtTransformer(CONFIG), resume=True)
    with pytest.raises(ValueError, match='choose another folder'): train_transformer(dataset(batch), tmp_path)


@pytest.mark.parametrize('field', ['z', 'caption', 'null'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_data_that_are_not_finite_are_refused(batch, field, value):
    broken = getattr(batch, field).clone()
    broken.view(-1)[0] = value
    with pytest.raises(ValueError, match=f'{field}.* values that are not finite'): dataset(batch, **{field: broken})


def test_loop_refuses_a_range_of_omega_that_is_none(batch, tmp_path):
    with pytest.raises(ValueError, match=r'omega=\(3.0, -1.0\)'): train_linear(batch, tmp_path, omega=(3., -1.))


def test_disagreement_8_a_captions_mask_over_the_null_caption_is_another_input(networks, batch):
    teacher, t = networks[2], torch.full((1,), 500)
    wide = torch.cat([batch.null, batch.caption[:1, 1:]], 1)
    own, captions = (predict_eps(teacher, batch.z[:1], t, wide, torch.tensor([m]))
                     for m in ([1, 0, 0, 0], [1, 1, 0, 0]))
    torch.testing.assert_close(own, predict_eps(teacher, batch.z[:1], t, batch.null, torch.ones(1, 1)), rtol=0,
                               atol=1e-12)
    assert (own - captions).abs().max() > 1e-6

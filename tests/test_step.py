"The step for anyone: any network, axes, precision, parametrisation, loss and solver, and nothing read on the host."
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_delta_nb.consistency import predict_eps
from pixart_delta_nb.lcd import lcd_step, pseudo_huber
from pixart_delta_nb.latents import Batch
from pixart_delta_nb.pipeline import tiny_pipeline
from pixart_delta_nb.sampling import sample_student, sample_teacher
from pixart_delta_nb.schedules import alpha_bar_from_betas, at, eps_to_x0, linear_betas, scaled_linear_betas, to_v
from pixart_delta_nb.solvers import ddim_step
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

ALPHA_BAR = alpha_bar_from_betas(linear_betas())
CONFIG = TransformerConfig(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, caption_channels=6,
                           use_additional_conditions=False)
N = torch.tensor([0, 49, 7])


class Adapter(nn.Module):
    def __init__(self, network): super().__init__(); self.network = network
    def forward(self, x, t, words, mask, **told): return self.network(
        x, timestep=t, encoder_hidden_states=words, encoder_attention_mask=mask, added_cond_kwargs=told or None).sample


class Anywhere(nn.Module):
    "Latents of any number of axes; the same answer in three parametrisations, with a learned variance behind it."
    def __init__(self, prediction='epsilon', dtype=torch.float64):
        super().__init__()
        self.weight, self.prediction = nn.Parameter(torch.tensor([.9, .1], dtype=dtype)), prediction
    def forward(self, x, t, caption, mask):
        words, ab = caption.mean((1, 2)).reshape(-1, *[1]*(x.ndim - 1)), at(ALPHA_BAR, t, x)
        eps = self.weight[0]*x + self.weight[1]*words
        x0 = eps_to_x0(x, eps, ab)
        answer = {'epsilon': eps, 'sample': x0, 'v_prediction': to_v(x0, eps, ab)}[self.prediction]
        return torch.cat([answer, torch.ones_like(answer)], 1)


def rows(*shape, dtype=torch.float32, width=6):
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
    mask = (torch.arange(4) < torch.tensor([[2], [4], [1]])).long()
    return Batch(draw(3, *shape), draw(3, 4, width), mask, draw(1, 1, width))


def noise_like(batch):
    g = torch.Generator().manual_seed(2)
    return torch.randn(batch.z.shape, generator=g, dtype=torch.float64).to(batch.z)


def transformers(dtype=torch.float32):
    torch.manual_seed(0)
    return [PixArtTransformer(CONFIG).to(dtype).requires_grad_(i == 0) for i in range(3)]


class HostReads(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ('_local_scalar_dense', 'is_nonzero'))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('shape', [(4,), (4, 9), (4, 5, 6), (4, 3, 5, 6)], ids=str)
@pytest.mark.parametrize('omega', [3.5, torch.tensor([0., 1., 5.])], ids=['scalar', 'rows'])
def test_any_number_of_axes_and_every_parametrisation_give_one_loss(shape, omega):
    batch = rows(*shape, dtype=torch.float64)
    given = dict(n=N, noise=noise_like(batch))
    losses = [lcd_step(*[Anywhere(kind)]*3, batch, ALPHA_BAR, omega, **given, prediction=kind).item()
              for kind in ('epsilon', 'v_prediction', 'sample')]
    assert losses == pytest.approx([losses[0]]*3, rel=1e-9) and losses[0] > 0


def test_axes_are_handled_alike():
    flat = rows(4, 36, dtype=torch.float64)
    square = flat._replace(z=flat.z.reshape(3, 4, 6, 6))
    noise = noise_like(flat)
    losses = [lcd_step(*[Anywhere()]*3, b, ALPHA_BAR, n=N, noise=noise.reshape(b.z.shape)).item()
              for b in (flat, square)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_prediction_of_another_name_is_refused():
    batch = rows(4, 4)
    with pytest.raises(ValueError, match="prediction is 'x0'"):
        lcd_step(*[Anywhere()]*3, batch, ALPHA_BAR, n=N, noise=noise_like(batch), prediction='x0')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_give_a_float32_loss_and_a_gradient(dtype):
    batch, noise = rows(4, 8, 8), noise_like(rows(4, 8, 8))
    full = lcd_step(*transformers(), batch, ALPHA_BAR, n=N, noise=noise)
    student, target, teacher = transformers(dtype)
    half = lcd_step(student, target, teacher, batch, ALPHA_BAR, n=N, noise=noise)
    half.backward()
    assert half.dtype == torch.float32 and half.item() == pytest.approx(full.item(), rel=.05)
    assert student.proj_out.weight.grad.dtype == dtype and student.proj_out.weight.grad.isfinite().all()
    mixed = lcd_step(transformers()[0], target, teacher, batch, ALPHA_BAR, n=N, noise=noise)
    assert mixed.dtype == torch.float32 and mixed.item() == pytest.approx(full.item(), rel=.05)


def test_latents_in_half_precision_are_lifted():
    batch = Batch(*(v.half() if v is not None and v.is_floating_point() else v for v in rows(4, 8, 8)))
    assert lcd_step(*transformers(), batch, ALPHA_BAR, n=N, noise=noise_like(batch)).dtype == torch.float32


def test_loss_and_solver_are_arguments():
    batch, seen = rows(4, 8, 8, dtype=torch.float64), []
    def to_the_end(x, eps, ab_t, ab_s):
        seen.append((x.shape, eps.shape, ab_t.shape, ab_s.shape))
        return ddim_step(x, eps, ab_t, torch.ones_like(ab_s))
    networks, given = transformers(torch.float64), dict(n=N, noise=noise_like(batch))
    plain = lcd_step(*networks, batch, ALPHA_BAR, **given)
    assert lcd_step(*networks, batch, ALPHA_BAR, loss=lambda a, b: pseudo_huber(a, b), **given) == plain
    squared = lcd_step(*networks, batch, ALPHA_BAR, loss=nn.functional.mse_loss, **given)
    other = lcd_step(*networks, batch, ALPHA_BAR, solver=to_the_end, **given)
    assert len({plain.item(), squared.item(), other.item()}) == 3
    assert seen == [((3, 4, 8, 8), (3, 4, 8, 8), (3, 1, 1, 1), (3, 1, 1, 1))]


def tiny_unet():
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, attention_head_dim=8,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        cross_attention_dim=12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_unet_of_diffusers_is_distilled_through_the_adapter(dtype):
    teacher = Adapter(tiny_unet()).to(dtype)
    student, batch = copy.deepcopy(teacher), rows(4, 8, 8, width=12)
    table = alpha_bar_from_betas(scaled_linear_betas())
    optimiser, losses = torch.optim.SGD(student.parameters(), lr=1e-2), []
    for _ in range(3):
        loss = lcd_step(student, student, teacher, batch, table, n=N, noise=noise_like(batch))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert loss.dtype == torch.float32 and (dtype == torch.bfloat16 or losses[-1] < losses[0])
    assert all(p.grad is None for p in teacher.parameters())


def test_a_unet_hears_the_caption_under_its_mask():
    network, batch = Adapter(tiny_unet()), rows(4, 8, 8, width=12)
    t = torch.tensor([19, 500, 999])
    out = predict_eps(network, batch.z, t, batch.caption, batch.mask)
    padded = batch.caption.masked_fill(batch.mask[..., None] == 0, 9.)    # what stands under padding
    torch.testing.assert_close(predict_eps(network, batch.z, t, padded, batch.mask), out)
    assert (predict_eps(network, batch.z, t, batch.caption + 1, batch.mask) - out).abs().max() > 1e-4


def test_pixart_of_diffusers_through_the_adapter_is_ours_sizes_and_all():
    from diffusers import PixArtTransformer2DModel
    size = dict(num_attention_heads=3, attention_head_dim=16, num_layers=1, sample_size=8, caption_channels=6,
                use_additional_conditions=True)
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(cross_attention_dim=48, **size).double()
    ours = PixArtTransformer(TransformerConfig(**size)).double()
    ours.load_state_dict(theirs.state_dict())
    batch = rows(4, 8, 8, dtype=torch.float64)._replace(resolution=torch.tensor([[64., 64], [32, 128], [100, 50]]),
                                                        aspect_ratio=torch.tensor([[1.], [.25], [2]]))
    losses = [lcd_step(m, m, m, batch, ALPHA_BAR, n=N, noise=noise_like(batch)).item() for m in (ours, Adapter(theirs))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_null_mask_a_row_is_padded_beside_captions_that_were_cut():
    batch, networks = rows(4, 8, 8, dtype=torch.float64), transformers(torch.float64)
    null = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(3)).double()
    own = (torch.arange(9) < torch.tensor([[2], [9], [5]])).long()
    given = dict(noise=noise_like(batch))
    whole = lcd_step(*networks, batch._replace(null=null, null_mask=own), ALPHA_BAR, n=N, **given)
    single = [lcd_step(*networks, batch._replace(z=batch.z[i:i+1], caption=batch.caption[i:i+1], mask=batch.mask[i:i+1],
                                                 null=null[:, :n], null_mask=None), ALPHA_BAR, n=N[i:i+1],
                       noise=given['noise'][i:i+1]) for i, n in enumerate((2, 9, 5))]
    assert whole.item() == pytest.approx(sum(single).item()/3, abs=1e-12)


def test_a_step_reads_no_value_on_the_host():
    batch, networks = rows(4, 8, 8), transformers()
    with HostReads() as given: lcd_step(*networks, batch, ALPHA_BAR, n=N, noise=noise_like(batch))
    with HostReads() as drawn: lcd_step(*networks, batch, ALPHA_BAR, torch.tensor([1., 2., 3.]))
    assert given.count == drawn.count == 0


def test_a_step_needs_no_values_at_all():
    "On the meta device there are none to read."
    batch = Batch(*(None if v is None else v.to('meta') for v in rows(4, 8, 8)))
    networks, noise = [m.to('meta') for m in transformers()], torch.zeros(3, 4, 8, 8, device='meta')
    loss = lcd_step(*networks, batch, ALPHA_BAR, n=N.to('meta'), noise=noise)
    assert loss.shape == () and loss.requires_grad


@pytest.mark.parametrize('sample, steps', [(sample_teacher, 14), (sample_student, 4)])
def test_the_steps_of_a_sampler_read_nothing_on_the_host(sample, steps):
    pipe = tiny_pipeline()
    with HostReads() as few: sample(pipe, ['a red cube'], 2)
    with HostReads() as many: sample(pipe, ['a red cube'], steps)
    assert many.count == few.count <= 4


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
def test_a_step_compiles_as_one_graph(prediction):
    batch, networks = rows(4, 8, 8), transformers()
    given = dict(n=N, noise=noise_like(batch), prediction=prediction)
    compiled = torch.compile(lcd_step, fullgraph=True, backend='eager')
    plain = lcd_step(*networks, batch, ALPHA_BAR, **given)
    torch.testing.assert_close(compiled(*networks, batch, ALPHA_BAR, **given), plain)


def test_the_compiled_step_gives_the_same_gradients():
    batch, networks = rows(4, 8, 8), transformers()
    grads = []
    for step in (lcd_step, torch.compile(lcd_step, fullgraph=True, backend='aot_eager')):
        step(*networks, batch, ALPHA_BAR, n=N, noise=noise_like(batch)).backward()
        grads.append([p.grad.clone() for p in networks[0].parameters()])
        networks[0].zero_grad()
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_three_networks_of_an_adapter_on_a_half_precision_base_take_a_step(dtype):
    from pixart_delta_nb.lcm_lora import one_model
    from pixart_delta_nb.lora import add_lora
    batch, model = rows(4, 8, 8), add_lora(transformers(dtype)[0], 2)
    loss = lcd_step(*one_model(model), batch, ALPHA_BAR, n=N, noise=noise_like(batch))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()

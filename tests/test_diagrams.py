"Diagrams against what they draw: shapes of the modules, wiring, times, bytes; no text beyond its box or over another, in light and dark."
import copy, re
import xml.dom.minidom

import pytest, torch

from pixart_delta_nb.canvas import GREY, INK, KINDS, Canvas, contrast, faults, rounded, text_extents, tint
from pixart_delta_nb.consistency import lcm_timesteps, released_timesteps
from pixart_delta_nb.controlnet import ControlNetTransformer
from pixart_delta_nb.diagrams import (block_diagram, control_diagram, distillation_diagram, traced_shapes,
                                      transformer_diagram)
from pixart_delta_nb.schedules import alpha_bar_from_betas, linear_betas, skip_grid
from pixart_delta_nb.solvers import dpm_timesteps
from pixart_delta_nb.timelines import memory_diagram, times_diagram
from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig

ALPHA_BAR = alpha_bar_from_betas(linear_betas())
SMALL = dict(num_attention_heads=3, attention_head_dim=16, num_layers=3, caption_channels=24)
BYTES = {'text encoder': 5.9e9, 'transformer': 1.2e9, 'autoencoder': .17e9, 'activations': 1.6e9}


def network(**more): return PixArtTransformer(TransformerConfig(**SMALL | {'sample_size': 16} | more)).eval()


@pytest.fixture(scope='module')
def base(): return PixArtTransformer(TransformerConfig(num_attention_heads=2, attention_head_dim=8, num_layers=6, sample_size=8, caption_channels=6))


def controlled(base): return {'report': ControlNetTransformer(base, 3), 'released': ControlNetTransformer(base, 3, 'released'), 'UNet': ControlNetTransformer(base, 3, wiring='unet')}


def times(steps=4, table=lcm_timesteps): return times_diagram(table(steps), dpm_timesteps(14), skip_grid(), ALPHA_BAR)


def every_diagram(base):
    "Title and canvas of each diagram, in several sizes."
    with torch.device('meta'): paper = PixArtTransformer(TransformerConfig())
    small, frozen = network(), network().requires_grad_(False)
    yield from ((f'{draw.__name__} {n.config.width}', draw(n)) for draw in (transformer_diagram, block_diagram) for n in (small, paper, network(sample_size=128)))
    yield from ((f'distillation {net.config.width}', distillation_diagram(net, frozen, frozen)) for net in (small, paper))
    yield from ((f'control {names}', control_diagram({k: controlled(base)[k] for k in names})) for names in (('report', 'released', 'UNet'), ('UNet',), ('report', 'UNet')))
    yield from ((f'times {steps}', times(steps)) for steps in (1, 2, 3, 4, 5, 8))
    yield 'released times', times(4, released_timesteps)
    yield 'memory', memory_diagram({'all': BYTES, 'encode': {'text encoder': 4.9e9}, 'denoise': {k: v for k, v in BYTES.items() if k != 'text encoder'}})


def test_nothing_overflows_or_overlaps(base):
    assert not {title: found for title, canvas in every_diagram(base) if (found := faults(canvas))}


def test_every_diagram_is_svg_without_outside_links_and_always_the_same(base):
    for (title, one), (_, two) in zip(every_diagram(base), every_diagram(base)):
        text = one._repr_svg_()
        xml.dom.minidom.parseString(text)
        assert text == two._repr_svg_() and '<text' not in text and not re.findall(r'(?:href|url)="https?:', text), title
        assert not re.search(r'figure[^>]*fill: #ffffff', text)


def test_text_stands_out_in_boxes_and_on_both_kinds_of_paper(base):
    assert min(contrast(INK, fill) for fill, *_ in KINDS.values()) > 7
    assert min(contrast(GREY, paper) for paper in ('white', '#111111')) > 4
    colours = {(artist.get_color(), box is not None) for _, canvas in every_diagram(base) for artist, box in canvas.texts}
    assert colours == {(INK, True), (GREY, False)}
    assert {artist.get_family()[0] for _, canvas in every_diagram(base) for artist, _ in canvas.texts} == {'DejaVu Sans'}


@pytest.mark.parametrize('more', [{}, {'sample_size': 128}, {'guidance_embed_dim': 32}], ids=['plain', 'sized', 'told ω'])
def test_labels_are_the_shapes_of_the_modules(more):
    net, seen = network(**more), {}
    labels = transformer_diagram(net, tokens=9).shapes | block_diagram(net, tokens=9).shapes
    for name, module in net.named_modules(): module.register_forward_hook(lambda module, given, out, name=name: seen.setdefault(name, out))
    side, told = net.config.sample_size, {}
    if 'sample_size' in more: told = {'resolution': torch.ones(2, 2), 'aspect_ratio': torch.ones(2, 1)}
    if 'guidance_embed_dim' in more: told = {'omega': torch.ones(2)}
    seen |= {'latents': torch.zeros(2, 4, side, side), 'caption': torch.zeros(2, 9, 24)}
    with torch.no_grad(): net(seen['latents'], torch.zeros(2), seen['caption'], **told)
    assert len(labels) == 9
    assert all(label.split(' × ')[0] == 'B' and (2, *map(int, label.split(' × ')[1:])) == tuple(seen[name].shape) for name, label in labels.items())


def test_tracing_leaves_no_hook_and_takes_no_memory():
    with torch.device('meta'): paper = PixArtTransformer(TransformerConfig())
    assert traced_shapes(paper)['transformer_blocks.27.ff.net.0'] == (1, 4096, 4608)
    assert not any(module._forward_hooks for module in paper.modules())


def names(canvas): return [artist.get_text() for artist, box in canvas.texts if box]


def test_the_block_says_heads_and_width_of_the_config():
    assert names(block_diagram(network())).count('3 heads of 16') == 2 and '48 → 192 → 48' in names(block_diagram(network()))


def kinds_of(canvas):
    "Name in a box → kind, by the colour of the patch behind it."
    from matplotlib.colors import to_rgb
    fills = {tuple(round(v, 4) for v in to_rgb(fill)): kind for kind, (fill, *_) in KINDS.items()}
    found = {}
    for artist, box in canvas.texts:
        if box is None: continue
        for patch in canvas.axes.patches:
            if patch.get_window_extent().width and hasattr(patch, 'get_boxstyle') and abs(patch.get_x() - box.left[0]) < 1e-9 and abs(patch.get_y() - box.bottom[1]) < 1e-9:
                found[artist.get_text()] = fills.get(tuple(round(v, 4) for v in patch.get_facecolor()[:3]))
    return found


def test_a_network_with_gradients_is_drawn_as_trained():
    student, frozen = network(), network().requires_grad_(False)
    found = kinds_of(distillation_diagram(student, frozen, frozen))
    assert (found[r'student $f_\theta$'], found[r'target $f_{\theta^-}$'], found['teacher']) == ('trained', 'average', 'frozen')
    assert kinds_of(distillation_diagram(student, student, frozen))[r'target $f_{\theta^-}$'] == 'trained'


def landings(canvas, x):
    "Rows of the base whose input receives a skip: how many boxes of frozen blocks lie above each sum on the line at x."
    from matplotlib.patches import Circle
    blocks = sorted((box.y for artist, box in canvas.texts if box and artist.get_text().startswith('block') and abs(box.x - x) < .01), reverse=True)
    return sorted(sum(y > circle.center[1] for y in blocks) for circle in canvas.axes.patches if isinstance(circle, Circle) and abs(circle.center[0] - x) < .01)


@pytest.mark.parametrize('name', ['report', 'released', 'UNet'])
def test_skips_land_where_the_network_adds_them(base, name):
    net = controlled(base)[name]
    canvas = control_diagram({name: net})
    assert landings(canvas, .6 + (canvas.width - (3.6 if name == 'UNet' else 2.7))/2) == sorted(net.feeds(i) for i in range(net.num_copies))
    assert names(canvas).count('zero') == net.num_copies + 1 == 1 + sum('after_proj.weight' in n for n, _ in net.named_parameters())


def test_copies_stand_beside_the_block_that_the_condition_enters_with(base):
    for name, row in (('report', 0), ('released', 1)):
        placed = {artist.get_text(): box.y for artist, box in control_diagram({name: controlled(base)[name]}).texts if box}
        assert placed['copy 0'] == placed[f'block {row}']


def test_bases_of_different_depth_are_refused(base):
    with pytest.raises(ValueError, match='need one depth'): control_diagram({'a': ControlNetTransformer(base, 3), 'b': ControlNetTransformer(network(), 1)})


@pytest.mark.parametrize('steps, table', [(1, lcm_timesteps), (4, lcm_timesteps), (4, released_timesteps), (8, lcm_timesteps)])
def test_evaluations_stand_at_the_samplers_times(steps, table):
    canvas, expected = times(steps, table), table(steps).tolist()
    boxes = [(artist.get_text(), box.x) for artist, box in canvas.texts if box]
    assert [int(text) for text, _ in boxes] == expected
    xs, last = [x for _, x in boxes], 1.3 + 5.3
    assert xs == pytest.approx([last - 5.3*t/999 for t in expected])
    shares = [artist.get_text() for artist, box in canvas.texts if not box and re.fullmatch(r'0\.\d{3}', artist.get_text())]
    assert shares == [f'{ALPHA_BAR[t].sqrt():.3f}' for t in expected]


def test_heights_in_memory_are_in_proportion_to_bytes():
    canvas = memory_diagram({'all': BYTES, 'less': {'transformer': 1.2e9}})
    heights = [box.height for box in canvas.boxes]
    assert [h/heights[0] for h in heights] == pytest.approx([v/5.9e9 for v in (*BYTES.values(), 1.2e9)])
    assert f'{sum(BYTES.values())/1e9:.1f} GB' in [artist.get_text() for artist, _ in canvas.texts]
    with pytest.raises(ValueError, match='no parts of the pipeline'): memory_diagram({'now': {'tokenizer': 1}})


# the vocabulary -------------------------------------------------------------------------------------------------
def test_faults_are_found_one_by_one():
    def drawn(act):
        canvas = Canvas(3, 2, 'a trial')
        act(canvas)
        return faults(canvas)
    assert drawn(lambda c: c.box(1, 1, 'fits', detail='as does this', height=.5)) == []
    assert ['leaves its box' in f for f in drawn(lambda c: c.box(1, 1, 'does not fit', width=.3))] == [True]
    assert 'leaves the canvas' in drawn(lambda c: c.note(2.9, 1, 'over the edge'))[0]
    assert 'lies over' in drawn(lambda c: (c.note(1, 1, 'one'), c.note(1.05, 1, 'other')))[0]
    assert 'lies over a box' in drawn(lambda c: (c.box(1, 1, '', width=.2), c.note(1, 1, 'a note')))[0]
    assert "through 'a note'" in drawn(lambda c: (c.note(1, 1, 'a note'), c.arrow((0, 1), (2, 1))))[0]
    assert 'through the box' in drawn(lambda c: (c.box(1, 1, ''), c.arrow((1, 0), (1, 2))))[0]
    assert drawn(lambda c: c.arrow(c.box(.5, 1, '', width=.5).right, c.box(2, 1, '', width=.5).left)) == []


def test_extents_grow_with_the_text():
    canvas = Canvas(3, 1, 'a trial')
    canvas.note(1, .5, 'il'); canvas.note(2, .5, 'WWWW')
    (_, _, a), (_, _, b) = text_extents(canvas)
    assert b[2] - b[0] > 3*(a[2] - a[0])


def test_small_parts_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match='between 0 and 1'): tint('#FF0000', 1.5)
    with pytest.raises(ValueError, match='needs two'): rounded([(0, 0)])
    assert contrast('white', 'black') == pytest.approx(21) and tint('#000000', .5) == (.5, .5, .5)

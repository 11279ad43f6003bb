"Live figures and the sketch pad: one function draws what moves and what is printed, and a stroke goes through to the picture."
import io, json, re
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from pixart_delta_nb.schedules import log_snr
from pixart_delta_nb.solvers import mixture_eps, pf_ode_map
from pixart_delta_nb.workshop import live, sketch, studio

NBS = Path(__file__).parent.parent/'nbs/workshop'
PIECES = {'schedule': (live.draw_schedule, {}), 'map': (live.draw_map, {'start': -.2, 't': 300}), 'solver': (live.draw_solver, {'k': 50})}


@pytest.fixture(scope='module')
def opened(): return studio.open_studio()


def sheet(url):
    "Pixels of a drawing (128, 128), 0 to 255."
    return np.asarray(Image.open(io.BytesIO(studio.png_of(url))).convert('L')).astype(int)


def pictures_in(page):
    "Pixels of the picture on an HTML page."
    return np.asarray(Image.open(io.BytesIO(studio.png_of(re.search(r'src="([^"]+)"', page)[1]))).convert('RGB')).astype(int)


# pieces ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', PIECES)
def test_a_piece_draws_the_same_live_and_still_and_says_what_it_drew(name, capsys):
    draw, choices = PIECES[name]
    page = live.drawn(draw, (4, 2), choices)
    figure = live.still(draw, (4, 2), choices, choices)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and f'alt="{first}"'.replace("'", '&#x27;') in page and len(figure.subfigs) == 2
    lines = [[line.get_ydata() for axis in part.axes for line in axis.lines] for part in figure.subfigs]
    assert len(lines[0]) > 2 and all(np.array_equal(a, b) for a, b in zip(*lines))


def test_the_exact_point_agrees_with_the_differential_equation():
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)
    followed = pf_ode_map(lambda x, ab: mixture_eps(x, ab, live.LINE), x[:, None], live.PIXART[700], live.PIXART[200])[:, 0]
    torch.testing.assert_close(live.carry(x, live.PIXART[700], live.PIXART[200]), followed, rtol=0, atol=1e-7)
    said = live.draw_map(Figure(), .8, 500)
    end = live.carry(torch.tensor(.8, dtype=torch.float64), live.PIXART[-1]).item()
    assert f'to {end:+.2f}, the end' in said


@pytest.mark.parametrize('end, word', [(.012, 'more'), (.02, 'as much'), (.03, 'less')])
def test_the_sentence_on_the_schedule_follows_the_numbers(end, word):
    said = live.draw_schedule(Figure(), 'linear', 1e-4, end)
    assert f', {word} signal' in said and f'{log_snr(live.alpha_bar_from_betas(live.linear_betas(1000, 1e-4, end))[-1]).item():.2f}' in said


def test_solvers_err_as_their_order_says():
    ratio = {name: live.solver_error(name, 10)/live.solver_error(name, 5) for name in live.SOLVERS}
    assert 1.8 < ratio['DDIM'] < 2.2 and ratio['DPM-Solver++ 2M'] > 3


def test_a_control_redraws_and_a_refused_choice_becomes_a_sentence():
    ipywidgets = pytest.importorskip('ipywidgets')
    end = live.slider('last β', .00001, .03, .02, .001)
    box = live.live(live.draw_schedule, (3, 2), kind=live.choice('kind', ['linear', 'scaled linear']), end=end)
    page = box.children[-1]
    before = page.value
    end.value = .012
    assert before != page.value and 'role="alert"' not in page.value
    end.value = .00001                                                   # ends below its start
    assert 'role="alert"' in page.value and '<img' not in page.value
    assert isinstance(end, ipywidgets.FloatSlider) and not end.continuous_update and end.description == 'last β'


# the student ----------------------------------------------------------------------------------------------------
def test_the_student_changes_with_steps_caption_and_seed_and_is_quick(opened):
    import time
    draw, works = partial(live.draw_student, opened), []
    base = {'caption': 'a red cube on sand', 'steps': 4, 'seed': 1}
    pages = [live.drawn(draw, (5, 1.5), base | change) for change in ({}, {}, {'steps': 2}, {'seed': 2}, {'caption': 'a blue cone on snow'})]
    assert pages[0] == pages[1] and len(set(pages)) == 4
    for seed in range(3):
        start = time.process_time()
        live.drawn(draw, (5, 1.5), base | {'seed': seed})
        works.append(time.process_time() - start)
    assert min(works) < .5


def test_estimates_end_with_the_picture(opened):
    images, times = studio.estimates(opened, 'a red cube on sand', 3, 5)
    torch.testing.assert_close(images[-1:], studio.picture(opened, 'a red cube on sand', 3, 5), rtol=0, atol=1e-5)
    assert len(images) == 3 and times == sorted(times, reverse=True)


# the sketch pad -------------------------------------------------------------------------------------------------
def test_a_drawing_comes_back_as_the_condition_pixel_by_pixel():
    url = sketch.ink([(20, 20), (90, 90)], sketch.ring(64, 64, 30))
    condition = studio.condition_of(url)
    assert condition.shape == (1, 3, 128, 128)
    assert np.array_equal(((condition[0, 0] + 1)*127.5).round().int().numpy(), sheet(url)) and sheet(url).max() == 255


@pytest.mark.parametrize('wrong', ['a house', 7, 'data:image/png;base64,%%%', studio.PREFIX + 'AAAA'])
def test_what_is_no_drawing_is_refused_in_one_sentence(wrong):
    with pytest.raises(ValueError) as refused: studio.condition_of(wrong)
    assert '\n' not in str(refused.value) and ':' in str(refused.value)


def test_a_stroke_on_the_pad_changes_the_picture_and_clearing_brings_it_back(opened):
    pytest.importorskip('anywidget')
    box = sketch.live_sketch(opened, drawing='')
    pad, page = box.children[0], box.children[1].children[-1]
    empty = pictures_in(page.value)
    left, right = (empty[:, :empty.shape[1]//2], empty[:, empty.shape[1]//2:])
    pad.set_state({'value': sketch.EXAMPLE})                             # as a message of the browser does
    drawn = pictures_in(page.value)
    half = drawn.shape[1]//2
    assert np.abs(drawn[:, :half] - left).mean() > 2 and np.array_equal(drawn[:, half:], right)
    pad.set_state({'value': ''})
    assert np.array_equal(pictures_in(page.value), empty)


def test_the_drawing_is_followed_more_than_chance_would(opened):
    caption = 'a large blue sphere and a large red box, on grass at noon'
    plain, steered = (studio.picture(opened, caption, seed=0, drawing=d) for d in (None, sketch.EXAMPLE))
    assert sketch.found_again(sketch.EXAMPLE, steered) > sketch.found_again(sketch.EXAMPLE, plain) + .1
    still = studio.picture(opened, caption, seed=0, drawing=sketch.EXAMPLE, strength=0.)
    torch.testing.assert_close(still, plain, rtol=0, atol=1e-4)


def test_the_pad_reaches_nothing_outside_and_names_its_parts():
    everything = sketch.SKELETON + sketch.STYLE + sketch.WIDGET
    assert not re.search(r'https?:|//|@import|url\(|fetch\(|import\s', everything)
    for part in ('sketch-canvas', 'sketch-undo', 'sketch-rubber', 'sketch-clear', 'sketch-help', 'sketch-status'):
        assert f'id="{part}"' in sketch.SKELETON
    assert 'aria-label="Sketch pad"' in sketch.SKELETON and 'role="status"' in sketch.SKELETON
    for key in ('ArrowLeft', 'Backspace', 'Delete', "' '"): assert key in sketch.SCRIPT


def test_a_missing_anywidget_is_said_in_one_sentence(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'anywidget', None)
    sketch.pad_class.cache_clear()
    with pytest.raises(ValueError, match='anywidget is not installed.*pip install'): sketch.sketch_pad()
    sketch.pad_class.cache_clear()


# stills ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['live', 'sketch'])
def test_every_live_figure_is_followed_by_its_still(name):
    cells = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    shown = [i for i, c in enumerate(code) if 'show_live(live' in ''.join(c['source'])]
    assert len(shown) == {'live': 4, 'sketch': 1}[name]
    for i, until in zip(shown, [*shown[1:], len(code)]):
        kinds = {kind for c in code[i + 1:until] for o in c['outputs'] for kind in o.get('data', {})}
        assert kinds & {'image/png', 'image/jpeg', 'image/svg+xml'}, f'live figure {i} has no still'
        assert any('show_live' not in ''.join(c['source']) and 'still(' in ''.join(c['source']) for c in code[i + 1:until])

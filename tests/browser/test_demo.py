"""The demo page of a class without Jupyter: `pixart-delta demo` in Chromium."""
import importlib.util
import pytest
from conftest import WIDTHS, draw_line, faults, too_wide, until


@pytest.fixture(scope='module')
def demo(browser):
    "The address of the page, served by this process."
    if importlib.util.find_spec('gradio') is None: pytest.skip("Gradio is missing: pip install -c constraints.txt -e '.[demo]'")
    from pixart_delta_nb.workshop.demo import demo_page, open_page
    from pixart_delta_nb.workshop.studio import open_studio
    page = demo_page(open_studio())
    yield open_page(page).rstrip('/')
    page.close()


def shown(watched):
    "The picture that follows the choices, once it is there."
    picture = watched.page.locator('#pictures img')
    picture.wait_for(timeout=120_000)
    return picture.get_attribute('src')


@pytest.mark.parametrize('width', WIDTHS)
def test_the_page_draws_without_complaint_and_fits(demo, opened, width):
    watched = opened(demo, width=width)
    assert shown(watched).startswith('data:image/png')
    assert (watched.complaints, watched.outside, too_wide(watched.page)) == ([], [], False)


def test_a_stroke_changes_the_picture(demo, opened):
    watched = opened(demo)
    before = shown(watched)
    draw_line(watched.page, watched.page.locator('#sketch-canvas'))
    until(lambda: shown(watched) != before, 120)
    assert 'Lines drawn: 1' in watched.page.locator('#sketch-status').inner_text()


def test_axe_finds_no_serious_fault_in_what_we_put_on_the_page(demo, opened):
    watched = opened(demo, width=390)
    shown(watched)
    assert faults(watched.page) == []

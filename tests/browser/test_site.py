"""The site as it is deployed: built without a warning, every link leads somewhere, and Chromium finds nothing to complain of."""
import re
from urllib.parse import unquote
import pytest
from conftest import ROOT, WIDTHS, faults, served, too_wide

PAGES = ['index', 'notation', '02_solvers', 'workshop/01_schedules', 'api/solvers', 'tests/test_consistency', 'search']
LINK = re.compile(r'<[a-z][^<>]*?\s(href|src)="([^"<>]*)"')
NAME = re.compile(r'<[a-z][^<>]*?\s(?:id|name)="([^"<>]*)"')


@pytest.fixture(scope='module')
def pages(site): return {path: path.read_text(encoding='utf-8') for path in site[0].rglob('*.html') if '_static' not in path.parts}


@pytest.fixture(scope='module')
def address(site):
    with served(site[0]) as address: yield address


def test_sphinx_has_no_warning(site): assert [line for line in site[1].splitlines() if 'WARNING' in line] == []


def test_every_notebook_module_and_file_of_tests_has_its_page(site):
    for folder, ending, to in (('nbs', 'ipynb', ''), ('tests', 'py', 'tests/')):
        files = [p.relative_to(ROOT/folder) for p in (ROOT/folder).rglob(f'*.{ending}') if folder == 'nbs' or p.name.startswith('test_')]
        assert [f for f in files if '.ipynb_checkpoints' not in f.parts and not (site[0]/to/f).with_suffix('.html').is_file()] == []


def test_every_link_leads_to_a_page_and_to_a_place_on_it(pages):
    places, broken = {path: set(NAME.findall(text)) for path, text in pages.items()}, []
    for path, text in pages.items():
        for _, link in LINK.findall(text):
            if re.match(r'https?:|mailto:|data:', link): continue
            file, _, place = link.partition('#')
            goal = (path.parent/unquote(file.partition('?')[0])).resolve() if file else path
            if not goal.exists() or (place and goal in places and unquote(place) not in places[goal]): broken.append((path.name, link))
    assert broken == []


def test_no_page_loads_anything_from_elsewhere(pages):
    loads = re.compile(r'<(?:script|img|iframe|source|video|link)\b[^<>]*?\s(?:src|href)="(https?:[^"]*)"')
    assert {link for text in pages.values() for link in loads.findall(text)} == set()


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('path', PAGES)
def test_a_page_opens_without_complaint_and_fits(opened, address, path, width):
    watched = opened(address, f'{path}.html', width)
    watched.page.wait_for_timeout(200)
    assert (watched.complaints, watched.outside, too_wide(watched.page)) == ([], [], False)


@pytest.mark.parametrize('path, width, scheme', [('index', 1440, 'light'), ('03_consistency', 390, 'dark'), ('api/schedules', 1440, 'dark'),
                                                 ('workshop/01_schedules', 390, 'light'), ('api/index', 390, 'light')])
def test_axe_finds_no_serious_fault(opened, address, path, width, scheme):
    watched = opened(address, f'{path}.html', width, scheme)
    watched.page.wait_for_function('!window.MathJax?.startup?.promise || MathJax.startup.promise.then(() => true)')
    assert faults(watched.page) == []


def test_equations_are_drawn(opened, address):
    page = opened(address, '02_solvers.html').page
    page.wait_for_selector('mjx-container svg')
    assert page.locator('mjx-container').count() > 50 and page.locator('mjx-merror').count() == 0


def test_light_and_dark_differ_and_can_be_chosen(opened, address):
    page = opened(address, '01_schedules.html', scheme='dark').page
    ground = lambda: page.evaluate('getComputedStyle(document.body).backgroundColor')
    dark = ground()
    page.locator('.theme-switch-button').first.click() # opens the choice between system, light and dark
    page.locator('.theme-change-button[data-mode=light]').first.click()
    page.wait_for_function(f'getComputedStyle(document.body).backgroundColor !== "{dark}"')
    assert dark != ground()


def test_the_search_finds_a_chapter_and_a_name(opened, address):
    page = opened(address, 'search.html?q=ddim_step').page
    page.wait_for_function("document.querySelector('.search-summary')?.textContent.includes('found')")
    page.wait_for_function("document.querySelectorAll('ul.search li a').length >= parseInt(document.querySelector('.search-summary').textContent.match(/\\d+/)[0])")
    found = page.locator('ul.search li a').all_inner_texts()
    assert any('ddim_step' in text for text in found) and 'Solvers' in found

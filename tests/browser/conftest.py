"What the browser tests share: Debian's Chromium, a server for a folder, and what a page must not do."
import functools, importlib.util, shutil, subprocess, sys, threading, time
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = shutil.which('chromium')
AXE = Path(__file__).parent/'node_modules/axe-core/axe.min.js'
ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run']
WIDTHS = 390, 1440 # a phone and a desk


@pytest.fixture(scope='session')
def browser():
    if CHROMIUM is None: pytest.skip('Chromium is missing: apt-get install chromium')
    if importlib.util.find_spec('playwright') is None: pytest.skip("Playwright is missing: pip install -c constraints.txt -e '.[dev]'")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@contextmanager
def served(folder):
    "The address of a folder, as long as the block lasts."
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown()


@pytest.fixture(scope='session')
def site():
    "The folder of the site, built by the one command; what has not changed since the last build is kept."
    if importlib.util.find_spec('myst_nb') is None: pytest.skip("Sphinx is missing: pip install -c constraints.txt -e '.[dev]'")
    done = subprocess.run([sys.executable, ROOT/'docs/make.py'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return ROOT/'_docs', done.stderr


class Watched:
    """A page of the browser, with what it asked for and what it complained of."""
    def __init__(self, context, address):
        self.page, self.complaints, self.outside = context.new_page(), [], []
        local = address, 'data:', 'blob:', 'ws' + address.removeprefix('http')
        self.page.on('console', lambda m: m.type == 'error' and self.complaints.append(m.text[:300]))
        self.page.on('pageerror', lambda e: self.complaints.append(str(e)[:300]))
        self.page.on('response', lambda r: r.status >= 400 and self.complaints.append(f'{r.status} {r.url}'))
        self.page.on('request', lambda r: r.url.startswith(local) or self.outside.append(r.url))



@pytest.fixture
def opened(browser):
    "open(address, path, width, scheme) -> a watched page that has come to rest."
    contexts = []
    def open_page(address, path='', width=1440, scheme='light'):
        context = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(120_000) # machines that test are busy
        watched = Watched(context, address)
        watched.page.goto(f'{address}/{path}', wait_until='load')
        return watched
    yield open_page
    for context in contexts: context.close()


def until(true, seconds):
    "Waits until something is true, and fails where it does not become so."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f'waited for {seconds} s'
        time.sleep(.2)


def draw_line(page, canvas):
    "One stroke with the mouse, from left to right."
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()
    at = lambda x, y: (place['x'] + place['width']*x, place['y'] + place['height']*y)
    page.mouse.move(*at(.1, .35))
    page.mouse.down()
    page.mouse.move(*at(.9, .35), steps=8)
    page.mouse.up()


def too_wide(page):
    "Whether the page scrolls sideways."
    return page.evaluate('document.documentElement.scrollWidth > window.innerWidth + 1')


def faults(page):
    "What axe-core calls serious or critical, as 'rule: first element'."
    if not AXE.is_file(): pytest.skip('axe-core is missing: npm install --prefix tests/browser')
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'], resultTypes: ['violations']})")
    return [f"{v['id']} ({len(v['nodes'])}): {v['nodes'][0]['html'][:200]}" for v in found['violations'] if v['impact'] in ('serious', 'critical')]

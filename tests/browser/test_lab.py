"""The course as a student meets it: JupyterLab in Chromium runs notebooks to the end, and live figures answer the hand."""
import shutil, socket, subprocess, urllib.request
import pytest
from conftest import ROOT, draw_line, until

pytest.importorskip('jupyterlab', reason="JupyterLab is missing: pip install -c constraints.txt -e '.[dev]'")
NOTEBOOK = 'jupyterapp.shell.currentWidget'
STATE = f'''() => {{
  const panel = {NOTEBOOK}, cells = [...panel.content.model.cells].filter(c => c.type === 'code' && c.sharedModel.source.trim());
  const failed = cells.flatMap(c => c.outputs.toJSON()).filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue);
  return {{cells: cells.length, run: cells.filter(c => c.executionCount > 0).length, failed, kernel: panel.sessionContext.session?.kernel?.status}};
}}'''


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def lab(browser, tmp_path_factory):
    "JupyterLab on a copy of the course, opened as `pixart-delta lab` opens it; its address."
    from pixart_delta_nb.workshop.course import lab_command
    folder = tmp_path_factory.mktemp('course')
    for name in ('nbs', 'results'): shutil.copytree(ROOT/name, folder/name)
    port = free_port()
    command = [*lab_command(folder, port, browser=False), '--expose-app-in-browser', '--IdentityProvider.token=']
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    address = f'http://127.0.0.1:{port}'
    until(lambda: answers(f'{address}/api'), 60)
    yield address
    server.terminate()
    server.wait(20)


def answers(address):
    try: return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError: return False


def run_all(watched):
    "Runs the notebook from its fresh kernel and gives the final state of its cells."
    page = watched.page
    page.wait_for_function(f"window.jupyterapp && {NOTEBOOK}?.sessionContext?.session?.kernel?.status === 'idle'", timeout=120_000)
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    state = {}
    def done():
        state.update(page.evaluate(STATE))
        return state['failed'] or (state['run'] == state['cells'] and state['kernel'] == 'idle')
    until(done, 480)
    return state


@pytest.fixture
def notebook(lab, opened): return lambda path: opened(lab, f'lab/tree/{path}?reset')


def first_figure(page):
    "Scrolls to the first live figure; JupyterLab draws no cell that is far from what is seen."
    for i in range(page.evaluate(f'{NOTEBOOK}.content.widgets.length')):
        page.evaluate(f"{NOTEBOOK}.content.scrollToItem({i}, 'center')")
        if page.locator('.live-piece figure.live-figure').count(): break
    found = page.locator('.live-piece figure.live-figure').first
    found.locator('img').first.wait_for()
    return found


def picture(figure): return figure.locator('img').first.get_attribute('src')


def changed(figure, before): until(lambda: picture(figure) not in (None, before), 120)


def test_the_index_runs_to_the_end(notebook):
    watched = notebook('nbs/index.ipynb')
    state = run_all(watched)
    assert state['failed'] == [] and state['run'] == state['cells'] > 5 and watched.outside == []


def test_the_live_figures_run_and_follow_a_slider(notebook):
    watched = notebook('nbs/workshop/live.ipynb')
    state = run_all(watched)
    assert state['failed'] == [] and state['run'] == state['cells'] and watched.outside == []
    figure = first_figure(watched.page)
    before, knob = picture(figure), watched.page.locator('.widget-slider .noUi-handle').first
    knob.focus()
    for _ in range(3): watched.page.keyboard.press('ArrowRight')
    changed(figure, before)


def test_a_stroke_on_the_sketch_pad_changes_the_picture(notebook):
    watched = notebook('nbs/workshop/sketch.ipynb')
    state = run_all(watched)
    assert state['failed'] == [] and watched.outside == []
    figure = first_figure(watched.page)
    before = picture(figure)
    draw_line(watched.page, watched.page.locator('.sketch-canvas').last)
    changed(figure, before)

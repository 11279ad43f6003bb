"""The course as a student meets it: JupyterLab in Chromium runs notebooks to the end, and live figures answer the hand."""
import shutil, socket, subprocess, sys, time, urllib.request
import pytest
from conftest import ROOT

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


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f'waited for {seconds} s'
        time.sleep(.2)


def run_all(watched):
    "Runs the notebook from its fresh kernel and gives the final state of its cells."
    page = watched.page
    page.wait_for_function(f"window.jupyterapp && {NOTEBOOK}?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000)
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    state = {}
    def done():
        state.update(page.evaluate(STATE))
        return state['failed'] or (state['run'] == state['cells'] and state['kernel'] == 'idle')
    until(done, 240)
    return state


@pytest.fixture
def notebook(lab, opened): return lambda path: opened(lab, f'lab/tree/{path}?reset')


def picture(figure): return figure.locator('img').first.get_attribute('src')


def changed(figure, before): until(lambda: picture(figure) not in (None, before), 30)


def test_the_index_runs_to_the_end(notebook):
    watched = notebook('nbs/index.ipynb')
    state = run_all(watched)
    assert state['failed'] == [] and state['run'] == state['cells'] > 5 and watched.outside == []


def test_the_live_figures_run_and_follow_a_slider(notebook):
    watched = notebook('nbs/workshop/live.ipynb')
    state = run_all(watched)
    assert state['failed'] == [] and state['run'] == state['cells'] and watched.outside == []
    page = watched.page
    page.evaluate(f"{NOTEBOOK}.content.scrollToItem(14, 'center')")
    box = page.locator('.widget-vbox:has(.live-figure)').first
    figure, knob = box.locator('.live-figure'), box.locator('.widget-slider [role=slider]').first
    before = picture(figure)
    knob.focus()
    for _ in range(3): page.keyboard.press('ArrowRight')
    changed(figure, before)


def test_a_stroke_on_the_sketch_pad_changes_the_picture(notebook):
    watched = notebook('nbs/workshop/sketch.ipynb')
    assert run_all(watched)['failed'] == [] and watched.outside == []
    page = watched.page
    page.evaluate(f"{NOTEBOOK}.content.scrollToItem({NOTEBOOK}.content.widgets.length - 2, 'center')")
    canvas = page.locator('.sketch-canvas').last
    canvas.scroll_into_view_if_needed()
    figure = page.locator('.widget-vbox:has(.live-figure)').last.locator('.live-figure')
    before, place = picture(figure), canvas.bounding_box()
    at = lambda x, y: (place['x'] + place['width']*x, place['y'] + place['height']*y)
    page.mouse.move(*at(.1, .35))
    page.mouse.down()
    page.mouse.move(*at(.9, .35), steps=8)
    page.mouse.up()
    changed(figure, before)

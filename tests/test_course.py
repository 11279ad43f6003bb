"What a class needs around the notebooks: JupyterLab on copies that keep answers, a page without Jupyter, and a doctor who says what to do."
import json, os, re, shutil, signal, subprocess, sys, time, urllib.request
from importlib import metadata
from pathlib import Path
import pytest
from pixart_delta_nb import cli
from pixart_delta_nb.workshop import course, demo, doctor


def failed(capsys, *words):
    "Exit status of a command that fails, what it printed and what it said."
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped: cli.main([str(word) for word in words])
    out = capsys.readouterr()
    assert 'Traceback' not in out.err
    return stopped.value.code, out.out, out.err


@pytest.fixture
def source(tmp_path):
    "A small course."
    for name in ('nbs/index.ipynb', 'nbs/world/words.ipynb', 'exercises/01.ipynb'):
        (tmp_path/'course'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'course'/name).write_text(name)
    return tmp_path/'course'


# lab ------------------------------------------------------------------------------------------------------------
def test_a_second_start_adds_what_is_new_and_keeps_what_was_written(source, tmp_path, capsys):
    mine = tmp_path/'mine'
    assert course.ready_folder(mine, source) == mine and '3 notebooks copied' in capsys.readouterr().out
    (mine/'exercises/01.ipynb').write_text('my answer')
    (source/'nbs/new.ipynb').write_text('new')
    course.ready_folder(mine, source)
    assert '1 notebooks copied, 2 were there, 1 differ' in capsys.readouterr().out
    assert (mine/'exercises/01.ipynb').read_text() == 'my answer' and (mine/'nbs/new.ipynb').read_text() == 'new'


def test_an_installed_package_is_copied_and_a_checkout_is_opened(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course, 'places', lambda: (tmp_path/'repository', source))
    assert course.ready_folder(None, source) == Path('pixart-delta-course') and (tmp_path/'pixart-delta-course/nbs/index.ipynb').is_file()
    checkout = source.rename(tmp_path/'repository')
    assert course.ready_folder(None, checkout) == checkout
    with pytest.raises(ValueError, match='installed without them'): course.course_home((tmp_path/'nowhere',))


def test_the_checkout_has_a_course():
    home = course.course_home()
    files = course.course_files(home)
    assert len(files) > 80 and all((home/p).is_file() for p in files)


def test_lab_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(course, 'find_spec', lambda name: None)
    code, _, said = failed(capsys, 'lab', '--folder', tmp_path)
    assert code == 1 and 'jupyterlab is not installed' in said and 'pip install' in said and not list(tmp_path.iterdir())


def test_lab_serves_the_course_and_ends_at_sigterm(source, tmp_path):
    pytest.importorskip('jupyterlab')
    words = [sys.executable, '-c', 'import sys; from pixart_delta_nb.cli import main; main(sys.argv[1:])', 'lab', '--no-browser', '--port', '18931',
             '--folder', str(tmp_path/'mine')]
    with open(tmp_path/'log', 'w') as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {'JUPYTER_TOKEN': 'secret'})
        try:
            for _ in range(720):
                time.sleep(.25)
                found = re.search(r'http://127\.0\.0\.1:(\d+)/lab', (tmp_path/'log').read_text())
                if found or process.poll() is not None: break
            assert found, (tmp_path/'log').read_text()[-2000:]
            address = f'http://127.0.0.1:{found[1]}/api/contents/nbs/index.ipynb?content=0&token=secret'
            with urllib.request.urlopen(address, timeout=60) as answer: assert json.load(answer)['name'] == 'index.ipynb'
            page = f'http://127.0.0.1:{found[1]}/lab?token=secret'
            with urllib.request.urlopen(page, timeout=60) as answer: assert 'apputils-extension:announcements' in answer.read().decode()
        finally: process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert (tmp_path/'mine/nbs/index.ipynb').is_file()


# doctor ---------------------------------------------------------------------------------------------------------
def test_the_manifest_describes_the_shipped_weights():
    finding = doctor.check_weights()
    assert finding.state == 'fine', f'{finding.said}: write it anew with pixart_delta_nb.workshop.doctor.write_manifest()'


def test_damaged_and_missing_weights_are_named(tmp_path):
    small = tmp_path/'weights'
    for name in ('student/a.safetensors', 'teacher/b.json'):
        (small/name).parent.mkdir(parents=True)
        (small/name).write_text(name)
    assert 'does not exist' in doctor.check_weights(small).said
    doctor.write_manifest(small)
    assert doctor.check_weights(small).state == 'fine'
    (small/'student/a.safetensors').write_text('student/A.safetensors')         # of the same size
    assert doctor.check_weights(small).said == '1 changed, the first student/a.safetensors' and doctor.check_weights(small).cure
    shutil.rmtree(small/'teacher')
    assert '1 missing, the first teacher/b.json' in doctor.check_weights(small).said


def test_old_and_missing_libraries_are_told_apart():
    def version_of(name):
        if name == 'gone': raise metadata.PackageNotFoundError(name)
        return '1.5'
    lines = ['here', 'old>=2', 'gone', 'page>=6; extra == "demo"', 'other; python_version < "3"']
    assert doctor.unmet('', lines, version_of) == ['old is 1.5, not >=2', 'gone is missing']
    assert doctor.unmet('demo', lines, version_of) == ['page is 1.5, not >=6']
    assert doctor.check_python((3, 10, 1), '>=3.11').state == 'wrong' and doctor.check_python((3, 13, 0), '>=3.11').state == 'fine'


def test_memory_device_and_folder_say_what_to_do(tmp_path):
    for finding in (doctor.check_memory(.1), doctor.check_device('cuda:99'), doctor.check_folder(tmp_path/'nowhere')):
        assert finding.state == 'wrong' and finding.cure and '\n' not in finding.said
    (tmp_path/'memory.max').write_text('3000')
    (tmp_path/'memory.current').write_text('2000')
    (tmp_path/'memory.stat').write_text('anon 10\ninactive_file 500')
    assert doctor._group_memory(tmp_path) == 1500


def test_doctor_exits_with_one_where_something_would_fail(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, 'check_widgets', lambda: doctor.Finding('widgets', 'extra', 'absent', 'install them'))
    cli.main(['doctor', '--quick'])
    out = capsys.readouterr().out
    assert 'Everything that the main job needs works' in out and '→ install them' in out
    assert failed(capsys, 'doctor', '--quick', '--everything')[0] == 1
    monkeypatch.setattr(doctor, 'check_memory', lambda: doctor.Finding('memory', 'wrong', 'too little', 'close something'))
    code, out, said = failed(capsys, 'doctor', '--quick')
    assert code == 1 and '→ close something' in out and '1 of' in said and 'memory' in said
    assert failed(capsys, 'doctor', '--quick', '--device', 'cuda:99')[0] == 1


def test_doctor_draws_a_picture():
    assert doctor.check_picture().state == 'fine' and '4 evaluations' in doctor.check_picture().said


# demo -----------------------------------------------------------------------------------------------------------
def test_demo_says_what_is_missing_or_too_old(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    code, _, said = failed(capsys, 'demo')
    assert code == 1 and 'not installed' in said and 'pip install' in said
    import types
    monkeypatch.setitem(sys.modules, 'gradio', types.SimpleNamespace(__version__='3.18.0'))
    assert 'version 3' in failed(capsys, 'demo')[2]


@pytest.fixture(scope='module')
def opened():
    from pixart_delta_nb.workshop.studio import open_studio
    return open_studio()


def test_the_answer_of_the_page_follows_the_choices_and_refuses_in_words(opened):
    from pixart_delta_nb.workshop.sketch import EXAMPLE
    one = demo.answer(opened, EXAMPLE, 'a red cube on sand', 2, 0, 1.)
    assert one == demo.answer(opened, EXAMPLE, 'a red cube on sand', 2, 0, 1.)
    assert len({one, *(demo.answer(opened, *choices) for choices in (('', 'a red cube on sand', 2, 0, 1.), (EXAMPLE, 'a blue cone', 2, 0, 1.),
                                                                   (EXAMPLE, 'a red cube on sand', 3, 0, 1.), (EXAMPLE, 'a red cube on sand', 2, 1, 1.)))}) == 5
    assert 'role="alert"' in demo.answer(opened, 'nonsense', 'a red cube', 2, 0, 1.) and 'alt="' in demo.answer(opened, None, None, 1, None, 1.)


def test_the_page_is_local_and_fetches_nothing_from_elsewhere(opened):
    gradio = pytest.importorskip('gradio', exc_type=ImportError)
    if int(gradio.__version__.split('.')[0]) < 6: pytest.skip(f'gradio {gradio.__version__} is too old for the page')
    page = demo.demo_page(opened)
    address = demo.open_page(page)
    try:
        with urllib.request.urlopen(address, timeout=20) as answer: html = answer.read().decode()
    finally: page.close(verbose=False)
    assert address.startswith('http://127.0.0.1:') and page.analytics_enabled is False and page.share is False
    fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="([^"]+)"', html)
    assert fetched and not [place for place in fetched if re.match(r'(https?:)?//', place)]
    assert 'fonts.googleapis' not in html and 'cdn' not in html.lower()
    labels = {c['props'].get('label') for c in page.get_config_file()['components']}
    assert {'Caption', 'Steps', 'Seed', 'Strength of the drawing'} <= labels and 'sketchPad' in html

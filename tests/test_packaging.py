"""Installation: what sdist and wheel hold, what is required, and links that lead somewhere."""
import re, subprocess, sys, tarfile, zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
WEIGHTS = [p.relative_to(ROOT) for p in (ROOT/'pixart_delta_nb/weights').rglob('*') if p.is_file()]


def setup_arguments(monkeypatch):
    "What setup.py passes to setuptools."
    import runpy, setuptools
    found = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **arguments: found.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path('setup.py')
    return found


def pins():
    lines = [line.partition('==') for line in (ROOT/'constraints.txt').read_text().split()]
    return {canonicalize_name(name): version for name, _, version in lines}


def needed_by(roots):
    "Names that the installed distributions ask for, on any of the three Pythons."
    found, waiting = set(), [Requirement(r) for r in roots]
    asks = lambda r, extras: r.marker is None or any(r.marker.evaluate({'extra': e, 'python_version': v}) for e in extras for v in ('3.11', '3.12', '3.13'))
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
        if key in found: continue
        found.add(key)
        try: requirements = map(Requirement, distribution(requirement.name).requires or [])
        except PackageNotFoundError: continue
        waiting += [r for r in requirements if asks(r, ('', *key[1]))]
    return {name for name, _ in found}


def test_constraints_pin_only_what_is_required_and_all_that_is_asked_for(monkeypatch):
    arguments = setup_arguments(monkeypatch)
    roots = [*arguments['install_requires'], *arguments['extras_require']['dev'], *arguments['extras_require']['scale']]
    pinned = pins()
    for requirement in map(Requirement, roots): assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert pinned.keys() <= needed_by(roots)


def test_what_only_some_need_is_no_requirement_of_all(monkeypatch):
    arguments = setup_arguments(monkeypatch)
    names = {Requirement(r).name for r in arguments['install_requires']}
    assert not names & {'accelerate', 'bitsandbytes', 'ipywidgets', 'anywidget', 'jupyterlab', 'gradio', 'sphinx', 'playwright', 'peft', 'datasets'}
    extras = arguments['extras_require']
    for name in ('scale', 'lab', 'demo', 'docs'): assert set(extras[name]) <= set(extras['dev'])
    assert arguments['python_requires'] == '>=3.11'


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Names in sdist and wheel, the wheel built from the sdist; empty files stand for the weights."
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('out')
    kept = ['settings.ini', 'constraints.txt', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'CONTRIBUTING.md', 'LICENSE']
    for pattern in ('pixart_delta_nb/**/*.py', 'nbs/00_core.ipynb', 'exercises/01_schedules.ipynb', 'configs/**/*.yaml', 'tests/test_packaging.py'):
        kept += [p.relative_to(ROOT) for p in ROOT.glob(pattern)]
    for path in [*kept, *WEIGHTS]:
        (source/path).parent.mkdir(parents=True, exist_ok=True)
        (source/path).write_bytes(b'' if path in WEIGHTS else (ROOT/path).read_bytes())
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    with tarfile.open(next(out.glob('*.tar.gz'))) as file: sdist = {name.partition('/')[2] for name in file.getnames()}
    with zipfile.ZipFile(next(out.glob('*.whl'))) as file: wheel = {name: file.read(name) for name in file.namelist()}
    return sdist, wheel


def test_the_sdist_holds_what_a_build_and_a_reader_need(built):
    assert {'settings.ini', 'constraints.txt', 'CONTRIBUTING.md', 'LICENSE', 'nbs/00_core.ipynb', 'configs/accelerate/ddp.yaml'} <= built[0]
    assert {str(p) for p in WEIGHTS} <= built[0]


def test_the_wheel_holds_every_room_and_every_weight(built):
    modules = {str(p.relative_to(ROOT)) for p in (ROOT/'pixart_delta_nb').rglob('*.py')}
    assert {'pixart_delta_nb/world/__init__.py', 'pixart_delta_nb/evidence/__init__.py'} <= modules
    assert modules | {str(p) for p in WEIGHTS} <= built[1].keys()
    assert not [name for name in built[1] if not name.startswith('pixart_delta_nb')]


def test_the_wheel_holds_the_course_for_those_without_a_checkout(built):
    course = {f'pixart_delta_nb/course/{name}' for name in ('nbs/00_core.ipynb', 'exercises/01_schedules.ipynb')}
    assert course <= built[1].keys()


def test_the_wheel_says_what_it_needs_and_brings_the_command(built):
    content = {name.rpartition('/')[2]: text.decode() for name, text in built[1].items() if '.dist-info/' in name}
    assert 'Requires-Python: >=3.11' in content['METADATA'] and 'Provides-Extra: scale' in content['METADATA']
    assert 'pixart-delta = pixart_delta_nb.cli:main' in content['entry_points.txt']


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md'])
def test_every_link_leads_to_a_file(name):
    text = (ROOT/name).read_text(encoding='utf-8')
    links = [link for link in re.findall(r'\]\(([^)#\s]+)', text) if '://' not in link]
    assert [link for link in links if not (ROOT/link).exists()] == []


def test_the_commands_of_the_readme_are_those_that_continuous_integration_runs():
    assert "pip install -c constraints.txt -e '.[dev]' && pytest" in (ROOT/'README.md').read_text(encoding='utf-8')
    script = (ROOT/'.ci/run').read_text()
    assert "pip install -q -c constraints.txt -e '.[dev]'" in script and '\npytest -q' in script


def test_the_readme_links_every_notebook():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    notebooks = [p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert [str(p) for p in notebooks if f']({p})' not in text] == []

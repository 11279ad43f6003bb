"""The project as a whole: imports, notebooks and weights."""
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
WEIGHTS = ROOT/'pixart_delta_nb/weights'


def code_cells(path):
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]


def modules_after(statement):
    code = f"{statement}; import sys; print(*sorted(m for m in ('diffusers', 'transformers') if m in sys.modules))"
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()


def test_package_imports_neither_diffusers_nor_transformers():
    assert modules_after('import pixart_delta_nb') == []


@pytest.mark.parametrize('module', ['core', 'schedules', 'solvers', 'consistency', 'toy', 'transformer'])
def test_ground_floor_imports_neither_diffusers_nor_transformers(module):
    assert modules_after(f'import pixart_delta_nb.{module}') == []


def test_export_leaves_no_difference(tmp_path):
    for name in ('nbs', 'pixart_delta_nb', 'settings.ini', 'setup.py', 'README.md', 'pyproject.toml'):
        source = ROOT/name
        if source.is_dir(): shutil.copytree(source, tmp_path/name, ignore=shutil.ignore_patterns('weights', '__pycache__', '.ipynb_checkpoints'))
        else: shutil.copy(source, tmp_path/name)
    before = {p.name: p.read_text() for p in (tmp_path/'pixart_delta_nb').glob('*.py')}
    subprocess.run([sys.executable, '-c', 'from nbdev.export import nb_export\nfrom pathlib import Path\n'
                    "for p in sorted(Path('nbs').glob('*.ipynb')): nb_export(p, lib_path='pixart_delta_nb')"], cwd=tmp_path, check=True, capture_output=True)
    after = {p.name: p.read_text() for p in (tmp_path/'pixart_delta_nb').glob('*.py')}
    for name in before.keys() - {'_modidx.py'}: assert after[name] == before[name], f'{name} differs from its notebook'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stored_as_run_from_top_to_bottom(path):
    counts = [c['execution_count'] for c in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for c in code_cells(path) for o in c['outputs'] if o['output_type'] == 'error']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_names_no_folder_of_a_machine(path):
    assert not re.findall(r'/(?:tmp|root|home)/|site-packages|Traceback', path.read_text())


@pytest.mark.parametrize('path', sorted(WEIGHTS.rglob('*.json')), ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_weights_name_no_folder_of_a_machine(path):
    assert not re.findall(r'"/[\w.-]+/[\w./-]+"', path.read_text())


def test_weights_are_safetensors_within_the_limit():
    files = [p for p in WEIGHTS.rglob('*') if p.is_file()]
    assert {p.suffix for p in files} <= {'.safetensors', '.json', '.md'}
    assert sum(p.stat().st_size for p in files) <= 64*2**20

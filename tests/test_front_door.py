"""The front door: what a name costs, and that it is what it says."""
import json, subprocess, sys
from pathlib import Path
import pytest
import pixart_delta_nb

HEAVY = ('diffusers', 'transformers', 'matplotlib', 'torchmetrics', 'scipy', 'accelerate', 'bitsandbytes', 'peft', 'ipywidgets', 'psutil',
         'torchvision', 'datasets', 'efficientnet_lite_pytorch', 'typer')
LIBRARY = sorted(p.stem for p in Path(pixart_delta_nb.__file__).parent.glob('*.py') if p.stem not in ('__init__', '_modidx', 'cli', 'console'))


def loaded_after(code):
    "Which heavy packages, rooms of this one and torch a fresh interpreter holds after `code`."
    code += (f'\nimport json, sys\nheavy = [m for m in {HEAVY + ("torch",)} if m in sys.modules]'
             '\nprint(json.dumps([heavy, [m for m in sys.modules if m.startswith("pixart_delta_nb.")]]))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing():
    assert loaded_after('import pixart_delta_nb') == [[], []]


def test_every_name_and_module_of_the_library_loads_without_the_heavy_packages_and_other_rooms():
    names = ', '.join(pixart_delta_nb.__all__)
    modules = '\n'.join(f'import pixart_delta_nb.{name}' for name in LIBRARY)
    heavy, ours = loaded_after(f'from pixart_delta_nb import {names}\n{modules}')
    assert heavy == ['torch'] and not [m for m in ours if '.world' in m or '.evidence' in m or m.endswith('.cli')]


def test_about_fifteen_names_each_with_a_sentence():
    assert 12 <= len(pixart_delta_nb.__all__) <= 18
    for name in pixart_delta_nb.__all__:
        value = getattr(pixart_delta_nb, name)
        assert value.__name__ == name and value.__doc__ and name in dir(pixart_delta_nb)


def test_no_name_of_the_front_door_is_that_of_a_module_which_would_hide_it():
    folder = Path(pixart_delta_nb.__file__).parent
    assert not [name for name in pixart_delta_nb.__all__ if (folder/f'{name}.py').exists() or (folder/name).exists()]


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match='load_pipeline'): pixart_delta_nb.distil


def test_the_page_names_each_of_them_once():
    page = json.loads((Path(__file__).parents[1]/'nbs/front_door.ipynb').read_text(encoding='utf-8'))
    text = ''.join(''.join(c['source']) for c in page['cells'] if c['cell_type'] == 'markdown')
    for name in pixart_delta_nb.__all__: assert text.count(f'| `{name}`') == 1, name


def test_the_shipped_model_opens_without_a_word_where_accelerate_is_not_installed():
    code = ('import importlib.util as u\nfound, hidden = u.find_spec, ("accelerate", "peft", "bitsandbytes")\n'
            'u.find_spec = lambda name, *rest: None if name in hidden else found(name, *rest)\n'
            'from pixart_delta_nb import load_pipeline\nload_pipeline()')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'accelerate' not in done.stderr, done.stderr

"""The house: what an import costs, which room may use which, how large things are, and notebooks that are what the modules say."""
import ast, json, re, shutil, subprocess, sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT/'pixart_delta_nb'
WEIGHTS = PACKAGE/'weights'
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if p.stem not in ('__init__', '_modidx'))
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part.startswith('.') for part in p.parts))
HEAVY = ('matplotlib', 'torchmetrics', 'scipy', 'accelerate', 'ipywidgets', 'psutil', 'efficientnet_lite_pytorch')


def name_of(path): return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
def room_of(name): return name.split('.')[0] if '.' in name else name


# what an import costs -------------------------------------------------------------------------------------------
@cache
def loaded(*statements):
    "Top-level modules of interest that each statement adds, in one process: statement -> list."
    code = ('import sys, json\n'
            f"names = {('torch', 'diffusers', 'transformers', *HEAVY)!r}\n"
            'found, before = {}, set()\n'
            f'for statement in {list(statements)!r}:\n'
            '    exec(statement, {})\n'
            '    now = {n for n in names if n in sys.modules}\n'
            '    found[statement], before = sorted(now - before), now\n'
            'print(json.dumps(found))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_package_itself_imports_not_even_torch():
    assert loaded('import pixart_delta_nb') == {'import pixart_delta_nb': []}


def test_the_ground_floor_imports_neither_diffusers_nor_transformers():
    ground = ('core', 'schedules', 'solvers', 'consistency', 'toy', 'transformer')
    found = loaded(*(f'import pixart_delta_nb.{module}' for module in ground))
    assert not {s: m for s, m in found.items() if set(m) & {'diffusers', 'transformers'}}


def test_no_name_of_the_front_door_loads_what_only_some_functions_need():
    import pixart_delta_nb
    found = loaded(*(f'from pixart_delta_nb import {name}' for name in pixart_delta_nb.__all__))
    assert not {s: m for s, m in found.items() if set(m) & set(HEAVY)}


def test_no_module_loads_what_only_some_functions_need():
    found = loaded(*(f'import pixart_delta_nb.{name_of(path)}' for path in MODULES))
    assert not {s: m for s, m in found.items() if set(m) & set(HEAVY)}


# rooms and floors -----------------------------------------------------------------------------------------------
def imports(path):
    "(module, name) that a module imports from the package, at its top or inside functions."
    here = name_of(path).split('.')[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from ((a.name.removeprefix('pixart_delta_nb.'), None) for a in node.names if a.name.startswith('pixart_delta_nb.'))
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == 'pixart_delta_nb'):
            base = here[:len(here) - node.level + 1] if node.level else []
            parts = base + [p for p in (node.module or '').split('.') if p and p != 'pixart_delta_nb']
            for alias in node.names:
                inner = PACKAGE.joinpath(*parts, alias.name)
                if inner.with_suffix('.py').is_file(): yield '.'.join([*parts, alias.name]), None
                elif parts: yield '.'.join(parts), alias.name


@cache
def arrows():
    "Module -> the modules of the package that it imports."
    names = {name_of(p) for p in MODULES}
    return {name_of(p): {m for m, _ in imports(p) if m in names} - {name_of(p)} for p in MODULES}


def heights(graph):
    "Node -> its floor, one above all that it imports; AssertionError where imports run in a circle."
    done = {}
    def height(node, path=()):
        assert node not in path, f'imports run in a circle: {" → ".join([*path[path.index(node):], node])}'
        if node not in done: done[node] = 1 + max((height(m, (*path, node)) for m in graph[node]), default=0)
        return done[node]
    for node in graph: height(node)
    return done


def test_imports_run_in_no_circle(): heights(arrows())


def test_the_house_has_at_most_eight_floors():
    rooms = {}
    for name, used in arrows().items(): rooms.setdefault(room_of(name), set()).update(room_of(m) for m in used)
    floors = heights({room: used - {room} for room, used in rooms.items()})
    assert max(floors.values()) <= 8, sorted(floors.items(), key=lambda f: -f[1])[:8]


@pytest.mark.parametrize('below, above', [('library', ('world', 'evidence', 'workshop', 'cli')), ('world', ('evidence', 'workshop', 'cli')),
                                          ('evidence', ('workshop', 'cli')), ('workshop', ('cli',))])
def test_no_room_imports_one_above_it(below, above):
    def belongs(name): return room_of(name) == below if below != 'library' else room_of(name) not in ('world', 'evidence', 'workshop', 'cli')
    assert not {name: bad for name, used in arrows().items() if belongs(name) and (bad := {m for m in used if room_of(m) in above})}


@pytest.mark.parametrize('path', MODULES, ids=name_of)
def test_no_private_name_is_used_outside_its_module(path):
    taken = [(m, n) for m, n in imports(path) if n and n.startswith('_') and not n.startswith('__')]
    tree = ast.parse(path.read_text(encoding='utf-8'))
    modules = {(a.asname or a.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for a in node.names
               if a.name in {name.split('.')[-1] for name in arrows()}}
    reached = [(n.value.id, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
               and n.value.id in modules and n.attr.startswith('_')]
    assert not taken + reached


# sizes ----------------------------------------------------------------------------------------------------------
def written_lines(path):
    "The lines of a module without the list of names that the export writes."
    return re.sub(r'(?ms)^__all__ = \[.*?\]$', '', path.read_text(encoding='utf-8')).split('\n')


def test_no_module_is_longer_than_300_lines():
    assert not {name_of(p): n for p in MODULES if (n := len(p.read_text(encoding='utf-8').splitlines())) > 300}


def test_no_line_is_longer_than_120_characters():
    long = {name_of(p): n for p in MODULES if (n := sum(len(line) > 120 for line in written_lines(p)))}
    assert not long


def tracked():
    "Tracked files and their bytes."
    done = subprocess.run(['git', '-C', str(ROOT), 'ls-files', '-z'], capture_output=True, text=True)
    if done.returncode: pytest.skip('this is no git checkout')
    return {Path(name): (ROOT/name).stat().st_size for name in done.stdout.split('\0') if name and (ROOT/name).is_file()}


def test_all_but_the_weights_stays_small():
    rest = {p: n for p, n in tracked().items() if WEIGHTS not in (ROOT/p).parents}
    ours = {str(p): n for p, n in rest.items() if p.parts[:2] != ('docs', '_static')}       # there lies what others wrote
    assert not {p: n for p, n in ours.items() if n > 1_500_000}, 'no file outside the weights is larger than 1.5 megabytes'
    assert sum(ours.values()) <= 26_000_000


def test_weights_are_safetensors_within_the_limit():
    files = [p for p in WEIGHTS.rglob('*') if p.is_file()]
    assert {p.suffix for p in files} <= {'.safetensors', '.json', '.md'}
    assert sum(p.stat().st_size for p in files) <= 59_000_000


def test_there_is_one_page_and_one_file_a_figure():
    files = [p for p in tracked() if p.parts[0] == 'results']
    assert [str(p) for p in files if p.suffix == '.html'] == ['results/reproduce/report.html']
    pictures = [p.with_suffix('') for p in files if p.suffix in ('.png', '.svg', '.webp', '.jpg')]
    assert len(set(pictures)) == len(pictures)


# notebooks ------------------------------------------------------------------------------------------------------
def test_export_leaves_no_difference(tmp_path):
    for name in ('nbs', 'pixart_delta_nb', 'settings.ini', 'setup.py', 'README.md', 'pyproject.toml'):
        source = ROOT/name
        if source.is_dir(): shutil.copytree(source, tmp_path/name, ignore=shutil.ignore_patterns('weights', '__pycache__', '.ipynb_checkpoints'))
        else: shutil.copy(source, tmp_path/name)
    before = {name_of(p): p.read_text(encoding='utf-8') for p in MODULES}
    subprocess.run([sys.executable, '-c', 'from nbdev.export import nb_export\nfrom pathlib import Path\n'
                    "for p in sorted(Path('nbs').rglob('*.ipynb')): nb_export(p, lib_path='pixart_delta_nb')"],
                   cwd=tmp_path, check=True, capture_output=True)
    after = {'.'.join(p.relative_to(tmp_path/'pixart_delta_nb').with_suffix('').parts): p.read_text(encoding='utf-8')
             for p in (tmp_path/'pixart_delta_nb').rglob('*.py') if p.stem not in ('__init__', '_modidx')}
    assert set(after) == set(before)
    assert [name for name in before if after[name] != before[name]] == []


def test_every_module_is_written_in_one_notebook():
    wanted = [m for p in NOTEBOOKS for m in re.findall(r'"#\| default_exp ([\w.]+)', p.read_text(encoding='utf-8'))]
    assert sorted(wanted) == sorted(name_of(p) for p in MODULES)


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]


def place(path): return str(path.relative_to(ROOT/'nbs').with_suffix(''))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=place)
def test_notebook_is_stored_as_run_from_top_to_bottom(path):
    counts = [c['execution_count'] for c in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for c in code_cells(path) for o in c['outputs'] if o['output_type'] == 'error']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=place)
def test_notebook_names_no_folder_of_a_machine(path):
    assert not re.findall(r'/(?:tmp|root|home)/|site-packages|Traceback', path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=place)
def test_links_of_a_notebook_lead_somewhere(path):
    text = ''.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    links = [link for link in re.findall(r'\]\(([^)#\s]+)', text) if '://' not in link and not link.startswith('mailto')]
    assert not [link for link in links if not (path.parent/link).exists()]


@pytest.mark.parametrize('path', sorted(WEIGHTS.rglob('*.json')), ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_weights_name_no_folder_of_a_machine(path):
    assert not re.findall(r'"/[\w.-]+/[\w./-]+"', path.read_text())

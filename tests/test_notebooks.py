"""Every notebook as a reader meets it: equations that exist, figures with prose around them, checks beside the code, and outputs that are clean."""
import ast, json, re
from functools import cache
from pathlib import Path
import pytest

NBS = Path(__file__).parent.parent/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(part.startswith('.') for part in p.parts))
LABEL = re.compile(r'\\tag\{(\w+)\}')
NUMBERS = r'\(?(\d+)\)?(?:\s*(?:,|and|to|–)\s*\(?(\d+)\))?'
CITATION = re.compile(r'\b(?:[Ee]quations?|[Ee]qs?\.)[\s~]*' + NUMBERS + r'(?!\d|\)?\s*of the (?:report|paper))')
FOLDER = re.compile(r'(?<![\w.:/-])/(?:work|tmp|root|home|usr|mnt|var)/\w')
FIGURE_TYPES = ('image/png', 'image/svg+xml', 'image/jpeg')


def place(path): return str(path.relative_to(NBS).with_suffix(''))


each = pytest.mark.parametrize('path', NOTEBOOKS, ids=place)


@cache
def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def outputs(path): return [(i, o) for i, c in enumerate(cells(path)) for o in c.get('outputs', [])]


def cited(text):
    "Numbers of the equations that a text names: 'eq. 3', 'equation (3)', 'equations (3) and (4)'."
    return {n for pair in CITATION.findall(text) for n in pair if n}


def blocks(path):
    "The notebook as a list of 'heading', 'prose' and 'figure', in the reader's order; other code is left out."
    found = []
    for cell in cells(path):
        if cell['cell_type'] == 'markdown':
            fenced = re.sub(r'```.*?```', '', source(cell), flags=re.S)
            for line in fenced.splitlines():
                kind = 'heading' if re.match(r'#{1,6} ', line) else 'prose' if re.search(r'\w', line) else None
                if kind and not (kind == 'prose' and found and found[-1] == 'prose'): found.append(kind)
        elif any(kind in o.get('data', {}) for o in cell['outputs'] for kind in FIGURE_TYPES): found.append('figure')
    return found


@each
def test_equation_labels_are_unique_and_count_up(path):
    labels = [label for c in cells(path) if c['cell_type'] == 'markdown' for label in LABEL.findall(source(c))]
    assert labels == [str(n + 1) for n in range(len(labels))]


@each
def test_every_cited_equation_exists(path):
    labels = {label for c in cells(path) for label in LABEL.findall(source(c))}
    missing = {n: source(c)[:60] for c in cells(path) for n in cited(source(c)) - labels}
    assert not missing


@pytest.mark.parametrize('text, wanted', [
    ('Equation (3) says', {'3'}), ('by eq. 4)', {'4'}), ('eq. (2)', {'2'}), ('equations (5) and (6)', {'5', '6'}),
    ('(equation 5; see', {'5'}), ('equations (2), (3)', {'2', '3'}), ('no differential equation is solved', set()),
    ('equation (4) of the report', set()), ('an equation: 3 apples', set())])
def test_citations_are_recognised(text, wanted): assert cited(text) == wanted


@each
def test_a_notebook_opens_with_its_summary_and_ends_with_recap_exercises_and_the_next_one(path):
    text = [source(c) for c in cells(path) if c['cell_type'] == 'markdown']
    assert re.match(r'# \S.*\n\n> \S', text[0])
    whole = '\n'.join(text)
    assert whole.count('\n## Recap') == 1 and whole.count('\n## Exercises') == 1 and re.search(r'(?m)^Next: ', text[-1])
    assert whole.rindex('\n## Recap') < whole.rindex('\n## Exercises') < whole.rindex('Next: ')


@each
def test_a_notebook_is_lean(path): assert path.stat().st_size <= 600_000


@each
def test_every_figure_is_announced_and_interpreted(path):
    seen = blocks(path)
    for i, kind in enumerate(seen):
        if kind != 'figure': continue
        number = seen[:i].count('figure') + 1
        assert seen[i - 1] == 'prose', f'figure {number} comes right after a {seen[i - 1]}'
        assert seen[i + 1:i + 2] == ['prose'], f'figure {number} is followed by {seen[i + 1:i + 2] or "the end"}'


@each
def test_outputs_name_no_folder_of_a_machine(path):
    assert not [(i, hit.group()) for i, o in outputs(path) for hit in [FOLDER.search(json.dumps(o.get('text', '')) + json.dumps(
        {k: v for k, v in o.get('data', {}).items() if k.startswith('text') or k.endswith('json')}))] if hit]


@each
def test_outputs_hold_no_warnings_or_progress_bars(path):
    assert not [(i, ''.join(o['text'])[:80]) for i, o in outputs(path) if o.get('name') == 'stderr']


@each
def test_live_widgets_have_a_readable_fallback(path):
    for i, output in outputs(path):
        if 'application/vnd.jupyter.widget-view+json' in output.get('data', {}):
            assert 'children=' not in ''.join(output['data']['text/plain']), f'cell {i} stores the bare repr of a widget'


CHECK = re.compile(r'\bassert\b|\btest_(?:eq|close|fail)\(|\bassert_close\(|\bexcept ValueError\b|\b(?:refusal|rejects)\(')
GROUND = [NBS/f'{name}.ipynb' for name in (
    '00_core', '00a_plots', '00b_provenance', '01_schedules', '02_solvers', '03_consistency', '04_toy', '06_transformer', '08_lcd', '09_sampling')]


@cache
def boxes():
    "The quoted boxes on a disagreement of report, released code and diffusers: number -> (notebook, index of its cell, text)."
    found = {}
    for path in NOTEBOOKS:
        for i, cell in enumerate(cells(path)):
            quotes = re.findall(r'(?m)(?:^>.*\n?)+', source(cell)) if cell['cell_type'] == 'markdown' else []
            for quote in quotes:
                for n in re.findall(r'[Dd]isagreement (\d+)', quote): found.setdefault(int(n), []).append((path, i, quote))
    return found


@pytest.mark.parametrize('number', range(1, 19))
def test_every_disagreement_has_a_box_with_a_check_below_it(number):
    complete = [quote for path, i, quote in boxes().get(number, []) if re.search('report', quote, re.I) and re.search('code|diffusers', quote)
                and any(c['cell_type'] == 'code' and CHECK.search(source(c)) for c in cells(path)[i + 1:i + 13])]
    assert complete, f'no notebook has a box on disagreement {number} that names report and code, with a check in the twelve cells after it'


def exports(path):
    "Exported functions and classes of a notebook: index of the cell, name, and the names that a check may use (a class: its methods too)."
    for i, cell in enumerate(cells(path)):
        if cell['cell_type'] != 'code' or not source(cell).startswith('#| export'): continue
        for node in ast.parse(source(cell)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
                methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith('_')] if isinstance(node, ast.ClassDef) else []
                yield i, node.name, [node.name, *methods]


@pytest.mark.parametrize('path', GROUND, ids=place)
def test_every_export_has_two_checks_in_its_notebook(path):
    few = {}
    for i, name, words in exports(path):
        used = re.compile(r'\b(?:' + '|'.join(words) + r')\b')
        below = [source(c) for c in cells(path)[i + 1:] if c['cell_type'] == 'code' and not source(c).startswith('#| export')]
        count = sum(len(CHECK.findall(text)) for text in below if used.search(text))
        if count < 2: few[name] = count
    assert not few

"""README and notebooks quote no decimal number that is not found, rounded, in a results file, in the card of the weights or, in a notebook, in its cells."""
import json, re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SILENT = [r'```.*?```', r'`[^`]*`', r'(?<=\])\([^)]*\)', r'https?://\S+',           # code, and where links lead
          r'\b\d{4}\.\d{4,5}(v\d+)?\b', r'\bv?\d+(\.\d+){2,}\S*',                    # arXiv ids, versions with two dots
          r'(?:§|\b(?:Python|torch|diffusers|CUDA|nbdev|Apache|License|version|Section|Table|Figure|Fig\.))[- ]?v?\d+(?:\.\d+)*']
NUMBER = re.compile(r'(?<![\w.])(\d+\.\d+)(?![\w.]*\d)(\s?%)?')

CURVES = ('values', 'curve')                                                       # long lists of stored figures, in which any number could be found


def quoted(text: str) -> list:
    "Decimal numbers of prose and tables: (as written, decimals, whether in percent)."
    for pattern in SILENT: text = re.sub(pattern, ' ', text, flags=re.S)
    return [(m[1], len(m[1].split('.')[1]), bool(m[2])) for m in NUMBER.finditer(text)]


def numbers(value):
    "All numbers in nested JSON."
    if isinstance(value, bool) or value is None: return
    if isinstance(value, (int, float)): yield float(value)
    elif isinstance(value, str): yield from (float(n) for n in re.findall(r'(?<![\w.])\d+\.\d+(?![\w.])', value))
    elif isinstance(value, dict): yield from (n for k, v in value.items() if k not in CURVES for n in numbers(v))
    elif isinstance(value, list): yield from (n for v in value for n in numbers(v))


def found_in(text: str, decimals: int, percent: bool, pool) -> bool:
    "Whether some number of the pool rounds to the text."
    return any(abs(v*(100 if percent else 1) - float(text)) <= .5*10**-decimals*(1 + 1e-9) + 1e-12 for v in pool)


def an_image(value):
    "Seconds an image, where a timing is stored for a batch: of each part, and of denoising, which is transformer and overhead."
    if isinstance(value, dict) and 'batch' in value and isinstance(value.get('methods'), dict):
        for parts in value['methods'].values():
            yield from (seconds/value['batch'] for seconds in parts.values())
            yield (parts.get('transformer', 0) + parts.get('overhead', 0))/value['batch']
    elif isinstance(value, (dict, list)):
        for v in (value.values() if isinstance(value, dict) else value): yield from an_image(v)


@cache
def measured() -> set:
    "Every number of results/ and of the cards, and seconds an image."
    pool = set()
    for path in [*ROOT.glob('results/**/*.json'), *ROOT.glob('pixart_delta_nb/weights/**/card.json')]:
        found = json.loads(path.read_text(encoding='utf-8'))
        pool |= set(numbers({k: v for k, v in found.items() if k not in ('provenance', 'sheet', 'sha256', 'schedules', 'intervals')} if isinstance(found, dict) else found))
        pool |= set(an_image(found))
    return pool | {float(number) for text in computed() for number, _, _ in quoted(text)}


def computed() -> list:
    "The sentences and table cells that the package computes from the stored numbers, intervals and means among them."
    from pixart_delta_nb.evidence.figures import stored_figures
    from pixart_delta_nb.evidence.results import rows_of, tell_quality
    from pixart_delta_nb.evidence.targets import marks_of, tell_marks
    read = lambda path: json.loads(path.read_text(encoding='utf-8'))
    told = [entry.tell(found) for entry, found in stored_figures(ROOT/'results')]
    tables = [read(path) for path in (ROOT/'results').glob('*/results.json')]
    return told + [cell for table in tables for row in rows_of(table)[1] for cell in row] + [tell_quality(table) for table in tables] + [tell_marks(marks_of())]


@pytest.mark.parametrize('name', ['README.md', 'results/README.md'])
def test_readme_quotes_measured_numbers_only(name):
    pool = measured()
    missing = [text + '%'*percent for text, decimals, percent in quoted((ROOT/name).read_text(encoding='utf-8')) if not found_in(text, decimals, percent, pool)]
    assert not missing, f'{name} quotes {", ".join(missing)}, which no results file and no card holds: run the measurement again, or correct the number.'


NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
MATHS = re.compile(r'\$\$.*?\$\$|\$[^$\n]*\$', re.S)
IN_CODE = re.compile(r'(?<![\w.])(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?')
GIVEN = {3.5, 4.5, 5.5, .00085, .012, .18215, 5.4, 4.7,   # the report's ω and s, LCM's β; Stable Diffusion's scaling factor; billions of parameters of PixArt's parts and of T5-XXL's encoder
         5.45, .85, 5.55, .75, 1.36, 1.41,        # rounding of Table 2's V100 row; 0.75 % of the diagonal, usual in edge detection, that of 128 pixels, and √2
         43.8, 2.5, 97.5, 1.96, 4.303}            # quantiles: chi-squared with 19 degrees of freedom, percentiles, normal, t with 2


def prose_of(path):
    "(markdown without formulas, numbers printed above it) of each cell with text."
    above = set()
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'markdown': yield MATHS.sub(' ', ''.join(cell['source'])), set(above)
        else: above |= {float(n) for o in cell.get('outputs', []) for n in IN_CODE.findall(''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/plain', '')))}


def written(path):
    "Numbers in a notebook's code: what it sets, such as the means of a toy problem."
    code = (''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
    return {float(n) for source in code for n in IN_CODE.findall(source)}


def unfounded(path, pool):
    "Decimal numbers of a notebook's prose that nothing holds."
    pool = pool | GIVEN | written(path)
    return [text + '%'*percent for prose, above in prose_of(path) for text, decimals, percent in quoted(prose) if not (
        found_in(text, decimals, percent, pool | above) or percent and found_in(text, decimals, False, pool | above))]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs').with_suffix('')))
def test_notebooks_quote_numbers_of_a_cell_above_or_of_results_only(path):
    missing = unfounded(path, measured())
    assert not missing, f'{path.name} quotes {", ".join(missing)}, which no cell above, no results file and no card holds: print the number, or leave it out.'


def test_checker_of_notebooks_wants_the_output_above(tmp_path):
    prose = {'cell_type': 'markdown', 'source': 'Accuracy 0.731, with $x = 0.25$, at rate 0.125, and 61.5 %.'}
    cell = {'cell_type': 'code', 'source': 'rate = .125', 'outputs': [{'text': 'accuracy 0.7312, share 0.615'}]}
    for name, cells in (('above', [cell, prose]), ('below', [prose, cell])): (tmp_path/name).write_text(json.dumps({'cells': cells}))
    assert unfounded(tmp_path/'above', set()) == [] and unfounded(tmp_path/'below', set()) == ['0.731', '61.5%']


@pytest.mark.parametrize('text,expected', [
    ('accuracy 0.627, in 4.47 times', ['0.627', '4.47']), ('| student 4 | 0.066 | 6998.80 |', ['0.066', '6998.80']), ('93.5 % of them', ['93.5']), ('(2.5)', ['2.5']),
    ('a sentence ends with 7. Then more', []), ('1.5.', ['1.5']), ('−0.25 dB', ['0.25']), ('between 1.5–2.5 s', ['1.5', '2.5']),
    ('[arXiv 2401.05252](https://arxiv.org/abs/2401.05252)', []), ('torch 2.13.0, Python 3.11, Apache-2.0', []), ('`lr=0.5` and ```\nx = 0.25\n```', []),
    ('[page](a/1.5.md) says 2.5', ['2.5']), ('§3.3 and Table 2', [])])
def test_checker_finds_numbers_and_leaves_versions(text, expected): assert [q[0] for q in quoted(text)] == expected


@pytest.mark.parametrize('text,percent,expected', [('0.63', False, True), ('0.64', False, False), ('62.7', True, True), ('62.7', False, False), ('0.6273', False, True)])
def test_checker_rounds(text, percent, expected): assert found_in(text, len(text.split('.')[1]), percent, [.62727, 1.]) is expected


def test_checker_reads_numbers_in_text_and_lists(): assert set(numbers({'a': [1, {'b': 'about 2.5 s'}], 'c': True, 'd': None})) == {1., 2.5}


def test_checker_knows_seconds_an_image():
    found = {'speed': [{'batch': 4, 'methods': {'student 4': {'whole': 2., 'transformer': 1., 'overhead': .2}}}]}
    assert set(an_image(found)) == {.5, .25, .05, .3}


@pytest.mark.parametrize('path', sorted(ROOT.glob('results/*/results.json')), ids=lambda p: p.parent.name)
def test_stored_scores_say_what_the_notebooks_say_of_them(path):
    "Texture and accuracy tell the student from the undistilled network at 4 and 2 evaluations, beyond their intervals."
    rows = {r['method']: r for r in json.loads(path.read_text(encoding='utf-8'))['quality']}
    for n in (4, 2):
        student, plain = rows[f'student {n}'], rows[f'undistilled {n}']
        assert student['intervals']['texture'][0] > plain['intervals']['texture'][1]
        assert student['accuracy']['interval'][0] > plain['accuracy']['interval'][1]


@pytest.mark.parametrize('path', sorted(ROOT.glob('results/**/*.json')), ids=lambda p: str(p.relative_to(ROOT/'results')))
def test_results_carry_their_provenance(path):
    found = json.loads(path.read_text(encoding='utf-8'))['provenance']
    assert {'command', 'seeds', 'commit', 'versions', 'hardware', 'finished', 'wall_seconds'} <= set(found)

"""The pages that others cite: one letter one meaning, eighteen numbered disagreements, and links that name what they lead to."""
import importlib, json, re
from functools import cache
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(part.startswith('.') for part in p.parts))
DISAGREEMENTS = range(1, 19)


@cache
def markdown(path): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']


@cache
def symbols():
    "Rows of the table of symbols: its cells, without the bars."
    text = next(t for t in markdown(NBS/'notation.ipynb') if '## The table' in t)
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('| $')]


# the symbols ----------------------------------------------------------------------------------------------------
def test_no_symbol_stands_in_two_rows():
    written = [symbol for row in symbols() for symbol in re.split(r',\s*', row[0].strip('$'))]
    assert len(written) > 50 and len(set(written)) == len(written)


@pytest.mark.parametrize('symbol', ['t', 's', 'c', 'N', r'\omega', r'\sigma_d', r'\rho', r'\gamma', 'T', 'P', r'N_\text{copy}'])
def test_the_letters_that_clashed_have_a_row_or_none(symbol):
    assert (f'${symbol}$' in [row[0] for row in symbols()]) == (symbol != 'N')


def test_every_exported_name_of_the_table_exists():
    names = {name for row in symbols() for name in re.findall(r'`(\w+\.\w+)`', row[2])}
    missing = [f'{module}.{name}' for module, name in (n.split('.') for n in names)
               if name not in importlib.import_module(f'pixart_delta_nb.{module}').__all__]
    assert len(names) > 30 and not missing


# the disagreements ----------------------------------------------------------------------------------------------
def test_each_disagreement_has_one_row_one_section_and_one_measurement():
    page = NBS/'disagreements.ipynb'
    text = '\n'.join(markdown(page))
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    told = re.findall(r'(?m)^told\((\d+),', '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code'))
    for found in (re.findall(r'(?m)^\| \[D(\d+)\]\(#D\1\) \|', text), re.findall(r'(?m)^### D(\d+)$', text), told):
        assert [int(n) for n in found] == list(DISAGREEMENTS)


def test_a_row_says_what_each_of_the_four_does_and_where_it_is_shown():
    rows = [line.strip('|').split('|') for line in '\n'.join(markdown(NBS/'disagreements.ipynb')).splitlines() if re.match(r'\| \[D\d+\]', line)]
    assert {len(row) for row in rows} == {7}
    assert all(cell.strip() for row in rows for cell in row) and all('.ipynb)' in row[-1] for row in rows)


CITED = re.compile(r'\[([^\]]*?(\d+))\]\((?:\.\./)?disagreements\.ipynb#D(\d+)\)')

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS).with_suffix('')))
def test_a_link_to_a_disagreement_carries_its_number(path):
    assert not [words for text in markdown(path) for words, number, anchor in CITED.findall(text) if number != anchor or int(anchor) not in DISAGREEMENTS]


# the first page -------------------------------------------------------------------------------------------------
@cache
def index(): return json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells']


def test_the_map_links_every_idea_to_a_notebook_that_exists():
    code = '\n'.join(''.join(c['source']) for c in index() if c['cell_type'] == 'code')
    ideas = re.findall(r"\(\d, \d, '\w+', '([\w/]+)', ", code)
    assert len(ideas) >= 15 and all((NBS/f'{name}.ipynb').is_file() for name in ideas)


def test_every_notebook_of_a_reading_path_says_how_long_it_takes():
    source = next(''.join(c['source']) for c in index() if 'def minutes(' in ''.join(c['source']))
    known = {'re': re, 'json': json, 'Path': lambda name: NBS/name}
    exec(source, known)
    paths = next(''.join(c['source']) for c in index() if ''.join(c['source']).startswith('PATHS')).split('rows = []')[0]
    exec(paths, known)
    assert len(known['PATHS']) >= 4
    silent = {name for names in known['PATHS'].values() for name in names if not known['minutes'](name)[1]}
    assert not silent


def test_the_film_is_a_film():
    import base64, io
    Image = pytest.importorskip('PIL.Image')
    pictures = [o['data']['image/png'] for c in index() for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    lengths = [getattr(Image.open(io.BytesIO(base64.b64decode(p))), 'n_frames', 1) for p in pictures]
    assert max(lengths) >= 20, 'an output of several pictures was reduced to its first one'

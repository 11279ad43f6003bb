"""From the notebooks to the pages of the site: what is shown, in which order, and what links to what."""
import ast, json, re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from package import ROOT, Public

PARTS = {'The way in': ('index', 'notation', 'disagreements', 'front_door'), 'The library': ('[0-9]*',),
         'The world': ('world/*',), 'The evidence': ('evidence/*',), 'The workshop': ('workshop/*',)}
PROTECTED = re.compile(r'```.*?```|\$\$.*?\$\$|!?\[[^\]]*\]\([^)]*\)|`[^`\n]+`|\$[^$\n]+\$', re.S)
EQUATION = re.compile(r'(?m)^\$\$(?:(?!\$\$).)*?\\tag\{(\w+)\}.*?\$\$[ \t]*$', re.S)
CITATION = re.compile(r'\b(?:[Ee]quations?|[Ee]qs?\.)[\s~]*\(?\d+\)?(?:\s*(?:,|and|to|–)\s*\(\d+\))*'
                      r'(?!\d|\)?\s*of the (?:report|paper))')


@dataclass
class Chapter:
    """One notebook on its way to a page."""
    path: Path
    name: str # 'evidence/kit', which is also its page
    cells: list[dict]
    module: str # that it exports, '' for none
    links: list[str] = field(default_factory=list) # files of the repository that its text links to

    @property
    def title(self) -> str:
        return next(source(c).splitlines()[0].lstrip('# ') for c in self.cells if source(c).startswith('# '))

    @cached_property
    def definitions(self) -> dict[str, int]: # public function or class -> cell that defines it
        return {node.name: i for i, c in enumerate(self.cells) if is_export(c) for node in ast.parse(source(c)).body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')}

    @cached_property
    def equations(self) -> dict[str, int]: # number of an equation -> its cell
        return {n: i for i, c in enumerate(self.cells) if is_markdown(c) for n in EQUATION.findall(source(c))}


def source(cell: dict) -> str: return ''.join(cell['source'])
def is_markdown(cell: dict) -> bool: return cell['cell_type'] == 'markdown'
def directives(cell: dict) -> list[str]: # what is said to nbdev: 'export', 'hide', 'default_exp solvers'
    return [] if is_markdown(cell) else re.findall(r'(?m)^#\|\s*(.*?)\s*$', source(cell))
def is_export(cell: dict) -> bool: return 'export' in directives(cell)


def slug(*parts: str) -> str: # a target's name: letters, digits and hyphens
    return re.sub(r'[^a-z0-9]+', '-', '-'.join(parts).lower()).strip('-')


def sentence(test: str) -> str: # the name of a test is one
    return test.removeprefix('test_').replace('_', ' ').capitalize()


def definition(module: str, name: str) -> str: # the target of the cell that defines a name; docutils forgets capitals
    return slug('class' if name[0].isupper() else 'def', module, name)


def jupyter_anchor(title: str) -> str: return title.replace(' ', '-') # one link to a heading, here and in Jupyter


def read(path: Path, nbs: Path) -> Chapter:
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    module = next((d.split()[1] for c in cells for d in directives(c) if d.startswith('default_exp ')), '')
    return Chapter(path, str(path.relative_to(nbs).with_suffix('')), cells, module)


def reading_order(root: Path = ROOT) -> list[str]: # notebooks in the order in which the README links to them
    links = re.findall(r'\]\(nbs/([^)#]+)\.ipynb', (root/'README.md').read_text(encoding='utf-8'))
    return list(dict.fromkeys(links))


def book(root: Path = ROOT) -> dict[str, list[Chapter]]: # part -> its chapters, in reading order
    "Every notebook once: numbered ones in the order of their numbers, those of a folder in the order of the README."
    nbs, order = root/'nbs', reading_order(root)
    rank = lambda name: (order.index(name) if '/' in name and name in order else len(order), name)
    called = lambda path: str(path.relative_to(nbs).with_suffix(''))
    found = lambda pattern: sorted(map(called, nbs.glob(f'{pattern}.ipynb')), key=rank)
    parts = {part: [name for pattern in patterns for name in found(pattern)] for part, patterns in PARTS.items()}
    return {part: [read(nbs/f'{name}.ipynb', nbs) for name in names] for part, names in parts.items() if names}


# which equation, which code, which test ------------------------------------------------------------------------------
def cited(text: str) -> list[str]: # numbers of the equations that a text names
    return list(dict.fromkeys(n for m in CITATION.finditer(text) for n in re.findall(r'\d+', m.group())))


def section(chapter: Chapter, cell: int) -> tuple[int, str]: # cell and title of the heading above a cell
    for i in range(cell, -1, -1):
        titles = re.findall(r'(?m)^#{1,4} (.*)', source(chapter.cells[i])) if is_markdown(chapter.cells[i]) else []
        if titles: return i, titles[-1]
    return 0, chapter.title


def equations_of(chapter: Chapter, name: Public) -> list[str]:
    "The equations that a name's docstring cites; where it cites none, those of the section that defines it."
    there, place = chapter.equations, chapter.definitions.get(name.name)
    said = [n for n in cited(name.doc) if n in there]
    if said or place is None: return said
    first = section(chapter, place)[0]
    return [n for n, i in there.items() if first <= i < place]


# what a reader sees --------------------------------------------------------------------------------------------------
def is_shown(cell: dict) -> bool:
    said = directives(cell)
    return not ('hide' in said or any(d.startswith('default_exp') for d in said) or 'nbdev_export' in source(cell))


def plain(text: str) -> str: # prose without its marks
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', re.sub(r'```.*?```|\$\$.*?\$\$', ' ', text, flags=re.S))
    return ' '.join(re.sub(r'(?m)[*`$>]|^#+ .*$', '', text).split())


def described(before: str) -> str: # the last sentences of the prose before a figure, to be read aloud in its place
    sentences = re.split(r'(?<=[.?!:]) +', plain(before))
    kept = ''
    for sentence in reversed(sentences):
        if kept and len(sentence) + len(kept) > 240: break
        kept = f'{sentence} {kept}'.strip()
    return kept[:400] or 'A figure that the code above draws'


def is_live(data: dict) -> bool: # an output that is empty without a running Python: a widget, or a frame of a server
    return 'application/vnd.jupyter.widget-view+json' in data or '<iframe' in ''.join(data.get('text/html', ''))


def code_cell(cell: dict, before: str) -> dict:
    "Without directives, and without widgets, which need a running Python; figures with words for a screen reader."
    kept = [o for o in cell['outputs'] if not is_live(o.get('data', {}))]
    text = re.sub(r'(?m)^#\|.*\n?', '', source(cell)).lstrip('\n')
    tags = cell['metadata'].get('tags', [])
    folded = ['hide-input'] if 'solution' in tags else [] # a learner opens it when he wants it
    shown = {'code_prompt_show': 'Show a solution', 'code_prompt_hide': 'Hide the solution'}
    metadata = {'tags': tags + folded, 'mystnb': shown | {'image': {'alt': described(before)}}}
    return cell | {'source': text, 'outputs': kept, 'metadata': metadata}


def target(*parts: str) -> str: return f'({slug(*parts)})='
def markdown(text: str) -> dict: return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


class Links:
    """What the text of one chapter can link to."""
    def __init__(self, chapter: Chapter, names: list[Public], tests: dict[str, list], root: Path = ROOT):
        self.chapter, self.tests, self.root = chapter, tests, root
        self.own = {n.name: n for n in names if n.module == chapter.module}
        code = [n for n in names if n.kind != 'data']
        count = Counter(n.name for n in code)
        self.names = {n.name: n for n in code if count[n.name] == 1 and len(n.name) > 4} | self.own
        self.equations = chapter.equations

    def name(self, code: str) -> str: # '`f`' or '`module.f(x)`', linked if it is a public name
        match = re.fullmatch(r'`(?:[\w.]+\.)?([A-Za-z]\w+)(?:\([^`]*\))?`', code)
        found = self.names.get(match.group(1)) if match else None
        return f'{{py:obj}}`{code.strip("`")} <{found.path}>`' if found and '<' not in code else code

    def citation(self, match: re.Match) -> str:
        def link(m): return f'[{m.group()}](#{slug("eq", self.chapter.name, m.group(1))})'
        return re.sub(r'\(?(\d+)\)?', lambda m: link(m) if m.group(1) in self.equations else m.group(), match.group())

    def file(self, link: str) -> str: # '[text](../results/x.json)': the file goes with the site
        match = re.fullmatch(r'(!?\[[^\]]*\])\(([^)\s#]+)(#[^)]*)?\)', link, re.S)
        if not match or '://' in link or match.group(2).endswith('.ipynb'): return link
        path = (self.chapter.path.parent/match.group(2)).resolve()
        up = '../' * self.chapter.name.count('/')
        if path == self.root/'docs/teaching.md': return f'{match.group(1)}({up}teaching.md)' # a page of its own
        if not path.is_file() or self.root not in path.parents: return link
        self.chapter.links.append(str(path.relative_to(self.root)))
        kind = '' if link[0] == '!' else 'path:' # no page of the site, even if its name ends in .md
        return f'{match.group(1)}(<{kind}{up}files/{path.relative_to(self.root)}>)'

    def piece(self, text: str) -> str: # a stretch of code, mathematics or a link
        return self.name(text) if text[0] == '`' and text[:3] != '```' else self.file(text) if text[0] in '![' else text

    def code_of(self, number: str) -> str: # the line below an equation: the code that states it, the tests that hold it
        functions = [n for n in self.own.values() if n.kind != 'data' and number in equations_of(self.chapter, n)]
        code = [f'{{py:obj}}`{n.name} <{n.path}>`' for n in functions[:4]]
        names = list(dict.fromkeys(t for n in functions for t in self.tests.get(n.path, [])))
        checks = [f'[{sentence(test).lower()}](#{slug("test", file, test)})' for file, test in names[:2]]
        parts = [p for p in (code and 'In code: ' + ', '.join(code), checks and 'tested: ' + '; '.join(checks)) if p]
        return '\n\n{.equation-links}\n' + '; '.join(parts) if parts else ''

    def equation(self, match: re.Match) -> str:
        number = match.group(1)
        return f'\n{target("eq", self.chapter.name, number)}\n{match.group()}{self.code_of(number)}\n'

    def text(self, cell: str) -> str:
        "A markdown cell with links: names to their page, citations to equations, equations to code and tests."
        out, end = [], 0
        for match in PROTECTED.finditer(cell):
            out += [CITATION.sub(self.citation, cell[end:match.start()]), self.piece(match.group())]
            end = match.end()
        return EQUATION.sub(self.equation, ''.join(out) + CITATION.sub(self.citation, cell[end:]))


def page(chapter: Chapter, links: Links) -> list[dict]: # the cells of its page
    place = {}
    for name, i in chapter.definitions.items(): place.setdefault(i, []).append(f'({definition(chapter.module, name)})=')
    cells, prose = [], ''
    for i, cell in enumerate(chapter.cells):
        if not is_shown(cell): continue
        if is_markdown(cell):
            prose = source(cell)
            cells.append(markdown(links.text(prose)))
            continue
        if i in place: cells.append(markdown('\n'.join(place[i])))
        cells.append(code_cell(cell, prose))
    return cells


def as_notebook(cells: list[dict]) -> str: # the text of a notebook file
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'},
              'language_info': {'name': 'python'}}
    cells = [{'id': f'c{i}'} | cell for i, cell in enumerate(cells)]
    return json.dumps({'cells': cells, 'metadata': kernel, 'nbformat': 4, 'nbformat_minor': 5}, ensure_ascii=False)

"""One page a module and one a file of tests: each public name with its source, an example that runs, and its tests."""
import ast, re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from chapters import (Chapter, definition, equations_of, is_export, is_markdown, is_shown, section, sentence, slug,
                      source)
from package import PACKAGE, ROOT, Public, section_of, words


@dataclass
class Example:
    code: str
    output: str # what it printed
    origin: str # where it runs, in words with a link


# examples ------------------------------------------------------------------------------------------------------------
def without_magic(code: str) -> str: # the notebook's own % and ! lines are no Python
    return re.sub(r'(?m)^(\s*)[%!].*$', r'\1pass', code)


class Uses:
    """Which cell and which test uses which word; read once, asked for every name."""
    def __init__(self, chapters: list[Chapter], root: Path = ROOT):
        self.chapters = chapters
        self.words = {c.name: {i: words(ast.parse(without_magic(source(cell)))) for i, cell in enumerate(c.cells)
                               if not is_markdown(cell)} for c in chapters}
        self.whole = {c.name: ''.join(map(source, c.cells)) for c in chapters}
        self.root = root

    def run_cells(self, chapter: Chapter, word: str) -> list[int]: # cells that were run and use a word
        cells = chapter.cells
        return [i for i, used in self.words[chapter.name].items()
                if word in used and is_shown(cells[i]) and not is_export(cells[i]) and cells[i].get('execution_count')]

    def near(self, name: Public) -> list[Chapter]: # its own notebook, then those that import from its module
        last = name.module.split('.')[-1]
        return sorted((c for c in self.chapters if c.module == name.module or f'{last} import' in self.whole[c.name]),
                      key=lambda c: c.module != name.module)

    def in_notebook(self, name: Public) -> Example | None:
        for chapter in self.near(name):
            used = self.run_cells(chapter, name.name.split('.')[-1])
            if used: return cell_example(chapter, min(used[:5], key=lambda i: source(chapter.cells[i]).count('\n')))

    def in_test(self, name: Public, tests: list[tuple[str, str]]) -> Example | None:
        if not tests: return None
        file, test = min(tests, key=lambda t: len(test_sources(self.root/f'tests/{t[0]}.py')[t[1]]))
        return Example(test_sources(self.root/f'tests/{file}.py')[test], '', f'a test: {test_link(file, test)}')

    def in_code(self, name: Public) -> Example | None: # the function that calls it
        for chapter in self.near(name):
            own = chapter.definitions.get(name.name) if chapter.module == name.module else None
            used = [i for i in self.words[chapter.name] if is_export(chapter.cells[i])
                    and len(re.findall(rf'\b{name.name}\b', source(chapter.cells[i]))) > (i == own)]
            if used: return Example(clean(chapter.cells[used[0]]), '', f'its caller, in {chapter_link(chapter)}')

    def in_terminal(self, name: Public) -> Example | None: # a command is called by nobody but its user
        if 'command' not in name.decorators: return None
        return Example(f'# in a terminal\n# pixart-delta {name.name.replace("_", "-")} --help', '', 'as a command')

    def example(self, name: Public, tests: list[tuple[str, str]]) -> Example | None:
        return self.in_notebook(name) or self.in_test(name, tests) or self.in_code(name) or self.in_terminal(name)


def clean(cell: dict) -> str: return re.sub(r'(?m)^#\|.*\n?', '', source(cell)).strip('\n')


def cell_example(chapter: Chapter, i: int) -> Example:
    printed = ''.join(''.join(o.get('text', '')) for o in chapter.cells[i]['outputs'] if o.get('name') == 'stdout')
    return Example(clean(chapter.cells[i]), printed[:600], f'a cell of {chapter_link(chapter)}')


@cache
def test_sources(path: Path) -> dict[str, str]: # what a file of tests defines -> its text, decorators included
    text = path.read_text(encoding='utf-8')
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        found[node.name] = '\n'.join(lines[first - 1:node.end_lineno])
    return found


# pages ---------------------------------------------------------------------------------------------------------------
def page_of(module: str) -> str: return 'api/' + module.replace('.', '/')
def chapter_link(chapter: Chapter) -> str: return f'{{doc}}`{chapter.title.replace("`", "")} </{chapter.name}>`'
def test_link(file: str, test: str) -> str: return f'[{sentence(test)}](#{slug("test", file, test)})'


def block(text: str, language: str) -> str:
    fence = '`' * max(3, 1 + max(map(len, re.findall(r'`+', text)), default=0))
    return f'{fence}{language}\n{text.rstrip()}\n{fence}'


def one_line(text: str) -> str: return ' '.join(text.split())


def fields(name: Public) -> str: # arguments and result, as Sphinx lists them
    lines = []
    for a in name.arguments:
        default = f' (default `{a.default}`)' if a.default and len(a.default) < 60 else ''
        lines.append(f':param {a.name.strip("*")}: {one_line(a.comment)}{default}')
        if a.annotation: lines.append(f':type {a.name.strip("*")}: {a.annotation}')
    if name.returns:
        if name.returns.comment: lines.append(f':returns: {one_line(name.returns.comment)}')
        lines.append(f':rtype: {name.returns.annotation}')
    return '\n'.join(lines)


def derivation(name: Public, chapter: Chapter) -> str:
    "Where it comes from: a section of the notebook, the equations there, the places of the report in its docstring."
    place = chapter.definitions.get(name.name)
    text = f'derived in {chapter_link(chapter)}'
    if place is not None:
        text += f', [{section(chapter, place)[1].replace("`", "")}](#{definition(name.module, name.name)})'
    found = equations_of(chapter, name)
    if found: text += ', equation ' + ', '.join(f'[({n})](#{slug("eq", chapter.name, n)})' for n in found[:6])
    report = section_of(name.doc)
    return text + (f'; {", ".join(report)} of the report' if report else '')


def directive(name: Public, content: str) -> str:
    default = lambda a: f'={a.default}' if a.default and len(a.default) < 40 else '=…' if a.default else ''
    short = [a.name + default(a) for a in name.arguments] # types stand in the list below it
    signature = '' if name.kind == 'data' else f'({", ".join(short)})'
    return f'::::{{py:{name.kind}}} {name.name}{signature}\n\n{content}\n::::\n'


def value(name: Public) -> str: # of data, if it is short enough to be read
    if name.kind != 'data' or not name.signature: return ''
    return block(name.signature[:300] + ' …' * (len(name.signature) > 300), 'python')


def evidence(name: Public, chapter: Chapter, uses: Uses, tests: list[tuple[str, str]]) -> list[str]:
    "Source, tests and example, a paragraph each."
    parts = [f'**Source:** {derivation(name, chapter)}.']
    more = f' and {len(tests) - 4} more' if tests[4:] else ''
    if tests: parts.append('**Tests:** ' + ', '.join(test_link(*t) for t in tests[:4]) + f'{more}.')
    example = uses.example(name, tests)
    if example is None: return parts
    parts += [f'**Example,** {example.origin}:', block(example.code, 'python')]
    return parts + ([block(example.output, 'text')] if example.output.strip() else [])


def entry(name: Public, chapter: Chapter, uses: Uses, tests: dict[str, list]) -> str:
    "The part of a page on one name."
    parts = [name.doc, value(name), fields(name)]
    parts += [f'`{m.name}{m.signature}`: {one_line(m.doc)}' for m in name.methods]
    if name.kind != 'data': parts += evidence(name, chapter, uses, tests.get(name.path, []))
    return directive(name, '\n\n'.join(p for p in parts if p))


def module_page(
    module: str, # without the package
    doc: str, # its docstring
    names: list[Public],
    chapter: Chapter, # the notebook that exports it
    uses: Uses,
    tests: dict[str, list] # path of a name -> its tests
) -> str: # Markdown
    head = f'---\norphan: true\n---\n\n# {module}\n\n{doc}\n\nDerived in {chapter_link(chapter)}.\n'
    load = block(f'from {PACKAGE}.{module} import …', 'python')
    entries = [entry(n, chapter, uses, tests) for n in sorted(names, key=lambda n: n.kind == 'data')]
    return '\n'.join([head, load, f'```{{py:currentmodule}} {PACKAGE}.{module}\n```\n', *entries])


def summary(path: Path) -> str: return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''


def tests_page(path: Path, root: Path = ROOT) -> str: # a file of tests, one section a test
    file = str(path.relative_to(root/'tests').with_suffix(''))
    tests = {name: text for name, text in test_sources(path).items() if name.startswith('test_')}
    parts = [f'({slug("test", file, name)})=\n## {sentence(name)}\n\n{block(text, "python")}'
             for name, text in tests.items()]
    return '\n\n'.join([f'---\nnosearch: true\norphan: true\n---\n\n# {file}\n\n{summary(path)}', *parts, ''])


def contents(title: str, summary: str, pages: dict[str, str]) -> str: # page -> what it is about
    short = lambda page: page.partition('/')[2].replace('/', '.')
    listed = [f'- {{doc}}`{short(page)} </{page}>`: {doc}' for page, doc in pages.items()]
    return '\n'.join([f'# {title}\n\n{summary}\n', *listed, ''])

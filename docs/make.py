"""The site in one command: `python docs/make.py` writes it to _docs/, without the network.

Pages are gathered from notebooks, modules and tests into _proc/, then Sphinx turns them into HTML."""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import api, chapters, package, slides, teaching
from package import ROOT

HERE = Path(__file__).resolve().parent


class Pages:
    """The folder that Sphinx reads. A page that has not changed is not written, so that only new ones are rendered."""
    def __init__(self, folder: Path):
        self.folder, self.kept = folder, set()

    def put(self, name: str, content: str | bytes) -> None:
        path, content = self.folder/name, content.encode() if isinstance(content, str) else content
        self.kept.add(path)
        if path.is_file() and path.read_bytes() == content: return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def sweep(self) -> None: # pages of an earlier build that are no more
        for path in self.folder.rglob('*'):
            if path.is_file() and path not in self.kept: path.unlink()


def toctree(caption: str, pages: list[str]) -> str:
    listed = '\n'.join(f'/{page}' for page in pages)
    return f'```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {caption}\n\n{listed}\n```\n'


def gather_book(book: dict, names: list, tests: dict, pages: Pages) -> None:
    "Every notebook as a page; the first one carries the table of contents."
    trees = [toctree(part, [c.name for c in found if c.name != 'index']) for part, found in book.items()]
    trees.append(toctree('Reference', ['teaching', 'api/index', 'tests/index']))
    for chapter in (c for found in book.values() for c in found):
        cells = chapters.page(chapter, chapters.Links(chapter, names, tests))
        if chapter.name == 'index': cells.append(chapters.markdown('\n'.join(trees)))
        pages.put(f'{chapter.name}.ipynb', chapters.as_notebook(cells))
        for link in chapter.links: pages.put(f'files/{link}', (ROOT/link).read_bytes())


def gather_api(modules: dict, tests: dict, book: dict, pages: Pages) -> None:
    "A page for every module, in the order of the notebooks."
    found = [c for part in book.values() for c in part]
    uses, home = api.Uses(found), {c.module: c for c in found if c.module}
    order = list(dict.fromkeys(c.module for c in found if c.module in modules))
    for module in order:
        pages.put(f'{api.page_of(module)}.md', api.module_page(module, *modules[module], home[module], uses, tests))
    summary = 'Every public name, with the section and equation it comes from, an example that runs, and its tests.'
    pages.put('api/index.md', api.contents('Modules', summary, {api.page_of(m): modules[m][0] for m in order}))


def gather_tests(pages: Pages) -> None:
    summaries = {}
    for path in sorted((ROOT/'tests').rglob('test_*.py')):
        page = f"tests/{path.relative_to(ROOT/'tests').with_suffix('')}"
        pages.put(f'{page}.md', api.tests_page(path))
        summaries[page] = api.summary(path)
    pages.put('tests/index.md', api.contents('Tests', 'What holds the code to its equations.', summaries))


def gather(folder: Path) -> None: # all pages of the site, for Sphinx
    modules, book, pages = package.modules(), chapters.book(), Pages(folder)
    names = [name for _, found in modules.values() for name in found]
    tests = package.tests(names)
    gather_book(book, names, tests, pages)
    gather_api(modules, tests, book, pages)
    gather_tests(pages)
    pages.put('teaching.md', teaching.from_book(book))
    pages.sweep()


def build(out: Path, folder: Path) -> int: # exit status of Sphinx
    from sphinx.cmd.build import main
    gather(folder)
    options = ['-q', '-b', 'html', '-j', 'auto', '-c', str(HERE), '-d', f'{folder}_doctrees']
    status = main([*options, str(folder), str(out)])
    slides.write_decks([c for found in chapters.book().values() for c in found], out/'slides')
    return status


if __name__ == '__main__': sys.exit(build(ROOT/'_docs', ROOT/'_proc'))

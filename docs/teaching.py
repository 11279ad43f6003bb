"""The instructor's guide: `python docs/teaching.py` writes teaching.md from teaching.in.md, plans.yaml and times.json."""
import configparser, re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlparse
from timing import seconds

HERE = Path(__file__).resolve().parent


@dataclass
class Block:
    """One part of a plan."""
    minutes: int
    title: str
    runs: str = '' # the notebook that runs meanwhile
    you: str = '' # what the teacher does, Markdown
    they: str = '' # what the students do, Markdown


def plans(path: Path = HERE/'plans.yaml') -> dict[str, list[Block]]: # 'half-day' and 'one-day'
    import yaml
    read = yaml.safe_load(path.read_text(encoding='utf-8'))
    return {name: [Block(**block) for block in blocks] for name, blocks in read.items()}


def clock(minutes: int) -> str: return f'{minutes // 60:02d}:{minutes % 60:02d}'


def lasts(seconds: float) -> str: # said as one would
    return f'{seconds:.0f} s' if seconds < 90 else f'{seconds/60:.0f} min'


def table(plan: list[Block], times: dict[str, float], start: int = 9*60) -> str: # Markdown
    rows, now = ['| from | min | part | you | they | runs for |', '| --- | --- | --- | --- | --- | --- |'], start
    for block in plan:
        run = lasts(times[block.runs]) if block.runs in times else ''
        rows.append(f'| {clock(now)} | {block.minutes} | **{block.title}** | {block.you} | {block.they} | {run} |')
        now += block.minutes
    return '\n'.join([*rows, f'| {clock(now)} | | end | | | |'])


def launch_links(git_url: str, branch: str, notebook: str = 'nbs/index.ipynb') -> dict[str, str]: # service -> address
    "Where a repository opens without an installation. Binder takes any public one, Colab those on GitHub."
    site, path = urlparse(git_url).netloc, urlparse(git_url).path.strip('/').removesuffix('.git')
    place = f'gh/{path}' if site == 'github.com' else f'git/{quote(git_url, safe="")}'
    found = {'Binder': f'https://mybinder.org/v2/{place}/{branch}?urlpath=lab/tree/{notebook}'}
    if site != 'github.com': return found
    return found | {'Colab': f'https://colab.research.google.com/github/{path}/blob/{branch}/{notebook}'}


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(HERE.parent/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def guide(
    decks: list[str], # slides to list
    questions: dict[str, str], # page -> title, of the pages that answer a question
    times: dict[str, float] | None = None # notebook -> seconds; those of times.json if None
) -> str: # Markdown of the page
    "The guide as a page of the site, with plans and lists of slides, of questions and of places that run the course."
    times, cfg = seconds() if times is None else times, settings()
    needed = {block.runs for block in plans()['one-day'] if block.runs}
    absent = ', '.join(sorted(needed - times.keys()))
    links = launch_links(cfg['git_url'], cfg['branch'])
    filled = {f'plan {name}': table(plan, times) for name, plan in plans().items()} | {
        'all runs': lasts(sum(times[name] for name in needed if name in times)),
        'unmeasured': f'Not measured yet, but each says in its opening what it takes: {absent}.' if absent else '',
        'slides': '\n'.join(f'- <a href="slides/{name}.html">{name}</a>' for name in decks),
        'questions': '\n'.join(f'- [{title}]({page}.ipynb)' for page, title in questions.items()),
        'git_url': cfg['git_url'], 'launch': ', '.join(f'[{name}]({link})' for name, link in links.items())}
    text = (HERE/'teaching.in.md').read_text(encoding='utf-8')
    for name, value in filled.items(): text = text.replace('{' + name + '}', value)
    return text


def in_repository(page: str) -> str: # Markdown of docs/teaching.md
    "The guide as a file of the repository: links lead to notebooks, and slides are named, since they are built."
    page = re.sub(r'\]\(([\w/.]+\.ipynb)\)', r'](../nbs/\1)', page)
    return re.sub(r'<a href="slides/\w+\.html">(\w+)</a>', r'`_docs/slides/\1.html`', page)


def from_book(book: dict) -> str: # the guide for the chapters that there are
    from slides import COURSE
    found = [chapter for part in book.values() for chapter in part]
    questions = {c.name: c.title for c in found if c.name.startswith('workshop/q')}
    return guide([c.name for c in found if c.name in COURSE], questions)


if __name__ == '__main__':
    from chapters import book
    (HERE/'teaching.md').write_text(in_repository(from_book(book())), encoding='utf-8')

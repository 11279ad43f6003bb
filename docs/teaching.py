"""The instructor's guide: teaching.md with its plans, whose clock and running times are computed."""
import configparser
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlparse
from timing import seconds

HERE = Path(__file__).resolve().parent


@dataclass
class Block:
    minutes: int
    title: str
    runs: str # the notebook that runs meanwhile, '' for none
    teach: str # what you do, Markdown
    learn: str # what they do, Markdown


BREAK = 'Break'
HALF_DAY = [
    Block(15, 'Everyone draws', '', 'Walk round. Who has no picture by five past sits beside somebody who has.',
          '`pixart-delta doctor`, `pixart-delta lab`, then the last section of [the index](index.ipynb).'),
    Block(25, 'PixArt-δ in ten minutes', 'index', 'Slides of the index. Before the four pictures, let them vote: which one is the network that was not distilled?',
          'They vote, then say what is missing in that picture.'),
    Block(40, 'Noise', '01_schedules', 'Slides of [schedules](01_schedules.ipynb) up to the two schedules of Figure 3.',
          'Exercises 1 and 2 of `exercises/01_schedules.ipynb`, in pairs.'),
    Block(30, 'One jump', '03_consistency', 'Slides of [consistency functions](03_consistency.ipynb); the live figure of a point beside its map.',
          'They predict what breaks without the boundary condition, and write it down.'),
    Block(15, BREAK, '', '', ''),
    Block(45, 'Algorithm 1', '04_toy', 'The loop of [the toy](04_toy.ipynb), line by line. Stop before the figure in which truth climbs from t = 0.',
          'They draw on paper where the map is right after few steps; then the exercise on the toy.'),
    Block(25, 'The student, live', 'workshop/live', '[Live figures](workshop/live.ipynb) and [the sketch pad](workshop/sketch.ipynb).',
          'They change steps, seed and caption, and draw their own edges.'),
    Block(10, 'How do you know?', '', '[Figure 7](evidence/fig7.ipynb) and [the dial](evidence/dial.ipynb): the control beside every claim.',
          'They name a claim that they would still doubt, and the measurement that would settle it.'),
    Block(5, 'Where to go on', '', '[The map of ideas](index.ipynb), and one row of [the disagreements](disagreements.ipynb) that surprised you.', 'They choose a notebook.'),
]
ONE_DAY = [
    *HALF_DAY[:4],
    Block(15, BREAK, '', '', ''),
    Block(30, 'Walking the path', '02_solvers', 'Slides of [solvers](02_solvers.ipynb): DDIM, order, what k costs.', 'The first two exercises of `exercises/02_solvers.ipynb`.'),
    HALF_DAY[5],
    Block(60, 'Lunch', '', '', ''),
    Block(35, 'The network', '06_transformer', '[The transformer](06_transformer.ipynb): the diagram of one block first, the code beside it.',
          'One exercise of `exercises/06_transformer.ipynb`.'),
    Block(40, 'Distillation of pictures', '08_lcd', '[Distillation](08_lcd.ipynb): the naive twenty lines, what goes wrong with them, then guidance.',
          'The exercises of `exercises/08_lcd.ipynb`.'),
    Block(25, 'Four evaluations', '09_sampling', '[Sampling](09_sampling.ipynb): where on the time axis they go; four wrong ways to sample a student.',
          'They guess which wrong way looks worst, then look.'),
    Block(15, BREAK, '', '', ''),
    Block(35, 'Control', '11_controlnet', '[ControlNet](11_controlnet.ipynb): the two wirings side by side, and why the copies start at zero.',
          'The sketch pad, then one exercise of `exercises/11_controlnet.ipynb`.'),
    Block(20, 'Small and smaller', '12_int8', '[Adapters](10_lora.ipynb) and [8 bit](12_int8.ipynb): what each of them saves.', 'They predict the memory before the cell says it.'),
    Block(25, 'How do you know?', '', '[The judge](evidence/judge.ipynb), [Figure 7](evidence/fig7.ipynb), [the dial](evidence/dial.ipynb), [the calibration](evidence/calibration.ipynb).',
          'In groups: one claim, its control, its interval, and what would change your mind.'),
    Block(10, 'Where to go on', '', '[The disagreements](disagreements.ipynb): what you would have got wrong from the report alone.', 'They choose a notebook.'),
]
PLANS = {'half-day': HALF_DAY, 'one-day': ONE_DAY}


def clock(minutes: int) -> str: return f'{minutes // 60:02d}:{minutes % 60:02d}'


def lasts(seconds: float) -> str: # said as one would
    return f'{seconds:.0f} s' if seconds < 90 else f'{seconds/60:.0f} min'


def table(plan: list[Block], times: dict[str, float], start: int = 9*60) -> str: # Markdown
    rows, now = ['| from | min | part | you | they | runs for |', '| --- | --- | --- | --- | --- | --- |'], start
    for block in plan:
        run = lasts(times[block.runs]) if block.runs in times else ''
        rows.append(f'| {clock(now)} | {block.minutes} | **{block.title}** | {block.teach} | {block.learn} | {run} |')
        now += block.minutes
    return '\n'.join([*rows, f'| {clock(now)} | | end | | | |'])


def launch_links(git_url: str, branch: str, notebook: str = 'nbs/index.ipynb') -> dict[str, str]: # service -> address
    "Where a repository opens without an installation. Binder takes any public one, Colab those on GitHub."
    site, path = urlparse(git_url).netloc, urlparse(git_url).path.strip('/').removesuffix('.git')
    if site != 'github.com': return {'Binder': f'https://mybinder.org/v2/git/{quote(git_url, safe="")}/{branch}?urlpath=lab/tree/{notebook}'}
    return {'Binder': f'https://mybinder.org/v2/gh/{path}/{branch}?urlpath=lab/tree/{notebook}',
            'Colab': f'https://colab.research.google.com/github/{path}/blob/{branch}/{notebook}'}


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(HERE.parent/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def guide(decks: list[str], questions: dict[str, str], times: dict[str, float] | None = None) -> str: # Markdown of the page
    "The guide with its plans, and its lists of slides, of pages on a question (page -> title) and of places that run the course."
    times, cfg = seconds() if times is None else times, settings()
    needed = {block.runs for block in ONE_DAY if block.runs}
    links = launch_links(cfg['git_url'], cfg['branch'])
    filled = {f'plan {name}': table(plan, times) for name, plan in PLANS.items()} | {
        'all runs': lasts(sum(times[name] for name in needed if name in times)),
        'slides': '\n'.join(f'- <a href="slides/{name}.html">{name}</a>' for name in decks),
        'questions': '\n'.join(f'- [{title}]({page}.ipynb)' for page, title in questions.items()),
        'git_url': cfg['git_url'], 'launch': ', '.join(f'[{name}]({link})' for name, link in links.items())}
    text = (HERE/'teaching.md').read_text(encoding='utf-8')
    for name, value in filled.items(): text = text.replace('{' + name + '}', value)
    return text

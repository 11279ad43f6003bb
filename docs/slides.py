"""Slides from the notebooks: sections become slides, and prose becomes the speaker's notes.

The rule in full. A section opens a slide with its heading, its first sentence, its equations, tables and boxes.
A figure gets a slide with the sentence that announces it, and so does code that the package exports, up to FITS lines.
All other prose is for the speaker: press S. Cells tagged `slide` are shown whole, those tagged `skip` are left out."""
import base64, html, json, re, shutil
from pathlib import Path
from chapters import Chapter, described, directives, is_export, is_markdown, is_shown, source

HERE = Path(__file__).resolve().parent
FITS = 16 # lines of code that can be read from the last row
COURSE = ['index', '01_schedules', '02_solvers', '03_consistency', '04_toy', '06_transformer', '08_lcd', '09_sampling',
          '10_lora', '11_controlnet', '12_int8']
SHOWN = re.compile(r'\$\$.*?\$\$|(?:^\|.*\n?)+|(?:^>.*\n?)+|(?:^(?:\d+\.|[-*]) .*(?:\n(?!\n).*)*\n?)+', re.S | re.M)
PAGE = '''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="../_static/favicon.svg">
<link rel="stylesheet" href="reveal/reset.css"><link rel="stylesheet" href="reveal/reveal.css">
<link rel="stylesheet" href="slides.css"></head>
<body><div class="reveal"><div class="slides">
{slides}
</div></div>
<script>window.MathJax = {mathjax};</script>
<script src="../_static/mathjax/tex-svg-full.js"></script>
<script src="reveal/reveal.js"></script><script src="reveal/notes.js"></script>
<script>
const look = {{hash: true, plugins: [RevealNotes], width: 1280, height: 720, margin: 0.06}};
MathJax.startup.promise.then(() => Reveal.initialize(look));
</script>
</body></html>
'''
MATHJAX = {'tex': {'inlineMath': [['$', '$']], 'displayMath': [['$$', '$$']]},
           'options': {'enableMenu': False, 'skipHtmlTags': ['code', 'pre', 'aside']}}


# what is shown, and what is said -------------------------------------------------------------------------------------
def lead(prose: str) -> str: # the first sentence of the first paragraph
    paragraphs = (p.strip() for p in re.split(r'\n\s*\n', prose))
    paragraph = next((p for p in paragraphs if re.match(r'[\w*`\[“"$]', p) and not SHOWN.match(p)), '')
    return re.split(r'(?<=[.?!]) +(?=[A-Z“])', ' '.join(paragraph.split()))[0]


def split(cell: str) -> tuple[str, str, list[str], str]: # heading, first sentence, what is shown, the whole prose
    heading = re.findall(r'(?m)^#{1,4} (.*)', cell)
    prose = re.sub(r'(?m)^#{1,4} .*$', '', cell)
    return (heading[0] if heading else ''), lead(prose), [m.strip() for m in SHOWN.findall(prose)], prose.strip()


def rendered(markdown: str) -> str: # HTML
    from markdown_it import MarkdownIt
    kept = []
    def keep(match):
        kept.append(html.escape(match.group()))
        return f'MATH{len(kept) - 1}HTAM'
    text = re.sub(r'\$\$.*?\$\$|\$[^$\n]+\$', keep, re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', markdown), flags=re.S)
    return re.sub(r'MATH(\d+)HTAM', lambda m: kept[int(m.group(1))], MarkdownIt().enable('table').render(text))


def inline(markdown: str) -> str: return rendered(markdown).strip().removeprefix('<p>').removesuffix('</p>')


def coloured(code: str) -> str: # HTML of Python
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    return highlight(code, PythonLexer(), HtmlFormatter(nowrap=False, noclasses=True, style='a11y-high-contrast-light'))


def slide(content: str, notes: str = '') -> str:
    return f'<section>{content}<aside class="notes">{rendered(notes) if notes else ""}</aside></section>'


def pictures(cell: dict, words: str) -> list[str]: # HTML of the figures that a cell has stored
    found = []
    for data in (o.get('data', {}) for o in cell['outputs']):
        kind = next((k for k in ('image/svg+xml', 'image/png', 'image/jpeg', 'image/webp') if k in data), None)
        if kind is None: continue
        body = ''.join(data[kind])
        body = base64.b64encode(body.encode()).decode() if 'svg' in kind else body.replace('\n', '')
        found.append(f'<img src="data:{kind};base64,{body}" alt="{html.escape(words, quote=True)}">')
    return found


def of_markdown(cell: dict) -> tuple[str, str]: # heading of a new section or '', the slide
    heading, first, shown, prose = split(source(cell))
    if 'slide' in cell['metadata'].get('tags', []): return heading, slide(rendered(source(cell)))
    level = 'h1' if source(cell).startswith('# ') else 'h2'
    title = f'<{level}>{inline(heading)}</{level}>' if heading else ''
    words = f'<p class="lead">{inline(first)}</p>' if first else ''
    return heading, slide(title + words + ''.join(map(rendered, shown[:2])), prose)


def of_code(cell: dict, before: str) -> list[str]: # slides: figures, then exported code that can be read
    words = described(before)
    caption = f'<p class="caption">{html.escape(words)}</p>'
    found = [slide(picture + caption, before) for picture in pictures(cell, words)]
    code = re.sub(r'(?m)^#\|.*\n?', '', source(cell)).strip()
    short = is_export(cell) and re.match(r'(?:@.*\n)*(?:def|class) ', code) and code.count('\n') < FITS
    if short or 'slide' in cell['metadata'].get('tags', []): found.append(slide(coloured(code), before))
    return found


def sections(chapter: Chapter) -> list[list[str]]: # the slides of each section
    found, before, stopped = [], '', False
    for cell in chapter.cells:
        if not is_shown(cell) or 'skip' in cell['metadata'].get('tags', []): continue
        if is_markdown(cell):
            before = source(cell)
            heading, made = of_markdown(cell)
            if re.match(r'##? ', before): stopped = heading.startswith(('Appendix', 'Exercises'))
            if heading and not stopped: found.append([made])
        elif found and not stopped: found[-1] += of_code(cell, before)
    return found


# the pages -----------------------------------------------------------------------------------------------------------
def deck(chapter: Chapter) -> str: # HTML
    slides = '\n'.join(f'<section>{"".join(group)}</section>' for group in sections(chapter))
    return PAGE.format(title=html.escape(chapter.title), slides=slides, mathjax=json.dumps(MATHJAX))


def write_decks(chapters: list[Chapter], out: Path) -> list[str]: # names of the decks
    "One deck a notebook of COURSE, and reveal.js beside them."
    shutil.copytree(HERE/'reveal', out/'reveal', dirs_exist_ok=True)
    shutil.copy(HERE/'slides.css', out/'slides.css')
    made = [c for c in chapters if c.name in COURSE]
    for chapter in made: (out/f'{chapter.name}.html').write_text(deck(chapter), encoding='utf-8')
    return [c.name for c in made]

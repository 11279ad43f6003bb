"""The site's own code: what is read from the sources, what a page shows, and what links to what. Building it is tested in browser/."""
import ast, json, sys
from functools import cache
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'docs'))
import api, chapters, package, slides, teaching, timing
sys.path.remove(str(ROOT/'docs'))


@cache
def sources():
    "Public names, chapters, and the tests of each name."
    names = [name for _, found in package.modules().values() for name in found]
    return names, [c for part in chapters.book().values() for c in part], package.tests(names)


def named(name): return next(n for n in sources()[0] if n.name == name)
def chapter(name): return next(c for c in sources()[1] if c.name == name)


def made(*cells, name='02_made', module='made'):
    kinds = [('markdown', c) if isinstance(c, str) else ('code', c[0]) for c in cells]
    built = [{'cell_type': kind, 'source': text, 'metadata': {}} | ({} if kind == 'markdown' else {'outputs': [], 'execution_count': 1}) for kind, text in kinds]
    return chapters.Chapter(ROOT/f'nbs/{name}.ipynb', name, built, module)


# the source ----------------------------------------------------------------------------------------------------------
def test_every_name_that_a_module_exports_is_read():
    for module, (doc, names) in package.modules().items():
        tree = ast.parse((ROOT/'pixart_delta_nb'/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
        assert [n.name for n in names] == package.exported(tree) and doc, module


def test_docments_are_read_with_their_argument():
    step = named('ddim_step')
    assert [a.name for a in step.arguments][:2] == ['x_t', 'eps'] and '(B, ...)' in step.arguments[0].comment
    assert step.returns.annotation == 'Tensor' and step.returns.comment


def test_a_comment_belongs_to_an_argument_that_has_its_line_to_itself():
    source = 'def f(a, b, # not of one\n      c=3, # the third\n      *rest, **more): # (B,)\n    "Sum."\n'
    notes = package.comments(source)
    found = package.function('m', ast.parse(source).body[0], notes)
    assert [(a.name, a.default, a.comment) for a in found.arguments] == [('a', '', ''), ('b', '', ''), ('c', '3', 'the third'), ('*rest', '', ''), ('**more', '', '')]


def test_tests_are_found_through_the_helpers_of_their_file():
    tree = ast.parse('from pixart_delta_nb.solvers import ddim_step\ndef near(): return ddim_step\ndef test_a(): near()\ndef test_b(): pass')
    assert 'ddim_step' in package.uses(tree)['test_a'] and package.uses(tree)['test_b'] == set()
    assert package.imported(tree) == {'solvers', 'solvers.ddim_step'}


def test_places_of_the_report_are_read_from_docstrings():
    assert package.section_of('One step (Algorithm 1, §3.3) as in Figure 7; §3.3.') == ['Algorithm 1', '§3.3', 'Figure 7']


# the pages -----------------------------------------------------------------------------------------------------------
def test_every_notebook_is_a_chapter_once():
    found = [c.name for c in sources()[1]]
    assert sorted(found) == sorted(str(p.relative_to(ROOT/'nbs').with_suffix('')) for p in (ROOT/'nbs').rglob('*.ipynb')
                                   if not any(part.startswith('.') for part in p.parts))
    assert len(found) == len(set(found))


def test_directives_and_housekeeping_are_not_shown_and_code_is():
    page = made('# T\n\n> S.', ['#| default_exp made'], ['#| export\ndef f(): pass'], ['#| hide\nimport nbdev; nbdev.nbdev_export()'], ['f()'])
    cells = chapters.page(page, chapters.Links(page, [], {}))
    assert [c['source'] for c in cells if c['cell_type'] == 'code'] == ['def f(): pass', 'f()']
    assert [c['source'] for c in cells if c['cell_type'] == 'markdown'] == ['# T\n\n> S.', '(def-made-f)=']


def test_equations_become_targets_that_citations_lead_to():
    page = made('# T\n\n> S.', 'By equation (1) and eq. 2 we know `x = equation (1)`.\n\n$$\na = b \\tag{1}\n$$\n\nSo.')
    text = chapters.page(page, chapters.Links(page, [], {}))[1]['source']
    assert '(eq-02-made-1)=\n$$' in text and 'equation [(1)](#eq-02-made-1) and eq. 2 we' in text and '`x = equation (1)`' in text


def test_below_an_equation_stand_its_code_and_its_test():
    solvers = chapter('02_solvers')
    names, _, tests = sources()
    text = '\n'.join(c['source'] for c in chapters.page(solvers, chapters.Links(solvers, names, tests)) if c['cell_type'] == 'markdown')
    after = text.split('(eq-02-solvers-7)=')[1].split('\n\n')[1]
    assert '<pixart_delta_nb.solvers.ddim_step>' in after and '(#test-test-solvers-test-ddim' in after.lower() or 'tested: ' in after


def test_names_in_prose_lead_to_their_page_and_other_code_stays():
    page = made('# T\n\n> S.', 'Take `ddim_step(x)`, `no_such_name` and `x<y`.', module='solvers')
    text = chapters.page(page, chapters.Links(page, sources()[0], {}))[1]['source']
    assert '{py:obj}`ddim_step(x) <pixart_delta_nb.solvers.ddim_step>`' in text and ', `no_such_name` and `x<y`.' in text


def test_files_that_prose_links_to_go_with_the_site():
    page = made('# T\n\n> S.', 'See [numbers](../results/fig3.json), ![](../results/fig3.svg), [next](03_consistency.ipynb) and [none](../no.txt).')
    text = chapters.page(page, chapters.Links(page, [], {}))[1]['source']
    assert text == 'See [numbers](<path:files/results/fig3.json>), ![](<files/results/fig3.svg>), [next](03_consistency.ipynb) and [none](../no.txt).'
    assert page.links == ['results/fig3.json', 'results/fig3.svg']


def test_figures_have_words_and_widgets_are_left_to_a_running_python():
    widget, picture = {'data': {'application/vnd.jupyter.widget-view+json': {}, 'text/plain': 'x'}}, {'data': {'image/png': 'AA'}}
    frame = {'data': {'text/html': ['<div><iframe src="http://127.0.0.1:7860/"></iframe></div>']}}
    cell = {'cell_type': 'code', 'source': 'draw()', 'metadata': {'tags': ['solution']}, 'outputs': [widget, frame, picture]}
    shown = chapters.code_cell(cell, '## Heading\n\nFirst. Where do the [two](a.ipynb) curves $x^2$ cross?')
    assert shown['outputs'] == [picture] and 'hide-input' in shown['metadata']['tags']
    assert shown['metadata']['mystnb']['image']['alt'] == 'First. Where do the two curves x^2 cross?'


# the API -------------------------------------------------------------------------------------------------------------
@cache
def uses(): return api.Uses(sources()[1])


def test_every_public_function_and_class_has_a_source_and_an_example_that_runs():
    names, found, tests = sources()
    home = {c.module: c for c in found}
    poor = [n.path for n in names if n.kind != 'data' and n.module in home and not (
        'derived in' in api.derivation(n, home[n.module]) and n.name in home[n.module].definitions and uses().example(n, tests.get(n.path, [])))]
    assert poor == []


def test_an_example_comes_from_a_cell_that_was_run_with_what_it_printed():
    example = uses().example(named('skip_grid'), [])
    assert 'skip_grid' in example.code and not example.code.startswith('#|') and '01_schedules' in example.origin


@pytest.mark.parametrize('name, origin', [('ddim_step', 'a cell of'), ('save_latents', 'a test:'), ('rng_states', 'its caller'), ('train_decoder', 'as a command')])
def test_examples_say_where_they_run(name, origin):
    found = next(n for n in sources()[0] if n.name == name)
    assert uses().example(found, sources()[2].get(found.path, [])).origin.startswith(origin)


def test_pages_of_tests_have_a_target_for_every_link():
    page = api.tests_page(ROOT/'tests/test_solvers.py')
    assert '(test-test-solvers-test-ddim-step-equals-diffusers)=\n## Ddim step equals diffusers' in page and 'nosearch: true' in page
    assert 'theirs' in page and json.dumps(page).count('```python') == page.count('\n## ')


# slides and the instructor's guide ----------------------------------------------------------------------------------------

def test_sections_become_slides_prose_becomes_notes_and_appendices_stay_at_home():
    figure = {'cell_type': 'code', 'source': 'draw()', 'metadata': {}, 'outputs': [{'data': {'image/png': 'AA==\n'}}]}
    page = made('# T\n\n> S.', '## A\n\nWhy? Because.\n\n$$x$$\n\nIt goes on.', ['#| export\ndef f(): pass'], '## Appendix: files\n\nNo.', '## Recap\n\n- One.')
    page.cells.insert(2, figure)
    found = slides.sections(page)
    assert [len(group) for group in found] == [1, 3, 1]
    head, shown, notes = found[1][0].partition('<aside')[0], found[1][1], found[1][0].partition('<aside')[2]
    assert '<h2>A</h2>' in head and 'Why?' in head and '$$x$$' in head and 'It goes on' not in head and 'It goes on' in notes
    assert 'data:image/png;base64,AA==' in shown and 'def' in found[1][2] and 'One.' in found[2][0]


def test_tags_choose_otherwise():
    page = made('# T\n\n> S.', '## A\n\nWhy?', ['x = 1'], ['y = 2'])
    page.cells[2]['metadata'], page.cells[1]['metadata'] = {'tags': ['slide']}, {'tags': ['skip']}
    assert [len(group) for group in slides.sections(page)] == [2]


def test_every_deck_of_the_course_has_slides_and_loads_nothing_from_elsewhere():
    for name in slides.COURSE:
        text = slides.deck(chapter(name))
        assert text.count('<section><section>') >= 4 and not [part for part in text.split('src="')[1:] if part.startswith('http')], name


def test_plans_end_when_they_say_and_their_notebooks_run_within_their_part():
    assert [sum(block.minutes for block in plan) for plan in teaching.plans().values()] == [210, 465]
    times = timing.seconds()
    for block in sum(teaching.plans().values(), []):
        assert not block.runs or (ROOT/f'nbs/{block.runs}.ipynb').is_file(), block.title
        assert times.get(block.runs, 0) < 60*block.minutes, block.title
    assert teaching.table(teaching.plans()['half-day'], {'index': 41., '04_toy': 150.}).splitlines()[-1].startswith('| 12:30 |')
    assert '| 41 s |' in teaching.table(teaching.plans()['half-day'], {'index': 41.}) and teaching.lasts(150) == '2 min'


def test_the_guide_is_complete_and_its_links_lead_somewhere():
    import re
    text = teaching.guide(['index'], {'workshop/live': 'Live'})
    assert '{' not in re.sub(r'```.*?```', '', text, flags=re.S) and 'slides/index.html' in text
    assert [link for link in re.findall(r'\]\(([^):]+\.ipynb)\)', text) if not (ROOT/'nbs'/link).is_file()] == []


def test_the_guide_in_the_repository_is_what_the_command_writes():
    text = (ROOT/'docs/teaching.md').read_text(encoding='utf-8')
    assert text == teaching.in_repository(teaching.from_book(chapters.book()))
    assert 'slides/' in text and '](../nbs/index.ipynb)' in text and '<a href' not in text


@pytest.mark.parametrize('url, places', [('https://github.com/a/b.git', {'Binder': '/v2/gh/a/b/main', 'Colab': '/github/a/b/blob/main/nbs/index.ipynb'}),
                                         ('https://example.org/b', {'Binder': '/v2/git/https%3A%2F%2Fexample.org%2Fb/main'})])
def test_courses_open_elsewhere_from_the_repository_alone(url, places):
    found = teaching.launch_links(url, 'main')
    assert found.keys() == places.keys() and all(places[name] in link for name, link in found.items())
    assert (ROOT/'.binder/requirements.txt').read_text().split() == ['-c', '../constraints.txt', '-e', '.[lab]']


def test_the_workflow_builds_with_the_one_command():
    import yaml
    steps = yaml.safe_load((ROOT/'.github/workflows/site.yml').read_text())['jobs']['build']['steps']
    assert [s['run'] for s in steps if 'run' in s] == ["pip install -c constraints.txt -e '.[docs]'", 'python docs/make.py']


def test_measured_times_are_added_to_the_file(tmp_path):
    timing.note({'a': 1.04}, tmp_path/'t.json')
    timing.note({'b': 3.}, tmp_path/'t.json')
    assert timing.seconds(tmp_path/'t.json') == {'a': 1., 'b': 3.} and [p.name for p in tmp_path.iterdir()] == ['t.json']

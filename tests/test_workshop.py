"""The workshop: each solution passes its checker, each named mistake is explained, nothing ends in a traceback, and the students' pages hold no answer."""
import ast, inspect, json, re
from functools import cache
from pathlib import Path

import pytest
import torch

from pixart_delta_nb.workshop.blanks import blank_source, blanks
from pixart_delta_nb.workshop.checks import Case, Exercise, check, exercises, hint, solution
from pixart_delta_nb.workshop.differences import fault_of, remark

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).parent.parent
ALL = exercises()
each = pytest.mark.parametrize('exercise', ALL, ids=lambda e: f'{e.number}-{e.name}')
functions = pytest.mark.parametrize('exercise', [e for e in ALL if not e.predicts and not e.judge], ids=lambda e: f'{e.number}-{e.name}')
PAGES = {p.name: json.loads(p.read_text(encoding='utf-8')) for p in sorted((ROOT/'nbs/workshop').glob('*.ipynb'))}
PAGES = {name: nb for name, nb in PAGES.items() if any('solution' in c['metadata'].get('tags', ()) for c in nb['cells'])}


def source(cell): return ''.join(cell['source'])
def tagged(notebook, tag): return [source(c) for c in notebook['cells'] if tag in c['metadata'].get('tags', ())]


@cache
def answers(name):
    "What the setup and solution cells of a page define."
    found = {}
    for cell in PAGES[name]['cells']:
        if {'setup', 'solution'} & set(cell['metadata'].get('tags', ())): exec(source(cell), found)
    return found


def page_of(exercise):
    "The page whose exported cells define an exercise."
    start = f' = Exercise(\n    {exercise.number}, '
    return next(name for name, nb in PAGES.items() if start in '\n'.join(source(c) for c in nb['cells']))


# every exercise -------------------------------------------------------------------------------------------------
def test_exercises_are_numbered_through_and_there_are_at_least_24():
    assert [e.number for e in ALL] == list(range(1, len(ALL) + 1)) and len(ALL) >= 24
    assert len({e.title for e in ALL}) == len(ALL)


@each
def test_the_solution_of_its_page_is_right(exercise):
    verdict = check(exercise, answers(page_of(exercise))[exercise.name])
    assert verdict and verdict.ok, verdict.words


@each
def test_every_named_mistake_is_rejected_in_its_own_words(exercise):
    assert len(exercise.mistakes) >= 3
    said = {words: check(exercise, wrong) for words, wrong in exercise.mistakes.items()}
    assert not [words for words, verdict in said.items() if verdict.ok or words not in verdict.words]
    assert all(re.fullmatch(r'[A-ZÄÖÜ].*[.…?!]', words, re.S) for words in said)


@each
def test_the_case_and_the_numbers_are_named_too(exercise):
    words = check(exercise, next(iter(exercise.mistakes.values()))).words
    assert exercise.predicts or exercise.trials()[0].words.lower() in words.lower() or re.match(r'Case \d of \d', words)
    assert re.search('expected|got|finite|raised', words)


@each
def test_cases_are_the_same_every_time(exercise):
    assert all(same(a.args, b.args) for a, b in zip(exercise.trials(), exercise.trials()))


def same(a, b):
    "Whether two sets of arguments agree in their tensors and numbers."
    kinds = (torch.Tensor, int, float)
    return len(a) == len(b) and all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b) if isinstance(x, kinds))


@each
def test_hint_and_solution_come_from_the_exercise_and_the_package(exercise):
    assert exercise.hint in repr(hint(exercise)) and exercise.hint[:20].split('<')[0] in hint(exercise)._repr_html_()
    assert 'pixart_delta_nb.' in solution(exercise).words and len(solution(exercise).code) > 20


# what nobody means to hand in -----------------------------------------------------------------------------------
def explodes(*args, **more): raise RuntimeError('the fuse is\nshort')


@each
@pytest.mark.parametrize('answer', [..., None, 'a word', explodes, lambda *args: None, lambda *args: ..., object()],
                         ids=['dots', 'None', 'word', 'exception', 'returns None', 'returns dots', 'object'])
def test_anything_is_answered_in_one_line(exercise, answer):
    verdict = check(exercise, answer)
    assert not verdict.ok and verdict.words and '\n' not in repr(verdict)


@functions
def test_none_exceptions_shapes_and_nan_have_their_words(exercise):
    right = answers(page_of(exercise))[exercise.name]
    def spoilt(change): return lambda *args: torch.utils._pytree.tree_map(change, right(*args))
    assert 'unfinished' in check(exercise, lambda *args: None).words
    assert 'RuntimeError (the fuse is short)' in check(exercise, explodes).words
    assert re.search(r'shape|got a tensor', check(exercise, spoilt(lambda x: torch.as_tensor(x)[None])).words)
    results = [torch.as_tensor(x) for x in torch.utils._pytree.tree_leaves(right(*exercise.trials()[0].args))]
    if all(x.is_floating_point() for x in results):
        assert 'not finite' in check(exercise, spoilt(lambda x: x*float('nan'))).words
        assert 'decimal numbers' in check(exercise, spoilt(lambda x: torch.as_tensor(x).long())).words
        assert 'three digits' in check(exercise, spoilt(lambda x: torch.as_tensor(x).half())).words


LITTLE = Exercise(999, 'doubling', 'Return 2 x.', lambda x: 2*x, {
    'You squared.': lambda x: x**2, 'You halved.': lambda x: x/2, 'You <tripled>.': lambda x: 3*x}, 'Twice.',
    lambda g: [Case('three numbers', (torch.rand(3, generator=g) + 2,)), Case('one number', (torch.ones(1),))], name='double')


@pytest.mark.parametrize('answer, words', [
    (lambda x: [2, 3, 4], 'a list'), (lambda x: 2*x[:1], r'shape \(3,\)'), (lambda x: (2*x).int(), 'decimal numbers'), (3, 'a function is asked for'),
    (lambda: 1, 'called with 1 argument'), (lambda x, y: x, 'called with 1 argument'), (lambda x: -2*x, 'sign is reversed'), (lambda x: 5*x, '2.5 times'),
    (lambda x: 2*x + 1, r'off by \+1'), (lambda x: (2*x).flip(0), 'reversed order'), (lambda x: x**2, 'You squared'), (lambda x: x/2, 'You halved'),
    (lambda x: torch.full_like(x, float('inf')), '3 of 3 numbers are not finite'), (lambda x: x.to(torch.complex64), 'complex64'),
    (lambda x: x.mul_(2)/2, '0.5 times')])
def test_wrong_answers_of_a_little_exercise(answer, words): assert re.search(words, check(LITTLE, answer).words)


def test_an_exception_is_shown_with_its_line():
    def answer(x):
        y = x + 1
        return y.double_it()
    assert 'in line 3 of it: `return y.double_it()`' in check(LITTLE, answer).words


def test_an_answer_may_change_its_arguments_and_the_random_state():
    before = torch.random.get_rng_state()
    def answer(x):
        torch.randn(3)
        return x.mul_(2)
    assert check(LITTLE, answer) and torch.equal(torch.random.get_rng_state(), before)


def test_a_mistake_that_explains_only_one_case_is_not_named():
    assert 'squared' not in check(LITTLE, lambda x: x**2 if len(x) == 3 else 7*x).words


def test_a_verdict_is_a_box_with_a_word_for_the_sign_and_a_line_in_a_terminal():
    right, wrong = check(LITTLE, lambda x: x + x), check(LITTLE, lambda x: 3*x)
    assert repr(right).startswith('✔ Exercise 999 (doubling): right.') and repr(wrong).startswith('✘ Exercise 999 (doubling): not yet.')
    html = wrong._repr_html_()
    assert 'role="status"' in html and '<span aria-hidden="true">✘</span>' in html and 'You &lt;tripled&gt;.' in html and 'not yet' in html


def test_an_exercise_without_three_mistakes_is_refused():
    with pytest.raises(ValueError, match='at least three'): Exercise(1, 'x', 'y', lambda: 1, {'A.': 1}, 'z')


def test_differences_and_remarks():
    assert fault_of((1., 2.), (1., 2.)) is None and 'value 2' in fault_of((1., 3.), (1., 2.)) and "x: " in fault_of({'x': 1}, {'x': 2})
    assert fault_of(True, True) is None and fault_of(1, True) and fault_of('a', 'b') and fault_of([1., 2.], (1., 2.)) is None
    assert remark(torch.zeros(2), torch.zeros(2)) == '' and 'squares' in remark(torch.tensor([4., 9.]), torch.tensor([2., 3.])) and remark({'x': 1}, 3.) == ''


# the students' pages --------------------------------------------------------------------------------------------
@cache
def generated(): return blanks(ROOT/'exercises')


def test_the_pages_are_what_generation_gives():
    stored = {p.name: p.read_text(encoding='utf-8') for p in sorted((ROOT/'exercises').glob('*.ipynb'))}
    assert stored.keys() == generated().keys() == PAGES.keys()
    assert not [name for name in stored if stored[name] != generated()[name]], 'run python -m pixart_delta_nb.workshop.blanks'


def bodies(code):
    "Lines of function bodies, without docstrings and without lines that are given."
    lines = code.split('\n')
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1:] if ast.get_docstring(node) is not None else node.body
            for part in first: yield from (ast.unparse(part).split('\n')[0], *lines[part.lineno - 1:part.end_lineno])


@pytest.mark.parametrize('name', PAGES)
def test_a_page_holds_no_answer_and_no_output(name):
    page = json.loads(generated()[name])
    cells = [''.join(c['source']) for c in page['cells'] if c['cell_type'] == 'code']
    shown = {line.strip() for text in cells for line in text.split('\n')}
    told = [line for code in tagged(PAGES[name], 'solution') for line in bodies(code) if '# given' not in line and not line.lstrip().startswith('def ')]
    given = {re.sub(r'\s*#\s*given\s*$', '', line).strip() for code in tagged(PAGES[name], 'solution') for line in code.split('\n') if '# given' in line}
    assert not {line.strip() for line in told} & (shown - given - {'...', ''})
    assert all(c.get('outputs', []) == [] and c.get('execution_count') is None for c in page['cells'])
    assert '#| export' not in generated()[name] and not any(words[:40] in text for e in ALL for words in e.mistakes for text in cells)


@pytest.mark.parametrize('name', PAGES)
def test_a_page_that_nobody_has_filled_in_runs_to_its_end(name, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'agg')
    found = {}
    for cell in json.loads(generated()[name])['cells']:
        if cell['cell_type'] == 'code': exec(''.join(cell['source']), found)
    mine = [e for e in ALL if page_of(e) == name]
    verdicts = [check(e, found[e.name]) for e in mine]
    assert mine and not any(verdicts) and all(v.words for v in verdicts)


@pytest.mark.parametrize('name', PAGES)
def test_links_of_a_page_lead_somewhere(name):
    text = ''.join(''.join(c['source']) for c in json.loads(generated()[name])['cells'] if c['cell_type'] == 'markdown')
    links = [link for link in re.findall(r'\]\(([^)#\s]+)', text) if '://' not in link]
    assert links and not [link for link in links if not (ROOT/'exercises'/link).exists()]


@pytest.mark.parametrize('code, wanted', [
    ('def f(x): return x', 'def f(x): ...'), ('x = 3', 'x = ...'), ('x: int = 3', 'x = ...'), ('import torch', 'import torch'),
    ('def f(x):\n    "Doc."\n    y = x\n    return y', 'def f(x):\n    "Doc."\n    ...'), ('print(3)', ''),
    ('def f(x):\n    y = x  # given\n    return y', 'def f(x):\n    y = x\n    ...'), ('@cache\ndef f(\n    x, # one\n):\n    return x', '@cache\ndef f(\n    x, # one\n):\n    ...'),
    ('class A(B):\n    "Doc."\n    def f(self): return 1\n    n = 3', 'class A(B):\n    "Doc."\n    def f(self): ...\n    n = ...')])
def test_what_is_left_of_an_answer(code, wanted): assert blank_source(code) == wanted

"""Sentences of the notebooks that state a direction or a ranking of printed numbers, held to the outputs stored beside them."""
import json, re
from functools import cache
from pathlib import Path

NBS = Path(__file__).parent.parent/'nbs'


@cache
def printed(name):
    "All text that a notebook printed, and its prose."
    cells = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    text = ''.join(''.join(o.get('text', '')) for c in cells for o in c.get('outputs', []))
    return text, '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def numbers_after(text, label):
    "The numbers on the line that begins with a label."
    line = re.search(rf'(?m)^\s*{re.escape(label)}(.*)$', text)
    assert line, f'no line begins with {label!r}'
    return [float(x) for x in re.findall(r'(?<![\w.])-?\d+\.?\d*(?:e-?\d+)?', line[1])]


def test_sampling_ranks_the_disagreements_as_its_table_does():
    text, prose = printed('09_sampling')
    row = lambda label: numbers_after(text, label)
    teacher = [row(f'teacher, {name}')[0] for name in ('schedule of SD', '3 of 4 channels', 'ω = 4.5', "null, caption's mask")]
    assert 'the wrong schedule changes most' in prose and teacher == sorted(teacher, reverse=True)
    student = [row(f'student, {name}')[0] for name in ('released times', 'schedule of SD', 'noise after the end')]
    assert 'the released times change least' in prose and student == sorted(student)
    assert 'takes away a third of the spread' in prose and .6 < row('student, schedule of SD')[1] < .75


def test_sampling_says_of_edges_and_walks_what_was_measured():
    text, prose = printed('09_sampling')
    four, two, one = (numbers_after(text, f'student, {steps}: edges')[0] for steps in ('4 steps', '2 steps', '1 step'))
    assert 'edges are a little weaker' in prose and max(four, two) < 1 < one
    right, wrong = (numbers_after(text, f'perfect student, {name}: distance from the true end')[0] for name in ('right schedule', 'schedule of SD'))
    assert 'its distance is ten times as large' in prose and 8 < wrong/right < 13
    assert 'closer to it than the teacher' in prose and right < numbers_after(text, 'teacher, 14 steps: distance')[0]


def test_sampling_leaves_the_V100_its_rounding():
    text, prose = printed('09_sampling')
    low, high = re.search(r'V100:.*, (-?[\d.]+) to ([\d.]+) evaluations', text).groups()
    assert 'the interval contains zero and ends well below one evaluation' in prose and float(low) < 0 < float(high) < .6


def test_the_toy_says_where_four_steps_are_worse_than_one():
    text, prose = printed('04_toy')
    mean, half = (float(x) for x in re.search(r'four steps minus one: (-?[\d.]+) ± ([\d.]+)', text).groups())
    assert 'Without guidance the rule is the whole reason' in prose and mean > half
    repaired, one = (numbers_after(text, f'ω = 0.0: {name}')[0] for name in ('exact at the last', 'student, one step'))
    assert repaired < one/2
    assert 'the map is worse at 259' in text and 'the map is better at 259' in text          # without guidance, and with it


def test_the_wanted_change_of_the_adapter_is_of_low_rank():
    text, prose = printed('10a_lcm_lora')
    shares = [int(x) for x in re.findall(r'first eight (\d+)%', text)]
    assert 'lies mostly in a few directions' in prose and shares and min(shares) > 90


def test_the_adapter_loses_most_with_one_step():
    text, prose = printed('10a_lcm_lora')
    pairs = re.findall(r'accuracy ([\d.]+) with the adapter, ([\d.]+) with the full student', text)
    lost = [float(full) - float(adapter) for adapter, full in pairs]                         # 4, 2, 1 steps
    assert 'small with four steps and two, and largest with one' in prose and len(lost) == 3 and lost[2] > 2*max(lost[:2])

"""The five jobs of a newcomer: the very cells of the front door's page, run as they stand."""
import json, os
from pathlib import Path
import pytest

PAGE = Path(__file__).parents[1]/'nbs/front_door.ipynb'
JOBS = ('Distil my folder', 'Train a ControlNet on it', 'Swap the scheduler', 'Use the student in diffusers', '`lcd_step` in my own loop, with a UNet')


def sections():
    "Headings of the page and the code cells below each."
    found, heading = {}, None
    for cell in json.loads(PAGE.read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            for line in text.splitlines():
                if line.startswith('## '): heading = line[3:]; found[heading] = []
        elif heading: found[heading].append(text)
    return found


@pytest.fixture(scope='module')
def prepared():
    "Names and folder after the cell that makes a model and pictures."
    before, names = Path.cwd(), {}
    for code in sections()['Something to work on']: exec(code, names)
    folder = Path.cwd()
    os.chdir(before)
    return names, folder


@pytest.mark.parametrize('job', JOBS)
def test_the_job_runs_as_it_stands(job, prepared, monkeypatch):
    names, folder = prepared
    monkeypatch.chdir(folder)
    cells = sections()[job]
    example = max((code for code in cells if 'from pixart_delta_nb import' in code), key=len)
    assert len(example.splitlines()) <= 12 and max(map(len, example.splitlines())) <= 120
    names = dict(names)
    for code in cells: exec(code, names)


def test_the_page_has_these_jobs_and_no_other_code():
    assert [heading for heading, cells in sections().items() if cells] == ['Something to work on', *JOBS]

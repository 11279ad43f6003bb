"""The table of accuracies by category."""
import pytest
import torch
from torch import nn

from pixart_delta_nb.evidence.attributes import ROWS, accuracy_table, table_lines
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.words import ATTRIBUTES, attributes


pytestmark = pytest.mark.usefixtures('one_thread')


class Reads(nn.Module):
    "Reads everything right by looking the scene up, apart from the attributes in `blind`."
    def __init__(self, labels, blind=()):
        super().__init__()
        self.labels, self.blind, self.p = labels, blind, nn.Parameter(torch.zeros(()))
    def forward(self, images):
        rows = self.labels[(images[:, 0, 0, 0]*255).round().long()].clamp_min(0)
        return [nn.functional.one_hot((rows[:, a] + (name in self.blind)) % len(v), len(v)).float() for a, (name, v) in enumerate(ATTRIBUTES.items())]


@pytest.mark.parametrize('blind,row', [(('sky',), 'sky'), (('layout',), 'relation'), (('colour0', 'colour1', 'colour2'), 'colour')])
def test_table_shows_the_one_category_that_fails(blind, row):
    labels, calls = [], []
    for pairs in ('seen', 'unseen'): labels.append(torch.stack([attributes(make(5, i, pairs)[0]) for i in range(12)]))
    def draw(captions):
        calls.append(captions)
        return torch.arange(12).reshape(12, 1, 1, 1).expand(12, 3, 2, 2)/255
    class Both(Reads):
        def forward(self, images): self.labels = labels[len(calls) - 1]; return super().forward(images)
    table = accuracy_table(draw, Both(labels[0], blind), 12, seed=5)
    assert [c for c in calls] == [[make(5, i, p)[1] for i in range(12)] for p in ('seen', 'unseen')]
    for column in table.values():
        assert column[row] == 0 and all(column[r] == 1 for r in ROWS if 'object' not in r and r != row and r in column)
        assert column['whole picture'] <= 1 - column['all'] or column['all'] < 1
    assert table_lines(table).splitlines()[0].split() == ['seen', 'unseen']


def test_table_lines_show_a_row_nobody_asked_for():
    assert table_lines({'seen': {'sky': .5}}).splitlines()[-3].split() == ['sky', '0.500']
    assert table_lines({'seen': {'sky': .5}}).splitlines()[1].split()[-1] == '-'

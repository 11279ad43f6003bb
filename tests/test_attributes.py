"""The table of accuracies by category."""
import pytest
import torch
from torch import nn

from pixart_delta_nb.evidence.attributes import COLUMNS, ROWS, accuracy_table, table_lines
from pixart_delta_nb.evidence.judge import ABSENT, as_scores
from pixart_delta_nb.world.captions import make
from pixart_delta_nb.world.words import ATTRIBUTES, attributes


pytestmark = pytest.mark.usefixtures('one_thread')


class Reads(nn.Module):
    "Reads everything right by looking the scene up, apart from the attributes in `blind`."
    def __init__(self, labels, blind=()):
        super().__init__()
        self.labels, self.blind, self.p = labels, blind, nn.Parameter(torch.zeros(()))
    def forward(self, images):
        rows = self.labels[(images[:, 0, 0, 0]*255).round().long()].clone()
        for a, (name, values) in enumerate(ATTRIBUTES.items()):
            if name in self.blind: rows[:, a] = torch.where(rows[:, a] < 0, -1, (rows[:, a] + 1) % len(values))
        return as_scores(rows)*100


SLOTS = [f'colour{i}' for i in range(4)]


@pytest.mark.parametrize('blind,row', [(('sky',), 'sky'), (('layout',), 'place'), (SLOTS, 'colour'), (('light',), 'light')])
def test_table_shows_the_one_category_that_fails(blind, row):
    made = [[make(5, i, pairs, 'full', split) for i in range(12)] for pairs, split in COLUMNS.values()]
    labels = [torch.stack([attributes(s, order=c.order) for s, c in column]) for column in made]
    calls = []
    def draw(captions):
        calls.append(captions)
        return torch.arange(12).reshape(12, 1, 1, 1).expand(12, 3, 2, 2)/255
    class Each(Reads):
        def forward(self, images): self.labels = labels[len(calls) - 1]; return super().forward(images)
    table = accuracy_table(draw, Each(labels[0], blind), 12, seed=5)
    assert calls == [[c.text for _, c in column] for column in made] and ABSENT >= 8
    for column in table.values():
        assert column[row] == 0 and all(column[r] == 1 for r in ROWS if 'thing' not in r and r != row and r in column)
        assert column['whole picture'] < 1 and column['all'] < 1
    assert table_lines(table).splitlines()[0].split() == ['seen', 'unseen', 'new', 'words']


def test_table_lines_show_a_row_nobody_asked_for():
    lines = {line.split()[0]: line.split()[1:] for line in table_lines({'seen': {'sky': .5}}).splitlines()[1:]}
    assert lines['sky'] == ['0.500'] and lines['light'] == ['-']

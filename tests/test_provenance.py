"What a result carries so that it can be made again."
import json, time
import pytest, torch
from pixart_delta_nb.provenance import provenance


def test_provenance_names_what_a_rerun_needs():
    record = provenance('make table', {'noise': 1}, time.time() - 1)
    assert set(record) == {'command', 'seeds', 'commit', 'versions', 'hardware', 'finished', 'wall_seconds'}
    assert record['versions']['torch'] == torch.__version__ and 1 <= record['wall_seconds'] < 60
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize('started', [0, float('nan'), 1e12])
def test_provenance_refuses_an_impossible_start(started):
    with pytest.raises(ValueError, match='started is'): provenance('x', {}, started)

"Core: errors, seeds, figures, files, provenance."
import hashlib
import json
import os
import time

import numpy as np
import pytest
import torch

from pixart_delta_nb import core


def test_require_raises_only_when_the_rule_is_broken():
    core.require(True, 'unused')
    with pytest.raises(ValueError, match='^k is 3$'): core.require(False, 'k is 3')


def test_seed_everything_repeats_the_global_states():
    core.seed_everything(3); first = torch.rand(2).tolist(), np.random.rand()
    core.seed_everything(3); assert first == (torch.rand(2).tolist(), np.random.rand())


def test_generator_ignores_global_draws():
    generator = core.seed_everything(3)
    torch.rand(10)
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize('seed', [-1, 2**32, 1.5, '3'])
def test_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match='seed is'): core.seed_everything(seed)


def test_image_grid_places_rows_and_columns():
    images = torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    fig = core.image_grid(images, ['a', 'b'], ['x', 'y', 'z'])
    shown = torch.as_tensor(np.asarray(fig.axes[4].images[0].get_array()))        # second row, second column
    assert torch.equal(shown, images[1, 1].permute(1, 2, 0))
    assert [axis.get_title() for axis in fig.axes[:3]] == ['x', 'y', 'z']
    assert [fig.axes[0].get_ylabel(), fig.axes[3].get_ylabel()] == ['a', 'b']


def test_image_grid_takes_half_precision_with_gradient():
    core.image_grid(torch.full((1, 1, 3, 2, 2), .5, dtype=torch.bfloat16, requires_grad=True))


@pytest.mark.parametrize('images, message', [
    (torch.zeros(2, 3, 4, 4), 'shape'), (torch.full((1, 1, 3, 2, 2), 1.5), 'spans'),
    (torch.full((1, 1, 3, 2, 2), float('nan')), 'nan'), (torch.zeros(0, 1, 3, 2, 2), 'shape')])
def test_image_grid_refuses(images, message):
    with pytest.raises(ValueError, match=message): core.image_grid(images)


def test_figure_style_sets_the_palette():
    import matplotlib as mpl
    with mpl.rc_context():
        core.use_style()
        assert mpl.rcParams['axes.prop_cycle'].by_key()['color'] == core.PALETTE


def test_write_atomic_keeps_the_old_file_on_failure(tmp_path):
    target = tmp_path/'a'/'note.txt'
    core.write_atomic(target, lambda path: path.write_text('old'))
    def fail(path):
        path.write_text('half'); raise RuntimeError('stop')
    with pytest.raises(RuntimeError): core.write_atomic(target, fail)
    assert target.read_text() == 'old' and os.listdir(target.parent) == ['note.txt']


def test_write_atomic_hands_over_the_suffix(tmp_path):
    suffixes = []
    core.write_atomic(tmp_path/'x.png', lambda path: (suffixes.append(path.suffix), path.write_bytes(b'')))
    assert suffixes == ['.png']


def test_sha256_of_the_empty_file(tmp_path):
    (tmp_path/'empty').touch()
    assert core.sha256(tmp_path/'empty') == 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'


def test_sha256_reads_past_one_piece(tmp_path):
    content = os.urandom(2**20 + 7)
    (tmp_path/'big').write_bytes(content)
    assert core.sha256(tmp_path/'big') == hashlib.sha256(content).hexdigest()


def test_tensors_round_trip_with_shared_memory_and_strides(tmp_path):
    base = torch.arange(6.).reshape(2, 3)
    stored = {'a': base, 'b': base.T, 'c': torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}
    loaded = core.load_tensors(core.save_tensors(tmp_path/'t.safetensors', stored, {'step': 4, 'name': 'x'}))
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[k], stored[k]) for k in stored)
    metadata = core.load_metadata(tmp_path/'t.safetensors')
    assert json.loads(metadata['step']) == 4 and metadata['name'] == 'x'


def test_files_are_equal_byte_for_byte_when_saved_twice(tmp_path):
    stored, metadata = {'b': torch.ones(3), 'a': torch.zeros(2)}, {f'key {i} ü': i for i in range(9)}
    paths = [core.save_tensors(tmp_path/f'{i}.safetensors', stored, metadata) for i in range(2)]
    assert core.sha256(paths[0]) == core.sha256(paths[1])


@pytest.mark.parametrize('damage', [lambda raw: raw[:-1], lambda raw: b'', lambda raw: b'\xff' * len(raw)])
def test_damaged_file_is_refused_in_one_sentence(tmp_path, damage):
    path = core.save_tensors(tmp_path/'t.safetensors', {'a': torch.ones(3)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match='t.safetensors is damaged') as error: core.load_tensors(path)
    assert '\n' not in str(error.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match='no.safetensors is missing'): core.load_tensors(tmp_path/'no.safetensors')


def test_provenance_names_what_a_rerun_needs():
    record = core.provenance('make table', {'noise': 1}, time.time() - 1)
    assert set(record) == {'command', 'seeds', 'commit', 'versions', 'hardware', 'finished', 'wall_seconds'}
    assert record['versions']['torch'] == torch.__version__ and 1 <= record['wall_seconds'] < 60
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize('started', [0, float('nan'), 1e12])
def test_provenance_refuses_an_impossible_start(started):
    with pytest.raises(ValueError, match='started is'): core.provenance('x', {}, started)


def test_metadata_of_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match='no.safetensors is missing'): core.load_metadata(tmp_path/'no.safetensors')
    (tmp_path/'x.safetensors').write_bytes(b'no header')
    with pytest.raises(ValueError, match='x.safetensors is damaged'): core.load_metadata(tmp_path/'x.safetensors')

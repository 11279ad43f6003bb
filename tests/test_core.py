"Core: errors, seeds, precision, files, messages."
import hashlib, json, os, subprocess, sys, threading

import numpy as np
import pytest
import torch
from tqdm import tqdm

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


def test_metadata_of_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match='no.safetensors is missing'): core.load_metadata(tmp_path/'no.safetensors')
    (tmp_path/'x.safetensors').write_bytes(b'no header')
    with pytest.raises(ValueError, match='x.safetensors is damaged'): core.load_metadata(tmp_path/'x.safetensors')


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o007])
def test_written_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try: path = core.save_tensors(tmp_path/'t.safetensors', {'a': torch.ones(3)})
    finally: os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize('place, words', [('', 'is a folder'), ('file/below', 'file is a file'), ('file/deep/er', 'file is a file')])
def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path, place, words):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match=words) as error: core.save_tensors(tmp_path/place, {'a': torch.ones(3)})
    assert '\n' not in str(error.value) and sorted(p.name for p in tmp_path.iterdir()) == ['file']


@pytest.mark.parametrize('dtype', ['bfloat16', 'torch.bfloat16', torch.bfloat16])
def test_a_precision_has_a_name(dtype): assert core.as_dtype(dtype) == torch.bfloat16


@pytest.mark.parametrize('dtype', ['int8', 'bf 16', '', 'nn', 3, None, torch.int32])
def test_what_is_no_precision_is_refused(dtype):
    with pytest.raises(ValueError, match='floating'): core.as_dtype(dtype)


def test_a_quoted_text_is_one_short_line():
    for text in ('a\nb', 'x'*10**6, 'word '*10**6, '\n'*10**6, ''):
        assert '\n' not in core.one_line(text) and len(core.one_line(text)) <= 80
    assert core.one_line('a red cube') == 'a red cube' and core.one_line('ab'*50, 10) == 'ababababa…'


def test_warnings_and_errors_pass_an_ascii_console():
    code = """import warnings
from pixart_delta_nb.core import one_line, require
warnings.warn(one_line('\\u732b \\u03c9'))
require(False, '\\u03c9 is \\u732b')"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    assert b'UnicodeEncodeError' not in done.stderr and b'ValueError' in done.stderr and done.stderr.count(rb'\u732b') == 2


def test_silence_needs_no_thread_and_no_lock_that_a_killed_process_would_leave_shut():
    before = threading.active_count()
    bar = core.progress(range(3), shown=False)
    assert list(bar) == [0, 1, 2] and not isinstance(bar, tqdm) and threading.active_count() == before
    with core.progress(total=2, shown=False) as bar: assert bar.update() is bar.set_postfix(loss=1) is None

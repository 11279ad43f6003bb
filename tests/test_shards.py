"Shards of latents and text: any crash, any change, any damage, any step."
import io, itertools, math, os, signal, subprocess, sys
import numpy as np
import pytest, torch
from PIL import Image
from pixart_delta_nb import writing
from pixart_delta_nb.core import load_tensors
from pixart_delta_nb.data import precompute
from pixart_delta_nb.encoding import encoder_operations, keyed, short_digest, storage_bytes
from pixart_delta_nb.latents import LatentDataset
from pixart_delta_nb.pictures import Item, aspect_bins, fit, nearest_bin
from pixart_delta_nb.pipeline import tiny_pipeline
from pixart_delta_nb.shards import ShardReader, ShardRows, check_shards, read_manifest, streamed

OPTIONS = dict(size=96, shard_size=4, batch_size=2, dtype='float32', workers=2, progress=False)
SIZES = ((64, 64), (60, 90), (90, 60))


def picture(i):
    h, w = SIZES[i % 3]
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (h, w, 3), dtype=np.uint8))


def caption(i): return f'Number {i % 5}' + ' again'*(i % 5)


@pytest.fixture(scope='module')
def pipe():
    torch.set_num_threads(1)
    return tiny_pipeline(captions=[caption(i) for i in range(5)] + ['corrected'])


@pytest.fixture(scope='module')
def rows(): return [{'image': picture(i), 'text': caption(i)} for i in range(30)]


@pytest.fixture(scope='module')
def made(pipe, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp('shards')/'made'
    return out, precompute(pipe, rows, out=out, **OPTIONS).report


@pytest.fixture
def copy(made, tmp_path):
    import shutil
    return shutil.copytree(made[0], tmp_path/'copy')


def png(image):
    out = io.BytesIO()
    image.save(out, 'PNG')
    return out.getvalue()


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob('*.safetensors')}


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_bytes_on_paper():
    assert storage_bytes(3, 512) == (3*2*4*64*64, 3*2*120*4096)
    assert storage_bytes(3, 512, tokens=7, captions=2, width=5)[1] == 2*2*7*5
    for wrong in ((0, 512), (5, 100)):
        with pytest.raises(ValueError, match='multiple of 8'): storage_bytes(*wrong)


def test_operations_grow_with_the_area(pipe):
    assert encoder_operations(pipe.vae, 128) == 4*encoder_operations(pipe.vae, 64)


def number_of(rows):
    "{key of a row: its number}."
    return {key: i for i, (_, key) in enumerate(keyed((Item(f'row {i}', r['image'], r['text']) for i, r in enumerate(rows)), 2, 4))}


def served(folder):
    "Keys of all rows that a folder serves."
    rows = ShardRows(folder)
    keys = torch.cat([load_tensors(folder/s['file'])['key'] for s in rows.images])
    return keys[torch.cat(rows.bins)].tolist()


def test_report(made, rows):
    out, report = made
    size = sum(p.stat().st_size for p in out.glob('latent*')) + sum(p.stat().st_size for p in out.glob('text*'))
    assert (report['images'], report['captions'], report['skipped'], report['bytes']) == (30, 5, [], size)
    assert (report['encoded'], report['kept'], report['gone']) == (30, 0, 0)
    assert report['bytes_per_image'] == size/30 and report['images_per_second'] > 0


def test_rows_of_shards_are_the_pictures(made, pipe, rows):
    numbers, seen = number_of(rows), []
    for shard in read_manifest(made[0])['images']:
        t = load_tensors(made[0]/shard['file'])
        for row, z, size in zip([numbers[k] for k in t['key'].tolist()], t['latents'], t['size'].tolist()):
            x = fit(rows[row]['image'], nearest_bin(*SIZES[row % 3], aspect_bins(96)))/127.5 - 1
            with torch.no_grad(): assert torch.allclose(pipe.vae.encode(x[None]).latent_dist.mode()[0]*.5, z, atol=1e-5)
            assert tuple(size) == SIZES[row % 3]
            seen.append(row)
    assert sorted(seen) == list(range(30))


# killed and continued

@pytest.mark.parametrize('every', [60., 0.])
@pytest.mark.parametrize('stop', [1, 11, 17, 29])
def test_interrupted_and_continued_gives_the_same_bytes(made, pipe, rows, tmp_path, stop, every, monkeypatch):
    monkeypatch.setattr(writing.Spills, "EVERY", every)
    def failing():
        yield from rows[:stop]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): precompute(pipe, failing(), out=tmp_path/'out', **OPTIONS)
    report = precompute(pipe, rows, out=tmp_path/'out', **OPTIONS).report
    assert files(tmp_path/'out') == files(made[0]) and report['images'] == 30
    if every == 0 and stop > 11: assert report['encoded'] < 30


def test_many_interruptions_with_spills_give_the_same_bytes(made, pipe, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(writing.Spills, "EVERY", 0.)
    for stop in (9, 14, 15, 20, 28):
        with pytest.raises(OSError): precompute(pipe, itertools.chain(rows[:stop], fail_with(OSError)), out=tmp_path/'out', **OPTIONS)
    precompute(pipe, rows, out=tmp_path/'out', **OPTIONS)
    assert files(tmp_path/'out') == files(made[0])


def fail_with(error):
    raise error('the source broke')
    yield


def test_a_source_that_fails_leaves_what_was_encoded(pipe, rows, tmp_path):
    with pytest.raises(OSError): precompute(pipe, itertools.chain(rows[:20], fail_with(OSError)), out=tmp_path, **OPTIONS | dict(shard_size=100))
    assert list(tmp_path.glob('spill-*')) and not list(tmp_path.glob('latent-*'))
    assert precompute(pipe, rows, out=tmp_path, **OPTIONS | dict(shard_size=100)).report['encoded'] < 20


def test_crash_between_shard_and_manifest(made, pipe, rows, tmp_path, monkeypatch):
    manifest, calls = writing.ShardFolder.manifest, itertools.count()
    def failing(self, *args, **facts):
        if next(calls) == 3: raise KeyboardInterrupt
        manifest(self, *args, **facts)
    monkeypatch.setattr(writing.ShardFolder, 'manifest', failing)
    with pytest.raises(KeyboardInterrupt): precompute(pipe, rows, out=tmp_path/'out', **OPTIONS)
    monkeypatch.undo()
    precompute(pipe, rows, out=tmp_path/'out', **OPTIONS)
    assert files(tmp_path/'out') == files(made[0])


STOPPING = """
import sys, time, numpy as np, torch
from PIL import Image
from pixart_delta_nb.data import precompute
from pixart_delta_nb.pipeline import tiny_pipeline
def rows():
    for i in range(2000):
        if i == 30: print('ready', flush=True)
        if i > 30: time.sleep(.02)
        yield {'image': Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)), 'text': 'a red cube'}
precompute(tiny_pipeline(), rows(), out=sys.argv[1], size=64, shard_size=1000, batch_size=2, workers=2)
"""


def test_sigterm_ends_with_130_a_sentence_and_what_was_done(tmp_path):
    run = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', STOPPING, str(tmp_path/'out')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == 'ready\n'
    run.terminate()
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and 'run it again to go on' in said and 'Traceback' not in said
    kept = [t for p in (tmp_path/'out').glob('spill-*') for n, t in load_tensors(p).items() if n.endswith('.key')]
    assert sum(map(len, kept)) >= 20
    with pytest.raises(ValueError, match='not finished'): ShardRows(tmp_path/'out')


@pytest.mark.parametrize('out', ['shards', None, 'data.safetensors'])
def test_ctrl_c_ends_with_130_and_a_sentence_wherever_the_result_goes(pipe, rows, tmp_path, capsys, out):
    def pressing():
        for i, row in enumerate(rows):
            if i == 20: os.kill(os.getpid(), signal.SIGINT)
            yield row
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop: precompute(pipe, pressing(), out=out and tmp_path/out, **OPTIONS | dict(shard_size=100))
    said = capsys.readouterr().err
    assert stop.value.code == 130 and said.startswith('Stopped') and said.count('\n') == 1 and signal.getsignal(signal.SIGINT) is before
    if out == 'shards': assert 0 < precompute(pipe, rows, out=tmp_path/out, **OPTIONS | dict(shard_size=100)).report['encoded'] < 30


# changed and run again

def test_finished_folder_is_left_alone(copy, made, pipe, rows):
    report = precompute(pipe, rows, out=copy, **OPTIONS).report
    assert files(copy) == files(made[0]) and report['images'] == report['kept'] == 30 and report['images_per_second'] == report['encoded'] == 0


def test_set_that_grew_in_front_encodes_the_new_row_alone(copy, pipe, rows):
    grown = [{'image': picture(99), 'text': caption(0)}, *rows]
    report = precompute(pipe, grown, out=copy, **OPTIONS).report
    assert (report['images'], report['encoded'], report['gone']) == (31, 1, 0) and sorted(served(copy)) == sorted(number_of(grown))


def test_changed_rows_are_encoded_and_gone_ones_no_longer_served(copy, pipe, rows):
    changed = [{**rows[0], 'text': 'corrected'}, {**rows[1], 'image': picture(98)}, *rows[2:28]]
    data = precompute(pipe, changed, out=copy, **OPTIONS)
    assert (data.report['images'], data.report['encoded'], data.report['gone']) == (28, 2, 4) and len(data) == 28
    assert sorted(served(copy)) == sorted(number_of(changed))
    reader = ShardReader(copy, 2)
    assert sum(map(len, reader.bins)) == 28


def test_row_that_comes_back_costs_nothing(copy, pipe, rows):
    precompute(pipe, rows[:20], out=copy, **OPTIONS)
    report = precompute(pipe, rows, out=copy, **OPTIONS).report
    assert report['images'] == 30 and report['encoded'] <= 10 and sorted(served(copy)) == sorted(number_of(rows))


def test_shards_without_any_row_left_are_removed_and_their_names_are_not_used_twice(copy, pipe, rows):
    precompute(pipe, rows[:3], out=copy, **OPTIONS)
    assert len(list(copy.glob('latent-*'))) < 9
    precompute(pipe, rows, out=copy, **OPTIONS)
    assert check_shards(copy) == [] and sorted(served(copy)) == sorted(number_of(rows))


def test_equal_rows_are_kept_apart(pipe, rows, tmp_path):
    data = precompute(pipe, [rows[0]]*3 + [rows[3]], out=tmp_path, **OPTIONS)
    assert len(data) == 4 and precompute(pipe, [rows[0]]*2, out=tmp_path, **OPTIONS).report['gone'] == 2


def test_other_settings_model_world_and_source_are_refused(copy, pipe, rows, tmp_path):
    for other in ({'dtype': 'float16'}, {'world': 3}, {'control': 'edges'}):
        with pytest.raises(ValueError, match='another folder'): precompute(pipe, rows, out=copy, **OPTIONS | other)
    with pytest.raises(ValueError, match='another folder'): precompute(tiny_pipeline(seed=1, captions=[caption(i) for i in range(5)]), rows, out=copy, **OPTIONS)
    picture(0).save(tmp_path/'a.png')
    with pytest.raises(ValueError, match='source'): precompute(pipe, tmp_path, out=copy, **OPTIONS)


def test_missing_shard_is_named_at_the_start(copy, pipe, rows):
    (copy/'latent-000001.safetensors').unlink()
    with pytest.raises(ValueError, match='latent-000001.* is missing'): precompute(pipe, rows, out=copy, **OPTIONS)


def test_bad_input(pipe, rows, tmp_path):
    with pytest.raises(ValueError, match='whole batches'): precompute(pipe, rows, out=tmp_path, **OPTIONS | {'batch_size': 3})
    with pytest.raises(ValueError, match='no usable picture'): precompute(pipe, [{'image': None, 'text': 'x'}], out=tmp_path/'a', **OPTIONS)
    with pytest.raises(ValueError, match='manifest'): ShardReader(tmp_path/'nothing', 2)


def test_unusable_rows_are_named(pipe, tmp_path):
    odd = [{'image': b'junk', 'text': 'a'}, {'image': picture(0), 'text': ' '}, {'image': str(tmp_path/'gone.png'), 'text': 'b'}, {'image': png(picture(1)), 'text': 'again'}]
    with pytest.warns(UserWarning, match='skipped 3 of 4'): report = precompute(pipe, odd, out=tmp_path/'out', **OPTIONS).report
    assert report['images'] == 1 and dict(report['skipped']) == {'row 0': 'not a picture', 'row 1': 'no caption', 'row 2': 'not found'}
    assert read_manifest(tmp_path/'out')['skipped'] == [list(s) for s in report['skipped']]


# reading

def test_every_row_once_an_epoch_and_one_bin_a_batch(made):
    reader = ShardReader(made[0], 2, seed=3)
    epoch = torch.cat([reader.rows(i) for i in range(len(reader))])
    assert sorted(epoch.tolist()) == list(range(30))
    for i in range(len(reader)):
        batch = reader.batch(i)
        assert len({tuple(s) for s in batch.resolution.tolist()}) == 1 and len(batch.z) == 2


def test_batches_depend_on_seed_and_step_alone(made):
    a, b, c = (ShardReader(made[0], 4, seed=s) for s in (1, 1, 2))
    steps = [40, 3, 7, 3, 0]
    assert all(torch.equal(a.rows(i), b.rows(i)) for i in steps) and all(torch.equal(b.rows(i), a.rows(i)) for i in reversed(steps))
    order = lambda r, start: torch.stack([r.rows(start + i) for i in range(len(r))]).tolist()
    assert order(a, 0) != order(a, len(a)) and order(a, 0) != order(c, 0)


def test_captions_of_a_batch_are_those_of_its_rows(made, pipe, rows):
    from pixart_delta_nb.text import encode_captions, null_caption
    reader, numbers = ShardReader(made[0], 2), number_of(rows)
    keys = torch.cat([load_tensors(made[0]/s['file'])['key'] for s in reader.images]).tolist()
    for step in range(len(reader)):
        batch = reader.batch(step)
        h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, [caption(numbers[keys[r]]) for r in reader.rows(step).tolist()])
        assert torch.equal(batch.mask, mask) and torch.allclose(batch.caption, h*mask[..., None], atol=1e-5)
    assert torch.allclose(batch.null, null_caption(pipe.tokenizer, pipe.text_encoder)[0])


def test_stream_starts_anywhere(made):
    reader = ShardReader(made[0], 2)
    expected = [reader.batch(i) for i in range(13, 18)]
    for batch, found in zip(expected, reader.stream(start=13)): assert torch.equal(batch.z, found.z)


@pytest.mark.parametrize('name', ['latent-000001.safetensors', 'text-000000.safetensors'])
def test_damaged_shard_is_named_or_skipped(copy, capsys, name):
    flip(copy/name)
    assert check_shards(copy) == [name] and check_shards(copy, checksums=False) == []
    with pytest.raises(ValueError, match=name): ShardReader(copy, 2)
    if name.startswith('latent'):
        reader = ShardReader(copy, 2, bad='skip')
        assert reader.skipped == [name] and name in capsys.readouterr().err and sum(map(len, reader.bins)) == 26
    with pytest.raises(ValueError, match='raise or skip'): ShardReader(copy, 2, bad='ignore')


def test_rows_of_a_damaged_text_shard_are_left_out(pipe, tmp_path, capsys):
    rows = [{'image': picture(0), 'text': f'number {i//6}' + ' again'*(i//6)} for i in range(12)]
    precompute(pipe, rows, out=tmp_path, **OPTIONS)
    flip(tmp_path/'text-000001.safetensors')
    reader, numbers = ShardReader(tmp_path, 2, bad='skip'), number_of(rows)
    kept = torch.cat([load_tensors(tmp_path/s['file'])['key'] for s in reader.images])[torch.cat(reader.bins)]
    assert sorted(numbers[k] for k in kept.tolist()) == list(range(6))


def test_shard_lost_during_a_run_is_named(copy):
    reader = ShardReader(copy, 2)
    reader.batch(0)
    for path in copy.glob('*-0*.safetensors'): path.unlink()
    reader.files.clear()
    with pytest.raises(ValueError, match='has gone'): reader.batch(1)


def test_latents_that_are_not_finite_are_named(pipe, rows, tmp_path, monkeypatch):
    encode = type(pipe.vae).encode
    def broken(self, x):
        found = encode(self, x)
        found.latent_dist.mean[0] = math.nan
        return found
    monkeypatch.setattr(type(pipe.vae), 'encode', broken)
    with pytest.raises(ValueError, match='not finite'): precompute(pipe, rows[:1], out=tmp_path, **OPTIONS)


def test_columns_answer_as_tensors_do(made):
    reader, data = ShardReader(made[0], 1), streamed(made[0])
    assert len(data.z) == len(data.caption) == 30 and data.z.shape[1] == 4 and data.resolution is not None
    starts = [0, *itertools.accumulate(map(len, reader.bins))]
    for bin, start in zip(reader.bins, starts):
        rows = torch.arange(start, start + len(bin))
        batch = reader.read(bin)
        assert torch.equal(data.z[rows], batch.z) and torch.equal(data.caption[rows, :3], batch.caption[:, :3]) and torch.equal(data.mask[rows], batch.mask)
        assert torch.equal(data.z[start:start + len(bin)], batch.z) and torch.equal(data.z[start], batch.z[0])
        assert torch.equal(data.resolution[rows], batch.resolution) and torch.allclose(data.aspect_ratio[rows][:, 0], batch.resolution[:, 0]/batch.resolution[:, 1])


def test_rows_of_other_bins_move_into_that_of_the_first(made):
    column = streamed(made[0]).z
    bins = column.source.bins
    assert set(column.in_one_bin(torch.arange(30).flip(0)).tolist()) == set(bins[-1].tolist())
    counts = torch.stack([column.in_one_bin(torch.tensor([0, r]))[1] for r in range(30)]).unique(return_counts=True)[1]
    assert len(counts) == len(bins[0]) and counts.max() - counts.min() <= 1


def test_loops_stream_from_the_disk_what_they_would_read_from_memory(pipe, rows, tmp_path):
    from pixart_delta_nb.lcd import lcd_train
    from pixart_delta_nb.schedules import BETAS, alpha_bar_of
    from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig
    disk = precompute(pipe, rows[::3], out=tmp_path/'square', **OPTIONS)
    fields = {k: getattr(disk, k)[torch.arange(len(disk))] for k in ('z', 'caption', 'mask', 'resolution', 'aspect_ratio')}
    memory = LatentDataset(null=disk.null, null_mask=disk.null_mask, facts=disk.facts, **fields)
    config = TransformerConfig(num_attention_heads=2, attention_head_dim=12, num_layers=1, sample_size=12, caption_channels=32, use_additional_conditions=True)
    def train(data, out):
        torch.manual_seed(0)
        return lcd_train(PixArtTransformer(config), data, alpha_bar_of(BETAS), out, steps=2, batch_size=4, warmup=1, progress=False)[0].state_dict()
    a, b = train(disk, tmp_path/'a'), train(memory, tmp_path/'b')
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_truncated_or_missing_shards_are_found_by_size(copy):
    os.truncate(copy/'latent-000000.safetensors', 100)
    (copy/'latent-000001.safetensors').unlink()
    assert check_shards(copy, checksums=False) == ['latent-000000.safetensors', 'latent-000001.safetensors']


def test_damaged_null_caption_is_fatal(copy):
    flip(copy/'null.safetensors')
    with pytest.raises(ValueError, match='null.safetensors'): ShardReader(copy, 2, bad='skip')


def test_batch_larger_than_every_bin_is_refused(made):
    with pytest.raises(ValueError, match='smaller batch'): ShardReader(made[0], 11)


def test_manifest_of_another_kind_is_refused(copy):
    (copy/'manifest.json').write_text('{"images": []}')
    with pytest.raises(ValueError, match='no manifest of this version'): check_shards(copy)
    (copy/'manifest.json').write_text('{broken')
    with pytest.raises(ValueError, match='not valid JSON'): check_shards(copy)


def test_keys_are_of_name_caption_and_content():
    def key(name='a', content=b'x', text='c'): return next(k for _, k in keyed(iter([Item(name, content, text, key=name)]), 1, 1))
    assert len({key(), key('b'), key(content=b'y'), key(text='d')}) == 4 and key() == key() and short_digest('a') != short_digest('b')


def test_warnings_of_one_kind_come_once(pipe, tmp_path):
    rows = [{'image': picture(0), 'text': f'unheard{i}of {i}'} for i in range(70)]
    with pytest.warns(UserWarning) as caught: precompute(pipe, rows, out=tmp_path, **OPTIONS | dict(shard_size=80))
    assert len(caught) == 1


def test_measure_reports_both_speeds(pipe, rows):
    from pixart_delta_nb.evidence.precompute_speed import measure_precompute
    found = measure_precompute(rows, pipe, size=96, batch_size=2, repeats=1)
    assert found['images'] == 30 and math.isclose(found['ratio'], found['images_per_second']/found['vae_images_per_second'])

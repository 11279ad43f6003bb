"Shards of latents and text: any source, any crash, any damage, any step."
import io, itertools, json, math, os, tarfile
from types import SimpleNamespace
import numpy as np
import pytest, torch
from PIL import Image
from pixart_delta_nb import shards
from pixart_delta_nb.core import load_tensors
from pixart_delta_nb.pictures import FolderDataset
from pixart_delta_nb.pictures import aspect_bins, fit, nearest_bin, read_source
from pixart_delta_nb.evidence.precompute_speed import measure_precompute
from pixart_delta_nb.shards import (ShardReader, check_shards, encoder_operations, precompute_shards, storage_bytes,
    streamed)
from pixart_delta_nb.text import build_tokenizer
from pixart_delta_nb.world.language import build_text_encoder
from pixart_delta_nb.world.autoencoder import build_vae

OPTIONS = dict(size=96, shard_size=4, batch=2, dtype='float32', workers=2, progress=False)
SIZES = ((64, 64), (60, 90), (90, 60))


def picture(i):
    h, w = SIZES[i % 3]
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (h, w, 3), dtype=np.uint8))


def caption(i): return f'Number {i % 5}' + ' again'*(i % 5)


@pytest.fixture(scope='module')
def pipe():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = build_tokenizer([caption(i) for i in range(5)])
    return SimpleNamespace(vae=build_vae(block_out_channels=(8, 8, 8, 8)).eval(), tokenizer=tokenizer, scaling_factor=.5,
                           text_encoder=build_text_encoder(len(tokenizer), d_model=24, d_kv=12, num_heads=2, d_ff=32, num_layers=1))


@pytest.fixture(scope='module')
def rows(): return [{'image': picture(i), 'text': caption(i)} for i in range(30)]


@pytest.fixture(scope='module')
def made(pipe, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp('shards')/'made'
    return out, precompute_shards(rows, pipe, out, **OPTIONS)


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


def test_operations_grow_with_the_area():
    with torch.device('meta'): vae = build_vae(mid_block_add_attention=False)
    assert encoder_operations(vae, 128) == 4*encoder_operations(vae, 64)


@pytest.mark.parametrize('size, step, widest', [(128, 16, 2.), (96, 16, 2.), (512, 32, 4.), (16, 16, 2.)])
def test_bins(size, step, widest):
    bins = aspect_bins(size, step, widest)
    assert (size, size) in bins and len(set(bins)) == len(bins) and bins == sorted(bins, key=lambda b: b[0]/b[1])
    assert all(h % step == w % step == 0 and max(h/w, w/h) <= widest and (w, h) in bins for h, w in bins)


def test_bins_refuse_odd_sizes():
    with pytest.raises(ValueError, match='multiple of 16'): aspect_bins(100)


def test_nearest_bin_is_nearest_in_ratio():
    assert nearest_bin(10, 1000, [(1, 2), (1, 1), (2, 1)]) == (1, 2)
    assert nearest_bin(1414, 1000, [(1, 1), (2, 1)]) == (1, 1) and nearest_bin(1415, 1000, [(1, 1), (2, 1)]) == (2, 1)


def test_fit_crops_the_centre():
    x = np.zeros((20, 40, 3), np.uint8)
    x[:, 10:30] = 200
    assert (fit(Image.fromarray(x), (20, 20)) == 200).all() and fit(Image.new('L', (5, 9)), (16, 32)).shape == (3, 16, 32)


def test_sources_are_one_stream(tmp_path):
    (tmp_path/'a').mkdir()
    for i in range(6):
        picture(i).save(tmp_path/f'a/{i}.png')
        (tmp_path/f'a/{i}.txt').write_text(caption(i))
    for name, members in (('x.tar', range(3)), ('y.tar', range(3, 6))):
        with tarfile.open(tmp_path/name, 'w') as tar:
            for i in members:
                for part in (f'{i}.png', f'{i}.txt'): tar.add(tmp_path/'a'/part, f'set.v1/{part}')
    columns = [{'jpg': picture(i), 'caption': caption(i)} for i in range(6)]
    sources = [tmp_path/'a', str(tmp_path), [tmp_path/'x.tar', tmp_path/'y.tar'], FolderDataset(tmp_path/'a', 16)]
    streams = [list(read_source(s)) for s in sources] + [list(read_source(columns, 'jpg', 'caption'))]
    for stream in streams:
        assert [(shards._opened(x).convert('RGB').tobytes(), c) for _, x, c in stream] == [(picture(i).tobytes(), caption(i)) for i in range(6)]


def test_tar_with_json_captions_and_gaps(tmp_path):
    with tarfile.open(tmp_path/'s.tar', 'w') as tar:
        for name, data in (('a.json', b'{"caption": "red"}'), ('a.webp', b'w'), ('b.txt', b'no picture'), ('c.png', b'p')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert list(read_source(tmp_path/'s.tar')) == [('a', b'w', 'red'), ('b', None, 'no picture'), ('c', b'p', None)]


def test_rows_of_the_datasets_library(tmp_path, pipe):
    datasets, pa = pytest.importorskip('datasets'), pytest.importorskip('pyarrow')
    features = datasets.Features({'image': datasets.Image(), 'text': datasets.Value('string')})
    table = pa.table({'image': [{'bytes': png(picture(i)), 'path': None} for i in range(6)], 'text': [caption(i) for i in range(6)]})
    data = datasets.Dataset(datasets.table.InMemoryTable(table.cast(features.arrow_schema)), datasets.DatasetInfo(features=features), fingerprint='fixed')
    assert precompute_shards(data, pipe, tmp_path/'out', **OPTIONS)['images'] == 6


def test_a_saved_data_set_is_a_source(tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'text': datasets.Value('string')})
    data = datasets.Dataset.from_dict({'image': [{'bytes': png(picture(i)), 'path': None} for i in range(6)], 'text': [caption(i) for i in range(6)]}, features=features)
    data.save_to_disk(tmp_path/'set')
    stream = list(read_source(tmp_path/'set'))
    assert [(shards._opened(x).convert('RGB').tobytes(), c) for _, x, c in stream] == [(picture(i).tobytes(), caption(i)) for i in range(6)]


def test_missing_source_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='does not exist'): list(read_source(tmp_path/'none'))


def test_report(made, rows):
    out, report = made
    size = sum(p.stat().st_size for p in out.glob('latent*')) + sum(p.stat().st_size for p in out.glob('text*'))
    assert (report['images'], report['captions'], report['skipped'], report['bytes']) == (30, 5, [], size)
    assert report['bytes_per_image'] == size/30 and report['images_per_second'] > 0


def test_rows_of_shards_are_the_pictures(made, pipe, rows):
    seen = []
    for shard in json.loads((made[0]/'manifest.json').read_text())['images']:
        t = load_tensors(made[0]/shard['file'])
        for row, z, size in zip(t['row'].tolist(), t['latents'], t['size'].tolist()):
            x = fit(rows[row]['image'], nearest_bin(*SIZES[row % 3], aspect_bins(96)))/127.5 - 1
            with torch.no_grad(): assert torch.allclose(pipe.vae.encode(x[None]).latent_dist.mode()[0]*.5, z, atol=1e-5)
            assert tuple(size) == SIZES[row % 3]
            seen.append(row)
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize('stop', [1, 11, 17, 29])
def test_interrupted_and_continued_gives_the_same_bytes(made, pipe, rows, tmp_path, stop):
    def failing():
        yield from rows[:stop]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): precompute_shards(failing(), pipe, tmp_path/'out', **OPTIONS)
    precompute_shards(rows, pipe, tmp_path/'out', **OPTIONS)
    assert files(tmp_path/'out') == files(made[0])


def test_crash_between_shard_and_manifest(made, pipe, rows, tmp_path, monkeypatch):
    manifest, calls = shards._Writer.manifest, itertools.count()
    def failing(self, **facts):
        if next(calls) == 2: raise OSError('cut')
        manifest(self, **facts)
    monkeypatch.setattr(shards._Writer, 'manifest', failing)
    with pytest.raises(OSError): precompute_shards(rows, pipe, tmp_path/'out', **OPTIONS)
    monkeypatch.undo()
    precompute_shards(rows, pipe, tmp_path/'out', **OPTIONS)
    assert files(tmp_path/'out') == files(made[0])


def test_finished_folder_is_left_alone(copy, made, pipe, rows):
    report = precompute_shards(rows, pipe, copy, **OPTIONS)
    assert files(copy) == files(made[0]) and report['images'] == 30 and report['images_per_second'] == 0


def test_other_settings_are_refused(copy, pipe, rows):
    with pytest.raises(ValueError, match='same ones'): precompute_shards(rows, pipe, copy, **OPTIONS | {'dtype': 'float16'})
    other = SimpleNamespace(**vars(pipe) | {'vae': build_vae(block_out_channels=(8, 8, 8, 8)).eval()})
    with pytest.raises(ValueError, match='same ones'): precompute_shards(rows, other, copy, **OPTIONS)


def test_bad_input(pipe, rows, tmp_path):
    with pytest.raises(ValueError, match='whole batches'): precompute_shards(rows, pipe, tmp_path, **OPTIONS | {'batch': 3})
    with pytest.raises(ValueError, match='no usable picture'): precompute_shards([{'image': None, 'text': 'x'}], pipe, tmp_path/'a', **OPTIONS)
    with pytest.raises(ValueError, match='manifest'): ShardReader(tmp_path/'nothing', 2)


def test_unusable_rows_are_named(pipe, tmp_path):
    odd = [{'image': b'junk', 'text': 'a'}, {'image': picture(0), 'text': ' '}, {'image': str(tmp_path/'gone.png'), 'text': 'b'}, {'image': png(picture(1)), 'text': 'c'}]
    report = precompute_shards(odd, pipe, tmp_path/'out', **OPTIONS)
    assert report['images'] == 1 and dict(report['skipped']) == {'row 0': 'not a picture', 'row 1': 'no caption', 'row 2': 'not found'}


def test_every_row_once_an_epoch_and_one_bin_a_batch(made):
    reader = ShardReader(made[0], 2, seed=3)
    epoch = torch.cat([reader.rows(i) for i in range(len(reader))])
    assert sorted(epoch.tolist()) == list(range(30))
    for i in range(len(reader)):
        batch, sizes = reader.read(reader.rows(i))
        assert len({tuple(s) for s in sizes.tolist()}) == 1 and len(batch.z) == 2


def test_batches_depend_on_seed_and_step_alone(made):
    a, b, c = (ShardReader(made[0], 4, seed=s) for s in (1, 1, 2))
    steps = [40, 3, 7, 3, 0]
    assert all(torch.equal(a.rows(i), b.rows(i)) for i in steps) and all(torch.equal(b.rows(i), a.rows(i)) for i in reversed(steps))
    order = lambda r, start: torch.stack([r.rows(start + i) for i in range(len(r))]).tolist()
    assert order(a, 0) != order(a, len(a)) and order(a, 0) != order(c, 0)


def test_captions_of_a_batch_are_those_of_its_rows(made, pipe):
    from pixart_delta_nb.text import encode_captions, null_caption
    reader = ShardReader(made[0], 2)
    where = torch.cat([load_tensors(made[0]/s['file'])['row'] for s in reader.images])
    for step in range(len(reader)):
        batch = reader.batch(step)
        h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, [caption(where[r].item()) for r in reader.rows(step).tolist()])
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
    precompute_shards(rows, pipe, tmp_path, **OPTIONS)
    flip(tmp_path/'text-000001.safetensors')
    reader = ShardReader(tmp_path, 2, bad='skip')
    kept = torch.cat([load_tensors(tmp_path/s['file'])['row'] for s in reader.images])[torch.cat(reader.bins)]
    assert sorted(kept.tolist()) == list(range(6))


def test_shard_lost_during_a_run_is_named(copy):
    reader = ShardReader(copy, 2)
    reader.batch(0)
    for path in copy.glob('*-0*.safetensors'): path.unlink()
    reader.files.clear()
    with pytest.raises(ValueError, match='has gone'): reader.batch(1)


def test_columns_answer_as_tensors_do(made):
    reader, data = ShardReader(made[0], 1), streamed(made[0], conditions=True)
    assert len(data.z) == len(data.caption) == 30 and data.z.shape[1] == 4 and set(data.conditions) == {'resolution', 'aspect_ratio'}
    starts = [0, *itertools.accumulate(map(len, reader.bins))]
    for bin, start in zip(reader.bins, starts):
        rows = torch.arange(start, start + len(bin))
        batch, sizes = reader.read(bin)
        assert torch.equal(data.z[rows], batch.z) and torch.equal(data.caption[rows, :3], batch.caption[:, :3]) and torch.equal(data.mask[rows], batch.mask)
        assert torch.equal(data.resolution[rows], sizes.float()) and torch.allclose(data.aspect_ratio[rows][:, 0], sizes[:, 0]/sizes[:, 1])


def test_rows_of_other_bins_move_into_that_of_the_first(made):
    reader = ShardReader(made[0], 1)
    rows = reader.in_one_bin(torch.arange(30).flip(0))
    assert set(rows.tolist()) == set(reader.bins[-1].tolist())
    counts = torch.stack([reader.in_one_bin(torch.tensor([0, r]))[1] for r in range(30)]).unique(return_counts=True)[1]
    assert len(counts) == len(reader.bins[0]) and counts.max() - counts.min() <= 1


def test_loops_stream_from_the_disk_what_they_would_read_from_memory(pipe, rows, tmp_path):
    from pixart_delta_nb.latents import Batch
    from pixart_delta_nb.distill import lcd_train
    from pixart_delta_nb.schedules import alpha_bar_from_betas, linear_betas
    from pixart_delta_nb.transformer import PixArtTransformer, TransformerConfig
    precompute_shards(rows[::3], pipe, tmp_path/'square', **OPTIONS)
    disk = streamed(tmp_path/'square', conditions=True)
    memory = Batch(*(c[torch.arange(len(c))] for c in disk[:3]), disk.null, disk.null_mask, *(c[torch.arange(len(c))] for c in disk[5:]))
    config = TransformerConfig(num_attention_heads=2, attention_head_dim=12, num_layers=1, sample_size=12, caption_channels=24, use_additional_conditions=True)
    def train(data, out):
        torch.manual_seed(0)
        return lcd_train(PixArtTransformer(config), data, alpha_bar_from_betas(linear_betas()), out, steps=2, batch_size=4, warmup=1, progress=False)[0].state_dict()
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


def test_measure_reports_both_speeds(pipe, rows):
    found = measure_precompute(rows, pipe, size=96, batch=2, repeats=1, workers=2)
    assert found['images'] == 30 and math.isclose(found['ratio'], found['images_per_second']/found['vae_images_per_second'])

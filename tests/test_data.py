"From any source to D_z, in memory, in a file and in shards: the same rows, the same facts, and no model but their own."
import io, json, tarfile
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from pixart_delta_nb.core import load_metadata, save_tensors
from pixart_delta_nb.data import facts_of, open_latents, precompute, precompute_control, read_source, save_latents, source_name
from pixart_delta_nb.latents import Batch, LatentDataset
from pixart_delta_nb.pictures import picture_data, unit
from pixart_delta_nb.pipeline import tiny_pipeline
from pixart_delta_nb.sources import FolderDataset

SQUARE = dict(size=64, progress=False)


def caption(i): return f'number {i % 4}'
def picture(i, shape=(48, 64)): return Image.fromarray(np.random.default_rng(i).integers(0, 255, (*shape, 3), dtype=np.uint8))


@pytest.fixture(scope='module')
def pipe():
    torch.set_num_threads(1)
    return tiny_pipeline(captions=[caption(i) for i in range(4)] + ['a blue ball', 'one two three corrected new'])


@pytest.fixture
def folder(tmp_path):
    "Six captioned pictures."
    (tmp_path/'in').mkdir()
    for i in range(6):
        picture(i).save(tmp_path/f'in/{i}.png')
        (tmp_path/f'in/{i}.txt').write_text(caption(i))
    return tmp_path/'in'


def tar_of(path, names, folder):
    with tarfile.open(path, 'w') as tar:
        for name in names: tar.add(folder/name, f'set.v1/{name}')
    return path


# sources

def stream_of(source, **columns):
    from pixart_delta_nb.pictures import open_picture
    return [(open_picture(i.picture).tobytes(), i.caption) for i in read_source(source, **columns)]


def test_sources_are_one_stream(folder, tmp_path):
    pa, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    (tmp_path/'tars').mkdir()
    names = sorted(p.name for p in folder.iterdir())
    tars = [tar_of(tmp_path/f'tars/{k}.tar', names[6*k:6*k + 6], folder) for k in range(2)]
    rows = [{'image': {'bytes': (folder/f'{i}.png').read_bytes(), 'path': None}, 'text': caption(i)} for i in range(6)]
    (tmp_path/'tables/data').mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path/'tables/data/train.parquet')
    columns = [{'jpg': picture(i), 'caption': caption(i)} for i in range(6)]
    expected = [(picture(i).tobytes(), caption(i)) for i in range(6)]
    for source in (folder, str(folder), tmp_path/'tars', tars, [str(t) for t in tars], tmp_path/'tables', FolderDataset(folder, 16), rows, iter(rows)):
        assert stream_of(source) == expected
    assert stream_of(columns, image='jpg') == expected


def test_a_saved_data_set_and_its_splits_are_sources(tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'text': datasets.Value('string')})
    out = io.BytesIO()
    picture(0).save(out, 'PNG')
    data = datasets.Dataset.from_dict({'image': [{'bytes': out.getvalue(), 'path': None}]*3, 'text': ['one', 'two', 'three']}, features=features)
    data.save_to_disk(tmp_path/'set')
    datasets.DatasetDict({'train': data}).save_to_disk(tmp_path/'splits')
    expected = [(picture(0).tobytes(), c) for c in ('one', 'two', 'three')]
    for source in (data, tmp_path/'set', tmp_path/'splits'): assert stream_of(source) == expected


@pytest.mark.parametrize('source', [3, None, b'x', {'image': []}, torch.zeros(2, 3, 8, 8), '/no/such/path', __file__])
def test_what_is_no_source_is_one_sentence(source, pipe, tmp_path):
    for out in (None, tmp_path/'out'):
        with pytest.raises(ValueError) as caught: precompute(pipe, source, out=out, **SQUARE)
        assert '\n' not in str(caught.value) and 'is needed' in str(caught.value) + ' is needed'*('are needed' in str(caught.value))


def test_a_folder_may_hold_archives_and_loose_pictures(folder):
    tar_of(folder/'all.tar', sorted(p.name for p in folder.iterdir()), folder)
    assert [i.caption for i in read_source(folder)] == [caption(i) for i in range(6)]*2


def test_sources_have_names(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert source_name('in') == source_name(folder) == source_name(FolderDataset(folder, 16)) == str(folder)
    assert source_name([folder, 'x']) == f'{folder}; {folder.parent/"x"}' and source_name([{}]) == source_name(iter([])) == 'rows'


# one function, three places

def test_memory_file_and_shards_hold_the_same_rows_and_facts(pipe, folder, tmp_path):
    memory = precompute(pipe, folder, **SQUARE)
    filed = precompute(pipe, folder, out=tmp_path/'data.safetensors', **SQUARE)
    shards = precompute(pipe, folder, out=tmp_path/'shards', bins=[(64, 64)], dtype='float32', **SQUARE)
    rows = torch.arange(6)
    for data in (memory, filed, open_latents(tmp_path/'data.safetensors'), shards, open_latents(str(tmp_path/'shards'))):
        assert torch.allclose(data.z[rows], memory.z, atol=1e-5) and torch.equal(data.resolution[rows], memory.resolution)
        assert data.facts == memory.facts == facts_of(pipe) | {'world': None, 'control': None}
        assert torch.equal(data.mask[rows], memory.mask) and torch.allclose(data.null, memory.null, atol=1e-5)
    assert memory.resolution.tolist() == [[48, 64]]*6 and memory.report['images'] == 6 and open_latents(tmp_path/'shards').report == {}


def test_precompute_is_the_autoencoder_and_the_text_encoder(pipe):
    from pixart_delta_nb.text import encode_captions
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = [caption(i) for i in range(5)]
    data = precompute(pipe, images, captions, batch_size=2, world=7, progress=False)
    with torch.no_grad(): expected = pipe.vae.encode(unit(images)).latent_dist.mode()*pipe.scaling_factor
    h, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, captions)
    assert torch.allclose(data.z, expected, atol=1e-5) and torch.equal(data.caption, h.half()) and torch.equal(data.mask, mask)
    assert data.facts['world'] == 7 and torch.equal(precompute(pipe, unit(images).numpy(), captions, progress=False).z, data.z)
    rows = [{'image': unit(x), 'caption': c} for x, c in zip(images, captions)]
    assert torch.allclose(precompute(pipe, rows, progress=False).z, data.z, atol=1e-5)


def test_size_is_that_of_the_transformer_or_of_the_folder(pipe, folder, tmp_path):
    assert precompute(pipe, folder, progress=False).z.shape == (6, 4, 8, 8)
    assert precompute(pipe, FolderDataset(folder, 32), progress=False).z.shape == (6, 4, 4, 4)
    assert precompute(pipe, folder, out=tmp_path/'out', progress=False).z.shape[1:] == (4, 6, 10)
    bare = replace(pipe)
    del bare.transformer
    with pytest.raises(ValueError, match='size=128'): precompute(bare, folder, progress=False)
    for size in (100, 0, 64.):
        with pytest.raises(ValueError, match='multiple of 16'): precompute(pipe, folder, size=size, progress=False)


def test_misspelt_options_are_errors(pipe, folder):
    with pytest.raises(TypeError): precompute(pipe, folder, batch=8)
    for wrong in (0, 2.5, -1):
        with pytest.raises(ValueError, match='counts pictures'): precompute(pipe, folder, batch_size=wrong)
    with pytest.raises(ValueError, match='dtype'): precompute(pipe, folder, out='x', dtype='int8', progress=False)


def test_captions_that_come_in_a_list_are_each_meant(pipe):
    images = torch.zeros(3, 3, 64, 64)
    for captions, words in ((['a', 'b'], 'one each'), (['a', None, 'b'], 'caption 1 is None')):
        with pytest.raises(ValueError, match=words): precompute(pipe, images, captions, progress=False)
    with pytest.raises(ValueError, match='picture 1 cannot be used .not a picture'): precompute(pipe, [picture(0), b'x'], ['number 0', 'number 1'], **SQUARE)
    assert len(precompute(pipe, images, ['', 'number 1', ''], progress=False)) == 3


def test_pictures_of_other_shapes_become_squares(pipe):
    rows = [{'image': torch.zeros(3, 64, 64), 'text': caption(0)}, {'image': torch.zeros(3, 32, 64), 'text': caption(1)}]
    data = precompute(pipe, rows, progress=False)
    assert data.z.shape == (2, 4, 8, 8) and data.resolution.tolist() == [[64, 64], [32, 64]]


# facts

def test_latents_of_another_scaling_factor_or_model_are_refused(pipe, folder, tmp_path):
    other = tiny_pipeline(seed=1, captions=[caption(i) for i in range(4)])
    other.scaling_factor = 3.79
    made = [precompute(other, folder, out=out, **SQUARE) for out in (None, tmp_path/'data.safetensors', tmp_path/'shards')]
    for data in made + [open_latents(tmp_path/'data.safetensors'), open_latents(tmp_path/'shards')]:
        data.check(**facts_of(other))
        with pytest.raises(ValueError, match='scaling_factor = 3.79, but the pipeline has 0.5') as caught: data.check(**facts_of(pipe))
        assert '\n' not in str(caught.value)
        for name in ('vae', 'text_encoder'):
            with pytest.raises(ValueError, match=name): data.check(**{name: facts_of(pipe)[name]})


def test_facts_lie_in_the_header_and_in_the_manifest(pipe, folder, tmp_path):
    for out in ('data.safetensors', 'shards'): precompute(pipe, folder, out=tmp_path/out, world=5, **SQUARE)
    header = json.loads(load_metadata(tmp_path/'data.safetensors')['facts'])
    manifest = json.loads((tmp_path/'shards/manifest.json').read_text())
    assert header == manifest['facts'] == facts_of(pipe) | {'world': 5, 'control': None} and manifest['source'] == str(folder)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_pipeline_in_half_precision_has_the_same_facts(pipe, folder, dtype):
    import copy
    half = copy.deepcopy(pipe)
    for part in (half.vae, half.text_encoder): part.to(dtype)
    data = precompute(half, folder, **SQUARE)
    data.check(**facts_of(pipe))
    assert data.z.dtype == torch.float32


@pytest.mark.parametrize('make', [lambda p: 3, lambda p: p/'nothing', lambda p: p, lambda p: save_tensors(p/'x.safetensors', {'latents': torch.zeros(1)}),
                                  lambda p: (p/'y.safetensors', (p/'y.safetensors').write_bytes(b'x'))[0]])
def test_what_are_no_latents_is_one_sentence(tmp_path, make):
    with pytest.raises(ValueError) as caught: open_latents(make(tmp_path))
    assert '\n' not in str(caught.value)


def test_shards_are_not_saved_as_a_file(pipe, folder, tmp_path):
    data = precompute(pipe, folder, out=tmp_path/'shards', **SQUARE)
    assert open_latents(data) is data
    with pytest.raises(ValueError, match='copy their folder'): save_latents(data, tmp_path/'x.safetensors')


# control

def negative(x): return 1 - 2*x


def test_control_is_made_of_the_same_pixels_in_memory_file_and_shards(pipe, folder, tmp_path):
    images = torch.stack([FolderDataset(folder, 64)[i]['image'] for i in range(6)])
    expected = precompute_control(pipe, -images)
    for out in (None, tmp_path/'data.safetensors', tmp_path/'shards'):
        data = precompute(pipe, folder, out=out, control=negative, dtype='float32', **SQUARE | ({} if out is None else {'size': 64}))
        assert data.facts['control'] == 'negative' and data.control.shape == data.z.shape
    assert torch.allclose(precompute(pipe, folder, control=negative, **SQUARE).control, expected, atol=1e-5)
    assert torch.allclose(open_latents(tmp_path/'data.safetensors').control, expected, atol=1e-5)
    square = precompute(pipe, folder, out=tmp_path/'square', control='edges', bins=[(64, 64)], **SQUARE)
    batch = square.draw(3, torch.Generator().manual_seed(0))
    assert isinstance(batch, Batch) and batch.control.shape == batch.z.shape
    with pytest.raises(ValueError, match='must be one of'): precompute(pipe, folder, control='depth', **SQUARE)


def test_control_latents_of_a_file_join_memory_and_shards(pipe, folder, tmp_path):
    memory, shards = precompute(pipe, folder, **SQUARE), precompute(pipe, folder, out=tmp_path/'shards', bins=[(64, 64)], **SQUARE)
    path = save_tensors(tmp_path/'control.safetensors', {'control': -memory.z})
    for data in (memory, shards):
        batch = data.with_control(path).draw(4, torch.Generator().manual_seed(1))
        assert torch.allclose(batch.control, -batch.z, atol=1e-2) and data.control is None
        with pytest.raises(ValueError, match='of its size'): data.with_control(memory.z[:2])
    mixed = precompute(pipe, [{'image': picture(i, (48, 64) if i % 2 else (64, 64)), 'text': caption(i)} for i in range(4)], out=tmp_path/'mixed', **SQUARE)
    with pytest.raises(ValueError, match='2 shapes'): mixed.with_control(torch.zeros(4, *mixed.z.shape[1:]))


def test_control_pictures_must_be_pictures(pipe):
    with pytest.raises(ValueError, match=r'\[-1, 1\]'): precompute_control(pipe, torch.full((1, 3, 64, 64), 255.))
    with pytest.raises(ValueError, match='N, 3, H, W'): precompute_control(pipe, torch.zeros(3, 64, 64))
    x = torch.rand(5, 3, 64, 64)
    assert torch.allclose(precompute_control(pipe, x, batch_size=2), precompute_control(pipe, x, batch_size=5), atol=1e-5)


# the set

def test_draw_keeps_rows_together_and_cuts_padding():
    z = torch.arange(4.).reshape(4, 1, 1, 1).expand(4, 4, 2, 2)
    mask = torch.arange(5) < torch.arange(1, 5)[:, None]
    data = LatentDataset(z, torch.arange(4.)[:, None, None].expand(4, 5, 3), mask, torch.zeros(1, 1, 3), torch.arange(4)[:, None], control=-z)
    batch = data.draw(9, torch.Generator().manual_seed(0))
    number = batch.z[:, 0, 0, 0]
    assert torch.equal(number, batch.caption[:, 0, 0]) and torch.equal(-batch.z, batch.control) and torch.equal(batch.null_mask[:, 0], number.long())
    assert batch.caption.shape[1] == int(number.max()) + 1


def test_fingerprint_tells_sets_apart(pipe, folder):
    a, b = (precompute(pipe, folder, world=w, **SQUARE) for w in (None, 1))
    assert a.fingerprint == precompute(pipe, folder, **SQUARE).fingerprint != b.fingerprint
    assert a.fingerprint != replace(a, z=a.z + 1).fingerprint and a.fingerprint != a.with_control(a.z).fingerprint


@pytest.mark.parametrize('field', ['z', 'caption', 'null', 'control'])
def test_values_that_are_not_finite_are_refused(field):
    fields = dict(z=torch.zeros(2, 4, 2, 2), caption=torch.zeros(2, 3, 5), mask=torch.ones(2, 3), null=torch.zeros(1, 1, 5), control=torch.zeros(2, 4, 2, 2))
    with pytest.raises(ValueError, match=f'{field} of the data .* not finite'): LatentDataset(**fields | {field: fields[field] + torch.nan})


# inputs that went wrong

def put(path, caption='a blue ball', raw=None, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw) if raw is not None else (image or picture(0)).save(path, **options)
    if caption is not None: path.with_suffix('.txt').write_bytes(caption.encode() if isinstance(caption, str) else caption)


def test_strays_are_used_or_named_and_nothing_ends_the_run(pipe, tmp_path):
    folder = tmp_path/'strays'
    put(folder/'.ipynb_checkpoints/a-checkpoint.png')
    for name in ('plain.png', 'also.tif', 'moving.gif'): put(folder/name)
    out = io.BytesIO()
    picture(0, (300, 400)).save(out, 'JPEG')
    put(folder/'truncated.jpg', raw=out.getvalue()[:900])
    put(folder/'empty.png', raw=b'')
    put(folder/'page.jpg', raw=b'<html>404 not found</html>')
    put(folder/'noise.png', caption=bytes(range(128, 256)))
    put(folder/'bomb.png', image=Image.new('1', (14_000, 14_000)))
    for out in (None, tmp_path/'out'):
        with pytest.warns(UserWarning, match='skipped 5 of 8') as caught: data = precompute(pipe, folder, out=out, **SQUARE)
        assert len(data) == 3 and {n for n, _ in data.report['skipped']} == {'truncated.jpg', 'empty.png', 'page.jpg', 'noise.png', 'bomb.png'}
        assert len(caught) == 1 and '\n' not in str(caught[0].message)


def test_changes_between_runs_are_encoded_exactly_and_told(pipe, tmp_path):
    folder, out = tmp_path/'changes', tmp_path/'out'
    for i, name in enumerate('acd'): put(folder/f'{name}.png', image=picture(i))
    assert precompute(pipe, folder, out=out, **SQUARE).report['encoded'] == 3
    put(folder/'early_b.png', image=picture(9))
    (folder/'c.txt').write_text('corrected')
    (folder/'d.png').unlink()
    data = precompute(pipe, folder, out=out, dtype='float16', **SQUARE)
    assert {k: data.report[k] for k in ('images', 'kept', 'encoded', 'gone')} == {'images': 3, 'kept': 1, 'encoded': 2, 'gone': 2}
    fresh = precompute(pipe, folder, out=tmp_path/'fresh', **SQUARE)
    order = lambda d: sorted(round(x, 2) for x in d.z[torch.arange(len(d))].float().mean((1, 2, 3)).tolist())
    assert order(data) == order(fresh)


def test_a_path_with_a_slip_does_not_bind_the_folder_of_shards(pipe, folder, tmp_path):
    (tmp_path/'empty').mkdir()
    for slip in ('slip', 'empty'):
        with pytest.raises(ValueError, match='does not exist|no usable picture'): precompute(pipe, tmp_path/slip, out=tmp_path/'out', **SQUARE)
    assert len(precompute(pipe, folder, out=tmp_path/'out', **SQUARE)) == len(precompute(pipe, folder, **SQUARE))


def test_a_folder_of_hidden_files_alone_holds_nothing(pipe, tmp_path):
    put(tmp_path/'in/.cache/a.png')
    with pytest.raises(ValueError, match='no usable picture .there is none'): precompute(pipe, tmp_path/'in', **SQUARE)


def test_an_array_of_something_else_is_one_sentence(pipe):
    with pytest.raises(ValueError, match='picture 0 cannot be used') as caught: precompute(pipe, np.array([1]), ['x'], progress=False)
    assert '\n' not in str(caught.value)


def test_a_folder_is_precomputed_and_opened_through_the_front_door(folder, tmp_path):
    from pixart_delta_nb import load_pipeline, open_latents, precompute
    pipe = load_pipeline()
    with pytest.warns(UserWarning, match='never met'): data = precompute(pipe, folder, out=tmp_path/'latents', progress=False)
    assert data.report['skipped'] == [] and data.report['encoded'] == 6
    again = precompute(pipe, folder, out=tmp_path/'latents', progress=False)
    assert again.report['encoded'] == 0 and open_latents(tmp_path/'latents').facts == again.facts == facts_of(pipe) | {'world': None, 'control': None}

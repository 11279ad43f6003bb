"Captions in any encoding, pictures in any mode, lists and archives as users bring them: used, or named with a reason."
import io, json, os, struct, tarfile, warnings, zlib
import numpy as np
import pytest, torch
from PIL import Image, ImageCms, ImageDraw
from pixart_delta_nb.archives import parquet_items, saved_items, tar_items
from pixart_delta_nb.pictures import (Item, aspect_bins, decode, decode_text, digest, fit, nearest_bin, open_picture, picture_data,
    read_picture, reason, unit, upright, usable)
from pixart_delta_nb.sources import FolderDataset, folder_items

CAPTION = 'a red rectangle above a blue ball'


def drawing(width=200, height=150):
    image = Image.new('RGB', (width, height), (240, 240, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width//2, height//3), fill=(220, 30, 30))
    draw.ellipse((width//2, height//3, width - 5, height - 5), fill=(20, 60, 220))
    return image


def encoded(image, kind='PNG', **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def put(path, image=None, caption=CAPTION, raw=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw) if raw is not None else (image or drawing()).save(path, **options)
    if caption is not None: path.with_suffix('.txt').write_bytes(caption.encode() if isinstance(caption, str) else caption)


def read(folder):
    "{name: caption} of what can be used, {name: reason} of the rest."
    items = [usable(i) for i in folder_items(folder)]
    return {i.name: i.caption for i in items if not i.why}, {i.name: i.why for i in items if i.why}


# captions

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le', 'utf-32-be', 'cp1252'])
def test_captions_are_decoded_without_their_mark(encoding):
    assert decode_text('a café by Bob’s house'.encode(encoding)) == 'a café by Bob’s house'


@pytest.mark.parametrize('raw', [bytes(range(128, 256)), 'красный куб'.encode('cp1251'), '赤い球'.encode('shift-jis'), b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR',
                                 b'a\x00b', b'\xff\xfea'], ids=['noise', 'cp1251', 'shift-jis', 'png', 'zero', 'half'])
def test_what_is_no_text_is_refused_never_nonsense(raw):
    with pytest.raises(ValueError, match='UTF-8'): decode_text(raw)


def test_any_utf8_is_a_caption():
    for text in ('красный куб', '赤い球', 'ω ≈ 3.5', ''): assert decode_text(text.encode()) == text


def test_captions_of_other_programs_in_a_folder(tmp_path):
    for name, raw in (('bom', b'\xef\xbb\xbfa blue ball'), ('utf16', 'a blue ball'.encode('utf-16')), ('windows', 'a café'.encode('cp1252')), ('noise', bytes(range(128, 256)))):
        put(tmp_path/f'{name}.png', caption=raw)
    used, skipped = read(tmp_path)
    assert used == {'bom.png': 'a blue ball', 'utf16.png': 'a blue ball', 'windows.png': 'a café'} and list(skipped) == ['noise.png']


# pictures

def test_transparency_lies_on_white_and_hides_no_colour():
    hidden = np.zeros((40, 60, 4), np.uint8)
    hidden[..., :3] = 255, 0, 255
    hidden[10:30, 20:40] = 30, 200, 30, 255
    image = open_picture(encoded(Image.fromarray(hidden)))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((30, 20)) == (30, 200, 30)
    half = np.full((4, 4, 4), (0, 0, 0, 128), np.uint8)
    assert open_picture(Image.fromarray(half)).getpixel((0, 0)) == (127, 127, 127)


def test_transparency_of_palettes_and_of_single_colours():
    palette = drawing().convert('P')
    corner = open_picture(encoded(palette, transparency=palette.getpixel((150, 5)))).getpixel((150, 5))
    assert corner == (255, 255, 255)
    assert open_picture(encoded(Image.new('L', (4, 4), 7), transparency=7)).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(encoded(Image.new('RGB', (4, 4), (1, 2, 3)), transparency=(1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)


def in_mode(mode, rgb=(200, 100, 50)):
    flat = Image.new('RGB', (8, 8), rgb)
    if mode == 'LAB': return ImageCms.profileToProfile(flat, ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB')
    if mode == 'PA': return flat.convert('P').convert('PA')
    return flat.convert('RGBA').convert(mode) if mode == 'RGBa' else flat.convert(mode)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr', 'HSV', 'P', 'PA', 'LAB'])
def test_every_colour_mode_keeps_its_colour(mode):
    assert max(abs(a - b) for a, b in zip(upright(in_mode(mode)).getpixel((4, 4)), (200, 100, 50))) <= 8


@pytest.mark.parametrize('mode, value', [('1', 255), ('L', 128), ('LA', 128), ('La', 128), ('I', 128*257), ('I', 128), ('I;16', 128*257), ('I;16B', 128*257), ('F', 128/255), ('F', 128.)])
def test_every_grey_mode_keeps_its_values(mode, value):
    if mode == '1': image = Image.new('1', (8, 8), 1)
    elif mode in ('L', 'LA', 'La'): image = Image.new('L', (8, 8), value).convert('L' if mode == 'L' else 'LA').convert(mode)
    elif mode == 'F': image = Image.fromarray(np.full((8, 8), value, np.float32))
    elif mode == 'I': image = Image.fromarray(np.full((8, 8), value, np.int32))
    else: image = Image.frombytes(mode, (8, 8), np.full((8, 8), value, '<u2' if mode == 'I;16' else '>u2').tobytes())
    assert image.mode == mode and upright(image).getpixel((4, 4)) == ((255,)*3 if mode == '1' else (128,)*3)


def test_values_out_of_every_range_are_stretched_and_nan_is_none():
    x = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
    assert upright(Image.fromarray(x)).getextrema() == ((0, 255),)*3
    x[0, 0] = np.nan
    assert upright(Image.fromarray(x)).size == (8, 8) and upright(Image.fromarray(np.zeros((4, 4), np.float32))).getextrema()[0] == (0, 0)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_orientation_is_upright_and_the_size_is_the_upright_one(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    raw = encoded(drawing(), exif=exif)
    from PIL import ImageOps
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    assert open_picture(raw).tobytes() == expected.tobytes()
    assert decode(raw, [(64, 64)])[1] == expected.size[::-1] and read_picture(raw).shape == (3, *expected.size[::-1])


def test_size_of_a_large_jpeg_is_that_of_the_file_though_it_is_decoded_smaller():
    pixels, size = decode(encoded(Image.new('RGB', (1600, 1200), 'red'), 'JPEG'), [(64, 64)])
    assert size == (1200, 1600) and pixels.shape == (3, 64, 64) and pixels[0].min() > 250


def test_broken_exif_says_nothing():
    image = drawing()
    assert open_picture(encoded(image, exif=b'Exif\0\0broken data here')).size == image.size


def test_text_chunks_of_three_megabytes_do_not_matter():
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    plain = encoded(drawing())
    for kind, data in ((b'zTXt', b'workflow\0\0' + zlib.compress(b'x'*3_000_000)), (b'iTXt', b'workflow\0\1\0\0\0' + zlib.compress(b'x'*3_000_000)), (b'tEXt', b'a\0' + b'x'*3_000_000)):
        for at in (33, len(plain) - 12): assert open_picture(plain[:at] + chunk(kind, data) + plain[at:]).tobytes() == drawing().tobytes()


@pytest.mark.parametrize('thing, words', [(b'', 'not a picture'), (b'<html>404 not found</html>', 'not a picture'), (encoded(drawing())[:300], 'truncated|not a picture'),
                                          (encoded(drawing(), 'JPEG')[:900], 'truncated'), ('gone.png', 'not found'), (3, 'of type int'), (None, 'no picture'), (os.curdir, 'not a file')])
def test_what_is_no_picture_is_one_sentence(thing, words):
    with pytest.raises(ValueError, match=words) as caught: read_picture(thing, 32)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 300


def test_a_decompression_bomb_is_one_sentence():
    with pytest.raises(ValueError, match='178,956,970 pixels') as caught: open_picture(encoded(Image.new('1', (14_000, 14_000))))
    assert '\n' not in str(caught.value)


def test_reasons_are_short():
    assert reason(FileNotFoundError(2, 'x')) == 'not found' and reason(ValueError('two\nlines.')) == 'two' and reason(RuntimeError()) == 'RuntimeError'


def test_pixels_pass_as_they_are():
    x = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(decode(x, [(32, 32)])[0], x) and torch.equal(read_picture(x), unit(x)) and torch.equal(decode(x.permute(1, 2, 0).numpy())[0], x)
    assert decode(unit(x), [(16, 16)])[0].shape == (3, 16, 16)
    with pytest.raises(ValueError, match='3, H, W'): decode(torch.zeros(1, 4, 4))


def test_digests_tell_pictures_apart():
    seen = {digest(picture_data(t)) for t in (encoded(drawing()), drawing(), drawing().convert('L'), torch.zeros(3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.uint8))}
    assert len(seen) == 5 and digest(drawing()) == digest(drawing())


# bins

@pytest.mark.parametrize('size, step, widest', [(128, 16, 2.), (96, 16, 2.), (512, 32, 4.), (16, 16, 2.)])
def test_bins(size, step, widest):
    bins = aspect_bins(size, step, widest)
    assert (size, size) in bins and len(set(bins)) == len(bins) and bins == sorted(bins, key=lambda b: b[0]/b[1])
    assert all(h % step == w % step == 0 and max(h/w, w/h) <= widest and (w, h) in bins for h, w in bins)


def test_bins_refuse_odd_sizes():
    for size in (100, 0, 128.): 
        with pytest.raises(ValueError, match='multiple of 16'): aspect_bins(size)


def test_nearest_bin_is_nearest_in_ratio():
    assert nearest_bin(10, 1000, [(1, 2), (1, 1), (2, 1)]) == (1, 2)
    assert nearest_bin(1414, 1000, [(1, 1), (2, 1)]) == (1, 1) and nearest_bin(1415, 1000, [(1, 1), (2, 1)]) == (2, 1)


def test_fit_crops_the_centre():
    x = np.zeros((20, 40, 3), np.uint8)
    x[:, 10:30] = 200
    assert (fit(Image.fromarray(x), (20, 20)) == 200).all() and fit(Image.new('L', (5, 9)), (16, 32)).shape == (3, 16, 32)


# folders and lists

def lists(tmp_path, name, text, pictures=('a.png', 'b.png', 'sub/a.png'), **options):
    for p in pictures: put(tmp_path/p, caption=None)
    (tmp_path/name).parent.mkdir(exist_ok=True)
    (tmp_path/name).write_bytes(text.encode(options.get('encoding', 'utf-8')))
    return read(tmp_path)


def row(name, text): return json.dumps({'file_name': name, 'text': text})


def test_list_with_a_mark_and_windows_line_ends(tmp_path):
    used, skipped = lists(tmp_path, 'metadata.jsonl', '\ufeff' + row('a.png', 'one') + '\r\n' + row('b.png', 'two') + '\r\n')
    assert used == {'a.png': 'one', 'b.png': 'two'} and skipped == {'sub/a.png': 'not in metadata.jsonl'}


def test_list_with_backslashes(tmp_path):
    assert lists(tmp_path, 'metadata.jsonl', row('sub\\a.png', 'one'))[0] == {'sub/a.png': 'one'}


def test_broken_line_costs_itself_alone(tmp_path):
    used, skipped = lists(tmp_path, 'metadata.jsonl', row('a.png', 'one') + '\n{"file_name": "b.png", "text": \n[1]\n{"text": "x"}\n' + row('gone.png', 'x'))
    assert used == {'a.png': 'one'} and skipped == {'line 2 of metadata.jsonl': 'not valid JSON', 'line 3 of metadata.jsonl': 'no JSON object', 'gone.png': 'not found',
        'line 4 of metadata.jsonl': 'no file_name', 'b.png': 'not in metadata.jsonl', 'sub/a.png': 'not in metadata.jsonl'}


def test_line_in_another_encoding_costs_itself_alone(tmp_path):
    for p in ('a.png', 'b.png'): put(tmp_path/p, caption=None)
    (tmp_path/'metadata.jsonl').write_bytes(row('a.png', 'one').encode() + b'\n' + bytes(range(128, 256)) + b'\n' + row('b.png', 'two').encode())
    assert read(tmp_path)[0] == {'a.png': 'one', 'b.png': 'two'}


def test_pictures_that_a_list_leaves_out_are_named(tmp_path):
    used, skipped = lists(tmp_path, 'metadata.jsonl', row('a.png', 'one'))
    assert used == {'a.png': 'one'} and skipped == {'b.png': 'not in metadata.jsonl', 'sub/a.png': 'not in metadata.jsonl'}


@pytest.mark.parametrize('text, encoding', [('file_name,text\na.png,one\nb.png,"two, quoted"\n', 'utf-8'), ('file_name;text\r\na.png;one\r\nb.png;"two, quoted"\r\n', 'utf-8-sig'),
                                            ('file_name\ttext\na.png\tone\nb.png\ttwo, quoted\n', 'utf-16')])
def test_csv_lists(tmp_path, text, encoding):
    assert lists(tmp_path, 'metadata.csv', text, ('a.png', 'b.png'), encoding=encoding) == ({'a.png': 'one', 'b.png': 'two, quoted'}, {})


def test_list_in_a_subfolder_speaks_for_it_alone(tmp_path):
    put(tmp_path/'top.png', caption='the top')
    used, skipped = lists(tmp_path, 'sub/metadata.jsonl', row('a.png', 'one'), ('sub/a.png', 'sub/b.png'))
    assert used == {'top.png': 'the top', 'sub/a.png': 'one'} and skipped == {'sub/b.png': 'not in sub/metadata.jsonl'}


def test_second_list_of_a_folder_is_named(tmp_path):
    (tmp_path/'metadata.csv').write_text('file_name,text\nb.png,two\n')
    used, skipped = lists(tmp_path, 'metadata.jsonl', row('a.png', 'one'), ('a.png',))
    assert used == {'a.png': 'one'} and 'metadata.csv' in skipped


def test_strays(tmp_path):
    put(tmp_path/'.ipynb_checkpoints/a-checkpoint.png')
    for name in ('plain.png', 'also.tif', 'moving.gif', 'UPPER.PNG'): put(tmp_path/name)
    put(tmp_path/'.hidden.png')
    put(tmp_path/'phone.heic', raw=b'heic')
    (tmp_path/'directory.png').mkdir()
    used, skipped = read(tmp_path)
    assert set(used) == {'plain.png', 'also.tif', 'moving.gif', 'UPPER.PNG'} and list(skipped) == ['phone.heic']


def test_moving_gif_shows_its_first_frame():
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    assert open_picture(encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])).getpixel((0, 0))[0] > 250


def test_a_pipe_in_a_folder_does_not_block(tmp_path):
    put(tmp_path/'a.png')
    os.mkfifo(tmp_path/'pipe.png')
    (tmp_path/'pipe.txt').write_text('x')
    with pytest.warns(UserWarning, match='pipe.png: not a file'): assert len(FolderDataset(tmp_path, 16)) == 1


# FolderDataset

def margins(path, colour=(0, 128, 64)):
    pixels = np.full((64, 128, 3), 255, np.uint8)
    pixels[:, 32:96] = colour
    Image.fromarray(pixels).save(path)


def test_folder_with_notes_beside_is_cropped_to_the_centre(tmp_path):
    margins(tmp_path/'a.png')
    (tmp_path/'a.txt').write_text(' a green square \n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        item = FolderDataset(tmp_path, 32)[0]
    inside = item['image'][:, :, 2:-2]
    assert item['caption'] == 'a green square' and item['image'].shape == (3, 32, 32)
    torch.testing.assert_close(inside, (torch.tensor([0, 128, 64])/127.5 - 1)[:, None, None].expand_as(inside))


def test_folder_skips_and_lists_what_it_cannot_use(tmp_path):
    for name in ('a.png', 'b.jpg', 'mute.png', 'cut.jpg'): margins(tmp_path/name)
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'cut.jpg').read_bytes()[:700])
    (tmp_path/'odd.png').write_text('no picture')
    rows = [{'file_name': n, 'text': 'x'} for n in ('a.png', 'cut.jpg', 'odd.png', 'gone.png')]
    rows += [{'file_name': 'b.jpg', 'caption': 'y'}, {'file_name': 'mute.png'}, {'file_name': 3, 'text': 'z'}]
    (tmp_path/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{broken\n')
    with pytest.warns(UserWarning, match='skipped 6 of 8') as caught: data = FolderDataset(tmp_path, 16)
    assert len(caught) == 1 and [i.caption for i in data.items] == ['x', 'y']
    assert {n for n, _ in data.skipped} == {'cut.jpg', 'odd.png', 'gone.png', 'mute.png', 'line 7 of metadata.jsonl', 'line 8 of metadata.jsonl'}


def test_refusal_names_what_was_skipped(tmp_path):
    put(tmp_path/'broken.png', raw=b'no picture')
    with pytest.raises(ValueError, match='no usable picture .broken.png: not a picture') as caught: FolderDataset(tmp_path, 32)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('size', [0, -16, 100, 32.])
def test_folder_size_must_be_a_multiple_of_16(tmp_path, size):
    put(tmp_path/'a.png')
    with pytest.raises(ValueError, match='multiple of 16'): FolderDataset(tmp_path, size)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match='is not a folder'): FolderDataset(tmp_path/'none')


# archives

def tar_of(path, members):
    with tarfile.open(path, 'w:gz' if path.suffix == '.gz' else 'w') as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def in_tar(path):
    items = [usable(i) for i in tar_items(path)]
    return {i.key: i.caption for i in items if not i.why}, {i.name: i.why for i in items if i.why}


PNG = encoded(drawing())


def test_broken_json_in_a_tar_costs_itself_alone(tmp_path):
    members = [(f'{k}.{kind}', data) for k, text in (('x', b'{"caption": "one"}'), ('y', b'{broken'), ('z', b'{"caption": "three"}')) for kind, data in (('png', PNG), ('json', text))]
    assert in_tar(tar_of(tmp_path/'t.tar', members)) == ({'x': 'one', 'z': 'three'}, {'t.tar/y': 'its .json is not valid JSON'})


def test_keys_with_dots_stay_apart_and_none_is_lost(tmp_path):
    members = [(name, data) for v in ('0', '1') for name, data in ((f'v1.{v}.png', PNG), (f'v1.{v}.txt', v.encode()))]
    assert in_tar(tar_of(tmp_path/'t.tar', members))[0] == {'v1.0': '0', 'v1.1': '1'}
    used, skipped = in_tar(tar_of(tmp_path/'u.tar', [('x.png', PNG), ('x.mask.png', PNG), ('x.txt', b'one')]))
    assert used == {'x': 'one'} and skipped == {'u.tar/x.mask': 'no caption'}
    assert in_tar(tar_of(tmp_path/'w.tar', [('set.v1/x.left.png', PNG), ('set.v1/x.caption.txt', b'one')]))[0] == {'set.v1/x': 'one'}


def test_tars_with_gaps_json_and_other_members(tmp_path):
    members = [('a.json', b'{"caption": "red"}'), ('a.webp', b'w'), ('a.npy', b'n'), ('b.txt', b'no picture'), ('c.png', b'p'), ('._d.png', b'mac'), ('e.json', b'[1]'), ('e.png', b'p')]
    used, skipped = in_tar(tar_of(tmp_path/'s.tar.gz', members))
    assert used == {'a': 'red'} and skipped == {'s.tar.gz/b': 'no picture', 's.tar.gz/c': 'no caption', 's.tar.gz/e': 'no caption'}


def test_broken_tars_keep_the_rest_and_are_named(tmp_path):
    whole = tar_of(tmp_path/'t.tar', [m for k in 'abc' for m in ((f'{k}.png', PNG), (f'{k}.txt', k.encode()))]).read_bytes()
    size = 512 + -(-len(PNG)//512)*512 + 1024
    for at in (size + 700, size, 3*size - 300):                     # inside a member, between two, inside the last text
        (tmp_path/'cut.tar').write_bytes(whole[:at])
        used, skipped = in_tar(tmp_path/'cut.tar')
        assert used['a'] == 'a' and 'cut.tar' in skipped
    (tmp_path/'torn.tar').write_bytes(whole[:size] + b'?'*512 + whole[size + 512:])
    used, skipped = in_tar(tmp_path/'torn.tar')
    assert used == {'a': 'a', 'c': 'c'} and 'broken at byte' in skipped['torn.tar']
    for raw in (b'<html>'*200, b''):
        (tmp_path/'page.tar').write_bytes(raw)
        assert in_tar(tmp_path/'page.tar') == ({}, {'page.tar': 'not a tar file'})


def test_broken_parquet_keeps_the_rest(tmp_path):
    pa, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    rows = [{'image': {'bytes': PNG, 'path': None}, 'text': str(i)} for i in range(4)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path/'t.parquet', row_group_size=2)
    assert [i.caption for i in parquet_items(tmp_path/'t.parquet')] == list('0123')
    raw = bytearray((tmp_path/'t.parquet').read_bytes())
    raw[4:80] = bytes(76)
    (tmp_path/'t.parquet').write_bytes(raw)
    items = list(parquet_items(tmp_path/'t.parquet'))
    assert [i.caption for i in items if not i.why] == ['2', '3'] and 'part 1 of 2' in items[0].why
    (tmp_path/'t.parquet').write_bytes(raw[:100])
    assert [bool(i.why) for i in parquet_items(tmp_path/'t.parquet')] == [True]


def test_broken_file_of_a_saved_data_set_keeps_the_rest(tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'text': datasets.Value('string')})
    data = datasets.Dataset.from_dict({'image': [{'bytes': PNG, 'path': None}]*4, 'text': list('0123')}, features=features)
    data.save_to_disk(tmp_path/'set', num_shards=2)
    assert [(picture_data(i.picture), i.caption) for i in saved_items(tmp_path/'set')] == [(PNG, c) for c in '0123']
    broken = sorted((tmp_path/'set').glob('*.arrow'))[0]
    broken.write_bytes(broken.read_bytes()[:50])
    items = list(saved_items(tmp_path/'set'))
    assert [i.caption for i in items if not i.why] == ['2', '3'] and items[0].name == broken.name
    (tmp_path/'set/state.json').write_text('{broken')
    assert [i.caption for i in saved_items(tmp_path/'set') if not i.why] == ['2', '3']


def test_an_item_needs_picture_and_caption():
    assert [usable(i).why for i in (Item('a', b'x', 'c'), Item('a', b'x', ' '), Item('a', None, 'c'), Item('a', b'x', ['c']))] == ['', 'no caption', 'no picture', 'no caption']


@pytest.mark.parametrize('pixels', [np.full((3, 8, 8), 200.), np.full((8, 8, 3), 200, np.int64), torch.full((3, 8, 8), torch.nan)], ids=['0 to 255 as floats', 'integers of another kind', 'nan'])
def test_an_array_that_is_neither_bytes_nor_in_range_is_refused(pixels):
    with pytest.raises(ValueError, match=r'uint8 or floats in \[-1, 1\]'): decode(pixels)
    with pytest.raises(ValueError, match=r'uint8 or floats in \[-1, 1\]'): decode(pixels, [(8, 8)])
    assert decode(np.full((3, 8, 8), -1.))[0].shape == decode(np.zeros((8, 8, 3), np.uint8))[0].shape == (3, 8, 8)

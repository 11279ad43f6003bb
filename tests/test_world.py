"""The world: exact draws given what is known, captions with a dial, textures that no caption tells, energy by wavelength."""
import math, random, re
from dataclasses import replace
from itertools import permutations

import pytest, torch

from pixart_delta_nb.world import arrangements, phrases
from pixart_delta_nb.world.bands import BANDS, band_energy
from pixart_delta_nb.world.captions import LEVELS, describe, make, redraw
from pixart_delta_nb.world.materials import GROUND, PATTERNS, fractal, noise
from pixart_delta_nb.world.phrases import known_words, unknown_words
from pixart_delta_nb.world.raytracer import render
from pixart_delta_nb.world.skies import sky
from pixart_delta_nb.world.words import (
    ATTRIBUTES, GROUNDS, HELD_OUT, MATERIALS, SKIES, apart, attributes, chance_alike, sample_scene, seen, values_of)


def held(scene): return any((t.colour, t.shape) in HELD_OUT for t in scene.things)


# words ----------------------------------------------------------------------------------------------------------
def test_a_scene_is_a_function_of_its_generator():
    assert sample_scene(random.Random(3)) == sample_scene(random.Random(3)) != sample_scene(random.Random(4))


def test_pairs_are_kept_from_training_or_asked_for():
    assert not any(held(sample_scene(random.Random(i))) for i in range(200))
    assert all(held(sample_scene(random.Random(i), 'unseen')) for i in range(100))


def test_things_stand_apart_and_can_be_seen():
    assert all(apart(s.things) and seen(s.things) for s in (sample_scene(random.Random(i)) for i in range(200)))


def test_what_is_known_is_kept():
    known = {'count': 3, 'shape1': 'cone', 'colour2': 'blue', 'ground': 'water', 'light': 'behind', 'layout': 'row'}
    for i in range(50): assert known.items() <= values_of(sample_scene(random.Random(i), known=known)).items()


@pytest.mark.parametrize('pairs, colour', [('seen', 'purple'), ('unseen', 'red')])
def test_what_cannot_be_is_refused_instead_of_looked_for_without_end(pairs, colour):
    with pytest.raises(ValueError, match="pairs='any'"):
        sample_scene(random.Random(0), pairs, {'count': 1, 'colour0': colour, 'shape0': 'sphere'})


def test_things_that_agree_are_more_often_alike():
    assert chance_alike(2, {'colour0': 'red', 'colour1': 'red'}) > chance_alike(2, {}) > 0
    assert chance_alike(2, {'colour0': 'red', 'colour1': 'blue'}) == 0


def test_attributes_read_back_as_the_scene():
    scene = sample_scene(random.Random(8))
    code = attributes(scene, unsaid=('ground',))
    read = {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), code.tolist()) if i >= 0}
    assert read == {k: v for k, v in values_of(scene).items() if k != 'ground'}


# captions -------------------------------------------------------------------------------------------------------
def fits(scene, caption, other):
    "Whether a scene's caption is true of another scene."
    said = {k: v for k, v in values_of(scene, caption.order).items() if k not in caption.unsaid}
    orders = [tuple(range(len(other.things)))] if 'order' in said else permutations(range(len(other.things)))
    return any(said.items() <= values_of(other, order).items() for order in orders)


def test_a_scene_and_its_caption_are_functions_of_seed_and_index():
    assert make('a', 1) == make('a', 1) and make('a', 1)[1].text != make('a', 2)[1].text


def test_the_dial_goes_from_everything_to_nothing():
    for i in range(50):
        scene = make('dial', i)[0]
        unsaid = {level: describe(scene, random.Random(i), level).unsaid & set(values_of(scene)) for level in LEVELS}
        assert not unsaid['full'] - {'order'} and unsaid['none'] == set(values_of(scene))


def test_training_never_shows_what_the_test_split_always_does():
    captions = {split: [make('split', i, level='full', split=split)[1] for i in range(150)] for split in ('train', 'test')}
    assert not any(c.novel for c in captions['train']) and all(c.novel for c in captions['test'])


def test_a_test_caption_has_one_or_two_novel_parts():
    assert {make('few', i, level='full', split='test')[1].novel for i in range(150)} == {1, 2}


def forms(entry, mark):
    "Held-out ('!') or other forms of an entry, without commas."
    return {arrangements.bare(f) for f in entry.split('|') if (f[:1] == '!') == (mark == '!')}


def test_no_held_out_form_is_shown():
    for table in phrases.TABLES:
        for entry in table.values(): assert not forms(entry, '!') & forms(entry, '')
    blob = '\n'.join(' '.join(phrases.words_in(make('blob', i)[1].text)) for i in range(4000))
    held_out = {f.strip() for e in phrases.all_entries() for f in forms(e, '!') if '{' not in f}
    assert len(held_out) > 50 and not [f for f in held_out if re.search(rf'\b{f}\b', blob)]


@pytest.mark.parametrize('way, many', [('left', (False, False)), ('front', (False, False)), ('front', (False, True)),
                                       ('front', (True, True))])
def test_training_shows_each_relation_from_both_sides_in_every_frame(way, many):
    entry = arrangements.relation(way, many)
    shown, parts = arrangements.sorted_forms(entry)[0], [arrangements.OF, arrangements.AT]
    for side in (way, arrangements.OPPOSITE[way]):
        for table in parts:
            for phrase in table[side].split('|'): assert sum(phrase in f for f in shown) > 4, (side, phrase)
    assert sum(f.startswith('{0}') for f in shown) > 20 < sum(f.startswith('{1}') for f in shown)
    assert sum(not f.startswith('{') for f in shown) > 40


def test_each_ground_is_said_in_every_frame():
    for ground, entry in phrases.ON.items():
        shown = phrases.sorted_forms(entry)[0]
        for start in ('where the ground is', 'where there', 'standing', 'with'):
            assert sum(f.startswith(start) for f in shown) > 2, (ground, start)


@pytest.mark.parametrize('text', [
    'a big red ball on green grass at midday', 'a cylinder that is blue', 'one tiny blue box, night time, snowy ground',
    'a yellow cone standing right of a purple cylinder', 'two green balls',
    'three striped boxes on sand under a cloudy sky'])
def test_what_a_visitor_types_is_made_of_shown_forms(text):
    shown = sorted({f for e in phrases.all_entries() for f in arrangements.sorted_forms(e)[0]
                    if '{' not in f and len(f) > 1} | {'boxes', 'balls', 'one'}, key=len, reverse=True)
    shown += ['that is', 'standing right of']
    assert '{1} standing right of {0}' in arrangements.sorted_forms(phrases.WHERE['beside'])[0]
    left = text.replace(',', '')
    for form in shown: left = re.sub(rf'\b{form}\b', '', left)
    assert not set(left.split()) - {'a'} and not unknown_words(text)


def test_captions_are_made_of_known_words():
    assert not [c.text for i in range(300) if unknown_words((c := make('words', i, split='test')[1]).text)]


def test_words_never_met_are_quoted_in_their_order():
    assert unknown_words('A pink TEAPOT on jet-black grass, pink') == ['pink', 'teapot'] and 'boxes' in known_words()


def test_a_redrawn_scene_has_what_the_caption_says_and_a_texture_of_its_own():
    for i in range(300):
        scene, caption = make('redraw', i)
        other = redraw(scene, caption, random.Random(i))
        assert fits(scene, caption, other) and other.texture != scene.texture


def test_what_is_unsaid_keeps_its_distribution():
    n, skies, nights = 1500, 0, 0
    for i in range(n):
        scene, caption = make('prior', i)
        skies += scene.sky == 'night'
        nights += redraw(scene, caption, random.Random(i)).sky == 'night'
    assert abs(skies - nights) < 4*math.sqrt(skies + nights)


@pytest.mark.parametrize('wrong', [{'level': 'much'}, {'split': 'dev'}])
def test_an_unknown_level_or_split_is_refused(wrong):
    with pytest.raises(ValueError, match=repr(*wrong.values())): make(0, 0, **wrong)


# pictures -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def scene(): return next(s for i in range(100) if len((s := make('picture', i)[0]).things) == 2)


def test_noise_has_unit_deviation_and_the_slopes_of_its_value(scene):
    p, h = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0))*30, torch.tensor([[.01], [0.]])
    value = noise(scene, 'test', p)
    slope = (noise(scene, 'test', p + h)[0] - noise(scene, 'test', p - h)[0])/.02
    assert abs(value[0].std() - 1) < .15 and torch.corrcoef(torch.stack([slope, value[1]]))[0, 1] > .97


def test_octaves_finer_than_a_few_pixels_vanish(scene):
    p = torch.rand(2, 500, generator=torch.Generator().manual_seed(0))*30
    assert fractal(scene, 'test', p, torch.full_like(p, 5.), (1., 1.))[0].abs().max() == 0


@pytest.mark.parametrize('ground', GROUNDS)
def test_every_ground_has_a_texture_that_no_caption_tells(scene, ground):
    p = torch.rand(2, 2000, generator=torch.Generator().manual_seed(0))*6
    a, b = (GROUND[ground](replace(scene, ground=ground, texture=k), p, torch.full_like(p, .05))[0] for k in (1, 2))
    assert a.std(dim=1).max() > .02 and not torch.equal(a, b)


@pytest.mark.parametrize('name', SKIES)
def test_every_sky_has_a_texture_that_no_caption_tells(scene, name):
    d = torch.nn.functional.normalize(torch.tensor([[-.2, 0., .1, .2], [.1, .2, .15, .3], [-1., -1., -1., -1.]]), dim=0)
    d = d[:, torch.arange(400) % 4] + .1*torch.rand(3, 400, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(*(sky(replace(scene, sky=name, texture=k), d) for k in (1, 2)))


def test_every_material_with_a_pattern_has_one():
    assert set(PATTERNS) == set(MATERIALS) - {'plain', 'metal'}


def test_a_picture_is_a_function_of_its_scene(scene):
    picture = render(scene, 48)['image']
    assert torch.equal(picture, render(replace(scene), 48)['image']) and 0 <= picture.min() <= picture.max() <= 1
    assert not torch.equal(picture, render(replace(scene, texture=scene.texture ^ 1), 48)['image'])


def test_a_picture_of_nothing_but_sky_is_drawn(scene):
    plain = replace(scene, things=[], camera=(0., 2.6, 0., -1.2), sky='overcast') # nothing but sky
    assert render(plain, 16)['image'].shape == (3, 16, 16)


@pytest.mark.parametrize('wrong', [{'size': 0}, {'supersample': 1.5}])
def test_a_size_that_is_no_positive_integer_is_refused(scene, wrong):
    with pytest.raises(ValueError, match='positive integer'): render(scene, **wrong)


def test_the_mean_of_what_a_caption_leaves_open_has_little_texture(scene):
    draws = torch.stack([render(replace(scene, things=[], texture=k), 96)['image'] for k in range(16)])
    middle = slice(BANDS.index((8, 12)), BANDS.index((16, 24)) + 1)
    kept = band_energy(draws.mean(0)[None])[0]/band_energy(draws).mean(0)
    assert (kept[middle] < .5).all()


# bands ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('k, length', enumerate((6, 10, 14, 20, 28, 44)))
def test_a_wave_lies_in_its_band(k, length):
    wave = .5 + .3*torch.sin(2*torch.pi*torch.arange(128.)/length).expand(1, 3, 128, 128)
    energy = band_energy(wave)[0]
    assert energy.argmax() == k
    torch.testing.assert_close(band_energy(.5 + (wave - .5)/2)[0], energy/4)


def test_pictures_that_are_no_squares_are_refused():
    with pytest.raises(ValueError, match='squares'): band_energy(torch.zeros(1, 3, 8, 4))

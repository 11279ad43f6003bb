"Captions on their way to the transformer: tokens, padding, what is cut, and what was never met."
import json, warnings
import pytest, torch
from pixart_delta_nb.text import build_tokenizer, encode_captions, fallback_ids, null_caption, read_tokenizer, token_ids, unknown_words
from pixart_delta_nb.world.captions import make

CAPTIONS = [make(0, i)[1].text for i in range(80)]


@pytest.fixture(scope='module')
def tokenizer(): return build_tokenizer(CAPTIONS)


@pytest.fixture(scope='module')
def encoder(tokenizer):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=48, d_kv=24, num_heads=2, d_ff=64, num_layers=1, feed_forward_proj='gated-gelu',
                                   is_encoder_decoder=False, tie_word_embeddings=False)).eval()


@pytest.fixture
def encode(tokenizer, encoder): return lambda *args, **options: encode_captions(tokenizer, encoder, *args, **options)


def warned(f, *args, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        f(*args, **options)
    return [str(w.message) for w in said]


def test_tokenizer_spells_unknown_words(tokenizer):
    assert tokenizer('')['input_ids'] == [1] and 2 not in tokenizer('quizzical zebra!')['input_ids']


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path)(CAPTIONS)['input_ids'] == tokenizer(CAPTIONS)['input_ids']


def test_case_and_margins_do_not_matter(encode):
    a, b = (encode([c])[0] for c in ('a red ball', 'A Red BALL '))
    assert torch.equal(a, b)


def test_padding_leaves_states_alone(encode):
    h, mask = encode(['a red ball', CAPTIONS[0]])
    alone, _ = encode('a red ball')
    assert torch.allclose(h[0][mask[0]], alone[0], atol=1e-5)


def test_batches_do_not_change_states(encode):
    whole, mask = encode(CAPTIONS[:5])
    assert torch.allclose(encode(CAPTIONS[:5], batch_size=2)[0][mask], whole[mask], atol=1e-5)


def test_the_null_caption_is_the_empty_one(encode, tokenizer, encoder):
    h, mask = null_caption(tokenizer, encoder)
    assert h.shape == (1, 1, 48) and mask.all() and torch.equal(h, encode('')[0])


def test_truncation_quotes_what_was_cut(encode):
    with pytest.warns(UserWarning, match='this was cut: "cube"'): h, mask = encode(['a small red cube'], max_length=4)
    assert mask.shape == (1, 4)


def test_long_captions_keep_120_tokens(encode):
    with pytest.warns(UserWarning, match='120 are read'): assert encode(['a red cube '*60])[1].shape == (1, 120)


def test_a_warning_is_a_line_however_long_the_caption(encode):
    said = warned(encode, ['a red cube\n'*20_000, 'x'*100_000 + ' zebra'] + ['a red ball on grass at night '*20]*50)
    assert len(said) == 2 and all(len(line) < 400 and '\n' not in line for line in said)
    assert any('51 other captions' in line for line in said)


def test_words_never_met_are_quoted(encode):
    said, = warned(encode, ['a red zebra on grass', 'a 猫 at night'])
    assert '"zebra"' in said and '"猫"' in said and '"red"' not in said and '"a"' not in said


def test_known_words_and_punctuation_warn_of_nothing(encode):
    assert warned(encode, [*CAPTIONS, '', 'a red cube.', '"A red cube", on grass!']) == []


def test_many_unknown_words_are_counted(encode):
    said, = warned(encode, [f'word{i}' for i in range(30)])
    assert 'and 25 more' in said and said.count('"') == 10


def test_a_real_vocabulary_warns_of_scripts_that_it_lacks_alone():
    from transformers import T5Tokenizer
    words = [('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.), ('▁', -2.), ('s', -3.), ('e', -3.1), ('z', -9.), ('bra', -6.), ('▁the', -3.2), ('▁rare', -12.)]
    t5 = T5Tokenizer(vocab=words, extra_ids=0)
    assert fallback_ids(t5) == {2}                                     # the least likely piece is a word, so no character is a stop-gap
    texts = ['the zebra', 'the 猫']
    assert unknown_words(t5, texts, t5(texts)['input_ids']) == ['猫']


@pytest.mark.parametrize('bad', [[], [3], [None], [b'x'*10**6]])
def test_captions_must_be_strings(encode, bad):
    with pytest.raises(ValueError, match='list of strings') as error: encode(bad)
    assert len(str(error.value)) < 250


def test_a_folder_without_a_vocabulary_is_one_sentence(tmp_path):
    (tmp_path/'tokenizer_config.json').write_text(json.dumps({}))
    with pytest.raises(ValueError, match='tokenizer.json or the spiece.model'): read_tokenizer(tmp_path)


# marks ----------------------------------------------------------------------------------------------------------
def test_a_mark_beside_a_word_makes_no_other_word_of_it(tokenizer):
    plain, marked = token_ids(tokenizer, ['a red ball on grass', 'A red, ball on grass.'])
    assert [i for i in marked if i not in fallback_ids(tokenizer)] == plain


def test_a_hyphen_joins_words_that_are_known(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert token_ids(tokenizer, ['a red-ball on grass']) == token_ids(tokenizer, ['a red ball on grass'])
    with pytest.warns(UserWarning, match='never met "fuel"'): token_ids(tokenizer, ['a red-fuel ball'])


def test_a_vocabulary_with_hyphens_of_its_own_keeps_them():
    from transformers import T5Tokenizer
    theirs = T5Tokenizer(vocab=[('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.), ('▁a', -1.), ('a', -2.), ('-', -2.), ('b', -3.)], extra_ids=0)
    assert token_ids(theirs, ['a-a'])[0][1] == theirs.convert_tokens_to_ids('-')

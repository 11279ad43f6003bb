"""Exercises on the network and on what is done to it: answers written as a student would, leaks that no number shows, and predictions that were counted."""
import copy, json
import pytest, torch
from torch import nn

from pixart_delta_nb.workshop.blanks import blanks
from pixart_delta_nb.workshop.checks import check, exercises
from pixart_delta_nb.workshop import blocks, controlnet, data, int8, lcd, lora, sampling, transformer

MINE = [e for e in exercises() if 23 <= e.number <= 48]
PAGES = ('05_data', '06_transformer', '06a_blocks', '08_lcd', '09_sampling', '10_lora', '11_controlnet', '12_int8')
pytestmark = pytest.mark.usefixtures('one_thread')
each = pytest.mark.parametrize('exercise', MINE, ids=lambda e: f'{e.number}-{e.name}')


def test_the_numbers_have_no_gap(): assert [e.number for e in MINE] == list(range(23, 49))


@each
def test_the_packages_own_answer_is_right(exercise):
    assert check(exercise, exercise.solution() if exercise.predicts else exercise.solution)


class Silent(nn.Module):
    def __init__(self, *args): super().__init__()
    def forward(self, *args): ...


@pytest.mark.parametrize('exercise', [e for e in MINE if e.judge], ids=lambda e: f'{e.number}-{e.name}')
@pytest.mark.parametrize('answer', [3, [1, 2], lambda *args: None, lambda: 1, Silent, lambda *args: torch.full((2, 2), float('nan')),
                                    lambda *args: 1/0], ids=['number', 'list', 'none', 'arguments', 'module', 'nan', 'raises'])
def test_what_nobody_means_to_hand_in_is_answered_in_a_sentence(exercise, answer):
    verdict = check(exercise, answer)
    assert not verdict and verdict.words.endswith(('.', ')', '?')) and len(verdict.words) < 600


@pytest.mark.parametrize('page', PAGES)
def test_a_blank_page_runs_to_its_end(page, tmp_path):
    cells = json.loads(blanks(tmp_path)[f'{page}.ipynb'])['cells']
    page = {}
    for source in (''.join(c['source']) for c in cells if c['cell_type'] == 'code'): exec(source, page)


# answers that are right in another way --------------------------------------------------------------------------
def test_other_ways_to_the_same_patches():
    def by_unfold(latents, patch_size):
        p = patch_size
        found = nn.functional.unfold(latents, p, stride=p)                              # (B, C*p*p, N)
        return found.unflatten(1, (-1, p*p)).permute(0, 3, 2, 1).flatten(2)
    assert check(transformer.PATCHIFY, by_unfold)


def test_padding_may_be_hidden_by_minus_infinity():
    def read_caption(q, k, v, mask):
        scores = q @ k.mT/q.shape[-1]**.5
        return scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1) @ v
    assert check(blocks.READ_CAPTION, read_caption)


def test_a_skip_may_be_added_behind_a_block():
    def controlled(blocks, copies, zero_in, zero_out, x, c):
        h = x + zero_in(c)
        for i, block in enumerate(blocks):
            x = block(x)
            if i < len(copies): h = copies[i](h)
            if i < len(copies): x = x + zero_out[i](h)
        return x
    assert check(controlnet.CONTROLLED, controlled)


def test_the_loss_may_be_written_with_detach():
    def distillation_loss(student, target, teacher, *args):
        return lcd.distillation_loss(student, copy.deepcopy(target), copy.deepcopy(teacher), *args)
    assert check(lcd.LOSS, distillation_loss)


# leaks ----------------------------------------------------------------------------------------------------------
def test_two_calls_are_refused_although_the_numbers_are_right():
    def guided(network, x, t, caption, mask, null, null_mask, omega):
        ask = lambda words, m: network(x, t, words, m)[:, :4]
        with_caption = ask(caption, mask)
        return with_caption + omega*(with_caption - ask(null.expand(len(x), -1, -1), null_mask.expand(len(x), -1)))
    assert 'more than once' in check(lcd.GUIDED, guided).words


def test_a_gradient_into_the_target_is_found_although_the_loss_is_right():
    def distillation_loss(student, target, teacher, *args):
        loss = lcd.distillation_loss(student, target, teacher, *args)
        weight = target.proj_out.weight.sum()
        return loss + 1e-9*(weight - weight.detach())
    assert 'frozen network' in check(lcd.LOSS, distillation_loss).words


def test_latents_that_remember_their_making_are_answered_although_they_are_right():
    def latents_of(vae, pictures, scaling_factor): return vae.encode(pictures/127.5 - 1).latent_dist.mode()*scaling_factor
    assert 'no_grad' in check(data.LATENTS_OF, latents_of).words


def test_merging_twice_is_noticed():
    class InPlace(lora.LowRank):
        def merged(self):
            self.model['to_q'].weight.data += self.B @ self.A*self.model['to_q'].lora.scale
            return self.model['to_q'].weight
    assert 'merged' in check(lora.LOW_RANK, InPlace).words


# predictions ----------------------------------------------------------------------------------------------------
def test_the_mistakes_about_memory_start_from_the_counted_peaks():
    counted = int8.peaks_of_arrangements()
    assert {name: pytest.approx(size, abs=.002) for name, size in int8._KNOWN.items()} == counted
    parts = int8.parts_of_paper()
    assert parts['transformer']['half'] + parts['vae']['half'] + parts['vae']['activations'] == pytest.approx(3.001, abs=.001)


def test_shapes_rows_and_moves_are_those_that_the_mistakes_start_from():
    assert blocks.xl_shapes() == blocks._RIGHT
    assert sampling.rows_asked() == sampling._ASKED and controlnet.first_moves() == controlnet._MOVES


@pytest.mark.parametrize('exercise', [e for e in MINE if e.predicts and isinstance(e.solution(), dict)], ids=lambda e: e.name)
def test_two_wrong_parts_of_a_prediction_still_get_words(exercise):
    right = exercise.solution()
    wrong = [w for w in exercise.mistakes.values() if sum(w[k] != right[k] for k in right) < len(right)]
    for mistake in wrong[:3]:
        parts = [k for k in right if mistake[k] != pytest.approx(right[k], rel=.02)]
        answer = {k: mistake[k] if k in parts else tuple(2*n for n in v) if isinstance(v, tuple) else 3*v + 5 for k, v in right.items()}
        assert any(words in check(exercise, answer).words for words in exercise.mistakes)


def test_the_adapter_of_a_block_is_the_formula():
    assert lora.adapter_of_a_block() == {'numbers': 26*32*1152, 'percent': pytest.approx(100*13*32/8/1152)}

import math
from dataclasses import replace

import pytest
import torch

from firsthand.decode.over_trust import OverTrustState, over_trust_penalty

START = 4  # the prompt is four tokens long, the image its second and third
SPAN = (1, 2)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def attention(length, *batch, seed=0):
    """Rows of positive numbers below the diagonal, not normalised."""
    return torch.rand(*batch, length, length, generator=torch.Generator().manual_seed(seed)).add(0.05).tril()


def by_hand(matrix, scale_factor=50.0, score_scale=1e-7):
    """The score of each column, of one matrix, one product after the other."""
    size, scores = len(matrix), []
    for column in range(START, size):
        product = score_scale
        for row in range(column, size):
            product *= scale_factor * matrix[row, column].item() / matrix[row].sum().item()
        scores.append(product)
    return scores


def pushed(matrix, state):
    for row in range(START, matrix.shape[-1]):
        state = state.push(matrix[..., row, : row + 1])
    return state


def test_products_by_hand():
    matrix = attention(START + 12)
    scores = by_hand(matrix)
    penalty, column = over_trust_penalty(matrix, SPAN, START)
    assert penalty.item() == pytest.approx(max(scores), rel=1e-4)
    assert column.item() == scores.index(max(scores))


def test_a_column_of_constant_weight():
    """n rows that all give the first token the share w: log phi = log c0 + n log(sigma w)."""
    share, rows, scale = 0.3, 14, 9.0
    matrix = torch.zeros(START + rows, START + rows)
    matrix[:, START] = share
    matrix[:, 0] = 1 - share
    penalty, column = over_trust_penalty(matrix, SPAN, START, scale_factor=scale)
    assert column.item() == 0
    assert penalty.log().item() == pytest.approx(math.log(1e-7) + rows * math.log(scale * share), rel=1e-5)


def test_sigma_scales_each_column_by_its_number_of_rows():
    matrix = attention(START + 11, 3)
    one, other = (pushed(matrix, OverTrustState.empty(3, START, scale_factor=scale)) for scale in (10.0, 30.0))
    rows = torch.arange(11, 0, -1)
    torch.testing.assert_close(other.log_scores - one.log_scores, (rows * math.log(3.0)).expand(3, -1), atol=1e-4, rtol=1e-5)


def test_rows_are_renormalised():
    matrix = attention(START + 12, 2)
    stretched = matrix * torch.rand(START + 12, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    for a, b in zip(over_trust_penalty(matrix, SPAN, START), over_trust_penalty(stretched, SPAN, START), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=1e-5)


def test_the_prompt_is_outside_of_the_window():
    """What a token gives to the prompt counts only as what it does not give to the response, wherever in the prompt it is."""
    matrix = attention(START + 12)
    moved = matrix.clone()
    moved[START:, :START] = matrix[START:, :START].flip(1)
    moved[:START] = attention(START + 12, seed=9)[:START]
    for a, b in zip(over_trust_penalty(matrix, SPAN, START), over_trust_penalty(moved, SPAN, START), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 9, 10, 11, 12])
def test_attention_to_the_image_counts_iff_the_response_is_short(length):
    matrix = attention(START + length)
    last = matrix[-1] / matrix[-1].sum()
    penalty, _ = over_trust_penalty(matrix, SPAN, START)
    without, _ = over_trust_penalty(matrix, None, START)
    if length <= 10:
        assert penalty.item() == pytest.approx(-last[1:3].sum().item())
        assert without.item() == 0
    else:
        assert penalty.item() > 0
        assert penalty.item() == without.item()


def test_no_warmup():
    penalty, _ = over_trust_penalty(attention(START + 1), SPAN, START, warmup=0)
    assert penalty.item() > 0


@pytest.mark.parametrize("span", [SPAN, None])
def test_incremental_is_the_full_computation(span):
    """After each token, across beams that are exchanged and repeated, and going on from an earlier state."""
    length = START + 16
    matrix = attention(length, 3)
    state, past = OverTrustState.empty(3, START, span), []
    for row in range(START, length):
        past.append(state)
        state = state.push(matrix[:, row, : row + 1])
        if row == START + 6:
            index = torch.tensor([2, 2, 0])
            state, matrix = state.fork(index), matrix[index]
        penalty, column = over_trust_penalty(matrix[:, : row + 1, : row + 1], span, START)
        torch.testing.assert_close(state.penalty.log(), penalty.log(), atol=1e-6, rtol=1e-6, equal_nan=True)
        assert torch.equal(state.column, column)
    redone = past[12].push(matrix[:, START + 12, : START + 13]).push(attention(length, 3, seed=5)[:, START + 13, : START + 14])
    changed = matrix.clone()
    changed[:, START + 13] = attention(length, 3, seed=5)[:, START + 13]
    expected, _ = over_trust_penalty(changed[:, : START + 14, : START + 14], span, START)
    torch.testing.assert_close(redone.penalty.log(), expected.log(), atol=1e-6, rtol=1e-6)


def test_a_state_is_not_changed_by_what_is_made_of_it():
    state = pushed(attention(START + 12, 2), OverTrustState.empty(2, START, SPAN))
    before = state.log_scores.clone()
    state.push(torch.rand(2, START + 13)).fork(torch.tensor([1])).log_scores.zero_()
    assert torch.equal(state.log_scores, before)


def test_scores_that_float16_cannot_hold():
    """Half the attention on one token for 200 rows: 25^200 overflows any float; 0.5^200 underflows."""
    matrix = torch.zeros(START + 200, START + 200)
    matrix[:, START], matrix[:, 0] = 1.0, 1.0
    for scale, expected in ((50.0, 65504.0), (1.0, 0.0)):
        penalty, column = over_trust_penalty(matrix, SPAN, START, scale_factor=scale)
        assert penalty.item() == expected
        assert column.item() == 0


def test_no_attention_within_the_response():
    matrix = torch.zeros(START + 12, START + 12)
    matrix[:, 0] = 1.0
    penalty, _ = over_trust_penalty(matrix, SPAN, START)
    assert penalty.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_dtypes(dtype, device):
    matrix = attention(START + 12, 2).to(device, dtype)
    penalty, column = over_trust_penalty(matrix, SPAN, START)
    exact, exact_column = over_trust_penalty(matrix.double().cpu(), SPAN, START)
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert column.dtype == torch.int64
    torch.testing.assert_close(penalty.cpu().double(), exact, rtol=1e-4, atol=0)
    assert torch.equal(column.cpu(), exact_column)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": torch.ones(4, 5)}, "attention must be square"),
        ({"attention": torch.ones(START + 3, START + 3).tril().neg()}, "attention must be"),
        ({"attention": torch.zeros(START + 3, START + 3)}, "attention must be"),
        ({"attention": torch.full((START + 3, START + 3), torch.nan)}, "attention must be"),
        ({"response_start": START + 3}, "response_start must be"),
        ({"response_start": -1}, "response_start must be"),
        ({"image_span": (2, 1)}, "image_span must be"),
        ({"image_span": (1, START)}, "image_span must be"),
        ({"image_span": (-1, 1)}, "image_span must be"),
        ({"scale_factor": 0.0}, "scale_factor must be positive"),
        ({"scale_factor": math.inf}, "scale_factor must be positive"),
        ({"score_scale": -1.0}, "score_scale must be positive"),
        ({"warmup": -1}, "warmup must be at least 0"),
    ],
)
def test_bad_input(changes, message):
    given = {"attention": attention(START + 3), "image_span": SPAN, "response_start": START}
    with pytest.raises(Exception, match=f"{message}|Type-check error") as error:
        over_trust_penalty(**(given | changes))
    assert isinstance(error.value, ValueError) or "attention" in changes, "only the shape checks of the tests come first"


def test_rows_that_do_not_fit():
    state = OverTrustState.empty(2, START)
    with pytest.raises(ValueError, match=r"row must have 5 columns .* got 6"):
        state.push(torch.ones(2, 6))
    with pytest.raises(ValueError, match="row must have 2 sequences"):
        state.push(torch.ones(3, 5))
    with pytest.raises(ValueError, match="row must be finite and not negative"):
        state.push(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="no token"):
        _ = state.penalty
    with pytest.raises(ValueError, match="no token"):
        _ = state.column


def test_settings_travel_with_the_state():
    matrix = attention(START + 12, 2)
    state = pushed(matrix, OverTrustState.empty(2, START, SPAN, scale_factor=20.0, warmup=3, score_scale=1e-3))
    penalty, _ = over_trust_penalty(matrix, SPAN, START, scale_factor=20.0, warmup=3, score_scale=1e-3)
    torch.testing.assert_close(state.penalty, penalty)
    assert (replace(state, warmup=50).penalty < 0).all()

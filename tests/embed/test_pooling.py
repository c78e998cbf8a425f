import inspect

import pytest
import torch

from firsthand.embed.pooling import last_token_pool

LENGTHS = (5, 1, 3)


@pytest.fixture
def hidden():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def padded(rows, side, total):
    """The rows side by side, padded to `total` with what must never be read, and their mask."""
    hidden = torch.full((len(rows), total, rows[0].shape[1]), float("nan"))
    mask = torch.zeros(len(rows), total, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(total - len(row), total)
        hidden[i, where] = row
        mask[i, where] = 1
    return hidden, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("total", [5, 9])
def test_takes_the_last_real_token_whatever_the_padding(hidden, side, total):
    rows = [hidden[i, :n] for i, n in enumerate(LENGTHS)]
    expected = torch.stack([row[-1] for row in rows])
    torch.testing.assert_close(last_token_pool(*padded(rows, side, total)), expected, rtol=0, atol=0)


def test_without_padding_it_is_the_last_position(hidden):
    torch.testing.assert_close(last_token_pool(hidden, torch.ones(3, 5, dtype=torch.long)), hidden[:, -1], rtol=0, atol=0)


def test_boolean_mask_and_gaps(hidden):
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 0, 0, 0]])
    expected = torch.stack([hidden[0, 2], hidden[1, 4], hidden[2, 1]])
    torch.testing.assert_close(last_token_pool(hidden, mask), expected)
    torch.testing.assert_close(last_token_pool(hidden, mask.bool()), expected)


def test_gradient_reaches_only_the_pooled_tokens(hidden):
    hidden.requires_grad_()
    last_token_pool(hidden, torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])).sum().backward()
    expected = torch.zeros(3, 5, 4)
    expected[0, 4] = expected[1, 0] = expected[2, 2] = 1
    torch.testing.assert_close(hidden.grad, expected)


def test_agrees_with_sentence_transformers():
    pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules").Pooling
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, 8, generator=generator) for n in LENGTHS]
    for side in ("left", "right"):
        hidden, mask = padded(rows, side, 6)
        hidden = hidden.nan_to_num()  # the peer multiplies padding by 0
        theirs = pooling(8, pooling_mode="lasttoken")({"token_embeddings": hidden, "attention_mask": mask})
        torch.testing.assert_close(last_token_pool(hidden, mask), theirs["sentence_embedding"])


def test_bfloat16_is_kept(hidden):
    pooled = last_token_pool(hidden.bfloat16(), torch.ones(3, 5, dtype=torch.long))
    assert pooled.dtype == torch.bfloat16


def test_compiles_to_one_graph(hidden):
    compiled = torch.compile(inspect.unwrap(last_token_pool), fullgraph=True, backend="eager")  # without the shape checks
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    torch.testing.assert_close(compiled(hidden, mask), last_token_pool(hidden, mask))


def test_empty_row(hidden):
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"real token in every row, got none in rows \[1\]"):
        last_token_pool(hidden, mask)


def test_mask_of_another_shape(hidden):
    with pytest.raises((ValueError, TypeError), match=r"attention_mask|last_token_pool"):
        last_token_pool(hidden, torch.ones(3, 4, dtype=torch.long))

import math

import pytest
import torch

from firsthand.moe.load import ExpertLoad


def test_collapse_that_pooling_hides():
    """Four layers that each use one expert, each another: pooled they are perfectly balanced."""
    load = ExpertLoad(num_experts=4, num_layers=4)
    load.update([torch.full((10, 1), expert) for expert in range(4)])
    found = load.compute()
    assert (found["counts"].sum(0) == 10).all()  # what pooling sees
    torch.testing.assert_close(found["cv"], torch.full((4,), math.sqrt(3)))
    assert found["max_over_mean"].tolist() == [4.0] * 4
    assert found["dead"].tolist() == [3] * 4


def test_balanced():
    load = ExpertLoad(num_experts=4)
    load.update([torch.arange(8).view(4, 2) % 4])
    found = load.compute()
    assert found["cv"].item() == 0
    assert found["max_over_mean"].item() == 1
    assert found["dead"].item() == 0


def test_logits_are_counted_by_their_largest():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    one, other = ExpertLoad(6, top_k=2), ExpertLoad(6)
    one.update([logits])
    other.update([logits.topk(2).indices])
    assert torch.equal(one.compute()["counts"], other.compute()["counts"])


def test_groups_of_batches_and_of_tokens():
    index = torch.tensor([[0], [1], [1], [2]])
    by_batch, by_token = ExpertLoad(3, num_groups=2), ExpertLoad(3, num_groups=2)
    by_batch.update([index[:2]], group=0)
    by_batch.update([index[2:]], group=1)
    by_token.update([index], group=torch.tensor([0, 0, 1, 1]))
    expected = torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5]]])
    for load in (by_batch, by_token):
        torch.testing.assert_close(load.compute()["by_group"], expected)


def test_masked_tokens_and_missing_experts_do_not_count():
    load = ExpertLoad(3)
    load.update([torch.tensor([[0, 3], [1, 2], [2, 2]])], token_mask=torch.tensor([True, True, False]))
    assert load.compute()["counts"].tolist() == [[1, 1, 1]]


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")  # torchmetrics says it too
def test_batches_add_up_and_reset():
    load = ExpertLoad(3)
    for _ in range(2):
        load.update([torch.tensor([[0], [1]])])
    assert load.compute()["counts"].tolist() == [[2, 2, 0]]
    load.reset()
    with pytest.raises(ValueError, match="no expert was chosen yet"):
        load.compute()


def test_state_resumes():
    first, second = ExpertLoad(3), ExpertLoad(3)
    first.persistent(True)
    second.persistent(True)
    first.update([torch.tensor([[0], [1]])])
    second.load_state_dict(first.state_dict())
    for load in (first, second):
        load.update([torch.tensor([[2], [2]])])
    assert torch.equal(first.counts, second.counts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExpertLoad(0), "num_experts must be at least 1, got 0"),
        (lambda: ExpertLoad(3, top_k=4), r"top_k must be in \[1, 3\], got 4"),
        (
            lambda: ExpertLoad(3, num_layers=2).update([torch.zeros(1, 1, dtype=torch.int64)]),
            "layers must be of the 2 layers, got 1",
        ),
        (lambda: ExpertLoad(3).update([torch.randn(2, 3)]), "top_k must be given"),
        (lambda: ExpertLoad(3, top_k=1).update([torch.randn(2, 4)]), "logits must have 3 columns, got 4"),
        (lambda: ExpertLoad(3).update([torch.full((2, 1), 4)]), r"an index must be in \[0, 3\]"),
        (lambda: ExpertLoad(3).update([torch.zeros(2, 1, dtype=torch.int64)], group=1), r"group must be in \[0, 1\)"),
        (
            lambda: ExpertLoad(3).update([torch.zeros(2, 1, dtype=torch.int64)], token_mask=torch.ones(3)),
            "token_mask must have one entry for each of the 2 tokens, got 3",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

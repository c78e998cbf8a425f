import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firsthand.embed.contrastive import HardNegativeInfoNCELoss, info_nce_loss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Columns(nn.Module):
    """Stands for a SentenceTransformer: the features already are the embeddings."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["x"]}


@pytest.mark.parametrize("hard", [0, 3])
def test_in_batch_is_multiple_negatives_ranking(hard):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    query, target, negatives = random(6, 8, seed=1), random(6, 8, seed=2), random(6, hard, 8, seed=3)
    columns = [{"x": x} for x in (query, target, *negatives.unbind(1))]
    expected = losses.MultipleNegativesRankingLoss(Columns(), scale=1 / 0.05)(columns, None)
    ours = info_nce_loss(query, target, negatives if hard else None, temperature=0.05)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(HardNegativeInfoNCELoss(Columns(), temperature=0.05)(columns), expected)


def test_own_hard_negative_alone_is_a_softplus():
    query, target, negatives = random(6, 8, seed=1), random(6, 8, seed=2), random(6, 1, 8, seed=3)
    gap = F.cosine_similarity(query, negatives[:, 0]) - F.cosine_similarity(query, target)
    loss = info_nce_loss(query, target, negatives, temperature=0.1, in_batch_negatives=False, reduction="none")
    torch.testing.assert_close(loss, F.softplus(gap / 0.1))


@pytest.mark.parametrize(("group", "hard"), [(1, 0), (1, 2), (3, 0), (3, 2)])
def test_orthogonal_texts_have_a_closed_form(group, hard):
    rows, temperature = 4, 0.5
    basis = torch.eye(rows * (group + hard))
    target, negatives = basis[: rows * group], basis[rows * group :].unflatten(0, (rows, hard)) if hard else None
    query = 7 * target[::group]
    everywhere = math.log(1 + (rows * (group + hard) - 1) * math.exp(-1 / temperature))
    assert info_nce_loss(query, target, negatives, temperature=temperature).item() == pytest.approx(everywhere)
    if group + hard > 1:
        own = math.log(1 + (group + hard - 1) * math.exp(-1 / temperature))
        options = {"temperature": temperature, "in_batch_negatives": False}
        assert info_nce_loss(query, target, negatives, **options).item() == pytest.approx(own)


def test_a_group_is_a_positive_and_its_negatives():
    query, target = random(5, 8, seed=1), random(15, 8, seed=2)
    groups = target.unflatten(0, (5, 3))
    for in_batch in (False, True):
        grouped = info_nce_loss(query, target, in_batch_negatives=in_batch)
        apart = info_nce_loss(query, groups[:, 0], groups[:, 1:], in_batch_negatives=in_batch)
        torch.testing.assert_close(grouped, apart)


def test_without_in_batch_negatives_rows_do_not_meet():
    query, target, negatives = random(6, 8, seed=1), random(6, 8, seed=2).requires_grad_(), random(6, 2, 8, seed=3)
    loss = info_nce_loss(query, target, negatives, temperature=1.0, in_batch_negatives=False, reduction="none")
    (gradient,) = torch.autograd.grad(loss[2], target)
    assert gradient[2].abs().sum() > 0
    assert gradient[[0, 1, 3, 4, 5]].equal(torch.zeros(5, 8))
    together = info_nce_loss(query, target, negatives, temperature=1.0, reduction="none")
    (gradient,) = torch.autograd.grad(together[2], target)
    assert gradient.abs().sum(dim=1).gt(0).all()


@pytest.mark.parametrize("in_batch", [False, True])
def test_what_is_not_valid_has_no_say_but_the_positive_stays(in_batch):
    query, target, negatives = random(4, 8, seed=1), random(8, 8, seed=2), random(4, 3, 8, seed=3).requires_grad_()
    valid = torch.ones(4, 8 + 12 if in_batch else 2 + 3, dtype=torch.bool)
    columns = torch.arange(4)[:, None] * 3 + torch.arange(3) + 8 if in_batch else torch.arange(2, 5).expand(4, 3)
    options = {"in_batch_negatives": in_batch, "temperature": 0.3}
    if in_batch:
        valid[:, 8:] = False  # all negatives of all rows
    else:
        valid.scatter_(1, columns, False)
    loss = info_nce_loss(query, target, negatives, valid=valid, **options)
    torch.testing.assert_close(loss, info_nce_loss(query, target, **options))
    assert torch.autograd.grad(loss, negatives)[0].equal(torch.zeros(4, 3, 8))
    nothing = info_nce_loss(query, target, negatives, valid=torch.zeros_like(valid), **options)
    torch.testing.assert_close(nothing, torch.zeros(()))


def test_one_hard_negative_of_one_row_left_out_by_its_column():
    query, target, negatives = random(3, 8, seed=1), random(3, 8, seed=2), random(3, 2, 8, seed=3)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 3 + 2 * 2 + 1] = False  # the second negative of row 2 does not count for row 1
    scores = F.cosine_similarity(query[1], torch.cat([target, negatives.flatten(0, 1)])) / 0.2
    expected = scores[:8].logsumexp(0) - scores[1]
    loss = info_nce_loss(query, target, negatives, valid=valid, temperature=0.2, reduction="none")
    torch.testing.assert_close(loss[1], expected)


def test_length_matters_only_without_normalisation():
    query, target = random(5, 8, seed=1), random(5, 8, seed=2)
    torch.testing.assert_close(info_nce_loss(3 * query, target), info_nce_loss(query, target))
    inner = info_nce_loss(query, target, normalize=False, temperature=0.7)
    torch.testing.assert_close(inner, F.cross_entropy(query @ target.T / 0.7, torch.arange(5)))


def test_reductions():
    query, target = random(5, 8, seed=1), random(5, 8, seed=2)
    each = info_nce_loss(query, target, reduction="none")
    assert each.shape == (5,)
    torch.testing.assert_close(info_nce_loss(query, target), each.mean())
    torch.testing.assert_close(info_nce_loss(query, target, reduction="sum"), each.sum())


def test_an_embedding_of_zeros_gives_finite_numbers():
    query = random(4, 8).index_fill(0, torch.tensor([0]), 0.0).requires_grad_()
    loss = info_nce_loss(query, random(4, 8, seed=1))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, query)[0].isfinite().all()


@pytest.mark.parametrize("in_batch", [False, True])
def test_gradient_numerically(in_batch):
    inputs = [random(*shape, seed=seed).double().requires_grad_() for seed, shape in enumerate([(3, 4), (6, 4), (3, 2, 4)])]
    assert torch.autograd.gradcheck(lambda *x: info_nce_loss(*x, temperature=0.5, in_batch_negatives=in_batch), inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_batch", [False, True])
def test_half_precision_follows_the_input_and_computes_in_float32(in_batch, device):
    half = [random(*shape, seed=seed).to(device, torch.bfloat16) for seed, shape in enumerate([(5, 8), (5, 8), (5, 2, 8)])]
    loss = info_nce_loss(*half, in_batch_negatives=in_batch)
    assert loss.dtype == torch.bfloat16
    assert loss.device.type == device
    single = [x.float() for x in half]
    expected = info_nce_loss(*single, in_batch_negatives=in_batch)
    torch.testing.assert_close(loss, expected.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(info_nce_loss(*single, in_batch_negatives=in_batch), expected)


@pytest.mark.parametrize("in_batch", [False, True])
def test_compiles_into_one_graph(in_batch, unchecked):
    inputs = random(5, 8), random(5, 8, seed=1), random(5, 2, 8, seed=2)
    compiled = torch.compile(info_nce_loss, backend="eager", fullgraph=True)
    options = {"in_batch_negatives": in_batch}
    torch.testing.assert_close(compiled(*inputs, **options), info_nce_loss(*inputs, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature"),
        ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"query": random(8)}, r"query must have shape \(B, d\)"),
        ({"target": random(9, 8)}, r"target must have shape \(g·4, 8\).*got \(9, 8\)"),
        ({"target": random(4, 7)}, r"target .*got \(4, 7\)"),
        ({"negatives": random(3, 2, 8)}, r"negatives must have shape \(4, K, 8\), got \(3, 2, 8\)"),
        ({"valid": torch.ones(4, 4, dtype=torch.bool)}, r"valid must have shape \(4, 12\), got \(4, 4\)"),
        ({"query": torch.ones(4, 8, dtype=torch.long)}, "query must be floating point"),
        ({"in_batch_negatives": False, "negatives": None}, "negatives must be given .*4 rows, 1 target a row"),
        ({"in_batch_negatives": False, "negatives": random(4, 0, 8)}, "negatives must be given"),
        ({"query": random(1, 8), "target": random(1, 8), "negatives": None}, "negatives must be given .*1 rows"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(unchecked, change, message):
    good = {"query": random(4, 8), "target": random(4, 8), "negatives": random(4, 2, 8)}
    with pytest.raises(ValueError, match=message):
        info_nce_loss(**good | change)


# --- as a loss of sentence-transformers -----------------------------------------------------------------------------------


def test_loss_takes_columns_and_the_switch():
    pytest.importorskip("sentence_transformers")
    texts = [random(4, 8, seed=seed) for seed in range(4)]
    columns = [{"x": x} for x in texts]
    for in_batch in (False, True):
        loss = HardNegativeInfoNCELoss(Columns(), 0.1, in_batch_negatives=in_batch)(columns, None)
        expected = info_nce_loss(*texts[:2], torch.stack(texts[2:], 1), temperature=0.1, in_batch_negatives=in_batch)
        torch.testing.assert_close(loss, expected)


def test_a_last_batch_of_one_pair_costs_nothing():
    pytest.importorskip("sentence_transformers")
    single = random(1, 8).requires_grad_()
    loss = HardNegativeInfoNCELoss(Columns())([{"x": single}, {"x": random(1, 8)}])
    loss.backward()
    assert loss.item() == 0
    assert not single.grad.any()


def test_loss_without_negatives_to_take(unchecked):
    pytest.importorskip("sentence_transformers")
    columns = [{"x": random(4, 8)}, {"x": random(4, 8)}]
    with pytest.raises(ValueError, match=r"query, positive, negative \(no in-batch negatives\), got 2 columns"):
        HardNegativeInfoNCELoss(Columns(), in_batch_negatives=False)(columns)
    with pytest.raises(ValueError, match="query, positive, got 1 columns"):
        HardNegativeInfoNCELoss(Columns())(columns[:1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        HardNegativeInfoNCELoss(Columns(), temperature=-1.0)


def test_config_holds_every_option():
    config = HardNegativeInfoNCELoss(Columns(), 0.1, in_batch_negatives=False).get_config_dict()
    assert config == {"temperature": 0.1, "in_batch_negatives": False}

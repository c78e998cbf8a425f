import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from firsthand.vision.mil import AttentionMIL, mask_padding

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def build(**options):
    torch.manual_seed(0)
    return AttentionMIL(6, hidden=8, att_dim=5, **options).eval()


@pytest.fixture
def bags():
    return torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gated", [False, True])
def test_a_bag_of_one_instance_is_that_instance(bags, gated):
    model = build(gated=gated)
    expected = model.classifier(model.feat_ext(bags[:, 0])).squeeze(1)
    torch.testing.assert_close(model(bags[:, :1]), expected)


def test_without_scores_it_is_mean_pooling(bags):
    model = build(n_classes=4)
    torch.nn.init.zeros_(model.pool.score.weight)
    logits, scores = model(bags, return_att=True)
    assert not scores.any()
    torch.testing.assert_close(logits, model.classifier(model.feat_ext(bags).mean(1)))


def test_with_huge_scores_it_is_max_pooling_of_the_best_scored(bags):
    model = build()
    model.pool.score.weight.data *= 1e6
    logits, scores = model(bags, return_att=True)
    best = bags[torch.arange(3), scores.argmax(1)]
    torch.testing.assert_close(logits, model.classifier(model.feat_ext(best)).squeeze(1))


def test_a_gate_that_is_always_half_open_halves_the_scores(bags):
    gated, plain = build(gated=True), build()
    plain.load_state_dict(gated.state_dict(), strict=False)
    for parameter in gated.pool.gate.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(gated(bags, return_att=True)[1], plain(bags, return_att=True)[1] / 2)


@pytest.mark.parametrize("gated", [False, True])
def test_order_of_instances_does_not_matter(bags, gated):
    model, order = build(gated=gated), torch.randperm(7)
    logits, scores = model(bags, return_att=True)
    permuted_logits, permuted_scores = model(bags[:, order], return_att=True)
    torch.testing.assert_close(permuted_logits, logits)
    torch.testing.assert_close(permuted_scores, scores[:, order])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_padding_changes_nothing(bags, dtype):
    model = build()
    padded = torch.cat([bags, torch.full((3, 4, 6), 50.0)], dim=1).requires_grad_()
    mask = torch.cat([torch.ones(3, 7), torch.zeros(3, 4)], dim=1).to(dtype)
    logits = model(padded, mask)
    torch.testing.assert_close(logits, model(bags))
    logits.sum().backward()
    assert not padded.grad[:, 7:].any()
    assert padded.grad[:, :7].any()


def test_loss_is_the_cross_entropy_of_the_logits(bags):
    binary, many = build(), build(n_classes=3)
    labels = torch.tensor([1, 0, 1])
    logits, terms = binary.compute_loss(labels, bags)
    assert logits.shape == (3,)
    assert list(terms) == ["BCEWithLogitsLoss"]
    torch.testing.assert_close(terms["BCEWithLogitsLoss"], F.softplus(torch.where(labels == 1, -logits, logits)).mean())
    logits, terms = many.compute_loss(labels, bags)
    assert logits.shape == (3, 3)
    torch.testing.assert_close(terms["CrossEntropyLoss"], -logits.log_softmax(1)[range(3), labels].mean())


def test_predict_is_forward_with_scores(bags):
    model = build()
    for predicted, expected in zip(model.predict(bags), model(bags, return_att=True), strict=True):
        torch.testing.assert_close(predicted, expected)
    torch.testing.assert_close(model.predict(bags, return_inst_pred=False), model(bags))


def test_dropout_only_in_training(bags):
    model = build(dropout=0.5)
    torch.testing.assert_close(model(bags), model(bags))
    model.train()
    assert not torch.equal(model(bags), model(bags))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_dtype_and_device(bags, dtype, device):
    model = build(gated=True).to(device, dtype)
    logits, terms = model.compute_loss(torch.tensor([1.0, 0.0, 1.0], device=device), bags.to(device, dtype))
    assert logits.dtype == dtype
    assert logits.device.type == device
    terms["BCEWithLogitsLoss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles_in_one_graph(bags, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks of the tests cannot be traced
    model = build()
    mask = torch.ones(3, 7, dtype=torch.bool)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(bags, mask), model(bags, mask))


@pytest.mark.parametrize("option", ["in_dim", "hidden", "att_dim", "n_classes"])
def test_widths_below_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        AttentionMIL(**{"in_dim": 4, option: 0})


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_dropout_out_of_range(dropout):
    with pytest.raises(ValueError, match="dropout must be in"):
        AttentionMIL(4, dropout=dropout)


def test_bad_masks(bags):
    scores = bags[..., 0]
    empty_second = torch.ones(3, 7, dtype=torch.bool)
    empty_second[1] = False
    with pytest.raises(ValueError, match="at least one instance of each bag, got none in bag 1"):
        mask_padding(scores, empty_second)
    with pytest.raises(ValueError, match=r"mask must have shape .* \(3, 7\), got \(1, 7\)"):
        mask_padding(scores, torch.ones(1, 7))
    with pytest.raises(ValueError, match="at least one instance a bag"):
        mask_padding(scores[:, :0], None)

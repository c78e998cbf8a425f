import copy
import subprocess
import sys

import jaxtyping
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from firsthand.studies import kind as kind_study
from firsthand.weights.kind import (
    DiversionLinear,
    attach_tailors,
    class_gate,
    class_gate_matrix,
    divert,
    extract_learngene,
    gate_by,
    keep_classes,
    merge,
)

CLASSES, SHARED, TAILOR = 3, 4, 2


def layer(**options):
    options = {"shared_rank": SHARED, "num_classes": CLASSES, "tailor_rank": TAILOR} | options
    made = DiversionLinear(12, 10, generator=torch.Generator().manual_seed(0), **options)
    with torch.no_grad():
        if made.bias is not None:
            made.bias.normal_(generator=torch.Generator().manual_seed(1))
        made.shared_s.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
        made.tailor_s.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    return made


def batch(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


class Conditional(nn.Module):
    """A host whose layers are named as usual, with a class embedding of its own."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.classes = nn.Embedding(classes, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, x, labels=None):
        if labels is not None:
            x = x + self.classes(labels)
        for block in self.blocks:
            x = x + block["fc2"](torch.relu(block["fc1"](x)))
        return self.head(x)


def host(**options):
    torch.manual_seed(0)
    options = {"shared_rank": SHARED, "num_classes": CLASSES, "tailor_rank": 1} | options
    return divert(Conditional(), **options)


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes)).eval()


# --- the layer


def test_without_tailors_it_is_a_low_rank_layer():
    plain = layer(tailor_rank=0, bias=False)
    x = batch(5, 12)
    product = plain.shared_u @ plain.shared_s.diag() @ plain.shared_v
    torch.testing.assert_close(plain(x), x @ product.T)
    assert torch.linalg.matrix_rank(product) == SHARED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 12), (6, 5, 12), (6, 2, 3, 12)])
def test_each_sample_gets_the_dense_layer_of_its_class(shape, dtype):
    gated, x, ids = layer().to(dtype), batch(*shape).to(dtype), torch.tensor([0, 2, 1, -1, 0, 2])
    y = gated(x, ids)
    assert y.dtype == dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for row, class_id in enumerate(ids.tolist()):
        dense = nn.functional.linear(x[row], gated.dense_weight(class_id), gated.bias)
        torch.testing.assert_close(y[row], dense, **tolerance)


def test_a_mixed_batch_is_each_sample_alone():
    gated, x, ids = layer(), batch(4, 3, 12), torch.tensor([1, 0, 2, -1])
    alone = torch.cat([gated(x[row : row + 1], ids[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(gated(x, ids), alone)


def test_a_sample_trains_the_learngene_and_the_tailors_of_its_class_only():
    gated = layer()
    gated(batch(4, 12), torch.tensor([1, 1, 1, 1])).square().sum().backward()
    mine = class_gate_matrix(CLASSES, TAILOR)[1]
    assert (gated.shared_s.grad != 0).all()
    for name, dim in (("tailor_u", 1), ("tailor_s", 0), ("tailor_v", 0)):
        gradient = getattr(gated, name).grad.movedim(dim, 0)
        touched = (gradient != 0).reshape(len(mine), -1).any(dim=1)
        assert touched.tolist() == mine.tolist()


def test_minus_one_opens_the_learngene_alone():
    gated = layer()
    without = copy.deepcopy(gated)
    without.new_tailors(0, 0)
    x = batch(3, 12)
    torch.testing.assert_close(gated(x, torch.tensor([-1, -1, -1])), without(x))
    torch.testing.assert_close(gated.dense_weight(-1), without.dense_weight(None))


def test_several_classes_open_the_union():
    gated = layer()
    alone = [gated.dense_weight(each) - gated.dense_weight(-1) for each in range(CLASSES)]
    torch.testing.assert_close(gated.dense_weight([0, 2]), gated.dense_weight(-1) + alone[0] + alone[2])
    torch.testing.assert_close(gated.dense_weight(None), gated.dense_weight([0, 1, 2]))


def test_classes_can_share_tailors():
    gate = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    gated = layer(num_classes=2, gate=gate)
    gated(batch(1, 12), torch.tensor([0])).sum().backward()
    assert (gated.tailor_s.grad != 0).tolist() == gate[0].tolist()


def test_from_dense_is_the_singular_value_decomposition():
    torch.manual_seed(0)
    dense = nn.Linear(12, 10)
    whole = DiversionLinear.from_dense(dense, SHARED, CLASSES, TAILOR)  # 4 + 3 · 2 = 10, the rank of the weight
    torch.testing.assert_close(whole.dense_weight(None), dense.weight)
    values = torch.linalg.svdvals(dense.weight)
    torch.testing.assert_close(torch.cat([whole.shared_s, whole.tailor_s]), values)
    left_out = torch.linalg.matrix_norm(whole.dense_weight(-1) - dense.weight)
    torch.testing.assert_close(left_out, values[SHARED:].square().sum().sqrt())
    torch.testing.assert_close(
        whole(batch(2, 12), torch.tensor([-1, -1])) - batch(2, 12) @ whole.dense_weight(-1).T, dense.bias.expand(2, -1)
    )


@pytest.mark.parametrize("std", [None, 0.02, 0.0])
def test_a_class_begins_with_a_weight_of_the_deviation_asked_for(std):
    wide = DiversionLinear(400, 300, 40, 3, 10, std=std, generator=torch.Generator().manual_seed(0))
    expected = 400**-0.5 if std is None else std
    for each in range(3):
        assert wide.dense_weight(each).std().item() == pytest.approx(expected, rel=0.05, abs=1e-9)


def test_a_seed_gives_the_same_weights():
    for name, tensor in layer().state_dict().items():
        torch.testing.assert_close(tensor, layer().state_dict()[name], rtol=0, atol=0)


def test_state_is_saved_with_the_gate():
    gate = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    shared = layer(num_classes=2, gate=gate)
    other = layer(num_classes=2, gate=gate.flip(1))
    other.load_state_dict(shared.state_dict())
    x, ids = batch(2, 12), torch.tensor([0, 1])
    torch.testing.assert_close(other(x, ids), shared(x, ids))


def test_compiles_whole(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks of the tests cannot be traced
    gated, x = layer(), batch(4, 3, 12)
    fast = torch.compile(gated, fullgraph=True, backend="aot_eager")
    for ids in (torch.tensor([0, 1, 2, -1]), torch.tensor([2, 2, 0, 1])):
        with class_gate(gated, ids):
            torch.testing.assert_close(fast(x), gated(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda")
def test_on_cuda():
    gated, x, ids = layer().cuda(), batch(4, 12).cuda(), torch.tensor([0, 1, 2, -1]).cuda()
    torch.testing.assert_close(gated(x, ids).cpu(), layer()(batch(4, 12), ids.cpu()), atol=1e-4, rtol=1e-4)
    assert attach_tailors(gated, 2, 3).tailor_u.is_cuda
    assert gated.gate.is_cuda


# --- a model


def test_divert_takes_the_layers_of_a_transformer():
    model = divert(vit(), 4, 3, 1)
    replaced = {name for name, module in model.named_modules() if isinstance(module, DiversionLinear)}
    parts = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    assert replaced == {f"vit.layers.{index}.{part}" for index in range(2) for part in parts}
    assert type(model.classifier) is nn.Linear


def test_divert_takes_what_it_is_told_to():
    model = divert(Conditional(), 2, 3, 1, target=("blocks.1.fc1", "head"))
    assert {name for name, module in model.named_modules() if isinstance(module, DiversionLinear)} == {"blocks.1.fc1", "head"}


def test_divert_can_keep_what_the_model_computes():
    torch.manual_seed(0)
    model = Conditional()
    x, ids = batch(5, 8), torch.tensor([0, 1, 2, 0, 1])
    before = model(x, ids)
    divert(model, 8, CLASSES, 0, keep_weights=True)
    torch.testing.assert_close(model(x, ids), before)


def test_the_gate_is_open_inside_of_the_context_only():
    model, x, ids = host(), batch(3, 8), torch.tensor([2, 0, 1])
    with pytest.raises(ValueError, match="class_ids must be given"):
        model(x, ids)
    with class_gate(model, ids):
        inside = model(x, ids)
        with class_gate(model, ids.flip(0)):
            assert not torch.allclose(model(x, ids), inside)
        torch.testing.assert_close(model(x, ids), inside)
    with pytest.raises(RuntimeError, match="on purpose"), class_gate(model, ids):
        raise RuntimeError("on purpose")
    with pytest.raises(ValueError, match="class_ids must be given"):
        model(x, ids)


def test_gated_by_an_argument():
    model, x, ids = host(), batch(3, 8), torch.tensor([2, 0, 1])
    with class_gate(model, ids):
        expected = model(x, ids)
    handles = gate_by(model, "labels")
    copied = copy.deepcopy(model)
    for call in (model(x, ids), model(x, labels=ids), model(labels=ids, x=x), copied(x, ids)):
        torch.testing.assert_close(call, expected)
    with pytest.raises(ValueError, match=r"class ids must be in \[-1, 3\), got 5 to 5"):
        model(x, torch.tensor([5, 5, 5]))
    with pytest.raises(IndexError):
        model(batch(2, 8), torch.tensor([0, -1]))  # the host's embedding has no -1; the ids are forgotten all the same
    with pytest.raises(ValueError, match="class_ids must be given"):
        model(x)
    for handle in handles:
        handle.remove()
    with pytest.raises(ValueError, match="class_ids must be given"):
        model(x, ids)


def test_merged_is_the_gated_model_of_a_class():
    model, x = host(), batch(4, 8)
    for class_id in range(CLASSES):
        ids = torch.full((4,), class_id)
        with class_gate(model, ids):
            gated = model(x, ids)
        merged = merge(model, class_id)
        assert not any(isinstance(module, DiversionLinear) for module in merged.modules())
        assert merged.state_dict().keys() == Conditional().state_dict().keys()
        torch.testing.assert_close(merged(x, ids), gated, atol=1e-5, rtol=1e-5)
    gate_by(model, "labels")
    torch.testing.assert_close(merge(model, 2)(x, ids), gated, atol=1e-5, rtol=1e-5)
    assert any(isinstance(module, DiversionLinear) for module in model.modules())


def test_keeping_classes_drops_tailors_and_changes_nothing_else():
    model, x = host(), batch(2, 8)
    with class_gate(model, torch.tensor([2, 0])):
        before = model(x)
    size = sum(parameter.numel() for parameter in model.parameters())
    model.requires_grad_(False)
    keep_classes(model, [0, 2])
    with class_gate(model, torch.tensor([1, 0])):
        torch.testing.assert_close(model(x), before)
    assert size - sum(parameter.numel() for parameter in model.parameters()) == 4 * (8 + 16 + 1)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"class ids must be in \[0, 2\)"):
        keep_classes(model, [2])


def test_the_learngene_moves_to_new_classes():
    old, new = host(), host(num_classes=5, tailor_rank=2)
    learngene = {name: tensor for name, tensor in extract_learngene(old).items() if not name.startswith("classes.")}
    assert not any("tailor" in name or "gate" in name for name in learngene)
    missing, unexpected = new.load_state_dict(learngene, strict=False)
    assert not unexpected
    assert all("tailor" in name or name.endswith("gate") or name.startswith("classes.") for name in missing)
    x = batch(3, 8)
    ids = torch.full((3,), -1)
    with class_gate(old, ids), class_gate(new, ids):
        torch.testing.assert_close(old(x), new(x))


def test_only_new_tailors_are_trained():
    model = attach_tailors(host(), 5, 2, generator=torch.Generator().manual_seed(0))
    frozen = {name: tensor.clone() for name, tensor in extract_learngene(model).items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    with class_gate(model, torch.tensor([0, 4, 2])):
        model(batch(3, 8)).square().sum().backward()
    optimizer.step()
    for name, tensor in extract_learngene(model).items():
        torch.testing.assert_close(tensor, frozen[name], rtol=0, atol=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 2 * 5 * 2 * (2 * (8 + 16 + 1))
    assert all(p.requires_grad for p in attach_tailors(host(), 5, 2, freeze_learngene=False).parameters())


def test_trainer_trains_it(tmp_path):
    class Regression(Conditional):
        def forward(self, x, labels=None):
            y = super().forward(x)
            return {"loss": (y.sum(dim=1) - labels).square().mean(), "logits": y}

    torch.manual_seed(0)
    model = divert(Regression(), SHARED, CLASSES, TAILOR)
    gate_by(model, "labels")
    rows = [{"x": batch(8), "labels": index % 2} for index in range(8)]  # the last class is not among them
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(tmp_path, **options, save_strategy="no", learning_rate=1e-2)
    before = model.blocks[0]["fc1"].tailor_u.detach().clone()
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = (model.blocks[0]["fc1"].tailor_u != before).any(dim=0)
    assert changed.tolist() == [True] * 2 * TAILOR + [False] * TAILOR


def test_a_merged_model_loads_in_a_process_that_knows_nothing_of_us(tmp_path):
    model = divert(vit(), 4, 3, 1, generator=torch.Generator().manual_seed(0))
    image = batch(1, 1, 8, 8)
    with class_gate(model, torch.tensor([2])), torch.no_grad():
        expected = model(image).logits
    merge(model, 2).save_pretrained(tmp_path)
    torch.save(image, tmp_path / "image.pt")
    script = """
import sys, torch
from transformers import ViTForImageClassification
folder = sys.argv[1]
model, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
torch.save(model.eval()(torch.load(f"{folder}/image.pt")).logits.detach(), f"{folder}/logits.pt")
assert not any(name.startswith("firsthand") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-5)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_rank": 0, "tailor_rank": 0}, "at least 1, got 0: there would be no component"),
        ({"shared_rank": -1}, "shared_rank must be at least 0, got -1"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"tailor_rank": -2}, "tailor_rank must be at least 0, got -2"),
        ({"std": float("nan")}, "std must be at least 0 and finite, got nan"),
        ({"gate": torch.ones(2, 2, dtype=torch.bool)}, "gate must have a row for each of 3 classes"),
        ({"gate": torch.ones(3, 3, dtype=torch.bool)}, "that opens 2 tailors"),
    ],
)
def test_layers_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        class_gate_matrix(-1, 2)


def test_ids_that_fit_nothing():
    gated, x = layer(), batch(2, 12)
    with pytest.raises(ValueError, match=r"class ids must be in \[-1, 3\), got 0 to 3"):
        gated(x, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="class_ids must be given"):
        gated(x)
    with class_gate(gated, torch.tensor([0, 1, 2])), pytest.raises(ValueError, match="one for each of the 2 samples"):
        gated(x)
    with pytest.raises(ValueError, match="class ids must be in"), class_gate(gated, torch.tensor([-2])):
        pass
    for class_id in (3, -2, [0, 7]):
        with pytest.raises(ValueError, match="class ids must be in"):
            gated.dense_weight(class_id)


def test_models_that_cannot_be_diverted():
    with pytest.raises(ValueError, match="it has none called 'q'"):
        divert(Conditional(), 2, 3, 1, target=("fc1", "q"))
    with pytest.raises(ValueError, match="model must have linear layers to replace"):
        divert(nn.Sequential(nn.ReLU()), 2, 3, 1, target=())
    with pytest.raises(ValueError, match="shared_rank and tailors must be at most 8 together"):
        divert(Conditional(), 8, 3, 1, keep_weights=True)
    plain = Conditional()
    for call in (
        lambda: merge(plain, 0),
        lambda: extract_learngene(plain),
        lambda: attach_tailors(plain, 2, 1),
        lambda: keep_classes(plain, [0]),
        lambda: gate_by(plain, "labels"),
        lambda: class_gate(plain, torch.tensor([0])).__enter__(),
    ):
        with pytest.raises(ValueError, match="model must have layers of DiversionLinear"):
            call()
    with pytest.raises(ValueError, match=r"argument must be one of Conditional.forward, got 'classes'"):
        gate_by(host(), "classes")


# --- the study


def test_arms_train_about_as_much():
    """LoRA's rank times inputs and outputs, and beyond that only the tailors' scales."""
    width, ranks = kind_study.WIDTH, kind_study.NEW * kind_study.TAILOR
    model = divert(nn.Sequential(nn.Linear(width, width, bias=False)), kind_study.SHARED, 6, 4, target=("0",))
    attach_tailors(model, kind_study.NEW, kind_study.TAILOR)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == ranks * (2 * width + 1)

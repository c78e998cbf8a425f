import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from firsthand.weights.layers import layer_weights
from firsthand.weights.tleg import LinearLearngene, fit_linear_learngene, linear_expand

# transformers has a new name for it, which its first releases of version 5 do not know.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

DEPTH = 4
TEXT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
BUILD = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGE, num_hidden_layers=DEPTH, num_labels=3)),
    "bert": lambda: BertForMaskedLM(BertConfig(**TEXT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=DEPTH, n_head=2, n_positions=32)),
}
every_host = pytest.mark.parametrize("host", BUILD)


def build(host="vit"):
    torch.manual_seed(0)
    return BUILD[host]().eval()


def learngene(host="vit"):
    """With weights far from the initial ones, so that one in a wrong place shows."""
    model = LinearLearngene(build(host), generator=torch.Generator().manual_seed(0)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(host="vit"):
    generator = torch.Generator().manual_seed(2)
    if host == "vit":
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(48, (2, 9), generator=generator)}


def tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return {f"weight{index}": torch.randn(shape, generator=generator) for index, shape in enumerate(shapes)}


# --- linear_expand


def test_layers_lie_on_a_line_from_base_that_stops_short_of_base_plus_slope():
    base, slope = tensors(0, (2, 3), (3,)), tensors(1, (2, 3), (3,))
    layers = linear_expand(base, slope, 4)
    assert len(layers) == 4
    for name in base:
        assert torch.equal(layers[0][name], base[name])
        torch.testing.assert_close(layers[2][name], base[name] + slope[name] / 2)
        torch.testing.assert_close(layers[3][name] + slope[name] / 4, base[name] + slope[name])
    assert torch.equal(linear_expand(base, slope, 1)[0]["weight0"], base["weight0"])


def test_layers_are_nobodys_memory():
    base, slope = tensors(0, (2,)), tensors(1, (2,))
    layers = linear_expand(base, slope, 2)
    layers[0]["weight0"].add_(1.0)
    assert torch.equal(base["weight0"], tensors(0, (2,))["weight0"])
    assert torch.equal(layers[1]["weight0"], base["weight0"] + slope["weight0"] / 2)


def test_gradients_are_sums_over_layers():
    base, slope = ({"w": weight["weight0"].requires_grad_()} for weight in (tensors(0, (3, 2)), tensors(1, (3, 2))))
    layers = linear_expand(base, slope, 5)
    gradients = [tensors(10 + index, (3, 2))["weight0"] for index in range(5)]
    sum((layer["w"] * gradient).sum() for layer, gradient in zip(layers, gradients, strict=True)).backward()
    torch.testing.assert_close(base["w"].grad, sum(gradients))
    torch.testing.assert_close(slope["w"].grad, sum(index / 5 * gradient for index, gradient in enumerate(gradients)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_base(dtype):
    layers = linear_expand({"w": torch.ones(2, dtype=dtype)}, {"w": torch.full((2,), 2.0, dtype=dtype)}, 2)
    assert layers[1]["w"].dtype == dtype
    assert torch.equal(layers[1]["w"], torch.full((2,), 2.0, dtype=dtype))


def test_what_cannot_be_expanded():
    base = tensors(0, (2, 3))
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        linear_expand(base, base, 0)
    with pytest.raises(
        ValueError, match=r"slope must have the tensors of base: shape of 'weight0' there \(2, 3\), here \(3, 2\)"
    ):
        linear_expand(base, tensors(0, (3, 2)), 2)
    with pytest.raises(ValueError, match=r"shape of 'weight1' there none, here \(1,\)"):
        linear_expand(base, tensors(0, (2, 3), (1,)), 2)


# --- fit_linear_learngene


@pytest.mark.parametrize("depth", [2, 3, 8])
def test_fit_undoes_expansion(depth):
    base, slope = tensors(0, (2, 3), (3,)), tensors(1, (2, 3), (3,))
    found_base, found_slope, r2 = fit_linear_learngene(linear_expand(base, slope, depth))
    torch.testing.assert_close(found_base, base)
    torch.testing.assert_close(found_slope, slope, atol=1e-5, rtol=1e-5)
    assert r2 == pytest.approx({"weight0": 1.0, "weight1": 1.0})


def test_fit_agrees_with_numpy():
    layers = [tensors(seed, (3,)) for seed in range(6)]
    base, slope, r2 = fit_linear_learngene(layers)
    values = np.stack([layer["weight0"].numpy() for layer in layers])
    (steep, flat), residual, *_ = np.polyfit(np.arange(6) / 6, values, 1, full=True)
    torch.testing.assert_close(slope["weight0"], torch.from_numpy(steep).float())
    torch.testing.assert_close(base["weight0"], torch.from_numpy(flat).float())
    assert r2["weight0"] == pytest.approx(1 - residual.sum() / np.square(values - values.mean(0)).sum(), rel=1e-4)


def test_unrelated_layers_come_to_one_over_depth_less_one():
    layers = [tensors(seed, (200, 50)) for seed in range(6)]
    assert fit_linear_learngene(layers)[2]["weight0"] == pytest.approx(1 / 5, abs=0.02)


def test_layers_that_are_all_the_same():
    layer = tensors(0, (2, 3))
    for depth in (1, 4):
        base, slope, r2 = fit_linear_learngene([layer] * depth)
        torch.testing.assert_close(base, layer)
        assert torch.equal(slope["weight0"], torch.zeros(2, 3))
        assert r2 == {"weight0": 1.0}


def test_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="layers must be at least one, got none"):
        fit_linear_learngene([])
    with pytest.raises(ValueError, match=r"layers\[1\] must have the tensors of layers\[0\]"):
        fit_linear_learngene([tensors(0, (2,)), tensors(0, (3,))])


# --- LinearLearngene


@every_host
def test_expanded_to_its_own_depth_it_computes_the_same(host):
    model = learngene(host)
    expanded = model.expand()
    assert type(expanded) is type(build(host))
    assert expanded.config.num_hidden_layers == DEPTH
    torch.testing.assert_close(expanded(**inputs(host)).logits, model(**inputs(host)).logits)


@every_host
@pytest.mark.parametrize("depth", [1, 3, 7])
def test_any_depth_and_no_ties(host, depth):
    model = learngene(host)
    expanded = model.expand(depth)
    layers = layer_weights(expanded)
    assert len(layers) == depth
    base, slope = dict(model.base.named_parameters()), dict(model.slope.named_parameters())
    for index, layer in enumerate(layers):
        for name, weight in layer.items():
            torch.testing.assert_close(weight.detach(), (base[name] + index / depth * slope[name]).detach())
            assert weight.is_leaf
            assert weight.requires_grad
    assert not {weight.data_ptr() for weight in expanded.parameters()} & {weight.data_ptr() for weight in model.parameters()}
    assert expanded(**inputs(host)).logits.shape == model(**inputs(host)).logits.shape


@every_host
def test_it_holds_two_layers_whatever_the_depth(host):
    model = build(host)
    size = sum(parameter.numel() for parameter in LinearLearngene(model).parameters())
    of_layer = sum(weight.numel() for weight in layer_weights(model)[0].values())
    assert size == sum(parameter.numel() for parameter in model.parameters()) - (DEPTH - 2) * of_layer


@every_host
def test_without_slope_all_layers_are_one(host):
    model = learngene(host)
    with torch.no_grad():
        for parameter in model.slope.parameters():
            parameter.zero_()
    tied = build(host)
    tied.load_state_dict(model.expand().state_dict())
    path = model.path
    layers = tied.get_submodule(path)
    for layer in layers[1:]:  # one set of parameters for all layers, as ALBERT has
        for mine, its in zip(layer.modules(), layers[0].modules(), strict=True):
            mine._parameters.update(its._parameters)
    logits = model(**inputs(host)).logits
    torch.testing.assert_close(logits, tied(**inputs(host)).logits)
    logits.square().sum().backward()
    tied(**inputs(host)).logits.square().sum().backward()
    for mine, its in zip(model.base.parameters(), layers[0].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_the_expanded_model():
    model = learngene()
    expanded = model.expand()
    for each in (model, expanded):
        each(**inputs()).logits.square().sum().backward()
    layers = layer_weights(expanded)
    for name, base in model.base.named_parameters():
        slope = model.slope.get_parameter(name)
        torch.testing.assert_close(base.grad, sum(layer[name].grad for layer in layers), rtol=1e-3, atol=1e-4)
        expected = sum(index / DEPTH * layer[name].grad for index, layer in enumerate(layers))
        torch.testing.assert_close(slope.grad, expected, rtol=1e-3, atol=1e-4)
    shared = expanded.classifier.weight.grad
    torch.testing.assert_close(model.model.classifier.weight.grad, shared, rtol=1e-3, atol=1e-4)


def test_how_it_starts():
    model = build("llama")
    state = torch.get_rng_state()
    started = LinearLearngene(model, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    first = layer_weights(model)[0]
    assert all(torch.equal(parameter, first[name]) for name, parameter in started.base.named_parameters())
    for parameter in started.slope.parameters():
        if parameter.ndim == 1:
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
    again = LinearLearngene(model, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(mine, its) for mine, its in zip(started.parameters(), again.parameters(), strict=True))


def test_a_model_that_is_linear_in_depth_is_found_again():
    model = learngene("bert")
    expanded = model.expand()
    fitted = LinearLearngene(expanded, start="fit").eval()
    torch.testing.assert_close(fitted(**inputs("bert")).logits, expanded(**inputs("bert")).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("host", ["bert", "llama, tied"])
def test_what_is_stored_is_small_and_gives_the_same_again(host, tmp_path):
    model = learngene(host)
    save_model(model, tmp_path / "learngene.safetensors")
    again = LinearLearngene(build(host)).eval()
    load_model(again, tmp_path / "learngene.safetensors")
    torch.testing.assert_close(again(**inputs(host)).logits, model(**inputs(host)).logits)
    stored = (tmp_path / "learngene.safetensors").stat().st_size
    assert stored < sum(parameter.nbytes for parameter in model.parameters()) + 20_000
    assert not any(f"{model.path}." in key for key in model.state_dict())


def test_the_model_given_is_left_alone():
    model = build()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = LinearLearngene(model).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(**inputs()).logits.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("host", ["vit", "llama"])
def test_bfloat16(host):
    model = learngene(host).to(torch.bfloat16)
    given = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in inputs(host).items()}
    expanded = model.expand()
    assert {parameter.dtype for parameter in expanded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(expanded(**given).logits, model(**given).logits)


def test_gradient_checkpointing_is_refused():
    model = build()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="must not use gradient checkpointing"):
        LinearLearngene(model).train()(**inputs())


def test_bad_input():
    with pytest.raises(ValueError, match="start must be 'random' or 'fit', got 'zero'"):
        LinearLearngene(build(), start="zero")
    with pytest.raises(ValueError, match="model must have one list of equal layers, Linear has none"):
        LinearLearngene(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        learngene().expand(0)


LOAD = """
import sys, torch
from transformers import BertForMaskedLM, LlamaForCausalLM, ViTForImageClassification
for name, kind in (("vit", ViTForImageClassification), ("bert", BertForMaskedLM), ("llama", LlamaForCausalLM)):
    inputs, logits = torch.load(f"{sys.argv[1]}/{name}.pt")
    model, info = kind.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.testing.assert_close(model.eval()(**inputs).logits, logits)
assert "firsthand" not in sys.modules
"""


def test_expanded_models_are_plain_checkpoints(tmp_path):
    for host in ("vit", "bert", "llama"):
        expanded = learngene(host).expand(3)
        expanded.save_pretrained(tmp_path / host)
        torch.save((inputs(host), expanded(**inputs(host)).logits.detach()), tmp_path / f"{host}.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)


def test_trainer_learns_a_learngene(tmp_path):
    torch.manual_seed(0)
    images, teacher = torch.randn(64, 1, 8, 8), torch.randn(64, 3)
    data = [{"pixel_values": image, "labels": logits} for image, logits in zip(images, teacher, strict=True)]

    def distil(outputs, labels, num_items_in_batch=None):
        log_probs = outputs.logits.log_softmax(-1)
        return nn.functional.kl_div(log_probs, labels.softmax(-1), reduction="batchmean")

    class Inputs(nn.Module):  # the host would compute a loss of its own from labels
        def __init__(self, learngene):
            super().__init__()
            self.learngene = learngene

        def forward(self, pixel_values, labels=None):
            return self.learngene(pixel_values=pixel_values)

    model = LinearLearngene(build(), generator=torch.Generator().manual_seed(0))
    before = distil(model(pixel_values=images), teacher).item()
    settings = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=16, learning_rate=1e-2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    Trainer(Inputs(model), settings, train_dataset=data, compute_loss_func=distil).train()
    after = distil(model(pixel_values=images), teacher).item()
    assert math.isfinite(after)
    assert after < before

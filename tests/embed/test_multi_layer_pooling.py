import copy
import math
import subprocess
import sys
import threading
import weakref

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

from firsthand.embed.bidirectional import make_bidirectional  # noqa: E402
from firsthand.embed.multi_layer_pooling import (  # noqa: E402
    DESIGNS,
    LastLayerTrainablePooling,
    LayerTransformer,
    MultiLayerTrainablePooling,
    build_design,
    layer_vectors,
    reduce_layers,
)
from firsthand.testbeds import embedding  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*`gradient_checkpointing:FutureWarning")  # the host still calls it so
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TEXTS = ["sort a list", "return the largest of all the numbers that are given", "close the file", "find the shortest path"]
SMALL = {"num_latents": 5, "num_heads": 2}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multi(**options) -> MultiLayerTrainablePooling:
    torch.manual_seed(0)
    return MultiLayerTrainablePooling(16, **({"num_layers": 3} | SMALL | options))


def last(**options) -> LastLayerTrainablePooling:
    torch.manual_seed(0)
    return LastLayerTrainablePooling(16, **(SMALL | options))


def padded(states: torch.Tensor, lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens of each text, as many as `lengths` says, with noise for padding: states (..., B, T, d) and the mask."""
    width = max(lengths) + 1
    out, mask = random(*states.shape[:-2], width, states.shape[-1], seed=9), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        out[..., row, place, :] = states[..., row, :length, :]
        mask[row, place] = 1
    return out, mask


def features(side: str = "right", layers: int = 3) -> dict:
    """All hidden states, those before the first layer too, of three texts."""
    states, mask = padded(random(layers + 1, 3, 6, 16), [6, 2, 4], side)
    return {"all_layer_embeddings": tuple(states), "token_embeddings": states[-1], "attention_mask": mask}


def embed(pooling: nn.Module, given: dict) -> torch.Tensor:
    return pooling(dict(given))["sentence_embedding"]


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- the poolings against closed forms and torch --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [multi, last])
def test_with_a_silent_block_the_embedding_is_the_mean_latent(make):
    pooling = make()
    with torch.no_grad():
        for parameter in (pooling.to_out.weight, pooling.ff_out.weight, pooling.ff_out.bias):
            parameter.zero_()
    expected = F.normalize(pooling.latents.mean(dim=0), dim=0).expand(3, 16)
    torch.testing.assert_close(embed(pooling, features()), expected)
    pooling.normalize = False
    torch.testing.assert_close(embed(pooling, features()), pooling.latents.mean(dim=0).expand(3, 16))


def test_one_layer_is_the_last_layer_with_its_position_added():
    one, other, given = multi(num_layers=1, token_select="last"), last(token_select="last"), features(layers=1)
    other.load_state_dict({name: value for name, value in one.state_dict().items() if name != "layer_pos.weight"})
    moved = given | {"token_embeddings": given["token_embeddings"] + one.layer_pos.weight[0]}
    torch.testing.assert_close(embed(one, given), embed(other, moved))


def test_with_one_key_the_queries_have_no_say_in_attention():
    pooling = last(token_select="last", normalize=False)
    with torch.no_grad():
        pooling.ff_out.weight.zero_()
        pooling.ff_out.bias.zero_()
    given = features()
    state = given["token_embeddings"][[0, 1, 2], [5, 1, 3]]
    value = pooling.to_kv(pooling.norm_kv(state)).chunk(2, dim=-1)[1]
    embedding = embed(pooling, given)
    torch.testing.assert_close(embedding, pooling.latents.mean(dim=0) + pooling.to_out(value))
    (embedding * random(3, 16)).sum().backward()
    torch.testing.assert_close(pooling.to_q.weight.grad, torch.zeros(16, 16), atol=1e-6, rtol=0)  # zero, but for rounding
    pooling.zero_grad()
    pooling.token_select = "all"  # several keys
    (embed(pooling, given) * random(3, 16)).sum().backward()
    assert pooling.to_q.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("select", ["mean", "last"])
def test_attention_is_that_of_torch(select):
    pooling, given = multi(token_select=select, normalize=False), features()
    mask = given["attention_mask"]
    if select == "mean":
        vectors = [(h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for h in given["all_layer_embeddings"][1:]]
    else:
        vectors = [h[[0, 1, 2], [5, 1, 3]] for h in given["all_layer_embeddings"][1:]]
    keys = torch.stack([vector + position for vector, position in zip(vectors, pooling.layer_pos.weight, strict=True)], dim=1)

    attention = nn.MultiheadAttention(16, 2, bias=False, batch_first=True)
    attention.in_proj_weight.data = torch.cat([pooling.to_q.weight, pooling.to_kv.weight])
    attention.out_proj.weight.data = pooling.to_out.weight
    queries, normed = pooling.norm_q(pooling.latents).expand(3, -1, -1), pooling.norm_kv(keys)
    hidden = pooling.latents + attention(queries, normed, normed)[0]
    value, gate = pooling.ff_in(pooling.norm_ff(hidden)).chunk(2, dim=-1)
    expected = (hidden + pooling.ff_out(value * F.gelu(gate))).mean(dim=1)
    torch.testing.assert_close(embed(pooling, given), expected)


def test_layers_may_be_permuted_with_their_positions():
    pooling, given = multi(), features()
    order = [2, 0, 1]
    turned = copy.deepcopy(pooling)
    turned.layer_pos.weight.data = pooling.layer_pos.weight.data[order]
    first, *layers = given["all_layer_embeddings"]
    other = given | {"all_layer_embeddings": (first, *(layers[i] for i in order))}
    torch.testing.assert_close(embed(turned, other), embed(pooling, given))
    assert not torch.allclose(embed(pooling, other), embed(pooling, given), atol=1e-3)


EVERY = [(multi, "mean"), (multi, "last"), (last, "all"), (last, "last")]
every_pooling = pytest.mark.parametrize(("make", "select"), EVERY, ids=[f"{m.__name__}-{s}" for m, s in EVERY])


@every_pooling
def test_the_side_of_the_padding_does_not_matter(make, select):
    pooling = make(token_select=select)
    torch.testing.assert_close(embed(pooling, features("left")), embed(pooling, features("right")))


@every_pooling
def test_padding_counts_for_nothing_and_gets_no_gradient(make, select):
    pooling, given = make(token_select=select), features()
    states = [state.clone().requires_grad_() for state in given["all_layer_embeddings"]]
    inputs = given | {"all_layer_embeddings": tuple(states), "token_embeddings": states[-1]}
    (embed(pooling, inputs) * random(3, 16)).sum().backward()
    gradient = states[-1].grad
    assert gradient[given["attention_mask"] == 0].abs().max() == 0
    assert gradient.abs().sum() > 0
    assert states[0].grad is None or states[0].grad.abs().max() == 0  # what goes into the first layer is not pooled
    other = [torch.where(given["attention_mask"][..., None] == 0, random(*state.shape, seed=3), state) for state in states]
    again = embed(pooling, given | {"all_layer_embeddings": tuple(other), "token_embeddings": other[-1]})
    torch.testing.assert_close(again, embed(pooling, given))


def test_padding_is_read_as_in_the_papers_code_only_if_asked():
    ours, theirs, given = last(), last(official_padding=True), features()
    whole = given | {"attention_mask": torch.ones_like(given["attention_mask"])}
    torch.testing.assert_close(embed(theirs, given), embed(ours, whole))
    assert not torch.allclose(embed(theirs, given), embed(ours, given), atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [multi, last])
@pytest.mark.parametrize("prompt", [1, torch.tensor([1])], ids=["int", "tensor"])
def test_a_prompt_is_left_out_if_asked(make, side, prompt):
    given = features(side)
    without = given["attention_mask"].clone()
    for row in without:
        row[row.nonzero()[0]] = 0
    expected = embed(make(), given | {"attention_mask": without})
    torch.testing.assert_close(embed(make(include_prompt=False), given | {"prompt_length": prompt}), expected)
    torch.testing.assert_close(embed(make(), given | {"prompt_length": prompt}), embed(make(), given))


def test_reducer_reads_what_it_says():
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    assert layer_vectors(hidden, mask, "mean").tolist() == [[1, 2], [9, 10]]
    assert layer_vectors(hidden, mask, "last").tolist() == [[2, 3], [10, 11]]


@pytest.mark.parametrize("device", DEVICES)
@every_pooling
def test_half_precision(make, select, device):
    pooling = make(token_select=select).to(device)
    given = {
        key: tuple(x.to(device) for x in value) if isinstance(value, tuple) else value.to(device)
        for key, value in features().items()
    }
    expected = embed(pooling, given)
    half = {key: tuple(x.bfloat16() for x in value) if isinstance(value, tuple) else value for key, value in given.items()} | {
        "token_embeddings": given["token_embeddings"].bfloat16()
    }
    assert embed(pooling, half).dtype == torch.float32  # a model in half precision under a pooling in full precision
    torch.testing.assert_close(embed(pooling, half), expected, atol=0.03, rtol=0)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(embed(pooling, half).float(), expected, atol=0.05, rtol=0)
    result = embed(pooling.bfloat16(), half)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=0.05, rtol=0)


@every_pooling
def test_compiles_into_one_graph(make, select, unchecked):
    pooling, given = make(token_select=select), features()
    compiled = torch.compile(pooling, backend="eager", fullgraph=True)
    torch.testing.assert_close(embed(compiled, given), embed(pooling, given))


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (multi, {"token_select": "all"}, "token_select must be one of 'mean', 'last', got 'all'"),
        (last, {"token_select": "mean"}, "token_select must be one of 'all', 'last', got 'mean'"),
        (multi, {"num_layers": 0}, "num_layers must be at least 1, got 0"),
        (multi, {"num_latents": 0}, "num_latents must be at least 1, got 0"),
        (multi, {"num_heads": 3}, "num_heads must divide dim=16"),
        (last, {"token_select": "last", "official_padding": True}, "official_padding"),
    ],
)
def test_bad_arguments(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_features(unchecked):
    given = features()
    states = {key: given[key] for key in ("token_embeddings", "attention_mask")}
    with pytest.raises(ValueError, match=r"mean vector of each layer.*reduce_layers.*got token_embeddings, attention_mask"):
        multi()(dict(states))
    with pytest.raises(ValueError, match="num_layers is 2, the model has 3 layers"):
        multi(num_layers=2)(given)
    empty = given["attention_mask"].clone()
    empty[1] = 0
    for pooling in (multi(), last()):
        with pytest.raises(ValueError, match=r"must leave a token to pool in each text.*none in rows \[1\]"):
            pooling(given | {"attention_mask": empty})
        with pytest.raises(ValueError, match="features must hold attention_mask"):
            pooling({key: value for key, value in given.items() if key != "attention_mask"})
        with pytest.raises(ValueError, match="unpad_inputs = False"):
            pooling(given | {"cu_seq_lens_q": torch.tensor([0, 3])})
    with pytest.raises(ValueError, match=r"states must have shape \(3, 3, 'd'\)"):
        multi()(given | {"attention_mask": torch.ones(3, 3, dtype=torch.long)})


# --- one vector a layer, as the layers are run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return embedding.tokenizer(TEXTS, 80)


@pytest.fixture
def transformer(tokenizer):
    """A tiny Llama in a `Transformer`."""
    generator = torch.Generator().manual_seed(0)
    model = embedding.llama(generator, 80, hidden=16, layers=3, heads=2, initializer_range=0.3).model
    return embedding.sentence_transformer(model, tokenizer, length=16)[0]


def pipeline(transformer, **options) -> st.SentenceTransformer:
    layers = transformer.config.num_hidden_layers
    return st.SentenceTransformer(modules=[transformer, multi(num_layers=layers, **options)], device="cpu")


def with_all_states(model) -> st.SentenceTransformer:
    """The same model without reduced layers: all hidden states are kept, as in the paper's code."""
    twin = copy.deepcopy(model)
    twin[0].__class__ = Transformer
    twin[0].config.output_hidden_states = True
    return twin


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (model(model.preprocess(TEXTS))["sentence_embedding"] * random(len(TEXTS), 16)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def same_gradients(model, other) -> None:
    expected = gradients(other)
    assert expected
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def no_hooks(model) -> bool:
    layers = model[0].model.layers
    return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("select", ["mean", "last"])
def test_embeddings_and_gradients_are_those_of_all_hidden_states(transformer, select):
    model = reduce_layers(pipeline(transformer, token_select=select))
    twin = with_all_states(model)
    given = model(model.preprocess(TEXTS))
    assert "all_layer_embeddings" not in given
    assert given[f"{select}_layer_embeddings"].shape == (len(TEXTS), 3, 16)
    torch.testing.assert_close(model.encode(TEXTS), twin.encode(TEXTS))
    same_gradients(model, twin)
    assert no_hooks(model)


SIZES = {"vocab_size": 80, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
HOSTS = {
    "BertModel": transformers.BertConfig(**SIZES),
    "DistilBertModel": transformers.DistilBertConfig(vocab_size=80, dim=16, n_layers=3, n_heads=2, hidden_dim=24),
    "GPT2Model": transformers.GPT2Config(vocab_size=80, n_embd=16, n_layer=3, n_head=2, bos_token_id=2, eos_token_id=3),
    "GPTNeoXModel": transformers.GPTNeoXConfig(**SIZES, bos_token_id=2, eos_token_id=3),
    "MistralModel": transformers.MistralConfig(**SIZES, num_key_value_heads=1, head_dim=8),
    "Qwen2Model": transformers.Qwen2Config(**SIZES, num_key_value_heads=1),
    "Gemma2Model": transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8),
    "MixtralModel": transformers.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3),
    "T5EncoderModel": transformers.T5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2),
}


@pytest.mark.parametrize("name", HOSTS)
def test_layers_are_found_in_many_models(transformer, name):
    torch.manual_seed(0)
    host = copy.copy(transformer)
    host._modules = {"model": getattr(transformers, name)(HOSTS[name]).eval()}
    model = reduce_layers(pipeline(host))
    given = {"input_ids": torch.randint(5, 80, (3, 6)), "attention_mask": padded(random(3, 6, 1), [5, 2, 4], "right")[1]}
    reduced = model[0](dict(given))["mean_layer_embeddings"]
    states = host.model(**given, output_hidden_states=True).hidden_states[1:]
    expected = [layer_vectors(state, given["attention_mask"].bool(), "mean") for state in states]
    torch.testing.assert_close(reduced, torch.stack(expected, dim=1))


def test_a_model_without_a_list_of_layers(transformer):
    config = transformers.AlbertConfig(**SIZES, embedding_size=8)
    transformer.model = transformers.AlbertModel(config)
    with pytest.raises(ValueError, match="AlbertModel has no list of its 3 layers"):
        reduce_layers(pipeline(transformer))


def alive(model) -> int:
    """How many layers' states are there at once when the last norm has run, without gradients."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: seen.append(weakref.ref(output)))
        for layer in model[0].model.layers
    ]
    found = []
    norm = model[0].model.norm
    hooks.append(norm.register_forward_hook(lambda *_: found.append(sum(state() is not None for state in seen))))
    with torch.no_grad():
        model(model.preprocess(TEXTS))
    for hook in hooks:
        hook.remove()
    return found[0]


def test_hidden_states_are_not_kept(tokenizer):
    llama = embedding.llama(torch.Generator().manual_seed(0), 80, hidden=16, layers=6, heads=2).model
    model = reduce_layers(pipeline(embedding.sentence_transformer(llama, tokenizer)[0]))
    assert alive(model) == 1  # the last, which goes into the norm
    assert alive(with_all_states(model)) == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(transformer, reentrant):
    model = reduce_layers(pipeline(transformer)).train()
    twin = with_all_states(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model[0].model.enable_input_require_grads()  # without, a reentrant checkpoint sees nothing to differentiate
    calls = []
    hook = model[0].model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    same_gradients(model, twin)
    hook.remove()
    assert len(calls) == 2  # the layer was run again in the backward pass
    assert no_hooks(model)


def test_an_error_leaves_no_hooks_behind(transformer):
    model = reduce_layers(pipeline(transformer))
    expected = model.encode(TEXTS)
    norm, transformer.model.norm = transformer.model.norm, nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        model.encode(TEXTS)
    assert no_hooks(model)
    transformer.model.norm = norm
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


def test_threads_do_not_get_each_others_states(transformer):
    model = reduce_layers(pipeline(transformer)).eval()
    texts = [[text] for text in TEXTS]
    meet = threading.Barrier(len(texts))
    found = {}

    def wait(*_) -> None:
        meet.wait(timeout=30)

    meeting = model[0].model.layers[1].register_forward_pre_hook(wait)

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = model(model.preprocess(texts[number]))["sentence_embedding"]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meeting.remove()
    assert no_hooks(model)
    for number, text in enumerate(texts):
        torch.testing.assert_close(found[number], model.encode(text, convert_to_tensor=True), atol=1e-5, rtol=1e-4)


def test_a_copy_is_independent(transformer):
    model = reduce_layers(pipeline(transformer))
    expected = model.encode(TEXTS)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.normal_(parameter)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)
    assert not np.allclose(twin.encode(TEXTS), expected, atol=1e-2)


def test_layers_that_are_not_run_are_noticed(transformer):
    model = reduce_layers(pipeline(transformer))
    transformer.model.config.num_hidden_layers = 2  # the model runs as many
    transformer.model.layers = nn.ModuleList([*transformer.model.layers[:2], nn.ModuleList([nn.Identity(), nn.Identity()])])
    with pytest.raises(ValueError, match="num_layers is 3, the model has 2 layers"):
        reduce_layers(model)
    with pytest.raises(ValueError, match=r"has 2 layers"):
        model.encode(TEXTS)


def test_reduce_layers_of_something_else(transformer):
    plain = st.SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")
    with pytest.raises(ValueError, match="a Transformer and a MultiLayerTrainablePooling, got Transformer, Pooling"):
        reduce_layers(plain)
    model = reduce_layers(pipeline(transformer))
    assert reduce_layers(model) is model
    with pytest.raises(ValueError, match="num_layers is 2, the model has 3 layers"):
        reduce_layers(st.SentenceTransformer(modules=[transformer, multi(num_layers=2)], device="cpu"))


@pytest.mark.parametrize("include", [True, False])
def test_prompts_of_the_host(transformer, include):
    model = reduce_layers(pipeline(transformer, include_prompt=include))
    twin = with_all_states(model)
    torch.testing.assert_close(model.encode(TEXTS, prompt="find: "), twin.encode(TEXTS, prompt="find: "))
    other = reduce_layers(pipeline(copy.deepcopy(transformer), include_prompt=not include))
    assert not np.allclose(model.encode(TEXTS, prompt="find: "), other.encode(TEXTS, prompt="find: "), atol=1e-3)


def test_losses_that_run_the_model_twice(transformer):
    model = reduce_layers(pipeline(transformer)).train()
    rows = [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])]
    for loss in (losses.MultipleNegativesRankingLoss(model), losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)):
        model.zero_grad()
        value = loss([dict(row) for row in rows], None)
        value.backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        if isinstance(loss, losses.MultipleNegativesRankingLoss):
            expected = found
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-3)
    assert no_hooks(model)


def test_adapters(transformer):
    peft = pytest.importorskip("peft")
    model = reduce_layers(pipeline(transformer))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    twin = with_all_states(model)
    torch.testing.assert_close(model.encode(TEXTS), twin.encode(TEXTS))
    found = gradients(model)
    assert any("lora_A" in name for name in found)


# --- the five designs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DESIGNS)
def test_designs_see_what_they_should(transformer, name):
    model = build_design(name, transformer, **SMALL).eval()
    rows = model.preprocess(["sort a list"])
    with torch.no_grad():
        first = model[0](dict(rows))["token_embeddings"][0, 0]
        ids = rows["input_ids"].clone()
        ids[0, -2] = 7
        other = model[0](rows | {"input_ids": ids})["token_embeddings"][0, 0]
    assert (not torch.equal(first, other)) == name.endswith("bidir")
    assert model.encode(TEXTS).shape == (len(TEXTS), 16)
    np.testing.assert_allclose(np.linalg.norm(model.encode(TEXTS), axis=1), 1, rtol=1e-5)
    assert model.get_embedding_dimension() == 16
    assert isinstance(model[0], LayerTransformer) == name.startswith("multi")


@pytest.mark.parametrize("name", DESIGNS)
def test_designs_do_not_depend_on_the_batch(transformer, name):
    torch.manual_seed(0)
    model = build_design(name, transformer, **SMALL)
    together = model.encode(TEXTS)
    for text, embedding_ in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(model.encode(text), embedding_, atol=1e-5)
    model.tokenizer.padding_side = "left"
    np.testing.assert_allclose(model.encode(TEXTS), together, atol=1e-5)


def test_the_first_design_is_the_last_state(transformer):
    model = build_design("eos-causal", transformer, normalize=False)
    rows = model.preprocess(TEXTS)
    states = transformer(dict(rows))["token_embeddings"]
    expected = torch.stack([state[length - 1] for state, length in zip(states, rows["attention_mask"].sum(1), strict=True)])
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True).clone(), expected.detach())


def test_bad_designs(transformer):
    with pytest.raises(ValueError, match=r"name must be one of 'eos-causal', .*, got 'mean'"):
        build_design("mean", transformer)
    with pytest.raises(ValueError, match="model must be a path or a sentence-transformers Transformer, got LlamaModel"):
        build_design("eos-causal", transformer.model)
    make_bidirectional(transformer.model)
    with pytest.raises(ValueError, match="model must be causal for the design 'eos-causal'"):
        build_design("eos-causal", transformer)


def test_texts_that_do_not_end_in_eos_are_warned_of(transformer):
    from tokenizers.processors import TemplateProcessing

    transformer.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    with pytest.warns(UserWarning, match="does not end texts with </s>, so 'multi-causal' reads"):
        build_design("multi-causal", transformer, **SMALL)


# --- inside sentence-transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last-bidir", "multi-causal", "multi-bidir"])
def test_trains_in_the_trainer_and_loads_again(transformer, tmp_path, name):
    datasets = pytest.importorskip("datasets")
    choose = np.random.default_rng(0)
    words = " ".join(TEXTS).split()
    pairs = {column: [" ".join(choose.choice(words, 4)) for _ in range(24)] for column in ("anchor", "positive")}
    model = build_design(name, transformer, **SMALL)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            prompts="find: ",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict(pairs),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 4
    assert all(map(math.isfinite, found))
    still = [key for key, parameter in model.named_parameters() if torch.equal(before[key], parameter)]
    assert not still
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert [type(module) for module in again] == [type(module) for module in model]
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    if name.startswith("multi"):
        assert again[0].unpad_inputs is False
        assert all(layer.self_attn.is_causal == name.endswith("causal") for layer in again[0].model.layers)


def test_options_are_saved(transformer, tmp_path):
    model = reduce_layers(pipeline(transformer, token_select="last", include_prompt=False, normalize=False, head_dim=3))
    model.save_pretrained(str(tmp_path))
    again = st.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert again[1].get_config_dict() == model[1].get_config_dict()
    assert (again[0].token_select, again[0].include_prompt) == ("last", False)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_loads_in_a_fresh_process(transformer, tmp_path):
    model = build_design("multi-bidir", transformer, **SMALL)
    model.save_pretrained(str(tmp_path / "model"))
    np.save(tmp_path / "expected.npy", model.encode(TEXTS))
    code = f"""
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
assert not any(name.startswith("firsthand") for name in sys.modules)
model = SentenceTransformer({str(tmp_path / "model")!r}, device="cpu", trust_remote_code=True)
np.testing.assert_allclose(model.encode({TEXTS!r}), np.load({str(tmp_path / "expected.npy")!r}), atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

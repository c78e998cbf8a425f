import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial import geometric_slerp
from torch import nn

from firsthand.weights.self_positioning import (
    Checkpoint,
    merge_at,
    merge_checkpoints,
    self_positioning,
    task_vector,
    task_vector_stats,
)


def states(count: int, seed: int = 0, **shapes: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"a": (3, 4), "b": (5,)}
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def flat(state) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def close(found, expected, **kw):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **kw)


# --- where a position is ----------------------------------------------------------------------------------------------------


def test_ends_of_the_path():
    base, one, two = states(3)
    close(merge_at(base, [one, two], 0.0), one)
    close(merge_at(base, [one, two], 1.0), two)
    close(merge_at(base, [one, two], 0.3, 0.0), base)
    for name in ("spherical", "linear"):
        weights = 0.7 if name == "spherical" else [0.7, 0.3]
        close(merge_at(base, [one, one], weights, path=name), one)


def test_orthogonal_of_equal_length():
    base = {"w": torch.zeros(2)}
    one, two = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    close(merge_at(base, [one, two], 0.5), {"w": torch.full((2,), 0.5**0.5)})


def test_linear_path_of_equal_weights_is_the_average():
    base, *experts = states(4)
    merged = merge_at(base, experts, [1 / 3] * 3, path="linear")
    close(merged, {name: torch.stack([expert[name] for expert in experts]).mean(dim=0) for name in base})


@pytest.mark.parametrize(("t", "s"), [(0.25, 1.0), (0.5, 1.4), (0.9, 0.2)])
def test_length_is_as_said_and_direction_is_slerp(t, s):
    base, one, two = states(3)
    first, second = flat(one) - flat(base), flat(two) - flat(base)
    moved = flat(merge_at(base, [one, two], t, s)) - flat(base)
    torch.testing.assert_close(moved.norm(), s * ((1 - t) * first.norm() + t * second.norm()))
    direction = geometric_slerp((first / first.norm()).numpy(), (second / second.norm()).numpy(), t)
    np.testing.assert_allclose((moved / moved.norm()).numpy(), direction, rtol=1e-10)


def test_each_tensor_for_itself():
    base, one, two = states(3)
    merged = merge_at(base, [one, two], 0.4, 0.8, granularity="tensor")
    for name in base:
        close({name: merged[name]}, merge_at({name: base[name]}, [{name: one[name]}, {name: two[name]}], 0.4, 0.8))
    one["b"] = base["b"].clone()  # without a direction there: straight
    merged = merge_at(base, [one, two], 0.25, granularity="tensor")
    torch.testing.assert_close(merged["b"], base["b"] + 0.25 * (two["b"] - base["b"]))
    assert torch.isfinite(flat(merge_at(base, [one, two], 0.0, granularity="tensor"))).all()


def test_folds_are_merges_of_merges():
    base, one, two, three = states(4)
    pair = merge_at(base, [one, two], 0.3, 1.1)
    close(merge_at(base, [one, two, three], [0.3, 0.6], [1.1, 0.9]), merge_at(base, [pair, three], 0.6, 0.9))


def test_nearly_parallel_and_opposite_task_vectors():
    base = {"w": torch.zeros(3, dtype=torch.float64)}
    one = {"w": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)}
    close(merge_at(base, [one, {"w": one["w"] * 3 + 1e-9}], 0.5), {"w": one["w"] * 2}, rtol=0, atol=1e-6)
    assert torch.isfinite(merge_at(base, [one, {"w": -one["w"]}], 0.5)["w"]).all()


def test_what_is_not_trained_is_copied():
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.norm = nn.BatchNorm1d(3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight  # tied

    torch.manual_seed(0)
    base, expert = Host(), Host()
    expert.norm.running_mean += 1
    merged = merge_at(base, [expert, expert], 0.5)
    assert torch.equal(merged["norm.running_mean"], base.norm.running_mean)
    assert torch.equal(merged["norm.num_batches_tracked"], base.norm.num_batches_tracked)
    assert merged["head.weight"] is merged["embedding.weight"]
    torch.testing.assert_close(merged["head.weight"], expert.head.weight.detach())
    change = (expert.embedding.weight - base.embedding.weight).detach()
    torch.testing.assert_close(task_vector_stats(base, [expert])["norms"], change.double().norm()[None])  # once
    assert "head.weight" not in task_vector(base, expert)


def test_stats():
    base, *experts = states(3)
    stats = task_vector_stats(base, experts)
    vectors = torch.stack([flat(task_vector(base, expert)) for expert in experts])
    torch.testing.assert_close(stats["norms"], vectors.norm(dim=1))
    torch.testing.assert_close(stats["cosines"], torch.nn.functional.cosine_similarity(vectors[:, None], vectors, dim=-1))


def test_half_precision_is_merged_in_single():
    half = [{name: value.bfloat16() for name, value in state.items()} for state in states(3)]
    base, *experts = [{name: value.float() for name, value in state.items()} for state in half]
    merged = merge_at(half[0], half[1:], 0.5)
    expected = merge_at(base, experts, 0.5)
    close(merged, {name: value.bfloat16() for name, value in expected.items()})


# --- the search -------------------------------------------------------------------------------------------------------------


class Point(nn.Module):
    """Weights whose loss is the distance to a goal."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(value.clone())
        self.dropout = nn.Dropout(0.5)


def distance(model: nn.Module, goal: torch.Tensor) -> torch.Tensor:
    return 0.5 * model.dropout(model.w - goal).square().sum()


def test_search_reaches_a_goal_in_the_plane():
    base, one, two = (state["a"].flatten() for state in states(3))
    goal = merge_at({"w": base}, [{"w": one}, {"w": two}], 0.7, 1.25)["w"]
    experts = [Point(one), {"w": two}]
    before = experts[0].w.clone()
    host = Point(base)
    found = self_positioning(host, experts, distance, [goal], steps=300, lr=0.03, progress=False)
    (t, s) = found.position[0]
    assert t == pytest.approx(0.7, abs=5e-3)
    assert s == pytest.approx(1.25, abs=5e-3)
    torch.testing.assert_close(found.state_dict["w"], goal, atol=0.02, rtol=0)
    assert found.history[-1] < 1e-3 * found.history[0]
    assert len(found.history) == 300
    assert torch.equal(host.w, base)
    assert torch.equal(experts[0].w, before)
    assert experts[0].w.grad is None
    assert host.w.grad is None
    assert host.training
    close(found.state_dict, merge_at(host, experts, t, s))


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("path", ["spherical", "linear"])
def test_first_step_is_the_finite_difference(path, granularity):
    base, one, two = states(3)
    goal = flat(states(1, seed=5)[0])
    lr = 1e-3
    begin = (0.35, 1.2) if path == "spherical" else ([0.35, 0.65], 1.2)

    class Two(nn.Module):
        def __init__(self, state: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(state["a"].clone()), nn.Parameter(state["b"].clone())

    def loss(model: nn.Module, batch: None) -> torch.Tensor:
        return (torch.cat([model.a.flatten(), model.b]) - goal).square().sum()

    def at(a: torch.Tensor, b: torch.Tensor) -> float:
        t = torch.sigmoid(a).tolist() if path == "spherical" else torch.softmax(a, 0).tolist()
        merged = merge_at(base, [one, two], t, b.exp().item(), path=path, granularity=granularity)
        return (flat(merged) - goal).square().sum().item() + 0.1 * b.exp().item() ** 2

    options = {"path": path, "granularity": granularity, "lr": lr, "momentum": 0.0, "norm_penalty": 0.1, "progress": False}
    found = self_positioning(Two(base), [one, two], loss, [None], steps=2, init=[begin], **options)
    times = torch.tensor(begin[0], dtype=torch.float64)
    a = torch.logit(times).reshape(1) if path == "spherical" else times.log()
    b = torch.tensor(1.2, dtype=torch.float64).log()
    assert found.history[0] == pytest.approx(at(a, b), rel=1e-9)
    h = 1e-5
    slopes = [(at(a + d, b) - at(a - d, b)) / (2 * h) for d in h * torch.eye(len(a), dtype=torch.float64)]
    slopes = torch.tensor(slopes, dtype=torch.float64)
    t, s = found.position[0]
    if path == "spherical":
        gone = a - torch.logit(torch.tensor([t], dtype=torch.float64))
    else:  # softmax knows no common shift
        gone = a - torch.tensor(t, dtype=torch.float64).log()
        gone, slopes = gone - gone.mean(), slopes - slopes.mean()
    torch.testing.assert_close(gone / lr, slopes, rtol=1e-3, atol=1e-6)
    slope = (at(a, b + h) - at(a, b - h)) / (2 * h)
    assert (b.item() - np.log(s)) / lr == pytest.approx(slope, rel=1e-3)


def test_three_experts_one_after_the_other():
    base, one, two, three = states(4)
    goal = merge_at(base, [one, two, three], [0.4, 0.5], 1.0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(base["a"].clone()), nn.Parameter(base["b"].clone())

    def loss(model: nn.Module, batch: None) -> torch.Tensor:
        return (torch.cat([model.a.flatten(), model.b]) - flat(goal)).square().sum()

    found = self_positioning(Two(), [one, two, three], loss, [None], steps=60, lr=0.01, progress=False)
    assert len(found.position) == 2
    assert len(found.history) == 120
    assert found.history[-1] < found.history[0]
    close(found.state_dict, merge_at(base, [one, two, three], *map(list, zip(*found.position, strict=True))))


def test_two_searches_are_equal():
    base, one, two = (state["a"].flatten() for state in states(3))
    runs = [self_positioning(Point(base), [Point(one), Point(two)], distance, [base * 2], steps=5, progress=False) for _ in "12"]
    assert runs[0].position == runs[1].position
    assert runs[0].history == runs[1].history


# --- folders ----------------------------------------------------------------------------------------------------------------


def tiny_sentence_transformer(seed: int):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    from firsthand.testbeds import embedding

    learnt = embedding.tokenizer(["sort the array", "merge the graph"], vocab=60)
    host = embedding.sentence_transformer(
        embedding.bert(torch.Generator().manual_seed(seed), learnt.vocab_size, hidden=16, layers=1, heads=2), learnt
    )
    torch.manual_seed(seed)
    return SentenceTransformer(modules=[*host, Dense(16, 8)], device="cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_transformers_from_folders(tmp_path):
    from sentence_transformers import SentenceTransformer

    hosts = [tiny_sentence_transformer(seed) for seed in range(3)]
    folders = [tmp_path / str(number) for number in range(3)]
    for host, folder in zip(hosts, folders, strict=True):
        host.save_pretrained(str(folder))
    expected = merge_at(hosts[0], hosts[1:], 0.3, 0.9)

    streamed = merge_at(hosts[0], folders[1:], 0.3, 0.9)  # experts that stay on the disk
    close(streamed, expected)

    merge_checkpoints(folders[0], folders[1:], tmp_path / "merged", 0.3, 0.9, progress=False)
    code = f"""
import sys, torch
from sentence_transformers import SentenceTransformer
host = SentenceTransformer({str(tmp_path / "merged")!r}, device="cpu")
torch.save(host.encode(["sort the graph"], convert_to_tensor=True).cpu().clone(), {str(tmp_path / "embedding.pt")!r})
assert not any(name.startswith("firsthand") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    hosts[0].load_state_dict(expected)
    found = torch.load(tmp_path / "embedding.pt", weights_only=True)
    torch.testing.assert_close(found, hosts[0].encode(["sort the graph"], convert_to_tensor=True).clone())
    assert SentenceTransformer is type(hosts[0])


def test_shards_may_be_cut_differently(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    hosts, folders = [], [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(folders):
        torch.manual_seed(number)
        hosts.append(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)))
        hosts[-1].save_pretrained(folder, max_shard_size="4KB" if number != 1 else "1GB")
    assert len(Checkpoint(folders[0]).files) > 2
    merge_checkpoints(folders[0], folders[1:], tmp_path / "merged", 0.5, progress=False)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    close(merged.state_dict(), merge_at(hosts[0], hosts[1:], 0.5))
    close(merge_at(hosts[0], folders[1:], 0.5), merge_at(hosts[0], hosts[1:], 0.5))  # without the tied name in the file


def test_search_with_experts_on_the_disk(tmp_path):
    base, one, two = (state["a"].flatten() for state in states(3))
    folders = []
    for name, value in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        save_file({"w": value}, tmp_path / name / "model.safetensors")
        folders.append(tmp_path / name)
    from_disk = self_positioning(Point(base), folders, distance, [one], steps=5, progress=False)
    in_memory = self_positioning(Point(base), [Point(one), Point(two)], distance, [one], steps=5, progress=False)
    assert from_disk.position == in_memory.position


# --- bad input --------------------------------------------------------------------------------------------------------------


def test_models_that_do_not_belong_together(tmp_path):
    base, one, two = states(3)
    with pytest.raises(ValueError, match=r"experts\[1\] must have the names of the base, got a difference in b"):
        merge_at(base, [one, {"a": two["a"]}], 0.5)
    with pytest.raises(ValueError, match=r"experts\[0\] must have shape \(5,\) at 'b', got \(4,\)"):
        merge_at(base, [{**one, "b": torch.zeros(4)}, two], 0.5)
    with pytest.raises(ValueError, match=r"experts\[1\] must differ from the base"):
        merge_at(base, [one, base], 0.5)
    with pytest.raises(ValueError, match="finite weights"):
        merge_at(base, [one, {**two, "b": torch.full((5,), torch.nan, dtype=torch.float64)}], 0.5)
    with pytest.raises(ValueError, match="merge_and_unload"):
        merge_at(base, [{**one, "layer.lora_A.weight": torch.zeros(2)}, two], 0.5)
    with pytest.raises(ValueError, match="must be a folder with safetensors files"):
        merge_at(base, [one, tmp_path], 0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="output must be a folder that is empty"):
        merge_checkpoints(tmp_path, [tmp_path, tmp_path], tmp_path / "full", 0.5)
    with pytest.raises(ValueError, match=r"experts\[0\] must have the base's tensors, got none for dropout|got none for w2"):
        merge_at({"w2": torch.zeros(2)}, [tmp_path, {"w2": torch.ones(2)}], 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"t": [0.5, 0.5]}, "t must be 1 finite"),
        ({"t": 0.5, "path": "linear"}, "t must be 2 finite"),
        ({"t": float("nan")}, "t must be 1 finite"),
        ({"s": [1.0, 1.0]}, "s must be 1 finite"),
        ({"path": "round"}, "path must be 'spherical' or 'linear', got 'round'"),
        ({"granularity": "layer"}, "granularity must be"),
    ],
)
def test_positions_that_are_none(wrong, message):
    base, one, two = states(3)
    with pytest.raises(ValueError, match=message):
        merge_at(base, [one, two], **({"t": 0.5} | wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"init": []}, "init must have 1 positions"),
        ({"init": [(0.0, 1.0)]}, "init must be inside"),
        ({"probe": []}, "probe must have a batch"),
        ({"loss_fn": lambda model, batch: model.w.sum() * torch.nan}, r"loss_fn must return a finite scalar, got nan in step 1"),
        ({"loss_fn": lambda model, batch: model.w}, "loss_fn must return a finite scalar"),
    ],
)
def test_searches_that_cannot_be(wrong, message):
    base, one, two = (state["a"].flatten() for state in states(3))
    options = {"loss_fn": distance, "probe": [base], "steps": 2, "progress": False} | wrong
    with pytest.raises(ValueError, match=message):
        self_positioning(Point(base), [Point(one), Point(two)], **options)
    with pytest.raises(ValueError, match="experts must be at least 2"):
        self_positioning(Point(base), [Point(one)], distance, [base])

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firsthand.diagnose.rankme import (
    RankMe,
    RankMeCallback,
    alpha_req,
    eigenvalue_entropy_rank,
    participation_ratio,
    rankme,
    select_by_rankme,
    spectrum,
    stable_rank,
)

EPS = 1e-7


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


def with_spectrum(singular_values: list[float], rows: int = 64) -> torch.Tensor:
    """A matrix with exactly these singular values."""
    width = len(singular_values)
    return (
        orthonormal(rows, width) @ torch.diag(torch.tensor(singular_values, dtype=torch.float64)) @ orthonormal(width, width, 1)
    )


def gaussian(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random rows whose directions differ in size, and whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, columns, dtype=torch.float64)
    return (torch.randn(rows, columns, dtype=torch.float64, generator=generator) * scales + 0.3).to(dtype)


# --- closed forms


def entropy_of_equal(r: int, width: int) -> float:
    """RankMe of r equal singular values among `width`, by hand: each of the p's carries its own ε."""
    entropy = -r * (1 / r + EPS) * math.log(1 / r + EPS) - (width - r) * EPS * math.log(EPS)
    return math.exp(entropy)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_orthogonal_columns_have_full_rank(scale):
    assert rankme(scale * orthonormal(50, 8)).item() == pytest.approx(entropy_of_equal(8, 8), rel=1e-12)
    assert entropy_of_equal(8, 8) == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize("r", [1, 3, 16])
def test_equal_singular_values_are_counted(r):
    value = rankme(with_spectrum([2.0] * r + [0.0] * (16 - r))).item()
    assert value == pytest.approx(entropy_of_equal(r, 16), rel=1e-5)
    assert value == pytest.approx(r, rel=16 * EPS * math.log(1 / EPS) + 1e-5)


def test_without_epsilon_is_the_entropy_of_scipy():
    Z = gaussian(100, 12)
    entropy = scipy.stats.entropy(np.linalg.svd(Z.numpy(), compute_uv=False))
    assert rankme(Z, eps=0.0).item() == pytest.approx(math.exp(entropy), rel=1e-10)


def test_without_epsilon_exact_zeros_count_nothing():
    assert rankme(torch.diag(torch.tensor([1.0, 1.0, 0.0])).repeat(3, 1), eps=0.0).item() == pytest.approx(2.0)


def test_is_equation_1_of_the_paper():
    Z = gaussian(100, 12)
    sigma = np.linalg.svd(Z.numpy(), compute_uv=False)
    p = sigma / sigma.sum() + EPS
    assert rankme(Z).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)


def test_result_is_a_float64_scalar():
    value = rankme(gaussian(64, 8, dtype=torch.float32))
    assert value.shape == ()
    assert value.dtype == torch.float64


# --- what leaves it as it is, and what does not


@settings(max_examples=20)
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), columns=st.integers(2, 10))
def test_scale_rotation_and_copies_change_nothing(seed, scale, columns):
    Z = gaussian(40, columns, seed)
    value = rankme(Z)
    for same in (scale * Z, orthonormal(40, 40, seed) @ Z, Z @ orthonormal(columns, columns, seed), Z.repeat(3, 1), Z.flip(0)):
        torch.testing.assert_close(rankme(same), value, rtol=1e-7, atol=0)


def test_centring_changes_it():
    Z = gaussian(200, 8)
    centred = rankme(Z, center=True)
    torch.testing.assert_close(centred, rankme(Z - Z.mean(0)), rtol=1e-9, atol=0)
    assert abs(centred - rankme(Z)) > 0.1


def test_normalised_rows_have_unit_length():
    Z = gaussian(200, 8)
    rescaled = Z * torch.linspace(0.1, 10, 200, dtype=torch.float64)[:, None]
    torch.testing.assert_close(rankme(rescaled, normalize=True), rankme(Z / Z.norm(dim=1, keepdim=True)), rtol=1e-9, atol=0)
    assert abs(rankme(rescaled) - rankme(rescaled, normalize=True)) > 1e-3


def test_a_collapsed_dimension_adds_epsilon_terms_only():
    Z = gaussian(100, 8)
    padded = torch.cat([Z, torch.zeros(100, 1, dtype=torch.float64)], dim=1)
    assert rankme(padded).item() == pytest.approx(rankme(Z).item(), rel=1e-5)


def test_rises_from_anisotropic_to_white():
    values = [rankme(with_spectrum([k**-power for k in range(1, 17)])).item() for power in (4.0, 2.0, 1.0, 0.5, 0.0)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(16, rel=1e-4)


def test_small_singular_values_survive_float32_input():
    # A product of float32 numbers is exact in float64: a spectrum over three decades is not lost in the Gram matrix.
    Z = with_spectrum([10.0**-k for k in range(4)], rows=4096).float()
    torch.testing.assert_close(spectrum(Z), torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_input(dtype):
    Z = gaussian(256, 8).to(dtype)
    torch.testing.assert_close(rankme(Z), rankme(Z.double()), rtol=1e-9, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_what_the_cpu_gives():
    Z = gaussian(256, 8, dtype=torch.float32)
    value = rankme(Z.cuda())
    assert value.is_cuda
    torch.testing.assert_close(value.cpu(), rankme(Z), rtol=1e-9, atol=0)
    metric = RankMe().cuda()
    metric.update(Z.cuda())
    torch.testing.assert_close(metric.compute().cpu(), rankme(Z), rtol=1e-9, atol=0)


def test_measuring_needs_no_gradient():
    assert not rankme(gaussian(32, 4).requires_grad_()).requires_grad


# --- fewer rows than columns


def test_fewer_rows_than_columns_is_capped_and_says_so():
    Z = gaussian(6, 20)
    with pytest.warns(UserWarning, match="6 rows of width 20"):
        value = rankme(Z)
    sigma = np.linalg.svd(Z.numpy(), compute_uv=False)
    p = sigma / sigma.sum() + EPS
    assert value.item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)
    assert value <= 6 + 1e-4
    metric = RankMe()
    metric.update(Z[:2])
    metric.update(Z[2:])
    with pytest.warns(UserWarning, match="6 rows of width 20"):
        torch.testing.assert_close(metric.compute(), value, rtol=1e-5, atol=0)


def test_no_warning_when_there_are_rows_enough():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rankme(gaussian(16, 8))


# --- bad input


def bad(value: float) -> torch.Tensor:
    Z = torch.ones(8, 3)
    Z[2, 1] = value
    return Z


@pytest.mark.parametrize("function", [rankme, spectrum, alpha_req, participation_ratio, stable_rank, eigenvalue_entropy_rank])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_entries(function, value):
    with pytest.raises(ValueError, match=r"Z must be finite.*1 of 24"):
        function(bad(value))
    with pytest.raises(ValueError, match=r"Z must be finite.*1 of 4"):  # fewer rows than columns take another way
        function(torch.tensor([[value, 0.0, 0.0, 0.0]]))


def test_overflow_is_no_silent_nan():
    with pytest.raises(ValueError, match="and its square too, got 0 of 24"):
        rankme(torch.full((8, 3), 1e200, dtype=torch.float64))
    assert rankme(torch.full((8, 3), 3e38)).item() == pytest.approx(1, abs=1e-4)  # float32 has no such trouble


@pytest.mark.parametrize("center", [False, True])
def test_rank_of_nothing_is_undefined(center):
    Z = torch.full((10, 3), 0.1) if center else torch.zeros(10, 3)
    with pytest.raises(ValueError, match="Z must not be all zero"):
        rankme(Z, center=center)
    metric = RankMe(center=center)
    metric.update(Z)
    with pytest.raises(ValueError, match="Z must not be all zero"):
        metric.compute()


def test_one_row():
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        rankme(torch.ones(1, 3))


@pytest.mark.parametrize("eps", [-1e-3, math.nan, 1.0])
def test_eps_out_of_range(eps):
    with pytest.raises(ValueError, match=r"eps must be in \[0, 1\)"):
        rankme(torch.ones(8, 3), eps=eps)
    with pytest.raises(ValueError, match=r"eps must be in \[0, 1\)"):
        RankMe(eps=eps)


WITHOUT_EXTRAS = """
import sys, torchmetrics  # which looks for transformers itself
for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
    del sys.modules[name]
sys.modules["transformers"] = None

import torch
from firsthand.diagnose.rankme import RankMe, RankMeCallback, rankme
for call in (rankme, RankMe().update):
    for Z in (torch.ones(4), torch.ones(2, 3, 4), torch.ones(4, 2, dtype=torch.long), torch.ones(4, 0)):
        try:
            call(Z)
        except ValueError as error:
            print(error)
try:
    RankMeCallback(None, [], 1)
except ImportError as error:
    print(error)
"""


def test_a_users_process_has_neither_typechecker_nor_transformers():
    # Shapes are checked at every call in these tests, but not in a user's run, where the functions must say it themselves.
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, timeout=120, check=True)
    *shapes, extra = done.stdout.splitlines()
    assert len(shapes) == 8
    assert all(line.startswith("Z must be a floating-point matrix (rows, features), got shape") for line in shapes)
    assert extra == "RankMeCallback needs transformers: pip install 'firsthand[hf]'"


# --- companions


def test_spectrum_is_sorted_and_agrees_with_numpy():
    Z = gaussian(50, 7)
    np.testing.assert_allclose(spectrum(Z).numpy(), np.linalg.svd(Z.numpy(), compute_uv=False), rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_finds_the_exponent_of_a_power_law(alpha):
    # Columns orthogonal to the all-ones vector have mean zero, so that centring leaves the eigenvalues alone.
    basis = torch.linalg.qr(torch.cat([torch.ones(300, 1), torch.randn(300, 20)], dim=1).double()).Q[:, 1:]
    Z = basis * torch.arange(1, 21, dtype=torch.float64) ** (-alpha / 2)
    assert alpha_req(Z) == pytest.approx(alpha, rel=1e-6)
    assert alpha_req(Z, first=1, last=None) == pytest.approx(alpha, rel=1e-6)


def test_alpha_req_needs_two_eigenvalues():
    with pytest.raises(ValueError, match="at least 2 non-zero eigenvalues from rank 4 on, got 0"):
        alpha_req(with_spectrum([1.0, 0.5, 0.2]))
    with pytest.raises(ValueError, match="1 <= first < last"):
        alpha_req(gaussian(50, 8), first=5, last=5)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_companions_count_equal_directions(r):
    Z = with_spectrum([3.0] * r + [0.0] * (6 - r))
    for function in (eigenvalue_entropy_rank, participation_ratio, stable_rank):
        assert function(Z, center=False) == pytest.approx(r, rel=1e-6)


def test_companions_closed_forms():
    Z = with_spectrum([2.0, 1.0])  # eigenvalues 4 and 1
    assert stable_rank(Z, center=False) == pytest.approx(5 / 4)
    assert participation_ratio(Z, center=False) == pytest.approx(25 / 17)
    assert eigenvalue_entropy_rank(Z, center=False) == pytest.approx(math.exp(scipy.stats.entropy([4, 1])))


# --- selection


def test_selects_the_widest_spectrum():
    runs = {
        "collapsed": with_spectrum([1.0, 0.01, 0.01]),
        "wide": with_spectrum([1.0, 0.9, 0.8]),
        "middle": with_spectrum([1.0, 0.5, 0.1]),
    }
    assert select_by_rankme(runs) == "wide"


def test_selection_among_nothing_or_unlike_runs():
    with pytest.raises(ValueError, match="runs must not be empty"):
        select_by_rankme({})
    with pytest.raises(ValueError, match=r"same width.*'a': 4.*'b': 5"):
        select_by_rankme({"a": gaussian(20, 4), "b": gaussian(20, 5)})


# --- the streaming metric


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, 119), max_size=5, unique=True), center=st.booleans())
def test_streaming_is_one_shot_at_any_chunking(cuts, center):
    Z = gaussian(120, 9, dtype=torch.float32)
    metric = RankMe(center=center)
    for chunk in torch.tensor_split(Z, sorted(cuts)):
        metric.update(chunk)
    torch.testing.assert_close(metric.compute(), rankme(Z, center=center), rtol=1e-9, atol=0)


def test_metric_keeps_a_gram_matrix_not_the_rows():
    metric = RankMe()
    for seed in range(20):
        metric.update(gaussian(50, 4, seed))
    assert sum(getattr(metric, name).numel() for name in metric.metric_state) == 4 * 4 + 4 + 1


def test_an_empty_batch_adds_nothing():
    Z = gaussian(40, 4)
    metric = RankMe()
    for batch in (Z[:0], Z, Z[:0]):
        metric.update(batch)
    torch.testing.assert_close(metric.compute(), rankme(Z), rtol=1e-9, atol=0)


def test_metric_stops_at_max_samples():
    Z = gaussian(100, 4)
    metric = RankMe(max_samples=60)
    for chunk in Z.split(25):
        metric.update(chunk)
    torch.testing.assert_close(metric.compute(), rankme(Z[:60]), rtol=1e-9, atol=0)


def test_forward_gives_the_batch_and_keeps_the_stream():
    Z = gaussian(100, 4)
    metric = RankMe()
    for chunk in Z.split(25):
        torch.testing.assert_close(metric(chunk), rankme(chunk), rtol=1e-9, atol=0)
    torch.testing.assert_close(metric.compute(), rankme(Z), rtol=1e-9, atol=0)


def test_metric_refuses_another_width():
    metric = RankMe()
    metric.update(gaussian(10, 4))
    with pytest.raises(ValueError, match=r"width 4.*got 5"):
        metric.update(gaussian(10, 5))
    with pytest.raises(ValueError, match=r"width 3.*got 5"):
        RankMe(num_features=3).update(gaussian(10, 5))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric RankMe was called before the ``update`` method")
def test_metric_bad_arguments_and_no_data():
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        RankMe(num_features=0)
    with pytest.raises(ValueError, match="max_samples must be at least 2, got 1"):
        RankMe(max_samples=1)
    with pytest.raises(ValueError, match="at least 2 rows, got 0"):
        RankMe().compute()
    with pytest.raises(ValueError, match="Z must be finite"):
        RankMe().update(bad(math.nan))


def test_a_refused_batch_leaves_the_metric_as_it_was():
    metric = RankMe()
    metric.update(gaussian(10, 3))
    before = {name: value.clone() for name, value in metric.metric_state.items()}
    with pytest.raises(ValueError, match="Z must be finite"):
        metric.update(bad(math.nan).double())
    for name, value in metric.metric_state.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("num_features", [None, 4])
def test_stopping_and_resuming_is_the_same_run(num_features, tmp_path):
    chunks = gaussian(100, 4).split(20)
    whole, first = RankMe(num_features), RankMe(num_features)
    for chunk in chunks[:3]:
        whole.update(chunk)
        first.update(chunk)
    torch.save(first.state_dict(), tmp_path / "metric.pt")
    saved = torch.load(tmp_path / "metric.pt", weights_only=True)
    resumed = RankMe(num_features)
    resumed.load_state_dict(dict(saved))
    for chunk in chunks[3:]:
        whole.update(chunk)
        resumed.update(chunk)
    assert torch.equal(whole.compute(), resumed.compute())
    torch.testing.assert_close(saved["gram"], first.gram, rtol=0, atol=0)  # going on did not write into the checkpoint
    with pytest.raises(ValueError, match=r"width 4.*got 5"):
        resumed.update(gaussian(10, 5))


def test_reset_forgets_the_rows():
    metric = RankMe()
    metric.update(gaussian(50, 4, seed=1))
    metric.reset()
    Z = gaussian(50, 4, seed=2)
    metric.update(Z)
    torch.testing.assert_close(metric.compute(), rankme(Z), rtol=1e-9, atol=0)


RANK = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
from firsthand.diagnose.rankme import RankMe
rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2, timeout=timedelta(seconds=60))
Z = torch.load(path + ".pt")
mine = Z[:30] if rank == 0 else Z[30:]  # uneven on purpose
metric = RankMe(center=True)
for chunk in mine.split(7):
    metric.update(chunk)
print(repr(metric.compute().item()), int(metric.count), flush=True)
dist.barrier()
os._exit(0)  # gloo's threads now and then abort an orderly end
"""


def test_two_processes_give_what_one_gives(tmp_path):
    Z = gaussian(100, 6, dtype=torch.float32)
    path = tmp_path / "rendezvous"
    torch.save(Z, f"{path}.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    expected = rankme(Z, center=True).item()
    for (out, _), own in zip(outputs, (30, 70), strict=True):
        value, count = out.split()
        assert float(value) == pytest.approx(expected, rel=1e-9)
        assert int(count) == own  # after computing, each process has its own rows back


# --- the Hugging Face callback


@pytest.fixture
def trainer_parts(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = torch.nn.Linear(6, 4)
            self.out = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

        def forward(self, x, y):
            return {"loss": (self.out(self.hidden(x)).squeeze(-1) - y).square().mean()}

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    rows = [{"x": row, "y": row.sum()} for row in x]

    def make(callbacks):
        torch.manual_seed(1)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, logging_steps=2, report_to=[],
            disable_tqdm=True, save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(model=Regression(), args=arguments, train_dataset=rows, callbacks=callbacks)

    return make, torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)


def embed(model, batch):
    assert not model.training
    return model.hidden(batch["x"])


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_callback_logs_rankme_and_changes_nothing_else(trainer_parts):
    make, batches = trainer_parts
    plain = make([])
    plain.train()
    watched = make([RankMeCallback(embed, batches, every_n_steps=3)])
    watched.train()
    logged = [entry for entry in watched.state.log_history if "rankme" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    assert all(1 <= entry["rankme"] <= 4.001 for entry in logged)
    assert torch.equal(weights(plain), weights(watched))  # dropout and order drew the same numbers
    assert watched.model.training
    x = torch.stack([row["x"] for row in watched.train_dataset])
    assert logged[-1]["rankme"] == pytest.approx(rankme(watched.model.hidden(x)).item(), rel=1e-6)


def test_callback_reaches_the_other_loggers_and_does_not_swallow_the_loss(trainer_parts, capsys):
    make, batches = trainer_parts
    callback = RankMeCallback(embed, batches, every_n_steps=2, max_samples=24)
    trainer = make([callback])
    callback.log = trainer.log
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "rankme" in entry]
    assert steps == [2, 4, 6]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6]
    assert capsys.readouterr().out.count("rankme") == 3  # the trainer's own printer got it


def test_callback_bad_arguments(trainer_parts):
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        RankMeCallback(embed, [], every_n_steps=0)
    with pytest.raises(ValueError, match="max_samples must be at least 2, got 1"):
        RankMeCallback(embed, [], every_n_steps=1, max_samples=1)

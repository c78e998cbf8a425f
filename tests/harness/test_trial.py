import torch

from firsthand import Trial


def test_arms_of_a_seed_share_their_randomness():
    one, other = Trial(7, arm="one"), Trial(7, arm="other")
    assert one.rng.random() == other.rng.random()
    assert torch.equal(torch.rand(3, generator=one.generator), torch.rand(3, generator=other.generator))


def test_seeds_and_prepare_do_not():
    draws = {Trial(7, arm="one").rng.random(), Trial(8, arm="one").rng.random(), Trial(7, arm="prepare").rng.random()}
    assert len(draws) == 3
    seeds = {Trial(seed, arm=arm).generator.initial_seed() for seed in (7, 8) for arm in ("one", "prepare")}
    assert len(seeds) == 4


def test_track_yields_everything_and_tells_how_far_it_is():
    told = []
    trial = Trial(0, on_progress=lambda *what: told.append(what))
    assert list(trial.track([1, 2, 3], "epochs")) == [1, 2, 3]
    assert told == [("epochs", 0, 3), ("epochs", 1, 3), ("epochs", 2, 3)]
    assert list(trial.track(iter([1]), "stream")) == [1]
    assert told[-1] == ("stream", 0, None)


def test_record_makes_a_curve_for_each_value():
    trial = Trial(0)
    trial.record(1, loss=2.0, accuracy=0.5)
    trial.record(2, loss=1.0)
    assert trial.curves == {"loss": [(1.0, 2.0), (2.0, 1.0)], "accuracy": [(1.0, 0.5)]}


def test_count():
    trial = Trial(0)
    trial.count(torch.nn.Linear(3, 2), active=4)
    assert trial.parameters == {"parameters": 8, "active_parameters": 4}

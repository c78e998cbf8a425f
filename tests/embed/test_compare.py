import numpy as np
import pytest
from scipy.stats import wilcoxon

from firsthand.embed.compare import _holm, compare_designs

TASKS = [f"task {i}" for i in range(9)]
TYPES = {task: "search" if i < 6 else "topics" for i, task in enumerate(TASKS)}


def run(seed: int, shift: float = 0.0) -> dict[str, float]:
    return dict(zip(TASKS, (np.random.default_rng(seed).random(9) + shift).tolist(), strict=True))


@pytest.fixture
def scores():
    return {"old": run(0), "new": run(1, 0.1), "other": run(2)}


pytestmark = pytest.mark.filterwarnings("ignore:3 tasks of type 'topics'")


def test_p_is_that_of_scipy_for_each_type_by_itself(scores):
    rows = compare_designs(scores, TYPES, "old")
    assert [(row["type"], row["design"]) for row in rows] == [
        ("search", "new"),
        ("search", "other"),
        ("topics", "new"),
        ("topics", "other"),
    ]
    for row in rows:
        tasks = [task for task in TASKS if TYPES[task] == row["type"]]
        difference = [scores[row["design"]][task] - scores["old"][task] for task in tasks]
        assert row["p"] == wilcoxon(difference).pvalue
        assert row["n"] == len(tasks)
        assert row["median_diff"] == np.median(difference)


def test_six_wins_of_six_have_the_smallest_p_there_is():
    better = {task: score + 0.01 * (i + 1) for i, (task, score) in enumerate(run(0).items())}
    row = compare_designs({"old": run(0), "new": better}, TYPES, "old")[0]
    assert row["p"] == 2 / 2**6
    assert (row["win"], row["tie"], row["loss"]) == (6, 0, 0)
    assert row["significant"]


def test_swapping_the_models_flips_the_difference_and_keeps_p(scores):
    two = {name: scores[name] for name in ("old", "new")}
    for there, back in zip(compare_designs(two, TYPES, "old"), compare_designs(two, TYPES, "new"), strict=True):
        assert there["median_diff"] == pytest.approx(-back["median_diff"])
        assert there["p"] == back["p"]
        assert (there["win"], there["loss"]) == (back["loss"], back["win"])


def test_order_of_tasks_and_a_shift_of_all_scores_do_not_matter(scores):
    turned = {name: {task: own[task] + 2.0 for task in reversed(TASKS)} for name, own in scores.items()}
    there = compare_designs(turned, TYPES, "old")
    here = compare_designs(scores, TYPES, "old")
    key = lambda row: (row["type"], row["design"])  # noqa: E731
    for one, other in zip(sorted(here, key=key), sorted(there, key=key), strict=True):
        assert one["p"] == pytest.approx(other["p"])
        assert one["median_diff"] == pytest.approx(other["median_diff"])


def test_the_same_model_twice_ties_everywhere():
    for row in compare_designs({"old": run(0), "new": run(0)}, TYPES, "old"):
        assert row["p"] == row["p_holm"] == 1.0
        assert row["tie"] == row["n"]
        assert row["median_diff"] == 0.0
        assert not row["significant"]


def test_ties_are_left_out_of_the_test_and_counted(scores):
    scores["new"] |= {TASKS[0]: scores["old"][TASKS[0]]}
    row = compare_designs(scores, TYPES, "old")[0]
    assert row["tie"] == 1
    assert row["win"] + row["loss"] == 5
    assert row["p"] == wilcoxon([scores["new"][task] - scores["old"][task] for task in TASKS[1:6]]).pvalue


def test_holm_by_hand():
    assert _holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert _holm([0.6, 0.7]) == [1.0, 1.0]
    assert _holm([0.2]) == [0.2]


def test_correction_counts_the_models_and_not_the_types(scores):
    alone = compare_designs({name: scores[name] for name in ("old", "new")}, TYPES, "old")
    assert [row["p_holm"] for row in alone] == [row["p"] for row in alone]
    search = [row for row in compare_designs(scores, TYPES, "old") if row["type"] == "search"]
    assert [row["p_holm"] for row in search] == _holm([row["p"] for row in search])


def test_under_no_difference_few_are_significant():
    rng = np.random.default_rng(0)
    tasks = [str(i) for i in range(12)]
    found = 0
    for _ in range(200):
        runs = {name: dict(zip(tasks, rng.random(12).tolist(), strict=True)) for name in ("a", "b", "c", "d")}
        found += any(row["significant"] for row in compare_designs(runs, dict.fromkeys(tasks, "all"), "a"))
    assert found <= 200 * 0.05 + 3 * (200 * 0.05 * 0.95) ** 0.5  # the share of families with a false alarm, and three deviations


@pytest.mark.parametrize(("tasks", "alpha", "warns"), [(5, 0.05, True), (6, 0.05, False), (6, 0.01, True), (8, 0.01, False)])
def test_too_few_tasks_are_warned_of(recwarn, tasks, alpha, warns):
    names = [str(i) for i in range(tasks)]
    runs = {"a": dict.fromkeys(names, 0.0), "b": {name: 0.1 + i for i, name in enumerate(names)}}
    (row,) = compare_designs(runs, dict.fromkeys(names, "all"), "a", alpha)
    assert any("can be significant" in str(warning.message) for warning in recwarn) == warns
    assert row["significant"] != warns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"old": run(0)}}, "scores must hold at least 2 models, got old"),
        ({"baseline": "older"}, "baseline must be one of old, new, other, got 'older'"),
        ({"scores": {"old": {}, "new": {}}}, "at least one task"),
        ({"scores": {"old": run(0), "new": {"task 0": 1.0}}}, "'new' and 'old' differ in task 1"),
        ({"scores": {"old": run(0), "new": run(0) | {"more": 1.0}}}, "differ in more"),
        ({"scores": {"old": run(0), "new": run(0) | {"task 3": float("nan")}}}, "finite, got nan for 'new' on 'task 3'"),
        ({"task_types": {"task 0": "search"}}, "task_types must name the type of every task, got none for task 1"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\), got 0.0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(scores, change, message):
    with pytest.raises(ValueError, match=message):
        compare_designs(**{"scores": scores, "task_types": TYPES, "baseline": "old"} | change)

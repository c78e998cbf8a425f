import pytest

from firsthand import Study, beats
from firsthand.harness.study import StudyError, load_study

ARMS = {"a": lambda trial: {"x": 0.0}, "b": lambda trial: {"x": 1.0}}


def test_load_study_from_a_file(write_study):
    study = load_study(write_study())
    assert study.method == "toy"
    assert study.question == "Does adding one help?"


def test_a_user_study_may_import_its_neighbour(write_study):
    write_study("VALUE = 3", "neighbour_of_toy.py")
    path = write_study("""
        from neighbour_of_toy import VALUE
        from firsthand import Study, beats
        arms = {"a": lambda trial: {"x": VALUE}, "b": lambda trial: {"x": 1}}
        study = Study(method="n", arms=arms, claim=beats("a", "b", on="x"), equal="all")
    """)
    assert load_study(path).arms["a"](None) == {"x": 3}


UNKNOWN_ARM = """
from firsthand import Study, beats
study = Study(method="m", arms={"a": print}, claim=beats("a", "z", on="x"), equal="")
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def broken(:", "line 1: not valid Python"),
        ("x = 1", "defines no `study`"),
        ("study = 3", "defines no `study`"),
        ("import nothing_of_that_name", "could not be imported: ModuleNotFoundError"),
        (UNKNOWN_ARM, "names the arm 'z', the arms are 'a'"),
    ],
)
def test_a_file_that_is_no_study(write_study, text, message):
    with pytest.raises(StudyError, match=message) as caught:
        load_study(write_study(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-method", "no_such_file.py"])
def test_no_such_study(name):
    with pytest.raises(StudyError, match=name):
        load_study(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "has no arms"),
        ({"arms": {**ARMS, "prepare": print}}, "may not be called 'prepare'"),
        ({"seeds": 2}, "at least 3"),
    ],
)
def test_bad_study(change, message):
    fields = {"method": "m", "arms": ARMS, "claim": beats("a", "b", on="x"), "equal": "all", **change}
    with pytest.raises(StudyError, match=message):
        Study(**fields)

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier

from firsthand.testbeds import curves

ALPHABET = "abcdefg"


@pytest.fixture
def sentences():
    """A made-up language: the tag of a word hangs on its last letter and the tag before, not always."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(120):
        tag, row = 0, []
        for _ in range(rng.integers(1, 12)):
            word = "".join(rng.choice(list(ALPHABET), size=rng.integers(1, 4)))
            tag = (ALPHABET.index(word[-1]) + (tag == 2 and rng.random() < 0.6)) % 3
            row.append((word, "XYZ"[tag]))
        made.append(row)
    return made


@pytest.fixture
def task(sentences):
    return curves.tagging(sentences, np.random.default_rng(1), levels=6, step=80, folds=5, use=1)[0]


def split(text):
    return [list(range(low, high)) for low, high in zip(text.starts[:-1], text.starts[1:], strict=True)]


def test_folds_are_dealt_without_overlap(sentences):
    tasks = curves.tagging(sentences, np.random.default_rng(1), levels=4, step=80, folds=4, use=4)

    def rows(text):
        return [tuple(zip(text.words[row], text.tags[row], strict=True)) for row in split(text)]

    tested = [row for task in tasks for row in rows(task.test)]
    assert len(tested) == len(sentences)
    for task in tasks:
        assert Counter(rows(task.train)) + Counter(rows(task.test)) == Counter(tested)
        assert Counter(map(len, rows(task.test))) + Counter(map(len, rows(task.train))) == Counter(map(len, sentences))


def test_levels_end_with_the_sentence_their_last_word_falls_in(task):
    wanted = 80 * np.arange(1, 7)
    assert (task.sizes >= wanted).all()
    assert (task.train.starts[task.ends - 1] < wanted).all()
    assert np.concatenate([np.arange(task.sizes[-1])[new] for new in task.increments]).tolist() == list(range(task.sizes[-1]))


def test_too_few_words(sentences):
    with pytest.raises(ValueError, match="levels of 80 words"):
        curves.tagging(sentences, np.random.default_rng(0), levels=100, step=80)


@pytest.mark.parametrize("name", curves.TAGGERS)
def test_training_on_is_training_anew(task, name):
    along = list(curves.TAGGERS[name](task))
    for level in (0, 3, 5):
        anew = list(curves.TAGGERS[name](replace(task, ends=task.ends[[level]])))
        np.testing.assert_array_equal(along[level], anew[0])


@pytest.mark.parametrize("name", curves.TAGGERS)
def test_curve_is_the_mean_accuracy_of_the_tasks(sentences, name):
    tasks = curves.tagging(sentences, np.random.default_rng(1), levels=3, step=80, folds=5, use=2)
    curve = curves.tagger_curve(tasks, name)
    last = [np.mean(list(curves.TAGGERS[name](task))[-1] == task.test.tags) for task in tasks]
    assert curve.accuracy[-1] == pytest.approx(100 * np.mean(last))
    assert curve.sizes[-1] == np.mean([task.sizes[-1] for task in tasks])
    assert curve.accuracy[-1] > 55  # a third is chance


def test_backoff_counts(task):
    level = 2
    by_word, by_ending, overall = defaultdict(Counter), defaultdict(Counter), Counter()
    for word, tag in zip(task.train.words[: task.sizes[level]], task.train.tags, strict=False):
        by_word[word][tag] += 1
        by_ending[task.vocabulary[word][-1]][tag] += 1
        overall[tag] += 1
    guess = list(curves.backoff(task))[level]
    for word, found in zip(task.test.words, guess, strict=True):
        counts = by_word.get(word) or by_ending.get(task.vocabulary[word][-1]) or overall
        assert counts[found] == max(counts.values())


def test_naive_bayes_agrees_with_scikit_learn(task):
    level = 1
    words = np.array([f"<{word}>" for word in task.vocabulary])
    counter = CountVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False)
    seen, tags = words[task.train.words[: task.sizes[level]]], task.train.tags[: task.sizes[level]]
    model = MultinomialNB(alpha=0.1).fit(counter.fit_transform(seen), tags)
    expected = model.predict(counter.transform(words[task.test.words]))
    assert np.mean(list(curves.naive_bayes(task))[level] == expected) == 1.0


def test_hmm_finds_the_most_probable_tag_of_each_word(task):
    """By summing over all ways to tag a short sentence."""
    level, smoothing = 3, 0.01
    n = task.sizes[level]
    emissions = np.full((len(task.vocabulary), 3), smoothing)
    moves = np.full((4, 3), smoothing)
    np.add.at(emissions, (task.train.words[:n], task.train.tags[:n]), 1)
    for row in split(task.train)[: task.ends[level]]:
        for before, tag in zip([3, *task.train.tags[row]], task.train.tags[row], strict=False):
            moves[before, tag] += 1
    known = len(set(task.train.words[:n]))
    emissions /= emissions.sum(axis=0) + smoothing * (known + 1 - len(task.vocabulary))
    moves /= moves.sum(axis=1, keepdims=True)
    guess = list(curves.hmm(task))[level]
    checked = 0
    for row in split(task.test):
        if len(row) > 6:
            continue
        weight = np.zeros((len(row), 3))
        for tags in product(range(3), repeat=len(row)):
            probability = np.prod([moves[b, t] for b, t in zip([3, *tags], tags, strict=False)])
            probability *= np.prod([emissions[w, t] for w, t in zip(task.test.words[row], tags, strict=True)])
            for place, tag in enumerate(tags):
                weight[place, tag] += probability
        np.testing.assert_array_equal(guess[row], weight.argmax(axis=1))
        checked += 1
    assert checked > 5


def test_perceptron_is_the_average_of_the_weights_after_each_sentence(task):
    """Slowly, with names for features."""
    level = 2

    def features(text, row):
        words = ["", *(task.vocabulary[word] for word in text.words[row]), ""]
        for before, word, after in zip(words, words[1:], words[2:], strict=False):
            yield [
                ("word", word), ("before", before), ("after", after), ("first", word[0]), ("last", word[-1]),
                ("last before", before[-1:]), ("first after", after[:1]),
            ]  # fmt: skip

    def best(weights, found):
        return int(np.argmax(sum(weights[feature] for feature in found)))

    weights, total = defaultdict(lambda: np.zeros(3)), defaultdict(lambda: np.zeros(3))
    for row in split(task.train)[: task.ends[level]]:
        guesses = [
            (found, best(weights, found), gold)
            for found, gold in zip(features(task.train, row), task.train.tags[row], strict=True)
        ]
        for found, guess, gold in guesses:
            for feature in found:
                weights[feature][gold] += 1
                weights[feature][guess] -= 1
        for feature, value in weights.items():
            total[feature] = total[feature] + value
    expected = [best(total, found) for row in split(task.test) for found in features(task.test, row)]
    assert np.mean(list(curves.perceptron(task))[level] == expected) > 0.99  # a tie may fall either way


def test_classifiers_train_on_sets_that_each_contain_the_one_before():
    rng = np.random.default_rng(0)
    images, labels = rng.random((200, 4, 4)), np.arange(200) % 5
    images[:, 0, 0] += labels
    tasks = curves.classifying(images, labels, np.random.default_rng(1), levels=5, step=30, folds=4, use=2)
    assert len(tasks) == 2
    expected = [
        100 * KNeighborsClassifier(1).fit(task.images[:60], task.labels[:60]).score(task.test_images, task.test_labels)
        for task in tasks
    ]
    curve = curves.classifier_curve(tasks, "nearest neighbour")
    assert curve.accuracy[1] == pytest.approx(np.mean(expected))
    assert curve.sizes.tolist() == [30, 60, 90, 120, 150]
    for task in tasks:
        held = {row.tobytes() for row in task.test_images}
        assert held.isdisjoint(row.tobytes() for row in task.images)
        assert len(task.images) + len(held) == 200
    for name in curves.CLASSIFIERS:
        assert curves.classifier_curve(tasks, name).accuracy[-1] > 20
    with pytest.raises(ValueError, match="levels of 30 images"):
        curves.classifying(images, labels, rng, levels=6, step=30, folds=4)

"""Learning curves of real systems: taggers of Chinese news, and classifiers of digits as a stand-in that needs no extra data.

A system here is a generator: it trains on sets that each contain the one before, and after each set yields what it predicts on
the test set. Systems that count only add the new counts, so a curve of 160 points costs little more than its evaluations.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier

from firsthand.data import load

Tokens = Int[np.ndarray, " tokens"]


class Curve(NamedTuple):
    """Accuracy in percent after training on each of some sizes, means over folds."""

    sizes: Float[np.ndarray, " levels"]
    accuracy: Float[np.ndarray, " levels"]
    step: int  # what a level has more than the one before, give or take the rest of a sentence


# Tagging


@dataclass(frozen=True)
class Text:
    """Sentences one after the other: sentence i is `[starts[i] : starts[i + 1]]` of the words and tags, which are numbers."""

    words: Tokens
    tags: Tokens
    starts: Int[np.ndarray, " boundaries"]


@dataclass(frozen=True)
class Tagging:
    """Train a tagger on more and more sentences; `ends` are the numbers of training sentences of each level."""

    train: Text
    test: Text
    step: int
    ends: Int[np.ndarray, " levels"]
    vocabulary: tuple[str, ...]
    n_tags: int

    @property
    def sizes(self) -> Int[np.ndarray, " levels"]:
        """Training words of each level."""
        return np.asarray(self.train.starts[self.ends])

    @property
    def increments(self) -> Iterator[slice]:
        """Where in the training words those lie that each level has and the one before has not."""
        return (slice(before, after) for before, after in pairwise([0, *self.sizes]))


def tagging(
    sentences: Sequence[Sequence[tuple[str, str]]],
    rng: np.random.Generator,
    levels: int = 160,
    step: int = 5000,
    folds: int = 10,
    use: int = 4,
) -> list[Tagging]:
    """Shuffle sentences and make tasks of them by cross-validation: each tests on one part and trains on the others.

    Args:
        sentences: lists of (word, tag).
        rng: shuffles the sentences, and again the training sentences of each task.
        levels: how many training sets a task has, each containing the one before.
        step: words a level has more than the one before, up to the end of the sentence they fall in.
        folds: into how many parts the sentences are dealt.
        use: how many of these parts are tested on, in a task each.

    Raises:
        ValueError: there are not enough words.
    """
    word_numbers: dict[str, int] = {}
    tag_numbers: dict[str, int] = {}
    encoded = [
        np.array([(word_numbers.setdefault(w, len(word_numbers)), tag_numbers.setdefault(t, len(tag_numbers))) for w, t in row])
        for row in sentences
    ]
    part = rng.permutation(len(encoded)) % folds
    tasks = []
    for fold in range(use):
        train, test = (
            _text([encoded[i] for i in some])
            for some in (rng.permutation(np.flatnonzero(part != fold)), np.flatnonzero(part == fold))
        )
        ends = np.searchsorted(train.starts, step * np.arange(1, levels + 1))
        if ends[-1] >= len(train.starts):
            raise ValueError(f"{levels} levels of {step} words need more than the {train.starts[-1]} training words there are")
        tasks.append(Tagging(train, test, step, ends, tuple(word_numbers), len(tag_numbers)))
    return tasks


def _text(encoded: list[np.ndarray]) -> Text:
    words, tags = np.concatenate(encoded).T
    return Text(words.copy(), tags.copy(), np.cumsum([0, *map(len, encoded)]))


def backoff(task: Tagging) -> Iterator[Tokens]:
    """The most frequent tag of the word; of its last character, if the word is new; of all words, if that is new too."""
    endings, n_endings = _numbered([word[-1:] for word in task.vocabulary])
    types, where = np.unique(task.test.words, return_inverse=True)
    by_word = np.zeros((len(task.vocabulary), task.n_tags), dtype=np.int32)
    by_ending = np.zeros((n_endings, task.n_tags), dtype=np.int32)
    for new in task.increments:
        words, tags = task.train.words[new], task.train.tags[new]
        np.add.at(by_word, (words, tags), 1)
        np.add.at(by_ending, (endings[words], tags), 1)
        guess = np.where(by_ending.any(axis=1), by_ending.argmax(axis=1), by_ending.sum(axis=0).argmax())[endings[types]]
        seen = by_word[types]
        yield np.where(seen.any(axis=1), seen.argmax(axis=1), guess)[where]


def naive_bayes(task: Tagging, smoothing: float = 0.1) -> Iterator[Tokens]:
    """Multinomial naive Bayes on the word's character n-grams, n from 1 to 3, with the word's ends marked."""
    grams = [
        [marked[i : i + n] for n in (1, 2, 3) for i in range(len(marked) - n + 1)]
        for marked in map("<{}>".format, task.vocabulary)
    ]
    features, n_features = _numbered([gram for row in grams for gram in row])
    starts = np.cumsum([0, *map(len, grams)])
    table = sparse.csr_array((np.ones(len(features), dtype=np.float32), features, starts), shape=(len(grams), n_features))
    types, where = np.unique(task.test.words, return_inverse=True)
    needed, columns = np.unique(table[types].indices, return_inverse=True)
    tested = sparse.csr_array((table[types].data, columns, table[types].indptr), shape=(len(types), len(needed)))

    counts = np.zeros((n_features, task.n_tags), dtype=np.float32)
    of_tag = np.zeros(task.n_tags)
    for new in task.increments:
        words, tags = task.train.words[new], task.train.tags[new]
        rows = table[words]
        np.add.at(counts, (rows.indices, np.repeat(tags, np.diff(rows.indptr))), 1)
        of_tag += np.bincount(tags, minlength=task.n_tags)
        seen = np.asarray(counts.any(axis=1))
        total = counts.sum(axis=0, dtype=np.float64) + smoothing * seen.sum()
        log_share = np.log((counts[needed] + smoothing) / total) * seen[needed, None]  # what training never saw says nothing
        yield (tested @ log_share + np.log(np.maximum(of_tag, 1e-9))).argmax(axis=1)[where]


def hmm(task: Tagging, smoothing: float = 0.01) -> Iterator[Tokens]:
    """Bigram hidden Markov model with add-`smoothing` transitions and emissions; each word gets its most probable tag."""
    types, where = np.unique(task.test.words, return_inverse=True)
    emissions = np.zeros((len(task.vocabulary), task.n_tags), dtype=np.int32)
    transitions = np.zeros((task.n_tags + 1, task.n_tags))  # the last row is the start of a sentence
    before = np.concatenate([[task.n_tags], task.train.tags[:-1]])
    before[task.train.starts[:-1]] = task.n_tags

    # All test sentences at once, the longest first: block t holds the t-th word of each sentence that has one.
    lengths = np.diff(task.test.starts)
    longest = np.argsort(-lengths, kind="stable")
    blocks = [task.test.starts[longest[: (lengths > t).sum()]] + t for t in range(lengths.max())]
    order = np.concatenate(blocks)
    bounds = list(pairwise(accumulate(map(len, blocks), initial=0)))
    for new in task.increments:
        words, tags = task.train.words[new], task.train.tags[new]
        np.add.at(emissions, (words, tags), 1)
        np.add.at(transitions, (before[new], tags), 1)
        known = emissions.any(axis=1).sum()
        likelihood = (emissions[types] + smoothing) / (emissions.sum(axis=0) + smoothing * (known + 1))
        likelihood /= likelihood.max(axis=1, keepdims=True)
        moves = (transitions + smoothing) / (transitions.sum(axis=1, keepdims=True) + smoothing * task.n_tags)
        best = np.empty(len(order), dtype=np.int64)
        best[order] = _posterior(likelihood.astype(np.float32)[where[order]], moves.astype(np.float32), bounds).argmax(axis=1)
        yield best


def _posterior(
    likelihood: Float[np.ndarray, "tokens tags"], moves: Float[np.ndarray, "states tags"], bounds: list[tuple[int, int]]
) -> Float[np.ndarray, "tokens tags"]:
    """Forward and backward pass; each row is proportional to the probability of each tag of one word."""
    start, step = moves[-1], moves[:-1]
    forward = np.empty_like(likelihood)
    forward[: bounds[0][1]] = start * likelihood[: bounds[0][1]]
    for (low, high), (after_low, after_high) in pairwise(bounds):
        rows = forward[low:high]
        rows /= rows.sum(axis=1, keepdims=True)
        np.matmul(rows[: after_high - after_low], step, out=forward[after_low:after_high])
        forward[after_low:after_high] *= likelihood[after_low:after_high]
    backward = np.ones((bounds[-1][1] - bounds[-1][0], step.shape[0]), dtype=np.float32)
    for (low, high), (after_low, after_high) in reversed(list(pairwise(bounds))):
        forward[after_low:after_high] *= backward
        rows = np.ones((high - low, step.shape[0]), dtype=np.float32)
        np.matmul(likelihood[after_low:after_high] * backward, step.T, out=rows[: after_high - after_low])
        rows /= rows.max(axis=1, keepdims=True)
        backward = rows
    forward[: bounds[0][1]] *= backward
    return forward


def perceptron(task: Tagging) -> Iterator[Tokens]:
    """Averaged perceptron, one pass, updated after each sentence: the word, its neighbours, their first and last characters."""
    train, n_features = _context(task.train, task.vocabulary)
    test, _ = _context(task.test, task.vocabulary)
    weights = np.zeros((n_features, task.n_tags), dtype=np.int64)
    past = np.zeros_like(weights)  # the updates, each times the number of sentences before it
    for begin, end in pairwise([0, *task.ends]):
        for sentence in range(begin, end):
            here = slice(*task.train.starts[sentence : sentence + 2])
            rows, gold = train[here], task.train.tags[here]
            guess = weights[rows].sum(axis=1).argmax(axis=1)
            wrong = guess != gold
            for tags, sign in ((gold, 1), (guess, -1)):
                np.add.at(weights, (rows[wrong], tags[wrong, None]), sign)
                np.add.at(past, (rows[wrong], tags[wrong, None]), sign * sentence)
        average = (weights - past / end).astype(np.float32)
        yield sum(average[column] for column in test.T).argmax(axis=1)


def _context(text: Text, vocabulary: Sequence[str]) -> tuple[Int[np.ndarray, "tokens features"], int]:
    """The features of each word, as rows of one table of weights, and the rows of the table."""
    first, n_first = _numbered([word[:1] for word in vocabulary])
    last, n_last = _numbered([word[-1:] for word in vocabulary])
    outside = len(vocabulary)  # what stands beyond the ends of a sentence
    first, last = np.append(first, n_first), np.append(last, n_last)
    before, after = np.roll(text.words, 1), np.roll(text.words, -1)
    before[text.starts[:-1]] = after[text.starts[1:] - 1] = outside
    columns = [text.words, before, after, first[text.words], last[text.words], last[before], first[after]]
    counts = [outside + 1] * 3 + [n_first + 1, n_last + 1, n_last + 1, n_first + 1]
    return np.stack(columns, axis=1) + np.cumsum([0, *counts[:-1]]), sum(counts)


def _numbered(values: Iterable[str]) -> tuple[np.ndarray, int]:
    """Numbers in place of strings, and how many different ones there are."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values]), len(numbers)


TAGGERS = {"back-off": backoff, "HMM": hmm, "perceptron": perceptron, "naive Bayes": naive_bayes}


def tagger_curve(tasks: Sequence[Tagging], name: str) -> Curve:
    """The learning curve of one of the `TAGGERS`, mean over tasks."""
    accuracy = [[100 * np.mean(guess == task.test.tags) for guess in TAGGERS[name](task)] for task in tasks]
    return Curve(np.mean([task.sizes for task in tasks], axis=0), np.mean(accuracy, axis=0), tasks[0].step)


# Digits


class Classifying(NamedTuple):
    """Train a classifier on the first images, more and more of them: as many as `sizes` says."""

    images: Float[np.ndarray, "train pixels"]
    labels: Int[np.ndarray, " train"]
    test_images: Float[np.ndarray, "test pixels"]
    test_labels: Int[np.ndarray, " test"]
    sizes: Int[np.ndarray, " levels"]


CLASSIFIERS = {
    "nearest neighbour": lambda: KNeighborsClassifier(n_neighbors=1),
    "logistic": lambda: LogisticRegression(max_iter=1000),
    "naive Bayes": lambda: MultinomialNB(),
    "Gaussian": lambda: GaussianNB(var_smoothing=0.03),
}


def classifying(
    images: Float[np.ndarray, "samples height width"],
    labels: Int[np.ndarray, " samples"],
    rng: np.random.Generator,
    levels: int = 70,
    step: int = 20,
    folds: int = 5,
    use: int = 5,
) -> list[Classifying]:
    """Make tasks of images by cross-validation: each tests on one part and trains on the others.

    Args:
        images: pixels, at least 0.
        labels: class of each image.
        rng: deals the images into folds and orders the training images of each.
        levels: how many training sets a task has, each containing the one before.
        step: images a level has more than the one before.
        folds: into how many parts the images are dealt, with the same share of each class.
        use: how many of these parts are tested on, in a task each.

    Raises:
        ValueError: there are not enough images.
    """
    sizes = step * np.arange(1, levels + 1)
    pixels = images.reshape(len(images), -1)
    parts = StratifiedKFold(folds, shuffle=True, random_state=int(rng.integers(2**31))).split(pixels, labels)
    tasks = []
    for train, test in islice(parts, use):
        if sizes[-1] > len(train):
            raise ValueError(f"{levels} levels of {step} images need more than the {len(train)} training images there are")
        order = rng.permutation(train)
        tasks.append(Classifying(pixels[order], labels[order], pixels[test], labels[test], sizes))
    return tasks


def classifier_curve(tasks: Sequence[Classifying], name: str) -> Curve:
    """The learning curve of one of the `CLASSIFIERS`, mean over tasks."""
    accuracy = []
    for task in tasks:
        models = (CLASSIFIERS[name]().fit(task.images[:size], task.labels[:size]) for size in task.sizes)
        accuracy.append([100 * model.score(task.test_images, task.test_labels) for model in models])
    return Curve(np.mean([task.sizes for task in tasks], axis=0), np.mean(accuracy, axis=0), int(tasks[0].sizes[0]))


# As studies use them


def of_taggers(trial: Any) -> dict[str, Curve]:
    """Accuracy of the `TAGGERS` on the People's Daily after each 5,000 words up to 800,000, over four of ten folds."""
    sentences = load("pos-pd98")
    small = {"levels": 16, "step": 1000, "use": 1} if trial.smoke else {}
    tasks = tagging(sentences[:600] if trial.smoke else sentences, trial.rng, **small)
    return {name: tagger_curve(tasks, name) for name in trial.track(TAGGERS, "taggers")}


def of_classifiers(trial: Any) -> dict[str, Curve]:
    """Accuracy of the `CLASSIFIERS` on digits after each 20 images up to 1,400, over five folds."""
    digits = load("digits")
    small = {"levels": 16, "use": 1} if trial.smoke else {}
    tasks = classifying(digits["images"], digits["labels"], trial.rng, **small)
    return {name: classifier_curve(tasks, name) for name in trial.track(CLASSIFIERS, "classifiers")}

"""Does a draft that helps a student as its one example also teach it most when it is trained on it?

That is what ARTE stands on: the votes which align the teacher are cast with a draft as the only example in the prompt, but what
is wanted is a training set. So it is the primary claim, and what comes of it, a better training set, is a secondary one.

The task is a sum of four digits modulo 7. A rationale repeats the sum and writes, at some places, the running total instead of
the digit: `T` at each, `P` at every second, `H` at the last two, `E` at none. The fewer, the more digits are to be added in the
head. Student and teacher are Llamas trained from nothing on text in which all four styles are equally frequent: the student on
single sums and on pairs in one style, the teacher on asking, and on answering with and without being told a style. Nobody tells
either which style is better for whom.

Draft groups are the four styles by three kinds of sums: of small digits, of large digits, of all. Each group is scored with a few
of its drafts as the one example, and a copy of the student is trained on it.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from firsthand import Study, Trial, beats, holds
from firsthand.distill.arte import (
    Draft,
    align_with_dpo,
    draft_questions,
    draft_rationales,
    one_shot_scores,
    preference_pairs,
)
from firsthand.distill.generation import HFGenerator
from firsthand.testbeds import lm

MODULUS, DIGITS = 7, 4
SHOWN = {"T": (0, 1, 2, 3), "P": (1, 3), "H": (2, 3), "E": ()}  # where a style writes the running total
KINDS = {"small": range(3), "large": range(4, 7), "all": range(7)}
ASK = "N"  # the prompt for a question
VOCABULARY = ["<pad>", "\n", *"?+#N", *"0123456", *"TPHE", *"tphe"]  # padding and end where testbeds.lm has them
CHARACTERS = {character: index for index, character in enumerate(VOCABULARY)}


@dataclass
class World:
    student: Any
    teacher: Any
    pool: list[str]  # questions that may be trained on
    preference_set: list[tuple[str, str]]
    test: list[tuple[str, str]]
    drafts: list[Draft]  # by the teacher: its own questions, a rationale in each style
    scores: list[list[float]]
    examples: int  # what each training set has
    steps: int  # how long a student is trained on it


def digits_of(question: str) -> list[int]:
    return [int(digit) for digit in question.split("+")]


def answer_of(question: str) -> str:
    return str(sum(digits_of(question)) % MODULUS)


def rationale(question: str, style: str) -> str:
    digits = digits_of(question)
    totals = np.cumsum(digits) % MODULUS
    shown = "+".join(str(totals[i] if i in SHOWN[style] else digits[i]) for i in range(DIGITS))
    return f"{style}{shown}#{totals[-1]}"


def plain_prompt(question: str) -> str:
    return f"{question}?"


STYLE_PROMPTS = [f"{style.lower()}{{}}?".format for style in SHOWN]


def one_shot_prompt(question: str, example: str, asked: str) -> str:
    return f"{question}?{example}\n{asked}?"


def is_right(completion: str, answer: str) -> bool:
    return completion.partition("#")[2] == answer


def read_question(reply: str) -> list[str]:
    """The reply, if it is a sum of four digits: what a teacher from nothing writes is not always one."""
    parts = reply.split("+")
    return [reply] if len(parts) == DIGITS and set(parts) <= set(map(str, KINDS["all"])) else []


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    raw = Tokenizer(models.WordLevel(CHARACTERS, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="\n")


def encode(texts: Sequence[str]) -> Tensor:
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor([CHARACTERS[character] for character in text])
    return ids


def completion_loss(skipped: int) -> lm.Loss:
    """Next-token loss without padding and without the first tokens, at least one, which are given."""

    def loss(model: Any, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch, use_cache=False).logits[:, skipped - 1 : -1]
        return F.cross_entropy(logits.flatten(0, 1), batch[:, skipped:].flatten(), ignore_index=lm.text.PAD)

    return loss


def generator_of(model: Any) -> HFGenerator:
    return HFGenerator(model, tokenizer(), max_new_tokens=2 * DIGITS + 3, batch_size=512)


def llama(trial: Trial, layers: int) -> Any:
    sizes = {"hidden": 64, "layers": layers, "heads": 4, "intermediate": 128, "context": 64}
    model = lm.llama(trial.generator, len(CHARACTERS), initializer_range=0.08, **sizes)  # as 0.02 is at a width of 1024
    return model.to(trial.device)


class Text:
    """Sums of the pool in each style, encoded; equally many of the three kinds are drawn, since those of few digits come easy."""

    def __init__(self, pool: list[str], rng: np.random.Generator) -> None:
        texts = [f"{question}?{rationale(question, style)}\n" for style in SHOWN for question in pool]
        self.encoded = encode(texts).unflatten(0, (len(SHOWN), len(pool)))
        places = {question: place for place, question in enumerate(pool)}
        self.kinds = [np.array([places[question] for question in of_kind(kind, pool)]) for kind in KINDS]
        self.rng = rng

    def draw(self, styles: np.ndarray) -> Tensor:
        """A sum for each style."""
        kinds, shares = self.rng.integers(len(KINDS), size=styles.shape), self.rng.random(styles.shape)
        places = np.select(
            [kinds == i for i in range(len(KINDS))], [each[(shares * len(each)).astype(int)] for each in self.kinds]
        )
        return self.encoded[styles, places]

    def for_student(self, alone: int) -> Iterator[Tensor]:
        """First single sums, which teach arithmetic fastest, then two in one style: so it learns to go on as an example does."""
        for step in count():
            rows, sums = (64, 1) if step < alone else (32, 2)
            styles = self.rng.integers(len(SHOWN), size=(rows, 1))
            yield self.draw(np.repeat(styles, sums, axis=1)).flatten(1)

    def for_teacher(self) -> Iterator[Tensor]:
        """One fifth questions, two fifths answers in the style that is asked for, two fifths answers in any style."""
        asked, ask, end = encode([style.lower() for style in SHOWN]), encode([ASK] * 10), encode(["\n"] * 10)
        question = 2 * DIGITS - 1  # its length
        while True:
            styles = self.rng.integers(len(SHOWN), size=50)
            sums = self.draw(styles)
            batch = F.pad(sums, (0, 1))  # asked without a style
            batch[10:30] = torch.cat([asked[styles[10:30]], sums[10:30]], dim=1)
            batch[:10] = F.pad(torch.cat([ask, sums[:10, :question], end], dim=1), (0, sums.shape[1] - question - 1))
            yield batch


def of_kind(kind: str, pool: list[str]) -> list[str]:
    return [question for question in pool if set(digits_of(question)) <= set(KINDS[kind])]


def prepare(trial: Trial) -> World:
    steps, drafts, asked, tested = (4, 6, 4, 16) if trial.smoke else (600, 48, 40, 300)
    everything = ["+".join(map(str, digits)) for digits in product(range(MODULUS), repeat=DIGITS)]
    order = trial.rng.permutation(everything).tolist()
    held_out, pool = [(question, answer_of(question)) for question in order[: asked + tested]], order[asked + tested :]
    preference_set, test = held_out[:asked], held_out[asked:]

    student, teacher = llama(trial, layers=2), llama(trial, layers=3)
    settings = {"lr": 4e-3, "floor": 0.2, "weight_decay": 0.01, "loss": completion_loss(skipped=1), "trial": trial}
    text = Text(pool, trial.rng)
    lm.train(student, text.for_student(alone=3 * steps // 5), steps=steps, label="student", **settings)
    lm.train(teacher, text.for_teacher(), steps=4 * steps // 3, label="teacher", **settings)

    taken = [question for question, _ in held_out]
    # Hardly trained, in smoke, it writes no question that can be read.
    questions = pool[:drafts] if trial.smoke else questions_by(teacher, drafts, taken, trial)
    written = draft_rationales(generator_of(teacher), questions, STYLE_PROMPTS)
    scores = score(student, written, preference_set)
    return World(student, teacher, pool, preference_set, test, written, scores, drafts, 4 if trial.smoke else 60)


def questions_by(teacher: Any, number: int, leave_out: list[str], trial: Trial) -> list[str]:
    return draft_questions(
        generator_of(teacher), ASK, number, read=read_question, leave_out=leave_out, per_reply=1, max_rounds=50, seed=trial.seed
    )


def score(student: Any, drafts: list[Draft], preference_set: list[tuple[str, str]]) -> list[list[float]]:
    return one_shot_scores(drafts, preference_set, generator_of(student), prompt=one_shot_prompt, match=is_right)


def zero_shot(student: Any, test: list[tuple[str, str]]) -> float:
    completions = generator_of(student)([plain_prompt(question) for question, _ in test])
    return float(np.mean([is_right(completion, answer) for completion, (_, answer) in zip(completions, test, strict=True)]))


def train(trial: Trial, world: World, rows: Sequence[tuple[str, str]]) -> Any:
    """A copy of the student after supervised training on (question, rationale) rows."""
    student = copy.deepcopy(world.student)
    blocks = encode([f"{plain_prompt(question)}{rationale}\n" for question, rationale in rows])
    stream = lm.batches(blocks, min(16, len(blocks)), trial.generator)
    loss = completion_loss(skipped=len(plain_prompt(rows[0][0])))
    lm.train(student, stream, steps=world.steps, lr=SFT_RATE, weight_decay=0.01, loss=loss, trial=trial)
    return student


SFT_RATE = 1e-4  # of 1e-4, 3e-4, 1e-3 and 3e-3 the best for every arm that does without ARTE


def outcome(trial: Trial, world: World, rows: Sequence[tuple[str, str]]) -> dict[str, float]:
    """What training on these rows comes to, and what the rows are like."""
    rows = list(rows)[: world.examples]
    student = train(trial, world, rows)
    trial.count(student)
    styles = {f"share of {style}": float(np.mean([text.startswith(style) for _, text in rows])) for style in SHOWN}
    return {
        "accuracy": zero_shot(student, world.test),
        "right in training set": float(np.mean([is_right(text, answer_of(question)) for question, text in rows])),
        **styles,
    }


def original_teacher(trial: Trial, world: World) -> dict[str, float]:
    """The teacher as it is, asked without naming a style."""
    return outcome(trial, world, write(world.teacher, [draft.question for draft in world.drafts]))


def write(teacher: Any, questions: list[str]) -> list[tuple[str, str]]:
    drafts = draft_rationales(generator_of(teacher), questions, [plain_prompt])
    return [(draft.question, draft.rationales[0]) for draft in drafts]


def random_rationale(trial: Trial, world: World) -> dict[str, float]:
    """For each question one of the four, by chance."""
    return outcome(trial, world, [(draft.question, str(trial.rng.choice(draft.rationales))) for draft in world.drafts])


def best_scored(trial: Trial, world: World) -> dict[str, float]:
    """For each question the rationale that the student likes best."""
    voted = zip(world.drafts, world.scores, strict=True)
    return outcome(trial, world, [(draft.question, draft.rationales[int(np.argmax(scores))]) for draft, scores in voted])


def task_consistent(trial: Trial, world: World) -> dict[str, float]:
    """For all questions the style that the student likes best on the whole."""
    style = int(np.argmax(np.mean(world.scores, axis=0)))
    return outcome(trial, world, [(draft.question, draft.rationales[style]) for draft in world.drafts])


def arte(trial: Trial, world: World) -> dict[str, float]:
    """The teacher aligned on questions and rationales, then both written anew, without naming a style."""
    generator = torch.Generator().manual_seed(trial.seed)
    pairs = preference_pairs(world.drafts, world.scores, ASK, plain_prompt, num_question_pairs=24, generator=generator)
    teacher = world.teacher
    if pairs:
        with tempfile.TemporaryDirectory() as folder:
            teacher = align_with_dpo(world.teacher, tokenizer(), pairs, folder, seed=trial.seed, **DPO)
    held_out = [question for question, _ in world.preference_set + world.test]
    questions = world.pool[: world.examples] if trial.smoke else questions_by(teacher, world.examples, held_out, trial)
    return outcome(trial, world, write(teacher, questions)) | {"pairs": float(len(pairs))}


DPO = {"learning_rate": 3e-4, "num_train_epochs": 8, "disable_tqdm": True, "logging_strategy": "no"}


def draft_groups(trial: Trial, world: World) -> dict[str, float]:
    """For each style and kind of sums: the one-shot score of a few drafts, and what training on all of them gains."""
    shown = 1 if trial.smoke else 6
    before = zero_shot(world.student, world.test)
    scores, gains = np.zeros((2, len(SHOWN), len(KINDS)))
    order = trial.generator.get_state()
    for column, kind in enumerate(trial.track(KINDS, "draft groups")):
        of_this_kind = of_kind(kind, world.pool)
        questions = trial.rng.choice(of_this_kind, min(world.examples, len(of_this_kind)), replace=False).tolist()
        drafts = draft_rationales(generator_of(world.teacher), questions, STYLE_PROMPTS)
        scores[:, column] = np.mean(score(world.student, drafts[:shown], world.preference_set), axis=0)
        for row in range(len(SHOWN)):
            trial.generator.set_state(order)  # the same batches for each group
            student = train(trial, world, [(draft.question, draft.rationales[row]) for draft in drafts])
            gains[row, column] = zero_shot(student, world.test) - before
    for group in np.argsort(scores, axis=None):
        trial.record(scores.flat[group], gain_by_one_shot_score=gains.flat[group])
    by_style = {f"score of {style}": float(value) for style, value in zip(SHOWN, scores.mean(1), strict=True)}
    by_style |= {f"gain of {style}": float(value) for style, value in zip(SHOWN, gains.mean(1), strict=True)}
    return {
        "rank correlation": rank_correlation(scores, gains),
        "rank correlation within styles": rank_correlation(
            scores - scores.mean(1, keepdims=True), gains - gains.mean(1, keepdims=True)
        ),
        "accuracy before": before,
        **by_style,
    }


def rank_correlation(scores: np.ndarray, gains: np.ndarray) -> float:
    """Spearman's; 0 where all scores or all gains are equal, for then the one says nothing of the other."""
    if np.ptp(scores) == 0 or np.ptp(gains) == 0:
        return 0.0
    return float(spearmanr(scores.ravel(), gains.ravel()).statistic)


study = Study(
    method="arte",
    prepare=prepare,
    arms={
        "original teacher": original_teacher,
        "random rationale": random_rationale,
        "best-scored rationale": best_scored,
        "task-consistent": task_consistent,
        "ARTE": arte,
        "draft groups": draft_groups,
    },
    claim=holds(
        "rank correlation of one-shot score and gain by training, over draft groups, is above 0.3",
        lambda metrics: metrics["draft groups"]["rank correlation"],
        above=0.3,
    ),
    also=[
        holds(
            "it is above 0 within styles as well",
            lambda metrics: metrics["draft groups"]["rank correlation within styles"],
            above=0.0,
        ),
        beats("ARTE", "original teacher", on="accuracy"),
        beats("ARTE", "random rationale", on="accuracy"),
        beats("ARTE", "best-scored rationale", on="accuracy"),
        beats("ARTE", "task-consistent", on="accuracy"),
    ],
    equal="student, test, examples, batches, steps, optimiser and learning rate of the student's training",
    seeds=5,
    data=("generated",),
)

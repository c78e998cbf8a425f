"""ARTE: a small student votes on what a teacher writes, the votes align the teacher, and it then writes the training set."""

import copy
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Row = dict[str, Any]
"""A line of a JSONL file."""


Write = Callable[[Sequence[str], float, int], Sequence[str]]
"""A language model as a function, such as an `HFGenerator`: from prompts, temperature and seed to a completion for each."""


class Draft(NamedTuple):
    """A question that a teacher wrote, and several rationales for it, each ending in an answer.

    Attributes:
        question: as a student is to be asked it.
        rationales: one for each style of reasoning; at least one.
    """

    question: str
    rationales: list[str]


@dataclass(frozen=True)
class Task:
    """What the student shall learn.

    Attributes:
        name: of the task; different from those of the others.
        question_prompt: asks for new questions like some that it shows. The paper's describes the task, shows 3 and asks for 5.
        preference_set: (question, right answer) pairs that the student is tried on; the paper has 40, chosen by item response
            theory (`fit_2pl`, `select_discriminative`).
    """

    name: str
    question_prompt: str
    preference_set: list[tuple[str, str]]


def exact_match(completion: str, answer: str) -> bool:
    """Whether they are the same but for blanks around them."""
    return completion.strip() == answer.strip()


def one_shot_prompt(question: str, rationale: str, asked: str) -> str:
    """One worked example, then the question that is asked."""
    return f"Question: {question}\nAnswer: {rationale}\n\nQuestion: {asked}\nAnswer:"


def numbered_lines(reply: str) -> list[str]:
    """The questions of a reply with one on each line: numbers, dashes and blanks before them are removed."""
    lines = (re.sub(r"^\s*(?:\d+[.):]\s+|[-*]\s+)?", "", line).strip() for line in reply.splitlines())
    return [line for line in lines if line]


def draft_questions(
    write: Write,
    prompt: str,
    count: int,
    *,
    read: Callable[[str], list[str]] = numbered_lines,
    leave_out: Sequence[str] = (),
    temperature: float = 1.0,
    per_reply: int = 5,
    max_rounds: int = 20,
    seed: int = 0,
) -> list[str]:
    """Ask a teacher for questions until there are enough different ones.

    Args:
        write: the teacher.
        prompt: asks for new questions.
        count: how many; at least 1.
        read: from a reply to the questions in it.
        leave_out: questions that are not wanted, such as those of the preference set.
        temperature: of the sampling; positive.
        per_reply: how many questions a reply is expected to have, which decides how many replies are asked for at a time.
        max_rounds: how often to ask for the questions that are still missing.
        seed: of the sampling.

    Raises:
        ValueError: a number is out of range.
        RuntimeError: the teacher repeats itself: too few different questions after `max_rounds`.

    Source:
        arXiv 2406.19227, section 3.1 and appendix F (temperature 1; 250 questions a task). That repetitions do not count, and
        nothing of the preference set, is our choice.
    """
    for name, value in (("count", count), ("per_reply", per_reply), ("max_rounds", max_rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    found: dict[str, None] = {}
    for turn in range(max_rounds):
        replies = math.ceil((count - len(found)) / per_reply)
        for reply in _completions("write", write([prompt] * replies, temperature, derived_seed(seed, turn)), replies):
            found |= dict.fromkeys(question for question in read(reply) if question not in leave_out)
        if len(found) >= count:
            return list(found)[:count]
    raise RuntimeError(f"the teacher wrote {len(found)} different questions in {max_rounds} rounds, {count} were asked for")


def draft_rationales(
    write: Write,
    questions: Sequence[str],
    prompts: Sequence[Callable[[str], str]],
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Draft]:
    """Ask a teacher for rationales of each question, one in each style of reasoning.

    Args:
        write: the teacher.
        questions: what to explain.
        prompts: from a question to a prompt, one for each style ("step by step", "as to a child" ...); at least one.
        temperature: of the sampling; at least 0.
        seed: of the sampling.

    Returns:
        A draft for each question, its rationales in the order of `prompts`.

    Raises:
        ValueError: there are no prompts.

    Source:
        arXiv 2406.19227, section 3.1 (four styles) and appendix F (temperature 0).
    """
    if not prompts:
        raise ValueError("prompts must name at least one style, got none")
    asked = [prompt(question) for question in questions for prompt in prompts]
    written = _completions("write", write(asked, temperature, seed), len(asked))
    return [Draft(question, written[i * len(prompts) : (i + 1) * len(prompts)]) for i, question in enumerate(questions)]


def one_shot_scores(
    drafts: Sequence[Draft],
    preference_set: Sequence[tuple[str, str]],
    answer: Callable[[list[str]], Sequence[str]],
    *,
    prompt: Callable[[str, str, str], str] = one_shot_prompt,
    match: Callable[[str, str], bool] = exact_match,
) -> list[list[float]]:
    r"""How well a student answers the preference set with a draft as its only example.

    $$ s_r = \frac1{|P|} \sum_{(q', a') \in P} \big[\, \mathrm{student}(q, r;\, q') = a' \,\big] $$

    A question's score is the mean over its rationales (`question_scores`).

    Args:
        drafts: questions, each with at least one rationale.
        preference_set: (question, right answer) pairs, at least one.
        answer: the student: from prompts to completions, by greedy decoding. It is called once for each rationale, with a prompt
            for each pair; `HFGenerator` computes what these have in common once.
        prompt: from question, rationale and the question that is asked to the prompt.
        match: whether a completion gives the right answer; where the student reasons first, look for the answer in it.

    Returns:
        For each draft the score of each rationale, in [0, 1].

    Raises:
        ValueError: the preference set or a draft's list of rationales is empty, or `answer` returns another number of texts.

    Source:
        arXiv 2406.19227, section 3.3.
    """
    if not preference_set:
        raise ValueError("preference_set must have at least one pair, got none")
    for index, draft in enumerate(drafts):
        if not draft.rationales:
            raise ValueError(f"every draft must have at least one rationale, draft {index} has none")

    def score(question: str, rationale: str) -> float:
        prompts = [prompt(question, rationale, asked) for asked, _ in preference_set]
        answers = _completions("answer", answer(prompts), len(prompts))
        right = [match(given, expected) for given, (_, expected) in zip(answers, preference_set, strict=True)]
        return sum(right) / len(right)

    return [[score(draft.question, rationale) for rationale in draft.rationales] for draft in drafts]


def question_scores(scores: Sequence[Sequence[float]]) -> list[float]:
    """The score of each question: the mean of its rationales' (arXiv 2406.19227, section 3.3).

    Raises:
        ValueError: a question has no scores, or one is outside [0, 1].
    """
    for index, each in enumerate(scores):
        if not each:
            raise ValueError(f"scores must have at least one number for each draft, draft {index} has none")
        if not all(0 <= score <= 1 for score in each):
            raise ValueError(f"scores must be in [0, 1], draft {index} has {list(each)}")
    return [sum(each) / len(each) for each in scores]


def preference_pairs(
    drafts: Sequence[Draft],
    scores: Sequence[Sequence[float]],
    question_prompt: str,
    rationale_prompt: Callable[[str], str],
    *,
    num_question_pairs: int = 50,
    top: float = 0.25,
    generator: torch.Generator | None = None,
) -> list[dict[str, str]]:
    """Turn a student's votes into pairs for preference optimisation of the teacher.

    Question level: the prompt that asks for questions, one from the best quarter, one from the worst, both drawn at random.
    Rationale level, for each question: the plain prompt, the best and the worst rationale. So a style that the student learns
    from need not be asked for any more.

    Args:
        drafts: at least 4 of them, so that there are quarters.
        scores: of each rationale of each draft, in [0, 1], as from `one_shot_scores`.
        question_prompt: what questions are asked for with.
        rationale_prompt: from a question to the plain prompt, which names no style.
        num_question_pairs: how many pairs of questions to draw; 0 for none.
        top: the share that counts as best, and as worst, in (0, 0.5].
        generator: draws the questions; a fresh one seeded with 0 if none is given.

    Returns:
        Rows with `prompt`, `chosen`, `rejected` and `level` (`"question"` or `"rationale"`), the form that trl's `DPOTrainer`
        takes (`datasets.Dataset.from_list`). The chosen one's score is always the higher: a pair of equals is left out, so there
        may be fewer rows than asked for.

    Raises:
        ValueError: fewer than 4 drafts, scores that do not fit the drafts or are outside [0, 1], or a setting out of range.

    Source:
        arXiv 2406.19227, section 3.3: 50 question pairs and a rationale pair for each of 250 questions, for each task. Leaving
        out ties is our choice.
    """
    if len(drafts) < 4:
        raise ValueError(f"drafts must be at least 4, to have a best and a worst quarter, got {len(drafts)}")
    if [len(each) for each in scores] != [len(draft.rationales) for draft in drafts]:
        raise ValueError("scores must have one number for each rationale of each draft")
    if num_question_pairs < 0:
        raise ValueError(f"num_question_pairs must be at least 0, got {num_question_pairs}")
    if not 0 < top <= 0.5:
        raise ValueError(f"top must be in (0, 0.5], got {top}")
    by_question = question_scores(scores)
    ranked = sorted(range(len(drafts)), key=by_question.__getitem__, reverse=True)
    size = max(1, int(top * len(drafts)))
    generator = generator or torch.Generator().manual_seed(0)
    drawn = torch.randint(size, (num_question_pairs, 2), generator=generator).tolist()
    pairs = []
    for best, worst in drawn:
        chosen, rejected = ranked[best], ranked[len(ranked) - 1 - worst]
        if by_question[chosen] > by_question[rejected]:
            pairs.append(_pair(question_prompt, drafts[chosen].question, drafts[rejected].question, "question"))
    for draft, each in zip(drafts, scores, strict=True):
        chosen, rejected = each.index(max(each)), each.index(min(each))
        if each[chosen] > each[rejected]:
            prompt = rationale_prompt(draft.question)
            pairs.append(_pair(prompt, draft.rationales[chosen], draft.rationales[rejected], "rationale"))
    return pairs


def _pair(prompt: str, chosen: str, rejected: str, level: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "level": level}


def align_with_dpo(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[dict[str, str]],
    folder: Path | str,
    *,
    learning_rate: float = 1e-7,
    batch_size: int = 16,
    beta: float = 0.1,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Train a copy of the teacher on the pairs with trl's `DPOTrainer`, and save it with its tokenizer.

    One epoch, linear warm-up over 10 % of the steps, then a cosine. The reference is the teacher as it was. For `arte`, bind the
    first two: `align=partial(align_with_dpo, model, tokenizer)`.

    Args:
        model: a causal language model of transformers; left as it is.
        tokenizer: its tokenizer; what is chosen and rejected is ended with its end token.
        pairs: rows with `prompt`, `chosen` and `rejected`.
        folder: where to save; `from_pretrained` reads it.
        learning_rate: highest learning rate.
        batch_size: pairs in a step.
        beta: how dear it is to leave the reference.
        seed: of the order of the pairs. transformers' trainer seeds the global generators with it.
        settings: of trl's `DPOConfig`, such as `bf16=True` or `gradient_checkpointing=True`, which are off here.

    Returns:
        The aligned teacher.

    Raises:
        ImportError: trl is not installed.
        ValueError: there are no pairs.

    Source:
        arXiv 2406.19227, section 4.1: learning rate 1e-7, batch 16, one epoch, warm-up 10 %, cosine. β is not given there; 0.1 is
        our choice. The loss is trl's sigmoid.
    """
    if not pairs:
        raise ValueError("pairs must have at least one row, got none: the student preferred nothing to anything")
    try:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise ImportError("align_with_dpo needs trl and datasets: pip install 'firsthand[distill]'") from error
    rows = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    defaults = {
        "num_train_epochs": 1, "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "save_strategy": "no", "report_to": [],
        "bf16": False, "gradient_checkpointing": False, "use_cpu": model.device.type == "cpu",
        "dataloader_pin_memory": model.device.type != "cpu",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            beta=beta,
            loss_type="sigmoid",
            seed=seed,
            **(defaults | settings),
        )
        trainer = DPOTrainer(
            copy.deepcopy(model),
            ref_model=copy.deepcopy(model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),  # it is given trl's padding side
        )
        trainer.train()
    aligned = trainer.accelerator.unwrap_model(trainer.model)
    aligned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return aligned


def arte(
    folder: Path | str,
    tasks: Sequence[Task],
    *,
    teacher: Write,
    student: Callable[[list[str]], Sequence[str]],
    align: Callable[[list[dict[str, str]], Path], object],
    load: Callable[[Path], Write],
    style_prompts: Sequence[Callable[[str], str]],
    rationale_prompt: Callable[[str], str],
    one_shot_prompt: Callable[[str, str, str], str] = one_shot_prompt,
    match: Callable[[str, str], bool] = exact_match,
    read_questions: Callable[[str], list[str]] = numbered_lines,
    num_drafts: int = 250,
    num_question_pairs: int = 50,
    num_examples: int = 250,
    top: float = 0.25,
    per_reply: int = 5,
    seed: int = 0,
) -> list[Row]:
    """Write a training set that suits a student: draft, let the student vote, align the teacher, write.

    Each stage leaves a file in `folder`, whole or not at all, and is not done again where its file is there: after a crash, or to
    try another alignment with the same votes (remove `5-aligned` and what follows), call again. ::

        1-questions.jsonl   task, question                      the teacher's draft questions
        2-drafts.jsonl      task, question, rationales          with a rationale in each style
        3-scores.jsonl      task, scores                        the student's votes
        4-pairs.jsonl       task, prompt, chosen, rejected, level
        5-aligned/          what `align` wrote: the aligned teacher
        6-questions.jsonl   task, question                      the aligned teacher's questions
        7-examples.jsonl    task, question, rationale           the training set

    Args:
        folder: where the stages are kept; made if it is not there.
        tasks: what the student shall learn.
        teacher: from prompts, temperature and seed to completions, such as an `HFGenerator` or a function around some service.
        student: from prompts to completions by greedy decoding; the student before it is trained.
        align: trains the teacher on pairs and saves it in the folder it is given, as `align_with_dpo` does.
        load: from that folder to the aligned teacher.
        style_prompts: from a question to a prompt for a rationale, one for each style of reasoning; at least 2.
        rationale_prompt: from a question to the plain prompt, which names no style.
        one_shot_prompt: see `one_shot_scores`.
        match: see `one_shot_scores`.
        read_questions: `read` of `draft_questions`.
        num_drafts: draft questions for each task; at least 4.
        num_question_pairs: see `preference_pairs`.
        num_examples: rows of the training set for each task.
        top: see `preference_pairs`.
        per_reply: see `draft_questions`.
        seed: of all that is drawn. The completions are as reproducible as the callables.

    Returns:
        The rows of `7-examples.jsonl`, for supervised training of the student.

    Raises:
        ValueError: a setting is out of range, task names are not different, or the folder was begun with other settings or tasks.
            Callables cannot be compared: whoever changes one should take another folder.

    Source:
        Liu, Zhang, Yao, Cao, Hou, Li, "Aligning Teacher with Student Preferences for Tailored Training Data Generation", 2024,
        arXiv 2406.19227. Questions are sampled at temperature 1 and rationales taken at 0 as in appendix F; the body has 0 for
        all. The authors' repository is empty, so nothing here is checked against their code.
    """
    if num_drafts < 4:
        raise ValueError(f"num_drafts must be at least 4, to have a best and a worst quarter, got {num_drafts}")
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    if len(style_prompts) < 2:
        raise ValueError(f"style_prompts must be at least 2, to prefer one to another, got {len(style_prompts)}")
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"tasks must be at least one, with different names, got {[task.name for task in tasks]}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"num_drafts": num_drafts, "num_question_pairs": num_question_pairs, "num_examples": num_examples, "top": top}
    settings |= {"seed": seed, "styles": len(style_prompts), "tasks": [asdict(task) for task in tasks]}
    _check_settings(folder / "settings.json", settings)

    def questions(write: Write, count: int, stage: int) -> list[Row]:
        return [
            {"task": task.name, "question": question}
            for index, task in enumerate(tasks)
            for question in draft_questions(
                write,
                task.question_prompt,
                count,
                read=read_questions,
                leave_out=[question for question, _ in task.preference_set],
                per_reply=per_reply,
                seed=derived_seed(seed, stage, index),
            )
        ]

    def of(task: Task, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row["task"] == task.name]

    asked = stage(folder / "1-questions.jsonl", lambda: questions(teacher, num_drafts, 1))

    def write_drafts() -> list[Row]:
        drafts = draft_rationales(teacher, [row["question"] for row in asked], style_prompts, seed=derived_seed(seed, 2))
        return [row | {"rationales": draft.rationales} for row, draft in zip(asked, drafts, strict=True)]

    drafted = stage(folder / "2-drafts.jsonl", write_drafts)
    drafts = {task.name: [Draft(row["question"], row["rationales"]) for row in of(task, drafted)] for task in tasks}

    def vote() -> list[Row]:
        return [
            {"task": task.name, "scores": scores}
            for task in tasks
            for scores in one_shot_scores(drafts[task.name], task.preference_set, student, prompt=one_shot_prompt, match=match)
        ]

    scored = stage(folder / "3-scores.jsonl", vote)

    def pair() -> list[Row]:
        generator = torch.Generator().manual_seed(derived_seed(seed, 4))
        return [
            {"task": task.name, **row}
            for task in tasks
            for row in preference_pairs(
                drafts[task.name],
                [row["scores"] for row in of(task, scored)],
                task.question_prompt,
                rationale_prompt,
                num_question_pairs=num_question_pairs,
                top=top,
                generator=generator,
            )
        ]

    pairs = stage(folder / "4-pairs.jsonl", pair)
    if not (folder / "5-aligned").exists():
        _whole_folder(folder / "5-aligned", lambda place: align(pairs, place))
    if (folder / "7-examples.jsonl").exists():
        return _read(folder / "7-examples.jsonl")
    aligned = load(folder / "5-aligned")
    final = stage(folder / "6-questions.jsonl", lambda: questions(aligned, num_examples, 6))

    def write_examples() -> list[Row]:
        written = draft_rationales(aligned, [row["question"] for row in final], [rationale_prompt], seed=derived_seed(seed, 7))
        return [row | {"rationale": draft.rationales[0]} for row, draft in zip(final, written, strict=True)]

    return stage(folder / "7-examples.jsonl", write_examples)


def stage(path: Path, make: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a JSONL file; where there is none they are made and written, whole or not at all."""
    if not path.exists():
        _write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make()))
    return _read(path)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _write_whole(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _whole_folder(path: Path, fill: Callable[[Path], object]) -> None:
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(scratch)
        os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))  # as they will be read: tuples are lists there
    if not path.exists():
        _write_whole(path, json.dumps(settings, ensure_ascii=False, indent=1))
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in settings if settings[name] != begun.get(name)]
    if changed:
        raise ValueError(f"folder must be one begun with the same settings; {path} differs in {', '.join(changed)}")


def _completions(name: str, texts: Sequence[str], expected: int) -> list[str]:
    if len(texts) != expected:
        raise ValueError(f"{name} must return a text for each prompt, got {len(texts)} for {expected}")
    return list(texts)


def derived_seed(*numbers: int) -> int:
    """A seed for one part of the work, unrelated to those of the others."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

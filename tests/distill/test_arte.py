import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from firsthand import data
from firsthand.distill.arte import (
    Draft,
    Task,
    align_with_dpo,
    arte,
    draft_questions,
    draft_rationales,
    exact_match,
    numbered_lines,
    one_shot_prompt,
    one_shot_scores,
    preference_pairs,
    question_scores,
)
from firsthand.distill.generation import HFGenerator, common_prefix, pad_after_prefix

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?#+="


def tokenizer():
    vocabulary = {"<pad>": 0, "\n": 1} | {character: 2 + i for i, character in enumerate(CHARACTERS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="\n")


def build(family="llama", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(CHARACTERS) + 2, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = (
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.5, **sizes)
        if family == "gpt2"
        else LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5, **sizes
        )
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


PREFIX = "Question: one and one? Answer: two "
PROMPTS = [PREFIX + rest for rest in ("a", "what is it that is longest of all", "and", "b?", "some more of it")]


# Generation with a shared prefix


def by_hand(model, prompt, tokens):
    """Greedy decoding of one prompt, every step from the first token on."""
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 1:
            break
    return tokenizer().decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_shared_prefix_gives_what_one_prompt_at_a_time_gives(family, batch_size):
    model = build(family).eval()
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) > 1, "the model says something different to each"
    for share_prefix in (True, False):
        generate = HFGenerator(model, tokenizer(), max_new_tokens=12, batch_size=batch_size, share_prefix=share_prefix)
        assert generate(PROMPTS) == expected


def test_the_prefix_goes_through_the_model_once():
    model, seen = build(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    HFGenerator(model, tokenizer(), max_new_tokens=1)(PROMPTS)
    longest = max(map(len, PROMPTS)) - len(PREFIX)
    assert seen == [(1, len(PREFIX)), (len(PROMPTS), longest)]


def test_a_model_with_a_sliding_window_shares_nothing_and_answers_the_same():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    config = MistralConfig(
        vocab_size=len(CHARACTERS) + 2, eos_token_id=1, pad_token_id=0, num_key_value_heads=2, sliding_window=8, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = [by_hand(model, prompt, 6) for prompt in PROMPTS]
    assert HFGenerator(model, tokenizer(), max_new_tokens=6)(PROMPTS) == expected


def test_bfloat16_runs():
    generate = HFGenerator(build(dtype=torch.bfloat16), tokenizer(), max_new_tokens=4)
    assert generate(PROMPTS) == generate(PROMPTS)


def test_sampling_is_from_the_softmax_and_depends_on_the_seed_alone():
    model, temperature = build(), 20.0
    generate = HFGenerator(model, tokenizer(), max_new_tokens=1, batch_size=4000)
    drawn = generate(["a b"] * 4000, temperature=temperature, seed=1)
    ids = tokenizer()("a b", return_tensors="pt")["input_ids"]
    expected = F.softmax(model(ids).logits[0, -1] / temperature, dim=-1)
    likeliest = expected[2:].topk(3).indices + 2
    for index in likeliest.tolist():
        share = drawn.count(tokenizer().decode([index])) / 4000
        assert share == pytest.approx(expected[index].item(), abs=0.025)
    torch.manual_seed(5)
    assert generate(["a b"] * 8, temperature=temperature, seed=1) == generate(["a b"] * 8, temperature=temperature, seed=1)
    assert generate(["a b"] * 8, temperature=temperature, seed=1) != generate(["a b"] * 8, temperature=temperature, seed=2)


def test_stop_strings_end_a_completion_and_are_cut_off():
    plain = HFGenerator(build(), tokenizer(), max_new_tokens=12)(PROMPTS)
    stop = plain[0][3:5]
    stopped = HFGenerator(build(), tokenizer(), max_new_tokens=12, stop_strings=[stop])(PROMPTS)
    assert stopped == [text.partition(stop)[0] for text in plain]


def test_mode_is_left_as_it_was():
    model = build().train()
    HFGenerator(model, tokenizer(), max_new_tokens=1)(PROMPTS)
    assert model.training
    assert HFGenerator(model, tokenizer())([]) == []


@pytest.mark.parametrize(
    ("rows", "expected"), [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 1), ([[1], [1]], 0), ([[2, 1], [1, 2]], 0)]
)
def test_common_prefix_leaves_each_row_a_token(rows, expected):
    assert common_prefix(rows) == expected


def test_padding_stands_behind_the_prefix():
    ids, mask = pad_after_prefix([[5, 6, 7], [5, 6, 8, 9]], shared=2, pad=0)
    assert ids.tolist() == [[5, 6, 0, 7], [5, 6, 8, 9]]
    assert mask.tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("argument", ["max_new_tokens", "batch_size"])
def test_bad_generators(argument):
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        HFGenerator(build(), tokenizer(), **{argument: 0})


def test_bad_calls():
    generate = HFGenerator(build(), tokenizer())
    with pytest.raises(ValueError, match="prompt 1 has none"):
        generate(["a", ""])
    with pytest.raises(ValueError, match="temperature must be"):
        generate(["a"], temperature=-1.0)
    nothing = tokenizer()
    nothing.pad_token = nothing.eos_token = None
    with pytest.raises(ValueError, match="pad_token or an eos_token"):
        HFGenerator(build(), nothing)


# Scores


def only_style_b(prompts):
    """A student that is right when it is shown style B."""
    return ["right" if "style B" in prompt else "wrong" for prompt in prompts]


DRAFTS = [Draft(f"question {i}", [f"style {style} of {i}" for style in "ABCD"]) for i in range(8)]
PREFERENCE_SET = [(f"held out {i}", "right") for i in range(5)]


def test_a_student_that_understands_one_style_prefers_it_everywhere():
    scores = one_shot_scores(DRAFTS, PREFERENCE_SET, only_style_b)
    assert scores == [[0.0, 1.0, 0.0, 0.0]] * 8
    pairs = preference_pairs(DRAFTS, scores, "ask", str.upper)
    assert len(pairs) == 8, "all questions are equally good: no pairs of questions"
    for draft, pair in zip(DRAFTS, pairs, strict=True):
        assert pair["level"] == "rationale"
        assert pair["chosen"] == draft.rationales[1]
        assert pair["prompt"] == draft.question.upper()


def test_the_score_is_the_share_of_right_answers():
    seen = []

    def student(prompts):
        seen.append(prompts)
        return [" four ", "five", "four"]

    pairs = [("2+2?", "four"), ("2+3?", "five"), ("2+4?", "six")]
    scores = one_shot_scores([Draft("1+1?", ["so two"])], pairs, student)
    assert scores == [[pytest.approx(2 / 3)]]
    assert seen == [[one_shot_prompt("1+1?", "so two", question) for question, _ in pairs]]
    assert one_shot_scores([Draft("", ["x"])], pairs, student, match=lambda text, answer: text == "five") == [[1 / 3]]


def test_a_questions_score_is_the_mean_of_its_rationales():
    assert question_scores([[0.0, 1.0, 0.5], [0.25]]) == [0.5, 0.25]


def test_bad_scoring():
    with pytest.raises(ValueError, match="preference_set must have"):
        one_shot_scores(DRAFTS, [], only_style_b)
    with pytest.raises(ValueError, match="draft 1 has none"):
        one_shot_scores([DRAFTS[0], Draft("q", [])], PREFERENCE_SET, only_style_b)
    with pytest.raises(ValueError, match="answer must return a text for each prompt, got 1 for 5"):
        one_shot_scores(DRAFTS, PREFERENCE_SET, lambda prompts: ["one"])
    with pytest.raises(ValueError, match=r"scores must be in \[0, 1\], draft 1"):
        question_scores([[0.5], [1.5]])
    with pytest.raises(ValueError, match=r"scores must be in \[0, 1\], draft 0"):
        question_scores([[float("nan")]])
    with pytest.raises(ValueError, match="draft 0 has none"):
        question_scores([[]])


# Pairs


def random_scores(drafts=40, seed=0):
    return torch.rand(drafts, 4, generator=torch.Generator().manual_seed(seed)).tolist()


def test_pairs_are_as_many_as_asked_for_and_prefer_the_better():
    drafts = [Draft(f"q{i}", [f"r{i}{j}" for j in range(4)]) for i in range(40)]
    scores = random_scores()
    pairs = preference_pairs(drafts, scores, "ask", str, num_question_pairs=30)
    assert [pair["level"] for pair in pairs] == ["question"] * 30 + ["rationale"] * 40
    by_question = dict(zip([draft.question for draft in drafts], question_scores(scores), strict=True))
    by_rationale = {r: s for draft, each in zip(drafts, scores, strict=True) for r, s in zip(draft.rationales, each, strict=True)}
    ranked = sorted(by_question, key=by_question.get)
    for pair in pairs:
        of = by_question if pair["level"] == "question" else by_rationale
        assert of[pair["chosen"]] > of[pair["rejected"]]
        if pair["level"] == "question":
            assert pair["prompt"] == "ask"
            assert pair["chosen"] in ranked[-10:]
            assert pair["rejected"] in ranked[:10]
        else:
            others = [r for r in by_rationale if r[:-1] == pair["chosen"][:-1]]
            assert of[pair["chosen"]] == max(of[r] for r in others)
            assert of[pair["rejected"]] == min(of[r] for r in others)


def test_pairs_depend_on_the_generator_alone():
    drafts = [Draft(f"q{i}", [f"r{i}{j}" for j in range(4)]) for i in range(40)]

    def make(seed):
        return preference_pairs(drafts, random_scores(), "ask", str, generator=torch.Generator().manual_seed(seed))

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_ties_give_no_pairs():
    assert preference_pairs(DRAFTS, [[0.5] * 4] * 8, "ask", str) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafts": DRAFTS[:3], "scores": random_scores(3)}, "drafts must be at least 4"),
        ({"scores": random_scores(7)}, "one number for each rationale"),
        ({"scores": [[0.1]] * 8}, "one number for each rationale"),
        ({"scores": [[0.1, 0.2, 0.3, 1.4]] * 8}, r"in \[0, 1\]"),
        ({"top": 0.0}, "top must be"),
        ({"top": 0.6}, "top must be"),
        ({"num_question_pairs": -1}, "num_question_pairs must be"),
    ],
)
def test_bad_pairs(arguments, message):
    defaults = {"drafts": DRAFTS, "scores": random_scores(8), "question_prompt": "ask", "rationale_prompt": str}
    with pytest.raises(ValueError, match=message):
        preference_pairs(**(defaults | arguments))


# What the teacher writes


def test_lines_lose_their_numbers():
    assert numbered_lines("1. What?\n\n 2) 3 and 4?\n- How?\nWhy?\n3.5 is what?") == [
        "What?", "3 and 4?", "How?", "Why?", "3.5 is what?",
    ]  # fmt: skip


def test_questions_are_different_and_not_those_left_out():
    calls = []

    def write(prompts, temperature, seed):
        calls.append((len(prompts), temperature, seed))
        return [f"1. a{seed % 7}\n2. left out\n3. a{seed % 7}\n4. b{len(calls)}.{i}" for i in range(len(prompts))]

    questions = draft_questions(write, "ask", 9, leave_out=["left out"], seed=3)
    assert len(questions) == len(set(questions)) == 9
    assert "left out" not in questions
    assert calls[0][:2] == (2, 1.0)
    assert len({seed for *_, seed in calls}) == len(calls), "each round has a seed of its own"


def test_a_teacher_that_repeats_itself_is_reported():
    with pytest.raises(RuntimeError, match="the teacher wrote 1 different questions in 3 rounds, 4 were asked for"):
        draft_questions(lambda prompts, *_: ["same"] * len(prompts), "ask", 4, max_rounds=3)


def test_rationales_are_in_the_order_of_the_styles():
    drafts = draft_rationales(
        lambda prompts, *_: [f"<{prompt}>" for prompt in prompts], ["q1", "q2"], ["A {}".format, "B {}".format]
    )
    assert drafts == [Draft("q1", ["<A q1>", "<B q1>"]), Draft("q2", ["<A q2>", "<B q2>"])]


def test_bad_drafting():
    write = lambda prompts, *_: list(prompts)  # noqa: E731
    with pytest.raises(ValueError, match="count must be"):
        draft_questions(write, "ask", 0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        draft_questions(write, "ask", 1, temperature=0.0)
    with pytest.raises(ValueError, match="prompts must name at least one style"):
        draft_rationales(write, ["q"], [])


# Alignment


ALIGNED = [{"prompt": f"q{i} ", "chosen": "yes", "rejected": "no", "level": "rationale"} for i in range(8)]


def margin(model, reference):
    def log_probability(each, text):
        ids = tokenizer()("q3 " + text + "\n", return_tensors="pt")["input_ids"]
        log_probs = each(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
        return log_probs[0, 2:].sum()

    with torch.no_grad():
        return sum(
            sign * (log_probability(model, text) - log_probability(reference, text)) for sign, text in ((1, "yes"), (-1, "no"))
        ).item()


@pytest.mark.filterwarnings("ignore")
def test_alignment_prefers_what_is_chosen_and_leaves_the_teacher_alone(tmp_path):
    teacher = build()
    before = copy.deepcopy(teacher.state_dict())
    aligned = align_with_dpo(teacher, tokenizer(), ALIGNED, tmp_path, learning_rate=1e-3, batch_size=2, disable_tqdm=True)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert margin(aligned, teacher) > 0.1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert margin(loaded, teacher) == pytest.approx(margin(aligned, teacher), abs=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path)("q3 yes\n")["input_ids"] == tokenizer()("q3 yes\n")["input_ids"]


@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_trls_sigmoid_with_beta(tmp_path):
    """The first step: the policy is the reference, so the loss is log 2 whatever beta; the last agrees with trl by hand."""
    teacher = build()
    aligned = align_with_dpo(
        teacher, tokenizer(), ALIGNED, tmp_path, learning_rate=1e-3, batch_size=4, beta=0.3, disable_tqdm=True
    )
    config = DPOConfig(
        output_dir=tmp_path / "by_hand", learning_rate=1e-3, per_device_train_batch_size=4, beta=0.3, loss_type="sigmoid",
        num_train_epochs=1, warmup_steps=0.1, lr_scheduler_type="cosine", seed=0, report_to=[], save_strategy="no", use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ALIGNED])
    trainer = DPOTrainer(
        copy.deepcopy(teacher), copy.deepcopy(teacher), args=config, train_dataset=rows, processing_class=tokenizer()
    )
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(aligned.state_dict()[name], value)


def test_nothing_to_align_with(tmp_path):
    with pytest.raises(ValueError, match="pairs must have at least one row"):
        align_with_dpo(build(), tokenizer(), [], tmp_path)


# The whole loop


class World:
    """A teacher and a student made of functions; what was called is in `calls`, and the call named in `fails` raises."""

    def __init__(self, fails=None):
        self.calls, self.fails = [], fails

    def call(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise KeyboardInterrupt

    def teacher(self, prompts, temperature, seed, name="teacher"):
        self.call(f"{name} {prompts[0][:3]}")
        return [f"q{seed % 10**6}.{i}" if prompt.startswith("ask") else f"({prompt})" for i, prompt in enumerate(prompts)]

    def student(self, prompts):
        self.call("student")
        return ["right" if "(B" in prompt and int(prompt.partition(".")[2][0]) % 2 else "wrong" for prompt in prompts]

    def align(self, pairs, folder):
        (folder / "weights").write_text(json.dumps(pairs))
        self.call("align")

    def load(self, folder):
        self.call("load")
        assert (folder / "weights").exists()
        return partial(self.teacher, name="aligned")

    def run(self, folder, **settings):
        return arte(
            folder,
            [Task("one", "ask for one", [("p1", "right"), ("p2", "right")]), Task("two", "ask for two", [("p3", "right")])],
            teacher=self.teacher,
            student=self.student,
            align=self.align,
            load=self.load,
            style_prompts=["A {}".format, "B {}".format],
            rationale_prompt="plain {}".format,
            per_reply=1,
            **({"num_drafts": 8, "num_examples": 3, "num_question_pairs": 5} | settings),
        )


def test_the_loop_leaves_a_file_for_each_stage(tmp_path):
    world = World()
    examples = world.run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1-questions.jsonl", "2-drafts.jsonl", "3-scores.jsonl", "4-pairs.jsonl", "5-aligned", "6-questions.jsonl",
        "7-examples.jsonl", "settings.json",
    ]  # fmt: skip
    assert [row["task"] for row in examples] == ["one"] * 3 + ["two"] * 3
    assert all(row["rationale"] == f"(plain {row['question']})" for row in examples)
    pairs = [json.loads(line) for line in (tmp_path / "4-pairs.jsonl").read_text().splitlines()]
    rationale_level = [pair for pair in pairs if pair["level"] == "rationale"]
    assert rationale_level
    assert all(pair["chosen"].startswith("(B") and pair["prompt"].startswith("plain") for pair in rationale_level)
    assert json.loads((tmp_path / "5-aligned" / "weights").read_text()) == pairs
    calls = list(world.calls)
    assert world.run(tmp_path) == examples
    assert world.calls == calls, "a finished run calls no model"


@pytest.mark.parametrize("fails", ["teacher ask", "teacher A q", "student", "align", "load", "aligned ask", "aligned pla"])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path, fails):
    expected = World().run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        World(fails).run(tmp_path / "stopped")
    assert not list((tmp_path / "stopped").glob(".*")), "nothing half written is left"
    second = World()
    assert second.run(tmp_path / "stopped") == expected
    done = ["teacher ask", "teacher A q", "student", "align", "load", "aligned ask", "aligned pla"]
    again = {"load"} | set(done[done.index(fails) :])
    assert set(second.calls) <= again | {"teacher B q"}
    for path in (tmp_path / "whole").glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


def test_text_of_any_kind_survives_the_files(tmp_path):
    world = World()
    odd = 'line\u2028separator, "quotes", é, and a\nline break'
    world.student = lambda prompts: ["right" if "(B" in prompt else "wrong" for prompt in prompts]
    world.load = lambda folder: lambda prompts, *_: [odd + prompt[:3] + str(i) for i, prompt in enumerate(prompts)]
    examples = world.run(tmp_path, read_questions=lambda reply: [reply])
    assert examples[0]["question"] == odd + "ask0"
    assert examples == world.run(tmp_path, read_questions=lambda reply: [reply])


def test_a_folder_of_other_settings_is_refused(tmp_path):
    World().run(tmp_path)
    with pytest.raises(ValueError, match="differs in num_drafts, seed"):
        World().run(tmp_path, num_drafts=9, seed=1)


@pytest.mark.parametrize(("argument", "value"), [("num_drafts", 3), ("num_examples", 0)])
def test_bad_settings(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        World().run(tmp_path, **{argument: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not data.available("smollm2"), reason="SmolLM2 is not fetched")
def test_smollm2_answers_the_same_with_and_without_a_shared_prefix():
    folder = data.load("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    example = Draft("Which is larger, 3 or 5?", ["5 comes after 3 when counting. The answer is 5."])
    prompts = [one_shot_prompt(*example[:1], example.rationales[0], f"Which is larger, {a}?") for a in ("2 or 9", "7 or 1")]
    settings = {"max_new_tokens": 8, "stop_strings": ["\n"]}
    answers = [
        HFGenerator(model, AutoTokenizer.from_pretrained(folder), share_prefix=share, **settings)(prompts)
        for share in (True, False)
    ]
    assert answers[0] == answers[1]
    assert all(answers[0])


def test_exact_match():
    assert exact_match(" 4\n", "4")
    assert not exact_match("14", "4")

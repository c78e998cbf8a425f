import copy
import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from firsthand.distill.llava_mod import upcycle_ffn
from firsthand.distill.preference import preference_distillation_loss, sequence_logps
from firsthand.testbeds import captions

# TRL 1.16 reads a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def logps():
    """Of the chosen and the rejected, under the student; then under the teacher."""
    return list(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) * 4 - 10)


# Log-probabilities


def test_log_probabilities_by_hand():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1]])
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 6, -100, -100]])
    p = logits.log_softmax(-1)
    expected = torch.stack([p[0, 1, 3] + p[0, 2, 4], p[1, 0, 6]])
    torch.testing.assert_close(sequence_logps(logits, labels), expected)
    torch.testing.assert_close(sequence_logps(logits, labels, average=True), expected / torch.tensor([2, 1]))
    other = labels.masked_fill(labels == -100, -1)
    torch.testing.assert_close(sequence_logps(logits, other, ignore_index=-1), expected)
    assert sequence_logps(logits.to(torch.bfloat16), tokens).dtype == torch.float32


def test_a_text_without_response_is_refused():
    labels = torch.tensor([[5, -100, -100], [-100, 1, 2]])
    with pytest.raises(ValueError, match="got none in 1 of 2"):
        sequence_logps(torch.zeros(2, 3, 7), labels)


# The loss


def test_a_student_that_is_its_teacher(logps):
    chosen, rejected = logps[:2]
    loss = preference_distillation_loss(chosen, rejected, chosen, rejected, reduction="none")
    torch.testing.assert_close(loss, torch.full((5,), math.log(2)))
    loss = preference_distillation_loss(chosen, rejected, chosen, rejected, loss_type="kto_pair", reduction="none")
    torch.testing.assert_close(loss, torch.full((10,), 0.5))


def test_sigmoid_by_hand(logps):
    pairs = zip(*(part.tolist() for part in logps), strict=True)
    expected = [math.log1p(math.exp(-0.3 * ((a - c) - (b - d)))) for a, b, c, d in pairs]
    torch.testing.assert_close(preference_distillation_loss(*logps, beta=0.3, reduction="none"), torch.tensor(expected))
    assert preference_distillation_loss(*logps, beta=0.3).item() == pytest.approx(sum(expected) / 5)


def test_smoothing_mixes_in_the_pair_turned_round(logps):
    turned = [logps[1], logps[0], logps[3], logps[2]]
    expected = 0.8 * preference_distillation_loss(*logps) + 0.2 * preference_distillation_loss(*turned)
    torch.testing.assert_close(preference_distillation_loss(*logps, label_smoothing=0.2), expected)


def test_kto_pair_by_hand(logps):
    chosen = [a - c for a, c in zip(logps[0].tolist(), logps[2].tolist(), strict=True)]
    rejected = [b - d for b, d in zip(logps[1].tolist(), logps[3].tolist(), strict=True)]
    kl_c, kl_r = (max(sum(ratios) / 5, 0.0) for ratios in (chosen, rejected))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = [1 - sigmoid(0.1 * (c - kl_r)) for c in chosen] + [1 - sigmoid(0.1 * (kl_c - r)) for r in rejected]
    loss = preference_distillation_loss(*logps, loss_type="kto_pair", reduction="none")
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_the_means_of_kto_pair_have_a_gradient_unless_detached():
    logps = [
        torch.tensor(values, requires_grad=index < 2) for index, values in enumerate(([2.0, 1], [1.0, 2], [0.0, 0], [0.0, 0]))
    ]
    gradients = {}
    for detach_kl in (False, True):
        loss = preference_distillation_loss(*logps, loss_type="kto_pair", detach_kl=detach_kl, reduction="none")
        gradients[detach_kl] = torch.autograd.grad(loss[0], logps[1], allow_unused=True)[0]
    assert gradients[False].abs().min() > 0, "the first chosen one sees the mean of the rejected"
    assert gradients[True] is None or not gradients[True].any()


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto_pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_push_apart_and_leave_the_teacher_alone(logps, loss_type, dtype):
    logps = [part.to(dtype).requires_grad_() for part in logps]
    preference_distillation_loss(*logps, loss_type=loss_type, detach_kl=True).backward()
    assert (logps[0].grad < 0).all()
    assert (logps[1].grad > 0).all()
    assert logps[2].grad is None
    assert logps[3].grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "ipo"}, "loss_type must be"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss_type": "kto_pair"}, "and 0 for 'kto_pair'"),
        ({"reduction": "median"}, "reduction must be"),
    ],
)
def test_bad_arguments(logps, arguments, message):
    with pytest.raises(ValueError, match=message):
        preference_distillation_loss(*logps, **arguments)


# TRL


def build(seed, hidden):
    torch.manual_seed(seed)
    tokenizer = captions.tokenizer()
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": captions.PAD, "bos_token_id": captions.START, "eos_token_id": captions.END}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, initializer_range=0.2, **sizes, **ids))


def test_dpo_trainer_with_the_teacher_as_reference(tmp_path):
    """TRL's first loss and its first step are ours, for a sparse student and a teacher of another width."""
    tokenizer = captions.tokenizer()
    student, teacher = upcycle_ffn(build(0, 16), generator=torch.Generator().manual_seed(0)), build(1, 32).eval()
    prompts = ["the picture shows", "in first place there is"]
    chosen, rejected = [" a one", " a two digit"], [" a seven beside a three", " a six"]
    by_hand = copy.deepcopy(student)
    settings = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.1,
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        activation_checkpointing=False,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    logps = {}
    for name, model in (("policy", by_hand), ("teacher", copy.deepcopy(teacher))):
        for kind, responses in (("chosen", chosen), ("rejected", rejected)):
            each = []
            for prompt, response in zip(prompts, responses, strict=True):
                ids = tokenizer(prompt + response + captions.SPECIAL[captions.END], return_tensors="pt")["input_ids"]
                labels = ids.clone()
                labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
                each.append(sequence_logps(model(ids).logits, labels))
            logps[f"{name}_{kind}_logps"] = torch.cat(each)
    loss = preference_distillation_loss(**logps, beta=0.1)
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()

    trainer = DPOTrainer(student, ref_model=teacher, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    for (name, one), other in zip(student.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())

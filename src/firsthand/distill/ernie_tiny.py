"""ERNIE-Tiny: distil a BERT-like encoder for a task in four stages that change one thing at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from firsthand.distill.soft import soft_distillation_loss

Mask = Int[Tensor, "batch length"] | Bool[Tensor, "batch length"]
Callback = Callable[[str, int, float], object]


def attention_distillation_loss(
    student_attentions: Sequence[Float[Tensor, "batch student_heads length length"]],
    teacher_attentions: Sequence[Float[Tensor, "batch teacher_heads length length"]],
    attention_mask: Mask | None = None,
    layer_map: Sequence[int] | None = None,
    distance: Literal["mse", "kl"] = "mse",
) -> Float[Tensor, ""]:
    r"""How far the student's attention is from the teacher's, over paired layers.

    $$ L_\mathrm{att} = \frac1M \sum_{m=1}^{M} \operatorname*{mean}_{\mathrm{heads},\,q}
       \frac1n \sum_{k=1}^{n} \big(A^S_{m}[q, k] - A^T_{g(m)}[q, k]\big)^2 $$

    A query's mean is over the n tokens of its own text, the outer mean over all tokens of the batch that are no padding: more
    padding changes nothing.

    Args:
        student_attentions: attention probabilities of its M layers, what transformers returns with `output_attentions=True`.
            In training mode they are taken after dropout there: set the student's attention dropout to 0.
        teacher_attentions: those of the teacher's N layers; no gradient goes there. With another number of heads, both are
            averaged over their heads.
        attention_mask: 1 for tokens, 0 for padding; by default nothing is padding.
        layer_map: the teacher's layer g(m), from 1, of each of the student's layers; by default g(m) = m N / M.
        distance: `"mse"` as above, or `"kl"`, KL(teacher ‖ student) of each query's distribution.

    Returns:
        The loss, in float32.

    Raises:
        ValueError: there are no attentions, N is no multiple of M and there is no `layer_map`, `layer_map` is out of range,
            or `distance` is unknown.

    Source:
        Su et al., "ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression", 2021, arXiv
        2106.02241. That its latent loss is of attentions and hidden states, as TinyBERT's, is from memory, unverified. Even
        pairing of layers, probabilities and not scores, `"kl"`, and the mean over heads where their number differs are our
        choice.
    """
    if distance not in ("mse", "kl"):
        raise ValueError(f"distance must be 'mse' or 'kl', got {distance!r}")
    for name, attentions in (("student_attentions", student_attentions), ("teacher_attentions", teacher_attentions)):
        if not attentions or attentions[0] is None:
            raise ValueError(f'{name} must be one tensor a layer, got none; load the model with attn_implementation="eager"')
    pairs = _pairs(len(student_attentions), len(teacher_attentions), layer_map)
    batch, _, length, _ = student_attentions[0].shape
    mask = _mask(attention_mask, batch, length, student_attentions[0].device)
    tokens = mask.sum(1).clamp(min=1)  # a text without tokens counts nothing, whatever it is divided by

    losses = []
    for layer, teacher_layer in pairs:
        student, teacher = student_attentions[layer - 1].float(), teacher_attentions[teacher_layer - 1].detach().float()
        if student.shape[1] != teacher.shape[1]:
            student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
        _check_shape("teacher_attentions", student.shape, teacher.shape)
        if distance == "mse":
            each = (student - teacher).square() / tokens[:, None, None, None]
        else:
            tiny = torch.finfo(torch.float32).tiny
            each = torch.xlogy(teacher, teacher) - torch.xlogy(teacher, student.clamp(min=tiny))
        losses.append(torch.einsum("bqk,bq,bk->", each.mean(1), mask, mask) / mask.sum().clamp(min=1))
    return torch.stack(losses).mean()


def hidden_distillation_loss(
    student_hidden: Sequence[Float[Tensor, "batch length student_width"]],
    teacher_hidden: Sequence[Float[Tensor, "batch length teacher_width"]],
    projection: Callable[[Tensor], Tensor],
    attention_mask: Mask | None = None,
    layer_map: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    r"""How far the student's hidden states, mapped to the teacher's width, are from the teacher's, over paired layers.

    $$ L_\mathrm{hid} = \frac1{M+1} \sum_{m=0}^{M} \operatorname*{mean}_{\mathrm{tokens}}
       \tfrac1{d_T} \big\lVert H^S_m W - H^T_{g(m)} \big\rVert^2, \qquad g(0) = 0 $$

    Args:
        student_hidden: embeddings and the output of each of M layers, what transformers returns with
            `output_hidden_states=True`.
        teacher_hidden: those of the teacher's N layers; no gradient goes there.
        projection: W, one for all layers, to be trained with the student: `nn.Linear(student_width, teacher_width, bias=False)`,
            or `nn.Identity()` where both are as wide.
        attention_mask: 1 for tokens, 0 for padding, which does not count; by default nothing is padding.
        layer_map: as in `attention_distillation_loss`. Embeddings (layer 0) are always paired.

    Returns:
        The loss, in float32.

    Raises:
        ValueError: there are no hidden states, the projected states are not as wide as the teacher's, N is no multiple of M and
            there is no `layer_map`, or `layer_map` is out of range.

    Source:
        arXiv 2106.02241; from memory, unverified (see `attention_distillation_loss`). One W for all layers, and the embeddings
        as a pair, are our choice.
    """
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if not hidden:
            raise ValueError(f"{name} must be the embeddings and one tensor a layer, got none")
    pairs = [(0, 0), *_pairs(len(student_hidden) - 1, len(teacher_hidden) - 1, layer_map)]
    mask = _mask(attention_mask, *student_hidden[0].shape[:2], student_hidden[0].device)

    losses = []
    for layer, teacher_layer in pairs:
        student, teacher = projection(student_hidden[layer]).float(), teacher_hidden[teacher_layer].detach().float()
        _check_shape("projection's output", teacher.shape, student.shape)
        losses.append(((student - teacher).square().mean(-1) * mask).sum() / mask.sum().clamp(min=1))
    return torch.stack(losses).mean()


def label_distillation_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"] | None,
    labels: Int[Tensor, " batch"] | Float[Tensor, " batch"] | None = None,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 1.0,
    problem: Literal["classification", "regression"] = "classification",
) -> Float[Tensor, ""]:
    r"""What the teacher says of the classes, and what the labels say.

    $$ L = w_s\,T^2\,\mathrm{KL}\big(\mathrm{softmax}(z_T / T) \,\|\, \mathrm{softmax}(z_S / T)\big) + w_h\,\mathrm{CE}(y, z_S) $$

    and for regression, with one number for each text, $w_s (z_S - z_T)^2 + w_h (z_S - y)^2$, all means over the batch.

    Args:
        student_logits: the student's scores.
        teacher_logits: the teacher's; no gradient goes there. May be None if `soft_weight` is 0.
        labels: class indices, or numbers for regression. May be None if `hard_weight` is 0, and then are not read.
        temperature: T, positive.
        soft_weight: w_s, of the teacher's term, at least 0.
        hard_weight: w_h, of the labels' term, at least 0.
        problem: `"classification"` or `"regression"`.

    Raises:
        ValueError: a setting is out of range, logits or labels that are needed are None, or a regression has several outputs.

    Source:
        arXiv 2106.02241: L_soft + L_hard, unit weights from memory, unverified. T = 1, T² and the squared errors of the
        regression are our choice. So is the divergence for L_soft: the cross-entropy with the teacher's probabilities is
        greater by the teacher's entropy, which has no gradient.
    """
    if problem not in ("classification", "regression"):
        raise ValueError(f"problem must be 'classification' or 'regression', got {problem!r}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    _check_weights(soft_weight=soft_weight, hard_weight=hard_weight)
    if problem == "regression" and student_logits.shape[-1] != 1:
        raise ValueError(f"student_logits must have one column for a regression, got shape {tuple(student_logits.shape)}")
    student = student_logits.float()
    loss = student.new_zeros(())
    if soft_weight:
        if teacher_logits is None:
            raise ValueError("teacher_logits must be given where soft_weight is above 0, got None")
        _check_shape("teacher_logits", student.shape, teacher_logits.shape)
        teacher = teacher_logits.detach().float()
        if problem == "classification":
            soft = soft_distillation_loss(student, teacher, temperature)
        else:
            soft = F.mse_loss(student, teacher)
        loss = loss + soft_weight * soft
    if hard_weight:
        if labels is None:
            raise ValueError("labels must be given where hard_weight is above 0, got None")
        _check_shape("labels", student.shape[:1], labels.shape)
        hard = F.cross_entropy(student, labels) if problem == "classification" else F.mse_loss(student[:, 0], labels.float())
        loss = loss + hard_weight * hard
    return loss


class DistillationLoss:
    r"""The loss of one stage, from the student's outputs alone.

    $$ L = w_l\,(L_\mathrm{att} + L_\mathrm{hid}) + w_s\,L_\mathrm{soft} + w_h\,L_\mathrm{hard} $$

    For a plain loop, and for `transformers.Trainer(compute_loss_func=)`:

    ```python
    with DistillationLoss(student, teacher, soft=1.0, hard=1.0) as loss:
        loss(student(input_ids=ids, attention_mask=mask), labels).backward()
    ```

    While it is open, each call of the student is seen (a forward hook): it also returns attentions and hidden states, and the
    teacher reads the same inputs. The projection is part of the student meanwhile, as `student.hidden_projection`, so that
    optimisers, clipping and checkpoints have it: make the optimiser after the loss. `close`, or the end of the `with`, takes
    both away, and `student.save_pretrained` saves what the student was before, trained.

    Args:
        student: of transformers, with `attn_implementation="eager"`; called with keywords.
        teacher: the same kind and vocabulary, in evaluation mode, on the student's device; its weights get no gradient.
        latent: weight of attentions and hidden states, at least 0.
        soft: weight of the teacher's logits.
        hard: weight of the labels; with 0 they are not read.
        temperature: see `label_distillation_loss`.
        problem: `"classification"` or `"regression"`.
        layer_map: see `attention_distillation_loss`.
        attention: `"mse"` or `"kl"`.
        projection: W of `hidden_distillation_loss`, to be carried from stage to stage; by default a new linear map that begins
            as the identity (on the first coordinates, where the widths differ).

    Raises:
        ValueError: a weight is negative or all are 0, vocabularies differ, the teacher is in training mode, a model's attention
            is not eager, or the student has a loss open.

    Source:
        arXiv 2106.02241. The table of stages is the paper's; how the loss comes to the student's outputs, and W's start, are
        our choice.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        latent: float = 1.0,
        soft: float = 0.0,
        hard: float = 0.0,
        temperature: float = 1.0,
        problem: Literal["classification", "regression"] = "classification",
        layer_map: Sequence[int] | None = None,
        attention: Literal["mse", "kl"] = "mse",
        projection: nn.Module | None = None,
    ) -> None:
        _check_weights(latent=latent, soft=soft, hard=hard)
        if latent == soft == hard == 0:
            raise ValueError("latent, soft and hard must not all be 0")
        if hasattr(student, "hidden_projection"):
            raise ValueError("student must have no DistillationLoss open: close the one before")
        if student.config.vocab_size != teacher.config.vocab_size:
            sizes = f"{student.config.vocab_size} and {teacher.config.vocab_size} tokens"
            raise ValueError(f"student and teacher must share one vocabulary, got {sizes}")
        if teacher.training:
            raise ValueError("teacher must be in evaluation mode, call its eval()")
        for name, model in (("student", student), ("teacher", teacher)):
            kind = getattr(model.config, "_attn_implementation", "eager")
            if latent and kind != "eager":
                raise ValueError(f'{name} must be loaded with attn_implementation="eager" to show its attention, got {kind!r}')
        self.student, self.teacher, self.latent, self.layer_map, self.attention = student, teacher, latent, layer_map, attention
        self.label_settings: dict[str, Any] = {
            "soft_weight": soft, "hard_weight": hard, "temperature": temperature, "problem": problem,
        }  # fmt: skip
        self._inputs: dict[str, Tensor] | None = None
        self._handle = student.register_forward_pre_hook(self._see, with_kwargs=True)
        if latent:
            student.hidden_projection = identity_projection(student, teacher) if projection is None else projection

    def _see(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            raise ValueError("the student must be called with keywords (input_ids=..., attention_mask=...) while it is distilled")
        self._inputs = {name: kwargs[name] for name in _INPUTS if kwargs.get(name) is not None}
        shown = {"output_attentions": True, "output_hidden_states": True} if self.latent else {}
        return args, {**kwargs, **shown, "return_dict": True}

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of the student's last call.

        Args:
            outputs: what that call returned.
            labels: one a text; needed with `hard`.
            num_items_in_batch: labels in all batches that one update accumulates, as the `Trainer` counts them. The loss is then
                this batch's share of their mean. Without labels the `Trainer` cannot count: to accumulate in such a stage, set
                `trainer.loss_is_scaled_for_ga = False`.

        Raises:
            ValueError: the student was not called since the last loss, labels that are needed are None, or see the losses.
        """
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise ValueError("outputs must be of a new call of the student, which was not called since the last loss")
        needed = bool(self.latent)
        with torch.no_grad():
            taught = self.teacher(**inputs, output_attentions=needed, output_hidden_states=needed)
        loss: Tensor | float = 0.0
        if self.latent:
            mask = inputs.get("attention_mask")
            loss = self.latent * (
                attention_distillation_loss(outputs.attentions, taught.attentions, mask, self.layer_map, self.attention)
                + hidden_distillation_loss(
                    outputs.hidden_states, taught.hidden_states, self.student.hidden_projection, mask, self.layer_map
                )
            )
        if self.label_settings["soft_weight"] or self.label_settings["hard_weight"]:
            logits = (getattr(model, "logits", None) for model in (outputs, taught))
            loss = loss + label_distillation_loss(*logits, labels, **self.label_settings)
        if num_items_in_batch is not None:
            loss = loss * len(next(iter(inputs.values()))) / num_items_in_batch
        return loss

    def close(self) -> None:
        """Leave the student as it was, but for what it learnt."""
        self._handle.remove()
        if hasattr(self.student, "hidden_projection"):
            del self.student.hidden_projection

    def __enter__(self) -> "DistillationLoss":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def identity_projection(student: Any, teacher: Any) -> nn.Linear:
    """A learnable map from the student's width to the teacher's that begins as the identity on the coordinates both have."""
    narrow, wide = student.config.hidden_size, teacher.config.hidden_size
    weight = next(student.parameters())
    projection = nn.utils.skip_init(nn.Linear, narrow, wide, bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.eye_(projection.weight)
    return projection


@dataclass(frozen=True)
class Stage:
    """One stage: who teaches, on which text, by which loss, for how long.

    Attributes:
        name: what it is called.
        teacher: see `DistillationLoss`.
        data: batches, as dicts of what the student takes and, where `hard` is above 0, `"labels"`; gone through again when it
            ends, as a `DataLoader` can be.
        steps: number of updates; with 0 the stage is left out.
        lr: peak learning rate.
        latent: weight of attentions and hidden states.
        soft: weight of the teacher's logits.
        hard: weight of the labels.
    """

    name: str
    teacher: Any
    data: Iterable[Mapping[str, Tensor]]
    steps: int
    lr: float
    latent: float = 1.0
    soft: float = 0.0
    hard: float = 0.0


def ernie_tiny_stages(
    pretrained_teacher: Any,
    finetuned_teacher: Any,
    general_data: Iterable[Mapping[str, Tensor]],
    task_data: Iterable[Mapping[str, Tensor]],
    steps: tuple[int, int, int, int],
    lr: tuple[float, float, float, float] = (5e-4, 5e-4, 5e-5, 3e-5),
) -> list[Stage]:
    """The paper's four stages. From each to the next one thing changes: the teacher, then the text, then the loss.

    | stage | teacher | text | loss |
    |---|---|---|---|
    | GD, general distillation | pre-trained | general | latent |
    | GED, general-enhanced distillation | fine-tuned | general | latent |
    | TAD, task-adaptive distillation | fine-tuned | task | latent |
    | TSD, task-specific distillation | fine-tuned | task | latent, soft and hard labels |

    Args:
        pretrained_teacher: as it was before it saw the task.
        finetuned_teacher: the same, fine-tuned on the task with its labels, with a head.
        general_data: batches without labels, of any text; see `Stage`.
        task_data: batches of the task's text with `"labels"`, which the last stage alone reads.
        steps: of each stage.
        lr: peak learning rate of each stage.

    Raises:
        ValueError: there are not four steps and rates, or one is out of range.

    Source:
        arXiv 2106.02241, abstract. Learning rates are our choice: those the paper used are not known to us.
    """
    for name, values in (("steps", steps), ("lr", lr)):
        if len(values) != 4:
            raise ValueError(f"{name} must be four numbers, one a stage, got {len(values)}")
    stages = [
        Stage("GD", pretrained_teacher, general_data, steps[0], lr[0]),
        Stage("GED", finetuned_teacher, general_data, steps[1], lr[1]),
        Stage("TAD", finetuned_teacher, task_data, steps[2], lr[2]),
        Stage("TSD", finetuned_teacher, task_data, steps[3], lr[3], soft=1.0, hard=1.0),
    ]
    _check_stages(stages)
    return stages


def progressive_distill(
    student: Any,
    stages: Sequence[Stage],
    *,
    projection: nn.Module | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    callback: Callback | None = None,
) -> Any:
    """Take a student through the stages: a plain loop around `DistillationLoss`, AdamW anew in each stage.

    In each stage the learning rate rises linearly and falls linearly to 0. The student carries on from stage to stage, and so
    does the projection.

    Args:
        student: of transformers, with a head for the task; trained in place, in training mode, where it is.
        stages: of `ernie_tiny_stages`, or your own.
        projection: see `DistillationLoss`. Give your own to keep it: with it and the student's weights saved, a run that was
            stopped after a stage goes on with the stages that are left as if it had not been.
        warmup: share of a stage's steps in which the rate rises, in [0, 1).
        weight_decay: of AdamW, at least 0.
        clip: largest norm of the gradient, positive.
        callback: called after each update with the stage's name, the step from 1 and the loss.

    Returns:
        `student`, in the mode it was in.

    Raises:
        ValueError: a setting is out of range, a stage's data are empty or, in a stage that reads them, have no labels; or see
            `DistillationLoss`.

    Source:
        arXiv 2106.02241. Optimiser, schedule, and that both begin anew in each stage are our choice.
    """
    _check_stages(stages)
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be in [0, 1), got {warmup}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    was_training = student.training
    student.train()
    for stage in stages:
        if stage.latent and projection is None:
            projection = identity_projection(student, stage.teacher)
        with DistillationLoss(
            student, stage.teacher, latent=stage.latent, soft=stage.soft, hard=stage.hard, projection=projection
        ) as loss:
            _train(student, stage, loss, warmup, weight_decay, clip, callback)
    return student.train(was_training)


def _train(
    student: Any,
    stage: Stage,
    loss: DistillationLoss,
    warmup: float,
    weight_decay: float,
    clip: float,
    callback: Callback | None,
) -> None:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.lr, weight_decay=weight_decay, fused=True)
    rise = round(warmup * stage.steps)
    batches = _endless(stage)
    for step in range(1, stage.steps + 1):
        rate = step / rise if step <= rise else (stage.steps - step + 1) / (stage.steps - rise)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * rate
        batch = {name: value.to(trained[0].device) for name, value in next(batches).items() if name != "labels" or stage.hard}
        labels = batch.pop("labels", None)
        value = loss(student(**batch), labels)
        value.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        if callback:
            callback(stage.name, step, value.item())


def _endless(stage: Stage) -> Iterator[Mapping[str, Tensor]]:
    while True:
        empty = True
        for batch in stage.data:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                f"data of stage {stage.name} must have batches, and have them again when gone through again, got none"
            )


def _pairs(layers: int, teacher_layers: int, layer_map: Sequence[int] | None) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer), from 1."""
    if layer_map is None:
        if layers < 1 or teacher_layers % layers:
            raise ValueError(
                f"layer_map must be given where the teacher's {teacher_layers} layers are no multiple of the student's {layers}"
            )
        layer_map = [layer * teacher_layers // layers for layer in range(1, layers + 1)]
    if len(layer_map) != layers or not all(1 <= layer <= teacher_layers for layer in layer_map):
        raise ValueError(
            f"layer_map must name a teacher's layer, 1 to {teacher_layers}, for each of {layers} layers, got {list(layer_map)}"
        )
    return list(enumerate(layer_map, start=1))


def _mask(attention_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    if attention_mask is None:
        return torch.ones(batch, length, device=device)
    _check_shape("attention_mask", (batch, length), attention_mask.shape)
    return attention_mask.to(device).bool().float()


def _check_shape(name: str, expected: Sequence[int], got: Sequence[int]) -> None:
    if tuple(expected) != tuple(got):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(got)}")


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {weight}")


def _check_stages(stages: Sequence[Stage]) -> None:
    for stage in stages:
        if stage.steps < 0:
            raise ValueError(f"steps of stage {stage.name} must be at least 0, got {stage.steps}")
        if not 0 < stage.lr < math.inf:
            raise ValueError(f"lr of stage {stage.name} must be positive and finite, got {stage.lr}")

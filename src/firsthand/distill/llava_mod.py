"""LLaVA-MoD: a student with experts mimics its teacher; then (see `preference`) it learns to tell true from false better."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from firsthand.moe.balance import load_balancing_loss
from firsthand.moe.ffn import FFNWeights, ffn_slots
from firsthand.moe.layer import MoE, Routing, TopKRouter, check_sizes

# The student: experts in place of feed-forward blocks


class BalancedRouter(TopKRouter):
    r"""A top-k router that keeps how unevenly its last batch was spread.

    $$ A = E \sum_e \frac{1}{T} \sum_t p_{te} \cdot \frac{1}{T} \sum_t [e = \arg\max_{e'} p_{te'}] $$

    Args:
        args, kwargs: of `firsthand.moe.TopKRouter`.

    Attributes:
        aux_loss: A of the last forward pass, with its gradient; None before it. 1 if all experts get the same, E if one gets all.
            Every token counts, padding too.

    Source:
        The loss of DeepSpeed's top-2 gate (from memory of it), which the release of arXiv 2408.15881 uses: only first choices
        are counted.
    """

    aux_loss: Tensor | None = None

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Routing:
        routing = super().forward(x)
        self.aux_loss = load_balancing_loss(routing.logits, 1)
        return routing

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles go without it: it belongs to a graph
        return {name: value for name, value in self.__dict__.items() if name != "aux_loss"}


def upcycle_ffn(
    model: Any,
    num_experts: int = 4,
    top_k: int = 2,
    layers: str | Sequence[int] = "alternate",
    *,
    router_std: float = 0.02,
    generator: torch.Generator | None = None,
) -> Any:
    r"""Turn feed-forward blocks of a dense language model into experts that are copies of them, in place.

    With $w$ the `top_k` largest of $\mathrm{softmax}(W_r x)$, divided by their sum, the block becomes

    $$ y = \sum_{e \in \text{top-}k} w_e\, \mathrm{FFN}_e(x) $$

    The experts are equal and the weights sum to 1, so the model computes what it did before; training makes them differ. Make
    optimisers afterwards. Of a vision-language model only the language model is changed. Each block becomes a
    `firsthand.moe.MoE` with a `BalancedRouter`, so what `firsthand.moe` has for such layers applies. `from_pretrained` does not
    know them: build the dense model, upcycle it, load the state dict.

    Args:
        model: of transformers, see `firsthand.moe.ffn_slots`: Llama and its kin, GPT-2, or Llava and others that hold one.
        num_experts: E, at least 1.
        top_k: experts a token is sent to, in [1, E].
        layers: `"alternate"` for blocks 0, 2, 4, ..., `"first_half"`, `"second_half"`, `"all"`, or numbers.
        router_std: deviation of the routers' initial weights, at least 0.
        generator: draws them, on the CPU; PyTorch's global one if None.

    Returns:
        `model`.

    Raises:
        ValueError: no feed-forward block of a known form, one that is replaced already, or an argument out of range.

    Source:
        Shu et al., "LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation", ICLR 2025, arXiv 2408.15881; names and defaults
        from its release. Its gate drops tokens beyond 1.5 times an expert's share; ours drops none (our choice). The deviation of
        the routers is our choice too.
    """
    check_sizes(num_experts=num_experts, top_k=top_k)
    if not 0 <= router_std < math.inf:
        raise ValueError(f"router_std must be at least 0 and finite, got {router_std}")
    decoder = _decoder(model)
    slots = ffn_slots(decoder, _which(layers, len(ffn_slots(decoder))))
    taken = next((slot for slot in slots if slot.module is not None), None)
    if taken is not None:
        raise ValueError(f"model must be dense, got one with {type(taken.module).__name__} in {taken.name}")
    for slot in slots:
        slot.replace(_copies(slot.weights(), num_experts, top_k, router_std, generator))
    return model


@torch.no_grad()
def _copies(dense: FFNWeights, num_experts: int, top_k: int, std: float, generator: torch.Generator | None) -> MoE:
    hidden, dim = dense.up.shape
    with torch.random.fork_rng(devices=[]):  # the layers' own initial weights are not used: let them cost no draws
        router = BalancedRouter(dim, num_experts, top_k)
        bias = any(part is not None for part in (dense.up_bias, dense.gate_bias, dense.down_bias))
        gated = dense.gate is not None
        moe = MoE(dim, hidden, num_experts, top_k, router=router, act=dense.act, gated=gated, bias=bias)
    router.weight.copy_(torch.randn(num_experts, dim, generator=generator) * std)

    def first(up: Tensor | None, gate: Tensor | None) -> Tensor | None:
        parts = [part for part in (gate, up) if part is not None]
        return torch.cat(parts) if parts else None

    sources = {
        "gate_up_proj": first(dense.up, dense.gate),
        "down_proj": dense.down,
        "gate_up_bias": first(dense.up_bias, dense.gate_bias),
        "down_bias": dense.down_bias,
    }
    for name, source in sources.items():
        if source is not None:
            getattr(moe, name).copy_(source.expand(num_experts, *source.shape))
    return moe.to(dense.up)  # device and type


def _which(layers: str | Sequence[int], count: int) -> Any:
    if not isinstance(layers, str):
        return layers
    named = {
        "alternate": range(0, count, 2),
        "first_half": range(count // 2),
        "second_half": range(count // 2, count),
        "all": range(count),
    }
    if layers not in named:
        raise ValueError(f"layers must be numbers or one of {', '.join(named)}, got {layers!r}")
    return named[layers]


def moe_aux_loss(model: nn.Module) -> Float[Tensor, ""]:
    """The sum of `aux_loss` over the `BalancedRouter`s of a model, from its last forward pass.

    As many as there are sparse layers if all are balanced. The release multiplies it by 0.01.

    Raises:
        ValueError: the model has none, or was not called yet.
    """
    routers = [module for module in model.modules() if isinstance(module, BalancedRouter)]
    losses = [router.aux_loss for router in routers if router.aux_loss is not None]
    if not losses or len(losses) < len(routers):
        raise ValueError(f"model must be upcycled and have been called, got {len(routers)} routers, {len(losses)} of them called")
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def train_only_ffn(model: Any) -> Any:
    """Let gradients go only into the language model's feed-forward blocks, experts and routers; freeze the rest, in place.

    As in the sparse and the preference stage of arXiv 2408.15881 (its release, where dense blocks train as well).

    Returns:
        `model`.

    Raises:
        ValueError: no feed-forward block of a known form.
    """
    slots = ffn_slots(_decoder(model))
    model.requires_grad_(False)
    for slot in slots:
        parts = slot.weights() if slot.module is None else slot.module.parameters()
        for part in parts:
            if isinstance(part, Tensor):
                (part if part._base is None else part._base).requires_grad_(True)  # GPT-2's are transposed views
    return model


def _decoder(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


# Mimic


def mimic_distillation_loss(
    student_logits: Float[Tensor, "batch length _"],
    teacher_logits: Float[Tensor, "batch length _"],
    labels: Int[Tensor, "batch length"],
    tokens: str = "response",
    shift: bool = True,
    subtract_entropy: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    vocab: int | None = None,
    chunk: int = 1024,
) -> Float[Tensor, "..."]:
    r"""How far the student's next-token distribution is from the teacher's, over the tokens of the response.

    $$ L = \frac1{|R|} \sum_{t \in R} \mathrm{KL}\big(p^T_t \,\|\, p^S_t\big) $$

    R are the positions whose next token is a response token. The softmaxes are taken in float32 or wider, `chunk` positions at
    a time, and the gradient is worked out on the way: beside the two logits, memory holds one tensor of the size of the
    student's logits in R, in their type. There is no second derivative.

    Args:
        student_logits: as the model returns them, not shifted.
        teacher_logits: of the same texts; no gradient goes into them. -inf forbids a token.
        labels: token ids of the response, `ignore_index` elsewhere.
        tokens: `"response"`, or `"all"` for every position, prompt and padding included (the last one too if not `shift`).
        shift: whether position t belongs to label t+1. False is the release, which takes the positions of the response itself: it
            leaves out the distribution over its first token and has the one after its last.
        subtract_entropy: False leaves the teacher's entropy in, as the release does: $-\sum p^T \log p^S$. Same gradient.
        ignore_index: label of what is no response.
        reduction: `"mean"`, `"sum"`, or `"none"` for one number for each position in R, text after text.
        vocab: compare the first so many ids only, for models whose embeddings were padded to different sizes; the softmaxes are
            over those. None asks for equal sizes.
        chunk: positions at a time, at least 1.

    Returns:
        A scalar or (positions), in float32 or wider.

    Raises:
        ValueError: shapes that do not belong together, no position to compare, or an argument out of range.

    Source:
        arXiv 2408.15881, mimic distillation. The release does not shift and does not subtract the entropy; it cuts vocabularies
        to 151 936 ids.
    """
    if student_logits.shape[:2] != labels.shape or teacher_logits.shape[:2] != labels.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the batch and length of labels, {tuple(labels.shape)}, "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    sizes = student_logits.shape[2], teacher_logits.shape[2]
    if vocab is None and sizes[0] != sizes[1]:
        raise ValueError(f"student and teacher must share one vocabulary, got {sizes[0]} and {sizes[1]} ids; vocab= cuts both")
    if vocab is not None and not 1 <= vocab <= min(sizes):
        raise ValueError(f"vocab must be in [1, {min(sizes)}], got {vocab}")
    if tokens not in ("response", "all"):
        raise ValueError(f"tokens must be 'response' or 'all', got {tokens!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    compared = labels != ignore_index if tokens == "response" else torch.ones_like(labels, dtype=torch.bool)
    if shift:
        compared = F.pad(compared[:, 1:], (0, 1), value=False)
    positions = compared.flatten().nonzero()[:, 0]
    if not len(positions):
        raise ValueError("labels must have a response token, got none in the batch")
    flat = (logits[..., :vocab].reshape(labels.numel(), -1) for logits in (student_logits, teacher_logits.detach()))
    losses = _PositionwiseKL.apply(*flat, positions, subtract_entropy, chunk)
    return losses if reduction == "none" else getattr(losses, reduction)()


class _PositionwiseKL(torch.autograd.Function):
    """KL of rows of two matrices of logits. What backward needs is p_S - p_T, made in forward and kept in the student's type."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, positions: Tensor, subtract_entropy: bool, chunk: int) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        losses = torch.empty(len(positions), dtype=dtype, device=student.device)
        gradient = student.new_empty(len(positions), student.shape[1]) if ctx.needs_input_grad[0] else None
        for start in range(0, len(positions), chunk):
            rows = slice(start, start + chunk)
            log_student = student[positions[rows]].to(dtype).log_softmax(dim=-1)
            log_teacher = teacher[positions[rows]].to(dtype).log_softmax(dim=-1)
            p = log_teacher.exp()
            gap = log_teacher.sub_(log_student) if subtract_entropy else -log_student
            losses[rows] = gap.mul_(p).masked_fill_(p == 0, 0.0).sum(dim=-1)  # 0 · ∞ where a token is forbidden
            if gradient is not None:
                gradient[rows] = log_student.exp_().sub_(p)
        ctx.size = len(student)
        ctx.save_for_backward(positions, gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        positions, gradient = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.size, gradient.shape[1])
        whole[positions] = gradient * upstream[0][:, None].to(gradient.dtype)
        return whole, None, None, None, None


class MimicLoss:
    r"""The loss of the mimic stages from the student's outputs alone; the teacher is asked on the way.

    $$ L = L_\mathrm{mimic} + w_\mathrm{lm} L_\mathrm{lm} + w_\mathrm{aux} A $$

    For a plain loop, and for `transformers.Trainer(compute_loss_func=)`:

    ```python
    with MimicLoss(student, teacher, lm_weight=1.0, aux_coef=0.01) as loss:
        loss(student(input_ids=ids, attention_mask=mask), labels).backward()
    ```

    While it is open, each call of the student is seen (a forward hook) and the teacher reads the same inputs, pictures included.

    Args:
        student: of transformers, called with keywords.
        teacher: of the same inputs and vocabulary, in evaluation mode, on the student's device; it gets no gradient.
        lm_weight: of the cross-entropy of the response, at least 0. 0 in the dense stage, 1 in the sparse one.
        aux_coef: of `moe_aux_loss(student)`, at least 0; for a student that `upcycle_ffn` has made sparse. 0.01 in the release.
        mimic: arguments of `mimic_distillation_loss`, other than `reduction`; `ignore_index` must be -100 here.

    Raises:
        ValueError: a weight is negative or not finite, or the teacher is in training mode.

    Source:
        arXiv 2408.15881. The release counts the balance loss twice in the sparse stage, as the language-model loss that it takes
        from the model has it in already; ours has it once.
    """

    def __init__(self, student: Any, teacher: Any, lm_weight: float = 0.0, aux_coef: float = 0.0, **mimic: Any) -> None:
        for name, weight in (("lm_weight", lm_weight), ("aux_coef", aux_coef)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
        if teacher.training:
            raise ValueError("teacher must be in evaluation mode, call its eval()")
        if reserved := {"reduction", "ignore_index"} & mimic.keys():
            raise ValueError(f"mimic must leave reduction and ignore_index alone, got {', '.join(sorted(reserved))}")
        self.student, self.teacher, self.lm_weight, self.aux_coef, self.mimic = student, teacher, lm_weight, aux_coef, mimic
        self._inputs: dict[str, Any] | None = None
        self._handle = student.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise ValueError("the student must be called with keywords (input_ids=..., attention_mask=...) while it mimics")
        self._inputs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_THE_TEACHER}

    def __call__(
        self, outputs: Any, labels: Int[Tensor, "batch length"], num_items_in_batch: Tensor | int | None = None
    ) -> Float[Tensor, ""]:
        """The loss of the student's last call.

        Args:
            outputs: what that call returned.
            labels: token ids of the response, -100 elsewhere; not shifted.
            num_items_in_batch: labels in all batches that one update accumulates, as the `Trainer` counts them. The loss is then
                this batch's share of their mean.

        Raises:
            ValueError: the student was not called since the last loss, or see `mimic_distillation_loss` and `moe_aux_loss`.
        """
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise ValueError("outputs must be of a new call of the student, which was not called since the last loss")
        with torch.no_grad():
            taught = self.teacher(**{**inputs, "use_cache": False}).logits
        loss = mimic_distillation_loss(outputs.logits, taught, labels, **self.mimic)
        if self.lm_weight:
            logits = outputs.logits[:, :-1].flatten(0, 1)
            loss = loss + self.lm_weight * F.cross_entropy(logits.to(loss.dtype), labels[:, 1:].flatten())
        if self.aux_coef:
            loss = loss + self.aux_coef * moe_aux_loss(self.student)
        if num_items_in_batch is not None:
            loss = loss * ((labels[:, 1:] != -100).sum() / num_items_in_batch)
        return loss

    def close(self) -> None:
        """Watch the student no longer."""
        self._handle.remove()

    def __enter__(self) -> "MimicLoss":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch", "output_router_logits", "past_key_values", "inputs_embeds")

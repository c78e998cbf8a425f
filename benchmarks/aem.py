"""What attention entropy costs: against s * log(s) after a softmax, and against the training step it is added to."""

from statistics import median

import torch
from torch.utils.benchmark import Timer

from firsthand.vision.aem import aem_loss
from firsthand.vision.mil import AttentionMIL

ROUNDS = 15


def naive(scores):
    attention = scores.softmax(dim=-1)
    return (attention * attention.log()).sum(dim=-1).mean()


def entr(scores):
    return -torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1).mean()


def backward(loss, scores):
    scores.grad = None
    loss(scores).backward()
    return scores.grad


def race(racers: dict[str, object], number: int) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    times: dict[str, list[float]] = {name: [] for name in racers}
    for timer in timers.values():
        timer.timeit(max(1, number // 5))
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(number).median)
    return {name: median(seconds) for name, seconds in times.items()}


def losses() -> None:
    print("forward and backward of the loss alone, float32")
    for bags, instances in ((1, 10_000), (8, 80), (1, 1_000_000)):
        scores = (3 * torch.randn(bags, instances)).requires_grad_()
        for peer in (naive, entr):
            torch.testing.assert_close(aem_loss(scores), peer(scores))
            torch.testing.assert_close(backward(aem_loss, scores), backward(peer, scores), atol=1e-6, rtol=1e-4)
        racers = {f.__name__: lambda f=f, scores=scores: backward(f, scores) for f in (aem_loss, naive, entr)}
        seconds = race(racers, number=max(1, 2_000_000 // (bags * instances + 10_000)))
        ratios = "  ".join(f"ours / {name} = {seconds['aem_loss'] / seconds[name]:.2f}" for name in ("naive", "entr"))
        print(f"  {bags} x {instances}: ours {1e6 * seconds['aem_loss']:.0f} us  {ratios}")

    print("finite gradients once attention has collapsed (one score 200 above the rest)")
    collapsed = torch.zeros(1, 100)
    collapsed[0, 0] = 200
    collapsed.requires_grad_()
    for loss in (aem_loss, naive, entr):
        print(f"  {loss.__name__}: {bool(backward(loss, collapsed).isfinite().all())}")


def training_step(instances: int = 10_000, width: int = 384) -> None:
    torch.manual_seed(0)
    model, X, Y = AttentionMIL(width), torch.randn(1, instances, width), torch.ones(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(weight):
        optimizer.zero_grad()
        logits, scores = model(X, return_att=True)
        loss = model.criterion(logits, Y)
        if weight:
            loss = loss + weight * aem_loss(scores)
        loss.backward()
        optimizer.step()

    def entropy_alone(scores=torch.randn(1, instances).requires_grad_()):  # noqa: B008
        return backward(aem_loss, scores)

    seconds = race({"with": lambda: step(0.1), "without": lambda: step(0.0), "alone": entropy_alone}, number=1)
    print(f"training step of AttentionMIL, one bag of {instances} x {width}: {1e3 * seconds['without']:.0f} ms")
    print(f"  with / without = {seconds['with'] / seconds['without']:.3f} (limit 1.02; steps are noisy)")
    print(f"  the loss alone / step = {seconds['alone'] / seconds['without']:.4f} (limit 0.02)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    losses()
    training_step()

"""fit and evaluate: what they train, and what they refuse."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny import TinyTask, refused, same, state, tiny_bert, tiny_llama
from torch import nn

from peft_lessons import LoRA, evaluate, fit, freeze, inject, merge
from peft_lessons.engine import AdapterLayer, Method, PeftFiles, injection_of
from peft_lessons.testing import padded_batch
from peft_lessons.train.loop import History, TrainingDiverged

QV = LoRA(rank=4, alpha=6, targets=("query", "value"), dropout=0.1)
TASK = TinyTask()


def injected(method=QV):
    model = tiny_bert()
    torch.manual_seed(0)
    inject(model, method)
    return model


def train(model, steps=10, task=TASK, **kw):
    return fit(model, task, steps, **({"lr": 3e-3, "show": False} | kw))


def test_training_lowers_the_loss_and_changes_only_trainable_parameters():
    model = injected()
    before = state(model)
    history = train(model, 60, lr=1e-2, weight_decay=0.1)
    assert history.smooth_loss()[-1] < 0.8 * history.loss[0]
    assert len(history.loss) == len(history.lr) == 60 and history.seconds > 0
    after = state(model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert evaluate(model, TASK).accuracy > 0.7 and not model.training


def test_the_learning_rate_rises_and_falls():
    rates = train(injected(), 20, lr=1.0, warmup=0.25, clip=1e-9).lr
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(1 / 15)
    assert train(injected(), 4, lr=0.4, warmup=0).lr == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_same_seed_gives_the_same_run_and_leaves_the_global_one_alone():
    one, two, other = injected(), injected(), injected()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(one, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    train(two, seed=1)
    train(other, seed=2)
    assert same(state(one), state(two)) and not same(state(one), state(other))


def test_the_seed_decides_the_order_and_the_dropout_each():
    batches = [next(TASK.batches("test", 16))]
    dropped = [train(injected(), 3, batches, seed=seed).loss for seed in (1, 1, 2)]
    assert dropped[0] == dropped[1] != dropped[2]
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ordered = [train(tiny_bert(**still), 3, seed=seed).loss for seed in (1, 1, 2)]
    assert ordered[0] == ordered[1] != ordered[2]


def test_clip_and_weight_decay_reach_the_optimizer():
    def distances(**settings):
        model = injected()
        before = state(model)
        train(model, 1, lr=0.01, warmup=0, **settings)
        after = {name: p for name, p in model.named_parameters() if p.requires_grad}
        moved = {name: (p - before[name]).abs().max().item() for name, p in after.items()}
        return [max(moved[n] for n in moved if n.endswith(end)) for end in ("lora_A", "lora_B")]

    # A gets no gradient in the first step, as B is 0.
    (a, b), (_, clipped), (decayed, _) = (
        distances(**settings) for settings in ({}, dict(clip=1e-10), dict(weight_decay=1.0))
    )
    assert a == 0 < decayed and clipped < 0.1 * b


def test_smooth_loss_is_the_mean_of_the_last_steps():
    history = History(loss=[8.0, 4.0, 0.0, 2.0])
    assert history.smooth_loss(2) == [8.0, 6.0, 2.0, 1.0]
    assert history.smooth_loss(9) == [8.0, 6.0, 4.0, 3.5]


def test_full_fine_tuning_trains_everything_and_freeze_only_the_head():
    model = tiny_bert()
    before = state(model)
    train(model, 3)
    assert all(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if "key.bias" not in n
    )
    freeze(head := tiny_bert())
    before = state(head)
    train(head, 3)
    moved = {n for n, value in state(head).items() if not torch.equal(value, before[n])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_gradients_from_before_take_no_part():
    clean, tried = injected(), injected()
    tried(**next(TASK.batches("test", 16))).loss.backward()
    train(clean, 3)
    train(tried, 3)
    assert same(state(clean), state(tried))


def test_nan_stops_before_it_reaches_the_weights():
    model = injected()
    train(model, 2)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with refused(model, "step 1: loss nan.*smaller lr", TrainingDiverged):
        train(model, 5)
    assert not model.training and all(p.grad is None for p in model.parameters())


class OwnLoss(nn.Module):
    """Hold two parameters, and return a function of them."""

    def __init__(self, output):
        super().__init__()
        self.w, self.output = nn.Parameter(torch.zeros(2)), output

    def forward(self, input_ids, attention_mask, labels):
        return self.output(self.w)


def test_an_infinite_gradient_stops_before_it_reaches_the_weights():
    model = OwnLoss(lambda w: SimpleNamespace(loss=w.sqrt().sum()))  # 0, with an infinite gradient
    with refused(model, "loss 0, gradient norm inf", TrainingDiverged):
        train(model, 2)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(steps=0), "steps=0"),
        (dict(lr=float("nan")), "lr=nan"),
        (dict(batch_size=-1), "batch_size=-1"),
        (dict(warmup=5), "share of the steps"),
        (dict(weight_decay=-1), "weight_decay=-1"),
        (dict(clip=0), "None for no clipping"),
    ],
)
def test_wrong_arguments_are_refused(settings, message):
    model = injected()
    with refused(model, message):
        train(model, **({"steps": 3} | settings))


def test_training_while_merged_frozen_or_without_loss_is_refused():
    model = injected()
    merge(model)
    with refused(model, "unmerge", RuntimeError):
        train(model)
    frozen = tiny_bert()
    frozen.requires_grad_(False)
    with refused(frozen, "nothing in the model trains"):
        train(frozen)
    with pytest.raises(TypeError, match="returns no loss"):
        train(OwnLoss(lambda w: {"logits": w}))


def test_a_model_around_the_one_that_holds_the_method_is_refused():
    """The method's penalty and its steps would be left out without a word."""
    model = injected()
    outer = nn.ModuleDict({"lm": model})
    with refused(model, r"the method is in model\.lm, .*fit\(model\.lm"):
        train(outer, 3)
    with refused(model, r"the method is in model\._orig_mod, .*fit\(model\._orig_mod"):
        train(torch.compile(model, backend="eager"), 3)
    train(model, 3)


def test_evaluate_restores_the_mode_and_counts_right():
    model = tiny_bert().train()
    scores = evaluate(model, TASK, batch_size=7)
    assert model.training and scores.n == 64
    model.eval()
    with torch.no_grad():
        batch = next(TASK.batches("test", 64))
        output = model(**batch)
    assert scores.loss == pytest.approx(output.loss.item(), rel=1e-5)
    assert scores.accuracy == (output.logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert "±" in repr(scores) and f"{100 * scores.accuracy:.1f} %" in repr(scores)


# ------------------------------------------------------------------ a list of batches


def masked(model, lengths):
    """Return a batch whose labels are -100 but for the last two tokens of each row."""
    batch = padded_batch(model, lengths)
    return batch | {"labels": batch["labels"].index_fill(1, torch.arange(max(lengths) - 2), -100)}


def test_a_list_of_batches_is_taken_in_order_again_and_again():
    model, other = tiny_llama(), tiny_llama()
    batches = [masked(model, [8, 5]), masked(model, [6, 6, 4])]
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    history = fit(model, batches, 5, lr=1e-3, show=False)
    assert seen == [8, 6, 8, 6, 8] and history.loss[4] < history.loss[0]
    stream = SimpleNamespace(stream=lambda *_: iter([*batches, *batches, *batches]))
    assert fit(other, stream, 5, lr=1e-3, show=False).loss == history.loss
    assert all((batch["labels"] != -100).sum() == 2 * len(batch["labels"]) for batch in batches)


def test_evaluate_takes_a_list_too():
    model = tiny_llama().eval()
    batches = [masked(model, [8, 5]), masked(model, [6, 6, 4])]
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches]
    scores = evaluate(model, batches)
    assert scores.n == 10 and scores.accuracy is None
    assert scores.loss == pytest.approx((4 * losses[0] + 6 * losses[1]) / 10, rel=1e-5)
    classifier = tiny_bert().eval()
    assert evaluate(classifier, [*TASK.batches("test", 16)]).n == 64
    assert (
        evaluate(classifier, [*TASK.batches("test", 16)]).accuracy
        == evaluate(classifier, TASK).accuracy
    )


def test_a_list_in_which_nothing_is_learned_is_refused():
    model = tiny_llama()
    good = masked(model, [8, 5])
    nothing = good | {"labels": torch.full_like(good["labels"], -100)}
    nothing["labels"][:, 0] = 5  # a label of the first token, which nothing predicts
    unlabelled = {k: v for k, v in good.items() if k != "labels"}
    for verb, call in {
        "fit": lambda data: train(model, 3, data),
        "evaluate": lambda data: evaluate(model, data),
    }.items():
        for data, message in (
            ([], f"{verb}: the list of batches is empty"),
            ([good, nothing], f"{verb}: all labels of batch 1 are -100, .*NaN: leave the batch"),
            ([good, unlabelled], f"{verb}: batch 1 .*has input_ids, attention_mask: add labels"),
            (["a text"], f"{verb}: batch 0 must be a dict .*'a text'"),
        ):
            with refused(model, message):
                call(data)


# ------------------------------------------------------------------ a method's part in training
# The smallest method that uses all of it: with this the loop is tested without a lesson.


class Counting(AdapterLayer):
    def __init__(self, base):
        super().__init__(base)
        self.scale = nn.Parameter(torch.ones(base.out_features))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.base(x) * self.scale


@dataclass(frozen=True)
class Hooked(Method):
    """Count the steps in a buffer, add a penalty, and require a number of steps."""

    total: int = 10
    targets: tuple[str, ...] = ("query",)
    files = PeftFiles("TEST_HOOKED")
    learning_rate = 0.25

    def wrap(self, path, layer):
        return Counting(layer)

    def before_fit(self, injection, steps):
        if steps != self.total:
            raise ValueError(f"total={self.total}, but fit takes {steps} steps")

    def penalty(self, injection):
        return 1000 + sum(w.scale.square().sum() for w in injection.wrappers.values())

    def after_step(self, injection, step):
        for w in injection.wrappers.values():
            assert w.scale.grad is not None
            w.seen += step


def test_a_method_takes_part_in_training():
    model = injected(Hooked())
    with pytest.raises(ValueError, match="total=10"):
        train(model, 3)
    history = train(model, 10, lr=None)
    assert max(history.lr) == 0.25 and history.loss[0] > 1000
    seen = [w.seen.item() for w in injection_of(model).wrappers.values()]
    assert seen == [55, 55]

"""bilevel/baselines/scores.py: each score by a direct loop, and on a task small enough to know what it should say."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from score_helpers import EOS, SHAPE, make_samples, model
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from bilevel.baselines.scores import Scoring, check_scorable, kept, weights_of
from bilevel.data.samples import Samples
from bilevel.data.stream import BatchStream
from bilevel.data.tokenise import IGNORE
from bilevel.errors import UserError
from bilevel.model.torch_copy import TorchCopy
from bilevel.settings.fields import Settings
from bilevel.settings.methods import METHODS
from bilevel.step.schedule import schedule

SETTINGS = {"train_data": ["-"], "val_data": ["-"], "global_batch_size": 16, "micro_batch_tokens": 40, "lr_y": 1e-2}
SETTINGS |= {"score_epochs": 8.0, "weights": "sample", "model_config": {"model_type": "gpt2"} | SHAPE}


def make_scoring(kind: str, n: int = 64, **changes) -> Scoring:
    settings = Settings(**SETTINGS | changes)
    train, val = make_samples(n, kind, 0), make_samples(32, "clean", 1)
    return Scoring(settings, train, val, lambda: (TorchCopy(model().train()), None), EOS)


def plain_loss(y: torch.nn.Module, ids: list[int], labels: list[int]) -> torch.Tensor:
    """Mean cross-entropy of a row's supervised tokens from full logits."""
    logits = y(input_ids=torch.tensor([ids])).logits[0]
    return functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=IGNORE)


def plain_training(s: Scoring, rows: list[tuple[list[int], list[int]]]) -> torch.nn.Module:
    """As many steps as the scores' models take, of AdamW on the mean loss of the batch, row by row."""
    y, stream = copy.deepcopy(model()).train(), BatchStream(len(rows), 16, s.settings.seed)
    optimizer = torch.optim.AdamW(y.parameters(), weight_decay=0.0)
    steps = -(-s.settings.score_epochs * len(s.train) // 16)
    for step in range(int(steps)):
        optimizer.param_groups[0]["lr"] = s.settings.lr_y * schedule(step, steps, s.settings.warmup_ratio, "cosine")
        torch.stack([plain_loss(y, *rows[i]) for i in next(stream).tolist()]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return y.eval()


def rows_of(samples: Samples) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in samples.tokens]


@pytest.mark.parametrize("method", ["loss", "perplexity", "rho", "ifd"])
@torch.no_grad()
def test_scores_are_those_of_direct_loops(method: str):
    s = make_scoring("random", n=24, score_epochs=1.0, lr_y=3e-3)
    rows, val = rows_of(s.train), rows_of(s.val)
    whole = [(ids, ids) for ids, _ in rows]
    alone = [([EOS, *ids[3:]], [IGNORE, *ids[3:]]) for ids, _ in rows]

    def losses(trained_on: list, rows: list) -> torch.Tensor:
        with torch.enable_grad():
            y = plain_training(s, trained_on)
        return torch.stack([plain_loss(y, *row) for row in rows]).double()

    expected = {
        "loss": lambda: -losses(rows, rows),
        "perplexity": lambda: -losses(whole, whole).exp(),
        "rho": lambda: losses(rows, rows) - losses(val, rows),
        "ifd": lambda: losses(rows, rows) / losses(rows, alone),
    }[method]()
    with torch.enable_grad():
        found = METHODS[method].function()(s)
    if method == "ifd":
        expected = torch.tensor([r if r < 1 else -r for r in expected.tolist()])
    torch.testing.assert_close(found, expected.double(), rtol=2e-4, atol=2e-5)
    assert expected.std() > 0.01


def test_a_pretrained_model_s_perplexity_is_its_own():
    s = make_scoring("random", n=8, model_config=None, model_name_or_path="a folder")
    with torch.no_grad():
        expected = [-float(plain_loss(model().eval(), ids, ids).exp()) for ids, _ in rows_of(s.train)]
    assert METHODS["perplexity"].function()(s).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("rho", "empty"), ("influence", "empty"), ("rho", "random"), ("influence", "random"), ("loss", "random")],
)
def test_noisy_samples_come_last(method: str, kind: str):
    s = make_scoring(kind, micro_batch_tokens=1000)
    scores = METHODS[method].function()(s)
    assert roc_auc_score(s.train.is_noisy, -scores) > (0.95 if kind == "empty" else 0.8)


def test_a_loss_filter_keeps_what_is_emptied():
    """It must be so: nothing is easier than an end."""
    s = make_scoring("empty", micro_batch_tokens=1000)
    assert roc_auc_score(s.train.is_noisy, -METHODS["loss"].function()(s)) < 0.1


def test_random_keeps_other_records_for_another_seed():
    """As many as any selection, whatever they hold; equal chances."""
    kept_ = [
        kept(METHODS["random"].function()(make_scoring("random", n=64, seed=seed)), 0.25, seed) for seed in range(40)
    ]
    assert {int(found.sum()) for found in kept_} == {16} and len({tuple(found.tolist()) for found in kept_}) == 40
    counts = torch.stack(kept_).sum(0)
    assert counts.min() > 0 and counts.max() < 24
    again = kept(METHODS["random"].function()(make_scoring("random", n=64, seed=3)), 0.25, 3)
    assert torch.equal(again, kept_[3])


def test_oracle_and_uniform():
    s = make_scoring("empty", n=10)
    assert METHODS["oracle"].function()(s).tolist() == [1, 0] * 5
    assert METHODS["uniform"].function()(s).tolist() == [1] * 10
    for method, expected in (("oracle", [2, 0] * 5), ("uniform", [1] * 10)):
        settings = dataclasses.replace(s.settings, method=method)
        x = weights_of(METHODS[method].function()(s), settings, s.train)
        assert x.coefficients(s.train.all_ids).tolist() == expected
    with pytest.raises(UserError, match="needs the field is_noisy"):
        check_scorable(dataclasses.replace(s.settings, method="oracle"), s.val)


def test_ifd_from_1_on_comes_last(monkeypatch: pytest.MonkeyPatch):
    losses = iter([torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 2.0, 8.0])])
    monkeypatch.setattr(Scoring, "trained", lambda *_: None)
    monkeypatch.setattr(Scoring, "losses", lambda *_: next(losses))
    assert METHODS["ifd"].function()(make_scoring("random", n=4)).tolist() == [0.5, -1.0, -1.5, 0.5]


def test_ifd_needs_prompts():
    s = make_scoring("empty", n=4)
    s.train = s.train.changed(lambda rows: {"input_ids": rows["input_ids"], "labels": rows["input_ids"]})
    with pytest.raises(UserError, match="have no prompts"):
        check_scorable(dataclasses.replace(s.settings, method="ifd"), s.train)


def test_the_best_are_kept_and_ties_are_drawn():
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, torch.nan, 4.0])
    assert kept(scores, 0.5, 0).tolist() == [True, False, False, True, False, True]
    assert kept(scores, 0.01, 0).tolist() == [False, False, False, True, False, False]
    assert kept(scores, 1.0, 0).all()
    equal = torch.ones(1000)
    chosen = kept(equal, 0.5, 0)
    assert chosen.sum() == 500 and 200 < chosen[:500].sum() < 300
    assert not torch.equal(chosen, kept(equal, 0.5, 1))


def test_sources_get_their_share_of_what_is_kept():
    """Of 10 and 30 samples the best 12 are 9 and 3."""
    parts = [make_samples(10, "clean", 0), make_samples(30, "clean", 1)]
    train = Samples([Path("a.json"), Path("b.json")], [part.table for part in parts], [0, 0])
    scores = torch.cat([torch.arange(10), 6.5 + torch.arange(30) * -1.0]).double()
    settings = Settings(**SETTINGS | {"weights": "source", "method": "loss", "keep": 0.3})
    x = weights_of(scores, settings, train)
    expected = scores.sort(descending=True).indices[:12] < 10
    assert x.p.tolist() == pytest.approx([int(expected.sum()) / 12, int((~expected).sum()) / 12])


def test_operations_are_those_of_all_models():
    """rho: two models train, and each scores the training data forward."""
    s = make_scoring("random", n=32, score_epochs=1.0)
    METHODS["rho"].function()(s)
    once = make_scoring("random", n=32, score_epochs=1.0)
    w = once.trained(once.train)
    training = w.passed.operations(w.shape)
    once.losses(w, once.train)
    assert s.operations == pytest.approx(2 * w.passed.operations(w.shape), rel=0.15)
    assert w.passed.operations(w.shape) == pytest.approx(4 / 3 * training, rel=0.05)

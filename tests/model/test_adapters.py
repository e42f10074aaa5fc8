"""Two adapters on one frozen model against two separate copies with an adapter each, made and computed by peft."""

import copy
from pathlib import Path

import datasets
import peft
import pytest
import torch
from test_lora import Tokens
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from bilevel.data.samples import TOKEN_FEATURES, Samples
from bilevel.data.tokenise import IGNORE
from bilevel.model.adapter_copy import AdapterCopy
from bilevel.model.adapters import add_adapters
from bilevel.model.copies import make_copies
from bilevel.model.cpu_kernels import speed_up
from bilevel.model.loading import load_model, model_shape
from bilevel.model.torch_copy import TorchCopy
from bilevel.processes import ALONE
from bilevel.settings.fields import Settings
from bilevel.step.f2sa import penalty_step
from bilevel.weights.learned import SampleWeights, SourceWeights

LLAMA = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"max_position_embeddings": 32, "num_key_value_heads": 2}
SHAPES = {
    "gpt2": {"vocab_size": 60, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": LLAMA,
    "qwen2": LLAMA | {"tie_word_embeddings": True},
    "gemma2": LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "qwen3_moe": LLAMA | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
STEPS = 20
LR, LR_X, NU, SIZES = 3e-3, 20.0, 2.0, (9, 12)


def rows(sizes: tuple[int, ...], seed: int) -> Samples:
    """Rows of 7 or 13 tokens, the second half of each supervised: few shapes, as each costs oneDNN a kernel."""
    generator, tables = torch.Generator().manual_seed(seed), []
    for size in sizes:
        table = []
        for index in range(size):
            length = 6 * int(torch.randint(1, 3, (), generator=generator)) + 1
            ids = torch.randint(1, 60, (length,), generator=generator).tolist()
            labels = [IGNORE] * (length // 2) + ids[length // 2 :]
            table.append({"index": index, "is_noisy": None, "input_ids": ids, "labels": labels})
        tables.append(datasets.Dataset.from_list(table, features=TOKEN_FEATURES))
    return Samples([Path(f"{i}.json") for i in range(len(sizes))], tables, [0] * len(sizes))


TRAIN, VALIDATION = rows(SIZES, 1), rows((8,), 2)


def given(family: str, **changes) -> Settings:
    values = {"train_data": ["a"], "val_data": ["b"], "model_config": {"model_type": family} | SHAPES[family]}
    values |= {"max_length": 32, "lora_rank": 3, "lora_alpha": 12.0, "micro_batch_tokens": 60, "lr_y": LR}
    return Settings(**values | changes)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.model.copies.taught_ends", lambda *_: [])


def shared(family: str, **changes) -> dict[str, AdapterCopy]:
    chosen = given(family, **changes)
    copies, _ = make_copies(chosen, ALONE, model_shape(chosen), Tokens())
    return copies


def separate(family: str, like: dict[str, AdapterCopy]) -> dict[str, TorchCopy]:
    """Two whole copies with an adapter each, by peft alone; they start as those in `like`."""
    plain = given(family, lora_rank=None)
    base, copies = load_model(plain, model_shape(plain), Tokens()), {}
    for name, ours in like.items():
        model = copy.deepcopy(base)
        conv = any(isinstance(module, Conv1D) for module in model.modules())
        targets = ours.model.peft_config[name].target_modules
        config = peft.LoraConfig(r=3, lora_alpha=12.0, target_modules=targets, fan_in_fan_out=conv)
        peft.inject_adapter_in_model(config, model, name)
        own = dict(model.named_parameters())
        for full, p in ours.own.items():
            own[full].data.copy_(p.data)
        copies[name] = TorchCopy(speed_up(model), active=([own[full] for full in ours.own], []))
    return copies


def weights_of(per_sample: bool) -> SourceWeights | SampleWeights:
    """Moved by SGD, in proportion to gaps: Adam's first move has the sign of a gap alone, even of rounding."""
    if per_sample:
        return SampleWeights(sum(SIZES), None, "sigmoid", 1 / NU, "sgd")
    return SourceWeights(TRAIN.source_ids, torch.tensor([0.4, 0.6]), 1 / NU, "sgd")


def trained(copies, x, steps: int = STEPS, order: int = 1, world=ALONE, packed: bool = False) -> list[torch.Tensor]:
    """Train the copies and x; the gaps and losses of each step."""
    generator, found = torch.Generator().manual_seed(5), []
    for step in range(steps):
        train = TRAIN.batch(torch.randperm(len(TRAIN), generator=generator)[:8], 60, world, packed=packed)
        validation = VALIDATION.batch(
            torch.randperm(len(VALIDATION), generator=generator)[:5], 60, world, packed=packed
        )
        result = penalty_step(copies["u"], copies["w"], x, train, validation, NU, LR, 1000 * step, order)
        found.append(torch.cat([result.gaps, torch.tensor([result.loss_u, result.loss_w, result.val_loss])]))
        x.step(LR_X)
    return found


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """||a - b|| / ||b|| over all adapter parameters."""
    a, b = (torch.cat([p.detach().flatten() for p in each.values()]) for each in (ours, theirs))
    return float((a - b).norm() / b.norm())


def compared(copies, other, per_sample: bool, order: int = 1, steps: int = STEPS) -> tuple[float, float, float]:
    """The largest distances between two ways to train: of adapters, of x, and of losses and gaps."""
    xs = weights_of(per_sample), weights_of(per_sample)
    ours, theirs = (trained(each, x, steps, order) for each, x in zip((copies, other), xs, strict=True))
    of_adapters = max(
        distance(copy.own, {full: dict(other[name].model.named_parameters())[full] for full in copy.own})
        for name, copy in copies.items()
    )
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return of_adapters, float((xs[0].x - xs[1].x).abs().max()), apart


def ways(*quick: tuple) -> list:
    """Every family per source and per sample, and with order 2 one of both in turn; slow but for the quick ones."""
    kinds = ("source", "sample")
    every = [(family, per, 1) for family in SHAPES for per in kinds]
    every += [(family, kinds[number % 2], 2) for number, family in enumerate(SHAPES)]
    return [pytest.param(*way, marks=[] if way in quick else pytest.mark.slow) for way in every]


@pytest.mark.parametrize(("family", "per", "order"), ways(("gpt2", "sample", 1)))
def test_adapters_on_one_model_are_two_copies(family: str, per: str, order: int) -> None:
    """In passes of their own: peft's own copies, bit for bit."""
    copies = shared(family)
    for each in copies.values():
        each.one_pass = False
    assert compared(copies, separate(family, copies), per == "sample", order) == (0, 0, 0)


@pytest.mark.parametrize(("family", "per", "order"), ways(("gpt2", "source", 1)))
def test_one_pass_is_three(family: str, per: str, order: int) -> None:
    copies = shared(family)
    assert all(each.one_pass for each in copies.values())
    assert max(compared(copies, separate(family, copies), per == "sample", order)) < 1e-5


def test_x_stays_while_the_adapters_are_equal() -> None:
    """Equal rows of one pass can differ by rounding; the gaps are exactly 0 all the same."""
    copies, x = shared("llama"), weights_of(per_sample=True)
    start = x.x.clone()
    (first, second) = trained(copies, x, steps=2)
    assert not first[:-3].any() and first[-1] > 0 and second[:-3].all()
    copies, x = shared("llama"), weights_of(per_sample=True)
    trained(copies, x, steps=1)
    assert torch.equal(x.x, start)


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.2}, {"dropout": 0.2, "model_config": None}], ids=["lora", "own"]
)
def test_dropout_has_the_same_masks_for_both(changes: dict) -> None:
    """In passes of their own, as in one pass each row would have a mask of its own: the first gaps are exactly 0."""
    changes = changes | {"model_config": {"model_type": "gpt2"} | SHAPES["gpt2"]}
    copies = shared("gpt2", **changes)
    assert not any(each.one_pass for each in copies.values())
    (gaps,) = trained(copies, weights_of(per_sample=True), steps=1)
    assert not gaps[:-3].any()
    losses = [copies["u"].losses(TRAIN.batch(torch.arange(4), 600).micro_batches[0], seed) for seed in (1, 2)]
    assert not torch.equal(*losses)


def test_layers_that_do_not_see_the_rows_get_passes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that get the tokens routed to them: here every second token of the batch goes through one."""
    plain = LlamaMLP.forward
    assert all(each.one_pass for each in shared("llama").values())

    def routed(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        return torch.zeros_like(flat).index_add(0, torch.arange(0, len(flat), 2), plain(self, flat[::2])).view_as(x)

    monkeypatch.setattr(LlamaMLP, "forward", routed)
    copies = shared("llama")
    assert not any(each.one_pass for each in copies.values())
    assert compared(copies, separate("llama", copies), per_sample=True, steps=2) == (0, 0, 0)


@pytest.mark.parametrize("name", ["w", "u"])
def test_a_layer_may_be_called_as_a_copy(name: str) -> None:
    """The adapter of a copy has its own parameters, whatever the layers of the model are called."""
    chosen = given("llama", lora_targets=[name])
    shape = model_shape(chosen)
    model = load_model(given("llama", lora_rank=None), shape, Tokens())
    for layer in model.model.layers:
        setattr(layer, name, layer.mlp)
        del layer.mlp
    model.model.layers[0].add_module(name, torch.nn.Linear(32, 32))
    adapters = add_adapters(model, chosen)
    found = [{id(p) for p in adapters.parameters[each].values()} for each in "uw"]
    assert len(found[0]) == len(found[1]) == 2 and not found[0] & found[1]


def test_one_model_and_two_adapters_are_all_there_is() -> None:
    """To the byte: parameters of one model and two adapters; gradients and moments of the adapters alone."""
    copies = shared("llama")
    trained(copies, weights_of(per_sample=False), steps=2)
    assert copies["u"].model is copies["w"].model
    everything = list(copies["u"].model.parameters())
    plain = load_model(given("llama", lora_rank=None), model_shape(given("llama")), Tokens())
    size, adapters = sum(p.nbytes for p in plain.parameters()), sum(p.nbytes for p in copies["u"].own.values())
    assert sum(p.nbytes for p in everything) == size + 2 * adapters
    moments = [
        state[name]
        for c in copies.values()
        for state in c.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    assert sum(m.nbytes for m in moments) == 4 * adapters
    assert all(p.grad is None for p in everything if not p.requires_grad)
    rank, layers = 3, copies["u"].adapters.layers.values()
    assert adapters == 4 * sum(
        rank * (layer.base_layer.in_features + layer.base_layer.out_features) for layer in layers
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing(checkpointing: bool) -> None:
    """Layers are computed again in the backward pass, when the rows must still be those of the pass."""
    copies, plain = shared("llama", gradient_checkpointing=checkpointing), shared("llama")
    xs = weights_of(per_sample=True), weights_of(per_sample=True)
    ours, theirs = (trained(each, x, steps=3) for each, x in zip((copies, plain), xs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(distance(copies[name].own, plain[name].own) == 0 for name in "uw")

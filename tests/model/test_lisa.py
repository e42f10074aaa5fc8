"""LISA in one process: which parameters are blocks, what is drawn, and that nothing else moves or holds state."""

import copy
from collections import Counter
from itertools import combinations
from math import comb

import pytest
import torch
from step_helpers import NU, SAMPLES, VOCABULARY, batch, cut, flat, source_weights
from transformers import AutoConfig, AutoModelForCausalLM

from bilevel.errors import UserError
from bilevel.model.lisa import LayerDraw, Layers, Lisa, find_blocks
from bilevel.model.torch_copy import TorchCopy
from bilevel.settings.fields import Settings
from bilevel.step.f2sa import penalty_step

BLOCKS = 3
SEED = 12  # in four intervals it draws blocks 0, 0, 2, 1: one twice in a row, and every one
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GROUPED = {"num_key_value_heads": 1}
FAMILIES = {
    "gpt2": {},
    "gpt_neox": {},
    "llama": GROUPED,
    "gemma2": GROUPED | {"head_dim": 8},
    "qwen2": GROUPED,
    "mistral": GROUPED,
    "phi": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "falcon": {},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "jamba": GROUPED | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},  # blocks of two classes
}
# What is not in a block, where model.named_parameters() calls it something else than embed_tokens, lm_head and norm.
REST = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"},
    "gpt_neox": {
        "gpt_neox.embed_in.weight",
        "gpt_neox.final_layer_norm.weight",
        "gpt_neox.final_layer_norm.bias",
        "lm_head.weight",
    },
    "gemma2": {"model.embed_tokens.weight", "model.norm.weight"},
    "phi": {
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        "model.final_layernorm.bias",
        "lm_head.weight",
        "lm_head.bias",
    },
    "opt": {
        f"model.decoder.{name}"
        for name in (
            "embed_tokens.weight",
            "embed_positions.weight",
            "final_layer_norm.weight",
            "final_layer_norm.bias",
        )
    },
    "falcon": {"transformer.word_embeddings.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"},
    "jamba": {"model.embed_tokens.weight", "model.final_layernorm.weight", "lm_head.weight"},
}
USUAL_REST = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def make(family: str = "gpt2", **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    no_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(family, **SHAPE | no_tokens | FAMILIES[family] | changes)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).train()


def lisa_for(models: dict[str, torch.nn.Module], layers: int = 1, interval: int = 2, **changes) -> Lisa:
    given = {"train_data": ["a"], "val_data": ["b"], "model_name_or_path": "m"}
    return Lisa(Settings(**given, lisa_layers=layers, lisa_interval=interval, **changes), models)


def two_copies(model: torch.nn.Module, lisa: dict | None, **arguments) -> tuple[Lisa | None, dict[str, TorchCopy]]:
    models = {name: copy.deepcopy(model) for name in "uw"}
    drawn = lisa_for(models, **lisa) if lisa is not None else None
    return drawn, {
        name: TorchCopy(models[name], active=drawn.active(name) if drawn else None, **arguments) for name in models
    }


def one_step(step: int, copies: dict[str, TorchCopy], lisa: Lisa | None, lr: float = 1e-3) -> None:
    """A penalty step, at an interval's beginning after a new draw."""
    if lisa:
        lisa.switch(step, copies)
    ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step)).tolist()
    train, validation = cut(ids[:12], 6), cut(ids[12:18], 6)
    penalty_step(**copies, weights=source_weights(), train=train, validation=validation, nu=NU, lr_y=lr,
                 seed=1000 * step)  # fmt: skip


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that are not bit-equal to what they were."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def names_of(model: torch.nn.Module, parameters: list) -> set[str]:
    """Names of parameters, given as they come from Layers: bare or in lists."""
    wanted = {id(p) for part in parameters for p in ([part] if isinstance(part, torch.Tensor) else part)}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def with_state(copy_: TorchCopy) -> set[str]:
    return names_of(copy_.model, [p for p, state in copy_.optimizer.state.items() if "exp_avg" in state])


# ----------------------------------------------------------------------------------------------------------------------
# blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_by_structure(family):
    model = make(family)
    layers = Layers(model)
    assert len(layers.blocks) == BLOCKS
    assert names_of(model, layers.rest) == REST.get(family, USUAL_REST)
    assert sum(map(len, layers.blocks)) + len(layers.rest) == len(list(model.parameters()))
    for number, block in enumerate(layers.blocks):
        assert all(f".{number}." in name for name in names_of(model, block))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_one_parameter_of_the_rest(family, tied):
    model = make(family, tie_word_embeddings=tied)
    rest = Layers(model).rest
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for weight in {model.get_output_embeddings().weight, model.get_input_embeddings().weight}:
        assert sum(p is weight for p in rest) == 1


class Block(torch.nn.Module):
    def __init__(self, experts: int):
        super().__init__()
        self.mix = torch.nn.Linear(2, 2)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(experts))


class DenseBlock(Block):
    pass


@pytest.mark.parametrize(
    "blocks",
    [
        [Block(8), Block(8)],
        [Block(0), Block(64)],
        [DenseBlock(0), Block(8), DenseBlock(0), Block(8)],  # the first layers of many MoE models are dense
    ],
    ids=["all", "one block has them all", "blocks of two classes"],
)
def test_experts_inside_the_blocks_are_not_the_blocks(blocks):
    model = torch.nn.Module()
    model.embedding, model.layers = torch.nn.Embedding(9, 2), torch.nn.ModuleList(blocks)
    assert find_blocks(model) is model.layers


@pytest.mark.parametrize("model", [torch.nn.Linear(3, 3), torch.nn.ModuleDict({"empty": torch.nn.ModuleList()})])
def test_a_model_without_blocks_gets_a_clear_error(model):
    with pytest.raises(UserError, match="no list of decoder blocks"):
        find_blocks(model)


def test_more_layers_than_blocks_get_a_clear_error():
    with pytest.raises(UserError, match=f"lisa_layers 4: the model has {BLOCKS} decoder blocks"):
        lisa_for({name: make() for name in "uw"}, layers=BLOCKS + 1)


# ----------------------------------------------------------------------------------------------------------------------
# draws


def draws(intervals: int, copy_name: str = "u", blocks: int = 8, layers: int = 2, seed: int = 0, shared: bool = True):
    draw = LayerDraw(blocks, layers, seed, shared)
    return [draw(interval, copy_name) for interval in range(intervals)]


def test_draws_follow_from_the_seed_alone_and_touch_no_generator():
    torch.manual_seed(1)
    first = draws(50)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert draws(50) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert draws(50, seed=1) != first
    assert LayerDraw(8, 2, 0, True)(37, "w") == first[37]  # no need to have drawn what came before


def test_u_and_w_draw_alike_when_shared_and_independently_when_not():
    assert draws(50, "u") == draws(50, "w")
    pairs = list(zip(draws(3000, "u", shared=False), draws(3000, "w", shared=False), strict=True))
    equal = sum(u == w for u, w in pairs)
    assert equal == pytest.approx(3000 / comb(8, 2), abs=40)  # 107, standard deviation 10


def test_every_block_is_drawn_about_equally_often():
    drawn = draws(3000)
    assert all(len(set(blocks)) == 2 and blocks == tuple(sorted(blocks)) for blocks in drawn)
    counts = Counter(block for blocks in drawn for block in blocks)
    assert sorted(counts) == list(range(8))
    assert all(count == pytest.approx(750, abs=95) for count in counts.values())  # standard deviation 24
    assert set(drawn) == set(combinations(range(8), 2))
    repeated = sum(one == other for one, other in zip(drawn, drawn[1:], strict=False))
    assert repeated == pytest.approx(3000 / 28, abs=40)  # an interval's draw says nothing about the next


# ----------------------------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_drawn_blocks_and_the_rest_move_and_hold_state(family):
    """Invariant 6, over four intervals that draw every block, with weight decay on."""
    lisa, copies = two_copies(make(family), {"layers": 1, "interval": 2, "seed": SEED}, weight_decay=0.1)
    start = {name: snapshot(copy_.model) for name, copy_ in copies.items()}
    ever, previous = set(), None
    for interval in range(4):
        drawn = lisa.draw(interval, "u")
        before = {name: snapshot(copy_.model) for name, copy_ in copies.items()}
        lisa.switch(2 * interval, copies)
        assert lisa.drawn == {"u": drawn, "w": drawn}
        for name, copy_ in copies.items():
            layers, state = lisa.layers[name], with_state(copy_)
            if interval and drawn != previous:
                assert state == names_of(copy_.model, layers.rest)
            assert not changed(copy_.model, before[name])
        for step in (2 * interval, 2 * interval + 1):
            one_step(step, copies, lisa)
        for name, copy_ in copies.items():
            layers, model = lisa.layers[name], copy_.model
            active = names_of(model, layers.rest + [p for i in drawn for p in layers.blocks[i]])
            assert changed(model, before[name]) == active
            assert with_state(copy_) == {n for n, p in model.named_parameters() if p.requires_grad} == active
            held = sum(state["exp_avg"].numel() for state in copy_.optimizer.state.values())
            sizes = [sum(p.numel() for p in block) for block in layers.blocks]
            assert held == sum(p.numel() for p in layers.rest) + sum(sizes[i] for i in drawn) < copy_.size
        ever, previous = ever | set(drawn), drawn
        for name, copy_ in copies.items():
            moved = changed(copy_.model, start[name])
            assert moved == names_of(
                copy_.model, [lisa.layers[name].rest, *(lisa.layers[name].blocks[i] for i in ever)]
            )
    assert ever == set(range(BLOCKS))


def test_moments_of_what_is_always_on_continue_and_those_of_drawn_blocks_start_anew():
    """Against Adam written by hand, with two of three blocks drawn, so that one is drawn twice in a row."""
    lisa, copies = two_copies(make(), {"layers": 2, "interval": 3})
    u, layers, lr = copies["u"], lisa.layers["u"], 1e-2
    rest = {id(p) for p in layers.rest}
    shadow = {id(p): p.detach().double().clone() for p in u.model.parameters()}
    moments: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
    previous = None
    for step in range(15):
        drawn = lisa.draw(step // 3, "u")
        lisa.switch(step, copies)
        if step % 3 == 0 and drawn != previous:
            moments = {key: value for key, value in moments.items() if key in rest}
        previous = drawn
        row = batch([step, step + 1, step + 2])
        u.backward(u.losses(row, step).sum(), last=True)
        for p in layers.rest + [p for i in drawn for p in layers.blocks[i]]:
            gradient = p.grad.double()
            m, v, count = moments.get(id(p), (torch.zeros_like(gradient), torch.zeros_like(gradient), 0))
            m, v, count = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, count + 1
            moments[id(p)] = m, v, count
            shadow[id(p)] -= lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
        u.step(lr, u.gradient_norm())
    for name, p in u.model.named_parameters():
        torch.testing.assert_close(p.detach().double(), shadow[id(p)], rtol=0, atol=1e-3 * lr, msg=name)


def test_with_all_layers_it_is_full_training_bit_for_bit():
    lisa, copies = two_copies(make(), {"layers": BLOCKS, "interval": 2}, weight_decay=0.1, clip_grad_norm=0.5)
    _, full = two_copies(make(), None, weight_decay=0.1, clip_grad_norm=0.5)
    for step in range(5):
        one_step(step, copies, lisa)
        one_step(step, full, None)
    for name in "uw":
        assert torch.equal(flat(copies[name].model), flat(full[name].model))
        assert not torch.equal(flat(full[name].model), flat(make()))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_head_and_final_norm_can_be_frozen(tied):
    lisa, copies = two_copies(
        make(tie_word_embeddings=tied), {"lisa_train_embeddings": False, "seed": SEED}, weight_decay=0.1
    )
    start = snapshot(copies["w"].model)
    for step in range(8):
        one_step(step, copies, lisa)
        drawn = lisa.draw(step // 2, "w")
        assert with_state(copies["w"]) == names_of(copies["w"].model, [lisa.layers["w"].blocks[i] for i in drawn])
    every_block = names_of(copies["w"].model, lisa.layers["w"].blocks)
    assert changed(copies["w"].model, start) == every_block


def test_an_equal_draw_in_a_row_changes_nothing():
    """Neither a parameter nor a moment: as one interval of twice the length."""
    drawn = [LayerDraw(BLOCKS, 1, 0, True)(interval, "u") for interval in range(30)]
    first = next(i for i in range(29) if drawn[i] == drawn[i + 1])
    lisa, copies = two_copies(make(), {"interval": 1})
    lisa.switch(first, copies)
    one_step(first, copies, None)
    optimizer, state = copies["w"].optimizer, copy.deepcopy(copies["w"].optimizer.state_dict())
    before = snapshot(copies["w"].model)
    lisa.switch(first + 1, copies)
    assert copies["w"].optimizer is optimizer and not changed(copies["w"].model, before)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"] and after["state"].keys() == state["state"].keys()
    for number, moments in state["state"].items():
        assert all(torch.equal(after["state"][number][key], value) for key, value in moments.items())


def test_between_intervals_nothing_is_drawn():
    lisa, copies = two_copies(make(), {"interval": 4})
    optimizers = {name: copy_.optimizer for name, copy_ in copies.items()}
    for step in (1, 2, 3, 5, 6, 7, 9):
        lisa.switch(step, copies)
    assert {name: copy_.optimizer for name, copy_ in copies.items()} == optimizers


def test_copies_that_draw_apart_train_their_own_blocks():
    lisa, copies = two_copies(make(), {"interval": 1, "lisa_shared_draw": False})
    step = next(i for i in range(1, 30) if lisa.draw(i, "u") != lisa.draw(i, "w"))
    before = {name: snapshot(copy_.model) for name, copy_ in copies.items()}
    one_step(step, copies, lisa)
    for name, copy_ in copies.items():
        layers = lisa.layers[name]
        blocks = [layers.blocks[i] for i in lisa.draw(step, name)]
        assert changed(copy_.model, before[name]) == names_of(copy_.model, [layers.rest, *blocks])

"""Memory of a forward and backward pass, measured by a pass on the meta device, where tensors have no data."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel.errors import UserError
from bilevel.memory.alike import Pass, extrapolated
from bilevel.model.adapters import add_adapters
from bilevel.model.chunked_head import head_losses, is_linear, wide_linear
from bilevel.model.cpu_kernels import speed_up
from bilevel.model.frozen_base import TYPES
from bilevel.model.lisa import Layers, find_blocks
from bilevel.model.loading import trained_shape
from bilevel.model.losses import returns_logits_as_they_are
from bilevel.settings.fields import Settings

KERNEL = "without_scores"  # name of our stand-in for sdpa and flash attention, which do not store (T, T) scores


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations create while this mode is active."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}
        self.peaks: list[int] = []  # of the parts that have ended

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def split(self) -> None:
        """End a part: its peak goes to `peaks`, and that of the next part begins."""
        self.peaks.append(self.peak)
        self.peak = self.live

    def ignore(self, model: torch.nn.Module) -> None:
        """Do not count the weights of the model, which the plan has in other lines."""
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            self.known[id(storage)] = weakref.ref(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def freed(_: Any) -> None:
            del self.known[key]
            self.live -= size

        self.known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def meta_model(settings: Settings, shape: transformers.PretrainedConfig, dtype: str) -> torch.nn.Module:
    """The model on the meta device (no data), in the dtype of its forward pass and in training mode."""
    wanted = settings.attn_implementation
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            trained_shape(settings, shape), dtype=TYPES[dtype], attn_implementation=wanted
        )
    if model.config._attn_implementation != "eager":
        transformers.AttentionInterface.register(KERNEL, attention)
        model.set_attn_implementation(KERNEL)
    if settings.lora_rank is not None:
        with torch.device("meta"):
            model.adapters = add_adapters(model, settings)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return speed_up(model).train()


def micro_batch(settings: Settings) -> tuple[int, int]:
    """(B, T) of the largest micro-batch: rows of max_length - 1 inputs (the last token is only a target)."""
    length = settings.max_length - 1
    return max(1, settings.micro_batch_tokens // length), length


def measure_pass(settings: Settings, model: torch.nn.Module) -> Pass:
    """Measure one micro-batch in which every position is supervised. Complete gradients are freed at once."""
    tokens = torch.zeros(micro_batch(settings), dtype=torch.long, device="meta")
    try:
        blocks = find_blocks(model)
    except UserError:  # a model without a list of blocks has none to leave out
        blocks = torch.nn.ModuleList()
    return extrapolated(blocks, lambda: _measure(model, blocks, tokens))


def _measure(model: torch.nn.Module, blocks: torch.nn.ModuleList, tokens: torch.Tensor) -> Pass:
    """One pass through the model as it is. blocks: its decoder blocks, perhaps none; tokens: (B, T)."""
    with LiveBytes() as bytes_, dropped_gradients(model), when_passed_back(blocks, bytes_.split):
        bytes_.ignore(model)
        hidden = model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[0]
        kept = bytes_.live
        cut = hidden.detach().requires_grad_()
        loss = head_loss(model, cut, tokens)
        loss.backward()
        del loss
        bytes_.split()
        if hidden.requires_grad:
            gradient, cut = cut.grad, None
            hidden.backward(gradient)
        of_head, *ended = bytes_.peaks
    # The blocks' part has ended if the gradient went on to the embeddings, and is the last one if those are frozen.
    of_blocks, of_embeddings = (ended[0], bytes_.peak) if ended else (bytes_.peak, 0)
    return Pass(kept, max(0, of_head - kept), max(0, of_blocks - kept), of_embeddings)


def head_loss(model: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss as bilevel.model.losses computes it: on a copy of the supervised positions, in fp32, or in chunks."""
    head, cut, targets = model.get_output_embeddings(), hidden.flatten(0, 1).clone().unsqueeze(0), targets.flatten()
    one = targets[None, :1]
    if is_linear(head) and returns_logits_as_they_are(model, head, input_ids=one, attention_mask=torch.ones_like(one)):
        return head_losses(head, cut, targets, torch.ones_like(targets, dtype=torch.float32)).sum()
    logits = wide_linear(head, cut)[0]
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").sum()


def draw_worst(settings: Settings, layers: Layers) -> tuple[int, ...]:
    """The drawn blocks that need most memory: the largest, or of equal ones the first, as backward goes deepest."""
    sizes = [sum(p.numel() for p in block) for block in layers.blocks]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    return tuple(sorted(order[: settings.lisa_layers]))


@contextmanager
def dropped_gradients(model: torch.nn.Module) -> Iterator[None]:
    """A context in which complete gradients are freed at once, as ZeRO does by copying them into its buffers."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def when_passed_back(blocks: torch.nn.ModuleList, call: Callable[[], None]) -> Iterator[None]:
    """A context in which `call` is called once, when the gradient of the first block's input is complete.

    It is not called if there is no block, or if that input needs no gradient.
    """

    def watch(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        while handles:  # checkpointing runs the block again
            handles.pop().remove()
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        for hidden in [value for value in inputs if value.requires_grad][:1]:
            hidden.register_hook(lambda _: call())

    handles = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks[:1]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attention that stores what sdpa stores: query, key, value (B, heads, T, D), the output, and a sum per row."""
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    return out.transpose(1, 2).contiguous(), None

"""How fast this machine trains a model: one block and two blocks of it, measured before anything is loaded.

The model has the shape of the run's, with random weights. Two blocks minus one is what a block takes; the rest is
embeddings, head and loss. Steps of the optimizer are left out: they take little beside the passes of a micro-batch.
"""

import copy
import dataclasses
import time

import psutil
import torch
import transformers

from bilevel.memory.activations import head_loss
from bilevel.model.adapters import add_adapters
from bilevel.model.cpu_kernels import speed_up
from bilevel.model.loading import trained_shape
from bilevel.settings.fields import Settings

ROUNDS, LONG = (3, 20), 2.0  # passes of each kind, of which the fastest counts: at least, at most; seconds for the rest
SHARE = 0.25  # of the free memory that the two blocks may take
WORK = {"cpu": 5e10, "cuda": 5e13}  # operations of a pass that is measured, unless one row takes more


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds per token of a row of this length: of a forward and backward pass, and of a forward pass alone."""

    training: float
    reading: float


def measure(settings: Settings, shape: transformers.PretrainedConfig, dtype: str, length: int) -> Pace | None:
    """The pace with micro-batches of rows of `length` tokens; None if the blocks are too large, or cannot be run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = shape.get_text_config().num_hidden_layers
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in _model(settings, shape, 2).parameters())
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
        if 8 * size > SHARE * free:  # fp32, with gradients
            return None
        most = int(WORK[device.type] / (6 * size * length))
        rows = max(1, min(settings.micro_batch_tokens // length, most))
        one, two = (_seconds(settings, shape, number, device, dtype, (rows, length)) for number in (1, 2))
    except Exception:  # a model that cannot be cut to two blocks may fail in any way, and that must not stop a check
        return None
    training, reading = (first + (blocks - 1) * max(0.0, both - first) for first, both in zip(one, two, strict=True))
    return Pace(training / (rows * length), reading / (rows * length))


def _model(settings: Settings, shape: transformers.PretrainedConfig, blocks: int) -> torch.nn.Module:
    """The run's model, cut to its first blocks, with the parameters that train in a run."""
    short = copy.deepcopy(trained_shape(settings, shape))
    text = short.get_text_config()
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:blocks]
    model = transformers.AutoModelForCausalLM.from_config(short, attn_implementation=settings.attn_implementation)
    if settings.lora_rank is not None:
        add_adapters(model, settings)
    return speed_up(model).train()


def _seconds(
    settings: Settings,
    shape: transformers.PretrainedConfig,
    blocks: int,
    device: torch.device,
    dtype: str,
    size: tuple[int, int],
) -> tuple[float, float]:
    """Seconds of a micro-batch of this size (B, T): of its forward and backward pass, and of its forward pass."""
    with device:
        model = _model(settings, shape, blocks)
        vocabulary = shape.get_text_config().vocab_size
        tokens = torch.randint(0, vocabulary, size, device=device)
    training, reading = [], []
    while len(training) < ROUNDS[0] or (len(training) < ROUNDS[1] and sum(training) < LONG):
        start = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            hidden = model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[0]
            loss = head_loss(model, hidden, tokens)
        reading.append(_now(device) - start)
        loss.backward()
        training.append(_now(device) - start)
        model.zero_grad(set_to_none=True)
    return min(training), min(reading)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

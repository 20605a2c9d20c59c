"""Several processes: how they find each other, which of them writes, and how they come to one decision.

A job of one process starts nothing here, and every function gives the plain answer. In a job of several, `Agreement`,
`summed`, `largest`, `from_first`, `from_all` and `together` are called by all of them, in the same order.

    LLAMAX_COORDINATOR   host:port of process 0         set by launch/local.py, or by hand; without it, what jax finds
    LLAMAX_PROCESSES     how many there are             in the environment of Slurm, Open MPI, a TPU pod or an indexed
    LLAMAX_PROCESS       this one's number              Kubernetes job (JOB_COMPLETION_INDEX serves as number, too)
    LLAMAX_HEARTBEAT_S   seconds of silence after which a process counts as lost, and the others end (100)
    LLAMAX_JOIN_S        seconds in which all have to be there (55)
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import cloud_tpu_init, clusters, distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax.config import ConfigError

HEARTBEAT_S, JOIN_S = 100, 55
PATIENCE_S = 60  # more for jax, so that our own message comes first
MEET_MS = 3000  # at the end
PATIENCE_MS = 24 * 3600 * 1000  # for process 0 to decide: it may read a large checkpoint; if it dies, heartbeats tell
_told: list[str] = []  # the keys of what process 0 has told


class Missing(ConfigError):
    """The host of process 0 is not there (yet): another try may do."""

    exit_code = 1


# ------------------------------------------------------------------------------------------------ finding each other


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job that the environment describes; call it before jax touches a device. Calling it again is harmless.

    From then on an uncaught error ends the process at once: a usual exit would wait for the others. If not all of them
    come in time, this process says so and ends: jax itself would end it too, later and with a stack trace of its own.

    Raises:
      ConfigError: the variables contradict each other, or process 0 cannot have its port.
    """
    if jax.distributed.is_initialized():
        return
    join_s = int(environment.get("LLAMAX_JOIN_S", JOIN_S))
    how = explicit(environment) or of_cluster(environment, join_s)
    if how is None:
        return
    check_port(how)
    # Its SIGTERM handler would take the place of ours, with which a run saves and stops.
    jax.config.update("jax_enable_preemption_service", False)
    heartbeat_s = int(environment.get("LLAMAX_HEARTBEAT_S", HEARTBEAT_S))
    timer = threading.Timer(join_s, give_up, (how, join_s))
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(**how, initialization_timeout=join_s + PATIENCE_S, heartbeat_timeout_seconds=heartbeat_s)
    timer.cancel()
    sys.excepthook = end_at_once


def check_port(how: Mapping[str, Any]) -> None:
    """ConfigError in process 0 if another program has its port: jax would crash."""
    port = int(how["coordinator_address"].rpartition(":")[2])
    if how["process_id"] != 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what an earlier job has left is no obstacle
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            asked, true = f"Process 0 on {platform.node()} at port {port}", f"it cannot be had: {error.strerror}"
            raise ConfigError(asked, true, "End what uses it, or choose another port.") from None


def give_up(how: Mapping[str, Any], join_s: float) -> NoReturn:
    """Ends a process whose job is not complete. Process 0 ends last: its end would keep the others from saying it."""
    me, n = f"Process {how['process_id']} on {platform.node()}", how["num_processes"]
    error = ConfigError(
        f"{me} in a job of {n} with process 0 at {how['coordinator_address']}",
        f"not all of them have come within {join_s} s (LLAMAX_JOIN_S)",
        "Look for one that has not started or has ended, and whether it reaches that address.",
    )
    print(f"llamax: {error}", file=sys.stderr)
    time.sleep(MEET_MS / 1000 if how["process_id"] == 0 else 0)
    end(1)  # not 2: it may be another one's death, and another try may do


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


def of_cluster(environment: Mapping[str, str], timeout_s: int) -> dict[str, Any] | None:
    """What jax finds in a cluster's job of several processes, as arguments of `jax.distributed.initialize`; or None.

    A pod that is not of an indexed Kubernetes job is not asked: it is alone. A process that has its node for itself
    gets all devices there; jax would give it the first.
    """
    for kind in clusters.ClusterEnv._cluster_types:
        alone = kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environment
        if kind.opt_in_only_method or alone or not kind.is_env_present():
            continue
        if kind.get_process_count() == 1:
            return None
        try:
            address = kind.get_coordinator_address(timeout_s, environment.get("JAX_COORDINATOR_PORT"))
        except RuntimeError as error:
            change = "Look whether that host is there and has a name here."
            raise Missing(f"Process 0 of the job that {platform.node()} belongs to", f"{error}", change) from error
        how = {
            "coordinator_address": address,
            "num_processes": kind.get_process_count(),
            "process_id": kind.get_process_id(),
            "cluster_detection_method": "deactivate",
        }
        local = kind.get_local_process_id()
        chosen = "JAX_LOCAL_DEVICE_IDS" in environment or cloud_tpu_init.running_in_cloud_tpu_vm
        return how if local is None or chosen or has_its_node(environment) else how | {"local_device_ids": [local]}
    return None


def has_its_node(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or Open MPI has started one process on each node."""
    tasks, nodes = environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_STEP_NUM_NODES")
    return (tasks is not None and tasks == nodes) or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


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
    """Ends this process; at the usual exit jax would wait for the others, who may never come.

    Where all end for one reason they meet here for a moment: the end of process 0 would keep the others from saying it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    client = distributed.global_state.client
    if several() and client is not None:
        with contextlib.suppress(Exception):
            client.wait_at_barrier("llamax/leave", MEET_MS)
            time.sleep(0.5 if is_first() else 0)
    end(code)


def end(code: int) -> NoReturn:
    """Ends this process here and now."""
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


def from_all(mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """What `decide` makes, in process 0, of what every process says, in the order of their numbers (JSON both ways).

    In all of them, its ConfigError too. For rare moments: all send to the first.
    """
    if not several():
        return decide([mine])
    client, key = distributed.global_state.client, f"llamax/said/{len(_told)}"
    assert client is not None
    client.key_value_set(f"{key}/{number()}", json.dumps(mine))
    n = distributed.global_state.num_processes

    def decide_of_all() -> Any:
        said = [json.loads(client.blocking_key_value_get(f"{key}/{i}", PATIENCE_MS)) for i in range(n)]
        client.key_value_delete(f"{key}/")
        return decide(said)

    return from_first(decide_of_all)


def together(do: Callable[[], Any]) -> Any:
    """What `do` returns in this process; all call it. Its ConfigError in one of them is raised in all, naming it."""
    if not several():
        return do()
    value, refused = None, None
    try:
        value = do()
    except ConfigError as error:
        refused = [error.asked, error.true, error.change]
    from_all([platform.node(), refused], _raise_first)
    return value


def _raise_first(said: list[Any]) -> None:
    for other, (host, refused) in enumerate(said):
        if refused is not None:
            asked, true, change = refused
            raise ConfigError(f"Process {other} on {host}: {asked}", true, change)


def summed(values: Sequence[float]) -> list[float]:
    """The sum over processes of each value, in float32; on the devices, as cheap as a step's smallest collective."""
    if not several():
        return list(values)
    return [float(x) for x in jax.device_get(_combined(np.asarray([values], np.float32), "sum"))]


def largest(counts: np.ndarray) -> np.ndarray:
    """The largest that any process has of each whole number; as `summed`."""
    if not several():
        return counts
    found = np.asarray(jax.device_get(_combined(counts.reshape(1, -1).astype(np.int32), "max")))
    return found.reshape(counts.shape)


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

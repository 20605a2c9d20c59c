"""The part of Kubernetes' and JobSet's API that our manifest may use: which fields there are, and what they hold.

A schema is a type (`str`), a tuple of allowed values, `[schema]` for a list, `{str: schema}` for a mapping with any
keys, or a dict of fields, in which "name!" is required. Field names are those of JobSet's v1alpha2 (jobset_types.go),
Job's batch/v1 and Pod's v1.
"""

from __future__ import annotations

from typing import Any

METADATA = {"name!": str, "namespace": str, "labels": {str: str}, "annotations": {str: str}}

POD_FAILURE_RULE = {
    "action!": ("FailJob", "FailIndex", "Ignore", "Count"),
    "onExitCodes": {"containerName": str, "operator!": ("In", "NotIn"), "values!": [int]},
    "onPodConditions": [{"type!": str, "status": ("True", "False", "Unknown")}],
}

CONTAINER = {
    "name!": str,
    "image!": str,
    "command": [str],
    "args": [str],
    "workingDir": str,
    "env": [{"name!": str, "value": str}],
    "ports": [{"containerPort!": int, "name": str, "protocol": ("TCP", "UDP")}],
    "resources": {"limits": {str: str}, "requests": {str: str}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}

VOLUME = {
    "name!": str,
    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
    "emptyDir": {"medium": ("", "Memory"), "sizeLimit": str},
}

POD = {
    "restartPolicy!": ("Never", "OnFailure"),  # a Job takes no other
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {str: str},
    "serviceAccountName": str,
    "containers!": [CONTAINER],
    "volumes": [VOLUME],
}

JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": ("Indexed", "NonIndexed"),
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "podFailurePolicy": {"rules!": [POD_FAILURE_RULE]},
    "template!": {"metadata": {"labels": {str: str}, "annotations": {str: str}}, "spec!": POD},
}

FAILURE_RULE = {
    "name": str,
    "action!": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    "onJobFailureReasons": [
        ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
    ],
    "targetReplicatedJobs": [str],
}

JOB_SET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": METADATA,
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int, "rules": [FAILURE_RULE]},
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
    },
}


def problems(value: Any, schema: Any, where: str = "") -> list[str]:
    """What is wrong with a manifest, one line each; none if it fits."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where} is {type(value).__name__}, not {schema.__name__}"]
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{where} is {value}, not one of {schema}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where} is {type(value).__name__}, not a list"]
        return [line for i, entry in enumerate(value) for line in problems(entry, schema[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where} is {type(value).__name__}, not a mapping"]
    if list(schema) == [str]:
        return [line for key, entry in value.items() for line in problems(entry, schema[str], f"{where}.{key}")]
    fields = {name.rstrip("!"): of for name, of in schema.items()}
    needed = {name[:-1] for name in schema if name.endswith("!")}
    found = [f"{where}.{name} is missing" for name in sorted(needed - value.keys())]
    for name, entry in value.items():
        known = name in fields
        found += problems(entry, fields[name], f"{where}.{name}") if known else [f"{where}.{name} is unknown"]
    return found

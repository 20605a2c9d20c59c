#!/bin/bash
# A training run on all workers of a Cloud TPU pod, by gcloud. Each worker has the package and DIR; jax finds the others
# in the pod's metadata. --workdir has to be a folder that all workers see.
#
#   launch/tpu_pod.sh --name pod --zone us-east5-a -- llamax train recipes/scout_pretrain.py --workdir /shared/scout
#
#   --name NAME  --zone ZONE    of the TPU                 --project ID    (gcloud's own)
#   --dir DIR                   where the command runs on the workers (llamax, in the home folder)
#   --restarts R                starts after a failure, at most (3); each goes on from the newest checkpoint
#   --dry-run                   prints the command, starts nothing
#
# SIGTERM and Ctrl-C are passed on to the workers: the run saves and stops. Not followed by another start: wrong input
# (2), too many bad steps (3), a full disk (4), a stop. What gcloud lost but still runs is ended before another start.
set -u

name='' zone='' project='' dir=llamax restarts=3 dry_run=
usage() {
    echo "tpu_pod.sh: $1. launch/tpu_pod.sh --name NAME --zone ZONE -- llamax train RECIPE --workdir DIR" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
    --) shift && break ;;
    --dry-run) dry_run=yes && shift ;;
    --name | --zone | --project | --dir | --restarts)
        if [ $# -lt 2 ]; then usage "$1 has no value"; fi
        printf -v "${1#--}" '%s' "$2" && shift 2
        ;;
    *) usage "unknown option $1" ;;
    esac
done
if [ $# -eq 0 ]; then usage "no command"; fi
if [ -z "$name" ] || [ -z "$zone" ]; then usage "--name and --zone are missing"; fi

workers=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all)
if [ -n "$project" ]; then workers+=(--project="$project"); fi
# What stands in single quotes is for the workers' shell.
# shellcheck disable=SC2016
printf -v pid '"${TMPDIR:-/tmp}"/llamax-%q.pid' "$name"
printf -v command '%q ' "$@"
printf -v start 'cd %q && echo $$ > %s && exec %s' "$dir" "$pid" "${command% }"
# A number may by now be another program's: its folder tells.
# shellcheck disable=SC2016
printf -v signal 'p=$(cat %s 2>/dev/null) && [ "$(readlink /proc/$p/cwd)" = "$(cd %q && pwd -P)" ] && kill -%%s $p; true' \
    "$pid" "$dir"

if [ -n "$dry_run" ]; then
    printf '%q ' "${workers[@]}" "--command=$start" && echo
    exit
fi

asked='' job=
tell() { # a signal's name; to the run on every worker
    # shellcheck disable=SC2059 # it is the format
    "${workers[@]}" "--command=$(printf "$signal" "$1")"
}
pass_on() {
    asked=yes
    if [ -n "$job" ]; then tell TERM; fi
}
trap pass_on TERM INT

code_of() { # of a process in the background, when it has ended; a signal ends the waiting, not the process
    local code again
    wait "$1"
    code=$?
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
        code=$?
    done
    wait "$1" 2>/dev/null # it may have ended while a signal was handled
    again=$?
    if [ "$again" -ne 127 ]; then code=$again; fi
    return "$code"
}

for ((left = restarts; ; left--)); do
    "${workers[@]}" "--command=$start" & # a Ctrl-C does not reach what runs in the background
    job=$!
    code_of "$job"
    code=$?
    job=
    case $code in 0 | 2 | 3 | 4 | 130 | 143) exit "$code" ;; esac
    if [ -n "$asked" ] || [ "$left" -le 0 ]; then exit "$code"; fi
    echo "tpu_pod.sh: ended with $code; starting again ($left times at most)" >&2
    tell KILL
done

#!/bin/bash
# Fills in jobset.yaml and hands it to kubectl: a training run on Kubernetes with JobSet, one pod for each process.
#
#   launch/k8s/submit.sh --name scout --image IMAGE --processes 32 --resource nvidia.com/gpu=8 --claim CLAIM \
#       -- llamax train recipes/scout_pretrain.py --workdir /workdir/scout
#
#   --name NAME             of the JobSet                       --image IMAGE    with the package, and the recipe
#   --processes N           pods, one for each node             --claim CLAIM    a volume for all, mounted at /workdir
#   --resource KEY=N        what a pod asks for; may be given several times
#   --select KEY=VALUE      a label of the nodes; may be given several times
#   --restarts R            of all pods after a failure, at most (3); each goes on from the newest checkpoint
#   --dry-run               prints the manifest, starts nothing
#
# To stop it: kubectl delete jobset NAME. The pods get a SIGTERM and five minutes to save.
set -u

name='' image='' processes='' claim='' resource='' select='' restarts=3 dry_run=
usage() {
    echo "submit.sh: $1; the head of this file shows how it is called" >&2
    exit 2
}
quoted() { printf "'%s'" "${1//\'/\'\'}"; } # as YAML has it
entry() { # KEY=VALUE as an entry of a YAML mapping
    case $1 in ?*=?*) echo "$(quoted "${1%%=*}"): $(quoted "${1#*=}"), " ;; *) usage "$1 is not KEY=VALUE" ;; esac
}
while [ $# -gt 0 ]; do
    case $1 in
    --) shift && break ;;
    --dry-run) dry_run=yes && shift && continue ;;
    esac
    if [ $# -lt 2 ]; then usage "$1 has no value"; fi
    case $1 in
    --resource) resource+=$(entry "$2") || exit ;;
    --select) select+=$(entry "$2") || exit ;;
    --name | --image | --processes | --claim | --restarts) printf -v "${1#--}" '%s' "$2" ;;
    *) usage "unknown option $1" ;;
    esac
    shift 2
done
if [ $# -eq 0 ]; then usage "no command"; fi
for needed in name image processes claim; do
    if [ -z "${!needed}" ]; then usage "--$needed is missing"; fi
done
case $processes$restarts in *[!0-9]*) usage "--processes and --restarts are numbers" ;; esac

command=
for word in "$@"; do command+="$(quoted "$word"), "; done
manifest=$(cat "$(dirname "$0")/jobset.yaml")
manifest=${manifest//@NAME@/"$name"}
manifest=${manifest//@IMAGE@/"$(quoted "$image")"}
manifest=${manifest//@PROCESSES@/"$processes"}
manifest=${manifest//@RESTARTS@/"$restarts"}
manifest=${manifest//@CLAIM@/"$claim"}
manifest=${manifest//@RESOURCES@/"{${resource%, }}"}
manifest=${manifest//@SELECTOR@/"{${select%, }}"}
manifest=${manifest//@COMMAND@/"[${command%, }]"}

if [ -n "$dry_run" ]; then
    echo "$manifest"
    exit
fi
exec kubectl apply -f - <<<"$manifest"

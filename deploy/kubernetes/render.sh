#!/usr/bin/env bash
# Write the chart's manifests for those who use no Helm, vlv.yaml and caption-job.yaml: deploy/kubernetes/render.sh
# [VALUES...], such as --set image.repository=registry.example.org/vlv --set models.claim=weights. OUT names another folder.
set -euo pipefail
cd "$(dirname "$0")"
head="# Made by deploy/kubernetes/render.sh from deploy/helm/vlv: change the chart, or patch this with kustomize."
write() {  # write FILE HELM-OPTIONS...
    { echo "$head"; "${HELM:-helm}" template vlv ../helm/vlv "${@:2}"; } >"${OUT:-.}/$1"
}
write vlv.yaml "$@"
write caption-job.yaml --show-only templates/caption-job.yaml --set captionJob.enabled=true "$@"

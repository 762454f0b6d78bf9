#!/usr/bin/env bash
# Write vlv.yaml, the chart's manifests for those who use no Helm: deploy/kubernetes/render.sh [VALUES...]
set -euo pipefail
cd "$(dirname "$0")"
{
    echo "# Made by deploy/kubernetes/render.sh from deploy/helm/vlv: change the chart, or patch this with kustomize."
    "${HELM:-helm}" template vlv ../helm/vlv "$@"
} >"${OUT:-vlv.yaml}"

#!/usr/bin/env bash
# Resolves engines/requirements/PEER.in into the lock PEER.txt: every version, with the hashes of all its files. Wants uv and a package index.
# Use:  scripts/lock_peer.sh unsloth
# torch and what it depends on stay outside (Makefile installs it first); where the harness pins a version too, the lock has the same,
# but for Axolotl, which pins nearly all of its packages itself and declares Python 3.12 (it runs on 3.11 as well).
set -euo pipefail
cd "$(dirname "$0")/../engines/requirements"
peer=${1:?which peer: $(basename -s .in ./*.in | xargs)}
case $peer in
  axolotl) choice=(--python-version 3.12) ;;
  *) choice=(--python-version 3.11 --constraint ../../requirements/constraints.txt) ;;
esac
command=(uv pip compile "$peer.in" --override "$peer.overrides" "${choice[@]}" --output-file "$peer.txt" --no-python-downloads
  --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate)
"${command[@]}" >/dev/null
sed -i "1i # Made by scripts/lock_peer.sh $peer; do not edit. Install with --no-deps --require-hashes, after torch (make peers)." "$peer.txt"

#!/usr/bin/env bash
# Resolves engines/requirements/PEER.in into the lock PEER.txt: every version, with the hashes of all its files. Wants uv and a package index.
# Use:  scripts/lock_peer.sh unsloth
# torch and what it depends on stay outside (Makefile installs it first); where the harness pins a version too, the lock has the same.
set -euo pipefail
cd "$(dirname "$0")/../engines/requirements"
peer=${1:?which peer: $(basename -s .in ./*.in | xargs)}
command=(uv pip compile "$peer.in" --override "$peer.overrides" --constraint ../../requirements/constraints.txt --output-file "$peer.txt"
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate)
"${command[@]}" >/dev/null
sed -i "1i # Made by scripts/lock_peer.sh $peer; do not edit. Install with --no-deps --require-hashes, after torch (make peers)." "$peer.txt"

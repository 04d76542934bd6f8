#!/usr/bin/env bash
# An interpreter for a peer on a machine without a network: an empty virtual environment that looks for packages in FOLDERs, in this order,
# and then wherever PYTHON does. Unpack the peer's wheels into a folder (pip download there where a network is; unzip here) and name it.
# Use:  scripts/peer_python.sh NEW_ENVIRONMENT FOLDER…          then  python -m harness engine=unsloth engine.python=NEW_ENVIRONMENT/bin/python
# PYTHON=python3 is the interpreter whose torch, transformers and the like are used.
set -euo pipefail
python=${PYTHON:-python3}
new=${1:?the folder of the new environment}
shift
[ $# -gt 0 ] || { echo "no folder of packages: peer_python.sh NEW_ENVIRONMENT FOLDER…" >&2; exit 2; }
for folder in "$@"; do
  [ -d "$folder" ] || { echo "$folder: there is no such folder; unpack the peer's packages there first" >&2; exit 2; }
done
"$python" -m venv --without-pip "$new"
# A line of a .pth file is appended to sys.path: the peer's own first, so that its versions go before those of the host.
site=$("$new/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
realpath "$@" >"$site/peer.pth"
"$python" -c 'import os, sys; print(*[path for path in sys.path if path and os.path.isdir(path) and os.path.basename(path).endswith("-packages")], sep="\n")' \
  >>"$site/peer.pth"
"$new/bin/python" -c 'import sys, torch; print(f"{sys.executable}: Python {sys.version.split()[0]}, torch {torch.__version__}")'

#!/usr/bin/env bash
# Runs the tests with other versions of the dependencies than constraints.txt has.
#
#   bash scripts/versions.sh lowest     the lower bounds of pyproject.toml
#   bash scripts/versions.sh newest     the newest versions that pyproject.toml and the index allow
#
# The committed state is copied to build/versions-WHICH, where constraints.txt is made anew; `make test` does the rest.
# The versions stay in build/versions-WHICH/constraints.txt. Further arguments go to pytest in place of the default run.
# KEEP names packages that stay as they are in constraints.txt: KEEP="torch torchvision" where only one build of torch
# can be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=${1:-}
case $which in
lowest) resolution=lowest-direct ;;
newest) resolution=highest ;;
*)
    echo "usage: bash scripts/versions.sh lowest|newest [PYTEST ARGUMENTS]" >&2
    exit 2
    ;;
esac
shift

python=${PYTHON:-python3}
folder=$PWD/build/versions-$which
tool=$PWD/build/versions-tool
mkdir -p "$folder"
git archive HEAD | tar -x -C "$folder"
[ -x "$tool/bin/uv" ] || { "$python" -m venv "$tool" && "$tool/bin/python" -m pip install -q uv; }

extras=$(sed -n 's/.*setup\.sh \(demo,dev[^ ]*\)$/\1/p' Makefile)
cd "$folder"
for name in ${KEEP:-}; do grep -E "^$name==" constraints.txt; done >kept.txt
rm constraints.txt # its versions would be preferred
# Without the lines of other packages' own lower bounds: those are the newest in both cases.
"$tool/bin/uv" pip compile -q --resolution "$resolution" --python "$python" --no-annotate --no-header --no-emit-package mlorq -c kept.txt \
    $(printf -- '--extra %s ' ${extras//,/ }) pyproject.toml -o constraints.txt
echo "versions: $(grep -cE '^[a-z]' constraints.txt) packages, among them" \
    "$(grep -E '^(prefect|timm|torch|transformers|pulp)==' constraints.txt | paste -s -d ' ')"
if [ $# -eq 0 ]; then
    exec make test
fi
make setup-dev
exec .venv/bin/python -m pytest "$@"
